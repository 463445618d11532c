"""Write the speed table of docs/results.md: selected results of results/*.json, between two comments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report
from benchmarks.summary import Comparison, Timing

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
# A difference below so many times that of the baseline from itself is marked: it may be noise.
NOISES = 3
# Kinds of processors, and the ends of the names of their files (`report.suffix`).
PROCESSORS = {"AVX2": "", "AVX-512": "_avx512", "AVX-512 with bfloat16": "_avx512_bf16"}
# Suites that measure the cases of another one as well.
WIDER = {"inference": "inference_runtimes"}


@dataclass(frozen=True)
class Pick:
    """One row of the table: a case of a suite, and two of its arms by name without the memory format."""

    suite: str
    case: str
    what: str
    ours: str = "normfree"
    theirs: str = "timm"


PICKS = (
    Pick("training", "nf_resnet50, 224 px, batch 8, whole step", "training step, NF-ResNet-50, 224 px, batch 8"),
    Pick("training", "nf_resnet50, 224 px, batch 8, stochastic depth 0.1, whole step",
         "the same with stochastic depth 0.1"),
    Pick("training", "dm_nfnet_f0, 192 px, batch 8, whole step", "training step, NFNet-F0, 192 px, batch 8"),
    Pick("training", "dm_nfnet_f0, 192 px, batch 8, stochastic depth 0.25, whole step",
         "NFNet-F0's step with stochastic depth 0.25"),
    Pick("training_others", "eca_nfnet_l0, 224 px, batch 8, whole step",
         "training step, ECA-NFNet-L0, 224 px, batch 8"),
    Pick("training_others", "nf_regnet_b1, 240 px, batch 8, whole step",
         "training step, NF-RegNet-B1, 240 px, batch 8"),
    Pick("training_bfloat16", "nf_resnet50, 224 px, batch 8, bfloat16, whole step",
         "training step in bfloat16, NF-ResNet-50, 224 px, batch 8"),
    Pick("training_bfloat16", "dm_nfnet_f0, 192 px, batch 8, bfloat16, whole step",
         "training step in bfloat16, NFNet-F0, 192 px, batch 8"),
    Pick("whole_job", "CIFAR-10 from JPEG files to 90 % of the best final accuracy",
         "CIFAR-10 from JPEG files to 90 % of the best final accuracy", theirs="torchvision ResNet, batch norm"),
    Pick("update", "clipping, nfnet_f0", "adaptive clipping of NFNet-F0's gradients"),
    Pick("update", "whole update, nfnet_f0", "clipping, SGD and average, NFNet-F0", theirs="timm, SGD(fused=True)"),
    Pick("inference", "dm_nfnet_f0, 192 px, batch 1", "one image through NFNet-F0, 192 px", "normfree, folded"),
    Pick("inference", "dm_nfnet_f0, 192 px, batch 8", "eight images", "normfree, folded"),
    Pick("inference", "nf_resnet50, 224 px, batch 1", "one image through NF-ResNet-50, 224 px", "normfree, folded"),
    Pick("inference", "nf_resnet50, 224 px, batch 1, onnxruntime", "the same, both sides in onnxruntime",
         "normfree, folded, onnxruntime", "timm, onnxruntime"),
    Pick("inference", "dm_nfnet_f0, 192 px, batch 1, onnxruntime", "the same, NFNet-F0, 192 px",
         "normfree, folded, onnxruntime", "timm, onnxruntime"),
    Pick("inference_runtimes", "dm_nfnet_f0, 192 px, batch 1, OpenVINO", "one image through NFNet-F0, both in OpenVINO",
         "normfree, folded, OpenVINO", "timm, OpenVINO"),
    Pick("inference_runtimes", "eca_nfnet_l0, 224 px, batch 1, OpenVINO", "the same, ECA-NFNet-L0",
         "normfree, folded, OpenVINO", "timm, OpenVINO"),
    Pick("spectrogram", "eca_nfnet_l0, 12 x 3 x 128 x 313", "12 spectrograms of 128 × 313, ECA-NFNet-L0, one "
         "thread, both in onnxruntime", "normfree, folded, onnxruntime", "timm, onnxruntime"),
    Pick("spectrogram", "eca_nfnet_l0, 12 x 3 x 128 x 313", "the same, int8 in OpenVINO by `quantize` and by NNCF",
         "normfree, int8, OpenVINO", "timm, NNCF int8, OpenVINO"),
    Pick("training", "nf_resnet50, 224 px, batch 8, own loop", "a loop of public names against the trainer's step",
         "own loop", "trainer"),
    Pick("memory", "dm_nfnet_f0, 192 px, batch 8, allocated", "memory of a training step, NFNet-F0, 192 px, batch 8"),
    Pick("loading", "bicubic", "128 JPEGs of 500 × 375 to crops of 224 px, one core", theirs="Pillow + torchvision"),
    Pick("small_scale", "demo's network with timm's numerics, batch 32",
         "training step of the demo's network, batch 32"),
    Pick("startup", "startup", "first import, to a network's name", "from normfree import create_model", "import timm"),
)  # fmt: skip


def update(path: Path = PAGE, results: Path = report.RESULTS) -> None:
    """Write the table of `results` into `path`, between the comments.

    Raises:
        ValueError: `path` does not have the two comments, each once and in order.
    """
    path.write_text(
        between(path.read_text(encoding="utf-8"), table(results), name=path.name), encoding="utf-8"
    )


def between(text: str, made: str, *, name: str = "results.md") -> str:
    """Return `text` with `made` between the two comments."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in head + tail:
        raise ValueError(
            f"{name}: the table goes between {BEGIN} and {END}, each once. Add them where the table should be."
        )
    return f"{head}{begin}\n{made.strip()}\n{end}{tail}"


