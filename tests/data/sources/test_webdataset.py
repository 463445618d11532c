from __future__ import annotations

import functools
import gzip
import http.server
import io
import json
import os
import pickle
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from normfree.data.audit import audit
from normfree.data.loader import Batch, eval_batches, train_batches
from normfree.data.source import ArraySource
from normfree.data.sources.open import open_labeled, open_source
from normfree.data.sources.storage import StoredFile, expand
from normfree.data.sources.tar_index import index_of
from normfree.data.sources.webdataset import open_shards
from normfree.data.transforms.decode import ImageError
from normfree.data.transforms.evaluate import eval_transform
from normfree.data.transforms.train import train_transform

NUMBER = "a whole number from 0 to 99999."
FORM = "Allowed: pairs of KEY.jpg (or .png, .webp, ...) and KEY.cls or KEY.json, uncompressed."


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make_image(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 11, 3), dtype=np.uint8))


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    make_image(number).save(buffer, "PNG")
    return buffer.getvalue()


def tar(members: list[tuple[str, bytes] | tarfile.TarInfo], kind: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                file.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def shards(folder: Path, spec: str = "train", *, counts: tuple[int, ...] = (5, 3, 4), first: int = 0) -> Path:
    """Write shards SPEC-0.tar, ... of images `first`, `first` + 1, ...; image i has class i % 3."""
    folder.mkdir(exist_ok=True)
    number = first
    for shard, count in enumerate(counts):
        members: list[Any] = []
        for _ in range(count):
            label = (f"{number:04}.cls", str(number % 3).encode())
            if number % 2:
                label = (f"{number:04}.json", json.dumps({"label": number % 3, "text": "x"}).encode())
            pair = [(f"{number:04}.png", png(number)), label]
            members += pair if number % 4 < 2 else pair[::-1]
            number += 1
        (folder / f"{spec}-{shard}.tar").write_bytes(tar(members))
    return folder


def arrays(count: int) -> ArraySource:
    """The same images in memory."""
    images = np.stack([np.asarray(make_image(i)) for i in range(count)])
    return ArraySource(
        images, [i % 3 for i in range(count)], classes="012", names=[str(i) for i in range(count)]
    )


def stream(source: Any, **options: Any) -> list[Batch]:
    options = {"batch_size": 6, "seed": 5, "num_steps": 6, **options}
    return list(train_batches(source, train_transform(image_size=8), **options))


def error(pattern: str | Path, **options: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        open_shards(str(pattern), **options)
    return str(caught.value)


# --- the same samples as in memory


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_every_tar_format_gives_the_very_bytes(tmp_path: Path, kind: int) -> None:
    long = ("d" * 90 + "/") * (1 if kind == tarfile.USTAR_FORMAT else 3) + "ä"
    content = [(f"{long}{i}.png", png(i)) for i in range(3)]
    labels = [(f"{long}{i}.cls", b"%d\n" % i) for i in range(3)]
    (tmp_path / "a.tar").write_bytes(tar([*content, *labels], kind))
    source = open_shards(str(tmp_path / "a.tar"))
    assert [source.data(i) for i in range(3)] == [data for _, data in content]
    assert [source.name(i) for i in range(3)] == [f"{tmp_path}/a.tar/{name}" for name, _ in content]
    assert [source.label(i) for i in range(3)] == [0, 1, 2]
    assert source.classes == ("0", "1", "2")


def test_batches_are_those_of_the_images_in_memory_whatever_the_workers(tmp_path: Path) -> None:
    source = open_shards(str(shards(tmp_path / "s") / "train-{0..2}.tar"))
    for workers in (0, 2):
        for batch, wanted in zip(stream(source, workers=workers), stream(arrays(12)), strict=True):
            assert torch.equal(batch.images, wanted.images)
            assert torch.equal(batch.labels, wanted.labels)
            assert torch.equal(batch.indices, wanted.indices)


def test_a_resumed_stream_and_the_parts_of_the_ranks(tmp_path: Path) -> None:
    source = open_shards(str(shards(tmp_path / "s") / "train-*.tar"))
    whole = stream(source)
    again = stream(pickle.loads(pickle.dumps(source)), start_step=3)
    assert all(torch.equal(a.images, b.images) for a, b in zip(again, whole[3:], strict=True))
    parts = [stream(source, rank=rank, world_size=3) for rank in range(3)]
    for batch, *mine in zip(whole, *parts, strict=True):
        assert sum((part.names for part in mine), ()) == batch.names
    squash = eval_transform(image_size=8, crop="squash")
    seen = [
        i
        for rank in range(5)
        for b in eval_batches(source, squash, batch_size=2, rank=rank, world_size=5)
        for i in b.indices.tolist()
    ]
    assert seen == list(range(12))


def test_the_audit_names_the_member(tmp_path: Path) -> None:
    bad = tar([("a.png", png(0)), ("a.cls", b"0"), ("b.png", b"nonsense"), ("b.cls", b"1")])
    (tmp_path / "x.tar").write_bytes(bad)
    (found,) = audit(open_shards(str(tmp_path / "x.tar"))).bad
    assert found.name == f"{tmp_path}/x.tar/b.png"
    assert found.reason.startswith("not an image, or not one of JPEG, PNG")


def test_json_gives_way_to_cls_and_other_files_are_left_out(tmp_path: Path) -> None:
    members = [("a.png", png(0)), ("a.json", b'{"label": 9}'), ("a.cls", b"1"), ("a.seg.png", png(1)), ("a.txt", b"hi"),
               ("__meta__/x.png", b""), ("._a.png", b""), ("b.PNG", png(2)), ("b.json", b'{"label": 0}')]  # fmt: skip
    folder = tarfile.TarInfo("d")
    folder.type = tarfile.DIRTYPE
    (tmp_path / "x.tar").write_bytes(tar([folder, *members]))
    source = open_shards(str(tmp_path / "x.tar"))
    assert [(source.label(i), Path(source.name(i)).name) for i in range(len(source))] == [
        (1, "a.png"),
        (0, "b.PNG"),
    ]


# --- the index


def test_the_index_is_made_once_and_again_when_the_shard_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards(tmp_path / "s")
    pattern, made = str(tmp_path / "s" / "*.tar"), []
    monkeypatch.setattr("normfree.data.sources.tar_index.index_tar", _counting(made))
    first = open_shards(pattern)
    again = open_shards(pattern)
    assert len(made) == 3
    assert [first.name(i) for i in range(12)] == [again.name(i) for i in range(12)]
    assert [first.data(i) for i in range(12)] == [again.data(i) for i in range(12)]
    shards(tmp_path / "s", counts=(2,), first=6)
    assert len(open_shards(pattern)) == 9
    assert len(made) == 4
    with pytest.raises(
        ImageError, match=r"train-0\.tar/0000\.png: cannot be read: the file changed after it was indexed"
    ):
        first.image(0)


def _counting(made: list[str]) -> Any:
    from normfree.data.sources.tar_index import index_tar

    def count(file: Any, *, name: str, size: int) -> Any:
        made.append(name)
        return index_tar(file, name=name, size=size)

    return count


def test_a_damaged_or_forbidden_cache_costs_only_time(tmp_path: Path) -> None:
    shards(tmp_path / "s", counts=(3,))
    shard, cache = StoredFile(str(tmp_path / "s" / "train-0.tar")), tmp_path / "mine"
    wanted, _ = index_of(shard, cache=cache)
    (file,) = cache.iterdir()
    for content in (b"", b"PK nonsense", file.read_bytes()[:200]):
        file.write_bytes(content)
        found, _ = index_of(shard, cache=cache)
        assert found.names == wanted.names
        assert found.offsets.tolist() == wanted.offsets.tolist()
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder should be")
    assert index_of(shard, cache=blocked)[0].names == wanted.names
    assert [p.suffix for p in cache.iterdir()] == [".npz"]


# --- class names and the split


def test_class_names_next_to_the_shards(tmp_path: Path) -> None:
    folder = shards(tmp_path / "s")
    (folder / "classes.json").write_text('["ant", "bee", "cat"]')
    assert open_shards(str(folder / "train-*.tar")).classes == ("ant", "bee", "cat")
    (folder / "classes.txt").write_text("ä b\nc\nd\n\n", encoding="utf-8")
    assert open_shards(str(folder / "train-*.tar")).classes == ("ä b", "c", "d")
    (folder / "classes.txt").write_text("a\nb\n")
    assert error(folder / "train-*.tar") == (
        f"{folder}/train-0.tar has the class number 2 at '0002.png', but there are 2 class names. "
        "Allowed: 0 to 1. Fix: complete the list of classes."
    )
    (folder / "classes.txt").write_text("a\na\nb\n")
    assert error(folder / "train-*.tar") == (
        f"the classes.txt next to {folder}/train-0.tar is no list of classes. Allowed: two different names or more, "
        "one per line (classes.txt) or as a JSON list of strings (classes.json). Fix: write it again, or delete it."
    )


def test_specs_for_shards(tmp_path: Path) -> None:
    folder = shards(tmp_path / "s")
    shards(folder, "val", counts=(4,), first=100)
    named = open_source(f"shards:{folder}/train-{{0..2}}.tar,val={folder}/val-0.tar")
    assert (len(named.train), len(named.val), named.classes) == (12, 4, ("0", "1", "2"))
    assert named.notes == (
        f"{folder}/train-{{0..2}}.tar: 12 images to train on, 4 to validate, 3 classes",
        "validation is the part named for it",
    )
    found = open_source(folder)  # a folder of tars: *train*.tar and *val*.tar
    assert [found.train.name(i) for i in range(12)] == [named.train.name(i) for i in range(12)]
    assert [found.val.name(i) for i in range(4)] == [named.val.name(i) for i in range(4)]
    assert len(open_labeled(f"shards:{folder}/val-0.tar")) == 4
    assert len(open_labeled(folder)) == 4


def test_an_archive_next_to_class_folders_is_not_used(tmp_path: Path) -> None:
    shards(tmp_path)
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(2):
            make_image(i).save(tmp_path / name / f"{i}.png")
    split = open_source(tmp_path)
    assert (split.classes, len(split.train), len(split.val)) == (("a", "b"), 2, 2)


def test_odd_names_in_a_folder_of_shards(tmp_path: Path) -> None:
    shards(shards(tmp_path / "s"), "val")
    (tmp_path / "s" / "extra.tar").touch()
    with pytest.raises(ValueError, match=r".") as caught:
        open_source(tmp_path / "s")
    assert str(caught.value) == (
        f"{tmp_path}/s holds extra.tar, which matches not exactly one of *train*.tar and *val*.tar. "
        f"Allowed: shards of these two kinds, or of one kind. Fix: shards:{tmp_path}/s/...,val={tmp_path}/s/..."
    )


def test_without_a_validation_part_one_is_chosen_by_hash(tmp_path: Path) -> None:
    pattern = f"{shards(tmp_path / 's', counts=(30, 30))}/train-{{0,1}}.tar"
    one, again = (open_source(pattern, val_fraction=0.2, seed=3) for _ in range(2))
    held = [one.val.name(i) for i in range(len(one.val))]
    assert held == [again.val.name(i) for i in range(len(again.val))]
    assert sorted(one.val.label(i) for i in range(12)) == [0] * 4 + [1] * 4 + [2] * 4
    assert sorted([*held, *(one.train.name(i) for i in range(48))]) == sorted(
        open_shards(pattern).name(i) for i in range(60)
    )
    moved = open_source(shards(tmp_path / "moved", counts=(30, 30)), val_fraction=0.2, seed=3)
    assert [Path(moved.val.name(i)).name for i in range(len(held))] == [Path(name).name for name in held]
    other = open_source(pattern, val_fraction=0.2, seed=4)
    assert held != [other.val.name(i) for i in range(len(other.val))]


def test_parts_with_fewer_numbers_share_the_classes_of_the_larger(tmp_path: Path) -> None:
    folder = shards(tmp_path)
    (folder / "v.tar").write_bytes(
        tar([("a.png", png(0)), ("a.cls", b"0"), ("b.png", png(0)), ("b.cls", b"1")])
    )
    split = open_source(f"shards:{folder}/train-0.tar,val={folder}/v.tar")
    assert split.classes == split.train.classes == split.val.classes == ("0", "1", "2")


# --- patterns


def test_braces_and_stars(tmp_path: Path) -> None:
    assert [p.url for p in expand("a-{098..101}.tar")] == ["a-098.tar", "a-099.tar", "a-100.tar", "a-101.tar"]
    assert [p.url for p in expand("{b,a}/{8..10}")] == ["b/8", "b/9", "b/10", "a/8", "a/9", "a/10"]
    (tmp_path / "{1..2}.tar").touch()
    assert [p.url for p in expand(f"{tmp_path}/{{1..2}}.tar")] == [f"{tmp_path}/{{1..2}}.tar"]
    for name in ("b.tar", "a.tar"):
        (tmp_path / name).touch()
    assert [p.url for p in expand(f"{tmp_path}/[ab].tar")] == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("a-{0..3", "'a-{0..3' has braces that do not match. Allowed: {000..127} or {a,b}. Fix: close each."),
        ("a-{7}.tar", "'a-{7}.tar' has {7}. Allowed: {000..127} or {a,b}. Fix: leave out the braces."),
        ("{3..1}", "'{3..1}' counts from 3 to 1. Allowed: upward, at most 100,000 files. Fix: {1..3}."),
        ("{a,a}", "'{a,a}' names a file twice. Allowed: each once. Fix: check the braces."),
        (
            "no/*.tar",
            "'no/*.tar' matches no file. Allowed: the path or URL of tar files. Fix: check the path.",
        ),
        ("no-{1..2}.tar", f"no-1.tar: no such shard. {FORM} Fix: check the path."),
    ],
)
def test_errors_of_patterns(pattern: str, text: str) -> None:
    assert error(pattern) == text


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.tar")
    (tmp_path / "y.tar").mkdir()
    for name in ("x.tar", "y.tar"):
        text = f"{tmp_path}/{name} cannot be read: not a regular file. {FORM} Fix: check the path."
        assert error(tmp_path / name) == text


