"""`normfree diagnose`: how signals and gradients travel through a network, and whether it looks at its neighbours."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from normfree.commands.usage import UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor, nn

    from normfree.data.source import Source
    from normfree.diagnose.dependence import DependenceReport
    from normfree.diagnose.gradients import GradientReport
    from normfree.diagnose.propagation import SignalReport
    from normfree.preprocessing import Preprocessing

DEPENDENCE_IMAGES = 4  # a neighbour or three prove as much as many


@dataclass
class DiagnoseArguments:
    """Signal propagation, gradients against weights, and dependence on the batch: tables, and pictures as PNG."""

    model: Positional[str]
    """A model name, a run or model folder, or timm:NAME or torchvision:NAME (random weights)."""
    data: Positional[str] = ""
    """A folder of class folders, or the name of a data set; nothing: the data of a run, else Gaussian noise. A second
    run folder: one page with both runs, and nothing else."""
    batch_size: int = 16
    """Images; the gradient is that of one batch."""
    image_size: int = 0
    """Side in pixels; 0: the network's own."""
    device: str = "auto"
    """cpu, cuda, mps; auto: the first GPU, else the CPU."""
    out: str = ""
    """Folder for the pictures; nothing: diagnose-NAME here."""
    report: str = ""
    """HTML page about a run, or two; nothing: report.html in the run's folder, RUN-RUN.html here for two."""
    json: bool = False
    """Print one JSON object instead of tables; no pictures unless --out names a folder."""


@dataclass
class _Subject:
    """What is looked at."""

    net: nn.Module
    what: str
    size: int
    channels: int = 3
    classifier: str = "head.weight"  # which AGC leaves alone
    data: str = ""
    source: Source | None = None
    preprocessing: Preprocessing | None = None
    classes: tuple[str, ...] = field(default=())


def diagnose(arguments: DiagnoseArguments) -> int:
    import torch
    import torch.nn.functional as F
    from rich.console import Console

    from normfree.device import run_device
    from normfree.diagnose.dependence import batch_dependence
    from normfree.diagnose.gradients import gradient_report
    from normfree.diagnose.propagation import NoResidualBlocksError, signal_propagation

    if arguments.batch_size < 2:
        raise UsageError(f"--batch-size {arguments.batch_size}: expected 2 or more; one has no neighbours.")
    if arguments.image_size < 0:
        raise UsageError(f"--image-size {arguments.image_size}: expected pixels, or 0 for the network's own.")
    runs = [
        Path(word) for word in (arguments.model, arguments.data) if (Path(word) / "config.toml").is_file()
    ]
    if arguments.report and not runs:
        raise UsageError(
            f"--report {arguments.report}: only runs have a page, and {arguments.model} is none."
        )
    if arguments.data and Path(arguments.data) in runs:
        if len(runs) < 2:
            raise UsageError(f"{arguments.data} is a run, and {arguments.model} is none to put beside it.")
        return _report(arguments, runs)
    torch.manual_seed(0)
    subject, device = _subject(arguments), run_device(arguments.device)
    images, labels, seen = _images(arguments, subject)
    net, images, labels = subject.net.to(device), images.to(device), labels.to(device)
    try:
        signal, missing = signal_propagation(net, images), ""
    except NoResidualBlocksError as error:  # the rest can be said of it all the same
        signal, missing = None, str(error)
    dependence = batch_dependence(net, images[:DEPENDENCE_IMAGES])
    logits = net.train()(images)
    F.cross_entropy(logits, labels % logits.shape[1]).backward()
    gradients = gradient_report(net, exempt=f"^{re.escape(subject.classifier)}$")
    title = f"{subject.what}, {len(images)} {seen} at {images.shape[-1]} px"
    if arguments.json:
        print(json.dumps(_finite({"model": arguments.model, "what": title, "signal": signal and asdict(signal),
                                  "gradients": _numbers(gradients), "dependence": asdict(dependence)})))  # fmt: skip
    else:
        console = Console(width=None if _terminal() else 120, highlight=False, soft_wrap=True)
        console.print(title, markup=False)
        if signal is None:
            console.print(f"\nSignal propagation\n{missing}", markup=False)
        else:
            _print_signal(console, signal)
        _print_gradients(console, gradients, *_recommended(arguments, subject, gradients))
        _print_dependence(console, dependence)
    if arguments.out or not arguments.json:
        _draw(arguments, title, signal, gradients)
    if runs and not arguments.json:
        return _report(arguments, runs)
    return 0


# --- what is looked at -------------------------------------------------------------------------------


def _subject(arguments: DiagnoseArguments) -> _Subject:
    from normfree.models.variants import VARIANTS, variant_of
    from normfree.models.zoo import create_model

    word = arguments.model
    library, colon, name = word.partition(":")
    if colon and library in ("timm", "torchvision"):
        return _foreign(library, name)
    if word.startswith("hf-hub:") or Path(word).exists():
        return _trained(arguments)
    if colon or word not in VARIANTS:
        try:
            variant_of(word)
        except ValueError as error:
            raise UsageError(f"{error}; others: a run or model folder, timm:NAME, torchvision:NAME") from None
    classes = _classes(arguments)
    # branches open, as in the plots of [A]: at 0 they would carry nothing and get no gradient
    net = create_model(word, num_classes=len(classes) or 1000, skip_gain=1.0)
    row = variant_of(word)
    open_branches = ", skip gains 1" if row.norm == "none" else ""
    return _Subject(net, f"{word}, random weights{open_branches}", row.train_size, classes=classes)


