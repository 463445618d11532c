"""Ratios of gradient norm to weight norm per unit: which units AGC would clip, and which clipping value to use.

The ratio of a unit is |g| / max(|w|, eps), which AGC compares with its clipping value λ ([B] section 4.1). Compute it
after `loss.backward()` and before clipping. Nothing is changed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from normfree.optim.agc import unitwise_norm
from normfree.suggest import problem

Groups: TypeAlias = nn.Module | Iterable[Mapping[str, Any]]

# Values of λ compared in the ablation of [B] section 4.1.
CLIPPINGS = (0.01, 0.02, 0.04, 0.08, 0.16)
# Quantiles computed by `ratio_quantiles`.
QUANTILES = (0.1, 0.5, 0.9)
# Two runs that diverged at batch size 512 gave λ = 0.29 and 0.10 from two samples each; the best λ of a sweep was 0.02.
MIN_SAMPLES = 10
# Fraction of the units that the recommended λ clips. A rule of thumb, compared with sweeps in docs/diagnose.md.
SHARE = 0.1
# A unit counts as exploding above this ratio: a gradient larger than the weights would replace them in a step with
# learning rate 1.
EXPLODING = 1.0


@dataclass(frozen=True)
class LayerGradient:
    """Ratios of one parameter.

    Attributes:
        name: name of the parameter.
        stage: part of the network that the parameter belongs to, see `stage_of`.
        exempt: True if AGC does not clip the parameter.
        ratios: |g| / max(|w|, eps) of every unit, float32, on the CPU.
        dead: number of units whose gradient is exactly 0, so they have no effect on the loss.
        tiny: number of units whose weight norm is below eps, so AGC uses eps instead.
        exploding: number of units with a weight norm above eps whose gradient norm is larger than their weight norm
            or not finite.
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
        """Number of units of the parameter."""
        return self.ratios.numel()

    def quantile(self, q: float) -> float:
        """Return the ratio below which a fraction `q` of the units is."""
        return _quantile(self.ratios, q)

    def clipped(self, clipping: float) -> float:
        """Return the fraction of the units that AGC would clip with this value; 0 if exempt."""
        return 0.0 if self.exempt else float((self.ratios > clipping).float().mean())


@dataclass(frozen=True)
class GradientReport:
    """Ratios of all parameters that have a gradient.

    Attributes:
        layers: the parameters, in the order of the network.
        missing: names of trainable parameters without a gradient.
        eps: lower bound of the weight norm.
    """

    layers: tuple[LayerGradient, ...]
    missing: tuple[str, ...]
    eps: float

    @property
    def stages(self) -> dict[str, tuple[LayerGradient, ...]]:
        """The parameters, grouped by part of the network."""
        parts: dict[str, list[LayerGradient]] = {}
        for layer in self.layers:
            parts.setdefault(layer.stage, []).append(layer)
        return {name: tuple(layers) for name, layers in parts.items()}

    def ratios(self) -> Tensor:
        """Return the ratios of all units that AGC may clip, as a vector."""
        return _joined(layer.ratios for layer in self.layers if not layer.exempt)

    def clipped(self, clipping: float) -> float:
        """Return the fraction of these units that AGC would clip with this value."""
        ratios = self.ratios()
        return float((ratios > clipping).float().mean()) if ratios.numel() else 0.0

    @property
    def recommended(self) -> float:
        """The λ that clips a fraction `SHARE` of the units with a nonzero gradient.

        NaN if there are none, or if it would be above `EXPLODING`, see `recommended_clipping`.

        It depends on the batch size, because the gradient of a small batch is mostly noise, which decreases with the
        square root of the size. It also depends on the time in training: gradients are small at initialization. Use
        `recommended_clipping` for the value over a whole run.
        """
        return _bounded(_quantile(_alive(self.ratios()), 1.0 - SHARE))


def gradient_report(
    model_or_groups: Groups, *, eps: float = 1e-3, exempt: str = r"^head\.weight$"
) -> GradientReport:
    """Compute the ratio of gradient norm to weight norm for every unit of every parameter that has a gradient.

    Args:
        model_or_groups: a module after `backward()`, or parameter groups of `parameter_groups`.
        eps: lower bound of the weight norm, as in `adaptive_clip_grad_`.
        exempt: regular expression that matches the names of parameters that AGC does not clip. Used for modules only;
            in parameter groups, exempt groups have `clipping` 0. The default is the classifier's weight of our
            networks ([B] section 4.1).

    Returns:
        The ratios of each parameter, and statistics over all of them.

    Raises:
        ValueError: no parameter has a gradient.

    Examples:
        >>> import torch
        >>> import normfree
        >>> layer = torch.nn.Linear(4, 2, bias=False)
        >>> layer.weight.data = torch.ones(2, 4)
        >>> layer.weight.grad = torch.tensor([[0.5] * 4, [0.0] * 4])
        >>> report = normfree.gradient_report(layer)
        >>> report.layers[0].ratios
        tensor([0.5000, 0.0000])
        >>> report.layers[0].dead, report.clipped(0.01)
        (1, 0.5)

    Source: [B] section 4.1, equation 3.
    """
    layers, missing = [], []
    for item in _walk(model_or_groups, exempt):
        if item.parameter.grad is None:
            missing.append(item.name)
            continue
        weight, grad = _norms(item)
        ratios = grad / weight.clamp(min=eps)
        exploding = ~torch.isfinite(grad) | ((weight > eps) & (ratios > EXPLODING))
        layers.append(
            LayerGradient(
                item.name,
                stage_of(item.name),
                item.exempt,
                ratios.cpu(),
                int((grad == 0).sum()),
                int((weight < eps).sum()),
                int(exploding.sum()),
            )
        )
    if not layers:
        raise ValueError(
            problem("no parameter has a gradient", fix="call it after loss.backward() and before zero_grad()")
        )
    return GradientReport(tuple(layers), tuple(missing), eps)


