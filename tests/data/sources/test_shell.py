from __future__ import annotations

import io
import re
import shlex
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from normfree.data.sources.open import open_labeled, open_source


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "normfree" / "pipes"


def shard(path: Path, first: int) -> Path:
    """Write a tar of images `first` ... `first` + 5, each of a different gray; the class is the number modulo 2."""
    with tarfile.open(path, "w") as file:
        for i in range(first, first + 6):
            buffer = io.BytesIO()
            Image.new("RGB", (4, 4), (i, i, i)).save(buffer, "PNG")
            for name, data in ((f"{i:03}.png", buffer.getvalue()), (f"{i:03}.cls", str(i % 2).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return path


def message(spec: str, **options: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        open_source(spec, **options)
    return str(caught.value)


def contents(source: Any) -> list[tuple[str, int, int]]:
    return [
        (source.name(i), source.label(i), source.image(i).getpixel((0, 0))[0]) for i in range(len(source))
    ]


def test_what_a_command_writes_is_a_shard(tmp_path: Path, kept: Path) -> None:
    shard(tmp_path / "a-0.tar", 0), shard(tmp_path / "a-1.tar", 6), shard(tmp_path / "v.tar", 20)
    size = (tmp_path / "v.tar").stat().st_size
    count = tmp_path / "count"
    spec = f"pipe:echo x >> {count}; cat {tmp_path}/a-{{0..1}}.tar | cat,val=pipe:cat < {tmp_path}/v.tar"
    for pipes in (True, False, True):  # once here, the files need no command
        split = open_source(spec, pipes=pipes)
        assert contents(split.train) == [(f"a-{i // 6}.tar/{i:03}.png", i % 2, i) for i in range(12)]
        assert split.notes[2:] == (
            f"fetched into {kept}: 2 shards, {2 * size:,} bytes",
            f"fetched into {kept}: 1 shard, {size:,} bytes",
        )
        assert contents(split.val) == [(f"v.tar/{i:03}.png", i % 2, i) for i in range(20, 26)]
        assert contents(open_labeled(f"shards:{spec}", pipes=pipes)) == contents(split.val)
    assert count.read_text() == "x\nx\n"
    assert len(list(kept.iterdir())) == 3
    for path in tmp_path.glob("*.tar"):  # and no sources
        path.unlink()
    assert contents(open_source(spec).train) == contents(split.train)


def test_the_part_chosen_by_hash_is_that_of_the_files_themselves(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", 0)
    piped, plain = open_source(f"pipe:cat {path}", pipes=True), open_source(str(path))
    assert [pixel for _, _, pixel in contents(piped.val)] == [pixel for _, _, pixel in contents(plain.val)]


def test_no_command_runs_that_the_user_has_not_typed(tmp_path: Path, kept: Path) -> None:
    trace = tmp_path / "trace"
    for opener in (open_source, open_labeled):
        for spec in (
            f"pipe:touch {trace}",
            f"shards:pipe:touch {trace}",
            f"shards:x.tar,val=pipe:touch {trace}",
        ):
            with pytest.raises(ValueError, match=r"."):
                opener(spec)
    assert message(f"pipe:touch {trace}") == (
        f"'pipe:touch {trace}' is a shell command, and was not typed here. Allowed: commands that the user types; "
        "those of a config only if their files were fetched before. "
        "Fix: read the command, then type it yourself: --data 'pipe:...'."
    )
    assert not trace.exists()
    assert not kept.exists()


def test_only_a_whole_tar_of_a_command_that_succeeds_is_kept(tmp_path: Path, kept: Path) -> None:
    path = shard(tmp_path / "a.tar", 0)
    failing = f"cat {path}; echo nothing there >&2; exit 3"
    assert message(f"pipe:{failing}", pipes=True) == (
        f"'pipe:{failing}' failed with code 3: nothing there. Allowed: a command that writes a tar to its standard "
        "output. Fix: try it in a shell."
    )
    text = message(f"pipe:head -c 3000 {shlex.quote(str(path))} | cat", pipes=True)
    assert text.startswith("a.tar is truncated") or text.startswith("a.tar is no tar, or damaged")
    assert re.match(r"[0-9a-f]{8}\.tar is no tar, or damaged", message("pipe:true", pipes=True))
    assert list(kept.iterdir()) == []


def test_errors_of_pipes() -> None:
    fix = "Allowed: pipe:COMMAND. Fix: pipe:'curl -s https://host/train-{000..127}.tar'."
    assert message("pipe: ", pipes=True) == f"'pipe: ' names no command. {fix}"
    assert message("pipe:cat {a,a}.tar", pipes=True) == f"'pipe:cat {{a,a}}.tar' names a command twice. {fix}"
    assert message("pipe:awk '{print}'", pipes=True).startswith(
        "\"pipe:awk '{print}'\" has {print}. Allowed:"
    )
    assert message("shards:-") == (
        "'-' is a stream without random access, so no run could resume exactly. Allowed: tar files on "
        "disk, URLs, or pipe:COMMAND, whose output is kept in a file. Fix: name one of these."
    )


def test_what_is_shown_of_a_command() -> None:
    from normfree.data.sources.shell import _label

    assert _label("curl -s 'https://me:pw@host/train-000.tar?token=secret'", "0123456789") == "train-000.tar"
    assert _label("aws s3 cp s3://b/x/a.tar -", "0123456789") == "a.tar"
    assert _label("make-data --seed 3", "0123456789") == "01234567.tar"
