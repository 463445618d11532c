"""Time of each operation in a training step on a CPU: `python -m benchmarks.where [NAME SIZE] [--steps N]`.

Milliseconds per step that PyTorch's profiler attributes to each operation itself, in forward pass, backward pass and
update, at batch size 8, for timm's network in both memory formats and ours in channels_last, in turn. Writes
results/where-NAME.md.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import machine, report
from benchmarks.networks import batch, copied, forward_backward, pair
from benchmarks.update_arms import our_update, timm_update
from normfree.models.net import Net
from normfree.training.allocator import keep_freed_memory

IMAGES, WARM, LEAST_MS = 8, 4, 15.0


def main() -> None:
    """Measure all arms, and write and print the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", default="dm_nfnet_f0", help="a network of timm")
    parser.add_argument("size", nargs="?", type=int, default=192, help="pixels")
    parser.add_argument("--steps", type=int, default=3, help="profiled steps of each arm")
    options = parser.parse_args()
    keep_freed_memory()
    device = torch.device("cpu")
    theirs, ours = pair(options.name)
    nets = {"timm NCHW": theirs, "timm NHWC": theirs, "normfree NHWC": ours}
    steps = {arm: _step(copied(net, arm[-4:], device), options.size, arm[-4:]) for arm, net in nets.items()}
    spent: dict[str, dict[str, float]] = {arm: defaultdict(float) for arm in steps}
    for _ in range(WARM):
        for step in steps.values():
            step()
    for _ in range(options.steps):
        for arm, step in steps.items():
            with profile(activities=[ProfilerActivity.CPU]) as record:
                step()
            for event in record.key_averages():
                spent[arm][event.key] += event.self_cpu_time_total / 1e3 / options.steps
    found = machine.facts(device)
    facts = ", ".join(f"{k} {v}" for k, v in found.items() if v)
    command = f"`python -m benchmarks.where {options.name} {options.size}`, {options.steps} steps of each arm in turn."
    about = __doc__.partition("\n\n")[2].replace("\n", " ").partition(" Writes")[0]
    page = "\n\n".join(
        [f"# where: {options.name}, {options.size} px", about, f"{command} {facts}.", table(spent)]
    )
    path = report.RESULTS / f"where-{options.name}{report.suffix(found)}.md"
    path.write_text(page + "\n", encoding="utf-8")
    print(page)


def table(spent: dict[str, dict[str, float]]) -> str:
    """Return the table: operations that take `LEAST_MS` or more in any arm, the sum of all others, and the total."""
    names = {name for own in spent.values() for name, ms in own.items() if ms >= LEAST_MS}
    rows = [(name, [own.get(name, 0.0) for own in spent.values()]) for name in names]
    rows.sort(key=lambda row: -max(row[1]))
    rest = [sum(ms for name, ms in own.items() if name not in names) for own in spent.values()]
    rows += [("all others", rest), ("**total**", [sum(own.values()) for own in spent.values()])]
    lines = [f"| operation | {' | '.join(spent)} |", "|---|" + "--:|" * len(spent)]
    lines += [
        f"| {name.removeprefix('aten::')} | {' | '.join(f'{ms:.0f}' for ms in each)} |" for name, each in rows
    ]
    return "\n".join(lines)


def _step(net: nn.Module, size: int, layout: str) -> Callable[[], None]:
    """Return a function that takes one training step."""
    update = our_update(net) if isinstance(net, Net) else timm_update(net)
    images, labels = batch(size, IMAGES, torch.device("cpu"), layout)

    def step() -> None:
        forward_backward(net, images, labels)
        update.step()

    return step


if __name__ == "__main__":
    main()
