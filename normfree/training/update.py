"""The update after the gradients: clipping, decay, momentum and average, by compiled kernels or by three calls."""

from __future__ import annotations

from torch import nn

from normfree.optim.clipping import clip_grad_
from normfree.optim.ema import Ema
from normfree.optim.fused import FusedUpdate
from normfree.optim.named_gradients import ClipReport
from normfree.optim.sgd import SGD
from normfree.optim.torch_optimizers import TorchOptimizer
from normfree.training.choices import CLIPS, parse_choice
from normfree.training.config import OptimConfig
from normfree.training.profile import span


class Update:
    """One step of `optimizer`, which moves `model`, and of its average `ema`.

    Args:
        config: how gradients are clipped.

    Attributes:
        fused: the update by compiled kernels, where they can do all the work; None: three calls.
    """

    def __init__(
        self, optimizer: SGD | TorchOptimizer, *, model: nn.Module, ema: Ema, config: OptimConfig
    ) -> None:
        self.optimizer, self.model, self.ema = optimizer, model, ema
        clip = parse_choice(config.clip, CLIPS)
        # private: the gradients of examples were clipped before they were added up
        self.mode = "off" if clip.name == "private" else clip.name
        self.clipping, self.eps = config.clipping, clip.options.get("eps", 1e-3)
        self.fused: FusedUpdate | None = None
        if self.mode == "agc" and isinstance(optimizer, SGD):
            self.fused = FusedUpdate.create(optimizer, model=model, ema=ema, eps=self.eps)

    def step(self, step: int) -> ClipReport:
        """Move weights, momentum and average in step number `step`, and drop the gradients.

        Raises:
            NonFiniteGradientError: a gradient is not finite; nothing was changed.
        """
        self.ema.num_updates = step  # also after a resume
        if self.fused is not None:
            with span("update"):
                report = self.fused.step()
                self.optimizer.zero_grad(set_to_none=True)
            return report
        with span("clip"):
            report = clip_grad_(
                self.optimizer.param_groups, mode=self.mode, clipping=self.clipping, eps=self.eps,
            )  # fmt: skip
        with span("update"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.ema.update(self.model)
        return report
