"""Computing a branch only for the images that stochastic depth keeps changes neither results nor gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from normfree.models.net import Block, Net
from normfree.models.zoo import create_model
from normfree.ops.gated_add import add_images, kept_images, take_images

SMALL = {
    "nfnet_f0": {"widths": (32, 64, 96, 96), "group_width": 8},
    "timm_dm_nfnet_f0": {"widths": (32, 64, 96, 96), "group_width": 8},
    "nf_resnet50": {"widths": (32, 64, 96, 96), "depths": (1, 2, 1, 1)},
    "nf_regnet_b0": {"depths": (1, 1, 2, 1)},
    "resnet50": {"widths": (32, 64, 96, 96), "depths": (1, 2, 1, 1)},
}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def network(name: str, *, rate: float) -> Net:
    torch.manual_seed(0)
    net = create_model(name, num_classes=5, stochdepth_rate=rate, drop_rate=0.0, **SMALL[name])
    assert isinstance(net, Net)
    for block in net.modules():
        if isinstance(block, Block) and block.skip_gain is not None:
            torch.nn.init.constant_(block.skip_gain, 0.7)
    return net.train().double()


def results(net: Net, images: Tensor, *, seed: int) -> list[Tensor]:
    net.zero_grad()
    torch.manual_seed(seed)
    logits = net(images)
    F.cross_entropy(logits, torch.arange(len(images)) % 5).backward()
    return [logits.detach(), *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SMALL)
def test_results_do_not_depend_on_the_images_that_are_skipped(name, layout, monkeypatch):
    images = torch.randn(6, 3, 40, 40, dtype=torch.float64).to(memory_format=LAYOUTS[layout])
    net = network(name, rate=0.6)
    found = results(net, images, seed=3)
    monkeypatch.setattr("normfree.models.net.kept_images", lambda mask, **options: (mask, None))
    wanted = results(net, images, seed=3)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["nfnet_f0", "resnet50"])
def test_dropped_images_skip_the_branch_unless_it_has_batch_statistics(name, monkeypatch):
    net = network(name, rate=0.6)
    counts, masks, block = [], [], net.stages[1][1]
    draw, branch = block.stochdepth.forward, block.branch

    def drawn(x: Tensor) -> Tensor | None:
        mask = draw(x)
        masks.append(int(mask.count_nonzero()))
        return mask

    monkeypatch.setattr(block.stochdepth, "forward", drawn)
    monkeypatch.setattr(block, "branch", lambda r: counts.append(len(r)) or branch(r))
    for seed in range(8):
        torch.manual_seed(seed)
        net(torch.randn(6, 3, 40, 40, dtype=torch.float64))
    assert len(set(masks)) > 2
    assert counts == ([max(1, n) for n in masks] if name == "nfnet_f0" else [6] * 8)


def test_hooks_see_all_images():
    net = network("nfnet_f0", rate=0.6)
    images = torch.randn(6, 3, 40, 40, dtype=torch.float64)
    wanted = results(net, images, seed=3)
    counts = []
    for block in net.modules():
        if isinstance(block, Block):
            block.conv2.register_forward_hook(lambda module, args, y: counts.append((len(args[0]), len(y))))
    for a, b in zip(results(net, images, seed=3), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert set(counts) == {(6, 6)}


def test_a_branch_dropped_for_all_images_has_gradients_of_zero():
    net = network("nfnet_f0", rate=0.0)
    net.stages[3][-1].stochdepth.rate = 1.0
    images = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    results(net, images, seed=0)
    last = [p.grad for p in net.stages[3][-1].parameters()]
    assert all(grad is not None and not grad.any() for grad in last)
    assert all(p.grad.any() for p in net.stem.parameters())


def test_evaluation_and_rate_zero_keep_all_images():
    net = network("nfnet_f0", rate=0.6).eval()
    images = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    wanted = network("nfnet_f0", rate=0.0)
    assert torch.equal(net(images), wanted(images))


def test_kept_images_are_taken_and_added():
    mask = torch.tensor([1.0, 0.0, 1.25]).view(3, 1, 1, 1)
    some, kept = kept_images(mask, independent=True)
    assert some is not None
    assert kept is not None
    assert kept.tolist() == [0, 2]
    assert some.flatten().tolist() == [1.0, 1.25]
    ones = torch.ones(3, 1, 1, 1)
    assert kept_images(ones, independent=True) == (ones, None)
    none, first = kept_images(torch.zeros(3, 1, 1, 1), independent=True)
    assert none is not None
    assert first is not None
    assert (none.flatten().tolist(), first.tolist()) == ([0.0], [0])
    assert kept_images(mask, independent=False) == (mask, None)
    assert kept_images(None, independent=True) == (None, None)
    with torch.no_grad():
        assert kept_images(mask, independent=True) == (mask, None)
    x = torch.randn(3, 4, 5, 6)
    assert torch.equal(take_images(x, kept), x[[0, 2]])
    assert take_images(x, None) is x
    assert torch.equal(
        add_images(x, 2 * x[[0, 2]], kept), torch.stack([x[0] + 2 * x[0], x[1], x[2] + 2 * x[2]])
    )
