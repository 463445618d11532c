"""Every family, normalizer-free and batch norm, in training mode, under what observes or transforms a network.

Derivatives of higher order, transforms of torch.func, forward-mode differentiation, hooks, copies, FX and export.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from normfree.models.layers import Conv2d, WSConv2d
from normfree.models.net import Net
from normfree.models.shared_weights import standardized_once
from normfree.models.zoo import create_model
from normfree.ops import conv2d_backends, winograd
from normfree.optim.named_state import copy_named_
from normfree.weights.load import load_weights

SMALL = {"depths": (1, 2), "widths": (16, 32), "strides": (1, 2)}  # two transitions, one block without
FAMILIES = {
    "nf_resnet50": SMALL,
    "resnet50": {**SMALL, "classifier_std": 0.1},
    "nfnet_f0": {**SMALL, "group_width": 8},
    "bn_nfnet_f0": {**SMALL, "group_width": 8},
    "nf_regnet_b0": {**SMALL, "classifier_std": 0.1},
    "bn_nf_regnet_b0": {**SMALL, "norm": "batch", "classifier_std": 0.1},
    "timm_test_nfnet": SMALL,
    "timm_eca_nfnet_l0": {**SMALL, "group_width": 8},
}
NORMALIZER_FREE = [name for name in FAMILIES if "bn_" not in name and name != "resnet50"]
IMAGES = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2])
every_family = pytest.mark.parametrize("name", FAMILIES)


def network(name: str, **fields: object) -> Net:
    torch.manual_seed(0)
    known = name if name != "bn_nf_regnet_b0" else "nf_regnet_b0"
    rates = {"drop_rate": 0.0, "stochdepth_rate": 0.0}
    net = create_model(known, num_classes=3, **{**rates, **FAMILIES[name], **fields})  # type: ignore[arg-type]
    assert isinstance(net, Net)
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if key.endswith(("skip_gain", "conv2.gain")):
                parameter.fill_(0.5)
    return net.double().train()


def tensors(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the parameters, and copies of the buffers, which batch norm changes."""
    return {k: p.detach() for k, p in net.named_parameters()}, {k: b.clone() for k, b in net.named_buffers()}


def loss_of(net: nn.Module) -> Callable[..., Tensor]:
    _, buffers = tensors(net)

    def loss(parameters: dict[str, Tensor], images: Tensor = IMAGES) -> Tensor:
        own = {k: b.clone() for k, b in buffers.items()}  # torch.func forbids changing captured tensors
        return F.cross_entropy(torch.func.functional_call(net, {**parameters, **own}, (images,)), LABELS)

    return loss


