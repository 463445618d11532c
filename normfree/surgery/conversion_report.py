"""The report of a conversion, layer by layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

How = Literal["exact", "normalizer_free", "scratch"]


@dataclass(frozen=True)
class LayerChange:
    """The change of one layer.

    Attributes:
        layer: name of the layer.
        change: "folded" (a norm was folded into this layer), "scale and shift" (a norm became a `ScaleShift`),
            "standardized", or with how="scratch" also "removed", "skip gain" and "gate doubled".
        norm: name of the batch norm that the layer replaces, or "".
        lost_mean: for standardized layers, √N·|filter means| / |weight|, the fraction of the weight's norm that
            standardization removes.
        unexplained: for layers standardized with images, the mean squared difference to the folded network at the
            output of the layer, divided by the variance of that output. It includes the effect of earlier layers.
        input_scale: with how="scratch", the constant that multiplies the standardized weight.
        variance: with how="scratch", the predicted variance of the layer's output if all skip gains are 1.
    """

    layer: str
    change: str
    norm: str = ""
    lost_mean: float | None = None
    unexplained: float | None = None
    input_scale: float | None = None
    variance: float | None = None


@dataclass(frozen=True)
class ConvertReport:
    """The changes that `convert_batchnorm` made, and the difference of the outputs. `str()` gives a table.

    Attributes:
        how: the method of the conversion.
        layers: the changed layers, in the order of the network.
        kept: name -> reason for layers that were not changed although that could be expected: norms without batch
            statistics, depthwise convolutions.
        images: number of images given.
        error: ||converted - original|| / ||original|| of the outputs on the images in evaluation mode; None without
            images and for how="scratch".
    """

    how: How
    layers: tuple[LayerChange, ...]
    kept: dict[str, str]
    images: int
    error: float | None

    @property
    def counts(self) -> Counter[str]:
        """Number of layers by kind of change."""
        return Counter(layer.change for layer in self.layers)

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {change}" for change, n in self.counts.items())
        lines = [f"{self.how}: {counts}" + (f"; {len(self.kept)} kept" if self.kept else "")]
        if self.error is not None:
            lines.append(f"outputs differ by {self.error:.1e} (relative L2 norm) on {self.images} images")
        head = ("layer", "change", "norm", "lost mean", "unexplained", "input scale", "variance")
        cells = [head, *(self._cells(layer) for layer in self.layers)]
        shown = [i for i in range(len(head)) if any(line[i] for line in cells[1:])]
        widths = {i: max(len(line[i]) for line in cells) for i in shown}
        lines += ["  ".join(line[i].ljust(widths[i]) for i in shown).rstrip() for line in cells]
        return "\n".join(lines + [f"{name} kept: {why}" for name, why in self.kept.items()])

    @staticmethod
    def _cells(layer: LayerChange) -> tuple[str, ...]:
        """Return the cells of a layer in the table."""
        numbers = (layer.lost_mean, layer.unexplained, layer.input_scale, layer.variance)
        return (layer.layer, layer.change, layer.norm, *("" if n is None else f"{n:.3f}" for n in numbers))
