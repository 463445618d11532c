from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from normfree.data.loader import Batch, eval_batches, train_batches
from normfree.data.sampler import TrainSampler
from normfree.data.source import ArraySource
from normfree.data.sources.huggingface_stream import HuggingFaceStreamSource
from normfree.data.sources.open import open_labeled, open_source
from normfree.data.transforms.decode import ImageError
from normfree.data.transforms.evaluate import eval_transform
from normfree.data.transforms.mixing import FreshPairs
from normfree.data.transforms.train import train_transform

NAMES = ["ant", "bee", "cat"]
FILES = (23, 9, 30, 1, 17)  # rows of each
TOTAL = sum(FILES)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def make_image(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 11, 3), dtype=np.uint8))


def table(numbers: range, labels: list[Any], *, kind: Any) -> Any:
    cells = []
    for i in numbers:
        buffer = io.BytesIO()
        make_image(i).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    return datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features)


def folder(root: Path, *, by_class: bool = False, texts: bool = False, files: tuple[int, ...] = FILES) -> str:
    """Write parquet files of `files` rows to train on, and 4 rows to validate; image i is number i, its class i % 3."""
    (root / "data").mkdir(parents=True)
    starts = np.cumsum([0, *files]).tolist()
    kind = datasets.Value("string") if texts else datasets.ClassLabel(names=NAMES)
    parts = [("train", range(a, b), k) for k, (a, b) in enumerate(pairwise(starts))]
    for name, numbers, k in [*parts, ("validation", range(100, 104), 0)]:
        labels: list[Any] = [3 * i // starts[-1] if by_class and name == "train" else i % 3 for i in numbers]
        labels = [NAMES[label] for label in labels] if texts else labels
        table(numbers, labels, kind=kind).to_parquet(
            root / "data" / f"{name}-{k:05}-of-{len(files) if name == 'train' else 1:05}.parquet"
        )
    return f"hf:{root},streaming=yes"


def message(spec: str, **options: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        open_source(spec, **options)
    return str(caught.value)


class InMemory(ArraySource):
    """The same images in memory, in the order of the stream."""

    def __init__(self, stream: Any) -> None:
        images = np.stack([np.asarray(make_image(i)) for i in range(TOTAL)])
        names = [stream.name(i) for i in range(TOTAL)]
        super().__init__(images, [i % 3 for i in range(TOTAL)], classes=NAMES, names=names)
        self.order = stream.order

    def read(self, indices: Sequence[int]) -> dict[int, Any]:
        """Return nothing: the images are in memory."""
        return {}

    def hold(self, data: dict[int, Any]) -> None:
        """Ignore the data."""


def stream(source: Any, *, start_step: int = 0, num_steps: int = 30, **options: Any) -> list[Batch]:
    options = {"batch_size": 6, "seed": 5, **options}
    transform = train_transform(image_size=8)
    return list(train_batches(source, transform, start_step=start_step, num_steps=num_steps, **options))


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert [(b.step, b.epoch, b.names) for b in left] == [(b.step, b.epoch, b.names) for b in right]
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("texts", [False, True])
def test_a_stream_has_the_rows_of_the_set(tmp_path: Path, texts: bool) -> None:
    spec = folder(tmp_path, texts=texts)
    split, plain = open_source(spec), open_source(f"hf:{tmp_path}")
    assert not split.files
    assert split.classes == tuple(NAMES)
    assert split.notes[2] == (
        "read as a stream: 5 files in a new order each epoch, and 1000 images shuffled with each other; "
        "a resumed run reads its files again up to its position"
    )
    assert len(split.notes) == 3
    for left, right in ((split.train, plain.train), (split.val, plain.val), (open_labeled(spec), plain.val)):
        assert len(left) == len(right)
        for i in (*range(len(left)), 3, 0, 2):
            assert (left.label(i), left.name(i)) == (right.label(i), right.name(i))
            assert left.image(i).tobytes() == right.image(i).tobytes()


@pytest.mark.parametrize("buffer", [1, 5, 20, 1000])
def test_the_order_holds_each_row_once_and_mixes_blocks_of_the_buffer(tmp_path: Path, buffer: int) -> None:
    source: Any = open_source(f"{folder(tmp_path)},buffer={buffer}").train
    orders = [source.order(seed, turn) for seed, turn in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert sorted(order.tolist()) == list(range(TOTAL))
    assert len({order.tobytes() for order in orders}) == 3
    assert np.array_equal(source.order(0, 1), orders[1])
    # row r of a file stands in block r // piece: the blocks follow each other
    piece, starts = max(1, buffer // 5), np.cumsum([0, *FILES])
    rows = [i - starts[np.searchsorted(starts, i, side="right") - 1] for i in orders[0]]
    blocks = [row // piece for row in rows]
    assert blocks == sorted(blocks)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("options", [{}, {"repeats": 3}, {"pairs": FreshPairs(mixup=0.2, cutmix=1.0)}])
def test_batches_are_those_of_the_images_in_memory_whatever_the_workers(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    source: Any = open_source(f"{folder(tmp_path)},buffer=20").train
    wanted = stream(InMemory(source), **options)
    assert_same(stream(source, **options), wanted)
    assert_same(stream(source, workers=2, **options), wanted)
    assert_same(stream(pickle.loads(pickle.dumps(source)), **options), wanted)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_resumed_stream_and_the_parts_of_the_ranks(tmp_path: Path, world_size: int) -> None:
    spec = f"{folder(tmp_path)},buffer=20"
    wanted = stream(InMemory(open_source(spec).train))
    for start in (1, 12, 29):
        ranks = [
            stream(open_source(spec).train, start_step=start, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        for batch, *parts in zip(wanted[start:], *ranks, strict=True):
            assert torch.equal(torch.cat([part.images for part in parts]), batch.images)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_evaluation_sees_everything_once_and_in_order(tmp_path: Path, world_size: int) -> None:
    source = open_source(folder(tmp_path)).train
    squash = eval_transform(image_size=8, crop="squash")
    parts = [
        batch.images
        for rank in range(world_size)
        for batch in eval_batches(source, squash, batch_size=7, rank=rank, world_size=world_size)
    ]
    assert torch.equal(torch.cat(parts), torch.stack([squash(make_image(i)) for i in range(TOTAL)]))


class Counted:
    """The rows of a stream, with counters of opened files and of rows read."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.begun, self.taken = rows, 0, 0

    def shard(self, *, num_shards: int, index: int) -> Any:
        self.begun += 1
        return Counter(self, self.rows.shard(num_shards=num_shards, index=index))


class Counter:
    def __init__(self, counts: Counted, rows: Any) -> None:
        self.counts, self.rows = counts, rows

    def skip(self, n: int) -> Counter:
        return Counter(self.counts, self.rows.skip(n))

    def __iter__(self) -> Any:
        for row in self.rows:
            self.counts.taken += 1
            yield row


@pytest.mark.parametrize("batch_size", [2, 8])
def test_each_row_is_taken_once_an_epoch_and_few_are_kept(tmp_path: Path, batch_size: int) -> None:
    source: Any = open_source(f"{folder(tmp_path)},buffer=5").train
    counted = source._rows = Counted(source._rows)
    steps = range(3 * TOTAL // batch_size)
    sampler = TrainSampler(
        TOTAL, batch_size=batch_size, steps=steps, order=lambda cycle: source.order(0, cycle)
    )
    for _, _, refs in sampler:
        for index, data in source.read([index for _, index in refs]).items():
            assert Image.open(io.BytesIO(data)).tobytes() == make_image(index).tobytes()
        assert sum(map(len, source._pieces.values())) <= 2 * 5
    assert (counted.begun, counted.taken) == (3 * len(FILES), 3 * TOTAL)


def test_only_a_sorted_stream_is_noted(tmp_path: Path) -> None:
    spec = f"{folder(tmp_path / 'a', by_class=True, files=(120,))},buffer=10"
    assert open_source(spec).notes[3] == (
        "the stream is sorted: 10 images in a row hold 1.0 classes on average, 2.9 if they were shuffled; networks "
        "train badly on sorted data. Raise buffer=, or leave out streaming"
    )
    assert len(open_source(f"{folder(tmp_path / 'b', files=(120,))},buffer=10").notes) == 3
    many = folder(tmp_path / "c", by_class=True, files=(8,) * 15)  # sorted too, but the files meet in a block
    assert len(open_source(f"{many},buffer=30").notes) == 3


def test_a_folder_of_images(tmp_path: Path) -> None:
    for part, numbers in (("train", range(12)), ("validation", range(12, 18))):
        for i in numbers:
            path = tmp_path / part / NAMES[i % 3] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            make_image(i).save(path)
    split = open_source(f"hf:{tmp_path},streaming=yes")
    assert sorted(split.train.image(i).tobytes() for i in range(12)) == sorted(
        make_image(i).tobytes() for i in range(12)
    )
    assert [split.val.label(i) for i in range(6)] == [0, 0, 1, 1, 2, 2]
    assert split.val.image(3).tobytes() == make_image(16).tobytes()


def test_a_stream_that_breaks_off_or_has_become_shorter_is_named(tmp_path: Path) -> None:
    source: Any = open_source(folder(tmp_path)).train
    rows, more = source._rows, (FILES[0] + 1, *FILES[1:])
    options: dict[str, Any] = {"image": "image", "classes": NAMES, "prefix": "here"}
    longer = HuggingFaceStreamSource(rows, labels=np.zeros(TOTAL + 1, dtype=np.int64), counts=more, **options)
    with pytest.raises(ImageError) as caught:
        stream(longer, workers=1)
    assert str(caught.value) == "here/23: the stream has ended: it is shorter than when its rows were counted"
    (tmp_path / "data" / "train-00002-of-00005.parquet").unlink()
    with pytest.raises(ImageError, match=r"^here/32: the stream broke off: "):
        HuggingFaceStreamSource(rows, labels=np.zeros(TOTAL, dtype=np.int64), counts=FILES, **options).image(
            40
        )


def test_a_row_without_a_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    data = datasets.Dataset.from_dict({"image": [None, None], "label": [0, 1]}, features=features)
    for name in ("train", "validation"):
        data.to_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    source = open_source(f"hf:{tmp_path},streaming=yes").train
    with pytest.raises(ImageError, match=rf"^{tmp_path}/train/[01]: the row has no image$"):
        stream(source)


def test_streaming_is_the_users_own_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = folder(tmp_path)
    real, asked = datasets.load_dataset, []

    def load(name: str, subset: str | None, **options: Any) -> Any:
        asked.append((name, options))
        return real(str(tmp_path), subset, **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert message("hf:owner/set,streaming=no").startswith("'hf:owner/set' is no folder here.")
    assert asked == []
    assert len(open_source("hf:owner/set,streaming=yes").train) == TOTAL
    assert asked[0] == ("owner/set", {"revision": None, "streaming": True})
    assert asked[1] == ("owner/set", {"revision": None, "streaming": True, "columns": ["label"]})
    assert message("hf:./owner,streaming=yes").startswith("'hf:./owner' is no folder here.")
    assert local.endswith("streaming=yes")


def test_errors_of_streams(tmp_path: Path) -> None:
    spec = folder(tmp_path / "a")
    plain = spec.removesuffix(",streaming=yes")
    assert message(f"{plain},streaming=true") == "streaming=true. Allowed: yes or no. Fix: streaming=yes."
    assert message(f"{spec},buffer=0") == "buffer=0. Allowed: a whole number from 1. Fix: buffer=1000."
    assert message(f"{plain},buffer=10") == (
        "buffer=10 without streaming=yes. Allowed: both or none; without streaming the whole set is shuffled. "
        "Fix: leave out buffer."
    )
    assert message(f"{spec},split=validation,val=nothing").startswith(f"'{plain}' has no split 'nothing'.")
    assert message(f"{spec},image=label").startswith(f"the column 'label' of '{plain}' holds ClassLabel(")
    (tmp_path / "a" / "data" / "validation-00000-of-00001.parquet").unlink()
    assert message(spec) == (
        f"'{plain}' has no split to validate on, and a stream cannot be divided. Allowed: a second split, or a set "
        "without streaming. Fix: leave out streaming."
    )
    table(range(3), [0, 1, 2], kind=datasets.ClassLabel(names=NAMES)).save_to_disk(tmp_path / "saved")
    assert message(f"hf:{tmp_path / 'saved'},streaming=yes") == (
        f"'hf:{tmp_path / 'saved'}' was written by save_to_disk, which is read in place. Allowed: streaming=yes for "
        "parquet and other files, or for a name on the hub. Fix: leave out streaming."
    )
