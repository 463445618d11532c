"""Embeddings are the features before the classifier; neighbors, recall and probe agree with computations by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from normfree.cli import main
from normfree.data.source import ArraySource
from normfree.embeddings import (
    embed_files,
    embed_source,
    features,
    knn_probabilities,
    linear_probe,
    nearest_of_same_label,
    recall_at_1,
)
from normfree.models.zoo import create_model
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel, save_pretrained

PRE = Preprocessing(image_size=16, crop="squash")
CPU = torch.device("cpu")


def some_source(count: int = 7) -> ArraySource:
    pixels = np.random.default_rng(0).integers(0, 255, (count, 20, 24, 3), dtype=np.uint8)
    return ArraySource(
        pixels, [i % 3 for i in range(count)], classes="abc", names=[str(i) for i in range(count)]
    )


def clusters(count: int, *, classes: int = 4, noise: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Return points around one center for each class, and their labels."""
    centers = 3 * torch.randn(classes, 6, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    return centers[labels] + noise * torch.randn(count, 6, generator=generator), labels


def test_features_are_what_the_network_without_a_classifier_returns():
    net = create_model("nf_resnet_nano", num_classes=5).eval()
    images = torch.randn(3, 3, 16, 16)
    body = create_model("nf_resnet_nano", num_classes=0, weights=None).eval()
    body.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("head.")})
    assert torch.equal(features(net, images), body(images))
    with pytest.raises(ValueError, match=r"^Linear gives logits, and no features\. Fix: use the run"):
        features(nn.Linear(2, 2), images)


def test_the_embeddings_of_a_source_do_not_depend_on_batches_or_processes():
    net, source = create_model("nf_resnet_nano", num_classes=5), some_source()
    whole, labels = embed_source(net, source, preprocessing=PRE, device=CPU)
    assert net.training
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    parts = [
        embed_source(net, source, preprocessing=PRE, device=CPU, batch_size=2, rank=rank, world_size=3)
        for rank in range(3)
    ]
    torch.testing.assert_close(torch.cat([values for values, _ in parts]), whole)
    assert torch.equal(torch.cat([own for _, own in parts]), labels)


def test_neighbors_vote_with_weights_by_similarity():
    bank, labels = clusters(50)
    queries, _ = clusters(9, seed=1)
    found = knn_probabilities(queries, bank, labels, classes=4, neighbors=5, temperature=0.2)
    for query, votes in zip(queries, found, strict=True):
        similar = F.cosine_similarity(query[None], bank)
        best = similar.argsort(descending=True)[:5]
        expected = torch.zeros(4)
        for i in best.tolist():
            expected[labels[i]] += (similar[i] / 0.2).exp()
        torch.testing.assert_close(votes, expected / expected.sum())
    few = knn_probabilities(queries, bank[:2], labels[:2], classes=4)  # fewer than the default number
    torch.testing.assert_close(few.sum(dim=1), torch.ones(9))


def test_recall_leaves_out_labels_that_occur_once():
    points = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [-1.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 0, 2])
    assert nearest_of_same_label(points, labels).tolist() == [True, True, False, False, False]
    assert recall_at_1(points, labels) == pytest.approx(200 / 3)  # 2 of the 3 images of label 0


def test_the_probe_is_at_the_optimum_and_deterministic():
    x, y = clusters(200, noise=3.0)
    test, _ = clusters(30, noise=3.0, seed=2)
    logits = linear_probe((x, y), test, classes=4, penalty=1e-2)
    assert torch.equal(logits, linear_probe((x, y), test, classes=4, penalty=1e-2))
    shifted = linear_probe((5 * x + 3, y), 5 * test + 3, classes=4, penalty=1e-2)  # features are standardized
    torch.testing.assert_close(shifted, logits, atol=1e-4, rtol=1e-4)
    # Recover the solution from the logits, and compare the loss with gradient descent's.
    mean, std = x.double().mean(0), x.double().std(0, correction=0)
    z, own = (x.double() - mean) / std, linear_probe((x, y), x, classes=4, penalty=1e-2)
    solution = torch.linalg.lstsq(torch.cat([z, torch.ones(len(z), 1).double()], dim=1), own).solution
    weight, bias = solution[:-1].requires_grad_(), solution[-1].requires_grad_()
    loss = F.cross_entropy(z @ weight + bias, y) + 1e-2 / 2 * weight.square().sum()
    loss.backward()
    assert float(weight.grad.norm()) < 1e-5
    assert float(bias.grad.norm()) < 1e-5


def test_a_constant_feature_does_not_break_the_probe():
    x, y = clusters(40)
    x[:, 0] = 2.0
    assert torch.isfinite(linear_probe((x, y), x, classes=4)).all()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(root / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    """Return a model folder without classes."""
    model = TrainedModel(create_model("nf_resnet_nano", num_classes=0), PRE, ())
    return save_pretrained(model, tmp_path_factory.mktemp("body") / "model")


def test_the_command_writes_the_embeddings_of_every_readable_file(body, photos, tmp_path, capsys):
    out = tmp_path / "new" / "e.npz"
    assert main(["predict", str(body), str(photos), "--embeddings", str(out), "--batch-size", "2"]) == 0
    assert capsys.readouterr().out == f"{out}: 5 embeddings of 256 numbers\n"
    with np.load(out) as file:
        assert file["paths"].tolist() == [str(photos / f"{i}.png") for i in range(5)]
        values = file["embeddings"]
    assert values.dtype == np.float32
    from normfree import from_pretrained

    model = from_pretrained(body)
    np.testing.assert_allclose(
        values, embed_files(model, [photos], device="cpu").values, rtol=1e-5, atol=1e-6
    )
    (tmp_path / "bad.png").write_bytes(b"not an image")
    assert main(["predict", str(body), str(tmp_path / "bad.png"), "--embeddings", str(out)]) == 2
    assert "bad.png" in capsys.readouterr().err


def test_images_of_twelve_bits_have_the_embeddings_of_eight(tmp_path):
    pre = Preprocessing(image_size=16, crop="squash", pixel_range=4095)
    model = TrainedModel(create_model("nf_resnet_nano", num_classes=0), pre, ())
    levels = np.random.default_rng(0).integers(0, 256, (20, 24)).astype(np.uint16)
    Image.fromarray(np.rint(levels * 4095.0 / 255).astype(np.uint16)).save(tmp_path / "twelve.png")
    found = embed_files(model, [tmp_path / "twelve.png", levels.astype(np.uint8)], device="cpu")
    assert found.paths == (str(tmp_path / "twelve.png"), "image 1")
    np.testing.assert_array_equal(found.values[0], found.values[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (),
            "the model has no classes, only embeddings. Fix: write embeddings with normfree predict --embeddings",
        ),
        (
            ("--embeddings", "x.csv"),
            "--embeddings is 'x.csv'. Allowed: a name that ends in .npz. Fix: --embeddings x.npz.",
        ),
        (
            ("--embeddings", "x.npz", "--out", "y.csv"),
            "--embeddings with --out. Allowed: embeddings or predictions. Fix: run the command twice.",
        ),
        (("--embeddings", "x.npz", "--batch-size", "0"), "batch_size is 0. Allowed: 1 or more."),
    ],
)
def test_wrong_arguments_of_the_command(body, photos, arguments, message, capsys):
    assert main(["predict", str(body), str(photos), *arguments]) == 2
    assert message in capsys.readouterr().err
