"""Tests of SAM by its formula, on a problem with known gradients."""

import pytest
import torch

from normfree.models.zoo import create_model
from normfree.optim.sam import SAM, ascend_, descend_


def test_the_gradient_is_that_of_the_perturbed_weights():
    """The gradient of f(w) = wᵀAw/2 at w + rho·g/|g| is A(w + rho·g/|g|)."""
    torch.manual_seed(0)
    root = torch.randn(5, 5, dtype=torch.float64)
    matrix = root @ root.T
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    start = weight.detach().clone()

    def backward():
        (0.5 * weight @ matrix @ weight).backward()

    backward()
    gradient = weight.grad.clone()
    before = ascend_([weight], rho=0.05)
    assert weight.grad is None
    uphill = start + 0.05 * gradient / gradient.norm()
    torch.testing.assert_close(weight.detach(), uphill)
    assert float((weight.detach() - start).norm()) == pytest.approx(0.05)
    backward()
    descend_([weight], before)
    assert torch.equal(weight.detach(), start)
    torch.testing.assert_close(weight.grad, matrix @ uphill)


def test_rho_is_the_distance_over_all_parameters_and_restoring_is_exact():
    net = create_model("nf_resnet_nano", num_classes=3)
    frozen = net.stem.conv0.gain.requires_grad_(False)
    parameters = list(net.parameters())
    start = [p.detach().clone() for p in parameters]
    net(torch.randn(4, 3, 32, 32)).square().sum().backward()
    before = ascend_(parameters, rho=0.5)
    moved = torch.cat([(p - s).flatten() for p, s in zip(parameters, start, strict=True)])
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-4)
    assert torch.equal(frozen, torch.ones_like(frozen))
    descend_(parameters, before)
    assert all(torch.equal(p, s) for p, s in zip(parameters, start, strict=True))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_zero_or_nonfinite_gradient_moves_nothing(value):
    weights = [torch.ones(3, requires_grad=True), torch.ones((), requires_grad=True)]
    weights[0].grad, weights[1].grad = torch.full((3,), value), torch.tensor(0.0)
    ascend_(weights, rho=0.1)
    assert all(torch.equal(w.detach(), torch.ones_like(w)) for w in weights)


def test_the_class_perturbs_inside_and_restores_outside_even_after_an_error():
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    sam = SAM([weight], rho=0.1)
    (weight**2).sum().backward()
    uphill = weight.detach() + 0.1 * weight.grad / weight.grad.norm()
    with sam.perturbed():
        torch.testing.assert_close(weight.detach(), uphill)
        (weight**2).sum().backward()
    assert weight.tolist() == [1.0, 2.0]
    torch.testing.assert_close(weight.grad, 2 * uphill)
    with pytest.raises(RuntimeError, match="stop"), sam.perturbed():
        raise RuntimeError("stop")
    assert weight.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("make", [lambda: ascend_([], rho=0), lambda: SAM([], rho=0)])
def test_a_distance_of_zero_is_an_error(make):
    message = r"^rho is 0\. Allowed: above 0\. Fix: pass rho=0\.05, with which \[B\] fine-tunes\.$"
    with pytest.raises(ValueError, match=message):
        make()
