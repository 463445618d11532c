"""Layers against their formulas: standardization, gains, SAME padding, gates."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from normfree.models.activations import ACTIVATIONS, GAINS, gain_of, scaled_activation
from normfree.models.layers import (
    Conv2d,
    SqueezeExcite,
    StochasticDepth,
    WSConv2d,
    avg_pool_same,
    max_pool,
    standardize,
)
from normfree.ops.padding import same_padding
from normfree.ops.standardize_torch import WS_EPS

# Var[act(z)] ** -0.5 by numerical integration; the reference code has Monte Carlo estimates of these values.
EXACT_GAINS = {
    "celu": 1.2708434179, "elu": 1.2708434179, "gelu": 1.7009165617, "leaky_relu": 1.7048316272,
    "log_sigmoid": 1.9191259801, "relu": 1.7128585505, "relu6": 1.7128585550, "selu": 1.0, "sigmoid": 4.8013133721,
    "silu": 1.7871872221, "soft_sign": 2.3375333632, "softplus": 1.9191259801, "tanh": 1.5925374198, "identity": 1.0,
}  # fmt: skip


def formula(weight, gain, scale, eps):
    """Return the standardized weight in float64, computed filter by filter."""
    filters = weight.double().flatten(1).numpy()
    out = [
        (w - w.mean()) * g * scale / math.sqrt(max(w.var() * w.size, eps))
        for w, g in zip(filters, gain.double().numpy(), strict=True)
    ]
    return torch.from_numpy(np.stack(out)).view(weight.shape)


def test_standardized_weights_equal_the_formula_above_and_below_the_lower_bound():
    weight, gain = torch.randn(6, 5, 3, 3), torch.rand(6) + 0.5
    weight[0] *= 1e-4  # v·N = 45e-8, below the lower bound of 1e-4
    weight[1] = 0.25  # variance 0
    got = standardize(weight.double(), gain.double(), scale=1.7)
    torch.testing.assert_close(got, formula(weight, gain, 1.7, WS_EPS["floor"]), rtol=1e-12, atol=1e-15)
    assert got[1].abs().max() == 0
    assert got[0].norm() < 0.1 * got[2].norm()


def test_standardized_filters_have_mean_zero_and_variance_one_over_fan_in():
    filters = WSConv2d(8, 16, kernel_size=3).double().standardized_weight().flatten(1)
    torch.testing.assert_close(filters.mean(1), torch.zeros(16, dtype=torch.float64), atol=1e-15, rtol=0)
    torch.testing.assert_close(filters.var(1, correction=0), torch.full((16,), 1 / 72, dtype=torch.float64))


def test_standardization_ignores_shift_and_positive_scale():
    weight, gain = torch.randn(4, 6, 3, 3).double(), torch.ones(4).double()
    torch.testing.assert_close(standardize(3.0 * weight + 2.0, gain), standardize(weight, gain))


def test_no_gradient_flows_through_the_variance_below_its_lower_bound(monkeypatch):
    gain = torch.ones(1, dtype=torch.float64)
    direction = torch.tensor([1.0, -2.0, 0.5, 0.5], dtype=torch.float64).view(1, 4, 1, 1)  # its mean is 0
    floor = 2.0**-13  # a power of two near the real one, so that equality is exact
    monkeypatch.setitem(WS_EPS, "floor", floor)

    def derivative_along_itself(power: float) -> float:
        start = direction * math.sqrt(power / float(direction.square().sum()))
        weight = start.clone().requires_grad_()
        (standardize(weight, gain) * start).sum().backward()
        return float((weight.grad * start).sum())

    assert derivative_along_itself(4 * floor) == pytest.approx(0.0, abs=1e-12)  # above: ŵ ignores w's scale
    below = floor / 4 / math.sqrt(floor)  # the derivative of w / sqrt(floor)
    assert derivative_along_itself(floor / 4) == pytest.approx(below)


def test_input_scale_equals_a_scaled_input():
    conv = WSConv2d(4, 8, kernel_size=3, stride=2, input_scale=1.6).double()
    plain = WSConv2d(4, 8, kernel_size=3, stride=2).double()
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(2, 4, 9, 9).double()
    torch.testing.assert_close(conv(x), plain(1.6 * x))


def test_half_precision_weights_are_standardized_in_float32():
    weight, gain = torch.randn(8, 64, 3, 3).bfloat16(), torch.ones(8).bfloat16()
    exact = standardize(weight.float(), gain.float())
    assert torch.equal(standardize(weight, gain), exact.bfloat16())


@pytest.mark.parametrize("name", EXACT_GAINS)
def test_gain_of_computes_the_exact_constants(name):
    assert gain_of(ACTIVATIONS[name]) == pytest.approx(EXACT_GAINS[name], rel=2e-9)


@pytest.mark.parametrize("name", [n for n in GAINS if n not in ("identity", "glu", "log_softmax")])
def test_the_constants_of_the_reference_are_estimates_slightly_above_the_exact_values(name):
    assert 0 < GAINS[name] / gain_of(ACTIVATIONS[name]) - 1 < 1e-3


@pytest.mark.parametrize("name", GAINS)
def test_scaled_activations_give_unit_variance(name):
    z = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    z = z.view(512, 4096, 2) if name == "glu" else z.T.contiguous().T if name == "log_softmax" else z
    out = scaled_activation(name)(z.transpose(1, 2) if name == "glu" else z)
    assert out.var().item() == pytest.approx(1.0, abs=6e-3)


def test_the_gain_of_a_new_function_is_computed():
    act = scaled_activation(lambda x: 3.0 * torch.relu(x))
    assert act.gain == pytest.approx(EXACT_GAINS["relu"] / 3, rel=1e-8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: WSConv2d(1, 8, kernel_size=1),
            "WSConv2d(1, 8, kernel_size=1, groups=1) has a fan-in of 1, so all standardized weights would be 0. "
            "Allowed: a fan-in of 2 or more. Fix: use a larger kernel_size or fewer groups.",
        ),
        (
            lambda: WSConv2d(8, 12, groups=3),
            "WSConv2d(8, 12, kernel_size=3, groups=3). Allowed: groups that divide both channel counts. "
            "Fix: use groups=4, the largest, or a divisor of it.",
        ),
        (lambda: scaled_activation("sigmod"), "unknown activation 'sigmod'. Did you mean 'sigmoid'? Allowed: 'iden"),
        (
            lambda: gain_of(torch.zeros_like),
            "the activation has variance 0.0 for inputs from N(0, 1). Allowed: a finite variance above 0. Fix: use ",
        ),
        (
            lambda: gain_of(lambda x: x.sum()),
            "the activation maps shape (240001,) to (). Allowed: functions that act element by element. Fix: pass ",
        ),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  # compared below
        call()
    assert str(error.value).startswith(message)


# (size, kernel size, stride) -> (low, high), results of XLA
@pytest.mark.parametrize(
    ("size", "kernel_size", "stride", "expected"),
    [(8, 3, 2, (0, 1)), (9, 3, 2, (1, 1)), (8, 7, 2, (2, 3)), (9, 7, 2, (3, 3)), (7, 3, 1, (1, 1)), (8, 2, 2, (0, 0)),
     (9, 2, 2, (0, 1)), (1, 3, 2, (1, 1)), (8, 1, 2, (0, 0))],
)  # fmt: skip
def test_same_padding(size, kernel_size, stride, expected):
    assert same_padding(size, kernel_size, stride) == expected


@pytest.mark.parametrize("size", range(1, 12))
@pytest.mark.parametrize(("kernel_size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
def test_same_convolutions_have_ceil_outputs_and_zeros_outside(size, kernel_size, stride):
    conv = Conv2d(2, 3, kernel_size=kernel_size, stride=stride).double()
    x = torch.randn(1, 2, size, size + 1).double()
    low, high = same_padding(size, kernel_size, stride)
    left, right = same_padding(size + 1, kernel_size, stride)
    expected = F.conv2d(F.pad(x, (left, right, low, high)), conv.weight, stride=stride)
    assert conv(x).shape[2:] == (math.ceil(size / stride), math.ceil((size + 1) / stride))
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize("size", [1, 2, 5, 6])
def test_pools_at_odd_borders(size):
    x = torch.randn(1, 1, size, size)
    averaged, largest = avg_pool_same(x), max_pool(x)
    out = math.ceil(size / 2)
    low, _ = same_padding(size, 3, 2)
    assert averaged.shape == largest.shape == (1, 1, out, out)
    for i in range(out):
        for j in range(out):
            inside = x[0, 0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            torch.testing.assert_close(averaged[0, 0, i, j], inside.mean())
            top, left = max(2 * i - low, 0), max(2 * j - low, 0)
            assert largest[0, 0, i, j] == x[0, 0, top : 2 * i - low + 3, left : 2 * j - low + 3].max()


def test_squeeze_excite_equals_its_formula_and_is_initialized_as_in_haiku():
    se = SqueezeExcite(512, hidden=256)
    x = torch.randn(2, 512, 3, 3)
    hidden = F.relu(x.mean((2, 3)) @ se.fc0.weight.T + se.fc0.bias)
    torch.testing.assert_close(se(x)[:, :, 0, 0], torch.sigmoid(hidden @ se.fc1.weight.T + se.fc1.bias))
    sigma = 512**-0.5
    assert se.fc0.weight.abs().max() <= 2 * sigma
    # the standard deviation of a normal distribution truncated at two sigma, not corrected
    assert se.fc0.weight.std().item() == pytest.approx(0.8796 * sigma, rel=0.01)


def test_stochastic_depth_drops_whole_images_and_does_not_rescale():
    layer, x = StochasticDepth(0.25), torch.ones(20_000, 1, 1, 1)
    mask = layer(x)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask.mean().item() == pytest.approx(0.75, abs=0.02)
    assert layer.eval()(x) is None
    assert StochasticDepth(0.0).train()(x) is None


def test_under_autocast_the_gate_of_squeeze_and_excite_is_computed_in_float32():
    """For few rows, conversions of weights and of their gradients cost more than the products."""
    se = SqueezeExcite(32, hidden=8)
    x = torch.randn(2, 32, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        gate = se(x)
        half = se.bfloat16()(x.bfloat16())
    assert gate.dtype == torch.float32
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), gate, rtol=0.02, atol=0.0)
    torch.testing.assert_close(gate, se.float()(x), rtol=0.02, atol=0.0)


def test_squeeze_and_excite_under_autocast_takes_layers_that_are_not_float32():
    class Quantized(torch.nn.Module):
        """Like the quantized layers of PyTorch, without parameters."""

        def __init__(self, layer):
            super().__init__()
            self.kept = [layer]

        def forward(self, x):
            return self.kept[0](x)

    se, x = SqueezeExcite(32, hidden=8), torch.randn(2, 32, 4, 4)
    wanted, fc1 = se(x), se.fc1
    for layer in (Quantized(fc1), torch.nn.Sequential(fc1), deepcopy(fc1).bfloat16()):
        se.fc1 = layer
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(se(x).float(), wanted, rtol=0.05, atol=0.0)
