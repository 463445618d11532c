"""What the three values of `parallel` refuse, with the reason; and how "exact" cuts a batch.

replicated: every process has the whole network. sharded: a part of each parameter (`sharded.py`). exact: the whole
network, and one order of adding up gradients for any number of processes (`exact.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from normfree.training.config import Config
from normfree.training.resolve import Resolved


class _Rule(NamedTuple):
    mode: str
    what: str
    meets: Callable[[Resolved], bool]
    why: str
    instead: str


def _batch_norm(run: Resolved) -> bool:
    return run.variant.norm == "batch"


_RULES = (
    _Rule("exact", "a batch-norm twin", _batch_norm,
          "its running statistics are of the images that a process has seen", "a normalizer-free model"),
    _Rule("exact", "optim.sam_rho", lambda run: run.config.optim.sam_rho > 0,
          "SAM climbs on the part of the batch that a process has", "--optim.sam_rho 0"),
    _Rule("exact", "compile", lambda run: run.config.compile,
          "compiled kernels may add up in another order in each process", "--compile false"),
    _Rule("exact", "patience", lambda run: run.config.patience > 0,
          "scores are computed in batches that depend on the number of processes", "--patience 0"),
    _Rule("sharded", "a batch-norm twin", _batch_norm,
          "its statistics are of a process's own images, and it is small", "--parallel replicated"),
    _Rule("sharded", "optim.sam_rho", lambda run: run.config.optim.sam_rho > 0,
          "SAM climbs on a process's own gradient, and FSDP2 only knows the sum", "--optim.sam_rho 0"),
    _Rule("sharded", "compile", lambda run: run.config.compile,
          "FSDP2 moves parameters between the blocks", "--compile false"),
)  # fmt: skip


def check_mode(run: Resolved, *, world_size: int) -> None:
    """Refuse what the config's `parallel` cannot do in `world_size` processes.

    Raises:
        ValueError: all of them, a line each.
    """
    config = run.config
    problems = [
        f"parallel={config.parallel!r} with {rule.what}: {rule.why}. Use {rule.instead}."
        for rule in _RULES
        if rule.mode == config.parallel and rule.meets(run)
    ]
    if config.parallel == "exact":
        problems += _cut_problems(config, world_size)
    if problems:
        raise ValueError("\n".join(problems))


def exact_sizes(batch_size: int, world_size: int) -> list[int]:
    """Micro-batches that "exact" takes, largest first: `batch_size` over a power of two of at least `world_size`."""
    halvings = ((batch_size & -batch_size).bit_length() - 1) if batch_size else 0
    return [batch_size >> k for k in range(halvings + 1) if 2**k >= world_size]


def sizes(config: Config, *, world_size: int) -> list[int]:
    """Micro-batches that divide the part of one process, largest first."""
    batch_size = config.input.batch_size
    if config.parallel == "exact":
        return exact_sizes(batch_size, world_size)
    part = batch_size // world_size
    return [n for n in range(part, 0, -1) if part % n == 0]


def _cut_problems(config: Config, world_size: int) -> list[str]:
    batch_size, given = config.input.batch_size, config.input.micro_batch
    many = f"{world_size} {'process' if world_size == 1 else 'processes'}"
    if world_size & (world_size - 1):
        below = 1 << (world_size.bit_length() - 1)
        return [
            f"parallel='exact' in {many}: expected 1, 2, 4, 8 or another power of two, so that sums meet in pairs. "
            f"Nearest: {below} or {2 * below}."
        ]
    allowed = exact_sizes(batch_size, world_size)
    if not allowed:
        near = max(1, round(batch_size / world_size)) * world_size
        return [
            f"input.batch_size={batch_size} with parallel='exact' in {many}: expected a multiple of {world_size}. "
            f"Nearest: {near}."
        ]
    if given == "auto" or given in allowed:
        return []
    near = min(allowed, key=lambda n: abs(n - int(given))) if given else allowed[min(3, len(allowed) - 1)]
    return [
        f"input.micro_batch={given} with parallel='exact', input.batch_size={batch_size} and {many}: expected the "
        f"batch over a power of two, so {', '.join(map(str, allowed))}. Use {near}: up to {batch_size // near} "
        "processes can share the batch."
    ]
