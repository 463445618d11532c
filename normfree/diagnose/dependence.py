"""Does one example's output depend on its neighbours in the batch? Proved or refuted, and the guilty modules named.

The leak that [A] and [B] hold against batch statistics: with them, the network is no function of one image. Here an
example is kept, all others are replaced, and everything about the kept one must stay the same, bit by bit; and the
gradient of its output with respect to the others' pixels must be exactly 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

#: Largest relative difference that counts as rounding. Kernels compute each example by itself and in the same order, so
#: that on a CPU differences are 0; atomic sums on a GPU may change the last bits of a float32 (6e-8).
ROUNDING = 1e-6


@dataclass(frozen=True)
class Dependence:
    """What replacing the neighbours did to an example, the larger of the first and the last of the batch.

    output: largest change of its outputs, relative to the largest output.
    gradient: change of the gradient of its outputs with respect to the parameters, relative, L2.
    leak: largest gradient of its outputs with respect to the neighbours' pixels, relative to that of its own.
    guilty: modules that got the same for this example and gave something else; "" is the network's own forward.
    """

    output: float
    gradient: float
    leak: float
    guilty: tuple[str, ...] = ()

    @property
    def depends(self) -> bool:
        """Whether any of the three is more than rounding, or not a number."""
        return not all(x <= ROUNDING for x in (self.output, self.gradient, self.leak))


@dataclass(frozen=True)
class DependenceReport:
    """The same network in training and in evaluation mode."""

    train: Dependence
    eval: Dependence

    @property
    def depends(self) -> bool:
        """In either mode."""
        return self.train.depends or self.eval.depends


def batch_dependence(model: nn.Module, images: Tensor) -> DependenceReport:
    """Whether outputs and gradients of one example depend on the others of the batch, in both modes.

    Random parts (dropout, stochastic depth) draw the same numbers each time. Modes, buffers (running statistics),
    gradients and the state of the generators are left as they were. `images`: B C H W, at least two.

    Raises:
        ValueError: fewer than two images, or no output with one row for each.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if len(images) < 2:
        raise ValueError(f"batch_dependence: {len(images)} image. One has no neighbours; give two or more.")
    modes = {m: m.training for m in model.modules()}
    try:
        return DependenceReport(_in_mode(model, images, train=True), _in_mode(model, images, train=False))
    finally:
        for module, mode in modes.items():
            module.training = mode


def _in_mode(model: nn.Module, images: Tensor, *, train: bool) -> Dependence:
    model.train(train)
    worst, guilty = Dependence(0.0, 0.0, 0.0), set[str]()
    for example in (0, len(images) - 1):  # a module that looks back only, say, spares the first
        # of another mean, variance and sign: a mere exchange would keep their statistics
        others = 0.5 - 2.0 * images
        others[example] = images[example]
        found = _compare(model, images, others, example)
        worst = Dependence(
            _larger(worst.output, found.output),
            _larger(worst.gradient, found.gradient),
            _larger(worst.leak, found.leak),
        )
        if found.depends:
            guilty |= _guilty(model, images, others, example)
    names = [name for name, _ in model.named_modules() if name in guilty]
    return replace(worst, guilty=tuple(names))


def _larger(a: float, b: float) -> float:
    """The larger; NaN if either is, which `max` may hide."""
    return float("nan") if a != a or b != b else max(a, b)


# --- numbers -----------------------------------------------------------------------------------------


def _compare(model: nn.Module, images: Tensor, others: Tensor, example: int) -> Dependence:
    first, grads, pixels = _outputs(model, images, example)
    second, grads2, _ = _outputs(model, others, example)
    output = _relative((first - second).abs().max(), first.abs().max())
    difference = torch.stack([(a - b).norm() for a, b in zip(grads, grads2, strict=True)]).norm()
    gradient = _relative(difference, torch.stack([g.norm() for g in grads]).norm()) if grads else 0.0
    largest = pixels.flatten(1).abs().amax(dim=1)
    own = largest[example].clone()
    largest[example] = 0.0
    return Dependence(output, gradient, _relative(largest.max(), own))


