"""PyTorch's own optimizers behind the interface of `SGD`: named groups, multipliers, and a flat named state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from normfree.native.dispatch import laid_out_as
from normfree.optim.named_state import copy_named_
from normfree.optim.sgd import SGD
from normfree.suggest import unknown

# State that torch keeps for a parameter, in its shape; and its numbers, with their first values.
_ADAM_STATE, _STEP = ("exp_avg", "exp_avg_sq"), {"step": 0.0}
# Orthogonalized updates are scaled to the size of AdamW's, so that both take the same learning rate and weight decay
# (Liu et al. 2025, arXiv 2502.16982, section 2.2).
_MUON_SCALE = "match_rms_adamw"


@dataclass(frozen=True)
class _Kind:
    """One of PyTorch's optimizers: its class, the state that it keeps, and arguments that are not a choice here."""

    make: type[Optimizer]
    tensors: tuple[str, ...]
    numbers: Mapping[str, float]
    fixed: Mapping[str, Any]


# With decoupled weight decay where torch has it, except for "adam", which adds L2 decay to the gradient by definition.
_KINDS = {
    "adam": _Kind(torch.optim.Adam, _ADAM_STATE, _STEP, {}),
    "adamw": _Kind(torch.optim.AdamW, _ADAM_STATE, _STEP, {}),
    "nadam": _Kind(
        torch.optim.NAdam, _ADAM_STATE, {**_STEP, "mu_product": 1.0}, {"decoupled_weight_decay": True}
    ),
    "radam": _Kind(torch.optim.RAdam, _ADAM_STATE, _STEP, {"decoupled_weight_decay": True}),
    "rmsprop": _Kind(torch.optim.RMSprop, ("square_avg",), _STEP, {}),
    "muon": _Kind(torch.optim.Muon, ("momentum_buffer",), {}, {"adjust_lr_fn": _MUON_SCALE}),
}


