"""`normfree eval`: accuracy of a trained network on labeled images."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from normfree.commands.usage import check_classes

if TYPE_CHECKING:
    from normfree.inference import Evaluation


@dataclass
class EvalArguments:
    """Measure top-1 and top-5 accuracy of a trained network on labeled images, preprocessed as its config states."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A run or model folder."""
    data: Annotated[Positional[str], tyro.conf.arg(metavar="DATA")]
    """A folder with one subfolder per class, or the name of a data set; its validation part is used if it has one."""
    batch_size: int = 128
    """Images per forward pass."""
    workers: int = 0
    """Processes that load images; 0 loads them in this process."""
    device: str = "auto"
    """cpu, cuda or mps; auto: the first GPU if there is one, else the CPU."""
    json: bool = False
    """Print one JSON object instead of a table."""


def eval_(arguments: EvalArguments) -> int:
    """Evaluate the model and print its scores; return 0."""
    from normfree.data.sources.open import open_labeled
    from normfree.inference import evaluate
    from normfree.pretrained import from_pretrained

    model = from_pretrained(arguments.model)
    source = open_labeled(arguments.data, pipes=True)
    check_classes(arguments.data, source.classes, model.classes)
    score = evaluate(model.net, source, preprocessing=model.preprocessing, batch_size=arguments.batch_size,
                     workers=arguments.workers, device=arguments.device, sigmoid=model.sigmoid)  # fmt: skip
    if arguments.json:
        print(json.dumps({"top1": score.top1, "top5": score.top5, "loss": score.loss, "images": score.count,
                          "per_class_top1": score.per_class()}))  # fmt: skip
    else:
        _print_table(score)
    return 0


def _print_table(score: Evaluation) -> None:
    """Print the accuracy of each class and of all images."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("class")
    table.add_column("top-1 %", justify="right")
    for name, value in score.per_class().items():
        # A plain string would be read as markup, and a class may be called "[red]".
        table.add_row(Text(name), f"{value:.1f}")
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"top-1 {score.top1:.2f} %, top-5 {score.top5:.2f} %, loss {score.loss:.4f} on {score.count} images"
    )
