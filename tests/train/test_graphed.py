"""The step as a graph. On a CPU what would be captured is run again instead, which is what a replay does: the same work
on the same buffers, its outcome in the same tensors. What the host may change in between is tested to count or not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from normfree.data.loader import Batch
from normfree.train import graphed, update
from normfree.train.config import Input, Log, Optim
from normfree.train.graphed import GraphedStep, Outcome, Work, graphable, graphed_step
from normfree.train.trainer import Diverged, Trainer

Make, Batches = Callable[..., Trainer], Callable[[int], Batch]


class Recorder:
    """A capture without a graph: the work is done once in Python, which leaves no trace but its outcome's tensors and
    gradients, and a replay writes into those. `captures` and `replays` count."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.captures, self.replays = trainer, 0, 0

    def __call__(self, work: Work) -> tuple[Callable[[], None], Outcome]:
        self.captures += 1
        before = copied(self.trainer)
        outcome = work()
        put_(self.trainer, before)
        parameters = list(self.trainer.net.parameters())
        grads = [p.grad for p in parameters]

        def replay() -> None:
            self.replays += 1
            now = [p.grad for p in parameters]
            for p in parameters:
                p.grad = None
            made = work()
            for p, grad, there in zip(parameters, grads, now, strict=True):
                grad.copy_(p.grad)
                p.grad = there
            for one, other in zip(tensors(outcome), tensors(made), strict=True):
                one.copy_(other)

        return replay, outcome


def tensors(outcome: Outcome) -> list[Tensor]:
    return [outcome.loss, outcome.correct, outcome.report.fraction, outcome.report.grad_norm]


State = dict[str, dict[str, Tensor]]


def copied(trainer: Trainer) -> State:
    return {file: {n: t.clone() for n, t in part.items()} for file, part in trainer.tensors().items()}


@torch.no_grad()
def put_(trainer: Trainer, state: State) -> None:
    for file, part in trainer.tensors().items():
        for name, tensor in part.items():
            tensor.copy_(state[file][name])


@pytest.fixture(autouse=True)
def _one_step_before_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed, "WARMUP", 1)


def graphed_trainer(make: Make, **changes: object) -> tuple[Trainer, Recorder]:
    trainer = make(**changes)
    own, recorder = trainer.update.fused(), Recorder(trainer)
    assert own is not None
    trainer.graphed = GraphedStep(trainer, own, capture=recorder)
    return trainer, recorder


def assert_same_bits(one: Trainer, other: Trainer) -> None:
    for file, part in one.tensors().items():
        for name, tensor in part.items():
            assert torch.equal(tensor, other.tensors()[file][name]), (file, name)