def _relative(difference: Tensor, scale: Tensor) -> float:
    return 0.0 if float(difference) == 0.0 else float(difference) / max(float(scale), 1e-30)


def _outputs(model: nn.Module, images: Tensor, example: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """An example's outputs as a vector, their gradients with respect to the parameters, and to all pixels."""
    images = images.detach().clone().requires_grad_()
    with _repeatable(model), torch.enable_grad():
        rows = [t for t in tree_leaves(model(images)) if _has_row(t, len(images))]
        if not rows:
            raise ValueError(
                f"{type(model).__name__} gave no tensor with one row for each of the {len(images)} images."
            )
        outputs = torch.cat([t[example].flatten() for t in rows])
        # fixed weights of both signs, so that no symmetry (a softmax sums to 1) hides a dependence
        weights = torch.cos(torch.arange(len(outputs), device=outputs.device, dtype=outputs.dtype))
        parameters = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad((outputs * weights).sum(), [images, *parameters], allow_unused=True)
    pixels = found[0] if found[0] is not None else torch.zeros_like(images)
    return outputs.detach(), [g for g in found[1:] if g is not None], pixels


@contextmanager
def _repeatable(model: nn.Module) -> Iterator[None]:
    """The same random numbers each time; buffers and generators are put back."""
    buffers = [(b, b.clone()) for b in model.buffers()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)  # devices that are not forked as well
            yield
    finally:
        with torch.no_grad():
            for buffer, kept in buffers:
                buffer.copy_(kept)


def _has_row(value: object, images: int) -> bool:
    return (
        isinstance(value, Tensor)
        and value.ndim > 0
        and value.shape[0] == images
        and value.is_floating_point()
    )


# --- names -------------------------------------------------------------------------------------------


class _Tape:
    """What modules were given and gave for one example: recorded in one pass, compared in the next.

    A difference is put down to the module it arose in, and then undone, so that all after it are judged on their own.
    """

    def __init__(self, images: int, example: int) -> None:
        self.images, self.example = images, example
        self.recorded: dict[tuple[str, int, str, int], Tensor] = {}
        self.replaying = False
        self.calls = Counter[str]()
        self.running: list[tuple[str, int]] = []
        self.guilty: set[str] = set()

    def enter(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self.calls[name] += 1
        caller = self.running[-1][0] if self.running else ""
        self.running.append((name, self.calls[name]))
        return self._check((args, kwargs), "in", blame=caller)

    def leave(self, output: Any) -> Any:
        name = self.running[-1][0]
        output = self._check(output, "out", blame=name)
        self.running.pop()
        return output

    def _check(self, values: Any, where: str, *, blame: str) -> Any:
        place = iter(range(1 << 30))

        def check(value: Any) -> Any:
            key = (*self.running[-1], where, next(place))
            if not _has_row(value, self.images):
                return value
            row = value[self.example]
            if not self.replaying:
                self.recorded[key] = row.clone()
                return value
            before = self.recorded.get(key)
            if before is None or before.shape != row.shape or _same(before, row):
                return value
            self.guilty.add(blame)
            value = value.clone()
            value[self.example] = before
            return value

        return tree_map(check, values)


def _same(a: Tensor, b: Tensor) -> bool:
    if torch.equal(a, b):
        return True
    return float((a - b).abs().max()) <= ROUNDING * float(a.abs().max())  # False for NaN


def _guilty(model: nn.Module, images: Tensor, others: Tensor, example: int) -> set[str]:
    """Modules that got the same for the example and gave something else."""
    tape = _Tape(len(images), example)
    with ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            for handle in (
                module.register_forward_pre_hook(
                    lambda _m, args, kwargs, name=name: tape.enter(name, args, kwargs), with_kwargs=True
                ),
                module.register_forward_hook(lambda _m, _args, output: tape.leave(output)),
            ):
                stack.callback(handle.remove)
        for batch in (images, others):
            with _repeatable(model):
                model(batch)
            tape.replaying = True
            tape.calls.clear()
    return tape.guilty
