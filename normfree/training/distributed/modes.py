"""Settings that a value of `parallel` does not support, with the reason, and the micro-batches that "exact" allows.

replicated: each process has the whole network. sharded: each process has a part of each parameter (`fsdp.py`). exact:
each process has the whole network, and gradients are added in one order for any number of processes (`exact.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from normfree.suggest import problem
from normfree.training.config import Config
from normfree.training.resolve import Resolved


class _Rule(NamedTuple):
    """A combination that is not supported: `parallel=mode` with `what`, which a run has if `applies(run)`."""

    mode: str
    what: str
    applies: Callable[[Resolved], bool]
    reason: str
    fix: str


def _batch_norm(run: Resolved) -> bool:
    return run.variant.norm == "batch"


_RULES = (
    _Rule("exact", "a batch-norm twin", _batch_norm,
          "its running statistics depend on which images each process sees", "use a normalizer-free model"),
    _Rule("exact", "optim.sam_rho", lambda run: run.config.optim.sam_rho > 0,
          "SAM perturbs the weights with the gradient of the part of the batch in each process",
          "use --optim.sam_rho 0"),
    _Rule("exact", "compile", lambda run: run.config.compile,
          "compiled kernels may add in another order in each process", "use --compile false"),
    _Rule("exact", "patience", lambda run: run.config.patience > 0,
          "evaluation batches depend on the number of processes", "use --patience 0"),
    _Rule("sharded", "a batch-norm twin", _batch_norm,
          "its statistics would differ between processes", "use --parallel replicated"),
    _Rule("sharded", "optim.sam_rho", lambda run: run.config.optim.sam_rho > 0,
          "SAM needs the gradient of each process, and FSDP2 provides only the sum", "use --optim.sam_rho 0"),
    _Rule("sharded", "another optimizer than sgd", lambda run: not run.config.optim.optimizer.startswith("sgd"),
          "the state of PyTorch's optimizers is not gathered for checkpoints", "use --parallel replicated"),
    _Rule("sharded", "compile", lambda run: run.config.compile,
          "FSDP2 moves parameters between the compiled blocks", "use --compile false"),
)  # fmt: skip


def check_mode(run: Resolved, *, world_size: int) -> None:
    """Check that the config's `parallel` supports its other settings in `world_size` processes.

    Raises:
        ValueError: A setting is not supported; the message has one line for each.
    """
    config = run.config
    problems = [
        problem(f"parallel={config.parallel!r} with {rule.what}: {rule.reason}", fix=rule.fix)
        for rule in _RULES
        if rule.mode == config.parallel and rule.applies(run)
    ]
    if config.parallel == "exact":
        problems += _split_problems(config, world_size)
    if problems:
        raise ValueError("\n".join(problems))


def exact_sizes(batch_size: int, world_size: int) -> list[int]:
    """Return the micro-batches that "exact" allows, largest first.

    They are `batch_size` divided by a power of two that is at least `world_size`.

    >>> exact_sizes(24, 2)
    [12, 6, 3]
    """
    halvings = ((batch_size & -batch_size).bit_length() - 1) if batch_size else 0
    return [batch_size >> k for k in range(halvings + 1) if 2**k >= world_size]


def sizes(config: Config, *, world_size: int) -> list[int]:
    """Return the micro-batches that the mode allows in `world_size` processes, largest first."""
    batch_size = config.input.batch_size
    if config.parallel == "exact":
        return exact_sizes(batch_size, world_size)
    part = batch_size // world_size
    return [n for n in range(part, 0, -1) if part % n == 0]


def _split_problems(config: Config, world_size: int) -> list[str]:
    """Return the reasons why "exact" cannot split the batch into equal micro-batches."""
    batch_size, given = config.input.batch_size, config.input.micro_batch
    processes = f"{world_size} {'process' if world_size == 1 else 'processes'}"
    if world_size & (world_size - 1):
        below = 1 << (world_size.bit_length() - 1)
        return [
            problem(
                f"parallel='exact' in {processes}",
                allowed="1, 2, 4, 8 or another power of two, because sums are added in pairs",
                fix=f"use {below} or {2 * below}",
            )
        ]
    allowed = exact_sizes(batch_size, world_size)
    if not allowed:
        near = max(1, round(batch_size / world_size)) * world_size
        return [
            problem(
                f"input.batch_size={batch_size} with parallel='exact' in {processes}",
                allowed=f"a multiple of {world_size}",
                fix=f"use {near}",
            )
        ]
    if given == "auto" or given in allowed:
        return []
    near = min(allowed, key=lambda n: abs(n - int(given))) if given else allowed[min(3, len(allowed) - 1)]
    return [
        problem(
            f"input.micro_batch={given} with parallel='exact', input.batch_size={batch_size} and {processes}",
            allowed=f"{', '.join(map(str, allowed))} (the batch size divided by a power of two)",
            fix=f"use {near}, with which up to {batch_size // near} processes can share the batch",
        )
    ]
