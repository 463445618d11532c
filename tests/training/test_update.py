"""Tests of the update by fused kernels and by three calls, as `Trainer.step` uses it."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from normfree.data.loader import Batch
from normfree.native.library import library
from normfree.training.config import OptimConfig
from normfree.training.divergence import DivergedError
from normfree.training.trainer import Trainer
from normfree.training.update import Update

Make, Batches = Callable[..., Trainer], Callable[[int], Batch]


def with_engine(trainer: Trainer, engine: str) -> Trainer:
    """Return the trainer with its update computed by `engine`."""
    config = trainer.config.optim
    trainer.update = Update(
        trainer.optimizer, model=trainer.net, ema=trainer.ema, config=config, engine=engine
    )
    return trainer


def assert_near(one: Trainer, other: Trainer) -> None:
    for file, tensors in one.state.tensors().items():
        for name, tensor in tensors.items():
            wanted = other.state.tensors()[file][name].double()
            error = float((tensor.double() - wanted).abs().max())
            assert error <= 4e-6 * float(wanted.abs().max()), (file, name, error)


@pytest.fixture(params=["triton", "native"])
def engine(request: pytest.FixtureRequest) -> str:
    """An engine with fused kernels: Triton's, in the interpreter, or those in C."""
    request.getfixturevalue("interpreted_update" if request.param == "triton" else "compiled")
    return request.param


def test_runs_use_the_compiled_kernels_where_they_exist(small_trainer: Make) -> None:
    assert (small_trainer().update.fused is None) == (library() is None)
    assert with_engine(small_trainer(), "torch").update.fused is None


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("tritn", "unknown engine 'tritn'. Did you mean 'triton'?"),
        ("triton", "engine 'triton' cannot do this update"),
    ],
)
def test_an_engine_that_cannot_work_here_is_an_error(small_trainer: Make, engine: str, message: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; the Linux wheels of PyTorch install it")
    with pytest.raises(ValueError, match=re.escape(message)):
        with_engine(small_trainer(), engine)


def test_fused_steps_equal_three_calls(small_trainer: Make, some_batch: Batches, engine: str) -> None:
    ours, theirs = with_engine(small_trainer(), engine), with_engine(small_trainer(), "torch")
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
    small_trainer: Make, some_batch: Batches, engine: str
) -> None:
    messages = []
    for trainer in (with_engine(small_trainer(), engine), with_engine(small_trainer(), "torch")):
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


@pytest.mark.gpu
def test_on_a_gpu_fused_steps_equal_three_calls(small_trainer: Make, some_batch: Batches) -> None:
    ours, theirs = (with_engine(small_trainer(device="cuda"), engine) for engine in ("triton", "torch"))
    for step in range(4):
        ours.step(some_batch(step), step)
        theirs.step(some_batch(step), step)
        assert_near(ours, theirs)
