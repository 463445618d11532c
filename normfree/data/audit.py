"""Open every image once before training, so that one bad file does not stop a run after hours.

The same pass finds files that occur more than once, by a hash of their bytes, and 16-bit images that use a small part
of their range.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from normfree.data.source import Source, Split
from normfree.data.subset import Subset, encoded_bytes
from normfree.data.transforms.decode import FULL_RANGE, ImageError, open_header, sixteen_bit_peak
from normfree.files import atomic_write_text
from normfree.suggest import number_of, one_line, problem

SHOWN = 40  # bad files that an error message names; a list file names all if there are more
_CHUNK = 32  # images per task: small enough for a smooth progress bar, large enough for negligible overhead
_DIGEST = 16  # bytes of the hash of a file: no two different files of a data set have the same one
_LARGE_PIXELS = 16_000_000  # of images that are decoded one at a time: one takes 64 MB or more
_LARGE = threading.Lock()
_SMALL = (
    FULL_RANGE // 4
)  # largest value of 16-bit images that lose two bits or more when they are scaled to 8 bits
_DEEP = (b"\x89PNG", b"II*\0", b"MM\0*", b"P5")  # first bytes of the formats that have 16-bit gray images


# What helps, by the beginning of the reason of an `ImageError`.
_FIXES = {
    "the file is empty": "copy it again from where it came from, or delete it",
    "damaged": "copy it again from where it came from, or delete it",
    "not an image": "save it as JPEG or PNG, or delete it",
    "a folder": "rename the folder, or move its images",
    "not a regular file": "delete it",
    "no such file": "delete the link, or restore the file that it points to",
    "cannot be read": "change its permissions, or check the disk",
}


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be decoded, and the reason."""

    name: str
    reason: str

    @property
    def fix(self) -> str:
        """What helps: what the reason says, or the usual remedy for it."""
        stated = self.reason.partition("Fix: ")[2]
        return stated or next(
            (fix for start, fix in _FIXES.items() if self.reason.startswith(start)), "delete it"
        )


