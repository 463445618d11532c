"""The command: parse, call, print. It computes nothing, and imports torch only after the words are understood."""

from __future__ import annotations

import csv
import difflib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import tyro
from tyro.conf import Positional

from normfree._version import __version__

if TYPE_CHECKING:
    from normfree.inference import Prediction
    from normfree.train.config import Config

HELP = """usage: normfree VERB ...      (normfree VERB --help says more)

  list [models|recipes] [PATTERN]   networks with size and cost, or recipes
  show NAME|RECIPE|RUN              everything about one of them
  train [RECIPE|RUN|FILE.toml] [--key value ...]
                                    alone: the demo; a run folder: continue it
  eval RUN|MODEL DATA               top-1 and top-5 on labelled images
  predict RUN|MODEL PATH...         classes of files and folders of images

  --version   --help   --traceback  (the last shows where an error came from)
"""


class UsageError(ValueError):
    """The command line was not understood."""


# --- verbs -------------------------------------------------------------------------------------------


@dataclass
class ListArguments:
    """Networks with their size and cost, or recipes."""

    what: Positional[str] = "models"
    """models, recipes, or a pattern of model names such as 'nf_*'."""
    pattern: Positional[str] = "*"
    """A shell pattern of names."""


@dataclass
class ShowArguments:
    """Everything about a network, a recipe or a run."""

    name: Positional[str]
    """A model name, a recipe name, or a run folder."""


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
    root: str = "data"
    """Where cifar10, cifar100 and fashion_mnist lie."""
    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass
class PredictArguments:
    """Classes of image files, or of all images under folders."""

    model: Positional[str]
    """A run or model folder."""
    paths: Positional[tuple[str, ...]]
    """Image files and folders."""
    top: int = 5
    """How many classes to name for each image."""
    out: str = ""
    """Write to this file instead: .csv or .jsonl."""
    format: Literal["table", "csv", "jsonl"] = "table"
    """What to print when there is no --out."""
    batch_size: int = 64
    """Images at a time."""
    device: str = "auto"
    """cpu, cuda, mps; auto: the first GPU, else the CPU."""


def list_(arguments: ListArguments) -> int:
    from rich.console import Console
    from rich.table import Table

    what, pattern = arguments.what, arguments.pattern
    if what not in ("models", "recipes"):
        what, pattern = "models", what
    table = Table(box=None, pad_edge=False, header_style="bold")
    if what == "recipes":
        from normfree.train.recipes import RECIPES

        table.add_column("recipe")
        table.add_column("what")
        for name, recipe in RECIPES.items():
            table.add_row(name, (recipe.__doc__ or "").splitlines()[0])
    else:
        from normfree.models.cost import count
        from normfree.models.zoo import list_models, variant_of

        for column in ("model", "parameters", "GMAC", "train px", "test px", "norm", "depths", "widths"):
            table.add_column(
                column, justify="left" if column in ("model", "norm", "depths", "widths") else "right"
            )
        names = list_models(pattern)
        if not names:
            raise UsageError(f"no model matches {pattern!r}. All names: normfree list models")
        for name in names:
            row = variant_of(name)
            cost = count(row)
            table.add_row(
                name, f"{cost.parameters:,}", f"{cost.macs / 1e9:.3f}", str(row.train_size), str(row.test_size),
                row.norm, " ".join(map(str, row.depths)), " ".join(map(str, row.widths)),
            )  # fmt: skip
    # A file or pipe gets whole lines, a terminal its own width.
    Console(width=None if sys.stdout.isatty() else 140, highlight=False).print(table)
    return 0


def show(arguments: ShowArguments) -> int:
    from normfree.train.config import load_config, to_toml
    from normfree.train.recipes import RECIPES

    name = arguments.name
    if name in RECIPES:
        recipe = RECIPES[name]
        print(f"# recipe {name}: {recipe.__doc__}\n{to_toml(recipe())}", end="")
    elif (Path(name) / "config.toml").is_file():
        print(f"# run {name}\n{to_toml(load_config(Path(name) / 'config.toml'))}", end="")
        results = Path(name) / "results.json"
        if results.is_file():
            scores = json.loads(results.read_text(encoding="utf-8"))
            print(f"\n# top-1 {scores['weights']['top1']:.2f} %, averaged {scores['average']['top1']:.2f} %, "
                  f"after {scores['steps']} steps")  # fmt: skip
    else:
        _show_model(name)
    return 0