def _trained(arguments: DiagnoseArguments) -> _Subject:
    from normfree.data.sources.open import open_source
    from normfree.models.net import Net
    from normfree.pretrained import from_pretrained
    from normfree.training.config_io import load_config

    word = arguments.model
    model = from_pretrained(word)
    if not isinstance(model.net, Net):
        raise UsageError(
            f"{word} is an ONNX file, whose inside cannot be watched. Give the run or model folder."
        )
    pre, config = model.preprocessing, Path(word) / "config.toml"
    subject = _Subject(model.net, word, pre.image_size, model.net.in_channels, preprocessing=pre,
                       classes=model.classes)  # fmt: skip
    if config.is_file():
        run = load_config(config)
        if not arguments.data:  # what the run validates on
            subject.data = run.data
            subject.source = open_source(run.data, val_fraction=run.input.val_fraction, seed=run.seed).val
    return subject


def _foreign(library: str, name: str) -> _Subject:
    """A network of another library, with random weights: nothing is downloaded."""
    from difflib import get_close_matches

    from torch import nn

    if library == "timm":
        try:
            import timm
        except ModuleNotFoundError:
            raise UsageError(
                f"timm:{name} needs timm, which is not installed. Fix: pip install timm"
            ) from None
        known: list[str] = timm.list_models()
        make: Callable[..., Any] = timm.create_model
    else:
        from normfree.data.torchvision_import import torchvision_module

        models = torchvision_module("models")
        known, make = models.list_models(module=models), models.get_model  # without weights unless told
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f" Did you mean {library + ':' + close[0]!r}?" if close else ""
        raise UsageError(f"{library} has no classifier {name!r}.{hint}")
    net = make(name)
    _, size, _ = getattr(net, "default_cfg", {}).get("input_size", (3, 224, 224))
    last = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)][-1:]
    return _Subject(
        net, f"{library}:{name}, random weights", size, classifier="".join(f"{n}.weight" for n in last)
    )


def _classes(arguments: DiagnoseArguments) -> tuple[str, ...]:
    from normfree.data.sources.open import open_labeled

    return tuple(open_labeled(arguments.data).classes) if arguments.data else ()


def _images(arguments: DiagnoseArguments, subject: _Subject) -> tuple[Tensor, Tensor, str]:
    """Normalized images B C S S, labels B, and what they are."""
    import torch

    from normfree.data.sources.open import open_labeled
    from normfree.inference import sample
    from normfree.preprocessing import Preprocessing

    data = arguments.data or subject.data
    count, size = arguments.batch_size, arguments.image_size or subject.size
    if not data:
        labels = torch.randint(2**31, (count,))  # the caller takes them modulo the classes
        return torch.randn(count, subject.channels, size, size), labels, "images of N(0, 1)"
    source = subject.source or open_labeled(data)
    if len(source) < count:
        raise UsageError(
            f"{data} has {len(source)} images for --batch-size {count}. Use {len(source)} or less."
        )
    if arguments.data and subject.preprocessing and tuple(source.classes) != subject.classes:
        raise UsageError(
            f"{data} has classes {', '.join(source.classes[:5])}, ...; the model knows "
            f"{', '.join(subject.classes[:5])}, .... They must be the same, in the same order."
        )
    pre = subject.preprocessing or Preprocessing(image_size=size)
    if arguments.image_size:
        from dataclasses import replace

        pre = replace(pre, image_size=size)
    return *sample(source, count=count, preprocessing=pre), f"images of {data}"


# --- what is said ------------------------------------------------------------------------------------


def _table(*columns: str, left: int = 1) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", no_wrap=True)
    return table


def _print_signal(console: Console, report: SignalReport) -> None:
    predicted = any(b.predicted for b in report.blocks)
    console.print(
        "\nSignal propagation" + (", predicted for random weights in brackets" if predicted else "")
    )
    table = _table("block", "stage", "variance", "branch variance", "squared mean", "cosine")
    if report.stem is not None:
        stem = report.stem
        table.add_row(
            "stem", "", _number(stem.variance), "", _number(stem.squared_mean), f"{stem.cosine:.3f}"
        )
    for b in report.blocks:
        cells = [
            "" if (value := getattr(b, what)) is None
            else _number(value, None if b.predicted is None else getattr(b.predicted, what))
            for what in ("variance", "branch_variance", "squared_mean")
        ]  # fmt: skip
        table.add_row(b.module, str(b.stage), *cells, f"{b.cosine:.3f}")
    console.print(table)
    if report.batch_statistics:
        console.print("batch norms have never been trained: they used the statistics of these images")


