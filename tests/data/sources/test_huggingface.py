from __future__ import annotations

import io
import pickle
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from normfree.data.audit import audit
from normfree.data.loader import train_batches
from normfree.data.source import ArraySource
from normfree.data.sources.open import open_labeled, open_source
from normfree.data.transforms.train import train_transform

NAMES = ["ant", "bee", "cat"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def make_image(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 11, 3), dtype=np.uint8))


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    make_image(number).save(buffer, "PNG")
    return buffer.getvalue()


def rows(
    numbers: range, *, image: Any = None, label: Any = None, column: str = "image", labels: Any = None
) -> Any:
    features = {column: image or datasets.Image(), "label": label or datasets.ClassLabel(names=NAMES)}
    cells = [{"bytes": png(i), "path": None} for i in numbers]
    if isinstance(features[column], datasets.Value):
        cells = [cell["bytes"] for cell in cells]
    data = {column: cells, "label": labels or [i % 3 for i in numbers]}
    return datasets.Dataset.from_dict(data, features=datasets.Features(features))


def parquet(folder: Path, **parts: Any) -> str:
    (folder / "data").mkdir(parents=True)
    for name, part in parts.items():
        part.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return f"hf:{folder}"


def message(spec: str, **options: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        open_source(spec, **options)
    return str(caught.value)


def check(source: Any, numbers: range) -> None:
    assert source.classes == tuple(NAMES)
    assert [source.label(i) for i in range(len(source))] == [i % 3 for i in numbers]
    for position, number in enumerate(numbers):
        assert source.image(position).tobytes() == make_image(number).tobytes()


def test_parquet_and_saved_folders_give_the_same_images(tmp_path: Path) -> None:
    train, val = rows(range(9)), rows(range(9, 13))
    datasets.DatasetDict({"train": train, "validation": val}).save_to_disk(tmp_path / "saved")
    for spec in (parquet(tmp_path / "pq", train=train, validation=val), f"hf:{tmp_path / 'saved'}"):
        split = open_source(spec)
        check(split.train, range(9))
        check(split.val, range(9, 13))
        check(open_labeled(spec), range(9, 13))
        assert split.train.name(3) == f"{spec[3:]}/train/3"
        assert (
            split.notes[0]
            == f"{spec[3:]} (train, validation): 9 images to train on, 4 to validate, 3 classes"
        )
        assert audit(split.train).bad == ()


def test_options_choose_splits_and_columns(tmp_path: Path) -> None:
    spec = parquet(tmp_path, big=rows(range(6), column="scan"), small=rows(range(6, 9), column="scan"))
    split = open_source(f"{spec},split=big,val=small,image=scan,label=label")
    check(split.train, range(6))
    check(split.val, range(6, 9))
    check(open_source(f"{spec},split=big,val=small").train, range(6))  # the one column of images is found


@pytest.mark.parametrize(
    "image", [datasets.Value("binary"), {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}]
)
def test_images_without_the_image_feature(tmp_path: Path, image: Any) -> None:
    check(
        open_source(
            parquet(tmp_path, train=rows(range(6), image=image), validation=rows(range(3), image=image))
        ).train,
        range(6),
    )


def test_labels_that_are_texts_or_plain_numbers(tmp_path: Path) -> None:
    texts = rows(range(6), label=datasets.Value("string"), labels=[NAMES[i % 3] for i in range(6)])
    check(open_source(parquet(tmp_path / "a", train=texts, validation=texts)).val, range(6))
    numbers = rows(range(6), label=datasets.Value("int16"))
    assert open_source(parquet(tmp_path / "b", train=numbers, validation=numbers)).classes == ("0", "1", "2")


def test_one_split_is_divided_by_hash_alike_in_every_run_and_folder(tmp_path: Path) -> None:
    data = rows(range(30))
    data.save_to_disk(tmp_path / "one")
    data.save_to_disk(tmp_path / "two")
    parts = [open_source(f"hf:{tmp_path / name}", val_fraction=0.2, seed=1).val for name in ("one", "two")]
    assert [p.name(i).rpartition("/")[2] for p in parts[:1] for i in range(6)] == [
        p.name(i).rpartition("/")[2] for p in parts[1:] for i in range(6)
    ]
    assert sorted(parts[0].label(i) for i in range(6)) == [0, 0, 1, 1, 2, 2]


def test_batches_are_those_of_the_images_in_memory_whatever_the_workers(tmp_path: Path) -> None:
    source = open_source(parquet(tmp_path, train=rows(range(9)), validation=rows(range(3)))).train
    arrays = ArraySource(
        np.stack([np.asarray(make_image(i)) for i in range(9)]),
        [i % 3 for i in range(9)],
        classes=NAMES,
        names="abcdefghi",
    )

    def batches(data: Any, **options: Any) -> list[torch.Tensor]:
        stream = train_batches(
            data, train_transform(image_size=8), batch_size=4, seed=1, num_steps=6, **options
        )
        return [batch.images for batch in stream]

    wanted = batches(arrays)
    again = pickle.loads(pickle.dumps(source))
    for found in (batches(source), batches(source, workers=2), wanted[:4] + batches(again, start_step=4)):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_bad_row_is_named(tmp_path: Path) -> None:
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=NAMES)}
    )
    cells = [{"bytes": png(0), "path": None}, {"bytes": b"junk", "path": "a.png"}, None]
    data = datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 2]}, features=features)
    source = open_source(parquet(tmp_path, train=data, validation=data)).train
    found = [(bad.name, bad.reason.split(",")[0]) for bad in audit(source).bad]
    assert found == [
        (f"{tmp_path}/train/1", "not an image"),
        (f"{tmp_path}/train/2", "the row has no image"),
    ]


