"""Scores of a run that learns embeddings, and the files at its end.

With labels: top-1 and top-5 of the nearest neighbors among the training images, and recall@1 on the validation images;
at the end also a linear probe. Without labels: how often two views of a validation image find each other. Test images
are scored once, at the end.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree._version import __version__
from normfree.data.loader import train_batches
from normfree.data.source import Source, Split
from normfree.data.sources.unlabeled import UNLABELED
from normfree.data.subset import Subset, spread_indices
from normfree.data.transforms.normalize import normalize
from normfree.diagnose.metrics_file import read_metrics
from normfree.diagnose.run_figures import draw_curves
from normfree.embeddings import (
    NEIGHBORS,
    TEMPERATURE,
    embed_source,
    features,
    knn_probabilities,
    linear_probe,
    recall_at_1,
)
from normfree.files import atomic_write_text
from normfree.models.net import Net
from normfree.models.zoo import create_model
from normfree.pretrained import TrainedModel, model_args
from normfree.scores import Evaluation
from normfree.suggest import number_of
from normfree.training.config import Config
from normfree.training.config_io import to_toml
from normfree.training.console import RunLog
from normfree.training.loading import loading
from normfree.training.resolve import preprocessing
from normfree.training.run_folder import TrainResult, write_model
from normfree.training.trainer import Trainer
from normfree.uncertainty import accuracy_text, wilson_interval

# Training images, evenly spread over all, that neighbors and probe use; more of them would need much memory.
BANK = 50_000
MAIN_SCORES = ("knn_top1", "recall_at_1", "probe_top1", "view_top1")  # also at the top of results.json
VIEW_SEED = 0  # of the two views of validation images


@dataclass(frozen=True)
class EmbeddingEvaluation(Evaluation):
    """Scores of embeddings: those of `Evaluation` are of the votes of nearest neighbors, or of two views.

    Attributes:
        recall_at_1: percent of images whose most similar other validation image has their class; nan without labels.
        probe_top1: percent of images that a linear probe classifies correctly; nan before the end of a run.
    """

    recall_at_1: float = math.nan
    probe_top1: float = math.nan

    @property
    def labeled(self) -> bool:
        """Whether the data have labels."""
        return self.classes != (UNLABELED,)

    def per_class(self) -> dict[str, float]:
        """Return the top-1 accuracy in percent of each class; empty without labels."""
        return super().per_class() if self.labeled else {}

    def scores(self) -> dict[str, Any]:
        """Return the scores for results.json."""
        hits = round(self.top1 / 100 * self.count)
        interval = [100 * end for end in wilson_interval(hits, self.count)]
        found = {"top1": self.top1, "top1_interval": interval, "top5": self.top5, "loss": self.loss,
                 "images": self.count, "per_class_top1": self.per_class()}  # fmt: skip
        if not self.labeled:
            return {**found, "view_top1": self.top1}
        recall = None if math.isnan(self.recall_at_1) else self.recall_at_1  # JSON has no nan
        return {**found, "knn_top1": self.top1, "recall_at_1": recall, "probe_top1": self.probe_top1,
                "confusion": self.confusion().tolist()}  # fmt: skip


def score_embeddings(
    net: nn.Module, split: Split, trainer: Trainer, *, source: Source | None = None, probe: bool = False
) -> EmbeddingEvaluation:
    """Return the scores of a network of `trainer`. Every process makes the call.

    Args:
        net: whose embeddings are scored.
        split: its training images are the neighbors, and those on which the probe is fitted.
        trainer: of the network.
        source: the images that are scored; None: the validation images of `split`.
        probe: also fit the linear probe.
    """
    source = split.val if source is None else source
    if tuple(split.classes) == (UNLABELED,):
        return _view_scores(net, source, trainer)
    bank, labels = _embedded(net, Subset(split.train, spread_indices(len(split.train), BANK)), trainer)
    queries, truth = _embedded(net, source, trainer)
    classes = len(split.classes)
    votes = knn_probabilities(queries, bank, labels, classes=classes)
    found = _evaluation(votes.clamp(min=1e-6).log(), truth, tuple(split.classes))
    right = math.nan
    if probe:
        logits = linear_probe((bank, labels), queries, classes=classes)
        right = 100 * float((logits.argmax(dim=1) == truth).double().mean())
    return EmbeddingEvaluation(**found, recall_at_1=recall_at_1(queries, truth), probe_top1=right)


def _embedded(net: nn.Module, source: Source, trainer: Trainer) -> tuple[Tensor, Tensor]:
    """Return the features and labels of all images of a source."""
    config, world = trainer.config, trainer.world
    return embed_source(
        net, source, preprocessing=preprocessing(config), workers=loading(config).workers if len(source) > 2000 else 0,
        device=trainer.device, rank=world.rank, world_size=world.size, gather=world.gather,
    )  # fmt: skip


@torch.no_grad()
def _view_scores(net: nn.Module, source: Source, trainer: Trainer) -> EmbeddingEvaluation:
    """Return how often the features of a view of an image are most similar to those of its other view."""
    size = 2 * min(len(source), 64)
    batches = train_batches(
        source, trainer.transform, batch_size=size, seed=VIEW_SEED, num_steps=-(-2 * len(source) // size), repeats=2
    )  # fmt: skip
    was_training = net.training
    net.eval()
    mean, std = trainer.prepare.mean, trainer.prepare.std
    inputs = (normalize(b.images.to(trainer.device), mean=mean, std=std) for b in batches)
    rows = torch.cat([features(net, images).cpu() for images in inputs])
    net.train(was_training)
    views = F.normalize(rows[: 2 * len(source)], dim=1)
    similar = views[0::2] @ views[1::2].T / TEMPERATURE
    own = torch.arange(len(similar))
    found = _evaluation(similar, own, (UNLABELED,))
    found |= {"labels": torch.zeros_like(own), "predictions": torch.zeros_like(own)}
    return EmbeddingEvaluation(**found)


def _evaluation(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields of an `Evaluation` with these logits."""
    losses = F.cross_entropy(logits, labels, reduction="none").double()
    best = logits.topk(min(5, logits.shape[1])).indices
    top1, top5 = (best[:, 0] == labels).sum(), (best == labels[:, None]).any(dim=1).sum()
    count = len(labels)
    return {
        "top1": 100 * int(top1) / count, "top5": 100 * int(top5) / count, "loss": float(losses.mean()),
        "count": count, "classes": classes, "labels": labels, "predictions": best[:, 0], "losses": losses,
    }  # fmt: skip


