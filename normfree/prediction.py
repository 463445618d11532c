"""Prediction of the classes of images: files, folders, URLs, videos, cameras, and images in memory.

Shapes: B batch, S image size, K classes, h w size of the last feature map.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from normfree.data.image_inputs import ImageInput, image_inputs
from normfree.data.transforms.normalize import normalize
from normfree.device import run_device
from normfree.diagnose.grad_cam import grad_cam
from normfree.diagnose.heat_overlay import Box, fitted, overlay
from normfree.exported_net import ExportedNet
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel
from normfree.suggest import problem

if TYPE_CHECKING:
    from PIL.Image import Image

    Images = str | Path | bytes | BinaryIO | Image | np.ndarray


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image.

    Attributes:
        path: the file or URL; for a frame of a video the file and the time in seconds, as in "a.mp4#t=1.500"; for an
            image in memory "image N".
        classes: names of the most probable classes, the most probable first; empty if there is an error.
        probabilities: their probabilities, from 0 to 1.
        error: why the image cannot be read, or "".
    """

    path: str
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str = ""


def predict(
    model: TrainedModel,
    images: Images | Iterable[Images],
    *,
    top: int = 5,
    every: int = 1,
    batch_size: int = 64,
    device: str | torch.device = "auto",
) -> Iterator[Prediction]:
    """Predict the most probable classes of images.

    Args:
        model: a trained model, as `from_pretrained` returns it. Its network is moved to `device`.
        images: one or several of: an image file, a folder that is searched for images, a pattern such as
            "photos/*.jpg", an http or https URL, a video file, "camera:0", encoded bytes, a file open in binary mode, a
            PIL image, or an array uint8 H W 3 in the order red, green, blue, or H W (gray). Videos and cameras need
            `normfree[video]`.
        top: number of classes per image.
        every: use every `every`-th frame of videos and cameras.
        batch_size: number of images per forward pass. Frames of a camera are predicted one by one.
        device: a device or its name; "auto" is a GPU if there is one, else the CPU.

    Yields:
        A `Prediction` for each image, in order. An image in memory has the path "image N" with its index in `images`.
        An image that cannot be read gives a `Prediction` with an `error`.

    Raises:
        ValueError: a path does not exist, `top`, `every` or `batch_size` is below 1, the model has no classes, or there
            is a URL and the variable HF_HUB_OFFLINE is set. Raised by the call itself, before the first prediction.
        ModuleNotFoundError: there is a video, and PyAV is not installed.

    Examples:
        >>> import tempfile
        >>> import normfree
        >>> from PIL import Image
        >>> from normfree.preprocessing import Preprocessing
        >>> from normfree.pretrained import TrainedModel
        >>> net = normfree.create_model("nf_resnet_nano", num_classes=2)
        >>> model = TrainedModel(net, Preprocessing(image_size=16), ("cat", "dog"))
        >>> image = Image.new("RGB", (20, 20))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     image.save(f"{folder}/image.png")
        ...     both = list(normfree.predict(model, [f"{folder}/*.png", image], top=1, device="cpu"))
        >>> len(both), both[1].path, both[0].probabilities == both[1].probabilities, both[0].error
        (2, 'image 1', True, '')
    """
    found = answers(model, images, top=top, every=every, batch_size=batch_size, device=device)
    return (answer.prediction for answer in found)


@dataclass(frozen=True)
class Answer:
    """A prediction with a small copy of its image.

    Attributes:
        prediction: the prediction.
        view: the image in RGB; None if it was not asked for or there is an error.
        heat: the same with the Grad-CAM heat map of the most probable class over it, if it was asked for.
    """

    prediction: Prediction
    view: Image | None = None
    heat: Image | None = None


