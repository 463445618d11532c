"""Evaluation of a trained network on labeled images, and samples of its inputs.

Shapes: B batch, S image size, K classes, N images. `top1` and `top5` are percent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.data.loader import eval_batches
from normfree.data.multilabel import as_multilabel
from normfree.data.source import Source
from normfree.data.subset import spread_indices
from normfree.data.supervision import DEADLINE, never
from normfree.data.transforms.decode import load_image
from normfree.data.transforms.normalize import normalize
from normfree.device import run_device
from normfree.multilabel_scores import multilabel_scores
from normfree.preprocessing import Preprocessing
from normfree.scores import Evaluation
from normfree.suggest import problem

_COLUMNS = 5  # of `_scores` for images with one class


class NotFiniteLogitsError(ValueError):
    """The logits of an image are not finite, as after a training that diverged."""


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
    gather: Callable[[Tensor], Tensor] = lambda scores: scores,
    sigmoid: bool = False,
    stopped: Callable[[], bool] = never,
    deadline: float = DEADLINE,
) -> Evaluation:
    """Evaluate a network once on every image of a source, in evaluation mode and in float32.

    The mode of the model is restored afterwards.

    Args:
        model: a module that maps images B 3 S S to logits B K. It is moved to `device`.
        source: the labeled images.
        preprocessing: how images become inputs of the model.
        batch_size: number of images per forward pass.
        workers: number of processes that load images; 0 loads them in this process.
        device: a device or its name; "auto" is a GPU if there is one, else the CPU.
        rank: index of this process, if several processes share the images.
        world_size: number of processes.
        gather: function that concatenates the tensors N_r x 5 (float64, on the CPU) of all processes in the order of
            their ranks. Every process then returns the scores of all images.
        sigmoid: the loss is the binary cross entropy, averaged over the classes, instead of the cross entropy.
        stopped, deadline: see `eval_batches`.

    Returns:
        Accuracy, loss, and the prediction for each image.

    Raises:
        ValueError: the logits are not finite (NotFiniteLogitsError), or their number is not the number of classes.

    Examples:
        >>> import numpy as np
        >>> import normfree
        >>> from normfree.data.source import ArraySource
        >>> from normfree.preprocessing import Preprocessing
        >>> images = np.zeros((3, 16, 16, 3), dtype=np.uint8)
        >>> source = ArraySource(images, [0, 1, 1], classes=("cat", "dog"), names=("a", "b", "c"))
        >>> net = normfree.create_model("nf_resnet_nano", num_classes=2)
        >>> scores = normfree.evaluate(net, source, preprocessing=Preprocessing(image_size=16), device="cpu")
        >>> scores.count, scores.top5, scores.labels.tolist()
        (3, 100.0, [0, 1, 1])

    Source: evaluation of the reference code, which also uses float32.
    """
    target = run_device(device) if isinstance(device, str) else device
    transform = preprocessing.transform()
    was_training = model.training
    model.eval().to(target)
    several = as_multilabel(source) is not None
    parts = [torch.empty(0, _COLUMNS + 2 * len(source.classes) * several, dtype=torch.float64)]
    try:
        for batch in eval_batches(source, transform, batch_size=batch_size, workers=workers, rank=rank,
                                  world_size=world_size, stopped=stopped, deadline=deadline):  # fmt: skip
            images, labels = batch.images.to(target), batch.labels.to(target)
            logits = model(normalize(images, mean=preprocessing.mean, std=preprocessing.std)).float()
            if logits.shape[-1] != len(source.classes):
                raise ValueError(_invalid_logits(f"have {logits.shape[-1]} columns", batch.names[0], source))
            targets = None if batch.targets is None else batch.targets.to(target)
            parts.append(_scores(logits, labels, targets, sigmoid=sigmoid))
    finally:
        model.train(was_training)
    scores = gather(torch.cat(parts))
    wrong = torch.isnan(scores[:, 3]).nonzero()
    if len(wrong):
        raise NotFiniteLogitsError(_invalid_logits("are not finite", source.name(int(wrong[0])), source))
    return _evaluation(scores, tuple(source.classes))


def _evaluation(scores: Tensor, classes: tuple[str, ...]) -> Evaluation:
    """Return the evaluation of what `_scores` returned for all images."""
    labels, predictions, losses, count = scores[:, 0].long(), scores[:, 1].long(), scores[:, 3], len(scores)
    top1, top5 = int((predictions == labels).sum()), int(scores[:, 2].sum())
    several = None
    if scores.shape[1] > _COLUMNS:
        probabilities, targets = scores[:, _COLUMNS:].chunk(2, dim=1)
        several = multilabel_scores(probabilities, targets, classes)
    return Evaluation(100 * top1 / count, 100 * top5 / count, float(losses.sum()) / count, count, classes, labels,
                      predictions, losses, scores[:, 4], several=several)  # fmt: skip


def _scores(logits: Tensor, labels: Tensor, targets: Tensor | None, *, sigmoid: bool) -> Tensor:
    """Return label, predicted class, top-5 hit, loss and confidence of each image, B 5, float64, on the CPU.

    With targets, of images with several classes, the probabilities and the targets follow, B (5 + 2K).
    """
    best = logits.topk(min(5, logits.shape[-1])).indices
    more = [] if targets is None else [logits.sigmoid(), targets]
    if targets is None:
        targets = F.one_hot(labels, logits.shape[-1]).float()
    else:  # the predicted class if the image has it, else its first class
        labels = torch.where(targets.gather(1, best[:, :1])[:, 0] > 0, best[:, 0], labels)
    if sigmoid:
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)
    else:
        loss = F.cross_entropy(logits, labels, reduction="none")
    # The error is raised after `gather`, because the other processes wait there for this one.
    loss[~torch.isfinite(logits).all(dim=1)] = torch.nan
    hits = (targets.gather(1, best) > 0).any(dim=1)
    confidence = (logits.sigmoid() if sigmoid else logits.softmax(dim=1)).amax(dim=1)
    columns = torch.stack([t.cpu().double() for t in (labels, best[:, 0], hits, loss, confidence)], dim=1)
    return torch.cat([columns, *(t.cpu().double() for t in more)], dim=1)


def _invalid_logits(what: str, name: str, source: Source) -> str:
    """Return the error message for logits that cannot be scored."""
    allowed = f"{len(source.classes)} finite logits, one per class"
    return problem(f"logits {what} for {name!r} and other images", allowed=allowed)


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
        opened = [load_image(images[i], pixel_range=preprocessing.pixel_range) for i in indices]
        pixels = torch.stack([transform(image) for image in opened])
    else:
        pixels = torch.stack([transform(images.image(i)) for i in indices])
    return normalize(pixels, mean=preprocessing.mean, std=preprocessing.std)


def sample(source: Source, *, count: int, preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """Return the images of `sample_images`, B 3 S S, and their labels, int64 B."""
    labels = torch.tensor([source.label(i) for i in spread_indices(len(source), count)])
    return sample_images(source, count=count, preprocessing=preprocessing), labels