def plain_gradients(net: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of the loss from an ordinary backward pass."""
    names, parameters = zip(*net.named_parameters(), strict=True)
    found = torch.autograd.grad(F.cross_entropy(net(IMAGES), LABELS), parameters)
    return dict(zip(names, found, strict=True))


def direction(net: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    draw = {k: torch.randn(p.shape, dtype=p.dtype, generator=generator) for k, p in net.named_parameters()}
    return {k: v * (0.1 * net.get_parameter(k).detach().norm() + 0.1) / v.norm() for k, v in draw.items()}


def shifted(net: Net, by: dict[str, Tensor], step: float) -> Net:
    moved = copy.deepcopy(net)
    with torch.no_grad():
        for key, parameter in moved.named_parameters():
            if key in by:
                parameter.add_(by[key], alpha=step)
    return moved


def inner(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
    return torch.stack([(a[k] * b[k]).sum() for k in b]).sum()


# --- derivatives -------------------------------------------------------------------------------------


@every_family
def test_the_hessian_is_symmetric_and_the_difference_of_gradients(name):
    net, step = network(name), 1e-5
    parameters, _ = tensors(net)
    key = "stages.0.0.norm2.weight" if "stages.0.0.norm2.weight" in parameters else "stages.0.0.conv2.gain"
    some = {k: parameters[k] for k in ("head.bias", key)}
    loss = loss_of(net)
    blocks = torch.func.hessian(lambda part: loss({**parameters, **part}))(some)
    size = [some[k].numel() for k in some]
    rows = [
        torch.cat([blocks[a][b].reshape(n, -1) for b in some], 1) for a, n in zip(some, size, strict=True)
    ]
    hessian = torch.cat(rows)
    torch.testing.assert_close(hessian, hessian.T, rtol=1e-9, atol=1e-12)
    along = {k: torch.ones_like(v) for k, v in some.items()}
    ahead, behind = (plain_gradients(shifted(net, along, s)) for s in (step, -step))
    difference = torch.cat([(ahead[k] - behind[k]).flatten() for k in some]) / (2 * step)
    torch.testing.assert_close(hessian.sum(1), difference, rtol=1e-5, atol=1e-8)


def penalty(net: nn.Module, *, create_graph: bool = True) -> Tensor:
    images = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(net(images), LABELS), images, create_graph=create_graph)
    return gradient.square().sum()


@every_family
def test_the_gradient_of_a_gradient_penalty_is_the_difference_of_penalties(name):
    net, by, step = network(name), None, 1e-6
    by = direction(net)
    found = torch.autograd.grad(penalty(net), list(net.parameters()), allow_unused=True)
    wanted = (penalty(shifted(net, by, step), create_graph=False) - penalty(shifted(net, by, -step))) / (
        2 * step
    )
    given = {k: g for (k, _), g in zip(net.named_parameters(), found, strict=True) if g is not None}
    torch.testing.assert_close(inner(by, given), wanted.detach(), rtol=1e-5, atol=1e-9)


@every_family
def test_all_forward_modes_give_the_directional_derivative(name):
    net = network(name)
    parameters, _ = tensors(net)
    by = direction(net)
    wanted = inner(plain_gradients(net), by)
    _, found = torch.func.jvp(loss_of(net), (parameters,), (by,))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    with forward_ad.dual_level():
        dual = {k: forward_ad.make_dual(p, by[k]) for k, p in parameters.items()}
        tangent = forward_ad.unpack_dual(loss_of(net)(dual)).tangent
    torch.testing.assert_close(tangent, wanted, rtol=1e-9, atol=1e-12)


@every_family
def test_the_jacobian_has_the_gradient_of_each_logit(name):
    net = network(name)
    parameters, buffers = tensors(net)

    def logits(images: Tensor) -> Tensor:
        own = {k: b.clone() for k, b in buffers.items()}
        return torch.func.functional_call(net, {**parameters, **own}, (images,))

    jacobian = torch.func.jacrev(logits)(IMAGES)
    assert jacobian.shape == (3, 3, *IMAGES.shape)
    images = IMAGES.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(net(images)[2, 1], images)
    torch.testing.assert_close(jacobian[2, 1], wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@every_family
def test_batched_gradients_are_the_gradients(name, memory_format):
    """As `torch.autograd.functional.jacobian(..., vectorize=True)` computes them; float32 has compiled kernels."""
    net = network(name).to(torch.float32, memory_format=memory_format)
    parameters = list(net.parameters())
    logits = net(IMAGES.to(torch.float32, memory_format=memory_format)).flatten()
    batch = torch.eye(len(logits), dtype=logits.dtype)[:2]
    found = torch.autograd.grad(
        logits, parameters, batch, is_grads_batched=True, retain_graph=True, allow_unused=True
    )
    for number in range(2):
        wanted = torch.autograd.grad(logits[number], parameters, retain_graph=True, allow_unused=True)
        for one, other in zip(found, wanted, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one[number], other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["AVX2", "AVX512", "AVX512 AMD"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["nf_resnet50", "nfnet_f0"])
def test_batched_gradients_of_large_maps(name, autocast, kind, monkeypatch):
    """For which each kind of processor has its own algorithms."""
    for module in (conv2d_backends, winograd):
        monkeypatch.setattr(module, "processor_kind", lambda: kind)
    net = network(name, widths=(256, 512)).to(torch.float32, memory_format=torch.channels_last)
    images = torch.randn(8, 3, 64, 64).to(memory_format=torch.channels_last)
    parameters = list(net.parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = net(images).flatten().float()
    batch = torch.eye(len(logits))[:2]
    found = torch.autograd.grad(logits, parameters, batch, is_grads_batched=True, retain_graph=True)
    wanted = torch.autograd.grad(logits[1], parameters)
    found, wanted = (torch.cat([g.flatten() for g in each]) for each in ([g[1] for g in found], wanted))
    assert float((found - wanted).norm() / wanted.norm()) < (0.02 if autocast else 1e-4)


@every_family
def test_vmap_computes_several_networks_at_once(name):
    nets = [network(name), shifted(network(name), direction(network(name)), 0.3)]
    parameters, buffers = torch.func.stack_module_state(nets)

    def logits(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(nets[0], {**parameters, **buffers}, (IMAGES,))

    found = torch.func.vmap(logits)(parameters, buffers)
    for one, net in zip(found, nets, strict=True):
        torch.testing.assert_close(one, net(IMAGES), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NORMALIZER_FREE)
def test_vmap_over_images_is_the_batch(name):
    net = network(name)
    found = torch.func.vmap(lambda image: net(image[None])[0])(IMAGES)
    torch.testing.assert_close(found, net(IMAGES), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NORMALIZER_FREE)
def test_the_same_inside_standardized_once(name):
    """Second derivatives accumulate there; transforms read the weights themselves, not the shared ones."""
    net = network(name)
    penalty(net).backward()
    wanted = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    parameters, _ = tensors(net)
    by = direction(net)
    _, derivative = torch.func.jvp(loss_of(net), (parameters,), (by,))
    with standardized_once(net):
        penalty(net).backward()
        gradients = torch.func.grad(loss_of(net))(parameters)
    found = [p.grad for p in net.parameters() if p.grad is not None]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(inner(gradients, by), derivative, rtol=1e-9, atol=1e-12)

    def opened(parameters: dict[str, Tensor]) -> Tensor:
        with standardized_once(net):
            return loss_of(net)(parameters)

    with pytest.raises(ValueError, match=r"^standardized_once inside a transform .* Fix: open it outside\."):
        torch.func.grad(opened)(parameters)


# --- hooks -------------------------------------------------------------------------------------------


def called_modules(net: nn.Module) -> dict[str, nn.Module]:
    """Return all modules except stochastic depth, which is not called at a rate of 0."""
    return {k: m for k, m in net.named_modules() if not k.endswith("stochdepth")}


@every_family
def test_hooks_see_tensors_and_the_input_of_each_convolution(name):
    net = network(name)
    wanted = net(IMAGES)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for key, module in net.named_modules():
        module.register_forward_hook(
            lambda m, args, out, key=key: seen.__setitem__(key, (*args, out))  # one positional argument
        )
    found = net(IMAGES)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert seen.keys() == called_modules(net).keys()
    assert all(type(t) is Tensor for pair in seen.values() for t in pair)
    convolutions = [k for k, m in net.named_modules() if isinstance(m, WSConv2d | Conv2d)]
    assert len(convolutions) >= 10
    for key in convolutions:
        x, out = seen[key]
        torch.testing.assert_close(net.get_submodule(key)(x), out, rtol=1e-12, atol=1e-12)


@every_family
def test_full_backward_hooks_see_the_gradients_of_every_module(name):
    net = network(name)
    wanted = plain_gradients(net)
    seen: dict[str, tuple[Tensor | None, Tensor]] = {}
    for key, module in net.named_modules():
        module.register_full_backward_hook(
            lambda m, by_in, by_out, key=key: seen.__setitem__(key, (*by_in, *by_out))
        )
    images = IMAGES.clone().requires_grad_()
    loss = F.cross_entropy(net(images), LABELS)
    found = torch.autograd.grad(loss, [images, *net.parameters()])
    assert seen.keys() == called_modules(net).keys()
    torch.testing.assert_close(seen[""][0], found[0])
    for one, other in zip(found[1:], wanted.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    bias = [k for k, m in net.named_modules() if isinstance(m, WSConv2d) and m.bias is not None]
    for key in bias:  # the gradient of a bias is the sum of the output's
        torch.testing.assert_close(seen[key][1].sum((0, 2, 3)), wanted[f"{key}.bias"], rtol=1e-9, atol=1e-12)


@every_family
def test_any_module_may_replace_a_convolution(name):
    """Tools wrap convolutions (adapters, quantizers, pruning) in modules that take one tensor."""

    class Wrapped(nn.Module):
        def __init__(self, conv: nn.Module) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    net = network(name)
    wanted = net(IMAGES)
    for key, module in list(net.named_modules()):
        if isinstance(module, WSConv2d | Conv2d):
            parent, _, leaf = key.rpartition(".")
            setattr(net.get_submodule(parent), leaf, Wrapped(module))
    torch.testing.assert_close(net(IMAGES), wanted, rtol=1e-12, atol=1e-12)


# --- copies, FX and export ---------------------------------------------------------------------------


@every_family
def test_copies_and_pickles_compute_the_same_and_are_independent(name):
    net = network(name)
    F.cross_entropy(net(IMAGES), LABELS).backward()
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)]
    wanted = net(IMAGES)
    for other in copies:
        assert torch.equal(other(IMAGES), wanted)
        with torch.no_grad():
            next(other.parameters()).zero_()
    assert torch.equal(net(IMAGES), wanted)


@every_family
@pytest.mark.parametrize("training", [True, False])
def test_fx_traces_the_network_for_any_size(name, training):
    net = network(name).train(training)
    traced = torch.fx.symbolic_trace(net)
    for size in (32, 45):
        images = torch.randn(2, 3, size, size + 3, dtype=torch.float64)
        torch.testing.assert_close(traced(images), net(images), rtol=1e-12, atol=1e-12)
    found, wanted = plain_gradients(traced), plain_gradients(net)
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-9, atol=1e-12)


def test_fx_draws_stochastic_depth_at_each_call():
    net = network("nfnet_f0", stochdepth_rate=0.7)
    traced = torch.fx.symbolic_trace(net)
    drawn = []
    for seed in range(4):
        torch.manual_seed(seed)
        wanted = net(IMAGES)
        torch.manual_seed(seed)
        drawn.append(traced(IMAGES))
        torch.testing.assert_close(drawn[-1], wanted, rtol=1e-12, atol=1e-12)
    assert not torch.equal(drawn[0], drawn[1])


@every_family
@pytest.mark.parametrize("strict", [pytest.param(True, marks=pytest.mark.slow), False])
def test_export_computes_the_same(name, strict):
    net = network(name, depths=(1,), widths=(32,), strides=(2,))
    program = torch.export.export(net, (IMAGES,), strict=strict)
    torch.testing.assert_close(program.module()(IMAGES), net(IMAGES), rtol=1e-12, atol=1e-12)


# --- skip gains --------------------------------------------------------------------------------------


def scalars(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in state.items():
        yield key, tensor.reshape(()) if key.endswith("skip_gain") else tensor


@pytest.mark.parametrize("name", ["nfnet_f0", "nf_resnet50", "nf_regnet_b0"])
def test_states_with_skip_gains_of_no_dimension_load(name):
    net, other = network(name), network(name)
    gains = [p for k, p in net.named_parameters() if k.endswith("skip_gain")]
    assert len(gains) == 3
    assert all(p.shape == (1,) for p in gains)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.25)
    saved = dict(scalars(net.state_dict()))
    other.load_state_dict(saved)
    assert torch.equal(other(IMAGES), net(IMAGES))
    again = network(name)
    load_weights(again, saved)
    assert torch.equal(again(IMAGES), net(IMAGES))
    momentum = {k: torch.zeros_like(p) for k, p in net.named_parameters()}
    copy_named_(momentum, saved, owner="the momentum")
    assert all(torch.equal(momentum[k], p) for k, p in net.named_parameters())
    with pytest.raises(ValueError, match=r"is \(2,\) instead of \(1,\)"):
        copy_named_({"a": torch.zeros(1)}, {"a": torch.zeros(2)}, owner="the momentum")
