"""`normfree train`: start or resume a run. Every config key is an option."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from normfree.commands.usage import UsageError
from normfree.suggest import did_you_mean, problem
from normfree.training.config_values import MAX_FOLDS
from normfree.training.stop import StoppedBySignal, stop_signals

if TYPE_CHECKING:
    from normfree.training.config import Config

TRAIN_HELP = """usage: normfree train [RECIPE|RUN|FILE.toml] [--out FOLDER] [--key value ...]

  nothing        run the recipe "demo"; with --data, "scratch"; with --data and --weights, "finetune"
  RECIPE         run a recipe; `normfree list recipes` lists them
  RUN            resume the run of this folder where it stopped; with --length, go on for longer;
                 with --data, with the same images in another folder
  FILE.toml      run a config file, for example runs/demo-1/config.toml
  --out FOLDER   folder of the new run; default: runs/RECIPE-N
  --folds K      cross-validation: a run for each of K folds, in --out, and a summary of them;
                 `normfree train FOLDER` goes on where it was stopped
  --exact        same as --parallel exact: bit-identical for any number of processes
  --privacy epsilon=8,delta=1e-5,clip=1.0
                 differentially private training (recipe "private"); the same as
                 --optim.clip private:epsilon=8,delta=1e-5 --optim.clipping 1.0
  --find-lr      do not train, but try learning rates: write find_lr.png and find_lr.json
                 to --out or the current folder, and suggest a learning rate

