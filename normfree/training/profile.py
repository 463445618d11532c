"""Profile of some training steps under PyTorch's profiler, written as a trace and as a table.

The arithmetic does not change. Outside a profile nothing is measured, and a `span` costs 0.14 µs.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from normfree.data.loader import Batch
from normfree.files import write_text
from normfree.models.layers import WSConv2d
from normfree.suggest import number_of

BEFORE = 3  # steps before the profile: first calls select kernels, start threads and allocate the momentum
ROWS = 15  # operations in the table

# The phases of a step, in order; `Trainer` and this file mark them. A table lists those that occurred: "clip" is part
# of "update" if one pass does both. "rest" is the code between the phases, and an evaluation.
PHASES = ("data", "prepare", "forward", "backward", "exchange", "clip", "update")
STANDARDIZATION = "weight standardization"
PARTS = ("convolution", STANDARDIZATION, "clip", "update", "data")

_NOTHING = contextlib.nullcontext()
_on = False


def span(name: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context manager that names the work in it, in trace and table; it does nothing outside a profile."""
    return record_function(name) if _on else _NOTHING


def profiled(
    batches: Generator[Batch, None, None],
    *,
    steps: int,
    net: nn.Module,
    folder: Path,
    log: Callable[[str], None],
    compiled: bool = False,
) -> Generator[Batch, None, None]:
    """Yield the same batches; record what the caller does with `steps` of them, after the first few.

    Args:
        batches: closed when the generator is closed.
        steps: steps to record; 0 records none.
        net: its weight standardization is named, unless it is `compiled`, which fuses that with other work.
        folder: gets trace.json (for chrome://tracing or Perfetto) and table.txt.
        log: called with a message about the files written.
        compiled: whether the steps use compiled blocks.
    """
    with contextlib.closing(batches):
        if steps:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it warns of missing GPUs
            activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + torch.cuda.is_available()]
            plan = schedule(wait=BEFORE - 1, warmup=1, active=steps)
            recorded = 0
            with (
                profile(activities=activities, schedule=plan) as profiler,
                _marked(None if compiled else net),
            ):
                for number in range(BEFORE + steps):
                    with span("data"):
                        batch = next(batches, None)
                    if batch is None:
                        break
                    yield batch
                    recorded = number + 1 - BEFORE
                    if recorded < steps:
                        profiler.step()
            if recorded < 1:
                log(f"no profile: it starts after {BEFORE} steps, and the run ended before that")
                return
            folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(folder / "trace.json"))
            write_text(folder / "table.txt", table(profiler, recorded))
            log(
                f"profile of {number_of(recorded, 'step')}: {folder}/table.txt, and {folder}/trace.json for Perfetto"
            )
        yield from batches


@contextlib.contextmanager
def _marked(net: nn.Module | None) -> Iterator[None]:
    """Enable spans, and record the weight standardization of each layer of `net` as one."""
    global _on
    layers = [] if net is None else [m for m in net.modules() if isinstance(m, WSConv2d)]
    try:
        _on = True
        for layer in layers:
            layer.marker = functools.partial(span, STANDARDIZATION)
        yield
    finally:
        _on = False
        for layer in layers:
            layer.marker = contextlib.nullcontext


# --- the table ---------------------------------------------------------------------------------------


def table(profiler: profile, steps: int) -> str:
    """Return times by phase and by part, and the operations that take longest, for `steps` recorded steps."""
    events = list(profiler.events() or ())
    device = any(e.self_device_time_total > 0 for e in events)
    whole = sum(e.cpu_time_total for e in events if e.name.startswith("ProfilerStep"))
    phases, parts = _phases(events), _parts(events)
    lines = [f"{steps} steps after {BEFORE}, {whole / steps / 1e3:.2f} ms each under the profiler\n"]
    lines += ["phase, on the CPU's clock           ms a step    share"]
    phases["rest"] = whole - sum(phases.values())
    lines += [f"{name:32} {us / steps / 1e3:12.3f} {_percent(us, whole)}" for name, us in phases.items()]
    for column, name in enumerate(("CPU", "GPU")[: 1 + device]):
        total = sum(times[column] for times in parts.values())
        lines += [f"\npart, {name} time of its operations    ms a step    share"]
        lines += [
            f"{part:32} {times[column] / steps / 1e3:12.3f} {_percent(times[column], total)}"
            for part, times in parts.items()
        ]
    order = "self_device_time_total" if device else "self_cpu_time_total"
    lines += ["", profiler.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=50)]
    return "\n".join(lines)


def _percent(value: float, whole: float) -> str:
    return f"{100 * value / whole if whole else 0.0:6.1f} %"


def _phases(events: list[Any]) -> dict[str, float]:
    """Return the microseconds of each phase, on the clock of the training thread."""
    times = dict.fromkeys(PHASES, 0.0)
    for event in events:
        if event.name in times:
            times[event.name] += event.cpu_time_total
    return {name: us for name, us in times.items() if us}


def _parts(events: list[Any]) -> dict[str, list[float]]:
    """Return the microseconds of CPU and GPU that operations take themselves, by part.

    An operation belongs to the innermost part around it. An operation of the backward pass belongs to the part of the
    operation that it differentiates: autograd numbers its nodes, and both operations have the number.
    """
    forward: dict[tuple[int, int], str] = {}
    for event in events:
        if event.sequence_nr >= 0 and event.fwd_thread == 0:
            # the last event with a number creates the node
            forward[event.thread, event.sequence_nr] = _part_around(event, {})
    times: dict[str, list[float]] = {part: [0.0, 0.0] for part in PARTS}
    others: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in events:
        if event.name.startswith("ProfilerStep"):
            continue
        part = _part_around(event, forward)
        row = times[part] if part else others["other"]
        row[0] += event.self_cpu_time_total
        row[1] += event.self_device_time_total
    return {**{part: row for part, row in times.items() if any(row)}, **others}


def _part_around(event: Any, forward: dict[tuple[int, int], str]) -> str:
    while event is not None:
        if event.name in PARTS:
            return str(event.name)
        if "conv" in event.name.lower() and not event.name.startswith("autograd::"):
            return "convolution"
        if event.name.startswith("autograd::"):
            return forward.get((event.fwd_thread, event.sequence_nr), "")
        event = event.cpu_parent
    return ""