def _number(value: float, predicted: float | None = None) -> str:
    text = f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.2e}"
    return text if predicted is None else f"{text} ({predicted:.3f})"


def _recommended(
    arguments: DiagnoseArguments, subject: _Subject, report: GradientReport
) -> tuple[float, str]:
    """λ and what it rests on: the samples of a run, or this one gradient of a trained network, but nothing of random
    weights, whose gradients say little of training."""
    from normfree.diagnose.gradients import recommended_clipping
    from normfree.diagnose.metrics_file import read_metrics

    metrics = Path(arguments.model) / "metrics.jsonl"
    if metrics.is_file():
        samples = [row["ratios"] for row in read_metrics(metrics) if row.get("ratios")]
        if samples:
            return recommended_clipping(samples), f"by {len(samples)} samples of the run"
    if subject.preprocessing is None:
        return math.nan, ""
    return report.recommended, f"by this gradient, of batch size {arguments.batch_size}"


def _print_gradients(console: Console, report: GradientReport, recommended: float, of: str) -> None:
    from normfree.diagnose.gradients import CLIPPINGS, SHARE, joined_quantile

    console.print("\nGradient / weight, by unit")
    table = _table("part", "units", "median", "90 %", "largest", "dead", "exploding")
    for name, layers in report.stages.items():
        median, most, largest = (joined_quantile([x.ratios for x in layers], q) for q in (0.5, 0.9, 1.0))
        table.add_row(name, str(sum(x.units for x in layers)), f"{median:.2g}", f"{most:.2g}", f"{largest:.2g}",
                      str(sum(x.dead for x in layers)), str(sum(x.exploding for x in layers)))  # fmt: skip
    console.print(table)
    shares = ", ".join(f"{100 * report.clipped(c):.1f} % at λ {c:g}" for c in CLIPPINGS)
    console.print(f"clipping would act on {shares}")
    if not math.isnan(recommended):
        console.print(
            f"λ {recommended:.2g} would clip {100 * SHARE:.0f} % of the units that have a gradient, {of}"
        )
    if report.missing:
        console.print(f"no gradient at all: {len(report.missing)} parameters, first {report.missing[0]!r}")


def _print_dependence(console: Console, report: DependenceReport) -> None:
    from rich.text import Text

    console.print("\nDoes an image's output depend on its neighbours in the batch?")
    for mode, d in (("training", report.train), ("evaluation", report.eval)):
        if not d.depends:
            exact = max(d.output, d.gradient, d.leak) == 0
            console.print(f"{mode}: no; {'not a bit changed' if exact else 'nothing beyond rounding'}")
            continue
        named = ", ".join(name or "the network itself" for name in d.guilty[:5])
        more = f" and {len(d.guilty) - 5} more" if len(d.guilty) > 5 else ""
        console.print(Text(f"{mode}: yes; outputs change by {100 * d.output:.3g} %, gradients by "
                           f"{100 * d.gradient:.3g} %; guilty: {named}{more}"))  # fmt: skip


def _numbers(report: GradientReport) -> dict[str, Any]:
    from normfree.diagnose.gradients import CLIPPINGS

    layers = [
        {
            "name": x.name, "stage": x.stage, "exempt": x.exempt, "units": x.units, "dead": x.dead, "tiny": x.tiny,
            "exploding": x.exploding, "quantiles": {str(q): x.quantile(q) for q in (0.1, 0.5, 0.9, 1.0)},
        }
        for x in report.layers
    ]  # fmt: skip
    clipped = {f"{c:g}": report.clipped(c) for c in CLIPPINGS}
    return {
        "layers": layers,
        "missing": report.missing,
        "clipped": clipped,
        "recommended": report.recommended,
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _draw(
    arguments: DiagnoseArguments, title: str, signal: SignalReport | None, gradients: GradientReport
) -> None:
    import sys

    from normfree.diagnose.network_figures import draw_ratios, draw_signal

    name = re.sub(r"[^\w.-]+", "-", arguments.model.rstrip("/").rpartition("/")[2])
    folder = Path(arguments.out or f"diagnose-{name}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if signal is not None:
            draw_signal({title: signal}, folder / "signal.png")
        draw_ratios(gradients, folder / "ratios.png", title=title)
    except ModuleNotFoundError as error:
        print(f"normfree: no pictures: {error}", file=sys.stderr)
        return
    if not arguments.json:
        names = (["signal.png"] if signal is not None else []) + ["ratios.png"]
        print(f"\npictures: {', '.join(str(folder / name) for name in names)}")


def _report(arguments: DiagnoseArguments, runs: list[Path]) -> int:
    """Writes the page of one run, or of two."""
    from normfree.tools.run_report import write_report

    names = "-".join(run.resolve().name for run in runs)
    path = Path(arguments.report) if arguments.report else (
        runs[0] / "report.html" if len(runs) == 1 else Path(f"{names}.html")
    )  # fmt: skip
    print(f"report: {write_report(runs, path, device=arguments.device)}")
    return 0


def _terminal() -> bool:
    import sys

    return sys.stdout.isatty()
