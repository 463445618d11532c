from __future__ import annotations

import multiprocessing
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from normfree.data.loader import Batch, eval_batches, train_batches
from normfree.data.seeds import key, permutation
from normfree.data.source import ArraySource
from normfree.data.sources.folders import FolderSource
from normfree.data.transforms.decode import ImageError
from normfree.data.transforms.evaluate import eval_transform
from normfree.data.transforms.mixing import FreshPairs
from normfree.data.transforms.train import train_transform


def make_source(n: int, *, tones: int = 1) -> ArraySource:
    images = np.random.default_rng(0).integers(0, 256, (n * tones, 10, 12, 3), dtype=np.uint8)
    rows = [range(i * tones, (i + 1) * tones) for i in range(n)]
    return ArraySource(
        images, [i % 3 for i in range(n)], classes="abc", names=[f"id{i}" for i in range(n)], rows=rows
    )


def stream(source: Any, *, start_step: int = 0, num_steps: int = 9, **options: Any) -> list[Batch]:
    options = {"batch_size": 6, "seed": 5, **options}
    transform = train_transform(image_size=8, randaugment="tv:2x9")
    return list(train_batches(source, transform, start_step=start_step, num_steps=num_steps, **options))


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert [(b.step, b.epoch, b.names) for b in left] == [(b.step, b.epoch, b.names) for b in right]
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.indices, b.indices)