def test_replayed_steps_are_the_steps_bit_for_bit(
    small_trainer: Make, some_batch: Batches, update_by_torch: None
) -> None:
    """Warm-up of the rate, decay of the average, dropout, stochastic depth and mixing differ from step to step. Every
    fourth step is not replayed: its gradients are looked at."""
    ours, recorder = graphed_trainer(small_trainer, log=Log(every=1))
    theirs = small_trainer(log=Log(every=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("normfree.train.trainer.SAMPLE_RATIOS", 4)
        kept = []
        for step in range(6):
            kept.append(
                (got := ours.step(some_batch(step), step), wanted := theirs.step(some_batch(step), step))
            )
            assert (ours.ratios == {}) == (step != 3)
            assert ours.ratios == theirs.ratios
            assert float(got[2]) == float(wanted[2])
            assert_same_bits(ours, theirs)
    assert (recorder.captures, recorder.replays) == (1, 6 - 1 - 1)
    for (
        loss,
        correct,
        report,
    ), wanted in kept:  # a later replay does not write over what an earlier one gave
        assert torch.equal(loss, wanted[0])
        assert torch.equal(correct, wanted[1])
        assert torch.equal(report.grad_norm, wanted[2].grad_norm)


def test_a_run_may_stop_and_continue_anywhere(
    small_trainer: Make, some_batch: Batches, update_by_torch: None
) -> None:
    """Nothing but (seed, step) decides what is drawn, so a fresh graph goes on where another one was left."""
    whole, _ = graphed_trainer(small_trainer)
    first, _ = graphed_trainer(small_trainer)
    for step in range(4):
        whole.step(some_batch(step), step)
        if step < 2:
            first.step(some_batch(step), step)
    second, recorder = graphed_trainer(small_trainer)
    put_(second, first.tensors())
    for step in range(2, 4):
        second.step(some_batch(step), step)
    assert recorder.replays == 1
    assert_same_bits(whole, second)


def test_batches_of_another_shape_take_the_usual_way(
    small_trainer: Make, some_batch: Batches, update_by_torch: None
) -> None:
    trainer, _ = graphed_trainer(small_trainer)
    assert trainer.graphed is not None
    images, targets = trainer.prepare(some_batch(0), 0)
    assert trainer.graphed.takes(images, targets)
    trainer.step(some_batch(0), 0)
    assert trainer.graphed.takes(images, targets)
    assert not trainer.graphed.takes(images[:4], targets[:4])
    assert not trainer.graphed.takes(images, targets.double())


@pytest.mark.parametrize("step", [0, 2])
def test_a_gradient_that_is_not_finite_moves_nothing_and_is_named(
    small_trainer: Make, some_batch: Batches, update_by_torch: None, step: int
) -> None:
    """Before the capture and after it."""
    trainer, _ = graphed_trainer(small_trainer)
    for earlier in range(step):
        trainer.step(some_batch(earlier), earlier)
    before = copied(trainer)
    work = trainer.pass_

    def poisoned(x: Tensor, y: Tensor, *, whole: int) -> tuple[Tensor, Tensor]:
        found = work(x, y, whole=whole)
        trainer.net.head.weight.grad[0, 0] = float("nan")
        return found

    trainer.pass_ = poisoned  # type: ignore[method-assign]
    with pytest.raises(Diverged, match=rf"^step {step}: 1 of \d+ gradients are not finite: 'head.weight'"):
        trainer.step(some_batch(step), step)
    for file, part in trainer.tensors().items():
        assert all(torch.equal(t, before[file][n]) for n, t in part.items())


def test_it_is_off_until_a_gpu_has_measured_it(small_trainer: Make) -> None:
    assert not graphed.STEP_GRAPH
    assert small_trainer().graphed is None


class OnCuda:
    """What `graphable` reads of a trainer, as if a GPU were there."""

    def __init__(self, trainer: Trainer, **changes: object) -> None:
        self.device, self.world = torch.device("cuda"), trainer.world
        self.config = trainer.config.model_copy(update={"compile": True} | changes)


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [
        ({}, True),
        ({"input": Input(batch_size=6, micro_batch=6)}, True),
        ({"input": Input(batch_size=6, micro_batch=3)}, False),
        ({"compile": False}, False),
        ({"parallel": "exact"}, False),
        ({"parallel": "sharded"}, False),
        ({"optim": Optim(sam_rho=0.05)}, False),
    ],
)
def test_which_runs_are_the_same_work_at_every_step(
    small_trainer: Make, changes: dict[str, object], allowed: bool
) -> None:
    trainer = small_trainer()
    assert not graphable(trainer)  # on a CPU
    assert graphable(OnCuda(trainer, **changes)) == allowed  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_on_a_gpu_replays_are_the_steps(
    small_trainer: Make, some_batch: Batches, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Same kernels, same draws: what is captured is what the usual way issues."""
    changes = {"device": "cuda", "compile": True, "precision": precision, "log": Log(every=100)}
    monkeypatch.setattr(update, "UPDATE_KERNEL", True)
    theirs = small_trainer(**changes)
    monkeypatch.setattr(graphed, "STEP_GRAPH", True)
    ours = small_trainer(**changes)
    assert graphed_step(ours) is not None
    for step in range(8):
        got, wanted = (t.step(some_batch(step), step) for t in (ours, theirs))
        torch.testing.assert_close(got[0], wanted[0], rtol=1e-5, atol=0.0)
        for file, part in ours.tensors().items():
            for name, tensor in part.items():
                error = float((tensor - theirs.tensors()[file][name]).abs().max())
                assert error <= 1e-5 * float(tensor.abs().max()), (file, name, error)
