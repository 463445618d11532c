"""Exported files as networks: what the runtimes have in common, and the metadata of a file.

The metadata is JSON with the name of the variant, the class names and the preprocessing. Files without it can be run
and quantized, but not used for prediction, because the meaning of their inputs and outputs is not known.

Shapes: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normfree.suggest import problem

# Key of the JSON in the metadata of a file.
METADATA_KEY = "normfree"
# Name of the extra file with the same JSON in a .pt2 file.
PT2_METADATA = "normfree.json"
# Required keys of the JSON for predictions. "row" is the name of the variant.
METADATA_FIELDS = ("row", "version", "classes", "preprocessing", "opset", "folded")
INPUT, OUTPUT = "images", "logits"
# Name of the input of a file that contains its preprocessing, and of its output.
IMAGE, PROBABILITIES = "image", "probabilities"

Shape = tuple[int | None, ...]


class ExportedNet(nn.Module):
    """A network whose forward pass runs outside of PyTorch: float inputs B ... -> its first output.

    It has no parameters and cannot be trained. Inputs may be on any device; outputs are on the same device. `name` is
    the variant that the file was exported from. `input_shape` has None for free dimensions.
    """

    def __init__(
        self, *, name: str, input_shape: Sequence[int | None], output_shape: Sequence[int | None]
    ) -> None:
        super().__init__()
        self.name, self.input_shape, self.output_shape = name, tuple(input_shape), tuple(output_shape)

    def run(self, images: Tensor) -> list[Tensor]:
        """Return all outputs for a float32 input on the CPU."""
        raise NotImplementedError

    @property
    def in_channels(self) -> int:
        """The number of channels of the images."""
        return int(self.input_shape[1] or 0)

    @property
    def num_classes(self) -> int:
        """The width of the output."""
        return int(self.output_shape[-1] or 0)

    @property
    def image_size(self) -> int | tuple[int, int]:
        """The side of the images, or (height, width) if they are not square."""
        height, width = (int(n or 0) for n in self.input_shape[2:4])
        return height if height == width else (height, width)

    def forward(self, images: Tensor) -> Tensor:
        """Return the first output, float32: logits B K for files of trained networks.

        Raises:
            ValueError: the images do not have the shape that the file was exported for.
        """
        self.check_shape(images)
        # Pooling in onnxruntime fails for an empty batch.
        if not len(images):
            return torch.empty(0, *(n or 0 for n in self.output_shape[1:]), device=images.device)
        return self.run(images.detach().to("cpu", torch.float32).contiguous())[0].to(images.device)

    def check_shape(self, images: Tensor) -> None:
        """Raise `ValueError` if the file cannot be run on inputs of this shape."""

        def fits(shape: Sequence[int], wanted: Shape) -> bool:
            pairs = zip(shape, wanted, strict=False)
            return len(shape) == len(wanted) and all(want is None or want == have for have, want in pairs)

        if not fits(images.shape, self.input_shape):
            fix = "resize the images, or export the network for their size"
            if fits(images.shape, self.input_shape[1:]):
                fix = "pass batches, images[None] of one image or images.split(32) of many"
            elif fits(images.shape[1:], self.input_shape[1:]):
                fix = f"pass batches of {self.input_shape[0]}, or export the network for any batch size"
            names = ["B" if i == 0 else "any" for i in range(len(self.input_shape))]
            wanted = [name if n is None else str(n) for n, name in zip(self.input_shape, names, strict=True)]
            raise ValueError(
                problem(
                    f"images have the shape {tuple(images.shape)}",
                    allowed=f"{' x '.join(wanted)}, for which the file was exported",
                    fix=fix,
                )
            )


def check_metadata(
    text: str | None, path: Path, *, inputs: dict[str, Shape], outputs: dict[str, Shape]
) -> dict[str, Any]:
    """Return the JSON in the metadata of a file, after a check of its keys and types.

    Args:
        text: the JSON, or None if the file has none.
        path: the file, for errors.
        inputs: names and shapes of the inputs of the file.
        outputs: names and shapes of its outputs.

    Raises:
        ValueError: there is none, or it is not as `export` writes it for a trained network.
    """
    if text is not None and list(inputs) == [IMAGE]:
        raise ValueError(
            problem(
                f"{path} contains its preprocessing and takes one image of bytes, so the command cannot run it",
                fix="run it in your program as docs/export.md shows, or export it without --with-preprocessing",
            )
        )
    if text is None or [*inputs, *outputs] != [INPUT, OUTPUT]:
        raise ValueError(_not_ours(path))
    metadata = parse_metadata(text, path)
    if "classes" not in metadata and "preprocessing" not in metadata and "row" in metadata:
        raise ValueError(
            problem(
                f"{path} was exported from a module without class names and preprocessing",
                fix="export TrainedModel(module, preprocessing, classes), or run the file in your program",
            )
        )
    missing = [k for k in METADATA_FIELDS if k not in metadata]
    if missing:
        raise ValueError(f"{path}: the metadata {METADATA_KEY!r} lacks {', '.join(missing)}.")
    if [len(inputs[INPUT]), len(outputs[OUTPUT])] != [4, 2]:
        raise ValueError(_not_ours(path))
    classes = metadata["classes"]
    if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
        raise ValueError(f"{path}: 'classes' in its metadata is not a list of strings.")
    if len(classes) != outputs[OUTPUT][1]:
        raise ValueError(f"{path}: its metadata has {len(classes)} classes for {outputs[OUTPUT][1]} outputs.")
    if not isinstance(metadata["preprocessing"], dict):
        raise ValueError(f"{path}: 'preprocessing' in its metadata is not a JSON object.")
    height, width = inputs[INPUT][2:]
    size = metadata["preprocessing"].get("image_size")
    if size not in ([height, width], height if height == width else None) or size is None:
        raise ValueError(
            f"{path}: its input is {height} x {width} pixels, but the image size of its preprocessing is {size!r}."
        )
    return metadata


def parse_metadata(text: str, path: Path) -> dict[str, Any]:
    """Return the JSON object in the metadata of a file.

    Raises:
        ValueError: it is not a JSON object.
    """
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: the metadata {METADATA_KEY!r} is not a JSON object.")
    return metadata


def first_line(error: BaseException) -> str:
    """Return the first line of an error message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _not_ours(path: Path) -> str:
    """Return the error message for a file without usable metadata."""
    return problem(
        f"{path} was not written by normfree: it does not contain class names and preprocessing",
        fix="export the network with `normfree export`",
    )
