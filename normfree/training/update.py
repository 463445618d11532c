"""The update after the gradients: clipping, decay, momentum and average, by fused kernels or by three calls."""

from __future__ import annotations

from torch import nn

from normfree.optim.clipping import clip_grad_
from normfree.optim.ema import Ema
from normfree.optim.fused import FusedUpdate
from normfree.optim.fused_native import NativeUpdate
from normfree.optim.named_gradients import ClipReport
from normfree.optim.sgd import SGD
from normfree.optim.torch_optimizers import TorchOptimizer
from normfree.suggest import unknown
from normfree.training.choices import CLIPS, parse_choice
from normfree.training.config import OptimConfig
from normfree.training.profile import span

ENGINES = ("auto", "torch", "native", "triton")


class Update:
    """One step of `optimizer`, which moves `model`, and of its average `ema`.

    Args:
        config: how gradients are clipped.
        engine: "native": the fused update by compiled kernels, on a CPU. "triton": the fused update by Triton kernels,
            on a CUDA device; off by default, since it has not been measured on one. "torch": three calls. "auto":
            "native" where it can do all the work, else "torch".

    Raises:
        ValueError: the engine is unknown, or cannot do all the work.
    """

    def __init__(
        self,
        optimizer: SGD | TorchOptimizer,
        *,
        model: nn.Module,
        ema: Ema,
        config: OptimConfig,
        engine: str = "auto",
    ) -> None:
        if engine not in ENGINES:
            raise ValueError(unknown("engine", engine, ENGINES))
        self.optimizer, self.model, self.ema = optimizer, model, ema
        clip = parse_choice(config.clip, CLIPS)
        # private: the gradients of examples were clipped before they were added up
        self.mode = "off" if clip.name == "private" else clip.name
        self.clipping, self.eps = config.clipping, clip.options.get("eps", 1e-3)
        self.fused = self._fused("native" if engine == "auto" else engine)
        if self.fused is None and engine not in ("auto", "torch"):
            raise ValueError(f"engine {engine!r} cannot do this update. Allowed here: 'auto', 'torch'.")

    def _fused(self, engine: str) -> FusedUpdate | None:
        if self.mode != "agc" or engine == "torch" or not isinstance(self.optimizer, SGD):
            return None
        kind: type[FusedUpdate] = NativeUpdate
        if engine == "triton":
            from normfree.optim.fused_triton import TritonUpdate

            kind = TritonUpdate
        return kind.create(self.optimizer, model=self.model, ema=self.ema, eps=self.eps)

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
