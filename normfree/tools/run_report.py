"""report.html: a page about one run or several runs side by side, and its figures as PNG in a folder next to it.

Scores and curves are read from the run folder (config.toml, metrics.jsonl, results.json). The worst mistakes, heat
maps, signal propagation and gradient norms are computed from the saved model and the data.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from normfree.data.source import Source
from normfree.data.subset import spread_indices
from normfree.data.transforms.normalize import normalize
from normfree.device import run_device
from normfree.diagnose import html_page, network_figures, run_figures
from normfree.diagnose.grad_cam import grad_cam
from normfree.diagnose.gradients import gradient_report
from normfree.diagnose.heat_overlay import fitted, overlay
from normfree.diagnose.metrics_file import read_metrics
from normfree.diagnose.propagation import signal_propagation
from normfree.files import atomic_write_text, read_text
from normfree.inference import evaluate, sample
from normfree.models.zoo import create_model
from normfree.pretrained import TrainedModel, describe, from_pretrained
from normfree.scores import TOP5_ABOVE, Evaluation, read_results, shown_top1
from normfree.training.config import Config
from normfree.training.config_io import load_config
from normfree.training.run_data import open_run_data

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

# Images with the worst mistakes that are shown for each run.
MISTAKES = 12
# Images with wrong answers, and as many with right ones, whose heat maps are shown.
HEAT_MAPS = 6
# Validation images that are used for signal propagation and gradients.
IMAGES = 16
# Longest side of shown images in px; larger ones are scaled down.
THUMBNAIL = 160


@dataclass(frozen=True)
class Course:
    """Contents of a run folder, finished or not; `results` is empty until the run ends."""

    name: str
    folder: Path
    config: Config
    rows: list[dict[str, Any]] = field(repr=False)
    results: dict[str, Any] = field(repr=False)


def read_course(folder: Path) -> Course:
    """Read a run folder.

    Raises:
        ValueError: `folder` is not a run folder or has no metrics yet.
    """
    if not (folder / "config.toml").is_file():
        raise ValueError(f"{folder} is no run folder: it has no config.toml. Folders of runs: runs/*.")
    metrics, results = folder / "metrics.jsonl", folder / "results.json"
    rows = read_metrics(metrics) if metrics.is_file() else []
    if not rows:
        raise ValueError(f"{folder} has no metrics yet: nothing to report.")
    scores = read_results(results) if results.is_file() else {}
    return Course(folder.name or str(folder), folder, load_config(folder / "config.toml"), rows, scores)


def write_report(folders: Sequence[Path], path: Path, *, device: str = "auto") -> Path:
    """Write the page to `path` and its figures to the folder of the same name without suffix; return `path`.

    Mistakes and signals are shown only for runs whose data can still be read; the page notes where they are missing.

    Args:
        folders: Run folders, finished or not; at most one for each of the colors of the figures.
        path: Path of the HTML file.
        device: Device for the computations; "auto" is the first GPU, else the CPU.

    Raises:
        ValueError: a folder is no run folder or has no metrics, or there are none or too many.
        ModuleNotFoundError: matplotlib is missing; the message says what to install.
    """
    if not 1 <= len(folders) <= len(run_figures.RUN_COLORS):
        raise ValueError(f"{len(folders)} runs: expected 1 to {len(run_figures.RUN_COLORS)} in one report.")
    courses = [read_course(Path(folder)) for folder in folders]
    drawn = _Drawn(path.with_suffix(""))
    sections = [_scores(courses), _course(courses, drawn), *_answers(courses, drawn)]
    for course in courses:
        sections += _inside(course, drawn, run_device(device), several=len(courses) > 1)
    sections.append(_settings(courses))
    title = " against ".join(c.name for c in courses)
    facts = "; ".join(f"{c.config.model} on {c.config.data}" for c in courses)
    drawn.folder.mkdir(parents=True, exist_ok=True)
    drawn.save()
    return atomic_write_text(path, html_page.page(title, facts, sections))


class _Drawn:
    """The figures of the page, which are also saved as PNG."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._figures = folder, dict[str, "Figure"]()

    def block(self, drawn: Iterator[tuple[Figure, str]] | Sequence[tuple[Figure, str]]) -> str:
        """Return the HTML of figures side by side."""
        pairs = list(drawn)
        for figure, label in pairs:
            self._figures[re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")] = figure
        return html_page.figures(pairs)

    def save(self) -> None:
        for name, figure in self._figures.items():
            figure.savefig(self.folder / f"{name}.png", dpi=130, facecolor="white")


# --- read from the run folder ------------------------------------------------------------------------------


def _scores(courses: Sequence[Course]) -> html_page.PageSection:
    lines: dict[str, list[str]] = {}
    for column, course in enumerate(courses):
        for label, value in _facts(course):
            lines.setdefault(label, [""] * len(courses))[column] = value
    rows = [(label, *values) for label, values in lines.items()]
    return html_page.PageSection("Scores", html_page.table(["", *(c.name for c in courses)], rows))


def _facts(course: Course) -> Iterator[tuple[str, str]]:
    results, rows = course.results, course.rows
    for key, which in (("average", "averaged weights"), ("weights", "last weights")):
        if key in results:
            scores = results[key]
            kind = top1_name(scores)
            yield f"{kind}, {which}", f"{shown_top1(scores)} %"
            if len(scores["per_class_top1"]) > TOP5_ABOVE:
                yield f"top-5, {which}", f"{scores['top5']:.2f} %"
            yield f"loss, {which}", f"{scores['loss']:.4f}"
    if results:
        yield "validation images", f"{results['average']['images']:,}"
    else:
        yield "state", f"not finished: {rows[-1]['step']:,} steps"
    yield "steps", f"{results.get('steps', rows[-1]['step']):,}"
    speeds = sorted(row["images_per_s"] for row in rows if "images_per_s" in row)
    if speeds:
        yield "images per second, median", f"{speeds[len(speeds) // 2]:,.0f}"
    losses = [row["loss"] for row in rows if "loss" in row]
    if losses:
        yield "training loss, last", f"{losses[-1]:.4f}"
    clipped = [row["clipped"] for row in rows if "clipped" in row]
    if clipped:
        yield "units clipped, mean", f"{100 * sum(clipped) / len(clipped):.1f} %"


def top1_name(scores: Mapping[str, Any]) -> str:
    """Return what `top1` measures in scores of results.json."""
    names = {"knn_top1": "top-1 of nearest neighbors", "view_top1": "top-1 of two views"}
    return next((name for key, name in names.items() if key in scores), "top-1")


def _course(courses: Sequence[Course], drawn: _Drawn) -> html_page.PageSection:
    runs = {course.name: course.rows for course in courses}
    return html_page.PageSection("Course", drawn.block(run_figures.curve_figures(runs)))


def _answers(courses: Sequence[Course], drawn: _Drawn) -> Iterator[html_page.PageSection]:
    finished = [c for c in courses if c.results and describe(c.folder).classes]
    if not finished:
        return
    blocks, tables = [], ""
    for course in finished:
        scores = course.results["average"]
        classes, confusion = describe(course.folder).classes, scores["confusion"]
        if any(len(line) != len(classes) for line in (confusion, *confusion)):
            raise ValueError(
                f"{course.folder}: results.json is not of the {len(classes)} classes of its model."
            )
        title = f"{course.name}: answers, % of the true class"
        blocks.append(
            (run_figures.confusion_figure(confusion, classes, title=title), f"confusion of {course.name}")
        )
        pairs = [(a, b, n, f"{p:.0f} %") for a, b, n, p in run_figures.most_confused(confusion, classes)]
        if pairs:
            head = (
                "true class" if len(finished) == 1 else f"{course.name}: true class",
                "answer",
                "images",
                "of the class",
            )
            tables += html_page.table(head, pairs, numbers=2)
    per_class = {c.name: c.results["average"]["per_class_top1"] for c in finished}
    blocks.append(
        (run_figures.class_figure(per_class, title="top-1 by class, worst first, %"), "top-1 by class")
    )
    yield html_page.PageSection(
        "Answers",
        drawn.block(blocks) + tables,
        "Of the averaged weights on the validation images. Rows are true classes.",
    )


def _settings(courses: Sequence[Course]) -> html_page.PageSection:
    body = ""
    if len(courses) > 1:
        flat = [_flat(course.config.model_dump()) for course in courses]
        differ = [key for key in flat[0] if len({str(f[key]) for f in flat}) > 1]
        rows = [(key, *(f[key] for f in flat)) for key in differ]
        head = ["differs", *(c.name for c in courses)]
        body += html_page.table(head, rows) if rows else "<p>The configs are the same.</p>"
    for course in courses:
        for name in ("config.toml", "environment.txt"):
            file = course.folder / name
            if file.exists():
                body += html_page.folded(f"{course.name}/{name}", read_text(file, limit=1_000_000))
    return html_page.PageSection("Settings", body)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


# --- computed ---------------------------------------------------------------------------------


def _inside(
    course: Course, drawn: _Drawn, device: torch.device, *, several: bool
) -> Iterator[html_page.PageSection]:
    """Yield mistakes, signal propagation and gradients of a finished run if its data can be read."""
    whose = f" of {course.name}" if several else ""
    try:
        model = from_pretrained(course.folder)
    except ValueError:  # it has no weights yet
        return
    try:
        source = open_run_data(course.folder).val
    except (ValueError, ModuleNotFoundError) as error:
        yield html_page.PageSection(
            f"Mistakes and signals{whose}", "", f"Not shown because the data cannot be read: {error}"
        )
        return
    if model.classes:  # a run that learns embeddings has none
        scores = evaluate(
            model.net, source, preprocessing=model.preprocessing, device=device, sigmoid=model.sigmoid
        )
        yield _mistakes(scores, source, whose)
        yield _heat_maps(model, scores, source, device, whose)
    images, labels = sample(source, count=min(IMAGES, len(source)), preprocessing=model.preprocessing)
    images, labels = images.to(device), labels.to(device)
    net = model.net.to(device)
    start = create_model(course.config.model, num_classes=len(model.classes), skip_gain=1.0).to(device)
    reports = {
        "at the end": signal_propagation(net, images),
        "random weights": signal_propagation(start, images),
    }
    panels = [
        (
            network_figures.signal_figure({f"{course.name}, {when}": report}),
            f"signal propagation{whose} {when}",
        )
        for when, report in reports.items()
    ]
    yield html_page.PageSection(
        f"Signal propagation{whose}",
        drawn.block(panels),
        f"Statistics of each residual block on {len(images)} validation images; predictions, for random weights and "
        "Gaussian noise, are dashed. Cosine: between the maps of different images.",
    )
    if not model.classes:
        return
    F.cross_entropy(net.train()(images), labels).backward()
    title = f"{course.name}, one gradient of {len(images)} images"
    yield html_page.PageSection(
        f"Gradients against weights{whose}",
        drawn.block(
            [
                (
                    network_figures.ratios_figure(gradient_report(net), title=title),
                    f"gradients against weights{whose}",
                )
            ]
        ),
        "What adaptive gradient clipping compares, layer by layer, at the averaged weights; λ are dashed.",
    )


def _mistakes(scores: Evaluation, source: Source, whose: str) -> html_page.PageSection:
    """Show the images with the largest losses among those with a wrong answer."""
    worst = _worst(scores)
    title = f"Worst mistakes{whose}"
    if not worst:
        return html_page.PageSection(title, "", f"None: all {scores.count} answers are right.")
    cards = []
    for i in worst[:MISTAKES]:
        truth, answer = (scores.classes[int(part[i])] for part in (scores.labels, scores.predictions))
        share = 100 * float(torch.exp(-scores.losses[i]))
        lines = (f"{answer}", f"is {truth}, given {share:.2g} %", Path(source.name(i)).name)
        cards.append((_png(source.image(i)), f"{truth}, taken for {answer}", lines))
    note = f"{len(worst)} of {scores.count} answers are wrong; here those that found the true class least probable."
    return html_page.PageSection(title, html_page.image_cards(cards), note)


def _heat_maps(
    model: TrainedModel, scores: Evaluation, source: Source, device: torch.device, whose: str
) -> html_page.PageSection:
    """Show where the answers to some images come from: the worst mistakes, and right answers spread over the source."""
    right = (scores.predictions == scores.labels).nonzero().flatten().tolist()
    shown = _worst(scores)[:HEAT_MAPS] + [right[i] for i in spread_indices(len(right), HEAT_MAPS)]
    pre, images = model.preprocessing, [source.image(i) for i in shown]
    transform = pre.transform()
    pixels = torch.stack([transform(image) for image in images]).to(device)
    answers = scores.predictions[shown]
    maps = grad_cam(model.net, normalize(pixels, mean=pre.mean, std=pre.std), classes=answers)
    cards = []
    for i, image, heat in zip(shown, images, maps, strict=True):
        truth, answer = (scores.classes[int(part[i])] for part in (scores.labels, scores.predictions))
        small, box = fitted(image, transform.box(*image.size), smallest=THUMBNAIL, largest=THUMBNAIL)
        state = "right" if truth == answer else f"wrong, is {truth}"
        drawn = html_page.jpeg(overlay(small, heat, box))
        cards.append((drawn, f"heat map of {answer}, {state}", (answer, state, Path(source.name(i)).name)))
    note = "Grad-CAM of the answer at the last feature map: what makes the answer more probable is bright. The first "
    note += "images are the worst mistakes, the others are right."
    return html_page.PageSection(f"Heat maps{whose}", html_page.image_cards(cards), note)


def _worst(scores: Evaluation) -> list[int]:
    """Return the images with wrong answers, those with the largest loss first."""
    wrong = (scores.predictions != scores.labels).nonzero().flatten()
    worst: list[int] = wrong[scores.losses[wrong].argsort(descending=True)].tolist()
    return worst


def _png(image: Image) -> bytes:
    image = image.convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()
