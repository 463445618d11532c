"""The whole step as one CUDA graph: forward, backward and update are issued by the host once, and then replayed.

A graph repeats its kernels with their addresses and arguments. So all that varies from step to step lies on the device:
images and targets in buffers that are filled before, learning rate, decays and the average's weight in the numbers of
`FusedUpdate`, and the seed of dropout and stochastic depth in the device's generator, which a replay reads anew. A
replayed step therefore draws what the same step draws without a graph, and a run that is continued stays the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from normfree.data.seeds import key
from normfree.optim.agc import ClipReport
from normfree.optim.fused import FusedUpdate

if TYPE_CHECKING:
    from normfree.train.trainer import Trainer

#: Whether runs take a graph where `graphable` allows one. False: it is not yet measured, nor run, on a GPU.
STEP_GRAPH = False

#: Steps before the capture: kernels are chosen and compiled in them, momentum and tables are made.
WARMUP = 3


class Outcome(NamedTuple):
    """Mean loss, correct answers, and the clipping of a step, all on the device."""

    loss: Tensor
    correct: Tensor
    report: ClipReport


Work = Callable[[], Outcome]
#: Records what the work would do. Returns what does it again, and the tensors in which its outcome then lies.
Capture = Callable[[Work], tuple[Callable[[], None], Outcome]]


def graphable(trainer: Trainer) -> bool:
    """Whether every step of the run is the same work on the device: one process, one micro-batch of one size, nothing
    that the host has to look at or do in between, and compiled blocks, without which a graph would keep what autograd
    keeps of every block apart."""
    config = trainer.config
    return (
        trainer.device.type == "cuda"
        and config.compile
        and config.parallel == "replicated"
        and trainer.world.size == 1
        and not config.optim.sam_rho
        and config.input.micro_batch in (0, config.input.batch_size)
    )


def graphed_step(trainer: Trainer) -> GraphedStep | None:
    """The step of `trainer` as a graph; None: it cannot be one, or `STEP_GRAPH` is off."""
    if not STEP_GRAPH or not graphable(trainer):
        return None
    update = trainer.update.fused()
    return None if update is None else GraphedStep(trainer, update)


class GraphedStep:
    """Steps of `trainer` on batches of one shape: some as usual, on a stream of their own, then replays of a graph.

    update: has tables of its own, which no other step may change.
    capture: for tests, which have no graph.
    """

    def __init__(self, trainer: Trainer, update: FusedUpdate, *, capture: Capture | None = None) -> None:
        self.trainer, self.update = trainer, update
        cuda = trainer.device.type == "cuda"
        self._stream = torch.cuda.Stream(trainer.device) if cuda else None
        self._capture = capture or self._cuda_graph
        self._warm = 0
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._grads: list[Tensor | None] = []
        self._replay: Callable[[], None] | None = None
        self._outcome: Outcome | None = None

    def takes(self, images: Tensor, targets: Tensor) -> bool:
        """Whether the batch has the shape, type and place of the first one."""
        return self._buffers is None or all(
            (t.shape, t.dtype, t.device) == (b.shape, b.dtype, b.device)
            for t, b in zip((images, targets), self._buffers, strict=True)
        )

    def __call__(self, images: Tensor, targets: Tensor, step: int) -> Outcome:
        """Step number `step` on a batch that it takes: images B 3 S S, targets B K. The optimizer has its rate.

        Raises:
            NonFiniteGradientError: a gradient is not finite; nothing was moved.
        """
        if self._buffers is None:
            self._buffers = torch.empty_like(images), torch.empty_like(targets)
        for buffer, tensor in zip(self._buffers, (images, targets), strict=True):
            buffer.copy_(tensor)
        if self._warm >= WARMUP and self._replay is None:
            self._release()
            self._replay, self._outcome = self._capture(self._work)
            self._grads = [p.grad for p in self._parameters()]
        self.update.set_numbers_(step=step)  # behind the capture, after which the table of addresses is sent
        torch.manual_seed(key(self.trainer.config.seed, "model", step, 0))
        outcome = self._run()
        if not torch.isfinite(outcome.report.grad_norm):
            if self._replay is not None:
                for parameter, grad in zip(self._parameters(), self._grads, strict=True):
                    parameter.grad = grad
            self.update.check(outcome.report)
        self._release()
        return outcome

    def _run(self) -> Outcome:
        if self._replay is not None and self._outcome is not None:
            self._replay()
            loss, correct, report = self._outcome  # written over by the next replay, and kept by whoever logs
            copied = ClipReport(report.fraction.clone(), report.units, report.grad_norm.clone())
            return Outcome(loss.clone(), correct.clone(), copied)
        self._warm += 1
        if self._stream is None:
            return self._work()
        # What is chosen and kept per stream (workspaces, where gradients are added up) has to be that of the capture.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            outcome = self._work()
        torch.cuda.current_stream().wait_stream(self._stream)
        return outcome

    def _work(self) -> Outcome:
        """What is captured: no seed, no wait, and nothing that comes from the host and changes."""
        assert self._buffers is not None
        images, targets = self._buffers
        with self.trainer.passes():
            loss, correct = self.trainer.pass_(images, targets, whole=len(images))
        return Outcome(loss, correct, self.update.launch_())

    def _cuda_graph(self, work: Work) -> tuple[Callable[[], None], Outcome]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            outcome = work()
        return graph.replay, outcome

    def _parameters(self) -> list[Any]:
        return [p for group in self.trainer.optimizer.param_groups for p in group["params"]]

    def _release(self) -> None:
        """No gradient is left to add to: those of a graph are written anew by each replay."""
        self.trainer.optimizer.zero_grad(set_to_none=True)