def answers(
    model: TrainedModel,
    images: Images | Iterable[Images],
    *,
    top: int,
    every: int,
    batch_size: int,
    device: str | torch.device,
    view: tuple[int, int] | None = None,
    heat: bool = False,
) -> Iterator[Answer]:
    """Predict images as `predict` does, and return copies of the images too.

    Args:
        model, images, top, every, batch_size, device: as in `predict`.
        view: smallest and largest length of the longest side of the copies in pixels; None for no copies.
        heat: draw the heat maps; needs `view`.

    Raises:
        ValueError: as `predict`, or there can be no heat map because the network was read from an exported file.
    """
    if top < 1:
        raise ValueError(problem(f"top is {top}", allowed="1 or more"))
    model.require_classes()
    if heat and isinstance(model.net, ExportedNet):
        given = f"{model.net.name} was read from an exported file, which has no gradients for heat maps"
        raise ValueError(problem(given, fix="use the run or model folder that it was exported from"))
    target = run_device(device) if isinstance(device, str) else device
    inputs = image_inputs(images, every=every)
    batches = input_batches(model.preprocessing, inputs, batch_size=batch_size, device=target, view=view)
    return _answers(model.net.eval().to(target), model, batches, top, heat)


@torch.no_grad()
def _answers(
    net: nn.Module, model: TrainedModel, batches: Iterator[InputBatch], top: int, heat: bool
) -> Iterator[Answer]:
    """Yield the answers of `answers`, batch by batch."""
    for batch in batches:
        outputs: Iterator[Tensor] = iter(())
        maps: Iterator[Tensor] = iter(())
        if len(batch.inputs):
            probabilities = model.probabilities(net(batch.inputs))
            outputs = iter(probabilities.cpu())
            if heat:
                maps = iter(grad_cam(net, batch.inputs, classes=probabilities.argmax(dim=1)).cpu())
        for image in batch.images:
            if image.error:
                yield Answer(Prediction(image.name, error=image.error))
                continue
            values, indices = next(outputs).topk(min(top, len(model.classes)))
            names = tuple(model.classes[i] for i in indices.tolist())
            drawn = overlay(image.view, next(maps), image.box) if heat and image.view is not None else None
            yield Answer(Prediction(image.name, names, tuple(values.tolist())), image.view, drawn)


# --- batches of inputs -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenedImage:
    """One image of a batch.

    Attributes:
        name: as in `ImageInput`.
        error: why it cannot be read, or "".
        view: a small copy in RGB, if it was asked for.
        box: the part of `view` that the network sees, as `EvalTransform.box` returns it.
    """

    name: str
    error: str = ""
    view: Image | None = None
    box: Box = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class InputBatch:
    """Some images, and the inputs of the network for those that can be read.

    Attributes:
        images: the images, in order.
        inputs: normalized, N C H W, for the N images without an error.
    """

    images: Sequence[OpenedImage]
    inputs: Tensor


def input_batches(
    preprocessing: Preprocessing,
    inputs: Iterator[ImageInput],
    *,
    batch_size: int,
    device: torch.device,
    view: tuple[int, int] | None = None,
) -> Iterator[InputBatch]:
    """Return an iterator that opens and preprocesses images in batches; a frame of a camera ends its batch.

    Raises:
        ValueError: `batch_size` is below 1. Raised by the call itself.
    """
    if batch_size < 1:
        raise ValueError(problem(f"batch_size is {batch_size}", allowed="1 or more"))
    return _input_batches(preprocessing, inputs, batch_size, device, view)


def _input_batches(
    pre: Preprocessing,
    inputs: Iterator[ImageInput],
    batch_size: int,
    device: torch.device,
    view: tuple[int, int] | None,
) -> Iterator[InputBatch]:
    """Yield the batches of `input_batches`."""
    transform = pre.transform()
    images: list[OpenedImage] = []
    pixels: list[Tensor] = []

    def batch() -> InputBatch:
        if not pixels:
            return InputBatch(images, torch.empty(0))
        return InputBatch(images, normalize(torch.stack(pixels).to(device), mean=pre.mean, std=pre.std))

    for item in inputs:
        try:
            image = item.read(pre.pixel_range)
        except ValueError as error:
            images.append(OpenedImage(item.name, error=str(error)))
        else:
            pixels.append(transform(image))
            opened = OpenedImage(item.name)
            if view:
                copy, box = fitted(image, transform.box(*image.size), smallest=view[0], largest=view[1])
                opened = OpenedImage(item.name, view=copy, box=box)
            images.append(opened)
        if len(images) == batch_size or item.live:
            yield batch()
            images, pixels = [], []
    if images:
        yield batch()
