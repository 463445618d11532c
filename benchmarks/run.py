"""Run benchmark suites: `python -m benchmarks.run [SUITE ...]`; without a name, all that this machine can run.

Writes results/SUITE.json and SUITE.md (SUITE_cuda on a GPU) and the speed table of docs/results.md. If there are
several suites, each runs in its own process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import machine, report, results_page
from benchmarks.harness import LEAST, Bench, Case, GateError, OutOfTimeError
from benchmarks.suites import SUITES, Suite
from benchmarks.summary import Comparison
from normfree.suggest import number_of, problem, unknown
from normfree.training.allocator import keep_freed_memory

ROOT = Path(__file__).parents[1]
# Seconds of a suite's budget that are kept for measuring the machine's rates again and for writing.
RESERVE_S = 5.0
# Threads of the results in benchmarks/results/, which docs/results.md calls "two cores".
THREADS = 2


def main(args: Sequence[str] | None = None) -> int:
    """Run the suites that `args` name.

    Returns:
        0, or 1 if arms disagreed, a suite failed or nothing was measured, or 2 for invalid arguments.
    """
    options = parse(args)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    error = check(options, device)
    if error:
        print(error, file=sys.stderr)
        return 2
    options.no_write |= options.rounds < LEAST
    threads = torch.get_num_threads()
    if options.out == report.RESULTS and device.type == "cpu" and threads != THREADS and not options.no_write:
        print(
            f"Prints only: with {number_of(threads, 'thread')}; {report.RESULTS.name}/ has results of {THREADS}."
        )
        options.no_write = True
    possible = []
    for name in options.suites or SUITES:
        obstacle = SUITES[name].obstacle(device)
        if not obstacle and not options.suites and SUITES[name].by_name and device.type == "cpu":
            obstacle = f"it runs only if it is named: python -m benchmarks.run {name}"
        if obstacle:
            print(f"{name} skipped: {obstacle}", flush=True)
        else:
            possible.append(name)
    if len(possible) > 1:
        code = max(run_apart(name, options, device) for name in possible)
    else:
        code = max((run_here(SUITES[name], options, device) for name in possible), default=0)
    if possible and not options.no_write and not options.only and options.out == report.RESULTS:
        results_page.update()
    return code


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="networks or cases; writes no results"
    )
    parser.add_argument(
        "--rounds", type=int, default=11, help=f"counted rounds; below {LEAST} nothing is written"
    )
    parser.add_argument("--budget-s", type=float, help="seconds for each suite; by default the suite's own")
    parser.add_argument("--no-write", action="store_true", help="print the page, write nothing")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder for the results")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10: train/ and test/ with JPEG files for whole_job, "
                        "cifar-10-batches-py/ for small_scale on a GPU")  # fmt: skip
    options = parser.parse_args(args)
    options.out = options.out.resolve()
    return options


def check(options: argparse.Namespace, device: torch.device) -> str:
    """Return what is wrong with the options, in one line, or ""."""
    for name in options.suites:
        if name not in SUITES:
            return unknown("suite", name, SUITES)
        obstacle = SUITES[name].obstacle(device)
        if obstacle:
            return f"{name} cannot run: {obstacle}"
    wrong_data = check_data(options.data, [SUITES[name] for name in options.suites])
    if wrong_data:
        return wrong_data
    if options.rounds < 1:
        return problem(
            f"--rounds is {options.rounds}", allowed="1 or more", fix=f"pass {LEAST} to write results"
        )
    if options.budget_s is not None and options.budget_s <= 0:
        fix = "leave it out for each suite's own budget"
        return problem(f"--budget-s is {options.budget_s:g}", allowed="seconds above 0", fix=fix)
    if options.out.exists() and not options.out.is_dir():
        return problem(f"--out is {options.out}", allowed="a folder")
    if options.device == "cuda" and not torch.cuda.is_available():
        return problem("--device is cuda and no GPU is available", allowed="cpu", fix="pass --device cpu")
    if options.only:
        suites = [SUITES[name] for name in options.suites or SUITES]
        possible = [suite for suite in suites if not suite.obstacle(device)]
        known = sorted({alias for suite in possible for alias in _aliases(suite, device)})
        for name in options.only:
            if name not in known:
                return unknown("name", name, known)
    return ""


def check_data(data: Path | None, suites: Sequence[Suite]) -> str:
    """Return what is wrong with the folder for the named suites, in one line, or ""."""
    if data is not None and suites and not any(suite.reads_data for suite in suites):
        readers = [suite.name for suite in SUITES.values() if suite.reads_data]
        return problem(
            f"--data for {suites[0].name}, which reads none", allowed=f"with {' or '.join(readers)}"
        )
    for suite in suites:
        missing = [name for name in suite.folders if data is None or not (data / name).is_dir()]
        if missing:
            given = f"{suite.name} without --data" if data is None else f"{data} has no {missing[0]}/"
            needed = " and ".join(f"{name}/" for name in suite.folders)
            return problem(given, allowed=f"--data FOLDER with {needed}, which have one folder per class")
    return ""


def _aliases(suite: Suite, device: torch.device) -> list[str]:
    """Return the names that `--only` accepts for a suite."""
    return [alias for case in suite.cases(device, None) for alias in case.aliases]


def run_apart(name: str, options: argparse.Namespace, device: torch.device) -> int:
    """Run a suite in a new process, so that no memory or threads of another suite affect it; return its exit code."""
    passed = ["--rounds", str(options.rounds), "--out", str(options.out), *["--no-write"] * options.no_write]
    passed += ["--device", device.type]
    passed += [] if options.budget_s is None else ["--budget-s", str(options.budget_s)]
    passed += [] if options.data is None else ["--data", str(options.data.resolve())]
    passed += ["--only", *options.only] if options.only else []
    if options.only and not set(options.only) & set(_aliases(SUITES[name], device)):
        return 0
    print(f"== {name}", flush=True)
    return subprocess.run([sys.executable, "-m", "benchmarks.run", name, *passed], cwd=ROOT).returncode


def run_here(suite: Suite, options: argparse.Namespace, device: torch.device) -> int:
    """Run a suite in this process; print its page, and write it unless the options forbid it.

    The rates of the machine are measured before and after the cases.
    """
    start = time.perf_counter()
    settle(suite, device)
    before = machine.ceilings(device)
    deadline = start + (options.budget_s or suite.budget(device)) - RESERVE_S
    bench = Bench(
        device=device, rounds=options.rounds, deadline=deadline, bandwidth=1e9 * before.copy_gb_s,
        matmul=1e9 * before.matmul_gflop_s,
    )  # fmt: skip
    cases = suite.cases(device, options.data)
    if options.only:
        cases = [case for case in cases if set(case.aliases) & set(options.only)]
    comparisons, wrong = measure(bench, cases)
    command = ["python -m benchmarks.run", suite.name, *(["--only", *options.only] if options.only else [])]
    result = report.Result(
        suite.name, suite.about(), " ".join(command), machine.facts(device), before, machine.ceilings(device),
        time.perf_counter() - start, tuple(comparisons), tuple(bench.skipped),
    )  # fmt: skip
    print(report.page(result), flush=True)
    keep = not options.no_write and (not options.only or options.out != report.RESULTS)
    if keep and comparisons:
        suffix = "-".join(["", *options.only])
        print(report.write(replace(result, suite=suite.name + suffix), options.out))
    return int(wrong or not comparisons)


def settle(suite: Suite, device: torch.device) -> None:
    """Apply settings of the whole process, to timm's arms and ours: cores, freed memory, CUDA and compiler settings."""
    if suite.one_core:
        torch.set_num_threads(1)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if device.type == "cpu":
        keep_freed_memory()
    else:
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # the gates compare float32; bfloat16 is timed
    if suite.by_name or device.type == "cuda":
        import torch._dynamo.config as dynamo

        dynamo.recompile_limit = 256  # the default of 8 leaves networks that share code uncompiled


def measure(bench: Bench, cases: Sequence[Case]) -> tuple[list[Comparison], bool]:
    """Measure all cases that time allows, with equal shares of the remaining time.

    Returns:
        The comparisons, and whether arms disagreed.
    """
    comparisons: list[Comparison] = []
    wrong = False
    for number, case in enumerate(cases):
        if bench.left() <= 0:
            bench.skipped.append(f"{case.name}: no time left")
            continue
        share = bench.clock() + bench.left() / (len(cases) - number)
        try:
            comparisons += _printed(case.run(replace(bench, share=share)))
        except OutOfTimeError as error:
            bench.skipped.append(str(error))
        except GateError as error:
            wrong = True
            bench.skipped.append(f"wrong: {error}")
            print(error, file=sys.stderr, flush=True)
    return comparisons, wrong


def _printed(comparisons: Iterable[Comparison]) -> Iterable[Comparison]:
    """Yield the comparisons, and print each."""
    for comparison in comparisons:
        figures = (f"{t.arm} {t.median:.4g} {comparison.unit}, {t.ratio:.2f}" for t in comparison.timings)
        print(comparison.case, *figures, sep="  ", flush=True)
        yield comparison


if __name__ == "__main__":
    sys.exit(main())
