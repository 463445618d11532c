"""The images of an experiment: T to train on, V to choose rates and λ on, and test images that choose nothing.

T and V are parts of the training images; the test images are the test part of the data, or their validation part if
they have none. The images are resized and packed once for each preset, so that all cells read the same files quickly.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.cells import Setup
from normfree.data.seeds import permutation
from normfree.data.source import Source
from normfree.data.sources.open import open_source
from normfree.data.sources.packed import pack
from normfree.data.subset import Joined, Subset
from normfree.files import atomic_write_text
from normfree.suggest import problem

PARTS = ("train", "choice", "test")  # T, V and the test images


def balanced(source: Source, count: int, *, salt: str = "batch_size") -> Subset:
    """Return `count` images of a source, balanced over classes as far as possible, chosen by a fixed permutation.

    The images of a smaller number are among those of a larger one.

    Args:
        source: the images.
        count: how many.
        salt: of the permutation.

    Raises:
        ValueError: the source has fewer images.
    """
    if count > len(source):
        given = f"{count} images are requested and the data has {len(source)}"
        raise ValueError(problem(given, allowed=f"at most {len(source)}", fix="pass another --data"))
    members: dict[int, list[int]] = {}
    for index in permutation(len(source), 0, salt):
        members.setdefault(source.label(int(index)), []).append(int(index))
    order = sorted((rank, label, i) for label, own in members.items() for rank, i in enumerate(own))
    return Subset(source, sorted(i for _, _, i in order[:count]))


def of_classes(source: Source, numbers: Sequence[int]) -> Source:
    """Return the images of some classes, with these classes only."""
    from normfree.data.subset import Relabeled

    kept = Subset(source, [i for i in range(len(source)) if source.label(i) in numbers])
    return Relabeled(kept, [source.classes[number] for number in numbers])


def three_parts(data: str, *, train: int, choice: int, test: int) -> dict[str, Source]:
    """Return T, V and the test images of any data, by the names in PARTS.

    Raises:
        ValueError: the data have fewer images.
    """
    split = open_source(data, test_fraction=0.5)
    pool: Source = split.train if split.test is None else Joined([split.train, split.val])
    both = balanced(pool, train + choice)
    chosen = balanced(both, choice, salt="choice")
    names = {chosen.name(i) for i in range(len(chosen))}
    rest = Subset(both, [i for i in range(len(both)) if both.name(i) not in names])
    return {"train": rest, "choice": chosen, "test": balanced(split.test or split.val, test)}


def packed_parts(setup: Setup, *, train: int, choice: int, test: int, size: int) -> dict[str, Path]:
    """Pack the three parts into files of the preset's folder, unless they exist; return the files by name.

    Raises:
        ValueError: the files hold other data, or the data have fewer images.
    """
    folder = setup.folder / f"images-{train}-{choice}-{test}-{size}px"
    files = {part: folder / f"{part}.packed" for part in PARTS}
    record = folder / "data.txt"  # the data that the files were made from
    if not record.exists():
        for part, source in three_parts(setup.data, train=train, choice=choice, test=test).items():
            pack(source, files[part], size=size)
        atomic_write_text(record, setup.data + "\n")
    before = record.read_text(encoding="utf-8").strip()
    if before != setup.data:
        given = f"{folder} has images of {before}, not of {setup.data}"
        raise ValueError(
            problem(given, allowed="one data set for each folder of runs", fix="pass another --runs")
        )
    return files


def open_part(files: dict[str, Path], part: str) -> Source:
    """Return the images of one part: "train" (T), "choice" (V) or "test"."""
    return open_source(f"packed:{files[part]},val={files[part]}").train
