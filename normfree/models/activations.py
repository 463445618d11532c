"""Activation functions by name, and their gains γ.

Source: [A] arXiv 2101.08692, section 4, and the reference code.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.ops.conv2d import Activation
from normfree.ops.gelu import gelu_erf, gelu_tanh, silu
from normfree.suggest import problem, unknown


def _glu(x: Tensor) -> Tensor:
    return F.glu(x, dim=1)


def _log_softmax(x: Tensor) -> Tensor:
    return F.log_softmax(x, dim=1)


# Functions by the names of the reference code. Those that mix elements do so over channels (dimension 1).
ACTIVATIONS: dict[str, Activation] = {
    "identity": lambda x: x,
    "celu": F.celu,
    "elu": F.elu,
    "gelu": gelu_tanh,
    "gelu_erf": gelu_erf,
    "glu": _glu,
    "leaky_relu": F.leaky_relu,
    "log_sigmoid": F.logsigmoid,
    "log_softmax": _log_softmax,
    "relu": F.relu,
    "relu6": F.relu6,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": silu,
    "soft_sign": F.softsign,
    "softplus": F.softplus,
    "tanh": torch.tanh,
}


# γ by activation: the factor that gives act(z), z ~ N(0, 1), unit variance. These are the constants of the reference
# code, which the released weights were trained with: Monte Carlo estimates in float32, about 5e-4 above the exact
# values that `gain_of` computes.
GAINS: dict[str, float] = {
    "identity": 1.0,
    "celu": 1.270926833152771,
    "elu": 1.2716004848480225,
    "gelu": 1.7015043497085571,
    "gelu_erf": 1.7015043497085571,  # timm uses the gain of the tanh form
    "glu": 1.8484294414520264,
    "leaky_relu": 1.70590341091156,
    "log_sigmoid": 1.9193484783172607,
    "log_softmax": 1.0002083778381348,
    "relu": 1.7139588594436646,
    "relu6": 1.7131484746932983,
    "selu": 1.0008515119552612,
    "sigmoid": 4.803835391998291,
    "silu": 1.7881293296813965,
    "soft_sign": 2.338853120803833,
    "softplus": 1.9203323125839233,
    "tanh": 1.5939117670059204,
}


def activation(name: str) -> Activation:
    """Return the activation function called `name`, a key of `ACTIVATIONS`, without its gain.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in ACTIVATIONS:
        raise ValueError(unknown("activation", name, ACTIVATIONS))
    return ACTIVATIONS[name]


def gain_of(fn: Activation) -> float:
    """Return γ of any elementwise activation: Var[fn(z)] ** -0.5 for z ~ N(0, 1).

    The integral is computed in float64 by the trapezoidal rule on [-12, 12], which converges faster than any power of
    the step for smooth integrands, and is exact to 1e-9 for a kink at 0 (ReLU), because 0 is a grid point.

    Args:
        fn: maps a tensor of any shape to one of the same shape.

    Raises:
        ValueError: `fn` is constant, not finite on [-12, 12], or does not act element by element.

    Examples:
        >>> import torch
        >>> from normfree import gain_of
        >>> round(gain_of(torch.relu), 4)
        1.7129

    Source: [A] section 4.
    """
    z = torch.linspace(-12.0, 12.0, 240_001, dtype=torch.float64)
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    y = fn(z)
    if y.shape != z.shape:
        raise ValueError(
            problem(
                f"the activation maps shape {tuple(z.shape)} to {tuple(y.shape)}",
                allowed="functions that act element by element",
                fix="pass the gain to ScaledActivation yourself",
            )
        )
    mean = torch.trapezoid(y * density, z)
    variance = torch.trapezoid((y - mean) ** 2 * density, z).item()
    if not math.isfinite(variance) or variance < 1e-20:
        raise ValueError(
            problem(
                f"the activation has variance {variance} for inputs from N(0, 1)",
                allowed="a finite variance above 0",
                fix="use an activation that is neither constant nor infinite on [-12, 12]",
            )
        )
    return variance**-0.5


class ScaledActivation(nn.Module):
    """fn(x) · gain: maps N(0, 1) to unit variance, see `scaled_activation`."""

    def __init__(self, fn: Activation, gain: float) -> None:
        super().__init__()
        self.fn = fn
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) * self.gain

    def extra_repr(self) -> str:
        return f"{getattr(self.fn, '__name__', self.fn)}, gain={self.gain:.6g}"


def scaled_activation(name: str | Activation) -> ScaledActivation:
    """Return a module fn(x) · γ that maps inputs from N(0, 1) to unit variance, for networks of your own.

    The networks of this package multiply the next convolution's weight by γ instead (`WSConv2d.input_scale`).

    Args:
        name: a key of `GAINS`, whose constant is then used, or any elementwise function, whose γ `gain_of` computes.

    Raises:
        ValueError: the name is unknown, or no gain can be computed.

    Examples:
        >>> import torch
        >>> from normfree import scaled_activation
        >>> scaled_activation("silu")
        ScaledActivation(silu, gain=1.78813)
        >>> round(float(scaled_activation(torch.tanh)(torch.randn(100_000)).var()), 1)
        1.0

    Source: [A] section 4.
    """
    if isinstance(name, str):
        fn = activation(name)
        return ScaledActivation(fn, GAINS[name])
    return ScaledActivation(name, gain_of(name))
