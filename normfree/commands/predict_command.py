"""normfree.commands.predict_command."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from normfree.commands.usage import UsageError

if TYPE_CHECKING:
    from normfree.inference import Prediction


@dataclass
class PredictArguments:
    """Classes of image files, or of all images under folders."""

    model: Positional[str]
    """A run or model folder."""
    paths: Positional[tuple[str, ...]]
    """Image files and folders."""
    top: int = 5
    """How many classes to name for each image."""
    out: str = ""
    """Write to this file instead: .csv or .jsonl."""
    format: Literal["table", "csv", "jsonl"] = "table"
    """What to print when there is no --out."""
    batch_size: int = 64
    """Images at a time."""
    device: str = "auto"
    """cpu, cuda, mps; auto: the first GPU, else the CPU."""


def predict_(arguments: PredictArguments) -> int:
    from normfree.inference import predict
    from normfree.pretrained import from_pretrained

    kind = arguments.format
    if arguments.out:
        suffix = Path(arguments.out).suffix.removeprefix(".")
        if suffix not in ("csv", "jsonl"):
            raise UsageError(f"--out {arguments.out!r}: expected a name that ends in .csv or .jsonl.")
        kind = "csv" if suffix == "csv" else "jsonl"
    answers = predict(from_pretrained(arguments.model), arguments.paths, top=arguments.top,
                      batch_size=arguments.batch_size, device=arguments.device)  # fmt: skip
    failed = 0
    file = open(arguments.out, "w", encoding="utf-8", newline="") if arguments.out else sys.stdout  # noqa: SIM115
    try:
        writer = csv.writer(file)
        if kind == "csv":
            writer.writerow(["path", "rank", "class", "probability", "error"])
        for answer in answers:
            failed += bool(answer.error)
            _write(answer, kind, file, writer)
    finally:
        if arguments.out:
            file.close()
    if failed:
        print(f"normfree: {failed} files could not be read; each is named in the output", file=sys.stderr)
    return 2 if failed else 0


def _write(answer: Prediction, kind: str, file: IO[str], writer: Any) -> None:
    # a file's name need not be UTF-8
    path, error = (text.encode(errors="backslashreplace").decode() for text in (answer.path, answer.error))
    pairs = list(zip(answer.classes, answer.probabilities, strict=True))
    if kind == "jsonl":
        top = [{"class": c, "probability": round(p, 6)} for c, p in pairs]
        entry = {"path": path, "error": error} if error else {"path": path, "top": top}
        print(json.dumps(entry, ensure_ascii=False), file=file)
    elif kind == "csv":
        rows = [[path, i, c, f"{p:.6f}", ""] for i, (c, p) in enumerate(pairs, start=1)]
        writer.writerows(rows or [[path, "", "", "", error]])
    else:
        text = error or "   ".join(f"{c} {100 * p:.1f} %" for c, p in pairs)
        print(f"{path}   {text}", file=file)
