"""The update by kernel and by three calls, where a run meets it: `Trainer.step`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from normfree.data.loader import Batch
from normfree.native.library import library
from normfree.training import update
from normfree.training.config import OptimConfig
from normfree.training.trainer import Diverged, Trainer

Make, Batches = Callable[..., Trainer], Callable[[int], Batch]


def plain(make: Make, monkeypatch: pytest.MonkeyPatch, **changes: object) -> Trainer:
    """A trainer whose update is the three calls."""
    with monkeypatch.context() as patch:
        patch.setattr(update, "fused_update", lambda *args, **words: None)
        trainer = make(**changes)
    assert trainer.update.kernel is None
    return trainer


def assert_near(one: Trainer, other: Trainer) -> None:
    for file, tensors in one.tensors().items():
        for name, tensor in tensors.items():
            wanted = other.tensors()[file][name].double()
            error = float((tensor.double() - wanted).abs().max())
            assert error <= 4e-6 * float(wanted.abs().max()), (file, name, error)


@pytest.fixture(params=["interpreted", "compiled"])
def some_kernel(request: pytest.FixtureRequest) -> None:
    """Trainers take Triton's kernel through the interpreter, or the one in C."""
    if request.param == "interpreted":
        request.getfixturevalue("update_kernel")
    else:
        request.getfixturevalue("compiled")


def test_runs_take_it_on_a_cpu_but_not_on_a_gpu_until_one_has_measured_it(small_trainer: Make) -> None:
    assert not update.UPDATE_KERNEL
    assert (small_trainer().update.kernel is None) == (library() is None)


def test_steps_by_kernel_are_those_by_three_calls(
    small_trainer: Make, some_batch: Batches, some_kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = small_trainer(), plain(small_trainer, monkeypatch)
    assert ours.update.kernel is not None
    for step in range(4):
        (loss, correct, report), wanted = (t.step(some_batch(step), step) for t in (ours, theirs))
        torch.testing.assert_close(loss, wanted[0], rtol=1e-5, atol=0.0)
        assert torch.equal(correct, wanted[1])
        assert (float(report), report.units) == (pytest.approx(float(wanted[2])), wanted[2].units)
        assert 0.0 < float(report) < 1.0
        assert float(report.grad_norm) == pytest.approx(float(wanted[2].grad_norm), rel=1e-5)
        assert all(p.grad is None for p in ours.net.parameters())
        assert_near(ours, theirs)


def test_a_gradient_that_is_not_finite_says_the_same_and_moves_nothing(
    small_trainer: Make, some_batch: Batches, some_kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    for trainer in (small_trainer(), plain(small_trainer, monkeypatch)):
        trainer.step(some_batch(0), 0)
        before = {f: {n: t.clone() for n, t in part.items()} for f, part in trainer.tensors().items()}
        weight = trainer.net.stages[1][0].conv1.gain
        handle = weight.register_hook(lambda grad: grad * float("inf"))
        with pytest.raises(Diverged) as error:
            trainer.step(some_batch(1), 1)
        handle.remove()
        said.append(str(error.value))
        for file, part in trainer.tensors().items():
            assert all(torch.equal(t, before[file][n]) for n, t in part.items())
    assert said[0] == said[1]
    assert said[0].startswith("step 1: 1 of ")
    assert "stages.1.0.conv1.gain" in said[0]
    assert said[0].endswith("Images of the step begin with 'one.png'. Try --optim.lr 0.017.")


@pytest.mark.parametrize("clip", ["norm", "value", "off"])
def test_other_ways_of_clipping_have_no_kernel(small_trainer: Make, some_kernel: None, clip: str) -> None:
    assert small_trainer(optim=OptimConfig(clip=clip)).update.kernel is None


@pytest.mark.gpu
def test_on_a_gpu_steps_by_kernel_are_those_by_three_calls(
    small_trainer: Make, some_batch: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = plain(small_trainer, monkeypatch, device="cuda")
    monkeypatch.setattr(update, "UPDATE_KERNEL", True)
    ours = small_trainer(device="cuda")
    assert ours.update.kernel is not None
    for step in range(4):
        ours.step(some_batch(step), step)
        theirs.step(some_batch(step), step)
        assert_near(ours, theirs)
