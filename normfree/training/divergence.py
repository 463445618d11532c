"""What a run does when gradients or tensors are not finite: it names the images, and stops or goes back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from normfree.suggest import problem, some_names
from normfree.training.choices import DIVERGENCES, parse_choice
from normfree.training.distributed.world import World


class DivergedError(ValueError):
    """A gradient or tensor was not finite. The last checkpoint is unchanged; the message names what was not finite."""


class Rollbacks:
    """How often a run has gone back to its last checkpoint since it was started, and with which learning rate.

    A run that is killed after it went back finds the old count in its checkpoint, takes the same steps, and goes back
    again.

    Args:
        on_divergence: the value of that key.

    Attributes:
        count: how often.
        limit: the largest count; 0 for "stop".
    """

    def __init__(self, on_divergence: str) -> None:
        choice = parse_choice(on_divergence, DIVERGENCES)
        self.count, self.limit = 0, choice.options.get("times", 0)
        self._lr = choice.options.get("lr", 1.0)

    @property
    def lr_factor(self) -> float:
        """The factor on the learning rate."""
        return float(self._lr**self.count)

    def resume(self, count: int) -> None:
        """Take over the count of a checkpoint."""
        self.count = max(self.count, count)

    def again(self, error: DivergedError) -> str:
        """Count one more return to the last checkpoint; return the message for the log.

        Raises:
            DivergedError: the limit is reached.
        """
        if self.count >= self.limit:
            if self.count:
                raise DivergedError(f"after {self.count} returns to the last checkpoint: {error}") from None
            raise error
        self.count += 1
        factor = f"the learning rate is multiplied by {self.lr_factor:g}"
        return f"{error} Return {self.count} of {self.limit} to the last checkpoint; {factor}."


def not_finite_step(
    step: int, wrong: Sequence[str], total: int, *, images: str, lr: float, may_return: bool
) -> DivergedError:
    """Return the error for gradients of a step.

    Args:
        wrong: names of the parameters whose gradients are not finite.
        total: number of all gradients.
        images: which images they come from.
        lr: the learning rate of the run.
        may_return: True if the run goes back by itself.
    """
    given = f"step {step}: {len(wrong)} of {total} gradients are not finite: {some_names(wrong)}; {images}"
    fix = f"start another run with --optim.lr {lr / 3:.2g}"
    if not may_return:
        fix = f"resume with --on-divergence rollback, or {fix}"
    return DivergedError(problem(f"{given}; the last checkpoint is unchanged", fix=fix))


@torch.no_grad()
def suspects(
    net: nn.Module, images: Tensor, names: Sequence[str], *, world: World, micro_batch: int, half: bool
) -> str:
    """Return which images of a step gave outputs that are not finite; if none did, all images of the step.

    Without batch statistics one image does not change the outputs of others. Every process makes the call.

    Args:
        net: the network, with the weights of the step.
        images: this process's part of the batch.
        names: their names, or those of the images they were made from.
        micro_batch: images per pass; 0 is all of them.
        half: compute in bfloat16, as the step did.
    """
    wrong: list[str] = []
    if len(names) == len(images):  # views of contrastive learning have no names of their own
        net.eval()
        with world.guard(), torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            outputs = torch.cat([net(part) for part in images.split(micro_batch or len(images))])
        net.train()
        finite = torch.isfinite(outputs).flatten(1).all(dim=1).tolist()
        wrong = [name for name, good in zip(names, finite, strict=True) if not good]
    found = world.all_gather((wrong, list(names)))
    if all_wrong := [name for part, _ in found for name in part]:
        return f"the outputs for {some_names(all_wrong)} are not finite"
    return f"the images of the step are {some_names([name for _, part in found for name in part])}"