# --- hostile tars


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


GOOD = [("a.png", png(0)), ("a.cls", b"0"), ("b.png", png(1)), ("b.cls", b"1")]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            tar([*GOOD, ("c.png", png(2))]),
            "has no label for 'c.png'. {} Fix: add KEY.cls, or KEY.json with a whole number as \"label\".",
        ),
        (
            tar([*GOOD, ("c.cls", b"1")]),
            "has a label but no image for 'c'. {} Fix: keep both in one shard.",
        ),
        (
            tar([*GOOD, ("a.jpg", b"")]),
            "has two images for one key, 'a.png' and 'a.jpg'. {} Fix: one image per key.",
        ),
        (
            tar([*GOOD, ("a.png", png(0))]),
            "has two images for one key, 'a.png' and 'a.png'. {} Fix: one image per key.",
        ),
        (
            tar([*GOOD, ("a.cls", b"0")]),
            "has the member 'a.cls' twice. {} Fix: one label per key.",
        ),
        (
            tar([("a.png", b""), ("a.cls", b"cat")]),
            "has no class number in 'a.cls'. {} Fix: " + NUMBER,
        ),
        (
            tar([("a.png", b""), ("a.cls", b"-1")]),
            "has no class number in 'a.cls'. {} Fix: " + NUMBER,
        ),
        (
            tar([("a.png", b""), ("a.cls", b"99999999")]),
            "has no class number in 'a.cls'. {} Fix: " + NUMBER,
        ),
        (
            tar([("a.png", b""), ("a.json", b'{"label": true}')]),
            "has no class number in 'a.json'. {} Fix: " + NUMBER,
        ),
        (
            tar([("a.png", b""), ("a.json", b"[" * 99999)]),
            "has no class number in 'a.json'. {} Fix: " + NUMBER,
        ),
        (
            tar([("a.png", b""), ("a.json", b" " * (1 << 21))]),
            "has 2097152 bytes in 'a.json'. {} Fix: a label is one whole number.",
        ),
        (
            tar([special("l.png", tarfile.SYMTYPE, "/etc/passwd")]),
            "has 'l.png', a link. {} Fix: plain files only.",
        ),
        (
            tar([special("l.png", tarfile.LNKTYPE, "a.png")]),
            "has 'l.png', a link. {} Fix: plain files only.",
        ),
        (
            tar([special("d", tarfile.CHRTYPE)]),
            "has 'd', no regular file. {} Fix: plain files only.",
        ),
        (
            tar([("x.txt", b"")]),
            "holds no images. {} Fix: check the pattern.",
        ),
        (
            gzip.compress(tar(list(GOOD))),
            "is compressed with gzip, so images cannot be read at an offset. {} Fix: unpack it to a plain tar.",
        ),
        (
            tar(list(GOOD)) + tar(list(GOOD)),
            "goes on after its end at byte 4096. {} Fix: keep joined tars as shards of their own.",
        ),
    ],
)
def test_what_a_shard_must_not_hold(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    assert error(tmp_path / "x.tar") == f"{tmp_path}/x.tar " + text.format(FORM)


def test_names_are_labels_and_never_paths(tmp_path: Path) -> None:
    names = ["/etc/passwd.png", "../../up.png", "a\nb\x1b[31m.png", "\udcff.png"]
    labels = [(name.replace(".png", ".cls"), b"%d" % i) for i, name in enumerate(names)]
    (tmp_path / "x.tar").write_bytes(tar([*((name, png(i)) for i, name in enumerate(names)), *labels]))
    before = sorted(tmp_path.parent.rglob("*"))
    source = open_shards(str(tmp_path / "x.tar"), cache=tmp_path)
    shown = [source.name(i).removeprefix(f"{tmp_path}/x.tar/") for i in range(4)]
    assert shown == ["/etc/passwd.png", "../../up.png", "a\\nb\\x1b[31m.png", "\\udcff.png"]
    assert [source.data(i) for i in range(4)] == [png(i) for i in range(4)]
    assert len(sorted(tmp_path.parent.rglob("*"))) == len(before) + 1  # the index, nothing else


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    content = tar(list(GOOD))
    path = tmp_path / "x.tar"
    for length in [*range(0, 4096, 256), 4096, 4100]:
        path.write_bytes(content[:length])
        text = error(path)
        assert text.startswith(f"{path} is no tar, or damaged") or text.startswith(f"{path} is truncated"), (
            length
        )


def test_damage_never_passes_in_silence_or_hangs(tmp_path: Path) -> None:
    # Each header field of each member overwritten: either a ValueError, or all four members still as they were.
    content = tar(list(GOOD))
    path = tmp_path / "x.tar"
    refused = 0
    for block in (0, 1024, 2048, 3072):
        for start, junk in [(0, b"\xff" * 8), (124, b"\x80" + b"\xff" * 11), (124, b"77777777777\0"),
                            (124, b"\xff" * 12), (148, b"0000000\0"), (156, b"x"), (156, b"S"),
                            (0, b"\0" * 512)]:  # fmt: skip
            damaged = bytearray(content)
            damaged[block + start : block + start + len(junk)] = junk
            for repaired in (False, True):
                if repaired and start != 148:
                    damaged[block + 148 : block + 156] = b" " * 8
                    damaged[block + 148 : block + 156] = b"%06o\0 " % sum(damaged[block : block + 512])
                path.write_bytes(damaged)
                with pytest.raises(ValueError, match=r"^.*x\.tar .*\. Allowed: .*\. Fix: [^\n]*$"):
                    open_shards(str(path))
                refused += 1
    assert refused == 64


def test_a_damaged_header_says_where_it_is(tmp_path: Path) -> None:
    content = bytearray(tar(list(GOOD)))
    content[2048:2056] = b"\xff" * 8
    (tmp_path / "x.tar").write_bytes(content)
    assert error(tmp_path / "x.tar") == (
        f"{tmp_path}/x.tar has a damaged header at byte 2048. {FORM} Fix: make it again."
    )


def test_a_name_of_megabytes_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar([*GOOD, ("n" * (1 << 21) + ".png", b"")]))
    assert error(tmp_path / "x.tar") == (
        f"{tmp_path}/x.tar is no tar, or damaged after byte 3072 (a header or label of 2097664 bytes). {FORM} "
        "Fix: make it again."
    )


