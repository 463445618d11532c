"""`normfree audit`: open every image of a data set and state which cannot be used, and what to do about them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from normfree.commands.usage import check_target, tell
from normfree.files import atomic_write_text, csv_text, spreadsheet_cell
from normfree.suggest import one_line, problem

if TYPE_CHECKING:
    from normfree.data.audit import AuditReport
    from normfree.data.source import Source

_COLUMNS: tuple[str, ...] = ("part", "class", "path", "verdict", "reason", "fix", "digest")
_BAD = 1  # exit code if images cannot be used


@dataclass
class AuditArguments:
    """Open every image once; print those that cannot be used, duplicates, and what was left out.

    Exit code 1 if images cannot be used."""

    data: Annotated[Positional[str], tyro.conf.arg(metavar="DATA")]
    """A folder of images, a table of paths and classes, shards, or the name of a data set."""
    out: str = ""
    """Write the verdict on each image to this file; its name ends in .csv. Default: audit.csv."""
    workers: int = 0
    """Threads that open images; 0: one per core, at most 16."""


def audit_(arguments: AuditArguments) -> int:
    """Audit the data, print what was found and write the verdicts; return 0, or 1 if images cannot be used."""
    from normfree.data.audit import audit, duplicates, range_notes
    from normfree.data.sources.open import open_source
    from normfree.data.subset import NOT_HELD_OUT

    out = arguments.out or "audit.csv"
    check_target(out, ("csv",), "--out")
    split = open_source(arguments.data, val_fraction=0, pipes=True, labels=False)
    reports: dict[str, AuditReport] = {}
    for part, source in split.parts().items():
        if part == "val" and not split.held_out:  # the same images again
            continue
        reports[part] = audit(source, workers=arguments.workers or None, progress=_progress(part))
    sources = {part: split.parts()[part] for part in reports}
    atomic_write_text(Path(out), _verdicts(sources, reports))
    notes = [note for note in split.notes if note != NOT_HELD_OUT]
    for note in (*notes, *duplicates(split, reports), *range_notes(reports)):
        tell(note)
    bad = [image for report in reports.values() for image in report.bad]
    for image in bad:
        reason = one_line(image.reason.partition(" Fix: ")[0])
        print(f"{one_line(image.name)}: {problem(reason, fix=image.fix)}")
    checked = sum(report.checked for report in reports.values())
    print(f"{checked - len(bad):,} of {checked:,} images can be used; verdicts: {out}")
    return _BAD if bad else 0


def _verdicts(sources: dict[str, Source], reports: dict[str, AuditReport]) -> str:
    """Return the text of a CSV file with a row for each image."""
    rows = [_COLUMNS]
    for part, source in sources.items():
        report = reports[part]
        bad = {image.name: image for image in report.bad}
        for index in range(len(source)):
            name = source.name(index)
            found = bad.get(name)
            verdict = ("bad", found.reason, found.fix) if found else ("ok", "", "")
            digest = report.digests[index] if report.digests else ""
            row = (part, source.classes[source.label(index)], name, *verdict, digest)
            rows.append(tuple(spreadsheet_cell(one_line(cell)) for cell in row))
    return csv_text(rows)


def _progress(part: str) -> Callable[[int, int], None] | None:
    """Return a function that shows on a terminal how many images of a part were opened."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        print(f"\r{part}: {done:,} of {total:,}", end="\n" if done == total else "", file=sys.stderr)

    return show
