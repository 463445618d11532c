"""The command: words to verbs, errors to exit codes. It computes nothing, and imports torch only after the words
are understood."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import tyro

from normfree._version import __version__
from normfree.commands.bench_command import BenchArguments, bench
from normfree.commands.convert_command import ConvertArguments, convert
from normfree.commands.diagnose_command import DiagnoseArguments, diagnose
from normfree.commands.eval_command import EvalArguments, eval_
from normfree.commands.export_command import ExportArguments, export_
from normfree.commands.list_command import ListArguments, list_
from normfree.commands.predict_command import PredictArguments, predict_
from normfree.commands.serve_command import ServeArguments, serve
from normfree.commands.show_command import ShowArguments, show
from normfree.commands.train_command import train, train_help
from normfree.commands.usage import UsageError
from normfree.suggest import did_you_mean

HELP = """usage: normfree VERB ...      (normfree VERB --help says more)

  list [models|recipes] [PATTERN]   networks with size and cost, or recipes
  show NAME|RECIPE|RUN              everything about one of them
  train [RECIPE|RUN|FILE.toml] [--key value ...]
                                    alone: the demo; a run folder: continue it
  eval RUN|MODEL DATA               top-1 and top-5 on labelled images
  predict RUN|MODEL PATH...         classes of files and folders of images
  diagnose NAME|RUN|MODEL [DATA]    signals, gradients, dependence on the batch
  convert FILE|MODEL FOLDER         weights of others into a model folder;
                                    timm:NAME FILE: take batch norm out of it
  export RUN|MODEL --format onnx|pt2
                                    one file for other runtimes; --int8: smaller
  serve RUN|MODEL                   a page to drop images on, and JSON
  bench NAME...                     images a second on this machine

  --version   --help   --traceback  (the last shows where an error came from)
"""


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
        return train_help() if {"--help", "-h"} & set(rest) else train(rest)
    if verb not in VERBS:
        hint = did_you_mean(verb, [*VERBS, "train"])
        verbs = ", ".join(["list", "show", "train", *list(VERBS)[2:]])
        raise UsageError(f"unknown verb {verb!r}.{hint} Verbs: {verbs}.")
    function, arguments = VERBS[verb]
    return _call(function, arguments, rest, verb)


def _call(verb: Callable[..., int], arguments: type, words: list[str], name: str) -> int:
    return verb(tyro.cli(arguments, args=words, prog=f"normfree {name}"))


VERBS: dict[str, tuple[Callable[..., int], type]] = {
    "list": (list_, ListArguments),
    "show": (show, ShowArguments),
    "eval": (eval_, EvalArguments),
    "predict": (predict_, PredictArguments),
    "diagnose": (diagnose, DiagnoseArguments),
    "convert": (convert, ConvertArguments),
    "export": (export_, ExportArguments),
    "serve": (serve, ServeArguments),
    "bench": (bench, BenchArguments),
}
