"""The command line: dispatch verbs, and map exceptions to exit codes. torch is imported lazily."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from normfree._version import __version__
from normfree.commands.arguments import parse_arguments
from normfree.commands.audit_command import AuditArguments, audit_
from normfree.commands.bench_command import BenchArguments, bench
from normfree.commands.convert_command import ConvertArguments, convert
from normfree.commands.diagnose_command import DiagnoseArguments, diagnose
from normfree.commands.eval_command import EvalArguments, eval_
from normfree.commands.export_command import ExportArguments, export_
from normfree.commands.list_command import ListArguments, list_
from normfree.commands.other_verbs import unknown_verb
from normfree.commands.predict_command import PredictArguments, predict_
from normfree.commands.serve_command import ServeArguments, serve
from normfree.commands.show_command import ShowArguments, show
from normfree.commands.train_command import train
from normfree.commands.usage import UsageError
from normfree.suggest import printable

HELP = """usage: normfree VERB ...      (normfree VERB --help prints its options)

  list [models|recipes] [PATTERN]   list networks with size and cost, or recipes
  show NAME|RECIPE|RUN|MODEL        show everything about one of them
  train [RECIPE|RUN|FILE.toml] [--key value ...]
                                    train; alone: the demo; a run folder: resume
  audit DATA                        open every image, write the verdicts
  eval RUN|MODEL DATA               measure top-1 and top-5 on labeled images
  predict RUN|MODEL PATH...         predict classes of files, folders, URLs...
  diagnose NAME|RUN|MODEL [DATA]    measure signals, gradients, batch dependence
  convert FILE|MODEL FOLDER         convert weights to a model folder;
                                    timm:NAME FILE: remove batch norm
  export RUN|MODEL --format onnx|pt2
                                    write one file for other runtimes, also int8
  serve RUN|MODEL                   serve a web page and a JSON endpoint
  bench NAME...                     measure images per second on this machine

  --version   --help   --traceback  (the last prints where an error came from)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the name of the program; None means `sys.argv[1:]`.

    Returns:
        The exit code: 0 success, 1 `audit` found images that cannot be used, 2 an error that the user can fix, 3 a run
        diverged, 130 interrupted.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in args
    for stream in (sys.stdout, sys.stderr):  # a file name need not be valid Unicode, nor a terminal use UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args = [arg for arg in args if arg != "--traceback"]
    warnings.filterwarnings("ignore", module=r"PIL\.")  # files that it cannot read are named by our errors
    try:
        return _dispatch(args)
    except (ValueError, ImportError) as error:
        if traceback:
            raise
        for line in str(error).splitlines():
            print(f"normfree: {printable(line)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # for example `normfree list | head`
        sys.stderr.close()
        return 0
    except OSError as error:  # for example no permission, or no space left on the device
        if traceback:
            raise
        print(f"normfree: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("normfree: interrupted", file=sys.stderr)
        return 130  # the convention of shells: 128 + SIGINT


def _dispatch(args: list[str]) -> int:
    """Run the verb that the first argument names; return its exit code."""
    verb, *rest = args or ["help"]
    if verb in ("--help", "-h", "help"):
        print(HELP, end="")
        return 0
    if verb in ("--version", "version"):
        print(f"normfree {__version__}")
        return 0
    if verb not in VERBS:
        raise UsageError(unknown_verb(verb, rest, VERBS))
    return VERBS[verb](rest)


def _typed(verb: str, function: Callable[[Any], int], arguments: type) -> Callable[[list[str]], int]:
    """Return `function` with its arguments parsed from strings according to a dataclass."""

    def run(args: list[str]) -> int:
        return function(parse_arguments(verb, arguments, args))

    return run


# The verbs in the order of HELP. `train` has a parser of its own, because every config key is an option.
VERBS: dict[str, Callable[[list[str]], int]] = {
    "list": _typed("list", list_, ListArguments),
    "show": _typed("show", show, ShowArguments),
    "train": train,
    "audit": _typed("audit", audit_, AuditArguments),
    "eval": _typed("eval", eval_, EvalArguments),
    "predict": _typed("predict", predict_, PredictArguments),
    "diagnose": _typed("diagnose", diagnose, DiagnoseArguments),
    "convert": _typed("convert", convert, ConvertArguments),
    "export": _typed("export", export_, ExportArguments),
    "serve": _typed("serve", serve, ServeArguments),
    "bench": _typed("bench", bench, BenchArguments),
}
