"""Windows and macOS: what our code may use there, on a Linux machine that imitates them."""

import ast
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import normfree
from normfree import files

ROOT = Path(normfree.__file__).parent
TINY = shlex.split(
    "--model nf_resnet_nano --input.image_size 16 --input.batch_size 4 --input.workers 0 --optim.warmup 1st "
    "--log.evaluate_every 2st --log.checkpoint_every 2st --optim.schedule constant"
)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for channel, name in ((0, "red"), (2, "blau é")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(5):
            pixels = random.integers(0, 60, (20, 20, 3), dtype=np.uint8)
            pixels[..., channel] += 180
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def run_on(system: str, folder: Path, *commands: list[str]) -> subprocess.CompletedProcess[str]:
    """Run normfree commands, one after the other in one process, in `folder` on an imitated system."""
    script = Path(__file__).parent / "workers" / "other_system.py"
    return subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", str(script), system, json.dumps(commands)],
        cwd=folder, capture_output=True, text=True, encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
    )  # fmt: skip


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="imitates other systems on Linux")
@pytest.mark.parametrize("system", ["nt", pytest.param("darwin", marks=pytest.mark.slow)])
def test_a_run_trains_continues_predicts_and_is_exported(photos: Path, tmp_path: Path, system: str) -> None:
    steps = [
        ["train", "--data", "photos", *TINY, "--length", "2st", "--out", "runs/a"],
        ["train", "runs/a", "--length", "4st"],
        ["train", "finetune", "--data", "photos", "--weights", "runs/a", *TINY, "--input.workers", "1",
         "--length", "1st", "--out", "runs/b"],
        ["predict", "runs/b", "photos/red/0.png", "--out", "found.csv"],
        ["eval", "runs/a", "photos"],
    ]  # fmt: skip
    done = run_on(system, tmp_path, *(steps if system == "nt" else steps[:2]))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "runs/a/results.json").read_text(encoding="utf-8"))["steps"] == 4
    if system == "nt":
        assert (tmp_path / "found.csv").read_text(encoding="utf-8").count("red") >= 2
    assert [p.name for p in tmp_path.rglob(".*.partial")] == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="imitates other systems on Linux")
def test_the_imitation_refuses_what_windows_refuses(tmp_path: Path) -> None:
    """The test above would pass if nothing were refused."""
    script = tmp_path / "probe.py"
    script.write_text(
        "import runpy, sys\n"
        "sys.argv = ['other_system.py', 'nt']\n"
        f"runpy.run_path({str(Path(__file__).parent / 'workers' / 'other_system.py')!r}, run_name='probe')\n"
        "names = {'__name__': 'normfree.probe', '__builtins__': __builtins__}\n"
        "def refused(code):\n"
        "    try:\n"
        "        exec(code, names)\n"
        "    except Exception as error:\n"
        "        return type(error).__name__\n"
        "print(refused('import fcntl'), refused('from os import fork'), refused('import os; os.getuid()'),\n"
        "      refused('import signal; signal.SIGHUP'), refused('import os; os.open(\".\", 0)'),\n"
        '      refused(\'import os; file = open("a", "w"); os.replace("a", "b")\'),\n'
        '      refused(\'import os, sys; assert (os.name, sys.platform) == ("nt", "win32"); os.getpid()\'))\n',
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == [
        "ModuleNotFoundError", "ImportError", "AttributeError", "AttributeError", "PermissionError",
        "PermissionError", "None",
    ], done.stderr  # fmt: skip


def calls(name: str) -> list[tuple[Path, ast.Call]]:
    """Return the calls of a function or method with this name in the package."""
    return [
        (path, node)
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and name == (node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", ""))
    ]


def test_text_is_written_in_utf8_with_the_same_line_breaks_everywhere() -> None:
    writing = [call for call in calls("write_text") if isinstance(call[1].func, ast.Attribute)]
    for path, call in calls("open"):
        constants = [
            n.value for n in (*call.args, *(k.value for k in call.keywords)) if isinstance(n, ast.Constant)
        ]
        if any(isinstance(c, str) and c in ("w", "a", "x", "w+", "a+") for c in constants):
            writing.append((path, call))
    assert len(writing) >= 3
    for path, call in writing:
        assert {"encoding", "newline"} <= {k.arg for k in call.keywords}, f"{path}:{call.lineno}"


def test_text_is_read_in_utf8() -> None:
    for path, call in calls("read_text"):
        if isinstance(call.func, ast.Attribute):  # not `read_text` of files.py
            assert "encoding" in {k.arg for k in call.keywords}, f"{path}:{call.lineno}"


def test_line_breaks_are_those_of_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.atomic_write_text(tmp_path / "a.txt", "é\n\r\n")
    assert (tmp_path / "a.txt").read_bytes() == "é\n\r\n".encode()


def test_a_file_that_another_program_has_opened_for_a_moment_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows a scanner for viruses may hold a new file for some milliseconds."""
    replace, refusals = Path.replace, [PermissionError(13, "in use")] * 2

    def busy(self: Path, target: Path) -> Path:
        if refusals:
            raise refusals.pop()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", busy)
    monkeypatch.setattr(files, "_PAUSES", (0.0, 0.0, 0.0))
    with pytest.raises(PermissionError):
        files.atomic_write_text(tmp_path / "a.txt", "on Linux: once")
    refusals[:] = [PermissionError(13, "in use")] * 3
    for_windows = {name: getattr(os, name) for name in ("getpid", "open", "O_RDWR", "fsync", "close")}
    monkeypatch.setattr(files, "os", SimpleNamespace(name="nt", **for_windows))
    files.atomic_write_text(tmp_path / "a.txt", "there")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "there"
    refusals[:] = [PermissionError(13, "in use")] * 4
    with pytest.raises(PermissionError):
        files.atomic_write_text(tmp_path / "a.txt", "never")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
