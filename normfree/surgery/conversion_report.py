"""What a conversion did, layer by layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

How = Literal["exact", "normalizer_free", "scratch"]


@dataclass(frozen=True)
class LayerChange:
    """What became of one layer.

    change: "folded" (the norm went into this layer), "scale and shift" (the norm became one, in its own place),
        "standardized", or with how="scratch" also "removed", "skip gain" and "gate doubled".
    norm: name of the batch norm that it took the place of, or "".
    lost_mean: standardized only: sqrt(N)·|filter means| / |kernel|, the part of the kernel that standardizing takes.
    unexplained: standardized with images: mean squared difference to the folded network at this layer's output, by that
        output's variance; earlier layers' differences included.
    input_scale, variance: how="scratch": the constant in the kernel, and the variance that is predicted at the layer's
        output (with every skip gain at 1).
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
    """What `convert_batchnorm` did, layer by layer, and how the outputs compare.

    error: ||converted - original|| / ||original|| of the outputs in evaluation mode on the images; None without
        images, and from scratch.
    kept: other layers that one might expect to change, name -> why they did not: norms that do not look at a batch,
        depthwise convolutions.
    """

    how: How
    layers: tuple[LayerChange, ...]
    kept: dict[str, str]
    images: int
    error: float | None

    @property
    def counts(self) -> Counter[str]:
        """How many layers changed in each way."""
        return Counter(layer.change for layer in self.layers)

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {change}" for change, n in self.counts.items())
        lines = [f"{self.how}: {counts}" + (f"; {len(self.kept)} kept" if self.kept else "")]
        if self.error is not None:
            lines.append(f"outputs differ by {self.error:.1e} of their norm on {self.images} images")
        head = ("layer", "change", "norm", "lost mean", "unexplained", "input scale", "variance")
        rows = [head, *(self._row(layer) for layer in self.layers)]
        shown = [i for i in range(len(head)) if any(row[i] for row in rows[1:])]
        widths = {i: max(len(row[i]) for row in rows) for i in shown}
        lines += ["  ".join(row[i].ljust(widths[i]) for i in shown).rstrip() for row in rows]
        return "\n".join(lines + [f"{name} kept: {why}" for name, why in self.kept.items()])

    @staticmethod
    def _row(layer: LayerChange) -> tuple[str, ...]:
        numbers = (layer.lost_mean, layer.unexplained, layer.input_scale, layer.variance)
        return (layer.layer, layer.change, layer.norm, *("" if n is None else f"{n:.3f}" for n in numbers))