# --- the end of a run -------------------------------------------------------------------------------------


def score_name(found: Evaluation) -> str:
    """Return what the top-1 score of an evaluation measures, for the log."""
    if not isinstance(found, EmbeddingEvaluation):
        return "top-1"
    return "nearest neighbors" if found.labeled else "two views"


def recalls(weights: Evaluation, average: Evaluation) -> dict[str, float]:
    """Return recall@1 of labeled embeddings for metrics.jsonl, else nothing."""
    both = {"recall_at_1": weights, "ema_recall_at_1": average}
    return {
        name: found.recall_at_1
        for name, found in both.items()
        if isinstance(found, EmbeddingEvaluation) and not math.isnan(found.recall_at_1)
    }


def write_body(config: Config, split: Split, net: nn.Module, result: TrainResult, run_log: RunLog) -> None:
    """Write results.json and the model folder of a network without its projection, to fine-tune or to embed with.

    Args:
        net: the averaged weights.
        result: the scores of `score_embeddings`.
        run_log: where to print the scores.
    """
    found, out = result.average, result.out
    assert isinstance(net, Net)
    assert isinstance(found, EmbeddingEvaluation)
    assert isinstance(result.weights, EmbeddingEvaluation)
    main = {k: v for k, v in found.scores().items() if k in MAIN_SCORES}
    both = {"weights": result.weights.scores(), "average": found.scores()}
    results = {**main, **both, "steps": result.steps, "step": result.step}
    if isinstance(result.test, EmbeddingEvaluation):
        results["test"] = result.test.scores()
    atomic_write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    body = create_model(net.name, num_classes=0, in_channels=net.in_channels, **model_args(net))
    assert isinstance(body, Net)
    state = {k: v for k, v in net.state_dict().items() if not k.startswith("head.")}
    body.load_state_dict(state)
    trained = TrainedModel(body, preprocessing(config), ())
    write_model(trained, out / "model", card=_card(config, split, body, result))
    with contextlib.suppress(ModuleNotFoundError):  # without matplotlib there is no plot
        metrics, title = read_metrics(out / "metrics.jsonl"), f"{config.model} on {config.data}"
        draw_curves(metrics, out / "curves.png", title=title)
    run_log.info(f"{summary(found)} (averaged weights, {number_of(found.count, 'validation image')})")
    if isinstance(result.test, EmbeddingEvaluation):
        tested = f"{number_of(result.test.count, 'test image')}, scored once"
        run_log.info(f"{summary(result.test)} (averaged weights, {tested})")
    run_log.info(
        f"model:  {out}/model/    next: normfree train finetune --data FOLDER --weights {out}, "
        f"normfree predict {out} IMAGE... --embeddings FILE.npz"
    )
    run_log.info(f"{result.seconds:.0f} s")


def summary(found: EmbeddingEvaluation) -> str:
    """Return the scores in one line."""
    hits = round(found.top1 / 100 * found.count)
    if not found.labeled:
        return f"two views find each other: {accuracy_text(hits, found.count)} % of {found.count} images"
    probed = round(found.probe_top1 / 100 * found.count)
    recall = ""
    if not math.isnan(found.recall_at_1):
        among = int((torch.bincount(found.labels)[found.labels] > 1).sum())  # as in `recall_at_1`
        recall = f", recall@1 {accuracy_text(round(found.recall_at_1 / 100 * among), among)} %"
    return (
        f"{NEIGHBORS} nearest neighbors {accuracy_text(hits, found.count)} %, "
        f"linear probe {accuracy_text(probed, found.count)} %{recall}"
    )


def _card(config: Config, split: Split, body: Net, result: TrainResult) -> str:
    """Return the model card. It holds measured numbers only."""
    found = result.average
    assert isinstance(found, EmbeddingEvaluation)
    credit = f"\nData: {split.credit}\n" if split.credit else ""
    tested = ""
    if isinstance(result.test, EmbeddingEvaluation):
        images = f"{number_of(result.test.count, 'test image')}, which chose nothing and were scored once"
        tested = f"On {images}: {summary(result.test)}.\n"
    return f"""---
library_name: normfree
tags: [image-feature-extraction, normalizer-free]
---
# {config.model}, embeddings learned on {Path(config.data).name}

Objective {config.objective}, {config.input.eval_size} px, {result.step} steps of {config.input.batch_size} images,
trained by normfree {__version__} on {len(split.train)} images; these are the averaged weights without the projection.
The network returns {body.num_features} features and has no classes: fine-tune it with `normfree train finetune
--weights FOLDER`, or write embeddings with `normfree predict FOLDER IMAGES --embeddings FILE.npz`.

On {number_of(found.count, "validation image")}: {summary(found)}; 95 % intervals in parentheses.
{tested}{credit}
## Config

```toml
{to_toml(config)}```
"""
