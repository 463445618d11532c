from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from normfree.data.loader import train_batches
from normfree.data.source import ArraySource
from normfree.data.sources.folders import FolderSource
from normfree.data.sources.open import open_labeled, open_source
from normfree.data.sources.packed import PackedSource, pack
from normfree.data.transforms.decode import ImageError
from normfree.data.transforms.train import train_transform


def source(count: int = 10, *, side: int = 12) -> ArraySource:
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    names = [f"ä{i}\n" for i in range(count)]
    return ArraySource(images, [i % 3 for i in range(count)], classes=("a", "b", "ç"), names=names)


def error(path: Path, **options: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        PackedSource(path, **options)
    return str(caught.value)


def test_images_of_the_right_size_come_back_exactly(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    wanted = source()
    path = pack(wanted, tmp_path / "new" / "x.safetensors", size=12, progress=lambda *at: told.append(at))
    packed = PackedSource(path)
    assert (len(packed), packed.classes, packed.size) == (10, wanted.classes, 12)
    for i in range(10):
        assert packed.image(i).tobytes() == wanted.image(i).tobytes()
        assert (packed.label(i), packed.name(i)) == (wanted.label(i), wanted.name(i))
    assert told == [(i, 10) for i in range(1, 11)]
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    wanted = source()
    found = load_file(pack(wanted, tmp_path / "x", size=12))
    assert found["images"].dtype == np.uint8
    assert np.array_equal(found["images"][3], np.asarray(wanted.image(3)))
    assert found["labels"].tolist() == [i % 3 for i in range(10)]


def test_other_sizes_are_resized_straight_to_the_square(tmp_path: Path) -> None:
    u, v = np.meshgrid(np.linspace(0, 255, 40), np.linspace(0, 255, 30))
    ramp = np.stack([u, v, (u + v) / 2], axis=2).round().astype(np.uint8)
    wide = ArraySource(ramp[None].repeat(2, 0), [0, 1], classes="ab", names="xy")
    packed = np.asarray(PackedSource(pack(wide, tmp_path / "x", size=10)).image(1)).astype(int)
    block = ramp.reshape(10, 3, 10, 4, 3).mean((1, 3))  # a ramp's resized pixel is the mean of what it covers
    assert np.abs(packed - block)[1:-1, 1:-1].max() <= 1


def test_batches_are_those_of_the_source_whatever_the_workers(tmp_path: Path) -> None:
    packed = pickle.loads(pickle.dumps(PackedSource(pack(source(), tmp_path / "x", size=12))))

    def batches(data: Any, **options: Any) -> list[torch.Tensor]:
        stream = train_batches(
            data, train_transform(image_size=8), batch_size=4, seed=1, num_steps=6, **options
        )
        return [batch.images for batch in stream]

    wanted = batches(source())
    for found in (batches(packed), batches(packed, workers=2), wanted[:4] + batches(packed, start_step=4)):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_pickled_source_carries_no_pixels(tmp_path: Path) -> None:
    path = pack(source(200, side=32), tmp_path / "x", size=32)
    assert len(pickle.dumps(PackedSource(path))) < path.stat().st_size / 20


def test_specs_for_packed_files(tmp_path: Path) -> None:
    pack(source(30), tmp_path / "t", size=12)
    pack(source(6), tmp_path / "v", size=12)
    split = open_source(f"packed:{tmp_path}/t,val={tmp_path}/v")
    assert (len(split.train), len(split.val), split.image_size) == (30, 6, 12)
    halved = open_source(f"packed:{tmp_path}/t", val_fraction=0.2)
    assert [halved.val.label(i) for i in range(6)].count(2) == 2
    assert (len(halved.train), len(open_labeled(f"packed:{tmp_path}/t"))) == (24, 30)
    pack(source(6), tmp_path / "v", size=10)
    with pytest.raises(
        ValueError,
        match=r"differ in classes or size \(12 and 10 px\)\. Allowed: files of the same classes and size",
    ):
        open_source(f"packed:{tmp_path}/t,val={tmp_path}/v")


def test_one_flipped_bit_anywhere_in_the_data_is_noticed(tmp_path: Path) -> None:
    path = pack(source(), tmp_path / "x", size=12)
    whole = path.read_bytes()
    first = 8 + int.from_bytes(whole[:8], "little")
    for position in np.random.default_rng(0).integers(first, len(whole), 40):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(position) % 8
        path.write_bytes(damaged)
        assert error(path) == (
            f"{path} is damaged: its sha256 differs. Allowed: a file that normfree.data.sources.packed.pack wrote. "
            "Fix: pack it again."
        )


def test_files_that_are_no_packed_ones(tmp_path: Path) -> None:
    path = pack(source(), tmp_path / "x", size=12)
    path.write_bytes(path.read_bytes()[:-1])
    assert error(path).startswith(f"{path} is no packed file, or truncated (")
    save_file({"a": np.zeros(3)}, tmp_path / "y")
    assert error(tmp_path / "y").startswith(
        f"{tmp_path / 'y'} is a safetensors file of another kind. Allowed: a file"
    )
    assert error(tmp_path / "none") == (
        f"{tmp_path / 'none'} cannot be read: No such file or directory. "
        "Allowed: a file that normfree.data.sources.packed.pack wrote. Fix: check the path."
    )


def test_a_bad_image_leaves_nothing_behind(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    broken = FolderSource(tmp_path, [("a.png", 0), ("b.png", 1)], classes="ab")
    (tmp_path / "out").mkdir()
    with pytest.raises(ImageError, match=r"b\.png: the file is empty"):
        pack(broken, tmp_path / "out" / "x", size=8)
    assert list((tmp_path / "out").iterdir()) == []


def test_sizes_that_mean_nothing(tmp_path: Path) -> None:
    for size in (0, 1025):
        with pytest.raises(ValueError, match=rf"^size={size}\. Allowed: 1 to 1024 pixels\. Fix: size=64\.$"):
            pack(source(), tmp_path / "x", size=size)