def test_the_stream_is_the_formula() -> None:
    batches = stream(make_source(10), num_steps=10)
    seen = torch.cat([batch.indices for batch in batches]).tolist()
    expected = np.concatenate([permutation(10, 5, "order", epoch) for epoch in range(6)])
    assert seen == expected.tolist()
    assert [batch.step for batch in batches] == list(range(10))
    assert [batch.epoch for batch in batches] == [6 * step // 10 for step in range(10)]
    for batch in batches:
        assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (6, 3, 8, 8))
        assert batch.labels.tolist() == [i % 3 for i in batch.indices.tolist()]
        assert batch.names == tuple(f"id{i}" for i in batch.indices.tolist())
        assert len(batch) == 6


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # said where there are fewer cores
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_change_nothing(workers: int) -> None:
    source = make_source(10, tones=3)
    assert_same(stream(source, workers=workers), stream(source))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_is_the_tail_of_the_whole(workers: int) -> None:
    source = make_source(10, tones=3)
    whole = stream(source)
    for start in (0, 1, 4, 8, 9):
        assert_same(stream(source, start_step=start, workers=workers), whole[start:])


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_parts_of_the_ranks_make_the_whole(world_size: int) -> None:
    source = make_source(10, tones=3)
    ranks = [stream(source, rank=rank, world_size=world_size) for rank in range(world_size)]
    for whole, *parts in zip(stream(source), *ranks, strict=True):
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        assert sum((part.names for part in parts), ()) == whole.names
        assert {len(part) for part in parts} == {6 // world_size}
        assert {(part.step, part.epoch) for part in parts} == {(whole.step, whole.epoch)}


def test_a_batch_may_be_larger_than_the_data() -> None:
    batches = stream(make_source(4), batch_size=10, num_steps=2)
    assert torch.cat([batch.indices for batch in batches]).bincount().tolist() == [5, 5, 5, 5]
    first = batches[0]
    same = [i for i in range(10) if first.indices[i] == first.indices[0]]
    assert not torch.equal(
        first.images[same[0]], first.images[same[1]]
    )  # another epoch, another augmentation


def shown(batches: list[Batch]) -> list[tuple[int, bytes]]:
    return [
        (i, x.numpy().tobytes()) for b in batches for i, x in zip(b.indices.tolist(), b.images, strict=True)
    ]


def test_without_repeats_the_draws_are_the_formula() -> None:
    source, transform = make_source(10, tones=3), train_transform(image_size=8, randaugment="tv:2x9")
    expected = []
    for q in range(24):
        epoch, index = q // 10, int(permutation(10, 5, "order", q // 10)[q % 10])
        number = key(5, "augment", epoch, index)
        torch.manual_seed(number)
        expected.append((index, transform(source.image(index, draw=number)).numpy().tobytes()))
    assert shown(stream(source, num_steps=4)) == expected
    assert shown(stream(source, num_steps=4, repeats=1)) == expected


@pytest.mark.parametrize("repeats", [2, 3, 6])
def test_repeats_change_the_order_alone(repeats: int) -> None:
    source = make_source(10, tones=3)
    # `repeats` epochs of 10 are whole steps of 6 for 6 epochs; each sample is shown 6 times in both streams
    plain, repeated = stream(source, num_steps=10), stream(source, num_steps=10, repeats=repeats)
    assert sorted(shown(plain)) == sorted(shown(repeated))
    assert shown(plain) != shown(repeated)
    assert [b.epoch for b in plain] == [b.epoch for b in repeated]


@pytest.mark.parametrize("repeats", [2, 3, 6])
def test_the_copies_of_a_sample_share_a_batch_and_no_draw(repeats: int) -> None:
    order = np.concatenate([permutation(16, 5, "order", turn) for turn in range(2)]).tolist()
    batches = stream(make_source(16), num_steps=5, repeats=repeats)
    for batch in batches:
        images = 6 // repeats
        wanted = order[batch.step * images : (batch.step + 1) * images]
        assert batch.indices.tolist() == [i for i in wanted for _ in range(repeats)]
    assert len({pixels for _, pixels in shown(batches)}) == 30


@pytest.mark.parametrize("pairs", [None, FreshPairs(mixup=0.2, cutmix=1.0)])
def test_repeated_batches_depend_on_seed_and_step_alone(pairs: FreshPairs | None) -> None:
    source = make_source(7, tones=2)
    whole = stream(source, repeats=3, pairs=pairs)
    assert_same(stream(source, repeats=3, pairs=pairs, workers=2), whole)
    for start in (1, 4, 9):
        assert_same(stream(source, repeats=3, pairs=pairs, start_step=start), whole[start:])
    # parts of two and of three, so that copies are on different ranks
    for size in (2, 3):
        ranks = [stream(source, repeats=3, pairs=pairs, rank=rank, world_size=size) for rank in range(size)]
        for batch, *parts in zip(whole, *ranks, strict=True):
            assert torch.equal(torch.cat([part.images for part in parts]), batch.images)


def test_no_sample_is_mixed_with_its_own_copy() -> None:
    # two quarters of 3 and more: the partner is at least `repeats` positions later
    for batch in stream(make_source(30), repeats=3, batch_size=6, pairs=FreshPairs(mixup=0.2, cutmix=1.0)):
        order = permutation(30, 5, "order", batch.step * 4 // 30).tolist()
        images = order[batch.step * 4 % 30 : batch.step * 4 % 30 + 4]
        if len(images) == 4:
            own = [images[0]] * 3 + [images[2]] * 3
            other = [images[1]] * 3 + [images[3]] * 3
            assert batch.indices.tolist() == own
            assert batch.partners.tolist() == [i % 3 for i in other]


def test_seeds_and_epochs_differ() -> None:
    source = make_source(30)
    one, other = stream(source, num_steps=5), stream(source, num_steps=5, seed=6)
    assert [b.names for b in one] != [b.names for b in other]
    ten = stream(source, num_steps=10)
    assert [b.names for b in ten[:5]] != [b.names for b in ten[5:]]


def test_augmentation_depends_on_the_sample_not_on_its_batch() -> None:
    source = make_source(12)
    by_six = {
        (b.epoch, n): x for b in stream(source, num_steps=4) for n, x in zip(b.names, b.images, strict=True)
    }
    by_four = stream(source, num_steps=6, batch_size=4)
    for batch in by_four:
        for name, image in zip(batch.names, batch.images, strict=True):
            assert torch.equal(image, by_six[batch.epoch, name])


def test_training_draws_among_the_images_of_a_sample_and_evaluation_does_not() -> None:
    source = make_source(2, tones=4)
    squash = eval_transform(image_size=8, crop="squash")
    batches = train_batches(source, squash, batch_size=2, seed=0, num_steps=40)
    shown = {(n, x.numpy().tobytes()) for b in batches for n, x in zip(b.names, b.images, strict=True)}
    assert len(shown) == 8
    (batch,) = eval_batches(source, squash, batch_size=2)
    assert torch.equal(batch.images, torch.stack([squash(source.image(i)) for i in range(2)]))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_callers_random_state_is_left_alone(workers: int) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    batches = train_batches(
        make_source(10), train_transform(image_size=8), batch_size=4, seed=0, num_steps=4, workers=workers
    )
    for _ in batches:
        assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


def test_the_callers_random_state_does_not_matter() -> None:
    source = make_source(10)
    torch.manual_seed(1)
    first = stream(source)
    torch.manual_seed(2)
    assert_same(stream(source), first)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_everything_once_and_in_order(world_size: int, workers: int) -> None:
    if workers and world_size != 2:
        world_size = 1  # starting processes is slow; the parts are tested without them
    source = make_source(11)
    squash = eval_transform(image_size=8, crop="squash")
    batches = [
        batch
        for rank in range(world_size)
        for batch in eval_batches(
            source, squash, batch_size=4, workers=workers, rank=rank, world_size=world_size
        )
    ]
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(11))
    assert torch.cat([batch.labels for batch in batches]).tolist() == [i % 3 for i in range(11)]
    assert all(1 <= len(batch) <= 4 for batch in batches)
    assert torch.equal(
        torch.cat([b.images for b in batches]), torch.stack([squash(source.image(i)) for i in range(11)])
    )


def test_more_ranks_than_samples() -> None:
    squash = eval_transform(image_size=8, crop="squash")
    counts = [
        sum(len(b) for b in eval_batches(make_source(2), squash, batch_size=4, rank=rank, world_size=5))
        for rank in range(5)
    ]
    assert (sum(counts), max(counts)) == (2, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_is_named_name_for_name(tmp_path: Path, workers: int) -> None:
    for i in range(6):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"")
    source = FolderSource(tmp_path, [(f"{i}.png", 0) for i in range(6)], classes=("a",))
    before = set(multiprocessing.active_children())
    with pytest.raises(ImageError) as caught:
        stream(source, workers=workers)
    assert (
        set(multiprocessing.active_children()) <= before
    )  # though the error still holds the loader's frames
    assert str(caught.value) == f"{tmp_path / '3.png'}: the file is empty"


def test_closing_early_stops_the_workers() -> None:
    before = set(multiprocessing.active_children())
    batches = train_batches(
        make_source(10), train_transform(image_size=8), batch_size=4, seed=0, num_steps=10**6, workers=2
    )
    next(batches)
    assert len(set(multiprocessing.active_children()) - before) == 2
    batches.close()
    assert set(multiprocessing.active_children()) <= before


def test_wrong_arguments_are_refused_before_the_first_batch() -> None:
    source, transform = make_source(4), train_transform(image_size=8)

    def text(**options: int) -> str:
        with pytest.raises(ValueError, match=r".") as caught:
            train_batches(source, transform, **{"batch_size": 4, "seed": 0, "num_steps": 2, **options})
        return str(caught.value)

    assert text(batch_size=0) == "batch_size=0. Allowed: 1 or more. Fix: batch_size=1."
    assert text(workers=-1) == "workers=-1. Allowed: 0 or more. Fix: workers=0."
    assert text(rank=2, world_size=2) == "rank=2 of 2. Allowed: 0 to 1. Fix: rank=1."
    assert text(batch_size=7, world_size=3) == (
        "batch_size=7 for 3 processes. Allowed: multiples of 3, as each process takes an equal part. Fix: batch_size=6."
    )
    assert text(repeats=3) == (
        "repeats=3 with batch_size=4. Allowed: 1 or more, and a divisor of batch_size, as the copies of a sample "
        "share a batch. Fix: repeats=2."
    )
    assert text(repeats=0).endswith("Fix: repeats=1.")
    assert text(start_step=3) == (
        "start_step=3 of num_steps=2. Allowed: 0 to 2. "
        "Fix: num_steps counts the steps of the whole run, including the finished ones."
    )
    empty = FolderSource(Path(), [], classes=("a", "b"))
    with pytest.raises(
        ValueError, match=r"the source has no samples\. Allowed: at least one\. Fix: check the path."
    ):
        eval_batches(empty, transform, batch_size=1)
