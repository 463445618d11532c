"""Test whether the output for one example depends on the other examples of the batch, and find the modules responsible.

With batch statistics, a network is not a function of a single image ([A] section 1, [B] section 1). The test keeps one
example, replaces all others and compares: outputs and gradients of the kept example must not change, and the gradient
of its output with respect to the pixels of the others must be exactly 0.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from normfree.suggest import problem

# Largest relative difference that counts as rounding. On a CPU, kernels compute each example separately and in the same
# order, so the differences are 0; atomic sums on a GPU may change the last bits of a float32 (6e-8).
ROUNDING = 1e-6


@dataclass(frozen=True)
class Dependence:
    """Effect on an example of replacing all other examples; the maximum over the first and the last of the batch.

    Attributes:
        output: largest change of the example's outputs, relative to its largest output.
        gradient: relative change (L2 norm) of the gradient of its outputs with respect to the parameters.
        leak: largest gradient of its outputs with respect to pixels of other examples, relative to that with respect
            to its own pixels.
        guilty: names of the modules whose inputs for this example were equal and whose outputs were not. "" is the
            network's own `forward`.
    """

    output: float
    gradient: float
    leak: float
    guilty: tuple[str, ...] = ()

    @property
    def depends(self) -> bool:
        """True if any of the three numbers is above rounding error or NaN."""
        return not all(x <= ROUNDING for x in (self.output, self.gradient, self.leak))


@dataclass(frozen=True)
class DependenceReport:
    """Dependence of one network in training mode and in evaluation mode."""

    train: Dependence
    eval: Dependence

    @property
    def depends(self) -> bool:
        """True if the network depends on the batch in either mode."""
        return self.train.depends or self.eval.depends


def batch_dependence(model: nn.Module, images: Tensor) -> DependenceReport:
    """Test whether outputs and gradients of one example depend on the other examples of the batch, in both modes.

    Random operations (dropout, stochastic depth) draw the same numbers in each pass. Modes, buffers such as running
    statistics, gradients and the state of random generators are left unchanged.

    Args:
        model: any module that takes images.
        images: B C H W, at least two.

    Returns:
        The measured dependence in training and in evaluation mode, with the names of the modules that cause it.

    Raises:
        ValueError: there are fewer than two images, or no output has one row per image.

    Examples:
        >>> import torch
        >>> import normfree
        >>> images = torch.randn(3, 3, 8, 8)
        >>> with_norm = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
        >>> report = normfree.batch_dependence(with_norm, images)
        >>> report.train.depends, report.eval.depends, report.train.guilty
        (True, False, ('1',))
        >>> normfree.batch_dependence(with_norm[:1], images).depends
        False
    """
    # torch.compile wraps the module.
    model = getattr(model, "_orig_mod", model)
    if len(images) < 2:
        raise ValueError(
            problem(
                f"images has {len(images)} image(s)",
                allowed="2 or more",
                fix="pass a batch of at least two images",
            )
        )
    modes = {m: m.training for m in model.modules()}
    try:
        return DependenceReport(_in_mode(model, images, train=True), _in_mode(model, images, train=False))
    finally:
        for module, mode in modes.items():
            module.training = mode


def _in_mode(model: nn.Module, images: Tensor, *, train: bool) -> Dependence:
    """Measure the dependence in one mode."""
    model.train(train)
    worst, guilty = Dependence(0.0, 0.0, 0.0), set[str]()
    # Both ends, because a module may use, for example, only the previous examples.
    for example in (0, len(images) - 1):
        # Other images with a different mean, variance and sign: a permutation would keep the batch statistics.
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
    """Return the larger number, or NaN if either is NaN, which `max` may hide."""
    return float("nan") if a != a or b != b else max(a, b)


# --- numbers -----------------------------------------------------------------------------------------


def _compare(model: nn.Module, images: Tensor, others: Tensor, example: int) -> Dependence:
    """Compare the results for one example before and after its neighbors are replaced."""
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
    """Return the difference divided by the scale; 0 if there is no difference."""
    return 0.0 if float(difference) == 0.0 else float(difference) / max(float(scale), 1e-30)


def _outputs(model: nn.Module, images: Tensor, example: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return an example's outputs as a vector, and their gradients with respect to the parameters and to all pixels."""
    images = images.detach().clone().requires_grad_()
    with _repeatable(model), torch.enable_grad():
        rows = [t for t in tree_leaves(model(images)) if _has_row(t, len(images))]
        if not rows:
            raise ValueError(
                problem(
                    f"{type(model).__name__} returned no tensor whose first dimension is the batch of {len(images)}",
                    allowed="at least one floating-point output B ...",
                )
            )
        outputs = torch.cat([t[example].flatten() for t in rows])
        # Fixed weights of both signs, so that no symmetry hides a dependence (a softmax always sums to 1).
        weights = torch.cos(torch.arange(len(outputs), device=outputs.device, dtype=outputs.dtype))
        parameters = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad((outputs * weights).sum(), [images, *parameters], allow_unused=True)
    pixels = found[0] if found[0] is not None else torch.zeros_like(images)
    return outputs.detach(), [g for g in found[1:] if g is not None], pixels


@contextmanager
def _repeatable(model: nn.Module) -> Iterator[None]:
    """Seed the random generators, and restore them and the buffers of `model` on exit."""
    buffers = [(b, b.clone()) for b in model.buffers()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            # This also seeds devices that are not forked.
            torch.manual_seed(0)
            yield
    finally:
        with torch.no_grad():
            for buffer, kept in buffers:
                buffer.copy_(kept)


def _has_row(value: object, images: int) -> bool:
    """Return True if `value` is a tensor whose first dimension is the batch."""
    return (
        isinstance(value, Tensor)
        and value.ndim > 0
        and value.shape[0] == images
        and value.is_floating_point()
    )


# --- names -------------------------------------------------------------------------------------------


class _Tape:
    """Inputs and outputs of all modules for one example, recorded in one pass and compared in the next.

    A difference is attributed to the module in which it appears and then undone, so that each later module is tested
    independently.
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
        position = itertools.count()

        def check(value: Any) -> Any:
            key = (*self.running[-1], where, next(position))
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
    """Return True if two tensors are equal up to rounding."""
    if torch.equal(a, b):
        return True
    # False for NaN.
    return float((a - b).abs().max()) <= ROUNDING * float(a.abs().max())


def _guilty(model: nn.Module, images: Tensor, others: Tensor, example: int) -> set[str]:
    """Return the modules whose inputs for the example are equal in both batches and whose outputs are not."""
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
