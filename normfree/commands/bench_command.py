"""`normfree bench`: speed of networks on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from normfree.commands.usage import check_given


@dataclass
class BenchArguments:
    """Measure images per second of networks on this machine, in training and prediction, against a lower bound."""

    names: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="NAME...")]
    """Model names."""
    batch_size: int = 8
    """Images per step."""
    image_size: int = 0
    """Side in pixels; 0: the model's training size."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """cpu, cuda or mps; auto: the first GPU if there is one, else the CPU."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Data type of activations in training; prediction always uses float32."""
    compiled: bool = False
    """Train with torch.compile."""
    rounds: int = 5
    """Repetitions; the median is printed."""
    json: bool = False
    """Print one JSON object per model instead of a table."""


# "of the floor" is the share of the mathematical lower bound: the time of the multiplications alone.
_COLUMNS = (
    "model", "px", "batch", "train images/s", "of the floor", "predict images/s", "folded", "of the floor",
    "peak memory",
)  # fmt: skip


def bench(arguments: BenchArguments) -> int:
    """Measure each model and print a table or JSON lines; return 0."""
    from rich.console import Console
    from rich.table import Table

    from normfree.models.variants import variant_of
    from normfree.tools.speed import BACKWARD, measure
    from normfree.training.allocator import keep_freed_memory

    check_given(arguments.names, "model name")
    if arguments.device in ("auto", "cpu"):
        keep_freed_memory()  # `normfree train` does the same
    # Report an unknown name before the first measurement, which takes minutes.
    for name in arguments.names:
        variant_of(name)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in arguments.names:
        speed = measure(
            name, batch_size=arguments.batch_size, image_size=arguments.image_size, device=arguments.device,
            precision=arguments.precision, compiled=arguments.compiled, rounds=arguments.rounds,
        )  # fmt: skip
        train_share, folded_share = speed.share(speed.train_s, passes=BACKWARD), speed.share(speed.folded_s)
        if arguments.json:
            print(json.dumps({**asdict(speed), "train_share": train_share, "folded_share": folded_share}))
            continue
        rates = [f"{speed.batch_size / s:.2f}" for s in (speed.train_s, speed.predict_s, speed.folded_s)]
        table.add_row(name, str(speed.image_size), str(speed.batch_size), rates[0], f"{100 * train_share:.0f} %",
                      rates[1], rates[2], f"{100 * folded_share:.0f} %",
                      f"{speed.peak_bytes / 2**30:.2f} GiB" if speed.peak_bytes else "unknown")  # fmt: skip
    if not arguments.json:
        console = Console(width=130, highlight=False)
        console.print(table)
        console.print(f"on {speed.device}; the floor is the time of the multiplications alone at the rate of a large "
                      f"matrix product, {speed.flops / 1e9:,.0f} GFLOP/s")  # fmt: skip
    return 0
