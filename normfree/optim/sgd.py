"""SGD with Nesterov momentum and coupled weight decay, in the order of the reference code.

The arithmetic is torch's own. What is added: the fast kernel where there is one and its inputs are sound, one
learning rate times a multiplier per group, and a state that is a flat dictionary of named tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from torch.optim.sgd import sgd

from normfree.native.dispatch import laid_out_as, same_layout
from normfree.optim.dtensor import is_sharded, local
from normfree.optim.named_state import copy_named_

# torch has one fused update kernel for each of these; on the CPU it takes half of the loop's time, while
# the foreach path is slower than the loop (measured on the shapes of NFNet-F0).
FUSED_DEVICES = frozenset({"cpu", "cuda"})


class SGD(Optimizer):
    """Per parameter p with gradient g: g += decay * p, m = momentum * m + g, g += momentum * m, p -= lr * g.

    m starts at 0, which makes the first m equal to the first g. Without `nesterov`, p -= lr * m.
    Clipping acts on the raw gradient and therefore before this (`normfree.optim.clipping.clip_grad_`).

    params: tensors, (name, tensor) pairs, or groups such as `parameter_groups` makes. A group may carry its
        own `weight_decay`, `momentum`, `nesterov`, and `lr_multiplier` (factor on the learning rate, default
        1).
    lr: base learning rate. Defaults of the others: [B] section 4.3 and the reference code.
    fused: None takes torch's fused kernel on CPU and CUDA; False never does.
    Raises ValueError for a negative lr, momentum or weight_decay, for Nesterov without momentum, and for a
    group with its own `lr`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        fused: bool | None = None,
    ) -> None:
        for what, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"{what} is {value}. It must be 0 or more. Nearest: 0.0.")
        if nesterov and momentum == 0.0:
            raise ValueError(
                "nesterov is True with momentum 0. Nesterov needs momentum above 0. Pass nesterov=False."
            )
        self.fused = fused
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "nesterov": nesterov,
                "weight_decay": weight_decay,
                "lr_multiplier": 1.0,
            },
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as described for the class; the dictionary itself is left as it was."""
        if "lr" in param_group:
            raise ValueError(
                f"A parameter group has lr {param_group['lr']}. Groups take lr_multiplier, a factor on the "
                f"one learning rate {self.defaults['lr']}. Replace lr by lr_multiplier."
            )
        group = dict(param_group)
        group["lr"] = self.defaults["lr"] * group.get("lr_multiplier", 1.0)
        super().add_param_group(group)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every group to `lr` times the group's `lr_multiplier`."""
        for group in self.param_groups:
            group["lr"] = lr * group["lr_multiplier"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what `closure` returned, or None.

        Raises ValueError for a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in params):
                raise ValueError(
                    "A gradient is sparse. SGD takes dense gradients only. Build the layer with sparse=False."
                )
            grads = [p.grad for p in params]
            buffers: list[Tensor | None] = [self._buffer(p) if group["momentum"] else None for p in params]
            if any(map(is_sharded, params)):  # each process updates the rows that lie with it, if any
                here = [i for i, p in enumerate(params) if local(p).numel()]
                buffers = [None if (b := buffers[i]) is None else local(b) for i in here]
                grads = [local(grads[i]) for i in here]
                params = [local(params[i]) for i in here]
            fused = self.fused is not False and _fusable(params, buffers)
            if fused:
                # The fused kernels walk memory side by side and never look at strides: a gradient in another
                # memory format than its parameter would update the wrong weights without a word.
                grads = [laid_out_as(p, g) for p, g in zip(params, grads, strict=True)]
                # For CPUs they copy a gradient first that is not row-major.
                params, grads = ([_row_major(t) for t in column] for column in (params, grads))
                buffers = [None if b is None else _row_major(b) for b in buffers]
            sgd(
                params,
                grads,
                buffers,
                foreach=False,
                fused=fused,
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=0.0,
                nesterov=group["nesterov"],
                maximize=False,
            )
        return loss

    def named_state(self) -> dict[str, Tensor]:
        """Momentum of every parameter by the parameter's name, live, zero where no step was taken yet.

        Raises ValueError when the optimizer was built without names, or when two parameters share one.
        """
        return {name: self._buffer(p) for name, p, group in self._named() if group["momentum"]}

    def load_named_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy what `named_state` gave into this optimizer; it then continues bit for bit.

        Raises ValueError that lists unknown or missing names and shapes that differ, before anything changes.
        """
        copy_named_(self.named_state(), state, owner="the momentum of this optimizer")

    def _buffer(self, parameter: Tensor) -> Tensor:
        """The momentum of `parameter`, in the parameter's memory format (see `step`), made when first needed.

        Zeros instead of torch's "none yet": the first update is the same, and a parameter whose first
        gradient comes late, which breaks torch's fused path, needs no special case.
        """
        state = self.state[parameter]
        buffer = state.get("momentum_buffer")
        if buffer is None:
            buffer = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        buffer = laid_out_as(parameter, buffer)
        state["momentum_buffer"] = buffer
        return buffer

    def _named(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        seen: set[str] = set()
        for group in self.param_groups:
            if "param_names" not in group:
                raise ValueError(
                    "This optimizer was built from bare tensors. Its state is keyed by parameter name. "
                    "Build it from model.named_parameters() or parameter_groups(model, ...)."
                )
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if name in seen:
                    raise ValueError(
                        f"Two parameters are called {name!r}. Names must be unique. Put both networks into "
                        "one module and take its named_parameters()."
                    )
                seen.add(name)
                yield name, parameter, group


def _row_major(tensor: Tensor) -> Tensor:
    """A view whose dimensions come in the order in which memory is walked."""
    if tensor.is_contiguous():
        return tensor
    return tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))


def _fusable(params: list[Tensor], buffers: list[Tensor | None]) -> bool:
    """Whether the fused kernel may run: real floating point, a device that has it, and no gaps in memory."""
    for p, buffer in zip(params, buffers, strict=True):
        if p.device.type not in FUSED_DEVICES or not p.is_floating_point():
            return False
        dense = torch.empty_like(p, device="meta") if buffer is None else buffer
        if not same_layout(p, dense):
            return False
    return bool(params)