The defaults below are those of the recipe "demo".
"""

# Options that may change when a run is resumed: the same data in another folder, a longer run, and what does not change
# its result.
RESUME_OPTIONS = (
    "data",
    "length",
    "input.bad_images",
    "device",
    "input.workers",
    "log.every",
    "log.to",
    "on_divergence",
    "parallel",
)


# How options with a value are written.
_VALUES = {
    "--out": "--out FOLDER",
    "--folds": "--folds 5",
    "--privacy": "--privacy epsilon=8,delta=1e-5,clip=1.0",
}


@dataclass(frozen=True)
class TrainArguments:
    """The arguments of `normfree train`.

    Attributes:
        source: a recipe, a run folder or a .toml file; "" if none is given.
        out: the value of --out; "" if it is not given.
        find_lr: True if --find-lr is given.
        folds: the value of --folds; 0 if it is not given.
        overrides: the remaining arguments, which set config keys.
    """

    source: str
    out: str
    find_lr: bool
    folds: int
    overrides: tuple[str, ...]

    @property
    def keys(self) -> list[str]:
        """The config keys in `overrides`, in order."""
        flags = [arg.removeprefix("--").partition("=")[0] for arg in self.overrides if arg.startswith("--")]
        return [flag.replace("-", "_") for flag in flags]

    @property
    def run_config(self) -> Path | None:
        """The config of the run folder that `source` names; None if it does not name one."""
        path = Path(self.source) / "config.toml"
        return path if self.source and path.is_file() else None

    @property
    def has_folds(self) -> bool:
        """True if `source` is the folder of a cross-validation."""
        return bool(self.source) and (Path(self.source) / "folds.json").is_file()


def parse(args: Sequence[str]) -> TrainArguments:
    """Separate the options of the command from those that set config keys.

    Raises:
        UsageError: --out, --folds or --privacy has no value, or a wrong one; or --privacy and another option set the
            same key.
    """
    rest: list[str] = []
    out, find_lr, folds = "", False, 0
    privacy: list[str] = []
    remaining = list(args)
    while remaining:
        arg = remaining.pop(0)
        if arg == "--exact":
            rest += ["--parallel", "exact"]
        elif arg == "--find-lr":
            find_lr = True
        elif arg.partition("=")[0] in _VALUES:
            name, equals, value = arg.partition("=")
            if not equals:
                value = "" if not remaining or remaining[0].startswith("--") else remaining.pop(0)
            if not value:
                raise UsageError(problem(f"{name} has no value", fix=_VALUES[name]))
            if name == "--out":
                out = value
            elif name == "--privacy":
                privacy = _private(value)
                rest += privacy
            else:
                folds = _number_of_folds(value)
        else:
            rest.append(arg)
    source = rest.pop(0) if rest and not rest[0].startswith("--") else ""
    found = TrainArguments(source, out, find_lr, folds, tuple(rest))
    for option in privacy[::2]:
        if found.keys.count(option.removeprefix("--")) > 1:  # the last one would win, perhaps without privacy
            given = f"--privacy and {option}, or --privacy twice, set the same key"
            raise UsageError(problem(given, allowed="one of them", fix=_VALUES["--privacy"]))
    return found


def _number_of_folds(text: str) -> int:
    """Return the value of --folds."""
    if not text.isdecimal() or not 2 <= int(text) <= MAX_FOLDS:
        raise UsageError(problem(f"--folds is {text!r}", allowed=f"2 to {MAX_FOLDS}", fix=_VALUES["--folds"]))
    return int(text)


def _private(options: str) -> list[str]:
    """Return the config keys that --privacy sets: clip=C is the value of a key of its own."""
    given = [part for part in options.split(",") if part]
    names = [part.partition("=")[0] for part in given]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(
            problem(f"--privacy has {twice[0]} {names.count(twice[0])} times", fix=_VALUES["--privacy"])
        )
    clips = [part.partition("=")[2] for part in given if part.startswith("clip=")]
    others = ",".join(part for part in given if not part.startswith("clip="))
    overrides = ["--optim.clip", "private" + f":{others}" * bool(others)]
    return [*overrides, *(text for clip in clips for text in ("--optim.clipping", clip))]


def train(args: Sequence[str]) -> int:
    """Run `normfree train` with these arguments; return the exit code."""
    if {"--help", "-h"} & set(args):
        return _print_help()
    folder: Path | None = None
    try:
        with stop_signals():  # from here on, also while PyTorch is imported
            arguments = parse(args)
            if arguments.find_lr:
                return _find_lr(arguments)
            if arguments.folds or arguments.has_folds:
                config, folder, folds = _start_folds(arguments)
                _run_pipes(arguments, config)
                return _train(config, folder, folds=folds)
            config, folder = _resume(arguments) if arguments.run_config else _start(arguments)
            _run_pipes(arguments, config)
            return _train(config, folder)
    except StoppedBySignal as stopped:
        _print_stopped(stopped, folder)
        return stopped.exit_code
    except ValueError:
        # torchrun gives all processes the same arguments; only one process of each machine reports the error.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        return 2


def _print_stopped(stopped: StoppedBySignal, folder: Path | None) -> None:
    """Print that a signal has ended the run, and how to go on."""
    if os.environ.get("RANK", "0") != "0":  # torchrun sets it; only the main process prints
        return
    text = "stopped before the first step; nothing is lost"
    if stopped.step is not None:
        text = f"stopped after step {stopped.step}; everything is saved"
    elif folder is not None and (folder / "checkpoints").exists():
        text = "stopped; everything is saved"
    resume = f" Resume: normfree train {folder}" if folder and _is_started(folder) else ""
    try:
        print(f"\n{text}.{resume}", flush=True)
    except OSError:  # the terminal is gone, and Python would fail again when it closes the stream
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_started(folder: Path) -> bool:
    """Return True if a folder holds a run or the runs of a cross-validation."""
    return any((folder / name).exists() for name in ("config.toml", "folds.json"))


# --- config and folder -------------------------------------------------------------------------------


def _start(arguments: TrainArguments) -> tuple[Config, Path]:
    """Return the config of a new run and its folder."""
    from normfree.training.config_io import load_config

    config, name = _config(arguments)
    folder = Path(arguments.out) if arguments.out else _free_folder(name)
    if (folder / "config.toml").exists():
        existing = load_config(folder / "config.toml")
        raise UsageError(
            problem(f"{folder} contains a run of {existing.model} on {existing.data}", allowed="a folder without a run",
                    fix=f"resume it with `normfree train {folder}`, or choose another --out")
        )  # fmt: skip
    return config, folder


def _resume(arguments: TrainArguments) -> tuple[Config, Path]:
    """Return the config of the run to resume and its folder."""
    from normfree.training.config_io import load_config, with_overrides
    from normfree.training.run_data import located

    folder = Path(arguments.source)
    _check_resumable(arguments)
    config = load_config(folder / "config.toml")
    if "data" not in arguments.keys:
        config = located(config, folder)
    return with_overrides(config, arguments.overrides), folder


def _check_resumable(arguments: TrainArguments) -> None:
    """Raise UsageError for options that cannot change when the run or the folds of `source` are resumed.

    Unknown keys are not reported here, but with the key that they may stand for.
    """
    from normfree.training.config_io import keys

    if "resume" in arguments.keys:
        raise UsageError(problem("--resume is given with a run", fix=f"normfree train {arguments.source}"))
    fixed = set(keys()) - set(RESUME_OPTIONS)
    blocked = ["--out"] * bool(arguments.out) + [f"--{key}" for key in arguments.keys if key in fixed]
    if blocked:
        config = Path(arguments.source) / ("folds.toml" if arguments.has_folds else "config.toml")
        raise UsageError(
            problem(f"{', '.join(blocked)} cannot change when a run is resumed",
                    allowed=", ".join(f"--{key}" for key in RESUME_OPTIONS),
                    fix=f"start a new run with `normfree train {config} --key value`")
        )  # fmt: skip


def _start_folds(arguments: TrainArguments) -> tuple[Config, Path, int]:
    """Return the config of a cross-validation, its folder and the number of its folds."""
    from normfree.training.config_io import with_overrides
    from normfree.training.folds import load_folds, number_of_folds

    if not arguments.has_folds:
        if arguments.run_config:
            raise UsageError(
                problem(f"--folds {arguments.folds} with the run {arguments.source}", allowed="a recipe or .toml file",
                        fix=f"normfree train {arguments.run_config} --folds {arguments.folds}")
            )  # fmt: skip
        config, name = _config(arguments)
        folder = Path(arguments.out) if arguments.out else _free_folder(f"{name}-folds")
        return config, folder, arguments.folds
    folder = Path(arguments.source)
    _check_resumable(arguments)
    known = number_of_folds(folder)
    if arguments.folds not in (0, known):
        raise UsageError(
            problem(
                f"{folder} has {known} folds, and --folds is {arguments.folds}",
                fix="start again with --out FOLDER",
            )
        )
    return with_overrides(load_folds(folder), arguments.overrides), folder, known


def _config(arguments: TrainArguments) -> tuple[Config, str]:
    """Return the config of a recipe or file with the overrides applied, and its name."""
    from normfree.training.choices import is_private
    from normfree.training.config_io import load_config
    from normfree.training.recipes import DEFAULT_RECIPE, RECIPES

    source = str(arguments.run_config or arguments.source)
    if source.endswith(".toml"):
        return _changed(load_config(Path(source)), arguments), Path(source).stem
    if not source:
        has_data, has_weights = "data" in arguments.keys, "weights" in arguments.keys
        source = DEFAULT_RECIPE if not has_data else "finetune" if has_weights else "scratch"
    if source not in RECIPES:
        fix = "to train on your own images, use --data FOLDER"
        if Path(source).is_dir():
            fix = f"to train on its images, normfree train --data {source}"
        elif re.fullmatch(r"[a-z][\w.]*=.*", source):  # arguments of ultralytics and Hydra
            fix = f"write each option as --{source.replace('=', ' ', 1)}"
        raise UsageError(
            problem(f"{source!r} is not a recipe, a run folder or a .toml file.{did_you_mean(source, RECIPES)}",
                    allowed=f"the recipes {', '.join(list(RECIPES)[:7])}, those of `normfree list recipes`", fix=fix)
        )  # fmt: skip
    config = _changed(RECIPES[source](), arguments)
    if source == "private" and not is_private(config.optim.clip):
        given = f"the recipe private with --optim.clip {config.optim.clip}, which is not private"
        raise UsageError(
            problem(
                given,
                allowed="--optim.clip private:...",
                fix=f"{_VALUES['--privacy']}, or the recipe scratch",
            )
        )
    return config, source


def _changed(base: Config, arguments: TrainArguments) -> Config:
    """Return a config with the overrides applied.

    If they make it private, it clips to the norm of the recipe `private` unless they say otherwise: the clipping of
    another config is the λ of AGC.
    """
    from normfree.training.choices import is_private
    from normfree.training.config_io import with_overrides
    from normfree.training.recipes import RECIPES

    config = with_overrides(base, arguments.overrides)
    new = is_private(config.optim.clip) and not is_private(base.optim.clip)
    if new and "optim.clipping" not in arguments.keys:
        config = with_overrides(config, ["--optim.clipping", str(RECIPES["private"]().optim.clipping)])
    return config


def _free_folder(name: str) -> Path:
    """Return the first of runs/NAME-1, runs/NAME-2, ... that does not exist."""
    number = 1
    while Path("runs", f"{name}-{number}").exists():
        number += 1
    return Path("runs", f"{name}-{number}")


def _run_pipes(arguments: TrainArguments, config: Config) -> None:
    """Run the shell commands of a --data option of this command line, once per machine.

    The run then reads the files that they wrote. A run never executes shell commands from its config.
    """
    given = "data" in arguments.keys
    if given and "pipe:" in config.data and os.environ.get("LOCAL_RANK", "0") == "0":
        from normfree.training.run_data import open_config_data

        open_config_data(config, pipes=True)


# --- running -----------------------------------------------------------------------------------------


def _find_lr(arguments: TrainArguments) -> int:
    """Try learning rates; return 0."""
    from normfree.tools.find_lr import find_lr

    config, _ = _config(arguments)
    if (Path(arguments.out) / "config.toml").exists():
        raise UsageError(
            problem(f"{arguments.out or 'the current folder'} contains a run, and --find-lr does not train",
                    fix="choose another --out")
        )  # fmt: skip
    find_lr(config, arguments.out)
    return 0


def _train(config: Config, folder: Path, *, folds: int = 0) -> int:
    """Train a run, or those of a cross-validation; return 0, 3 if one diverged, or the exit code of a stopped run."""
    from normfree.training.allocator import keep_freed_memory
    from normfree.training.distributed.world import ElsewhereError
    from normfree.training.divergence import DivergedError
    from normfree.training.folds import train_folds
    from normfree.training.loop import train as run

    if config.device in ("auto", "cpu"):
        keep_freed_memory()  # has no effect on a GPU
    # torchrun sets RANK. Only the main process prints.
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        if folds:
            train_folds(config, folder, folds=folds)
        else:
            run(config, folder)
    except DivergedError as error:
        if is_main:
            print(f"normfree: {error}", file=sys.stderr)
        return 3  # scripts can distinguish a diverged run from a wrong command
    except ElsewhereError:
        if is_main:
            raise
        return 2
    return 0


def _print_help() -> int:
    """Print the usage and the config keys with the defaults of the recipe "demo"; return 0."""
    import tyro

    from normfree.training.config import Config
    from normfree.training.recipes import DEFAULT_RECIPE, RECIPES

    print(TRAIN_HELP)
    with suppress(SystemExit):
        tyro.cli(Config, default=RECIPES[DEFAULT_RECIPE](), args=["--help"], prog="normfree train",
                 config=(tyro.conf.FlagConversionOff,))  # fmt: skip
    return 0
