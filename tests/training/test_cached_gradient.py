"""The cached gradient is that of a single pass, with the same random masks; batch statistics are refused.

tests/training/distributed/test_world.py has the law for several processes.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfree import cached_backward, create_model, nt_xent, triplet_loss
from normfree.training.cached_gradient import two_passes

VIEWS = 24


def views(count: int = VIEWS) -> torch.Tensor:
    """Return two similar views of `count` / 2 images, next to each other."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count // 2, 3, 16, 16, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images.repeat_interleave(2, dim=0) + 0.1 * noise


def contrast(embeddings: torch.Tensor) -> torch.Tensor:
    return nt_xent(embeddings[0::2], embeddings[1::2], temperature=0.2)


def network(name: str = "nf_resnet_nano", **fields: object) -> nn.Module:
    torch.manual_seed(0)
    fields = {"skip_gain": 0.5, "stochdepth_rate": 0.0, "num_classes": 0, **fields}
    return create_model(name, **fields).double()


def taken(net: nn.Module) -> torch.Tensor:
    """Return the gradient of all parameters as one vector and clear it."""
    gradient = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    net.zero_grad(set_to_none=True)
    return gradient


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", ["nf_resnet_nano", "nf_regnet_b0", "nfnet_f0"])
def test_the_gradient_is_that_of_a_single_pass(name):
    small = {"depths": (1, 1, 1, 1), "widths": (16, 32, 32, 32), "group_width": 8}
    net = network(name, **({} if name == "nf_resnet_nano" else small)).train()
    loss = contrast(net(views()))
    loss.backward()
    whole, loss = taken(net), loss.detach()
    for micro_batch in (1, 5, 12, 24, 100):  # equal parts or not
        assert float(cached_backward(net, views(), contrast, micro_batch=micro_batch)) == pytest.approx(
            float(loss), rel=1e-12
        )
        assert distance(taken(net), whole) < 1e-12


def test_a_loss_with_labels_and_mining():
    net, labels = network(), torch.arange(VIEWS) % 4
    triplet_loss(net(views()), labels, mining="hard").backward()
    whole = taken(net)
    cached_backward(net, views(), lambda z: triplet_loss(z, labels, mining="hard"), micro_batch=4)
    assert distance(taken(net), whole) < 1e-12


def test_dropout_and_stochastic_depth_draw_the_same_masks_in_both_passes():
    """The same micro-batches with their graphs kept, which memory would forbid, give the same gradient."""
    net = network(num_classes=8, drop_rate=0.3, stochdepth_rate=0.5).train()
    torch.manual_seed(7)
    contrast(torch.cat([net(part) for part in views().split(8)])).backward()
    whole, after = taken(net), torch.rand(1)
    torch.manual_seed(7)
    cached_backward(net, views(), contrast, micro_batch=8)
    assert torch.equal(torch.rand(1), after)  # the generator continues as if there had been one pass
    assert distance(taken(net), whole) < 1e-12
    torch.manual_seed(8)
    cached_backward(net, views(), contrast, micro_batch=8)
    assert distance(taken(net), whole) > 1e-2  # other masks


def test_a_model_that_draws_from_another_generator_is_refused():
    rng = np.random.default_rng(0)

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * float(rng.random())

    message = (
        r"^the second pass over a micro-batch gave embeddings that differ .* Allowed: the same embeddings"
    )
    with pytest.raises(ValueError, match=message):
        cached_backward(Noisy(), torch.randn(8, 4), contrast, micro_batch=2)


def test_batch_norm_is_refused_because_the_gradient_would_be_another_one():
    twin = network("resnet_nano")
    message = (
        r"^'stages\.0\.0\.norm0'.* and \d+ more normalize .* \(off by 31 to 90 % in .* Fix: use a normalizer"
    )
    with pytest.raises(ValueError, match=message):
        cached_backward(twin, views(), contrast, micro_batch=12)
    assert all(p.grad is None for p in twin.parameters())
    cached_backward(twin, views(), contrast, micro_batch=24)  # one micro-batch sees the whole batch
    whole = taken(twin)
    cached_backward(twin.eval(), views(), contrast, micro_batch=12)  # fixed statistics
    taken(twin.train())
    errors = []
    for micro_batch in (12, 6, 3):
        parts = views().split(micro_batch)
        two_passes(lambda number, parts=parts: twin(parts[number]), len(parts), contrast)
        errors.append(distance(taken(twin), whole))
    assert errors == sorted(errors)
    assert 0.25 < errors[0] < errors[-1] < 1.1, errors


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_a_micro_batch_that_is_no_number_of_images_is_refused(size):
    with pytest.raises(ValueError, match=rf"^micro_batch is {size}\. Allowed: an integer from 1"):
        cached_backward(network(), views(), contrast, micro_batch=size)


def test_no_images_are_refused():
    with pytest.raises(ValueError, match=r"^there are no images\."):
        cached_backward(network(), views()[:0], contrast, micro_batch=2)


@pytest.mark.parametrize(
    ("loss", "given"),
    [
        (lambda z: z.square().mean(1), r"shape \(\d+,\)"),
        (lambda z: z.sum().detach(), "constant"),
        (lambda z: 1.0, "float"),
        (lambda z: None, "NoneType"),
    ],
)
def test_a_loss_without_a_gradient_is_refused(loss, given):
    with pytest.raises(ValueError, match=f"^the loss returned a {given}. Allowed: a 0-dim tensor"):
        cached_backward(network(), views(), loss, micro_batch=2)


def test_parameters_of_the_loss_get_their_gradient():
    """With several processes, the sum over the processes is the gradient: each computes the whole loss."""
    net, x = network(), views()
    half = len(x) // 2
    temperature = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def loss(z):
        return F.cross_entropy(z[:half] @ z[half:].T / temperature, torch.arange(half))

    (expected,) = torch.autograd.grad(loss(net(x)), temperature)
    cached_backward(net, x, loss, micro_batch=3)
    torch.testing.assert_close(temperature.grad, expected, rtol=1e-12, atol=1e-14)
    temperature.grad = None
    for rank in range(2):
        with torch.no_grad():
            every = net(x)
        own = x[rank * half : (rank + 1) * half]
        cached_backward(net, own, loss, micro_batch=3, rank=rank, gather=lambda _, every=every: every.clone())
    torch.testing.assert_close(temperature.grad, expected, rtol=1e-12, atol=1e-14)


def test_batch_norm_without_running_statistics_is_refused_in_evaluation_mode_too():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4, track_running_stats=False), torch.nn.Flatten()
    ).eval()
    with pytest.raises(ValueError, match="normalize with the statistics of a micro-batch"):
        cached_backward(net, torch.randn(4, 3, 8, 8), lambda z: z.sum(), micro_batch=2)