def test_nothing_comes_from_the_hub_untold(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(name: str, subset: str | None, *, revision: str | None) -> Any:
        asked.append((name, subset, revision))
        return datasets.DatasetDict({"train": rows(range(6)), "validation": rows(range(3))})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert message("hf:owner/set") == (
        "'hf:owner/set' is no folder here. Allowed: a folder of parquet or arrow files, or a name on the hub and "
        "permission to download. Fix: download=yes, or check the path."
    )
    assert message("hf:./owner", download=True).startswith("'hf:./owner' is no folder here.")
    assert asked == []
    check(open_source("hf:owner/set,subset=small,revision=abc", download=True).train, range(6))
    check(open_labeled("hf:owner/set,download=yes"), range(3))
    check(open_source("hf:owner/set,download=yes").val, range(3))
    assert asked == [("owner/set", "small", "abc"), ("owner/set", None, None), ("owner/set", None, None)]
    assert message("hf:owner/set,download=no", download=True).startswith("'hf:owner/set' is no folder here.")


def test_errors_name_what_there_is(tmp_path: Path) -> None:
    spec = parquet(tmp_path / "a", train=rows(range(6)), validation=rows(range(3)))
    assert (
        message(f"{spec},split=trian") == f"'{spec}' has no split 'trian'. Allowed: train, validation. "
        "Fix: choose one with split=SPLIT. Did you mean 'train'?"
    )
    assert (
        message(f"{spec},label=lable") == f"'{spec}' has no column 'lable'. Allowed: image, label. "
        "Fix: choose one with label=COLUMN. Did you mean 'label'?"
    )
    assert message(f"{spec},image=label").startswith(f"the column 'label' of '{spec}' holds ClassLabel(")
    assert message(f"{spec},label=image").startswith(f"the column 'image' of '{spec}' holds Image(")
    assert message(f"{spec},lebal=x") == (
        f"'{spec},lebal=x' has an unknown option 'lebal'. Allowed: split=..., val=..., test=..., image=..., label=..., "
        "subset=..., revision=..., download=..., streaming=..., buffer=... Did you mean 'label'?"
    )
    assert message("hf:") == (
        "'hf:' names no data. Allowed: hf:PATH, then split=..., val=..., test=..., image=..., label=..., "
        "subset=..., revision=..., download=..., streaming=..., buffer=... Fix: add the path."
    )
    assert message("hg:x").endswith("Did you mean 'hf:x'?")
    unlabelled = parquet(tmp_path / "b", train=rows(range(3), labels=[0, 1, -1]), validation=rows(range(3)))
    assert message(unlabelled) == (
        f"row 2 of '{unlabelled}' has no label (label=-1). Allowed: a class in each row. "
        "Fix: choose a split with labels."
    )
    (tmp_path / "empty").mkdir()
    assert message(f"hf:{tmp_path / 'empty'}").startswith(f"'hf:{tmp_path / 'empty'}' cannot be opened: ")


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'^hf: needs datasets, .* pip install "normfree\[datasets\]"\.$'
    ):
        open_source(f"hf:{tmp_path}")


def test_a_test_split_is_the_test_part_and_not_validation(tmp_path: Path) -> None:
    spec = parquet(tmp_path, train=rows(range(30)), test=rows(range(3)))
    split = open_source(spec, val_fraction=0.2)
    assert (len(split.train) + len(split.val), len(split.test)) == (30, 3)
    assert len(open_source(f"{spec},val=test").val) == 3
    assert open_source(f"{spec},val=test").test is None
