"""`normfree diagnose`: signal propagation, gradients, and dependence on the batch."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from normfree.commands.usage import UsageError
from normfree.suggest import number_of, problem

if TYPE_CHECKING:
    from normfree.commands.diagnose_subject import Subject
    from normfree.diagnose.gradients import GradientReport
    from normfree.diagnose.propagation import SignalReport

# Images of the test of dependence on the batch: one, and three others that are replaced.
DEPENDENCE_IMAGES = 4
DEFAULT_BATCH_SIZE = 16
# A run whose last training loss is above this multiple of its first has diverged.
DIVERGED = 2.0


@dataclass
class DiagnoseArguments:
    """Measure signal propagation, gradients relative to weights, and dependence on the batch; print tables and draw
    plots (PNG). For a run, also write an HTML page."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A model name, a run or model folder, or timm:NAME or torchvision:NAME (random weights)."""
    data: Annotated[Positional[str], tyro.conf.arg(metavar="[DATA]")] = ""
    """A folder with one subfolder per class, or the name of a data set; default: the data of the run, else Gaussian
    noise. If it is a second run folder, only one HTML page that compares both runs is written."""
    batch_size: int = 0
    """Number of images; the gradient is that of one batch. 0: 16, or all images if there are fewer."""
    image_size: int = 0
    """Side in pixels; 0: the network's own size."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """cpu, cuda or mps; auto: the first GPU if there is one, else the CPU."""
    out: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = ""
    """Folder for the plots; default: diagnose-NAME in the current folder."""
    report: Annotated[str, tyro.conf.arg(metavar="FILE.html")] = ""
    """HTML page to write about one run or two; default: report.html in the folder of one run, RUN-RUN.html in the
    current folder for two."""
    json: bool = False
    """Print one JSON object instead of tables; draw plots only if --out is given."""


def diagnose(arguments: DiagnoseArguments) -> int:
    """Measure the network and print, draw or write the results; return 0."""
    runs = _check(arguments)
    if len(runs) == 2:
        return _write_page(arguments, runs)
    _measure(arguments)
    if runs and not arguments.json:
        return _write_page(arguments, runs)
    return 0


def _check(arguments: DiagnoseArguments) -> list[Path]:
    """Raise UsageError for impossible arguments; return the run folders among them."""
    if arguments.batch_size != 0 and arguments.batch_size < 2:
        raise UsageError(
            problem(f"--batch-size is {arguments.batch_size}", allowed="2 or more, to compare an image in different "
                    "batches", fix="--batch-size 16")
        )  # fmt: skip
    if arguments.image_size < 0:
        raise UsageError(
            problem(
                f"--image-size is {arguments.image_size}", allowed="pixels, or 0 for the network's own size"
            )
        )
    given = (arguments.model, arguments.data)
    first, second = ((Path(name) / "config.toml").is_file() for name in given)
    if arguments.report and not (first or second):
        raise UsageError(
            problem(f"--report is given, but {arguments.model} is not a run", allowed="--report with a run folder",
                    fix="leave --report out")
        )  # fmt: skip
    if second and not first:
        raise UsageError(
            problem(f"{arguments.data} is a run, but {arguments.model} is not", allowed="two run folders, or a model "
                    "and its data")
        )  # fmt: skip
    return [Path(name) for name, is_run in zip(given, (first, second), strict=True) if is_run]


def _measure(arguments: DiagnoseArguments) -> None:
    """Run the network once on images and report the results."""
    import torch
    import torch.nn.functional as F

    from normfree.commands.diagnose_subject import load_images, open_subject
    from normfree.commands.diagnose_tables import as_json
    from normfree.device import run_device
    from normfree.diagnose.dependence import batch_dependence
    from normfree.diagnose.gradients import gradient_report
    from normfree.diagnose.propagation import NoResidualBlocksError, signal_propagation

    torch.manual_seed(0)
    subject, device = open_subject(arguments.model, arguments.data), run_device(arguments.device)
    images, labels, description = load_images(
        subject,
        arguments.data,
        count=arguments.batch_size or DEFAULT_BATCH_SIZE,
        image_size=arguments.image_size,
        given=arguments.batch_size != 0,
    )
    arguments = replace(arguments, batch_size=len(images))

    net, images, labels = subject.net.to(device), images.to(device), labels.to(device)
    try:
        signal, reason = signal_propagation(net, images), ""
    except NoResidualBlocksError as error:  # the other reports do not need blocks
        signal, reason = None, str(error)
    dependence = batch_dependence(net, images[:DEPENDENCE_IMAGES])
    logits = net.train()(images)
    F.cross_entropy(logits, labels % logits.shape[1]).backward()
    gradients = gradient_report(net, exempt=f"^{re.escape(subject.classifier)}$")
    title = f"{subject.title}, {len(images)} {description} at {images.shape[-1]} px"
    if arguments.json:
        reports = as_json(signal, gradients, dependence)
        print(json.dumps({"model": arguments.model, "what": title, **reports}))
    else:
        from rich.console import Console

        from normfree.commands.diagnose_tables import print_dependence, print_gradients, print_signal

        # On a terminal, rich uses its width; in a file or pipe, 120 columns.
        console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, soft_wrap=True)
        console.print(title, markup=False)
        if signal is None:
            console.print(f"\nSignal propagation\n{reason}", markup=False)
        else:
            print_signal(console, signal)
        recommended, basis = _recommend(arguments, subject, gradients)
        print_gradients(console, gradients, recommended=recommended, basis=basis)
        print_dependence(console, dependence)
    if arguments.out or not arguments.json:
        _draw(arguments, title, signal, gradients)


def _recommend(arguments: DiagnoseArguments, subject: Subject, report: GradientReport) -> tuple[float, str]:
    """Return a clipping threshold λ and what it is based on, or NaN and why there is none.

    It is based on the samples of a run, or else on this one gradient of a trained network. It is NaN for random
    weights, because their gradients tell little about training, and for runs that are too short or diverged.
    """
    from normfree.diagnose.gradients import MIN_SAMPLES, recommended_clipping
    from normfree.diagnose.metrics_file import read_metrics

    metrics = Path(arguments.model) / "metrics.jsonl"
    if metrics.is_file():
        rows = read_metrics(metrics)
        samples = [row["ratios"] for row in rows if row.get("ratios")]
        losses = [row["loss"] for row in rows if isinstance(row.get("loss"), float)]
        if losses and not losses[-1] < DIVERGED * losses[0]:
            return math.nan, "no λ is recommended: the run diverged"
        if math.isnan(recommended := recommended_clipping(samples)):
            if len(samples) < MIN_SAMPLES:
                reason = (
                    f"the run has {len(samples)} finite samples of its gradients, {MIN_SAMPLES} are needed"
                )
            else:
                reason = "typical gradients of the run are infinite or larger than the weights"
            return math.nan, f"no λ is recommended: {reason}"
        return recommended, f"according to {number_of(len(samples), 'sample')} of the run"
    if subject.preprocessing is None:
        return math.nan, ""
    return report.recommended, f"according to this gradient of batch size {arguments.batch_size}"


def _draw(
    arguments: DiagnoseArguments, title: str, signal: SignalReport | None, gradients: GradientReport
) -> None:
    """Draw the plots and print their paths, or print which package they need."""
    from normfree.diagnose.network_figures import draw_ratios, draw_signal

    name = re.sub(r"[^\w.-]+", "-", arguments.model.rstrip("/").rpartition("/")[2])
    folder = Path(arguments.out or f"diagnose-{name}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if signal is not None:
            draw_signal({title: signal}, folder / "signal.png")
        draw_ratios(gradients, folder / "ratios.png", title=title)
    except ModuleNotFoundError as error:
        print(f"normfree: no plots: {error}", file=sys.stderr)
        return
    if not arguments.json:
        names = (["signal.png"] if signal is not None else []) + ["ratios.png"]
        print(f"\nplots: {', '.join(str(folder / name) for name in names)}")


def _write_page(arguments: DiagnoseArguments, runs: list[Path]) -> int:
    """Write the HTML page about one run or two and print its path; return 0."""
    from normfree.tools.run_report import write_report

    if arguments.report:
        path = Path(arguments.report)
    elif len(runs) == 1:
        path = runs[0] / "report.html"
    else:
        path = Path(f"{'-'.join(run.resolve().name for run in runs)}.html")
    print(f"report: {write_report(runs, path, device=arguments.device)}")
    return 0
