"""On a CPU, small tensors go through PyTorch's own operations, with the same results to rounding."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.models.layers import WSConv2d
from normfree.ops.conv2d import LEAST_WORK, is_small
from normfree.ops.gated_add import LEAST_ELEMENTS, gated_add
from normfree.ops.gelu import _LEAST, gelu_erf, gelu_tanh, silu


@pytest.fixture(autouse=True)
def least(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits of the package, in place of those in conftest.py."""


def nodes(y: Tensor) -> set[str]:
    """Return the names of the nodes of a graph of autograd."""
    found, left = set(), [y.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node.name() not in found:
            found.add(node.name())
            left += [other for other, _ in node.next_functions]
    return found


def test_a_convolution_is_small_by_its_multiplications():
    weight = torch.empty(64, 16, 3, 3, device="meta")
    rows = LEAST_WORK // weight.numel()  # of the output
    for stride in (1, 2):
        side = 4 * stride
        images = rows // 16
        x = torch.empty(images, 16, side, side)
        assert is_small(x, weight, stride)
        assert not is_small(torch.empty(images + 1, 16, side, side), weight, stride)
    assert not is_small(torch.empty(1, 16, 4, 4, device="meta"), weight, 1)


@pytest.mark.parametrize("act", [None, F.relu, gelu_tanh])
def test_small_and_large_convolutions_agree(act, monkeypatch):
    torch.manual_seed(0)
    conv, x = WSConv2d(8, 8, kernel_size=3), torch.randn(2, 8, 9, 9)
    found = []
    for limit in (LEAST_WORK, 0):
        monkeypatch.setattr("normfree.ops.conv2d.LEAST_WORK", limit)
        source = x.clone().requires_grad_()
        y = conv(source, act=act)
        assert ("_Conv2dBackward" in nodes(y)) == (limit == 0 and act is gelu_tanh)
        found.append([y, *torch.autograd.grad(y.square().sum(), [source, *conv.parameters()])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "name", "reference"),
    [
        (gelu_tanh, "gelu", nn.GELU("tanh")),
        (silu, "silu", nn.SiLU()),
        (gelu_erf, "permuted", nn.GELU()),
    ],
)
def test_small_activations_are_those_of_pytorch(function, name, reference):
    x = torch.randn(1, _LEAST[name] // 64 - 1, 8, 8).contiguous(memory_format=torch.channels_last)
    assert torch.equal(function(x), reference(x))
    assert not {"_GatedBackward", "PermuteBackward0"} & nodes(function(x.requires_grad_()))


@pytest.mark.parametrize("kept", [None, torch.tensor([0, 2])])
@pytest.mark.parametrize("shape", [(), (3, 1, 1, 1), (3, 4, 1, 1)])
def test_small_and_large_additions_agree(kept, shape, monkeypatch):
    torch.manual_seed(0)
    shortcut, branch, gate = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5), torch.randn(shape)
    if kept is not None:
        branch, gate = branch[kept], gate[kept] if shape else gate
    found = []
    for limit in (LEAST_ELEMENTS, 0):
        monkeypatch.setattr("normfree.ops.gated_add.LEAST_ELEMENTS", limit)
        own = [t.clone().requires_grad_() for t in (shortcut, branch, gate)]
        y = gated_add(*own, kept=kept)
        assert ("_GatedAddBackward" in nodes(y)) == (limit == 0)
        found.append([y, *torch.autograd.grad(y.square().sum(), own)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