def _show_model(name: str) -> None:
    from dataclasses import fields

    import torch

    from normfree.models.cost import count
    from normfree.models.net import Net
    from normfree.models.zoo import variant_of
    from normfree.optim.groups import parameter_groups
    from normfree.train.recipes import RECIPES

    try:
        row = variant_of(name)
    except ValueError as error:
        raise UsageError(
            f"{error}; all recipes: {', '.join(RECIPES)}; a run is a folder with a config.toml"
        ) from None
    cost = count(row)
    print(
        f"# {name}: {cost.parameters:,} parameters, {cost.macs / 1e9:.4f} G multiply-accumulates at {row.test_size} px"
    )
    for field in fields(row):
        print(f"{field.name} = {getattr(row, field.name)!r}")
    with torch.device("meta"):
        net = Net(row)
    print("# parameter groups")
    for group in parameter_groups(net, weight_decay=1.0, clipping=1.0):
        sizes = sum(p.numel() for p in group["params"])
        print(f"{group['name']}: {len(group['params'])} tensors, {sizes:,} numbers, "
              f"{'decayed' if group['weight_decay'] else 'not decayed'}, "
              f"{'clipped' if group['clipping'] else 'not clipped'}")  # fmt: skip


TRAIN_WORDS = """usage: normfree train [RECIPE|RUN|FILE.toml] [--out FOLDER] [--key value ...]

  nothing        the demo, or the recipe "scratch" when --data names data of your own
  RECIPE         a name from `normfree list recipes`
  RUN            a run folder: continue it where it stopped
  FILE.toml      a config, for example runs/demo-1/config.toml
  --out FOLDER   the run folder; default runs/RECIPE-N
"""


def train(words: list[str]) -> int:
    """Resolves recipe, file or run and the overrides, then trains."""
    out, words = _take_option(words, "--out")
    source = words.pop(0) if words and not words[0].startswith("--") else ""
    from normfree.train.config import load_config

    if source and (Path(source) / "config.toml").is_file():
        return _resume(Path(source), words, out)
    config, name = _base(source, words)
    folder = Path(out) if out else _free_folder(name)
    if (folder / "config.toml").exists():
        before = load_config(folder / "config.toml")
        raise UsageError(f"{folder} holds a run of {before.model} on {before.data}. Continue it with `normfree train "
                         f"{folder}`, or choose another --out.")  # fmt: skip
    return _train(config, folder)


def _base(source: str, words: list[str]) -> tuple[Config, str]:
    from normfree.train.config import load_config, with_overrides
    from normfree.train.recipes import RECIPES

    if source.endswith(".toml"):
        return with_overrides(load_config(Path(source)), words), Path(source).stem
    if not source:
        own_data = any(word.partition("=")[0] == "--data" for word in words)
        source = "scratch" if own_data else "demo"
    if source not in RECIPES:
        hint = _did_you_mean(source, RECIPES)
        raise UsageError(f"{source!r} is no recipe, run folder or .toml file.{hint} Recipes: {', '.join(RECIPES)}. "
                         "For images of your own: --data FOLDER.")  # fmt: skip
    return with_overrides(RECIPES[source](), words), source


def _resume(folder: Path, words: list[str], out: str) -> int:
    from normfree.train.config import load_config, with_overrides

    harmless = {"device", "input.workers", "log.every", "log.keep"}  # what does not change the result
    other = [w.removeprefix("--").partition("=")[0] for w in words if w.startswith("--")]
    blocked = [w for w in other if w not in harmless]
    if out or blocked:
        what = ", ".join(["--out"] * bool(out) + [f"--{w}" for w in blocked])
        raise UsageError(f"{what}: a run continues as it was started; only {', '.join(sorted(harmless))} may change. "
                         f"For a new run: normfree train {folder}/config.toml --key value")  # fmt: skip
    return _train(with_overrides(load_config(folder / "config.toml"), words), folder)


def _free_folder(name: str) -> Path:
    number = 1
    while Path("runs", f"{name}-{number}").exists():
        number += 1
    return Path("runs", f"{name}-{number}")


def _train(config: Config, folder: Path) -> int:
    from normfree.train.loop import Diverged, Stopped
    from normfree.train.loop import train as run

    try:
        run(config, folder)
    except Stopped as stopped:
        print(f"\nstopped after step {stopped.step}, everything is saved. Continue: normfree train {folder}")
        return stopped.exit_code
    except Diverged as error:
        print(f"normfree: {error}", file=sys.stderr)
        return 3  # its own code, so that scripts can tell a diverged run from a wrong command
    return 0


def eval_(arguments: EvalArguments) -> int:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from normfree.data.sources import open_labelled
    from normfree.inference import evaluate, load_model

    model = load_model(arguments.model)
    source = open_labelled(arguments.data, root=arguments.root)
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


