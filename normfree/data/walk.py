"""The one walk of folders: what counts as an image, what is litter, and what is left out.

Training, evaluation, prediction and export all list folders with these functions, so they see the same images.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from normfree.data.transforms.decode import suffixes

# Files and folders of file managers, archives, notebooks and network drives, besides all names that begin with a dot.
_LITTER = frozenset(
    ("__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "@eadir", "lost+found",
     "__pycache__")
)  # fmt: skip
# What reads the images with these suffixes, if `suffixes()` does not have them.
_NEEDS = dict.fromkeys((".heic", ".heif", ".hif"), 'pip install "normfree[heic]"') | {
    ".avif": "pip install --upgrade pillow"
}


@dataclass(frozen=True)
class FolderEntries:
    """The visible contents of one folder: sorted names of folders and images, and other files by suffix."""

    folders: tuple[str, ...]
    images: tuple[str, ...]
    others: Counter[str]


def list_folder(folder: Path) -> FolderEntries:
    """Return the contents of a folder, without litter and hidden files. Symbolic links are followed."""
    folders, images, others = [], [], Counter[str]()
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_litter(entry.name):
                continue
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.is_dir():
                folders.append(entry.name)
            elif suffix in suffixes():  # a broken link too: the audit names it
                images.append(entry.name)
            else:
                others[suffix or "without a suffix"] += 1
    return FolderEntries(tuple(sorted(folders)), tuple(sorted(images)), others)


def is_litter(name: str) -> bool:
    """Return True for names that file managers and other programs leave behind, and for hidden ones.

    >>> [is_litter(name) for name in ("._img.jpg", "__MACOSX", ".ipynb_checkpoints", "cat.jpg")]
    [True, True, True, False]
    """
    return name.startswith(".") or name.lower() in _LITTER


def walk_images(root: Path) -> tuple[list[Path], Counter[str]]:
    """Return the images in a folder and its subfolders, sorted by path, and the other files by suffix.

    Links to folders are followed, except to a folder that contains the link.
    """
    images: list[Path] = []
    others: Counter[str] = Counter()

    def visit(folder: Path, above: frozenset[str]) -> None:
        entries = list_folder(folder)
        images.extend(folder / name for name in entries.images)
        others.update(entries.others)
        for name in entries.folders:
            real = os.path.realpath(folder / name)
            if real not in above:
                visit(folder / name, above | {real})

    visit(root, frozenset({os.path.realpath(root)}))
    return sorted(images), others


def left_out(others: Counter[str], *, outside: int = 0) -> tuple[str, ...]:
    """Return a note on the files that were left out, or nothing if there are none.

    Args:
        others: number of files by suffix.
        outside: number of images outside the class folders.

    >>> left_out(Counter({".txt": 2, ".csv": 1}), outside=3)
    ('6 files were left out: 2 .txt, 1 .csv, 3 images outside the class folders',)
    """
    parts = [
        _one(suffix, count) for suffix, count in sorted(others.items(), key=lambda item: (-item[1], item[0]))
    ]
    if outside:
        parts.append(f"{outside} image{'s' * (outside > 1)} outside the class folders")
    total = sum(others.values()) + outside
    return (f"{total} file{'s' * (total > 1)} were left out: {', '.join(parts)}",) if total else ()


def _one(suffix: str, count: int) -> str:
    """Return the number of files with one suffix, and what would read them."""
    needs = _NEEDS.get(suffix)
    return f"{count} {suffix} (images; reading them needs {needs})" if needs else f"{count} {suffix}"


def unreadable_images(others: Iterable[str]) -> str:
    """Return advice if `others` has suffixes of images that a missing package reads, else ""."""
    needed = sorted({_NEEDS[suffix] for suffix in others if suffix in _NEEDS})
    return f"{' and '.join(needed)} reads the other images" if needed else ""