class TorchOptimizer:
    """One of PyTorch's optimizers on the groups of `parameter_groups`.

    Clip before the step: `param_groups` are valid for `adaptive_clip_grad_`. "muon" moves filters and matrices, except
    those of the group "classifier"; a filter O I H W is a matrix O x IHW. AdamW with `betas` moves all others.

    Args:
        groups: as `parameter_groups` returns them.
        lr: base learning rate; each group has its `lr_multiplier` times that.
        name: adam, adamw, nadam, radam, rmsprop or muon.
        options: arguments of the class in torch.optim; for "muon" also `betas` of AdamW.

    Attributes:
        param_groups: the groups, with `lr`.

    Raises:
        ValueError: the name is unknown, or PyTorch refuses an option.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], lr: float, *, name: str, **options: Any) -> None:
        if name not in _KINDS:
            raise ValueError(unknown("optimizer", name, _KINDS))
        self._owners: dict[str, tuple[Optimizer, Tensor, _Kind]] = {}  # by the name of the parameter
        self._matrices: list[
            tuple[dict[str, Any], dict[str, Any]]
        ] = []  # groups of filters, and of their views
        self._inner: list[Optimizer] = []
        if name == "muon":
            betas = options.pop("betas", (0.9, 0.999))
            filters, others = _separate(groups)
            self.param_groups = self._muon(filters, lr, options) if filters else []
            if others:
                self.param_groups += self._add("adamw", others, lr, {"betas": betas})
        else:
            self.param_groups = self._add(name, [dict(g) for g in groups], lr, options)

    def _add(
        self, name: str, groups: list[dict[str, Any]], lr: float, options: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Create an optimizer of PyTorch for `groups`; return its groups."""
        kind = _KINDS[name]
        for group in groups:
            group["lr"] = lr * group.get("lr_multiplier", 1.0)
        made = kind.make(groups, lr=lr, **options, **kind.fixed)  # type: ignore[call-arg]
        self._inner.append(made)
        tensors = kind.tensors
        if name == "rmsprop":
            tensors += ("momentum_buffer",) * bool(options.get("momentum"))
            tensors += ("grad_avg",) * bool(options.get("centered"))
        kept = _Kind(kind.make, tensors, kind.numbers, kind.fixed)
        for group in made.param_groups:
            for parameter, label in zip(group["params"], group["param_names"], strict=True):
                self._owners[label] = made, parameter, kept
        return made.param_groups

    def _muon(
        self, groups: list[dict[str, Any]], lr: float, options: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Create Muon for matrices that share the memory of the filters in `groups`; return the groups of filters."""
        views = [{**group, "params": [nn.Parameter(_matrix(p)) for p in group["params"]]} for group in groups]
        inner = self._add("muon", views, lr, options)
        for group, view in zip(groups, inner, strict=True):
            group["lr"] = view["lr"]
        self._matrices = list(zip(groups, inner, strict=True))
        return groups

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every group to `lr` times the group's `lr_multiplier`."""
        for group in self.param_groups:
            group["lr"] = lr * group.get("lr_multiplier", 1.0)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        self.named_state()  # created here and not by torch, so that it is complete also for a checkpoint before step 1
        for filters, views in self._matrices:
            views["lr"] = filters["lr"]
            for filter_, view in zip(filters["params"], views["params"], strict=True):
                grad = filter_.grad
                view.grad = None if grad is None else _matrix(laid_out_as(filter_, grad))
        for optimizer in self._inner:
            optimizer.step()
        for _, views in self._matrices:
            for view in views["params"]:
                view.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients; `set_to_none` is accepted for the signature of PyTorch's optimizers."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def named_state(self) -> dict[str, Tensor]:
        """Return the state as "NAME.ENTRY", for example "stem.conv0.weight.exp_avg"; it is created where it is missing.

        The tensors are live, not copies.
        """
        found: dict[str, Tensor] = {}
        for name, (optimizer, parameter, kind) in self._owners.items():
            state = optimizer.state[parameter]
            if not state:
                # As torch creates it in its first step.
                dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
                state |= {k: torch.tensor(v, dtype=dtype) for k, v in kind.numbers.items()}
                state |= {
                    k: torch.zeros_like(parameter, memory_format=torch.preserve_format) for k in kind.tensors
                }
            found |= {f"{name}.{entry}": value for entry, value in state.items()}
        return found

    def load_named_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy what `named_state` returned into this optimizer, which then continues bit for bit.

        Raises:
            ValueError: names are unknown or missing, or shapes differ; nothing was changed.
        """
        copy_named_(self.named_state(), state, owner="the state of this optimizer")


def make_optimizer(
    groups: list[dict[str, Any]], lr: float, *, name: str, **options: Any
) -> SGD | TorchOptimizer:
    """Return the optimizer with this name: "sgd" is `SGD`, the others are PyTorch's.

    Raises:
        ValueError: as `SGD` and `TorchOptimizer`.
    """
    if name == "sgd":
        return SGD(groups, lr, **options)
    return TorchOptimizer(groups, lr, name=name, **options)


def state_tensors(name: str) -> int:
    """Return how many tensors of a parameter's size the optimizer keeps for it, at most."""
    return 1 if name == "sgd" else max(len(_KINDS[name].tensors), 2)


def _separate(groups: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return groups of filters and matrices for Muon, and groups of all other parameters."""
    found: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for group in groups:
        members = list(zip(group["params"], group["param_names"], strict=True))
        for part, wanted in zip(found, (True, False), strict=True):
            some = [(p, n) for p, n in members if (p.ndim >= 2 and group["name"] != "classifier") == wanted]
            if some:
                params, names = zip(*some, strict=True)
                part.append({**group, "params": list(params), "param_names": list(names)})
    return found


def _matrix(tensor: Tensor) -> Tensor:
    """Return a view O x N of a filter or matrix, with the columns in the order of memory.

    The order does not matter to Muon: for a permutation P, orthogonalizing A P gives the orthogonalized A, times P.
    """
    tensor = tensor.detach()
    inner = sorted(range(1, tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(0, *inner).view(tensor.shape[0], -1)
