"""Gradients against weights, unit by unit: what adaptive gradient clipping sees, would clip, and should be set to.

The ratio of a unit is |g| / max(|w|, eps), the number that AGC compares with λ ([B] section 4.1). Read after
`loss.backward()` and before clipping; nothing is changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from normfree.optim.agc import unitwise_norm

Groups: TypeAlias = nn.Module | Iterable[Mapping[str, Any]]

#: λ of the ablation of [B] section 4.1.
CLIPPINGS = (0.01, 0.02, 0.04, 0.08, 0.16)
#: Of `ratio_quantiles`.
QUANTILES = (0.1, 0.5, 0.9)
#: The share of units that a recommended λ clips: a rule of thumb, tested in experiments/results/clipping.md.
SHARE = 0.1
#: A unit explodes if its gradient is larger than its weights: a step of rate 1 would replace them.
EXPLODING = 1.0


@dataclass(frozen=True)
class LayerGradient:
    """One parameter. `stage`: the part of the network that it belongs to, by its name; `exempt`: AGC leaves it alone.

    ratios: |g| / max(|w|, eps) of every unit, float32, on the CPU.
    dead: units whose gradient is exactly 0: nothing that they do reached the loss.
    tiny: units whose weights are below eps, so that the floor is what AGC compares with.
    exploding: units above eps whose gradient is larger than their weights, or not finite.
    """

    name: str
    stage: str
    exempt: bool
    ratios: Tensor = field(repr=False)
    dead: int
    tiny: int
    exploding: int

    @property
    def units(self) -> int:
        """How many units the parameter has."""
        return self.ratios.numel()

    def quantile(self, q: float) -> float:
        """The ratio below which a share `q` of the units lies."""
        return _quantile(self.ratios, q)

    def clipped(self, clipping: float) -> float:
        """The share of the units that AGC would clip; 0 if exempt."""
        return 0.0 if self.exempt else float((self.ratios > clipping).float().mean())


@dataclass(frozen=True)
class GradientReport:
    """All parameters that have a gradient, in order. `missing`: trainable ones that have none."""

    layers: tuple[LayerGradient, ...]
    missing: tuple[str, ...]
    eps: float

    @property
    def stages(self) -> dict[str, tuple[LayerGradient, ...]]:
        """The parameters by part of the network, in order."""
        parts: dict[str, list[LayerGradient]] = {}
        for layer in self.layers:
            parts.setdefault(layer.stage, []).append(layer)
        return {name: tuple(layers) for name, layers in parts.items()}

    def ratios(self) -> Tensor:
        """The ratios of all units that AGC acts on."""
        return _joined(layer.ratios for layer in self.layers if not layer.exempt)

    def clipped(self, clipping: float) -> float:
        """The share of these units that AGC would clip."""
        ratios = self.ratios()
        return float((ratios > clipping).float().mean()) if ratios.numel() else 0.0

    @property
    def recommended(self) -> float:
        """λ that clips a share `SHARE` of the units that have a gradient; NaN when none has.

        It holds for this batch size: the gradient of a small batch is mostly noise, which shrinks with the root of the
        size. And for this moment: at initialization gradients are small; `recommended_clipping` looks at a run.
        """
        return _quantile(_alive(self.ratios()), 1.0 - SHARE)


def gradient_report(
    model_or_groups: Groups, *, eps: float = 1e-3, exempt: str = r"^head\.weight$"
) -> GradientReport:
    """Ratios of gradient to weight for every unit of every parameter that has a gradient.

    model_or_groups: a module after `backward()`, or parameter groups as `parameter_groups` makes them.
    eps: the floor of the weight norm, as in `adaptive_clip_grad_`.
    exempt: regular expression of names that AGC leaves alone, searched when a module is given; groups with
        `clipping` 0 say it themselves. The default is the classifier of our networks ([B] section 4.1).

    Raises:
        ValueError: no parameter has a gradient.
    """
    layers, missing = [], []
    for item in _walk(model_or_groups, exempt):
        if item.parameter.grad is None:
            missing.append(item.name)
            continue
        weight, grad = _norms(item)
        ratios = grad / weight.clamp(min=eps)
        wild = ~torch.isfinite(grad) | ((weight > eps) & (ratios > EXPLODING))
        layers.append(
            LayerGradient(
                item.name,
                stage_of(item.name),
                item.exempt,
                ratios.cpu(),
                int((grad == 0).sum()),
                int((weight < eps).sum()),
                int(wild.sum()),
            )
        )
    if not layers:
        raise ValueError("no parameter has a gradient. Call it after loss.backward(), before zero_grad().")
    return GradientReport(tuple(layers), tuple(missing), eps)


def ratio_quantiles(groups: Groups, *, eps: float = 1e-3) -> dict[str, list[float]]:
    """For a training loop: `QUANTILES` of the ratios of the units that AGC acts on, for "all" and stage by stage, as
    plain numbers of three digits; units without a gradient are left out.

    Call it now and then between backward and clipping; it costs about one and a half times what the clipping does
    (docs/diagnose.md), and waits for the device once. Units that are not finite count as infinite.
    """
    parts: dict[str, list[Tensor]] = {"all": []}
    for item in _walk(groups, r"^head\.weight$"):
        if item.parameter.grad is not None and not item.exempt:
            weight, grad = _norms(item)
            ratios = grad / weight.clamp(min=eps)
            parts["all"].append(ratios)
            parts.setdefault(stage_of(item.name), []).append(ratios)
    if not parts["all"]:
        return {}
    joined = [_alive(_joined(ratios)) for ratios in parts.values()]
    none = torch.zeros(len(QUANTILES), device=joined[0].device)
    rows = torch.stack([_nearest_ranks(r, QUANTILES) if r.numel() else none for r in joined]).tolist()
    return {name: [float(f"{x:.3g}") for x in row] for name, row in zip(parts, rows, strict=True)}


def recommended_clipping(samples: Sequence[Mapping[str, Sequence[float]]]) -> float:
    """λ for a run, from what `ratio_quantiles` gave now and then: the median of the samples' ratio below which 90 % of
    the units lie, so that typically a share `SHARE` is clipped. The first tenth, where the rate warms up, is left out;
    NaN without samples.
    """
    kept = sorted(sample["all"][-1] for sample in samples[len(samples) // 10 :])
    return kept[len(kept) // 2] if kept else float("nan")


def joined_quantile(parts: Iterable[Tensor], q: float) -> float:
    """The ratio below which a share `q` of the units of several parameters lies; 1: the largest."""
    return _quantile(_joined(parts), q)


def stage_of(name: str) -> str:
    """The part of a network that a parameter belongs to: "stages.2" of "stages.2.0.conv1.weight", "layer1" of
    "layer1.0.conv1.weight", "head" of "head.weight"."""
    first, *rest = name.split(".")
    numbered = len(rest) > 1 and rest[0].isdigit() and not first[-1:].isdigit()
    return f"{first}.{rest[0]}" if numbered else first


class _Item(NamedTuple):
    name: str
    parameter: Tensor
    exempt: bool


def _walk(source: Groups, exempt: str) -> Iterator[_Item]:
    if isinstance(source, nn.Module):
        for name, parameter in source.named_parameters():
            if parameter.requires_grad:
                yield _Item(name, parameter, re.search(exempt, name) is not None)
        return
    for number, group in enumerate(source):
        members = list(group["params"])
        names = group.get("param_names") or [f"group {number}, parameter {i}" for i in range(len(members))]
        for name, parameter in zip(names, members, strict=True):
            if parameter.requires_grad:
                yield _Item(name, parameter, group.get("clipping") == 0.0)


@torch.no_grad()
def _norms(item: _Item) -> tuple[Tensor, Tensor]:
    """Norms of weight and gradient of every unit, each a vector."""
    assert item.parameter.grad is not None
    pair = (unitwise_norm(item.parameter), unitwise_norm(item.parameter.grad))
    return tuple(_whole(t).flatten() for t in pair)  # type: ignore[return-value]


def _whole(norms: Tensor) -> Tensor:
    return norms.full_tensor() if hasattr(norms, "full_tensor") else norms  # of a sharded parameter


def _joined(parts: Iterable[Tensor]) -> Tensor:
    listed = list(parts)
    return torch.cat(listed) if listed else torch.empty(0)


def _alive(ratios: Tensor) -> Tensor:
    return ratios[ratios > 0]


def _quantile(values: Tensor, q: float) -> float:
    return float(_nearest_ranks(values, (q,))[0]) if values.numel() else float("nan")


def _nearest_ranks(values: Tensor, qs: Sequence[float]) -> Tensor:
    """torch.quantile would interpolate, which infinity spoils, and refuses long vectors."""
    ordered = torch.sort(torch.nan_to_num(values, nan=torch.inf, posinf=torch.inf)).values
    return ordered[[min(len(ordered) - 1, int(q * len(ordered))) for q in qs]]
