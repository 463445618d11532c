"""normfree.ops.gelu."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.ops.conv2d import Activation
from normfree.ops.gelu import gelu_erf, gelu_tanh, silu
from normfree.suggest import did_you_mean


def _glu(x: Tensor) -> Tensor:
    return F.glu(x, dim=1)


def _log_softmax(x: Tensor) -> Tensor:
    return F.log_softmax(x, dim=1)


#: Functions by the reference's names. Over channels (dimension 1) where the function mixes elements.
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


#: γ: what an activation of N(0, 1) is multiplied by to have unit variance. These are the reference code's
#: constants: Monte-Carlo estimates in float32, about 5e-4 above the closed forms, and part of the released
#: weights' function. `gain_of` computes the exact value.
GAINS: dict[str, float] = {
    "identity": 1.0,
    "celu": 1.270926833152771,
    "elu": 1.2716004848480225,
    "gelu": 1.7015043497085571,
    "gelu_erf": 1.7015043497085571,  # timm keeps the tanh form's
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
    """The unscaled activation function called `name` (a key of `ACTIVATIONS`).

    Raises:
        ValueError: the name is unknown.
    """
    if name not in ACTIVATIONS:
        raise ValueError(
            f"activation {name!r} is not known.{did_you_mean(name, ACTIVATIONS)} Known: {', '.join(ACTIVATIONS)}."
        )
    return ACTIVATIONS[name]


def gain_of(fn: Activation) -> float:
    """γ of any elementwise activation: Var[fn(z)] ** -0.5 for z ~ N(0, 1) ([A] section 3).

    Integrated in float64 by the trapezoidal rule on [-12, 12], which for smooth integrands converges faster
    than any power of the step, and for a kink (ReLU at 0) is exact to 1e-9 because 0 is a grid point.

    Raises:
        ValueError: `fn` is constant, not finite there, or does not act element by element.
    """
    z = torch.linspace(-12.0, 12.0, 240_001, dtype=torch.float64)
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    y = fn(z)
    if y.shape != z.shape:
        raise ValueError(
            f"gain_of: the activation maps shape {tuple(z.shape)} to {tuple(y.shape)}; "
            "it must act element by element."
        )
    mean = torch.trapezoid(y * density, z)
    variance = torch.trapezoid((y - mean) ** 2 * density, z).item()
    if not math.isfinite(variance) or variance < 1e-20:
        raise ValueError(
            f"gain_of: the activation has variance {variance} under N(0, 1); "
            "a gain needs a finite variance above 0."
        )
    return variance**-0.5


class ScaledActivation(nn.Module):
    """`act(x) * γ`: maps N(0, 1) to unit variance ([A] section 3). See `scaled_activation`."""

    def __init__(self, fn: Activation, gain: float) -> None:
        super().__init__()
        self.fn = fn
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) * self.gain

    def extra_repr(self) -> str:
        return f"{getattr(self.fn, '__name__', self.fn)}, gain={self.gain:.6g}"


def scaled_activation(name: str | Activation) -> ScaledActivation:
    """An activation with unit variance on N(0, 1), as a module for networks of your own.

    `name` is a key of `GAINS` (the reference's constant is used) or any elementwise function (its γ is
    computed by `gain_of`). Our own networks carry γ in the next convolution's weight instead.

    Raises:
        ValueError: the name is unknown, or no gain can be computed.
    """
    if isinstance(name, str):
        fn = activation(name)
        return ScaledActivation(fn, GAINS[name])
    return ScaledActivation(name, gain_of(name))
