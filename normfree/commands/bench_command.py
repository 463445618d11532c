"""`normfree bench`: what a row reaches on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

from tyro.conf import Positional


@dataclass
class BenchArguments:
    """Images a second of a row on this machine, training and predicting, and how much of the machine that uses."""

    names: Positional[tuple[str, ...]]
    """Model names."""
    batch_size: int = 8
    """Images at a time."""
    image_size: int = 0
    """Side in pixels; 0: the row's training size."""
    device: str = "auto"
    """cpu, cuda, mps; auto: the first GPU, else the CPU."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of activations while training; prediction is float32."""
    compiled: bool = False
    """Train with torch.compile."""
    rounds: int = 5
    """Repetitions; the median is printed."""
    json: bool = False
    """Print one JSON object per row instead of a table."""


def bench(arguments: BenchArguments) -> int:
    from rich.console import Console
    from rich.table import Table

    from normfree.models.variants import variant_of
    from normfree.tools.speed import BACKWARD, measure
    from normfree.training.allocator import keep_freed_memory

    if arguments.device in ("auto", "cpu"):
        keep_freed_memory()  # as `normfree train` does
    for name in arguments.names:  # all of them before the first takes its minutes
        variant_of(name)
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = (
        "model",
        "px",
        "batch",
        "train images/s",
        "of the floor",
        "predict images/s",
        "folded",
        "of the floor",
    )
    for column in (*columns, "peak memory"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in arguments.names:
        speed = measure(
            name, batch_size=arguments.batch_size, image_size=arguments.image_size, device=arguments.device,
            precision=arguments.precision, compiled=arguments.compiled, rounds=arguments.rounds,
        )  # fmt: skip
        trained, predicted = speed.share(speed.train_s, passes=BACKWARD), speed.share(speed.folded_s)
        if arguments.json:
            print(json.dumps({**asdict(speed), "train_share": trained, "folded_share": predicted}))
            continue
        rates = [f"{speed.batch_size / s:.2f}" for s in (speed.train_s, speed.predict_s, speed.folded_s)]
        table.add_row(name, str(speed.image_size), str(speed.batch_size), rates[0], f"{100 * trained:.0f} %", rates[1],
                      rates[2], f"{100 * predicted:.0f} %", f"{speed.peak_bytes / 2**30:.2f} GiB")  # fmt: skip
    if not arguments.json:
        console = Console(width=130, highlight=False)
        console.print(table)
        console.print(f"on {speed.device}; the floor is the time of the multiplications alone at the rate of a large "
                      f"matrix product, {speed.flops / 1e9:,.0f} GFLOP/s")  # fmt: skip
    return 0
