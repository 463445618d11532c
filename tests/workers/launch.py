"""Start worlds of processes on the CPU and run tasks in them: the one launcher of all tests with several processes.

    python launch.py PLAN.json

A plan lists worlds, [size, tasks], which run one after the other; a task is [module, function, arguments] of this
folder and is called as function(world, *arguments) in every process. The processes of a world are forked, so that torch
is imported once.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch

from normfree.training import run_folder
from normfree.training.distributed.world import start_world


def work(size: int, rank: int, port: int, tasks: list[list[Any]]) -> None:
    """Run the tasks as process `rank` of `size`."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    with start_world("cpu") as world:
        for module, function, arguments in tasks:
            getattr(importlib.import_module(module), function)(world, *arguments)
    # FSDP2's device meshes, which the other modules use, keep the group.
    if all(module == "world_worker" for module, *_ in tasks):
        deadline = time.monotonic() + 60
        while gloo_threads() and time.monotonic() < deadline:
            time.sleep(0.05)  # Linux lists a thread for a moment after it was joined
        assert not gloo_threads(), gloo_threads()


def gloo_threads() -> list[str]:
    """Return the names of gloo's threads in this process (Linux)."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(plan: list[tuple[int, list[list[Any]]]]) -> None:
    torch.set_num_threads(1)
    run_folder.draw_curves = lambda *args, **kwargs: None  # a third of the time of such a short run
    for module in {task[0] for _, tasks in plan for task in tasks}:
        importlib.import_module(module)
    fork = multiprocessing.get_context("fork")
    for size, tasks in plan:
        port = free_port()
        processes = [fork.Process(target=work, args=(size, rank, port, tasks)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit(f"world of {size}: {[process.exitcode for process in processes]}")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
