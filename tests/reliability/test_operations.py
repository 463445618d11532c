"""Goals 1 and 7 in small numbers: faults of the disk at file operations of a run."""

import os
import subprocess
import sys

import pytest

from reliability import disk, operations
from reliability.faults import counted, library, new_counter
from reliability.records import ROOT

pytestmark = pytest.mark.skipif(library() is None, reason="needs a C compiler")

OPERATIONS = """
import os, sys
from pathlib import Path
from reliability.faults import Fault
fault = {fault}
fault()
out = Path({out!r})
for step in (
    lambda: out.mkdir(),
    lambda: (out / "a").write_bytes(b"12345678"),
    lambda: (out / "a").rename(out / "b"),
    lambda: os.fsync(os.open(out, os.O_RDONLY)),
    lambda: (out / "b").read_bytes(),
    lambda: (out / "b").unlink(),
    lambda: out.rmdir(),
):
    try:
        step()
        print("ok")
    except OSError as error:
        print(error.strerror)
"""


def outcome(tmp_path, at: int, what: str, lasting: bool) -> tuple[list[str], int, int]:
    """Run the operations with a fault; return what each printed, the exit code and the count."""
    out, counter = tmp_path / "out", new_counter(tmp_path)
    fault = f"Fault(Path({str(out)!r}), Path({str(counter)!r}), {at}, {what!r}, {lasting})"
    process = subprocess.run(
        [sys.executable, "-u", "-c", OPERATIONS.format(fault=fault, out=str(out))],
        env={**os.environ, "LD_PRELOAD": str(library())}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return process.stdout.splitlines(), process.returncode, counted(counter)


OK, FULL = "ok", "No space left on device"


@pytest.mark.parametrize(
    ("at", "what", "lasting", "printed", "code", "count"),
    [
        (-1, "fails", False, [OK] * 7, 0, 7),  # mkdir, open, write, rename, fsync, unlink, rmdir
        (3, "fails", False, [*[OK] * 2, "Input/output error", OK, "No such file or directory",
                             "No such file or directory", "Directory not empty"], 0, 7),
        (2, "disk full", True, [OK, FULL, FULL, FULL, "No such file or directory", FULL, FULL], 0, 7),
        (3, "too many open files", True, [OK, OK, OK, "Too many open files", "Too many open files", OK, OK], 0, 6),
        (4, "is killed", False, [OK] * 3, -9, 5),
        (4, "folder vanishes", True, [*[OK] * 4, *["No such file or directory"] * 3], 0, 7),
    ],
)  # fmt: skip
def test_the_library_of_faults(tmp_path, at, what, lasting, printed, code, count):
    assert outcome(tmp_path, at, what, lasting) == (printed, code, count)


def test_a_write_at_which_a_process_is_killed_has_written_half(tmp_path):
    outcome(tmp_path, 2, "is killed", False)
    assert (tmp_path / "out" / "a").read_bytes() == b"1234"


@pytest.mark.parametrize("what", list(operations.CHECKS))
def test_a_fault_in_the_middle_of_a_run_loses_nothing(what):
    result = operations.fault_at(operations.operations_of_run() // 2, what)
    assert (result.passed, result.wanted) == (1, 1), result.detail


@pytest.mark.slow
@pytest.mark.parametrize("what", list(operations.CHECKS))
@pytest.mark.parametrize("point", range(12))
def test_faults_at_file_operations_lose_nothing(what, point):
    result = operations.fault_at(point * operations.operations_of_run() // 12, what)
    assert (result.passed, result.wanted) == (1, 1), result.detail


@pytest.mark.slow
@pytest.mark.parametrize("case", list(disk.cases(4)), ids=lambda case: case.name)
def test_a_disk_that_refuses_from_a_point_on_costs_no_checkpoint(case):
    result = case.run()
    assert (result.passed, result.wanted) == (1, 1), result.detail


def test_all_operations_of_a_run_are_tried():
    result = operations.covered()
    assert result.passed == 1, result.detail


@pytest.mark.slow
def test_a_fault_is_possible_after_other_goals_in_the_same_process():
    code = (
        "from reliability.children import call; from reliability.disk import lasting_fault; "
        "print(call(abs, -1).value, lasting_fault('disk full', 20))"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout == "1 Result(wanted=1, passed=1, detail='')\n"
