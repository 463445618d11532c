"""Evaluation agrees with computations by hand; preprocessing is stored with the model."""

from pathlib import Path

import numpy as np
import pytest
import torch

from normfree.data.source import ArraySource
from normfree.data.transforms.normalize import normalize
from normfree.inference import evaluate, sample, sample_images
from normfree.models.zoo import create_model
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel, from_pretrained, save_pretrained

CLASSES = tuple("abcdefg")
PRE = Preprocessing(image_size=16, crop="squash")


def make_source(count: int = 11, seed: int = 0) -> ArraySource:
    random = np.random.default_rng(seed)
    images = random.integers(0, 255, (count, 20, 24, 3), dtype=np.uint8)
    labels = [int(x) for x in random.integers(0, 7, count)]
    return ArraySource(images, labels, classes=CLASSES, names=[str(i) for i in range(count)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    net = create_model("nf_resnet_nano", num_classes=7).eval()
    with torch.no_grad():
        net.head.weight.normal_()
    save_pretrained(TrainedModel(net, PRE, CLASSES), tmp_path / "m")
    return tmp_path / "m"


class Fixed(torch.nn.Module):
    """Returns logits from a list, independent of the images."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.rows, self.at = torch.tensor(rows), 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.at += len(images)
        return self.rows[self.at - len(images) : self.at]


def test_scores_agree_with_a_computation_by_hand() -> None:
    source = make_source(4)
    labels = [source.label(i) for i in range(4)]
    rows = []
    for i, label in enumerate(labels):
        order = [c for c in range(7) if c != label]
        # The labels have the ranks 1, 5, 6 and 1.
        order.insert((0, 4, 5, 0)[i], label)
        rows.append([float(7 - order.index(c)) for c in range(7)])
    model = Fixed(rows).train()
    score = evaluate(model, source, preprocessing=PRE, batch_size=3, device="cpu")
    assert (score.top1, score.top5, score.count) == (50.0, 75.0, 4)
    expected = -torch.tensor(rows).log_softmax(1)[range(4), labels].mean()
    assert score.loss == pytest.approx(float(expected), rel=1e-6)
    table = score.confusion()
    assert int(table.sum()) == 4
    assert int(table.diagonal().sum()) == 2
    assert all(int(table[i].sum()) == labels.count(i) for i in range(7))
    assert model.training


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_the_scores_do_not_depend_on_the_batch_size(folder: Path, batch_size: int) -> None:
    model = from_pretrained(folder)
    whole = evaluate(model.net, make_source(), preprocessing=PRE, batch_size=11, device="cpu")
    cut = evaluate(model.net, make_source(), preprocessing=PRE, batch_size=batch_size, device="cpu")
    assert (cut.top1, cut.top5) == (whole.top1, whole.top5)
    assert cut.loss == pytest.approx(whole.loss, rel=1e-5)


def test_logits_that_are_not_finite_or_not_one_per_class_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"logits are not finite for '0' and other images\. Allowed: 7 finite logits"
    ):
        evaluate(Fixed([[float("nan")] * 7] * 2), make_source(2), preprocessing=PRE, device="cpu")
    with pytest.raises(ValueError, match="logits have 3 columns for '0' and other images"):
        evaluate(Fixed([[0.0] * 3] * 2), make_source(2), preprocessing=PRE, device="cpu")


def test_preprocessing_survives_conversion_to_timms_keys() -> None:
    pre = Preprocessing(
        image_size=48, crop="center", crop_pct=0.9, interpolation="bilinear", mean=(0.1, 0.2, 0.3)
    )
    assert Preprocessing.from_config(pre.to_config()) == pre
    with pytest.raises(
        ValueError, match=r"pretrained_cfg of the model's config\.json has a missing or invalid entry: 'mean'"
    ):
        Preprocessing.from_config({k: v for k, v in pre.to_config().items() if k != "mean"})


def test_entries_that_are_not_numbers_are_reported() -> None:
    with pytest.raises(ValueError, match=r"has a missing or invalid entry: invalid literal for int\(\)"):
        Preprocessing.from_config({**PRE.to_config(), "input_size": [3, "large", "large"]})


def test_the_mode_is_restored_even_after_an_error(folder: Path) -> None:
    for training in (True, False):
        net = from_pretrained(folder).net.train(training)
        evaluate(net, make_source(3), preprocessing=PRE, device="cpu")
        assert net.training is training
        assert all(m.training is training for m in net.modules())
        with torch.no_grad():
            net.head.bias.fill_(float("nan"))
        with pytest.raises(ValueError, match="logits are not finite"):
            evaluate(net, make_source(3), preprocessing=PRE, device="cpu")
        assert net.training is training


def test_classes_without_images_have_no_accuracy() -> None:
    source = ArraySource(np.zeros((2, 4, 4, 3), np.uint8), [1, 1], classes=("a", "b"), names=["0", "1"])
    score = evaluate(Fixed([[0.0, 1.0], [1.0, 0.0]]), source, preprocessing=PRE, device="cpu")
    assert score.per_class() == {"b": 50.0}
    assert score.confusion().tolist() == [[0, 0], [1, 1]]
    # There are only two classes.
    assert score.top5 == 100.0


def test_samples_are_spread_evenly_over_a_source_or_files(tmp_path: Path) -> None:
    source = make_source(10)
    images, labels = sample(source, count=4, preprocessing=PRE)
    assert labels.tolist() == [source.label(i) for i in (0, 2, 5, 7)]
    transform = PRE.transform()
    expected = normalize(torch.stack([transform(source.image(i)) for i in (0, 2, 5, 7)]))
    assert torch.equal(images, expected)
    files = [tmp_path / f"{i}.png" for i in range(10)]
    for i, file in enumerate(files):
        source.image(i).save(file)
    assert torch.equal(sample_images(files, count=4, preprocessing=PRE), images)
    assert len(sample_images(source, count=99, preprocessing=PRE)) == 10
