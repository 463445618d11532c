"""The samples that represent a signal have the intended moments."""

from collections.abc import Callable

import pytest
import torch

from normfree.models.activations import gain_of
from normfree.surgery.variance import Signal, Tracker


def test_normal_samples_have_their_variances_and_are_independent() -> None:
    tracker = Tracker()
    one, two = tracker.normal(between=0.5, within=0.25), tracker.normal(between=0.5, within=0.25)
    for signal in (one, two):
        assert signal.between == pytest.approx(0.5, rel=1e-9)
        assert signal.within == pytest.approx(0.25, rel=1e-9)
    assert Signal(one.samples + two.samples).within == pytest.approx(0.5, rel=0.02)


def test_a_convolution_makes_the_total_variance_one() -> None:
    tracker = Tracker()
    read = tracker.normal(between=0.5, within=0.25)
    out, scale = tracker.convolved(read, depthwise=False)
    assert scale == pytest.approx(0.75**-0.5)
    assert (out.between, out.within) == pytest.approx((2 / 3, 1 / 3))
    # A depthwise filter removes the mean of its only channel.
    out, scale = tracker.convolved(read, depthwise=True)
    assert scale == pytest.approx(0.25**-0.5)
    assert (out.between, out.within) == pytest.approx((0, 1))


@pytest.mark.parametrize("act", [torch.relu, torch.nn.functional.silu, torch.tanh])
def test_the_scale_after_an_activation_is_gamma(act: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tracker = Tracker()
    _, scale = tracker.convolved(Signal(act(tracker.normal().samples)), depthwise=False)
    assert scale == pytest.approx(gain_of(act), rel=2e-3)


def test_max_pooling_is_the_largest_of_nine() -> None:
    """The largest of nine N(0, 1) has mean 1.485 and variance 0.357 (tables of normal order statistics)."""
    pooled = Tracker().largest(Tracker().normal(), 9)
    assert pooled.samples.mean().item() == pytest.approx(1.485, abs=0.01)
    assert pooled.within == pytest.approx(0.357, abs=0.01)
