"""The one walk of folders: what counts as an image, what is litter, and what is left out.

Training, evaluation, prediction and export all list folders with these functions, so they see the same images.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from normfree.data.transforms.decode import suffixes
from normfree.suggest import number_of, problem

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
            if _is_folder(entry):
                folders.append(entry.name)
            elif suffix in suffixes():  # a broken link too: the audit names it
                images.append(entry.name)
            else:
                others[suffix or "without a suffix"] += 1
    return FolderEntries(tuple(sorted(folders)), tuple(sorted(images)), others)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return True for a folder or a link to one; False also for a link that cannot be followed, such as to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


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


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Return the given files, and for each folder all images in it and its subfolders, sorted by path.

    A pattern such as `photos/*.jpg` or `photos/**/*.png` gives the files and folders that it matches.

    Raises:
        ValueError: a path does not exist, a pattern matches nothing, or a folder contains no image.
    """
    found: list[Path] = []
    for path in (match for given in paths for match in expanded(given)):
        if not path.is_dir():
            found.append(path)
            continue
        inside, others = walk_images(path)
        if not inside:
            given = f"{str(path)!r} contains no images"
            allowed = f"files {', '.join(sorted(suffixes()))}"
            raise ValueError(problem(given, allowed=allowed, fix=unreadable_images(others)))
        found += inside
    return found


def expanded(path: str | Path) -> list[Path]:
    """Return the files and folders that a pattern with *, ? or [ matches, sorted; any other path as it is.

    A pattern reaches us if it is quoted, if the shell is that of Windows, or if Python code gives it. A file whose name
    looks like a pattern is the file. `~` is the home folder.

    Raises:
        ValueError: the path does not exist, or the pattern matches nothing.
    """
    path = Path(path).expanduser()
    if path.exists():
        return [path]
    if not glob.has_magic(str(path)):
        raise ValueError(
            problem(f"{str(path)!r} does not exist", allowed="image files, folders of images, and patterns")
        )
    found = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    if not found:
        raise ValueError(
            problem(f"the pattern {str(path)!r} matches nothing", allowed="files and folders that exist")
        )
    return found


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
        parts.append(f"{number_of(outside, 'image')} outside the class folders")
    total = sum(others.values()) + outside
    return (f"{number_of(total, 'file', 'was')} left out: {', '.join(parts)}",) if total else ()


def _one(suffix: str, count: int) -> str:
    """Return the number of files with one suffix, and what would read them."""
    needs = _NEEDS.get(suffix)
    return f"{count} {suffix} (images; reading them needs {needs})" if needs else f"{count} {suffix}"


def unreadable_images(others: Iterable[str]) -> str:
    """Return advice if `others` has suffixes of images that a missing package reads, else ""."""
    needed = sorted({_NEEDS[suffix] for suffix in others if suffix in _NEEDS})
    return f"{' and '.join(needed)} reads the other images" if needed else ""