def predict_(arguments: PredictArguments) -> int:
    from normfree.inference import load_model, predict

    kind = arguments.format
    if arguments.out:
        suffix = Path(arguments.out).suffix.removeprefix(".")
        if suffix not in ("csv", "jsonl"):
            raise UsageError(f"--out {arguments.out!r}: expected a name that ends in .csv or .jsonl.")
        kind = "csv" if suffix == "csv" else "jsonl"
    answers = predict(load_model(arguments.model), arguments.paths, top=arguments.top,
                      batch_size=arguments.batch_size, device=arguments.device)  # fmt: skip
    failed = 0
    file = open(arguments.out, "w", encoding="utf-8", newline="") if arguments.out else sys.stdout  # noqa: SIM115
    try:
        writer = csv.writer(file)
        if kind == "csv":
            writer.writerow(["path", "rank", "class", "probability", "error"])
        for answer in answers:
            failed += bool(answer.error)
            _write(answer, kind, file, writer)
    finally:
        if arguments.out:
            file.close()
    if failed:
        print(f"normfree: {failed} files could not be read; each is named in the output", file=sys.stderr)
    return 2 if failed else 0


def _write(answer: Prediction, kind: str, file: IO[str], writer: Any) -> None:
    # a file's name need not be UTF-8
    path, error = (text.encode(errors="backslashreplace").decode() for text in (answer.path, answer.error))
    pairs = list(zip(answer.classes, answer.probabilities, strict=True))
    if kind == "jsonl":
        top = [{"class": c, "probability": round(p, 6)} for c, p in pairs]
        entry = {"path": path, "error": error} if error else {"path": path, "top": top}
        print(json.dumps(entry, ensure_ascii=False), file=file)
    elif kind == "csv":
        rows = [[path, i, c, f"{p:.6f}", ""] for i, (c, p) in enumerate(pairs, start=1)]
        writer.writerows(rows or [[path, "", "", "", error]])
    else:
        text = error or "   ".join(f"{c} {100 * p:.1f} %" for c, p in pairs)
        print(f"{path}   {text}", file=file)


# --- words to verbs ----------------------------------------------------------------------------------


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    # like `nearest` of models/layers.py, which would import torch
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _take_option(words: list[str], option: str) -> tuple[str, list[str]]:
    """The value of `option` (or "") and the other words."""
    rest, value, i = [], "", 0
    while i < len(words):
        word = words[i]
        if word == option:
            if i + 1 == len(words) or words[i + 1].startswith("--"):
                raise UsageError(f"{option}: a value is missing.")
            value, i = words[i + 1], i + 1
        elif word.startswith(option + "="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
        i += 1
    return value, rest


def _call(verb: Callable[..., int], arguments: type, words: list[str], name: str) -> int:
    return verb(tyro.cli(arguments, args=words, prog=f"normfree {name}"))


def _train_help() -> int:
    from normfree.train.config import Config

    print(TRAIN_WORDS)
    try:
        tyro.cli(Config, args=["--help"], prog="normfree train", config=(tyro.conf.FlagConversionOff,))
    except SystemExit:
        return 0
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns its exit code: 0 done, 2 the user can mend it, 3 a run diverged."""
    words = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in words
    words = [w for w in words if w != "--traceback"]
    try:
        return _dispatch(words)
    except (ValueError, ModuleNotFoundError) as error:
        if traceback:
            raise
        for line in str(error).splitlines():
            print(f"normfree: {line}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `normfree list | head`
        sys.stderr.close()
        return 0
    except OSError as error:  # no permission, disk full, a folder in place of a file
        if traceback:
            raise
        print(f"normfree: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("normfree: interrupted", file=sys.stderr)
        return 130  # 128 + SIGINT, as shells have it


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        print(HELP, end="")
        return 0
    if words[0] in ("--version", "version"):
        print(f"normfree {__version__}")
        return 0
    verb, rest = words[0], words[1:]
    if verb == "train":
        return _train_help() if {"--help", "-h"} & set(rest) else train(rest)
    if verb not in VERBS:
        hint = _did_you_mean(verb, [*VERBS, "train"])
        raise UsageError(f"unknown verb {verb!r}.{hint} Verbs: list, show, train, eval, predict.")
    function, arguments = VERBS[verb]
    return _call(function, arguments, rest, verb)


VERBS: dict[str, tuple[Callable[..., int], type]] = {
    "list": (list_, ListArguments),
    "show": (show, ShowArguments),
    "eval": (eval_, EvalArguments),
    "predict": (predict_, PredictArguments),
}
