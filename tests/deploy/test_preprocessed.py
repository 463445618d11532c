"""Files that contain their preprocessing give the probabilities of `predict`."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

from normfree import create_model, export, predict, quantize
from normfree.cli import main
from normfree.data.sources.emoji import open_emoji
from normfree.data.transforms.resample import resize_bicubic
from normfree.deploy.preprocessed import PreprocessedNet, example_pixels
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel, save_pretrained

CROPS = [
    ("squash", 1.0),
    ("squash", 0.9),
    ("resize_crop_32", 1.0),
    ("crop_resize", 1.0),
    ("center", 0.875),
    ("letterbox", 1.0),
]


def pixels_of(pre: Preprocessing, image: torch.Tensor) -> torch.Tensor:
    return PreprocessedNet(nn.Identity(), pre, lambda logits: logits).pixels(image)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(64, 48), (48, 64), (130, 61), (40, 300), (20, 20), (500, 333)])
def test_each_axis_is_resized_as_pillow_resizes_it(interpolation: str, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    pre = Preprocessing(48, crop="squash", interpolation=interpolation)
    # One axis after the other, each rounded to bytes; `resize` of both axes at once chooses the order itself.
    filter_ = Image.Resampling[interpolation.upper()]
    wanted = np.asarray(image.resize((48, image.height), filter_).resize((48, 48), filter_)).transpose(
        2, 0, 1
    )
    gap = np.abs(pixels_of(pre, torch.from_numpy(np.array(image))).numpy() - wanted)
    assert gap.max() <= 1
    # Exact halves, which are frequent in bilinear sums, are rounded by the last bit of the weights.
    assert (gap > 0).mean() < (0.03 if interpolation == "bilinear" else 1e-3)


@pytest.mark.parametrize(("crop", "crop_pct"), CROPS)
@pytest.mark.parametrize("size", [48, (40, 72)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_are_those_of_the_transform(
    crop: str, crop_pct: float, size: int | tuple[int, int], interpolation: str
) -> None:
    pre = Preprocessing(size, crop=crop, crop_pct=crop_pct, interpolation=interpolation)
    for image in (*example_pixels(), torch.randint(0, 256, (2, 90, 3), dtype=torch.uint8)):
        wanted = pre.transform()(Image.fromarray(image.numpy())).float()
        gap = (pixels_of(pre, image) - wanted).abs()
        # Pillow rounds after each axis and chooses their order; the other order gives other roundings.
        assert gap.mean() < 0.5
        assert gap.max() <= (2 if image.shape[0] > 2 else 40)


@pytest.mark.parametrize("crop", ["resize_crop_32", "crop_resize"])
def test_pixels_without_antialiasing_are_those_of_the_reference_code(crop: str) -> None:
    pre = Preprocessing(48, crop=crop, antialias=False)
    for image in example_pixels():
        wanted = pre.transform()(Image.fromarray(image.numpy()))
        torch.testing.assert_close(pixels_of(pre, image), wanted, atol=1e-3, rtol=0)
    squashed = resize_bicubic(image.numpy(), 80, 80)[16:64, 16:64]
    if crop == "resize_crop_32":
        np.testing.assert_allclose(pixels_of(pre, image).numpy(), squashed.transpose(2, 0, 1), atol=1e-3)


@pytest.fixture(scope="module")
def model() -> TrainedModel:
    torch.manual_seed(0)
    net = create_model("nf_resnet_nano", num_classes=5, depths=(1, 1, 1), skip_gain=0.7).eval()
    nn.init.normal_(net.head.weight, std=0.5)
    return TrainedModel(net, Preprocessing(image_size=32), tuple("abcde"))


def test_a_file_predicts_what_the_command_predicts(
    model: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_emoji().val
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(6):
        # Sizes and aspects that are not those of the network.
        source.image(50 * i).resize((40 + 30 * i, 130 - 15 * i)).save(photos / f"{i}.png")
    save_pretrained(model, tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), "--with-preprocessing", "--images", str(photos)]) == 0
    printed = capsys.readouterr().out
    assert "against normfree predict on 6 images: largest difference of a probability " in printed
    session = onnxruntime.InferenceSession(
        tmp_path / "model" / "model.with-preprocessing.onnx", providers=["CPUExecutionProvider"]
    )
    assert [(v.name, v.type, v.shape[2]) for v in session.get_inputs()] == [("image", "tensor(uint8)", 3)]
    for prediction in predict(model, [photos], top=5, device="cpu"):
        image = np.asarray(Image.open(prediction.path).convert("RGB"))
        (found,) = session.run(["probabilities"], {"image": image})
        assert found.shape == (5,)
        wanted = dict(zip(prediction.classes, prediction.probabilities, strict=True))
        assert found == pytest.approx([wanted[name] for name in model.classes], abs=2e-3)
    # The file needs no preprocessing, so the command, which does it, does not take it.
    for arguments in (
        ["predict", "{}", str(photos)],
        ["eval", "{}", str(photos)],
        ["show", "{}"],
        ["serve", "{}"],
    ):
        assert (
            main(
                [
                    argument.format(tmp_path / "model" / "model.with-preprocessing.onnx")
                    for argument in arguments
                ]
            )
            == 2
        )
        error = capsys.readouterr().err
        assert "contains its preprocessing and takes one image of bytes" in error
        assert error.count("\n") == 1
    assert not (tmp_path / "model" / "model.onnx").exists()


def test_a_file_with_its_preprocessing_is_not_quantized(model: TrainedModel, tmp_path: Path) -> None:
    source = tmp_path / "whole.onnx"
    export(model, source, with_preprocessing=True)
    with pytest.raises(
        ValueError, match=r"whole\.onnx contains its preprocessing, and calibration needs normalized"
    ):
        quantize(source, tmp_path / "q.onnx", calibration=[torch.zeros(2, 3, 32, 32)])
    assert not (tmp_path / "q.onnx").exists()


def test_sigmoids_and_the_pt2_format(model: TrainedModel, tmp_path: Path) -> None:
    several = TrainedModel(model.net, model.preprocessing, model.classes, sigmoid=True)
    images = example_pixels()[:2]
    report = export(several, tmp_path / "m.pt2", format="pt2", with_preprocessing=True, images=images)
    assert (report.images, report.noise, report.top1_agreement) == (2, False, 100)
    assert report.errors[1] < 2e-3
    whole = torch.export.load(report.path).module()(images[0])
    assert float(whole.sum()) != pytest.approx(1, abs=1e-2)


def test_what_has_no_form_in_a_graph_is_refused(model: TrainedModel, tmp_path: Path) -> None:
    nearest = TrainedModel(model.net, Preprocessing(32, interpolation="nearest"), model.classes)
    with pytest.raises(ValueError, match=r"interpolation='nearest'\. Allowed: bicubic and bilinear"):
        export(nearest, tmp_path / "m.pt2", format="pt2", with_preprocessing=True)
    with pytest.raises(
        ValueError, match=r"the shape \(3, 8, 8\) and the type torch.uint8\. Allowed: uint8 H x W x 3"
    ):
        export(model, tmp_path / "m.pt2", format="pt2", with_preprocessing=True,
               images=[np.zeros((3, 8, 8), np.uint8)])  # fmt: skip