@dataclass(frozen=True)
class AuditReport:
    """The number of images opened, and the bad ones in the order of the source.

    Attributes:
        checked: Images opened.
        bad: The bad ones.
        digests: Hash of the bytes of each image in hexadecimal; "" for images that are not encoded.
        peaks: Largest value of each 16-bit gray image.
    """

    checked: int
    bad: tuple[BadImage, ...]
    digests: tuple[str, ...] = field(default=(), compare=False, repr=False)
    peaks: tuple[int, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class _Checked:
    """What the audit finds out about one image."""

    bad: BadImage | None
    digest: str
    peak: int | None


def audit(
    source: Source, *, workers: int | None = None, progress: Callable[[int, int], None] | None = None
) -> AuditReport:
    """Decode every image of a source once and collect the bad ones; `require_clean` raises for them.

    Args:
        source: Data set.
        workers: Threads; by default one per core, at most 16. Threads suffice because Pillow releases the interpreter
            lock while it decodes.
        progress: Called as `progress(done, total)` from this thread.

    Raises:
        ValueError: `workers` is below 1.
    """
    total = len(source)
    count = workers if workers is not None else min(16, os.cpu_count() or 1)
    if count < 1:
        raise ValueError(problem(f"workers={count}", allowed="1 or more", fix="workers=1"))

    def check(start: int) -> list[_Checked]:
        return [_check(source, index) for index in range(start, min(start + _CHUNK, total))]

    found: list[_Checked] = []
    starts = range(0, total, _CHUNK)
    with ThreadPoolExecutor(count) as pool:
        for start, part in zip(starts, pool.map(check, starts), strict=True):
            found += part
            if progress is not None:
                progress(min(start + _CHUNK, total), total)
    return AuditReport(
        checked=total,
        bad=tuple(one.bad for one in found if one.bad is not None),
        digests=tuple(one.digest for one in found),
        peaks=tuple(one.peak for one in found if one.peak is not None),
    )


def _check(source: Source, index: int) -> _Checked:
    """Open one image."""
    try:
        data = encoded_bytes(source, index)
        with _LARGE if data is not None and _is_large(data) else contextlib.nullcontext():
            source.image(index)
    except ImageError as error:
        return _Checked(BadImage(error.name, error.reason), "", None)
    if data is None:
        return _Checked(None, "", None)
    peak = sixteen_bit_peak(data) if data.startswith(_DEEP) else None
    return _Checked(None, digest_of(data), peak)


def _is_large(data: bytes) -> bool:
    """Return True for an encoded image of so many pixels that threads take turns."""
    try:
        with open_header(data) as image:
            return image.width * image.height > _LARGE_PIXELS
    except Exception:  # `image` gives the reason
        return False


def digest_of(data: bytes) -> str:
    """Return the hash by which an audit compares files, in hexadecimal.

    >>> digest_of(b"")
    'cae66941d9efbd404e4d88758ea67670'
    """
    return hashlib.blake2b(data, digest_size=_DIGEST).hexdigest()


def require_clean(*reports: AuditReport, list_file: Path | None = None) -> None:
    """Raise one `ValueError` that names the bad images of all reports, if there are any.

    Args:
        reports: One report for each part of the data.
        list_file: File to which all names are written if they are too many for a message.
    """
    bad = [image for report in reports for image in report.bad]
    if not bad:
        return
    lines = [f"  {one_line(image.name)}: {one_line(image.reason)}" for image in bad[:SHOWN]]
    if len(bad) > SHOWN:
        where = ""
        if list_file is not None:
            atomic_write_text(list_file, "".join(f"{one_line(image.name)}\n" for image in bad))
            where = f"; {list_file} lists all"
        lines.append(f"  and {len(bad) - SHOWN} more{where}")
    listing = "\n".join(lines)
    checked = sum(report.checked for report in reports)
    fix = "repair these files or delete them, or go on without them with --input.bad_images skip"
    advice = problem("", allowed="images that open completely", fix=fix)
    raise ValueError(f"{len(bad)} of {checked} images cannot be used:\n{listing}\n{advice}")


def without_bad(split: Split, names: Sequence[BadImage]) -> Split:
    """Return a split without the images of these names.

    Raises:
        ValueError: A part or a class to train on has no other images.
    """
    if not names:
        return split
    left = {image.name for image in names}
    parts: dict[str, Source] = {}
    for part, source in split.parts().items():
        kept = [i for i in range(len(source)) if source.name(i) not in left]
        parts[part] = Subset(source, kept)
        empty = part == "train" and {source.label(i) for i in range(len(source))} - {
            source.label(i) for i in kept
        }
        if empty or not kept:
            what = f"the class {split.classes[min(empty)]!r}" if empty else f"the part {part!r}"
            fix = "repair or replace some of the files"
            raise ValueError(problem(f"no image of {what} can be read", allowed="one or more", fix=fix))
    note = f"images that cannot be read and are left out: {len(left)}, such as {names[0].name}"
    return replace(
        split, train=parts["train"], val=parts["val"], test=parts.get("test"), notes=(*split.notes, note),
        left_out=tuple(f"{image.name}: {image.reason}" for image in names),
    )  # fmt: skip


def duplicates(split: Split, reports: Mapping[str, AuditReport]) -> tuple[str, ...]:
    """Return notes on files that are in more than one part of a split, or in more than one class."""
    first: dict[str, tuple[str, int, str]] = {}
    across: list[str] = []
    labels: list[str] = []
    for part, source in split.parts().items():
        if part == "val" and not split.held_out:
            continue
        for index, digest in enumerate(reports[part].digests):
            if not digest:
                continue
            own = (part, source.label(index), source.name(index))
            earlier = first.setdefault(digest, own)
            if earlier[0] != part:
                across.append(f"{own[2]} ({part}) is {earlier[2]} ({earlier[0]})")
            elif earlier[1] != own[1]:
                labels.append(f"{own[2]} is {earlier[2]}")
    notes = []
    if across:
        notes.append(
            f"WARNING: {number_of(len(across), 'image', 'is')} in two parts, so their scores tell nothing about new "
            f"images: {_some(across)}"
        )
    if labels:
        notes.append(f"WARNING: {number_of(len(labels), 'image', 'is')} in two classes: {_some(labels)}")
    return tuple(notes)


def range_notes(reports: Mapping[str, AuditReport]) -> tuple[str, ...]:
    """Return a warning if the 16-bit images use a small part of their range."""
    peaks = [peak for report in reports.values() for peak in report.peaks]
    if not peaks or max(peaks) > _SMALL:
        return ()
    peak = max(peaks)
    bits = max(8, peak.bit_length())
    return (
        f"WARNING: {number_of(len(peaks), 'image')} of 16 bits: the largest value is {peak:,}, "
        f"{100 * peak / FULL_RANGE:.0f} % of the range: they would have {peak // 257 + 1} of 256 levels. If they come "
        f"from a camera of {bits} bits, give the range: --data folder:PATH,range={2**bits - 1}",
    )


def _some(texts: Sequence[str]) -> str:
    """Return the first five texts and the number of the others."""
    more = f" and {len(texts) - 5} more" if len(texts) > 5 else ""
    return "; ".join(texts[:5]) + more
