"""`normfree eval` and `normfree predict`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tyro.conf import Positional

from normfree.commands.usage import UsageError

if TYPE_CHECKING:
    pass


@dataclass
class EvalArguments:
    """Top-1 and top-5 of a trained network on labelled images, with the preprocessing of its own config."""

    model: Positional[str]
    """A run or model folder."""
    data: Positional[str]
    """A folder of class folders, or the name of a data set; its validation part is used if it has one."""
    batch_size: int = 128
    """Images at a time."""
    workers: int = 0
    """Processes that read images."""
    device: str = "auto"
    """cpu, cuda, mps; auto: the first GPU, else the CPU."""
    json: bool = False
    """Print one JSON object instead of a table."""


def eval_(arguments: EvalArguments) -> int:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from normfree.data.sources.open import open_labeled
    from normfree.inference import evaluate
    from normfree.pretrained import from_pretrained

    model = from_pretrained(arguments.model)
    source = open_labeled(arguments.data, pipes=True)
    if tuple(source.classes) != model.classes:
        raise UsageError(f"{arguments.data} has classes {', '.join(source.classes[:5])}, ...; the model knows "
                         f"{', '.join(model.classes[:5])}, .... They must be the same, in the same order.")  # fmt: skip
    score = evaluate(model.net, source, preprocessing=model.preprocessing, batch_size=arguments.batch_size,
                     workers=arguments.workers, device=arguments.device)  # fmt: skip
    if arguments.json:
        print(json.dumps({"top1": score.top1, "top5": score.top5, "loss": score.loss, "images": score.count,
                          "per_class_top1": score.per_class()}))  # fmt: skip
        return 0
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("class")
    table.add_column("top-1 %", justify="right")
    for name, value in score.per_class().items():
        table.add_row(Text(name), f"{value:.1f}")  # a class may be called "[red]"
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"top-1 {score.top1:.2f} %, top-5 {score.top5:.2f} %, loss {score.loss:.4f} on {score.count} images"
    )
    return 0
