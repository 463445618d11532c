"""What follows the gradient: clipping, decay, momentum, average. In one sweep over memory, or by three calls."""

from __future__ import annotations

from torch import nn

from normfree.optim.clipping import clip_grad_
from normfree.optim.ema import Ema
from normfree.optim.fused import FusedUpdate, fused_update
from normfree.optim.named_gradients import ClipReport
from normfree.optim.sgd import SGD
from normfree.training.config import OptimConfig
from normfree.training.profile import span

#: Whether a run on a CUDA device takes the update kernel where that can do the whole work. False: it is not yet
#: measured on a GPU. Its arithmetic is tested through Triton's interpreter, its memory accesses as compiled for sm_90.
UPDATE_KERNEL = False


class Update:
    """One step of `optimizer`, which moves `model`, and of its average `ema`; `config` says how gradients are clipped.

    `kernel` is the `FusedUpdate` that does it, or None for the three calls; this is where that is decided.
    """

    def __init__(self, optimizer: SGD, *, model: nn.Module, ema: Ema, config: OptimConfig) -> None:
        self.optimizer, self.model, self.ema, self.config = optimizer, model, ema, config
        on_cpu = all(p.device.type == "cpu" for group in optimizer.param_groups for p in group["params"])
        self.kernel = self.fused() if on_cpu or UPDATE_KERNEL else None

    def fused(self) -> FusedUpdate | None:
        """A `FusedUpdate` that does the same, with tables of its own; None if none can."""
        if self.config.clip != "agc":
            return None
        return fused_update(self.optimizer, model=self.model, ema=self.ema, eps=self.config.clipping_eps)

    def step_(self, step: int) -> ClipReport:
        """Moves weights, momentum and average for step number `step`, and drops the gradients.

        Raises:
            NonFiniteGradientError: a gradient is not finite; nothing was moved.
        """
        if self.kernel is not None:
            with span("update"):
                report = self.kernel.step_(step=step)
                self.optimizer.zero_grad(set_to_none=True)
            return report
        with span("clip"):
            report = clip_grad_(
                self.optimizer.param_groups, mode=self.config.clip, clipping=self.config.clipping,
                eps=self.config.clipping_eps,
            )  # fmt: skip
        with span("update"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.ema.update_(self.model, step=step)
        return report
