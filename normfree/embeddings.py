"""Embeddings of images, and how well they separate classes: nearest neighbors, recall@1 and a linear probe.

Embeddings are the pooled features of a network, before its classifier. Shapes: N images, D features, K classes, M
images of the bank that neighbors are taken from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.data.image_inputs import image_inputs
from normfree.data.loader import eval_batches
from normfree.data.source import Source
from normfree.data.transforms.normalize import normalize
from normfree.device import run_device
from normfree.files import atomic_write
from normfree.models.net import Net
from normfree.prediction import input_batches
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel
from normfree.suggest import problem

# Wu et al. 2018 (arXiv 1805.01978) and lightly's benchmarks use 200 neighbors of ImageNet's 1.3 million images, with
# temperatures of 0.07 and 0.1.
NEIGHBORS, TEMPERATURE = 20, 0.1
CHUNK = 1024  # queries compared with the bank at a time


def features(net: nn.Module, images: Tensor) -> Tensor:
    """Return the pooled features of images, B C H W -> B D, float32, whether or not the network has a classifier.

    Raises:
        ValueError: the network cannot give them, because it was read from an ONNX file.
    """
    if not isinstance(net, Net):
        given = f"{type(net).__name__} gives logits, and no features"
        raise ValueError(problem(given, fix="use the run or model folder that it was exported from"))
    return net.forward_head(net.forward_features(images), pre_logits=True).float()


@torch.no_grad()
def embed_source(
    net: nn.Module,
    source: Source,
    *,
    preprocessing: Preprocessing,
    batch_size: int = 128,
    workers: int = 0,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    gather: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> tuple[Tensor, Tensor]:
    """Return the features N D and the labels N of all images of a source, on the CPU, in its order.

    Arguments are those of `normfree.evaluate`. The mode of the network is restored afterwards.
    """
    was_training = net.training
    net.eval().to(device)
    parts, labels = [], []
    try:
        for batch in eval_batches(
            source, preprocessing.transform(), batch_size=batch_size, workers=workers, rank=rank,
            world_size=world_size,
        ):  # fmt: skip
            images = normalize(batch.images.to(device), mean=preprocessing.mean, std=preprocessing.std)
            parts.append(features(net, images).cpu())
            labels.append(batch.labels)
    finally:
        net.train(was_training)
    width = net.num_features if isinstance(net, Net) else 0
    rows = torch.cat(parts) if parts else torch.empty(0, width)
    numbers = torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64)
    return gather(rows), gather(numbers[:, None])[:, 0]


# --- nearest neighbors ------------------------------------------------------------------------------------


def knn_probabilities(
    queries: Tensor,
    bank: Tensor,
    labels: Tensor,
    *,
    classes: int,
    neighbors: int = NEIGHBORS,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Return the votes N K of each query's nearest neighbors in the bank, which sum to 1.

    A neighbor with cosine similarity s votes for its class with weight exp(s / temperature).

    Args:
        queries: N D.
        bank: M D.
        labels: classes of the bank, M.
        classes: K.
        neighbors: number of neighbors that vote; all if the bank is smaller.
        temperature: above 0.

    Source: Wu et al. 2018 (arXiv 1805.01978), section 3.4.
    """
    bank = F.normalize(bank, dim=1)
    found = []
    for part in F.normalize(queries, dim=1).split(CHUNK):
        similar, nearest = (part @ bank.T).topk(min(neighbors, len(bank)), dim=1)
        weights = torch.softmax(similar / temperature, dim=1)
        votes = weights.new_zeros(len(part), classes)
        found.append(votes.scatter_add_(1, labels[nearest], weights))
    return torch.cat(found)


def nearest_of_same_label(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Return for each embedding whether the most similar other one has its label, bool N.

    Its mean over the embeddings whose label occurs twice or more is recall@1, the precision@1 of
    pytorch-metric-learning.
    """
    unit = F.normalize(embeddings, dim=1)
    found = []
    for start in range(0, len(unit), CHUNK):
        similar = unit[start : start + CHUNK] @ unit.T
        own = torch.arange(start, start + len(similar), device=unit.device)
        similar[own - start, own] = -torch.inf
        found.append(labels[similar.argmax(dim=1)] == labels[own])
    return torch.cat(found)


def recall_at_1(embeddings: Tensor, labels: Tensor) -> float:
    """Return the percentage of images whose most similar other image has the same label.

    Images whose label occurs once are left out; nan if there are no others.
    """
    repeated = torch.bincount(labels)[labels] > 1
    hits = nearest_of_same_label(embeddings, labels)[repeated]
    return 100.0 * float(hits.double().mean())


# --- linear probe -----------------------------------------------------------------------------------------


def linear_probe(
    train: tuple[Tensor, Tensor], test: Tensor, *, classes: int, penalty: float = 1e-3, iterations: int = 200
) -> Tensor:
    """Fit logistic regression on features and return its logits N K for the test features.

    It is deterministic: features are standardized by the mean and deviation of the training features, weights start at
    0, and L-BFGS minimizes the convex mean cross entropy plus penalty / 2 times the squared weights, in float64.

    Args:
        train: features M D and labels M.
        test: features N D.
        classes: K.
        penalty: L2 penalty of the weights, above 0, so that separable classes have a finite optimum.
        iterations: largest number of steps of L-BFGS.
    """
    x, labels = train[0].double(), train[1]
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
    std = torch.where(std > 0, std, 1.0)  # a constant feature
    x = (x - mean) / std
    weight = torch.zeros(x.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return ((test.double() - mean) / std @ weight + bias).detach()


# --- files ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileEmbeddings:
    """Embeddings of images.

    Attributes:
        paths: the names of the images that could be read, N.
        values: their embeddings, float32 N D.
        errors: for each other image, why it cannot be read.
    """

    paths: tuple[str, ...]
    values: np.ndarray
    errors: dict[str, str]


@torch.no_grad()
def embed_files(
    model: TrainedModel,
    images: Any,
    *,
    every: int = 1,
    batch_size: int = 64,
    device: str | torch.device = "auto",
) -> FileEmbeddings:
    """Compute the embeddings of images, which are named as for `predict`.

    Raises:
        ValueError: a path does not exist, `batch_size` or `every` is below 1, or the model was read from an exported
            file.
        ModuleNotFoundError: there is a video, and PyAV is not installed.
    """
    target = run_device(device) if isinstance(device, str) else device
    inputs = image_inputs(images, every=every)
    batches = input_batches(model.preprocessing, inputs, batch_size=batch_size, device=target)
    net = model.net.eval().to(target)
    read: list[str] = []
    errors: dict[str, str] = {}
    found: list[Tensor] = []
    for batch in batches:
        errors |= {image.name: image.error for image in batch.images if image.error}
        read += [image.name for image in batch.images if not image.error]
        if len(batch.inputs):
            found.append(features(net, batch.inputs).cpu())
    values = torch.cat(found).numpy() if found else np.empty((0, 0), np.float32)
    return FileEmbeddings(tuple(read), values, errors)


def save_embeddings(found: FileEmbeddings, path: Path) -> Path:
    """Write `paths` and `embeddings` to a file for `numpy.load`."""

    def write(partial: Path) -> None:
        arrays: dict[str, Any] = {"paths": np.array(found.paths, dtype=np.str_), "embeddings": found.values}
        with partial.open("wb") as file:
            np.savez(file, **arrays)

    return atomic_write(path, write)
