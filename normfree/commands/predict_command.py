"""`normfree predict`: the most probable classes of image files."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from normfree.commands.usage import UsageError, check_given, tell
from normfree.files import spreadsheet_cell
from normfree.suggest import printable, problem

if TYPE_CHECKING:
    from normfree.inference import Prediction


@dataclass
class PredictArguments:
    """Predict the classes of image files, or of all images in folders and their subfolders."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A run or model folder."""
    paths: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="PATH...")]
    """Image files and folders."""
    top: int = 5
    """Number of classes to print for each image."""
    out: str = ""
    """Write to this file instead; its name ends in .csv or .jsonl."""
    embeddings: str = ""
    """Write the embeddings (the features before the classifier) to this .npz file, with arrays paths and embeddings,
    instead of predicting classes."""
    format: Literal["table", "csv", "jsonl"] = "table"
    """What to print without --out."""
    batch_size: int = 64
    """Images per forward pass."""
    device: str = "auto"
    """cpu, cuda or mps; auto: the first GPU if there is one, else the CPU."""


def predict_(arguments: PredictArguments) -> int:
    """Print or write the predictions; return 0, or 2 if a file cannot be read."""
    from normfree.data.walk import left_out, walk_images
    from normfree.inference import predict
    from normfree.pretrained import from_pretrained

    check_given(arguments.paths, "path")
    if arguments.embeddings:
        return _embed(arguments)
    format = _format(arguments)
    model = from_pretrained(arguments.model)
    tell(model.note)
    predictions = predict(model, arguments.paths, top=arguments.top,
                          batch_size=arguments.batch_size, device=arguments.device)  # fmt: skip
    failed = 0
    file = open(arguments.out, "w", encoding="utf-8", newline="") if arguments.out else sys.stdout  # noqa: SIM115
    try:
        writer = csv.writer(file)
        if format == "csv":
            writer.writerow(["path", "rank", "class", "probability", "error"])
        for prediction in predictions:
            failed += bool(prediction.error)
            _write(prediction, format, file, writer)
    finally:
        if arguments.out:
            file.close()
    others = sum((walk_images(Path(p))[1] for p in arguments.paths if Path(p).is_dir()), Counter[str]())
    tell("".join(left_out(others)))
    if failed:
        tell(f"files that could not be read: {failed}; the output states the reason for each")
    return 2 if failed else 0


def _embed(arguments: PredictArguments) -> int:
    """Write the embeddings; return 0, or 2 if a file cannot be read."""
    from normfree.embeddings import embed_files, save_embeddings
    from normfree.pretrained import from_pretrained

    out = Path(arguments.embeddings)
    if arguments.out or out.suffix != ".npz":
        given = "--embeddings with --out" if arguments.out else f"--embeddings is {arguments.embeddings!r}"
        fix = f"--embeddings {out.with_suffix('.npz')} alone"
        raise UsageError(problem(given, allowed="a name that ends in .npz, without --out", fix=fix))
    found = embed_files(from_pretrained(arguments.model), arguments.paths, batch_size=arguments.batch_size,
                        device=arguments.device)  # fmt: skip
    save_embeddings(found, out)
    print(f"{arguments.embeddings}: {found.values.shape[0]} embeddings of {found.values.shape[1]} numbers")
    for path, error in found.errors.items():
        print(f"{printable(path)}   {printable(error)}", file=sys.stderr)
    return 2 if found.errors else 0


def _format(arguments: PredictArguments) -> str:
    """Return the format of the output: that of --out by its suffix, else --format."""
    if not arguments.out:
        return arguments.format
    suffix = Path(arguments.out).suffix.removeprefix(".")
    if suffix not in ("csv", "jsonl"):
        raise UsageError(
            problem(f"--out is {arguments.out!r}", allowed="a name that ends in .csv or .jsonl",
                    fix=f"--out {Path(arguments.out).stem}.csv")
        )  # fmt: skip
    folder = Path(arguments.out).parent
    if not folder.is_dir():
        raise UsageError(
            problem(
                f"--out is {arguments.out!r}", allowed="a file in an existing folder", fix=f"mkdir {folder}"
            )
        )
    return suffix


def _write(prediction: Prediction, format: str, file: IO[str], writer: Any) -> None:
    """Write one prediction in the given format."""
    # The name of a file need not be valid UTF-8.
    path, error = printable(prediction.path), printable(prediction.error)
    pairs = list(zip(prediction.classes, prediction.probabilities, strict=True))
    if format == "jsonl":
        top = [{"class": c, "probability": round(p, 6)} for c, p in pairs]
        entry = {"path": path, "error": error} if error else {"path": path, "top": top}
        print(json.dumps(entry, ensure_ascii=False), file=file)
    elif format == "csv":
        rows = [[path, i, c, f"{p:.6f}", ""] for i, (c, p) in enumerate(pairs, start=1)]
        rows = rows or [[path, "", "", "", error]]
        writer.writerows([[spreadsheet_cell(str(cell)) for cell in row] for row in rows])
    else:
        text = error or "   ".join(f"{c} {100 * p:.1f} %" for c, p in pairs)
        print(f"{path}   {text}", file=file)
