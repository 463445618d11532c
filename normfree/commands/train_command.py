"""`normfree train`: recipe, run or file, then overrides; the flags are the config's keys."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from normfree.commands.usage import UsageError
from normfree.suggest import did_you_mean

if TYPE_CHECKING:
    from normfree.training.config import Config

TRAIN_WORDS = """usage: normfree train [RECIPE|RUN|FILE.toml] [--out FOLDER] [--key value ...]

  nothing        the demo; the recipe "scratch" when --data names data of your own, "finetune" with --weights too
  RECIPE         a name from `normfree list recipes`
  RUN            a run folder: continue it where it stopped
  FILE.toml      a config, for example runs/demo-1/config.toml
  --out FOLDER   the run folder; default runs/RECIPE-N
  --exact        short for --parallel exact: the same bits for any number of processes
  --find-lr      no run, but a test of learning rates: find_lr.png and find_lr.json,
                 here or in --out, and a suggestion
"""


def train(words: list[str]) -> int:
    """Resolves recipe, file or run and the overrides, then trains, or with --find-lr tries learning rates."""
    words = [part for word in words for part in (("--parallel", "exact") if word == "--exact" else (word,))]
    try:
        if "--find-lr" in words:
            return _find_lr([word for word in words if word != "--find-lr"])
        config, folder = _chosen(list(words))
        _run_pipes(words, config)
    except ValueError:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        return 2  # torchrun gives all processes the same words; one on each machine complains
    return _train(config, folder)


def _chosen(words: list[str]) -> tuple[Config, Path]:
    out, words = _take_option(words, "--out")
    source = words.pop(0) if words and not words[0].startswith("--") else ""
    from normfree.training.config_io import load_config

    if source and (Path(source) / "config.toml").is_file():
        return _resume(Path(source), words, out)
    config, name = _base(source, words)
    folder = Path(out) if out else _free_folder(name)
    if (folder / "config.toml").exists():
        before = load_config(folder / "config.toml")
        raise UsageError(f"{folder} holds a run of {before.model} on {before.data}. Continue it with `normfree train "
                         f"{folder}`, or choose another --out.")  # fmt: skip
    return config, folder


def _run_pipes(words: list[str], config: Config) -> None:
    """Runs the shell commands of a --data word that was typed in this call, once on each machine. What they wrote is
    then there for the run, which itself runs none."""
    typed = any(word.partition("=")[0] == "--data" for word in words)
    if typed and "pipe:" in config.data and os.environ.get("LOCAL_RANK", "0") == "0":
        from normfree.data.sources.open import open_source

        open_source(config.data, val_fraction=config.input.val_fraction, seed=config.seed, pipes=True)


def _find_lr(words: list[str]) -> int:
    out, words = _take_option(words, "--out")
    source = words.pop(0) if words and not words[0].startswith("--") else ""
    if source and (Path(source) / "config.toml").is_file():
        source = str(Path(source) / "config.toml")
    config, _ = _base(source, words)
    if (Path(out) / "config.toml").exists():
        raise UsageError(f"{out or '.'} holds a run, and --find-lr is none. Choose another --out.")
    from normfree.tools.find_lr import find_lr

    find_lr(config, out)
    return 0


def _base(source: str, words: list[str]) -> tuple[Config, str]:
    from normfree.training.config_io import load_config, with_overrides
    from normfree.training.recipes import DEFAULT_RECIPE, RECIPES

    if source.endswith(".toml"):
        return with_overrides(load_config(Path(source)), words), Path(source).stem
    if not source:
        given = {word.partition("=")[0] for word in words}
        source = (
            DEFAULT_RECIPE if "--data" not in given else "finetune" if "--weights" in given else "scratch"
        )
    if source not in RECIPES:
        hint = did_you_mean(source, RECIPES)
        raise UsageError(f"{source!r} is no recipe, run folder or .toml file.{hint} Recipes: {', '.join(RECIPES)}. "
                         "For images of your own: --data FOLDER.")  # fmt: skip
    return with_overrides(RECIPES[source](), words), source


def _resume(folder: Path, words: list[str], out: str) -> tuple[Config, Path]:
    from normfree.training.config_io import load_config, with_overrides

    harmless = {
        "device",
        "input.workers",
        "log.every",
        "log.keep",
        "log.profile",
        "log.to",
        "parallel",
    }  # what does not change the result
    other = [w.removeprefix("--").partition("=")[0] for w in words if w.startswith("--")]
    blocked = [w for w in other if w not in harmless]
    if out or blocked:
        what = ", ".join(["--out"] * bool(out) + [f"--{w}" for w in blocked])
        raise UsageError(f"{what}: a run continues as it was started; only {', '.join(sorted(harmless))} may change. "
                         f"For a new run: normfree train {folder}/config.toml --key value")  # fmt: skip
    return with_overrides(load_config(folder / "config.toml"), words), folder


def _free_folder(name: str) -> Path:
    number = 1
    while Path("runs", f"{name}-{number}").exists():
        number += 1
    return Path("runs", f"{name}-{number}")


def _train(config: Config, folder: Path) -> int:
    from normfree.training.allocator import keep_freed_memory
    from normfree.training.distributed.world import ElsewhereError
    from normfree.training.loop import train as run
    from normfree.training.stop import StoppedBySignal
    from normfree.training.trainer import DivergedError

    if config.device in ("auto", "cpu"):
        keep_freed_memory()  # also harmless beside a GPU
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts, this one alone speaks
    try:
        run(config, folder)
    except StoppedBySignal as stopped:
        if first:
            print(
                f"\nstopped after step {stopped.step}, everything is saved. Continue: normfree train {folder}"
            )
        return stopped.exit_code
    except DivergedError as error:
        if first:
            print(f"normfree: {error}", file=sys.stderr)
        return 3  # its own code, so that scripts can tell a diverged run from a wrong command
    except ElsewhereError:
        if first:
            raise
        return 2
    return 0


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


def train_help() -> int:
    from normfree.training.config import Config
    from normfree.training.recipes import DEFAULT_RECIPE, RECIPES

    print(TRAIN_WORDS)
    try:
        tyro.cli(
            Config,
            args=["--help"],
            prog="normfree train",
            default=RECIPES[DEFAULT_RECIPE](),
            config=(tyro.conf.FlagConversionOff,),
        )
    except SystemExit:
        return 0
    return 0
