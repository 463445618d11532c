"""The draws that stand for a signal have the moments that they should."""

import pytest
import torch

from normfree.models.activations import gain_of
from normfree.surgery.variance import Signal, Tracker


def test_normal_draws_have_their_variances_and_are_independent():
    tracker = Tracker()
    one, two = tracker.normal(between=0.5, within=0.25), tracker.normal(between=0.5, within=0.25)
    for signal in (one, two):
        assert signal.between == pytest.approx(0.5, rel=1e-9)
        assert signal.within == pytest.approx(0.25, rel=1e-9)
    assert Signal(one.draws + two.draws).within == pytest.approx(0.5, rel=0.02)


def test_a_convolution_makes_the_whole_variance_one():
    tracker = Tracker()
    read = tracker.normal(between=0.5, within=0.25)
    out, scale = tracker.convolved(read, depthwise=False)
    assert scale == pytest.approx(0.75**-0.5)
    assert (out.between, out.within) == pytest.approx((2 / 3, 1 / 3))
    out, scale = tracker.convolved(read, depthwise=True)  # the mean of its one channel is taken away
    assert scale == pytest.approx(0.25**-0.5)
    assert (out.between, out.within) == pytest.approx((0, 1))


@pytest.mark.parametrize("act", [torch.relu, torch.nn.functional.silu, torch.tanh])
def test_gamma_comes_out_of_the_draws(act):
    tracker = Tracker()
    _, scale = tracker.convolved(Signal(act(tracker.normal().draws)), depthwise=False)
    assert scale == pytest.approx(gain_of(act), rel=2e-3)


def test_max_pooling_is_the_largest_of_nine():
    """Mean and variance of the largest of nine N(0, 1): 1.485 and 0.357 (tables of normal order statistics)."""
    pooled = Tracker().largest(Tracker().normal(), 9)
    assert pooled.draws.mean().item() == pytest.approx(1.485, abs=0.01)
    assert pooled.within == pytest.approx(0.357, abs=0.01)
