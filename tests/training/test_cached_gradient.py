"""The cached gradient is that of a single pass, with the same random masks; batch statistics are refused.

tests/training/distributed/test_world.py has the law for several processes.
"""

import numpy as np
import pytest
import torch
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


def test_a_micro_batch_below_one_is_refused():
    with pytest.raises(ValueError, match=r"^micro_batch is 0\. Allowed: 1 or more"):
        cached_backward(network(), views(), contrast, micro_batch=0)
