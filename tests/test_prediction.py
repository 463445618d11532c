"""Predictions agree with computations by hand; images in memory are predicted as files are."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from normfree.data.transforms.decode import load_image
from normfree.data.transforms.evaluate import eval_transform
from normfree.data.transforms.normalize import normalize
from normfree.data.walk import find_images
from normfree.device import run_device
from normfree.models.zoo import create_model
from normfree.prediction import predict
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel, from_pretrained, save_pretrained

CLASSES = tuple("abcdefg")
PRE = Preprocessing(image_size=16, crop="squash")


def images(count: int) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 255, (20, 24, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    net = create_model("nf_resnet_nano", num_classes=7).eval()
    with torch.no_grad():
        net.head.weight.normal_()
    save_pretrained(TrainedModel(net, PRE, CLASSES), tmp_path / "m")
    return tmp_path / "m"


def test_predictions_agree_with_a_computation_by_hand_and_unreadable_files_are_reported(
    folder: Path, tmp_path: Path
) -> None:
    model = from_pretrained(folder)
    (tmp_path / "in").mkdir()
    for i, image in enumerate(images(3)):
        image.save(tmp_path / "in" / f"{i}.png")
    (tmp_path / "in" / "1.jpg").write_bytes(b"\xff\xd8\xffnothing")
    answers = list(predict(model, [tmp_path / "in"], top=2, batch_size=2, device="cpu"))
    assert [a.path.rpartition("/")[2] for a in answers] == ["0.png", "1.jpg", "1.png", "2.png"]
    assert answers[1].classes == ()
    assert "1.jpg" in answers[1].error
    for i, answer in zip(range(3), (answers[0], *answers[2:]), strict=True):
        image = eval_transform(image_size=16, crop="squash")(load_image(tmp_path / "in" / f"{i}.png"))
        with torch.no_grad():
            p = model.net(normalize(image[None])).softmax(1)[0]
        best = p.argsort(descending=True)[:2]
        assert answer.classes == tuple(CLASSES[c] for c in best.tolist())
        assert answer.probabilities == pytest.approx(p[best].tolist(), rel=1e-4)


def test_missing_paths_and_devices(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        find_images([tmp_path / "no"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="contains no images"):
        find_images([tmp_path / "empty"])
    Image.new("RGB", (2, 2)).save(tmp_path / "empty" / "a.PNG")
    assert [p.name for p in find_images([tmp_path / "empty"])] == ["a.PNG"]
    with pytest.raises(ValueError, match=r"device is 'gpu'\. Allowed: auto, cpu, cuda, cuda:N or mps\."):
        run_device("gpu")


@pytest.mark.parametrize(("option", "value"), [("top", 0), ("batch_size", 0), ("batch_size", -3)])
def test_invalid_arguments_fail_at_the_call(folder: Path, tmp_path: Path, option: str, value: int) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="1 or more") as error:
        # Without iterating over the result.
        predict(from_pretrained(folder), [tmp_path / "a.png"], **{option: value})
    assert str(error.value) == f"{option} is {value}. Allowed: 1 or more."
    with pytest.raises(ValueError, match=r"'/no/where\.png' does not exist\."):
        predict(from_pretrained(folder), ["/no/where.png"])


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_predictions_do_not_depend_on_the_batch_size(folder: Path, tmp_path: Path, batch_size: int) -> None:
    for i, image in enumerate(images(5)):
        image.save(tmp_path / f"{i}.png")
    # Files keep their order.
    files = [tmp_path / f"{i}.png" for i in (3, 0, 4, 1, 2)]
    model = from_pretrained(folder)
    one = list(predict(model, files, batch_size=64, device="cpu"))
    cut = list(predict(model, files, batch_size=batch_size, device="cpu"))
    assert [a.path for a in cut] == list(map(str, files))
    assert [a.classes for a in cut] == [a.classes for a in one]
    for a, b in zip(cut, one, strict=True):
        assert len(a.classes) == 5
        assert a.probabilities == pytest.approx(b.probabilities, rel=1e-4)
        assert sorted(a.probabilities, reverse=True) == list(a.probabilities)


def test_a_batch_of_unreadable_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (answer,) = predict(from_pretrained(folder), [tmp_path / "a.png"])
    assert (answer.classes, answer.probabilities) == ((), ())
    assert answer.error == f"{tmp_path}/a.png: the file is empty"


def test_images_in_memory_are_predicted_as_files_are(folder: Path, tmp_path: Path) -> None:
    (image,) = images(1)
    file = tmp_path / "a.png"
    image.save(file)
    model = from_pretrained(folder)
    (wanted,) = predict(model, str(file), device="cpu")
    for item in (file, image, np.asarray(image), file.read_bytes()):
        for given in (item, [item]):
            (found,) = predict(model, given, device="cpu")
            assert found.probabilities == wanted.probabilities
            assert found.path == (str(file) if item is file else "image 0")
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    (one, two) = predict(model, [clear, tmp_path / "clear.png"], device="cpu")
    assert one.probabilities == two.probabilities
    with pytest.raises(ValueError, match=r"an array float32 of shape \(3, 20, 20\) is no image"):
        predict(model, [np.zeros((3, 20, 20), np.float32)])
