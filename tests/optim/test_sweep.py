"""One sweep over memory gives the bits of clipping, step and average in three."""

import copy

import pytest
import torch
from torch import nn

from normfree.models.zoo import create_model
from normfree.optim import sweep
from normfree.optim.agc import NonFiniteGradientError, clip_grad_
from normfree.optim.ema import Ema
from normfree.optim.groups import parameter_groups
from normfree.optim.sgd import SGD
from normfree.optim.sweep import SweepUpdate

SMALL = {"widths": (32, 64, 96, 96), "group_width": 8}


def parts(net: nn.Module) -> tuple[SGD, Ema]:
    return SGD(parameter_groups(net, weight_decay=1e-2, clipping=0.02), 0.1), Ema(net, decay=0.9)


def give(net: nn.Module, *, seed: int, without: str = "") -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        noise = (
            torch.randn(p.shape, generator=generator) * 0.02 * (p.detach().norm() / p.numel() ** 0.5 + 0.01)
        )
        p.grad = None if without and without in name else torch.empty_like(p).copy_(noise)


@pytest.mark.parametrize("bucket", [1, 5000, 1 << 20])
@pytest.mark.parametrize("name", ["nfnet_f0", "bn_nfnet_f0"])
def test_the_bits_are_those_of_the_three_calls(name, bucket, monkeypatch):
    """Decayed and not, clipped and not, a parameter without gradients, buffers, channels_last, units on both sides."""
    monkeypatch.setattr(sweep, "BUCKET", bucket)
    torch.manual_seed(0)
    one = create_model(name, num_classes=7, **SMALL).to(memory_format=torch.channels_last)
    two = copy.deepcopy(one)
    (optimizer, ema), (other, other_ema) = parts(one), parts(two)
    assert SweepUpdate.fits(optimizer)
    update = SweepUpdate(optimizer, model=one, ema=ema)
    for step in range(3):
        give(one, seed=step, without="stages.1.0.conv1.weight")
        give(two, seed=step, without="stages.1.0.conv1.weight")
        for buffer in (b for net in (one, two) for b in net.buffers()):
            buffer.add_(1)
        found = update.step_(step=step)
        wanted = clip_grad_(other.param_groups, mode="agc", clipping=0.02)
        other.step()
        other_ema.update_(two, step=step)
        assert 0.1 < float(found) < 0.9
        assert float(found) == float(wanted)
        assert found.units == wanted.units
        assert torch.equal(found.grad_norm, wanted.grad_norm)
    for a, b in (
        (one.state_dict(), two.state_dict()),
        (ema.state_dict(), other_ema.state_dict()),
        (optimizer.named_state(), other.named_state()),
        ({n: p.grad for n, p in one.named_parameters()}, {n: p.grad for n, p in two.named_parameters()}),
    ):
        assert a.keys() == b.keys()
        for key in a:
            assert (a[key] is None and b[key] is None) or torch.equal(a[key], b[key]), key
    assert not torch.equal(ema.state_dict()["head.weight"], one.state_dict()["head.weight"])


def test_nothing_moves_when_a_gradient_is_not_finite():
    net = create_model("nfnet_f0", num_classes=7, **SMALL)
    optimizer, ema = parts(net)
    update = SweepUpdate(optimizer, model=net, ema=ema)
    give(net, seed=0)
    net.head.bias.grad[3] = torch.nan
    before = [
        t.clone()
        for t in (*net.parameters(), *ema.state_dict().values(), *(p.grad for p in net.parameters()))
    ]
    with pytest.raises(NonFiniteGradientError) as caught:
        update.step_(step=0)
    assert caught.value.names == ("head.bias",)
    after = [*net.parameters(), *ema.state_dict().values(), *(p.grad for p in net.parameters())]
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=0, equal_nan=True)


def test_a_step_without_gradients_moves_the_average_alone():
    net = create_model("nf_resnet_nano", num_classes=3)
    optimizer, ema = parts(net)
    with torch.no_grad():
        net.head.weight.add_(1.0)
    report = SweepUpdate(optimizer, model=net, ema=ema).step_(step=0)
    assert (float(report), report.units) == (0.0, 0)
    assert torch.equal(ema.state_dict()["head.bias"], net.head.bias)
    assert not torch.equal(ema.state_dict()["head.weight"], net.head.weight)


def test_it_takes_groups_that_say_how_they_are_clipped():
    net = create_model("nf_resnet_nano", num_classes=3)
    assert not SweepUpdate.fits(SGD(net.named_parameters(), 0.1))
    assert not SweepUpdate.fits(SGD(parameter_groups(net.to("meta"), weight_decay=0.0, clipping=0.1), 0.1))
