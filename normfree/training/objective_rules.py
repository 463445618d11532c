"""Settings that an objective on embeddings needs or cannot use, with the reason and the fix."""

from __future__ import annotations

from normfree.suggest import problem
from normfree.training.cached_gradient import BATCH_NORM_ERROR
from normfree.training.choices import learns_embeddings
from normfree.training.config import Config
from normfree.training.loss import batch_loss

VIEWS = 2  # of each image, in "simclr"


def check_objective(config: Config, *, norm: str) -> None:
    """Check that the config can be run with its objective, if that learns embeddings.

    Args:
        config: the config.
        norm: the normalization of the variant.

    Raises:
        ValueError: an option of the objective is out of range, or settings do not fit; one line for each.
    """
    if not learns_embeddings(config.objective):
        return
    batch_loss(config.objective)
    name = config.objective.partition(":")[0]
    augment, micro_batch = config.augment, config.input.micro_batch
    found = []
    if name == "simclr" and augment.repeats != VIEWS:
        given, allowed = (
            f"augment.repeats={augment.repeats}",
            "2, because two views of each image are compared",
        )
        found.append((given, allowed, "--augment.repeats 2"))
    if config.input.batch_size < 2 * augment.repeats:
        given = f"input.batch_size={config.input.batch_size}, one image"
        allowed = "two images or more, since an image is compared with others"
        found.append((given, allowed, f"--input.batch_size {4 * VIEWS}"))
    for key, value in (("mixup", augment.mixup), ("cutmix", augment.cutmix)):
        if value:
            given = f"augment.{key}={value:g}"
            found.append((given, "0, because a mixed image has no single embedding", f"--augment.{key} 0"))
    if config.optim.class_balance:
        given = f"optim.class_balance={config.optim.class_balance:g}"
        found.append((given, "0, because there are no weights of classes", "--optim.class_balance 0"))
    if config.optim.sam_rho:
        given = f"optim.sam_rho={config.optim.sam_rho:g}"
        found.append((given, "0, because SAM needs the gradient of a part of the batch", "--optim.sam_rho 0"))
    if norm == "batch" and (micro_batch == "auto" or 0 < micro_batch < config.input.batch_size):
        given = f"input.micro_batch={micro_batch} with a batch-norm twin"
        allowed = f"0: batch statistics of micro-batches change the gradient ({BATCH_NORM_ERROR})"
        found.append((given, allowed, "--input.micro_batch 0, or use a normalizer-free model"))
    if found:
        lines = [
            problem(f"{given} with objective {name!r}", allowed=allowed, fix=fix)
            for given, allowed, fix in found
        ]
        raise ValueError("\n".join(lines))
