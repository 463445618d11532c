"""Open every image once before training, so that one bad file does not stop a run after hours."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from normfree.data.source import Source
from normfree.data.transforms.decode import ImageError
from normfree.suggest import problem

SHOWN = 10  # bad files that an error message names
_CHUNK = 32  # images per task: small enough for a smooth progress bar, large enough for negligible overhead


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be decoded, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class AuditReport:
    """The number of images opened, and the bad ones in the order of the source."""

    checked: int
    bad: tuple[BadImage, ...]


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

    def check(start: int) -> list[BadImage]:
        bad = []
        for index in range(start, min(start + _CHUNK, total)):
            try:
                source.image(index)
            except ImageError as error:
                bad.append(BadImage(error.name, error.reason))
        return bad

    bad: list[BadImage] = []
    starts = range(0, total, _CHUNK)
    with ThreadPoolExecutor(count) as pool:
        for start, found in zip(starts, pool.map(check, starts), strict=True):
            bad += found
            if progress is not None:
                progress(min(start + _CHUNK, total), total)
    return AuditReport(checked=total, bad=tuple(bad))


def require_clean(report: AuditReport) -> None:
    """Raise one `ValueError` that names the first ten bad images of a report, if there are any."""
    if not report.bad:
        return
    lines = [f"  {image.name}: {image.reason}" for image in report.bad[:SHOWN]]
    if len(report.bad) > SHOWN:
        lines.append(f"  and {len(report.bad) - SHOWN} more")
    listing = "\n".join(lines)
    advice = problem("", allowed="images that open completely", fix="repair these files or delete them")
    raise ValueError(f"{len(report.bad)} of {report.checked} images cannot be used:\n{listing}\n{advice}")
