"""AGC for a training loop that is not ours: a hook that clips before each step of any PyTorch optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normfree.optim.agc import adaptive_clip_grad_
from normfree.optim.classifier import find_classifier
from normfree.optim.ema import Ema
from normfree.optim.fused import FusedUpdate
from normfree.optim.named_gradients import ClipReport, check_limit
from normfree.optim.parameter_kinds import CLASSIFIER, parameter_kinds
from normfree.optim.sgd import SGD
from normfree.optim.units import UnitNorms
from normfree.suggest import did_you_mean, problem


class AgcHandle:
    """What `attach_agc` returns.

    Attributes:
        report: the `ClipReport` of the last step; None before the first one. Reading its numbers waits for the device.
        exempt: names of the parameters that are not clipped.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        clipping: float,
        *,
        names: dict[int, str],
        skipped: set[int],
        unit: str,
        eps: float,
        error_if_nonfinite: bool,
        model: nn.Module | None = None,
        ema: Ema | None = None,
    ) -> None:
        self.report: ClipReport | None = None
        self.exempt = tuple(names[i] for i in names if i in skipped)
        self._optimizer, self._clipping, self._names, self._skipped = optimizer, clipping, names, skipped
        self._unit, self._eps, self._error_if_nonfinite = unit, eps, error_if_nonfinite
        self._model, self._ema = model, ema
        # The fused update and the tensors that it was made for, and whether the current step uses it.
        self._made: FusedUpdate | None = None
        self._made_for: list[tuple[int, torch.device, torch.dtype]] = []
        self._update: FusedUpdate | None = None
        self._hooks = [optimizer.register_step_pre_hook(self._before_step)]
        if ema is not None:
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))

    def remove(self) -> None:
        """Detach AGC, and the average, from the optimizer."""
        for hook in self._hooks:
            hook.remove()
        if isinstance(self._optimizer, SGD):
            self._optimizer.fused_step = None

    def _before_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if isinstance(self._optimizer, SGD):
            self._update = self._fused(self._optimizer)
            self._optimizer.fused_step = None if self._update is None else self._fused_step
            if self._update is not None:
                return None
        if closure is None:
            self._clip()
            return None

        def clipped_closure() -> Any:
            loss = closure()
            self._clip()
            return loss

        if len(args) > 1:
            return (args[0], clipped_closure, *args[2:]), kwargs
        return args, {**kwargs, "closure": clipped_closure}

    def _after_step(self, *_: Any) -> None:
        """Move the average, unless the fused update has done it."""
        if self._update is None:
            assert self._ema is not None
            assert self._model is not None
            self._ema.update(self._model)

    def _fused(self, optimizer: SGD) -> FusedUpdate | None:
        """Return the update in one pass over memory if it does the same as clipping, step and average, else None."""
        alike = all(
            group.get("clipping") == 0.0 or self._skipped.isdisjoint(map(id, group["params"]))
            for group in optimizer.param_groups
        )
        scaled = getattr(optimizer, "grad_scale", None) is not None
        if self._ema is None or self._model is None or self._unit != "filter" or not alike or scaled:
            return None
        made_for = [(id(p), p.device, p.dtype) for group in optimizer.param_groups for p in group["params"]]
        if made_for != self._made_for:
            self._made_for = made_for
            self._made = FusedUpdate.create(optimizer, model=self._model, ema=self._ema, eps=self._eps)
        return self._made

    def _fused_step(self) -> None:
        assert self._update is not None
        self.report = self._update.step(error_if_nonfinite=self._error_if_nonfinite)

    def _clip(self) -> None:
        _unscale_(self._optimizer)
        groups = []
        for g, group in enumerate(self._optimizer.param_groups):
            named = [
                (self._names.get(id(p), f"parameter {i} of group {g}"), p)
                for i, p in enumerate(group["params"])
            ]
            clipped = {"params": [(name, p) for name, p in named if id(p) not in self._skipped]}
            groups.append(clipped | ({"clipping": group["clipping"]} if "clipping" in group else {}))
        # A GradScaler skips the step itself if a gradient is not finite.
        raises = self._error_if_nonfinite and getattr(self._optimizer, "found_inf", None) is None
        self.report = adaptive_clip_grad_(
            groups, self._clipping, eps=self._eps, unit=self._unit, error_if_nonfinite=raises
        )