def table(results: Path) -> str:
    """Return the Markdown table: a row per pick, with a column per kind of processor, for suites that were measured."""
    lines = [
        f"| case | {' | '.join(f'{name}: times better (95 %), ours, theirs' for name in PROCESSORS)} | command |",
        "|---|" + "---|" * (len(PROCESSORS) + 1),
        *_rows(results, PICKS),
        "",
        *_processors(results, PICKS),
    ]
    return "\n".join(lines)


def _rows(results: Path, picks: Sequence[Pick]) -> Iterator[str]:
    """Yield the table rows of the picks that have been measured on any processor."""
    for pick in picks:
        cells = [_first_cell(pick, results, end) for end in PROCESSORS.values()]
        if any(cells):
            command = f"`python -m benchmarks.run {pick.suite}`"
            shown = (cell or "not measured" for cell in cells)
            yield f"| {pick.what} | {' | '.join(shown)} | {command} |"


def _first_cell(pick: Pick, results: Path, end: str) -> str:
    """Return the numbers of a pick on one kind of processor, or "" if they were not measured."""
    suites = filter(None, (pick.suite, WIDER.get(pick.suite)))
    return next(filter(None, (_cell(pick, results / f"{suite}{end}.json") for suite in suites)), "")


def _cell(pick: Pick, path: Path) -> str:
    """Return the numbers of a pick in one file of results, or "" if they are not there."""
    for comparison in report.read(path).comparisons if path.is_file() else ():
        ours, theirs = _arm(comparison, pick.ours), _arm(comparison, pick.theirs)
        # Of an arm in two memory formats, the faster one is the baseline.
        if (
            comparison.case == pick.case
            and ours
            and theirs
            and theirs.arm in (comparison.baseline, pick.theirs)
        ):
            times = (f"{format_value(t.median, comparison.unit)} ({t.arm})" for t in (ours, theirs))
            page = f"[all](../benchmarks/results/{path.stem}.md)"
            return f"{_ratio(comparison, ours, theirs)}: {', '.join(times)}; {page}"
    return ""


def _ratio(comparison: Comparison, ours: Timing, theirs: Timing) -> str:
    """Return how many times as fast we are, with its interval if their arm is the baseline."""
    if theirs.arm != comparison.baseline:
        return f"{theirs.median / ours.median:.2f} (of medians)"
    low, high = ours.interval
    noisy = abs(ours.ratio - 1) < NOISES * comparison.noise
    return f"{ours.ratio:.2f} ({low:.2f} … {high:.2f}){' ~' * noisy}"


def _processors(results: Path, picks: Sequence[Pick]) -> Iterator[str]:
    """Yield a line per kind of processor: which ones measured, with which version of PyTorch, and when."""
    for name, end in PROCESSORS.items():
        paths = (results / f"{suite}{end}.json" for suite in dict.fromkeys(pick.suite for pick in picks))
        machines = [report.read(path).machine for path in paths if path.is_file()]
        days: dict[str, set[str]] = {}
        for m in machines:
            days.setdefault(f"{m['cpu']}, torch {m['torch']}", set()).add(m["date"])
        if days:
            found = (f"{machine}, {' and '.join(sorted(own))}" for machine, own in sorted(days.items()))
            yield f"{name}: {'; '.join(found)}."


def format_value(value: float, unit: str) -> str:
    """Return `value` with three significant digits."""
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def _arm(comparison: Comparison, start: str) -> Timing | None:
    """Return the arm called `start`, in any memory format."""
    found = [t for t in comparison.timings if t.arm.removesuffix(" NCHW").removesuffix(" NHWC") == start]
    return found[0] if found else None
