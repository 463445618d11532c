"""SGD with Nesterov momentum and coupled weight decay, in the order of the reference code.

PyTorch does the arithmetic. This class adds: the fused kernel wherever it exists and its inputs are valid for it, one
learning rate times a multiplier for each group, and a state that is a flat dictionary of named tensors.
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
from normfree.suggest import problem

# Devices for which torch has a fused kernel. On the CPU it takes half the time of the loop over tensors; the foreach
# path takes longer than the loop (measured on the shapes of NFNet-F0).
FUSED_DEVICES = frozenset({"cpu", "cuda"})


class SGD(Optimizer):
    """SGD with Nesterov momentum and coupled weight decay.

    For each parameter p with gradient g: g += decay * p, m = momentum * m + g, g += momentum * m, p -= lr * g. Without
    `nesterov`, p -= lr * m. m starts at 0, so the first m equals the first g. Clip gradients before the step: clipping
    is defined on the raw gradient (`adaptive_clip_grad_`).

    Args:
        params: tensors, (name, tensor) pairs, or groups as `parameter_groups` returns. A group may have its own
            `weight_decay`, `momentum`, `nesterov`, and `lr_multiplier`, a factor on the learning rate with default 1.
        lr: base learning rate.
        momentum: 0.9 in [B].
        nesterov: use Nesterov momentum, as [B].
        weight_decay: of the groups that have none of their own.
        fused: None uses torch's fused kernel on CPU and CUDA where it is valid; False never does.

    Attributes:
        fused_step: called in place of the update if set; `attach_agc` sets it to one that also clips and averages.

    Raises:
        ValueError: lr, momentum or weight_decay is negative, momentum is 0 with `nesterov`, or a group has its own
            `lr`.

    Examples:
        >>> import torch
        >>> weight = torch.tensor([1.0], requires_grad=True)
        >>> optimizer = normfree.SGD([("weight", weight)], 0.1)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     weight.square().sum().backward()
        ...     optimizer.step()
        >>> weight.data, optimizer.named_state()
        (tensor([0.2224]), {'weight': tensor([3.0400])})

    Source: [B] section 4.3, reference code.
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
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise ValueError(problem(f"{name} is {value}", allowed="0 or more", fix=f"pass {name}=0.0"))
        if nesterov and momentum == 0.0:
            given = "nesterov is True with momentum 0"
            raise ValueError(problem(given, allowed="momentum above 0", fix="pass nesterov=False"))
        self.fused = fused
        self.fused_step: Callable[[], None] | None = None
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
        """Add a group as described for the class; the dictionary itself is not changed.

        Raises:
            ValueError: the group has its own `lr`.
        """
        if "lr" in param_group:
            raise ValueError(
                problem(
                    f"a parameter group has lr {param_group['lr']}",
                    allowed=f"lr_multiplier, a factor on the learning rate {self.defaults['lr']} of the optimizer",
                    fix="replace lr by lr_multiplier",
                )
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
        """Update every parameter that has a gradient. Return what `closure` returned, or None.

        Raises:
            ValueError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.fused_step is not None:
            self.fused_step()
            return loss
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in params):
                fix = "build the layer with sparse=False"
                raise ValueError(problem("a gradient is sparse", allowed="dense gradients", fix=fix))
            grads = [p.grad for p in params]
            buffers: list[Tensor | None] = [self._buffer(p) if group["momentum"] else None for p in params]
            if any(map(is_sharded, params)):  # each process updates its own rows, if it has any
                here = [i for i, p in enumerate(params) if local(p).numel()]
                buffers = [None if (b := buffers[i]) is None else local(b) for i in here]
                grads = [local(grads[i]) for i in here]
                params = [local(params[i]) for i in here]
            fused = self.fused is not False and _fusable(params, buffers)
            if fused:
                # The fused kernels ignore strides: a gradient in another memory format than its parameter would
                # silently update the wrong weights.
                grads = [laid_out_as(p, g) for p, g in zip(params, grads, strict=True)]
                # On CPUs they first copy a gradient that is not row-major; a permuted view avoids the copy.
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
        """Return the momentum of every parameter by the parameter's name; zero if no step was taken yet.

        The tensors are live, not copies.

        Raises:
            ValueError: the optimizer was built without names, or two parameters have the same name.
        """
        return {name: self._buffer(p) for name, p, group in self._named() if group["momentum"]}

    def load_named_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy what `named_state` returned into this optimizer, which then continues bit for bit.

        Raises:
            ValueError: names are unknown or missing, or shapes differ; the message lists them, and nothing was changed.
        """
        copy_named_(self.named_state(), state, owner="the momentum of this optimizer")

    def _buffer(self, parameter: Tensor) -> Tensor:
        """Return the momentum of `parameter` in the parameter's memory format, and create it if it does not exist.

        It starts at zero instead of None as in torch. The first update is the same, and parameters that get their first
        gradient later, which torch's fused path does not support, need no special case.
        """
        state = self.state[parameter]
        buffer = state.get("momentum_buffer")
        if buffer is None:
            buffer = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        buffer = laid_out_as(parameter, buffer)
        state["momentum_buffer"] = buffer
        return buffer

    def _named(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """Yield (name, parameter, group)."""
        seen: set[str] = set()
        for group in self.param_groups:
            if "param_names" not in group:
                raise ValueError(
                    problem(
                        "this optimizer was built from tensors without names",
                        allowed="named parameters, whose names are the keys of the state",
                        fix="build it from model.named_parameters() or parameter_groups(model, ...)",
                    )
                )
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if name in seen:
                    raise ValueError(
                        problem(
                            f"two parameters have the name {name!r}",
                            allowed="unique names",
                            fix="put both networks into one module and pass its named_parameters()",
                        )
                    )
                seen.add(name)
                yield name, parameter, group


def _row_major(tensor: Tensor) -> Tensor:
    """Return a view whose dimensions are in the order of memory."""
    if tensor.is_contiguous():
        return tensor
    return tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))


def _fusable(params: list[Tensor], buffers: list[Tensor | None]) -> bool:
    """Return True if torch's fused kernel is valid: a device that has it, floating point, and no gaps in memory."""
    for p, buffer in zip(params, buffers, strict=True):
        if p.device.type not in FUSED_DEVICES or not p.is_floating_point():
            return False
        dense = torch.empty_like(p, device="meta") if buffer is None else buffer
        if not same_layout(p, dense):
            return False
    return bool(params)
