"""Tests of the update by fused kernels and by three calls, as `Trainer.step` uses it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from normfree.data.loader import Batch
from normfree.native.library import library
from normfree.training.config import OptimConfig
from normfree.training.divergence import DivergedError
from normfree.training.trainer import Trainer

Make, Batches = Callable[..., Trainer], Callable[[int], Batch]


def with_three_calls(trainer: Trainer) -> Trainer:
    """Return the trainer with its update computed by three calls."""
    trainer.update.fused = None
    return trainer


def assert_near(one: Trainer, other: Trainer) -> None:
    for file, tensors in one.state.tensors().items():
        for name, tensor in tensors.items():
            wanted = other.state.tensors()[file][name].double()
            error = float((tensor.double() - wanted).abs().max())
            assert error <= 4e-6 * float(wanted.abs().max()), (file, name, error)


def test_runs_use_the_compiled_kernels_where_they_exist(small_trainer: Make) -> None:
    assert (small_trainer().update.fused is None) == (library() is None)


def test_fused_steps_equal_three_calls(small_trainer: Make, some_batch: Batches, compiled: None) -> None:
    ours, theirs = small_trainer(), with_three_calls(small_trainer())
    for step in range(4):
        (loss, correct, report), wanted = (t.step(some_batch(step), step) for t in (ours, theirs))
        torch.testing.assert_close(loss, wanted[0], rtol=1e-5, atol=0.0)
        assert torch.equal(correct, wanted[1])
        assert (float(report), report.units) == (pytest.approx(float(wanted[2])), wanted[2].units)
        assert 0.0 < float(report) < 1.0
        assert float(report.grad_norm) == pytest.approx(float(wanted[2].grad_norm), rel=1e-5)
        assert all(p.grad is None for p in ours.net.parameters())
        assert_near(ours, theirs)


def test_a_gradient_that_is_not_finite_gives_the_same_error_and_changes_nothing(
    small_trainer: Make, some_batch: Batches, compiled: None
) -> None:
    messages = []
    for trainer in (small_trainer(), with_three_calls(small_trainer())):
        trainer.step(some_batch(0), 0)
        before = {f: {n: t.clone() for n, t in part.items()} for f, part in trainer.state.tensors().items()}
        weight = trainer.net.stages[1][0].conv1.gain
        handle = weight.register_hook(lambda grad: grad * float("inf"))
        with pytest.raises(DivergedError) as error:
            trainer.step(some_batch(1), 1)
        handle.remove()
        messages.append(str(error.value))
        for file, part in trainer.state.tensors().items():
            assert all(torch.equal(t, before[file][n]) for n, t in part.items())
    assert messages[0] == messages[1]
    assert messages[0].startswith("step 1: 1 of ")
    assert "stages.1.0.conv1.gain" in messages[0]
    assert (
        "; the images of the step are 'one.png', 'one.png', 'one.png', 'one.png', 'one.png' and 1 more; "
        in messages[0]
    )


@pytest.mark.parametrize("clip", ["norm", "value", "off"])
def test_other_clipping_modes_take_three_calls(small_trainer: Make, clip: str) -> None:
    assert small_trainer(optim=OptimConfig(clip=clip)).update.fused is None