# --- stores


def test_shards_in_an_object_store(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    shards(tmp_path / "s")
    for path in sorted((tmp_path / "s").iterdir()):
        memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    memory.pipe_file("/bucket/classes.txt", b"ant\nbee\ncat\n")
    for pattern in ("memory://bucket/train-{0..2}.tar", "memory://bucket/train-*.tar"):
        source = open_shards(pattern)
        assert source.classes == ("ant", "bee", "cat")
        assert source.name(0).endswith("/bucket/train-0.tar/0000.png")
        for batch, wanted in zip(stream(source), stream(arrays(12)), strict=True):
            assert torch.equal(batch.images, wanted.images)
    memory.rm("/bucket", recursive=True)


class Server(http.server.SimpleHTTPRequestHandler):
    ranges = True
    asked: list[str] = []  # noqa: RUF012

    def log_message(self, *_: Any) -> None:
        pass

    def send_head(self) -> Any:
        path = Path(self.translate_path(self.path.partition("?")[0]))
        if not path.is_file():
            return self.send_error(404)
        data, asked = path.read_bytes(), self.headers.get("Range")
        if asked and self.ranges:
            self.asked.append(asked)
            start, _, end = asked.removeprefix("bytes=").partition("-")
            low, high = int(start), min(int(end or len(data)), len(data) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {low}-{high}/{len(data)}")
            data = data[low : high + 1]
        else:
            self.send_response(200)
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        return io.BytesIO(data)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Any]:
    servers = []

    def start(**settings: Any) -> str:
        kind = type("Kind", (Server,), {"asked": [], **settings})
        server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(kind, directory=str(tmp_path / "s"))
        )
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_shards_behind_http_with_workers(tmp_path: Path, serve: Any) -> None:
    shards(tmp_path / "s")
    whole = open_shards(f"{serve()}/train-{{0..2}}.tar")
    for batch, wanted in zip(stream(whole, workers=2), stream(arrays(12)), strict=True):
        assert torch.equal(batch.images, wanted.images)


def test_a_server_without_ranges_is_refused(tmp_path: Path, serve: Any) -> None:
    shards(tmp_path / "s")
    address = serve(ranges=False)
    assert error(f"{address}/train-0.tar") == (
        f"{address}/train-0.tar cannot be read: the server does not support range requests. {FORM} "
        "Fix: check the store."
    )
    assert error(f"{address}/none.tar") == f"{address}/none.tar: no such shard. {FORM} Fix: check the path."


def test_secrets_of_a_url_are_not_shown() -> None:
    assert StoredFile("https://me:pw@host:1/a/b.tar?sig=x").shown == "https://host:1/a/b.tar"


def test_without_fsspec_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'^s3:// needs fsspec, .* pip install "normfree\[remote\]"\.$'
    ):
        open_shards("s3://bucket/a.tar")
    monkeypatch.undo()
    with pytest.raises(ModuleNotFoundError, match=r"^s3:// needs a driver for fsspec: Install s3fs"):
        open_shards("s3://bucket/a.tar")
    assert error("nosuch://bucket/a.tar").startswith(
        "nosuch://bucket/a.tar cannot be read: Protocol not known: nosuch"
    )
