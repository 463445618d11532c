"""Goal 3: malformed and unusual images. The audit names each that cannot be used, and accuses no other."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from normfree.data.audit import BadImage, audit
from normfree.data.sources.folders import FolderSource
from normfree.data.walk import list_folder
from reliability.children import call
from reliability.goals import Case, Result
from reliability.image_kinds import KINDS, write

CHECK = f"images of {len(KINDS)} kinds: each bad one named with reason and fix, no good one accused, none takes 5 s"
SECONDS, MEMORY = 5.0, 1_000_000_000


def cases(count: int) -> Iterator[Case]:
    """Return `count` folders with one image of each kind."""
    for seed in range(count):
        yield Case(CHECK, f"folder {seed}", partial(audited_folder, seed))


def audited_folder(seed: int, seconds: float = SECONDS) -> Result:
    """Audit each image of a folder with one image of each kind, in another process, and compare the verdicts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "class"
        folder.mkdir()
        paths = {kind: write(kind, folder, random.Random(f"{kind} {seed}")) for kind in KINDS}
        listed = list_folder(folder)
        seen = {*listed.images, *listed.folders}
        wrong = {kind: ["not seen"] for kind, path in paths.items() if path.name not in seen}
        outcome = call(verdicts, folder, [path.name for path in paths.values()], patience=600.0)
        if outcome.error or outcome.memory > MEMORY:
            text = f"{outcome.error} {outcome.text[:200]}, {outcome.memory / 1e6:.0f} MB"
            return Result(len(KINDS), 0, text)
        for (kind, path), (found, took) in zip(paths.items(), outcome.value, strict=True):
            late = [f"{took:.1f} s"] if took > seconds else []
            if found_wrong := complaints(kind, str(path), found) + late:
                wrong.setdefault(kind, []).extend(found_wrong)
    return Result(
        len(KINDS), len(KINDS) - len(wrong), "; ".join(f"{k}: {', '.join(v)}" for k, v in wrong.items())
    )


def verdicts(folder: Path, names: list[str]) -> list[tuple[BadImage | None, float]]:
    """Return what the audit finds about each image of a folder, and the processor time that it took."""
    found = []
    for name in names:
        start = time.process_time()
        report = audit(FolderSource(folder, [(name, 0)], classes=("class",)), workers=1)
        found.append((report.bad[0] if report.bad else None, time.process_time() - start))
    return found


def complaints(kind: str, path: str, found: BadImage | None) -> list[str]:
    """Return what is wrong with the verdict on an image of a kind."""
    reason = KINDS[kind].reason
    if found is None:
        return [] if not reason else ["not named"]
    if not reason:
        return [f"accused: {found.reason}"]
    wrong = [] if found.reason.startswith(reason) else [f"reason {found.reason!r}, not {reason!r}"]
    return wrong + ([] if found.name == path and found.fix else ["without path or fix"])
