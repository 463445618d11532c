"""Exponential moving average of a network's weights, kept in a second network that is ready to evaluate."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from normfree.optim.dtensor import local
from normfree.optim.named_state import copy_named_


def ema_decay(step: int, *, decay: float = 0.99999, ramp: bool = True) -> float:
    """Decay d used at `step` (counted from 0): min(decay, (1 + step) / (10 + step)), or `decay` without ramp.

    The ramp lets the average forget the random start: at the default it is still rising after 112 602 steps.
    Raises ValueError for a decay outside [0, 1] or a negative step. Source: [B] section 4.3, reference code.
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay is {decay}. It must lie in [0, 1]. The published value is 0.99999.")
    if step < 0:
        raise ValueError(f"step is {step}. Steps are counted from 0. Pass the index of the step just taken.")
    return min(decay, (1 + step) / (10 + step)) if ramp else decay


class Ema:
    """Average e of the parameters p of `model`: e <- d * e + (1 - d) * p, beginning at e = p.

    Floating-point buffers are averaged like parameters, all other buffers are copied. Half-precision tensors
    are averaged in float32, because a step of 1 - d = 1e-5 rounds to nothing below that. A network that FSDP2 is to cut
    is given before that, and `module` is then cut in the same way; each process averages its rows.
    decay, ramp: see `ema_decay`, which also says which values raise ValueError.
    Source: [B] section 4.3, reference code.
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.99999, ramp: bool = True) -> None:
        ema_decay(0, decay=decay)
        self.decay = decay
        self.ramp = ramp
        self._module = copy.deepcopy(model).requires_grad_(False).eval()
        for tensor in _tensors(self._module).values():
            if tensor.dtype in (torch.float16, torch.bfloat16):
                tensor.data = tensor.data.float()

    @property
    def module(self) -> nn.Module:
        """The averaged network, in evaluation mode and without gradients; `update_` changes it in place."""
        return self._module

    @torch.no_grad()
    def update_(self, model: nn.Module, *, step: int) -> None:
        """Move the average towards `model`; `step` (from 0) sets the decay.

        Raises ValueError if the tensors of `model` are not those of the network averaged so far.
        """
        source, target = _tensors(model), _tensors(self._module)
        if [(n, t.shape) for n, t in source.items()] != [(n, t.shape) for n, t in target.items()]:
            copy_named_(target, source, owner="the averaged network")
        averaged = [name for name, tensor in target.items() if tensor.is_floating_point()]
        weight = 1.0 - ema_decay(step, decay=self.decay, ramp=self.ramp)
        shadow = [local(target[name]) for name in averaged]  # of what FSDP2 has cut, the rows that lie here
        torch._foreach_lerp_(
            shadow, [local(source[n]).to(s) for n, s in zip(averaged, shadow, strict=True)], weight
        )
        for name in target.keys() - set(averaged):
            target[name].copy_(source[name])

    @torch.no_grad()
    def copy_to_(self, model: nn.Module) -> None:
        """Write the average into `model`, in the model's own dtypes. Raises ValueError if names differ."""
        copy_named_(_tensors(model), _tensors(self._module), owner="the model")

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged tensors by the model's own names, live: keys and shapes of `model.state_dict()`."""
        return dict(self._module.state_dict())

    def load_state_dict_(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state_dict` gave. Raises ValueError listing what does not fit."""
        copy_named_(self.state_dict(), state, owner="the averaged network")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())
