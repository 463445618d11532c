"""`normfree eval`: accuracy of a trained network on labeled images."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from normfree.commands.usage import UsageError, check_classes
from normfree.suggest import problem

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
    from normfree.data.multilabel import as_multilabel
    from normfree.data.sources.open import open_labeled
    from normfree.inference import evaluate
    from normfree.pretrained import from_pretrained

    model = from_pretrained(arguments.model)
    source = open_labeled(arguments.data, pipes=True)
    check_classes(arguments.data, source.classes, model.classes)
    if as_multilabel(source) is not None and not model.sigmoid:
        given = f"the images of {arguments.data} have several classes, and {arguments.model} learned one for each image"
        raise UsageError(problem(given, fix="evaluate a model that was trained with --objective bce"))
    score = evaluate(model.net, source, preprocessing=model.preprocessing, batch_size=arguments.batch_size,
                     workers=arguments.workers, device=arguments.device, sigmoid=model.sigmoid)  # fmt: skip
    if arguments.json:
        print(json.dumps({"top1": score.top1, "top5": score.top5, "loss": score.loss, "images": score.count,
                          "per_class_top1": score.per_class(),
                          **(vars(score.several) if score.several else {})}))  # fmt: skip
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
    several = score.several
    columns = {"top-1 %": score.per_class()}
    if several is not None:
        columns = {"average precision %": several.average_precision, "F1 % at 0.5": several.f1}
    for title in columns:
        table.add_column(title, justify="right")
    for name in next(iter(columns.values())):
        # A plain string would be read as markup, and a class may be called "[red]".
        table.add_row(Text(name), *(f"{values[name]:.1f}" for values in columns.values()))
    console = Console(highlight=False)
    console.print(table)
    if several is not None:
        console.print(
            f"mAP {several.mean_average_precision:.2f} %, F1 at 0.5: micro {several.micro_f1:.2f} %, "
            f"macro {several.macro_f1:.2f} %"
        )
    console.print(
        f"top-1 {score.top1:.2f} %, top-5 {score.top5:.2f} %, loss {score.loss:.4f} on {score.count} images"
    )