def attach_agc(
    optimizer: Optimizer,
    clipping: float = 0.01,
    *,
    model: nn.Module | None = None,
    unit: str = "filter",
    exempt: str | Sequence[str] = "classifier",
    eps: float = 1e-3,
    error_if_nonfinite: bool = False,
    ema: Ema | None = None,
) -> AgcHandle:
    """Clip the gradients adaptively before each step of `optimizer`, in a training loop that you do not control.

    The hook runs inside `optimizer.step()`, so after gradient accumulation and after the sum over processes, and for
    every caller of `step`: a plain loop, Accelerate, Lightning, the Hugging Face Trainer, timm. With a closure, it runs
    after the closure. Under a `GradScaler` the gradients are unscaled first, also for fused optimizers, which would
    otherwise unscale them only inside the step. Turn other clipping off: the Hugging Face Trainer clips the global norm
    to 1.0 unless `max_grad_norm=0`.

    One λ means different things: here and in the paper a unit is a filter; DreamerV3 clips whole tensors (λ 0.3,
    unit="tensor"); timm's `--clip-mode agc` clips filters, but each element of a gain of shape (n, 1, 1, 1) by itself.

    Args:
        optimizer: any PyTorch optimizer. All parameters of its groups are clipped, except those exempt.
        clipping: largest allowed ratio of gradient norm to weight norm, λ; a group's own `clipping` takes precedence.
        model: the network that is trained, for the names of its parameters; needed unless `exempt` is ().
        unit: "filter" or "tensor", see `adaptive_clip_grad_`.
        exempt: "classifier" exempts the weight of the classifier, as the paper does, found as by `parameter_groups`;
            otherwise shell patterns of parameter names, such as ("head.*", "*.gain"); () is none.
        eps: as for `adaptive_clip_grad_`.
        error_if_nonfinite: raise for Inf and NaN. By default such gradients are left to the caller, as
            `torch.nn.utils.clip_grad_norm_` does, and the host does not wait for the device.
        ema: the average of `model`, which `optimizer.step()` then moves as well; do not call `ema.update`. With
            `normfree.SGD` on a CPU, clipping, step and average are one pass over memory, as in `normfree.train`. It
            leaves the gradients unclipped, and changes nothing if one of them is not finite.

    Returns:
        A handle with the last `report` and `remove()`.

    Raises:
        ValueError: `model` is missing with `exempt` or `ema`, or has no parameter of the optimizer; its classifier was
            not found; a pattern matches no parameter; `clipping` or `eps` is negative; `unit` is unknown.

    Examples:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 1))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> agc = normfree.attach_agc(optimizer, 0.1, model=model)
        >>> agc.exempt  # the weight of the last layer
        ('1.weight',)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> agc.report.units  # two rows of the first layer, one bias
        3

    Source: [B] section 4.1, equation 3.
    """
    check_limit("clipping", clipping)
    check_limit("eps", eps)
    UnitNorms(unit)
    if ema is not None and model is None:
        raise ValueError(
            problem("ema is given without a model", fix="pass model=model, the network it averages")
        )
    ours = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = (
        {id(p): name for name, p in model.named_parameters() if id(p) in ours} if model is not None else {}
    )
    skipped = _exempt(exempt, model, names)
    return AgcHandle(
        optimizer, clipping, names=names, skipped=skipped, unit=unit, eps=eps, error_if_nonfinite=error_if_nonfinite,
        model=model, ema=ema,
    )  # fmt: skip


def _exempt(exempt: str | Sequence[str], model: nn.Module | None, names: dict[int, str]) -> set[int]:
    """Return the ids of the parameters that are not clipped."""
    if exempt == ():
        return set()
    if model is None:
        fix = "pass model=model, or exempt=() to clip all parameters"
        raise ValueError(problem(f"exempt is {exempt!r} without a model", fix=fix))
    if not names:
        given = "no parameter of the optimizer is one of the model"
        raise ValueError(problem(given, fix="pass the model whose parameters the optimizer has"))
    if exempt == "classifier":
        kinds = parameter_kinds(model, find_classifier(model))
        return {i for i, name in names.items() if kinds[name] == CLASSIFIER}
    patterns = (exempt,) if isinstance(exempt, str) else tuple(exempt)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names.values()):
            hint = did_you_mean(pattern, names.values())
            given = f"exempt has {pattern!r}, which matches no parameter.{hint}"
            raise ValueError(problem(given, allowed="'classifier', or shell patterns of parameter names"))
    return {i for i, name in names.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}


@torch.no_grad()
def _unscale_(optimizer: Optimizer) -> None:
    """Unscale the gradients in place of a fused optimizer, to which a `GradScaler` leaves it."""
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    inverse = scale.double().reciprocal().float()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.mul_(inverse.to(parameter.grad.device))
    optimizer.grad_scale = None  # type: ignore[attr-defined]
