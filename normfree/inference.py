"""A trained network at work: evaluate it on a labelled source, predict files. Preprocessing travels with the model.

Legend: B batch, C channels, H W height and width, K classes. `top1` and `top5` are percent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.data.loader import eval_batches
from normfree.data.source import Source
from normfree.data.subset import spread_indices
from normfree.data.transforms.decode import SUFFIXES, load_image
from normfree.data.transforms.normalize import normalize
from normfree.device import run_device
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Evaluation:
    """What a network scores on a source: percent correct, mean cross entropy in nats, and every answer."""

    top1: float
    top5: float
    loss: float
    count: int
    classes: tuple[str, ...]
    labels: Tensor = field(repr=False)
    """int64 N"""
    predictions: Tensor = field(repr=False)
    """int64 N"""
    losses: Tensor = field(repr=False)
    """float64 N, cross entropy of each image in nats, in the order of the source"""

    def confusion(self) -> Tensor:
        """K K counts: row = true class, column = answer."""
        size = len(self.classes)
        return torch.bincount(self.labels * size + self.predictions, minlength=size * size).view(size, size)

    def per_class(self) -> dict[str, float]:
        """Percent correct of each class that has images."""
        table = self.confusion()
        return {
            name: 100.0 * float(table[i, i]) / int(table[i].sum())
            for i, name in enumerate(self.classes)
            if int(table[i].sum())
        }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    source: Source,
    *,
    preprocessing: Preprocessing,
    batch_size: int = 128,
    workers: int = 0,
    device: str | torch.device = "auto",
    rank: int = 0,
    world_size: int = 1,
    gather: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> Evaluation:
    """Scores `model` (images B 3 S S -> logits B K) on every image of `source`, each once, in evaluation mode.

    Computed in float32 whatever the training precision, as in the reference. The model's mode is restored.
    With several processes each scores its part (`rank` of `world_size`), `gather` joins rows (N_r 4, float64, on the
    CPU) of all of them in order of rank, and every process returns the whole score.

    Raises:
        ValueError: logits are not finite or not one per class; such a network has no score.
    """
    place = run_device(device) if isinstance(device, str) else device
    transform = preprocessing.transform()
    was_training = model.training
    model.eval().to(place)
    parts = [torch.empty(0, 4, dtype=torch.float64)]
    try:
        for batch in eval_batches(
            source, transform, batch_size=batch_size, workers=workers, rank=rank, world_size=world_size
        ):
            images, labels = batch.images.to(place), batch.labels.to(place)
            logits = model(normalize(images, mean=preprocessing.mean, std=preprocessing.std)).float()
            if logits.shape[-1] != len(source.classes):
                raise _no_score(f"{logits.shape[-1]} wide", batch.names[0], source)
            best = logits.topk(min(5, logits.shape[-1])).indices
            loss = F.cross_entropy(logits, labels, reduction="none")
            loss[~torch.isfinite(logits).all(dim=1)] = (
                torch.nan
            )  # told after all are gathered, or others would wait
            hits = (best == labels[:, None]).any(dim=1)
            parts.append(torch.stack([t.cpu().double() for t in (labels, best[:, 0], hits, loss)], dim=1))
    finally:
        model.train(was_training)
    rows = gather(torch.cat(parts))
    wrong = torch.isnan(rows[:, 3]).nonzero()
    if len(wrong):
        raise _no_score("not finite", source.name(int(wrong[0])), source)
    truths, answers, count = rows[:, 0].long(), rows[:, 1].long(), len(rows)
    top1, top5 = int((answers == truths).sum()), int(rows[:, 2].sum())
    return Evaluation(100 * top1 / count, 100 * top5 / count, float(rows[:, 3].sum()) / count, count,
                      tuple(source.classes), truths, answers, rows[:, 3])  # fmt: skip


def _no_score(what: str, name: str, source: Source) -> ValueError:
    return ValueError(f"logits are {what} for {name!r} and others; the data has {len(source.classes)} classes. "
                      "There is no score to report.")  # fmt: skip


def sample_images(images: Source | Sequence[Path], *, count: int, preprocessing: Preprocessing) -> Tensor:
    """Return `count` images, evenly spread over a source or a list of files, or all of them if there are fewer.

    They are spread because most sources and folders are sorted by class.

    Args:
        images: a source, or the paths of image files, as `find_images` returns them.
        count: how many images.
        preprocessing: the model's preprocessing.

    Returns:
        Normalized images, B 3 S S, float32.

    Raises:
        ImageError: an image cannot be read.
    """
    transform = preprocessing.transform()
    indices = spread_indices(len(images), count)
    if isinstance(images, Sequence):
        pixels = torch.stack([transform(load_image(images[i])) for i in indices])
    else:
        pixels = torch.stack([transform(images.image(i)) for i in indices])
    return normalize(pixels, mean=preprocessing.mean, std=preprocessing.std)


def sample(source: Source, *, count: int, preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """Return the images of `sample_images`, B 3 S S, and their labels, int64 B."""
    labels = torch.tensor([source.label(i) for i in spread_indices(len(source), count)])
    return sample_images(source, count=count, preprocessing=preprocessing), labels


# --- predict files ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """The answer for one picture: class names and probabilities, most probable first; or why there is none."""

    path: str
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str = ""


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Files as given, and all images under folders, sorted.

    Raises:
        ValueError: a path does not exist, or a folder holds no image.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise ValueError(f"{str(path)!r} holds no images ({', '.join(sorted(SUFFIXES))}).")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise ValueError(f"{str(path)!r} does not exist.")
    return found


def predict(
    model: TrainedModel,
    paths: Sequence[str | Path],
    *,
    top: int = 5,
    batch_size: int = 64,
    device: str | torch.device = "auto",
) -> Iterator[Prediction]:
    """The `top` most probable classes of each file, or of each image under each folder, in order.

    A file that is no readable image gives a `Prediction` with `error` and takes no part in a batch.

    Raises:
        ValueError: a path does not exist, or `top` or `batch_size` is below 1; at the call, before any answer.
    """
    for name, value in (("top", top), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected 1 or more.")
    place = run_device(device) if isinstance(device, str) else device
    return _answers(model, find_images(paths), top, batch_size, place)


@torch.no_grad()
def _answers(
    model: TrainedModel, files: list[Path], top: int, batch_size: int, place: torch.device
) -> Iterator[Prediction]:
    pre = model.preprocessing
    transform = pre.transform()
    net = model.net.eval().to(place)
    for start in range(0, len(files), batch_size):
        part = files[start : start + batch_size]
        pictures = [_open(path) for path in part]
        good = [transform(p) for p in pictures if not isinstance(p, str)]
        rows: Iterable[Tensor] = ()
        if good:
            images = normalize(torch.stack(good).to(place), mean=pre.mean, std=pre.std)
            rows = net(images).float().softmax(dim=1).cpu()
        answers = iter(rows)
        for path, picture in zip(part, pictures, strict=True):
            if isinstance(picture, str):
                yield Prediction(os.fspath(path), error=picture)
                continue
            probabilities, indices = next(answers).topk(min(top, len(model.classes)))
            names = tuple(model.classes[i] for i in indices.tolist())
            yield Prediction(os.fspath(path), names, tuple(probabilities.tolist()))


def _open(path: Path) -> Image | str:
    try:
        return load_image(path)
    except ValueError as error:
        return str(error)
