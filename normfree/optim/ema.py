"""Exponential moving average (EMA) of the weights of a network."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normfree.optim.dtensor import local
from normfree.optim.named_state import copy_named_
from normfree.suggest import problem, some_names


def ema_decay(step: int, *, decay: float = 0.99999, ramp: bool = True) -> float:
    """Return the decay d of update number `step`, from 0.

    With `ramp`, d = min(decay, (1 + step) / (10 + step)); without, d = decay.

    The ramp lets the average forget the random initial weights. At the default decay it still rises after 112,602
    steps, the length of the published training.

    Raises:
        ValueError: `decay` is not in [0, 1], or `step` is negative.

    Source: [B] section 4.3, reference code.
    """
    if not 0.0 <= decay <= 1.0:
        fix = "pass decay=0.99999, the published value"
        raise ValueError(problem(f"decay is {decay}", allowed="0 to 1", fix=fix))
    if step < 0:
        raise ValueError(
            problem(f"step is {step}", allowed="0 or more", fix="pass the number of updates so far")
        )
    return min(decay, (1 + step) / (10 + step)) if ramp else decay


class Ema:
    """Exponential moving average of the weights of a network, in a second network that is ready to evaluate.

    Each update moves the average e towards the parameters p of the model: e <- d * e + (1 - d) * p, starting at e = p.
    Floating-point buffers are averaged like parameters, all other buffers are copied. Half-precision tensors are
    averaged in float32, because an update of 1 - d = 1e-5 rounds to zero in half precision. With FSDP2, create the
    average before the model is sharded, then shard `module` in the same way; each process averages its rows.

    Args:
        model: the network to average; it is copied.
        decay: largest decay d, in [0, 1].
        ramp: start with smaller decays, see `ema_decay`.

    Attributes:
        num_updates: number of updates so far, which sets the decay of the next one.

    Raises:
        ValueError: `decay` is not in [0, 1].

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> ema = normfree.Ema(model, decay=0.9, ramp=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> ema.update(model)  # 0.9 * 0 + 0.1 * 1
        >>> round(ema.module.weight.item(), 6), ema.num_updates
        (0.1, 1)

    Source: [B] section 4.3, reference code.
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.99999, ramp: bool = True) -> None:
        ema_decay(0, decay=decay)
        self.decay = decay
        self.ramp = ramp
        self.num_updates = 0
        self._module = copy.deepcopy(model).requires_grad_(False).eval()
        for tensor in _tensors(self._module).values():
            if tensor.dtype in (torch.float16, torch.bfloat16):
                tensor.data = tensor.data.float()

    @property
    def module(self) -> nn.Module:
        """The averaged network, in evaluation mode and without gradients; `update` changes it in place."""
        return self._module

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards `model`, after each optimizer step.

        Raises:
            ValueError: the tensors of `model` are not those of the averaged network.
        """
        source, target = _tensors(model), _tensors(self._module)
        if [(n, t.shape) for n, t in source.items()] != [(n, t.shape) for n, t in target.items()]:
            copy_named_(target, source, owner="the averaged network")
        averaged = [name for name, tensor in target.items() if tensor.is_floating_point()]
        weight = 1.0 - ema_decay(self.num_updates, decay=self.decay, ramp=self.ramp)
        shadow = [local(target[name]) for name in averaged]  # with FSDP2: the rows of this process
        torch._foreach_lerp_(
            shadow, [local(source[n]).to(s) for n, s in zip(averaged, shadow, strict=True)], weight
        )
        for name in target.keys() - set(averaged):
            target[name].copy_(source[name])
        self.num_updates += 1

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the average into `model`, in the dtypes of the model.

        Raises:
            ValueError: names or shapes differ.
        """
        copy_named_(_tensors(model), _tensors(self._module), owner="the model")

    def state_dict(self) -> dict[str, Any]:
        """Return {"num_updates": int, "module": averaged tensors by name}; the tensors are live, not copies."""
        return {"num_updates": self.num_updates, "module": dict(self._module.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned, bit for bit.

        Raises:
            ValueError: an entry is missing, or names or shapes differ; nothing was changed.
        """
        if set(state) != {"module", "num_updates"}:
            raise ValueError(
                problem(
                    f"the state of the average has the entries {some_names(map(str, state))}",
                    allowed="'module' and 'num_updates'",
                    fix="pass what Ema.state_dict() returned; for weights alone use ema.module.load_state_dict()",
                )
            )
        copy_named_(dict(self._module.state_dict()), state["module"], owner="the averaged network")
        self.num_updates = int(state["num_updates"])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())