def ratio_quantiles(groups: Groups, *, eps: float = 1e-3) -> dict[str, list[float]]:
    """Return `QUANTILES` of the ratios of the units that AGC may clip, for "all" units and for each stage.

    For use in a training loop, between backward and clipping. One call takes about one and a half times as long as
    the clipping (docs/diagnose.md) and synchronizes with the device once. Values are rounded to three significant
    digits. Units with a gradient of 0 are left out; ratios that are not finite count as infinite. Returns an empty
    dict if there are no units.
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
    """Return the recommended λ of a run, given the results of `ratio_quantiles` in the order of training.

    It is the median over the samples of the 0.9 quantile, so that a fraction `SHARE` of the units is typically
    clipped. The first tenth of the samples is left out, because the learning rate warms up. The value says how much is
    clipped, not which λ gives the best accuracy; at small batch sizes a larger λ, or none, is often better.

    Returns:
        NaN with fewer than `MIN_SAMPLES` samples; if a ratio of a sample is infinite: the run diverged, and its
        ratios say nothing about a λ that would have prevented it; or if the value is above `EXPLODING`: gradients
        explode, and a limit above the weights themselves would not prevent it.
    """
    largest = [sample["all"][-1] for sample in samples]
    if len(largest) < MIN_SAMPLES or not all(map(math.isfinite, largest)):
        return math.nan
    kept = sorted(largest[len(largest) // 10 :])
    return _bounded(kept[len(kept) // 2])


def joined_quantile(parts: Iterable[Tensor], q: float) -> float:
    """Return the ratio below which a fraction `q` of the units of several parameters is; q=1 gives the largest."""
    return _quantile(_joined(parts), q)


def stage_of(name: str) -> str:
    """Return the part of a network that a parameter belongs to, derived from the name of the parameter.

    >>> stage_of("stages.2.0.conv1.weight"), stage_of("layer1.0.conv1.weight"), stage_of("head.weight")
    ('stages.2', 'layer1', 'head')
    """
    first, *rest = name.split(".")
    numbered = len(rest) > 1 and rest[0].isdigit() and not first[-1:].isdigit()
    return f"{first}.{rest[0]}" if numbered else first


class _Item(NamedTuple):
    name: str
    parameter: Tensor
    exempt: bool


def _walk(source: Groups, exempt: str) -> Iterator[_Item]:
    """Yield all trainable parameters of a module or of parameter groups."""
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
    """Return the norms of weight and gradient of every unit, each of shape (units,)."""
    assert item.parameter.grad is not None
    pair = (unitwise_norm(item.parameter), unitwise_norm(item.parameter.grad))
    return tuple(_whole(t).flatten() for t in pair)  # type: ignore[return-value]


def _whole(norms: Tensor) -> Tensor:
    # Norms of a sharded parameter are a DTensor.
    return norms.full_tensor() if hasattr(norms, "full_tensor") else norms


def _joined(parts: Iterable[Tensor]) -> Tensor:
    """Concatenate vectors; return an empty vector if there are none."""
    listed = list(parts)
    return torch.cat(listed) if listed else torch.empty(0)


def _alive(ratios: Tensor) -> Tensor:
    """Return the ratios that are not 0."""
    return ratios[ratios > 0]


def _bounded(clipping: float) -> float:
    return clipping if clipping <= EXPLODING else math.nan


def _quantile(values: Tensor, q: float) -> float:
    """Return the quantile `q` of a vector, or NaN if it is empty."""
    return float(_nearest_ranks(values, (q,))[0]) if values.numel() else float("nan")


def _nearest_ranks(values: Tensor, qs: Sequence[float]) -> Tensor:
    """Return quantiles without interpolation.

    `torch.quantile` interpolates, which gives NaN next to infinite values, and rejects long vectors.
    """
    ordered = torch.sort(torch.nan_to_num(values, nan=torch.inf, posinf=torch.inf)).values
    return ordered[[min(len(ordered) - 1, int(q * len(ordered))) for q in qs]]
