"""Recomputing the activation in the backward pass changes neither results nor gradients, and saves memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from normfree.models.activations import ACTIVATIONS
from normfree.models.layers import Conv2d, WSConv2d
from normfree.models.zoo import create_model
from normfree.native.library import library
from normfree.ops.conv2d import conv2d
from normfree.ops.conv2d_backends import PRODUCTS, TORCH, WINOGRAD, Geometry, gradients, is_small_product

SMOOTH = ("gelu", "silu", "gelu_erf", "identity", "relu")


def saved_bytes(run) -> int:
    """Return the bytes that autograd saves in `run`, each storage once, without parameters."""
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def results(conv: nn.Module, x: Tensor, act, *, fused: bool, half: bool = False) -> list[Tensor]:
    conv.zero_grad()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        y = conv(x, act=act) if fused else conv(act(x))
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in conv.parameters())]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", [WSConv2d, Conv2d])
def test_values_and_gradients_have_the_same_bits(kind, stride, padding, half):
    torch.manual_seed(0)
    conv = kind(8, 12, kernel_size=3, stride=stride, groups=2, padding=padding, bias=True)
    x = torch.randn(2, 8, 6, 9).to(
        memory_format=torch.channels_last
    )  # SAME pads even and odd sizes differently
    for name in SMOOTH:
        pair = [results(conv, x, ACTIVATIONS[name], fused=fused, half=half) for fused in (False, True)]
        assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True)), name
        assert [t.dtype for t in pair[0]] == [t.dtype for t in pair[1]]


def test_the_output_of_the_activation_is_not_saved():
    conv, x = WSConv2d(8, 8, kernel_size=3), torch.randn(4, 8, 10, 10, requires_grad=True)
    size = x.numel() * 4
    plain, fused = (saved_bytes(run) for run in (lambda: conv(F.silu(x)), lambda: conv(x, act=F.silu)))
    assert plain - fused == size
    # the output of a ReLU is saved anyway, so nothing is recomputed
    assert saved_bytes(lambda: conv(F.relu(x))) == saved_bytes(lambda: conv(x, act=F.relu))


@pytest.mark.parametrize("frozen", ["input", "weight", "bias", "gain", "all but the input"])
def test_frozen_tensors_get_no_gradient_and_the_others_the_same(frozen):
    torch.manual_seed(0)
    conv, x = WSConv2d(4, 4, kernel_size=3), torch.randn(2, 4, 5, 5)
    parts = dict(conv.named_parameters()) | {"input": x}
    free = {n: t for n, t in parts.items() if (n == "input" if frozen.startswith("all") else n != frozen)}
    for name, tensor in parts.items():
        tensor.requires_grad_(name in free)
    wanted, found = (
        torch.autograd.grad(y.square().sum(), list(free.values()))
        for y in (conv(F.silu(x)), conv(x, act=F.silu))
    )
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize(
    "name", ["nf_resnet_nano", "nfnet_f0", "nf_regnet_b0", "timm_test_nfnet", "resnet_nano"]
)
def test_second_derivatives_are_those_of_plain_ops(name):
    """The gradient of a gradient penalty, in training mode, for every family and a batch-norm twin."""
    fields = {} if "nano" in name else {"depths": (1, 1, 1, 1), "widths": (16, 16, 32, 32)}
    fields |= {"group_width": 8} if name == "nfnet_f0" else {}
    net = create_model(name, num_classes=3, drop_rate=0.0, stochdepth_rate=0.0, **fields).double().train()
    images, labels = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 2])
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if key.endswith("skip_gain"):
                parameter.fill_(0.5)

    def penalty_gradients() -> list[torch.Tensor]:
        x = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(x), labels), x, create_graph=True)
        return list(torch.autograd.grad(gradient.square().sum(), list(net.parameters()), allow_unused=True))

    found = penalty_gradients()
    with pytest.MonkeyPatch.context() as patch:
        for module in ("conv2d", "conv2d_backends", "gated_add"):
            patch.setattr(f"normfree.ops.{module}.eager_training", lambda: False)
        plain = penalty_gradients()
    scale = max(float(p.abs().max()) for p in plain if p is not None)
    for one, other in zip(found, plain, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12 * scale)


def test_torch_func_gives_gradients_of_single_examples():
    torch.manual_seed(0)
    net = create_model("nf_resnet_nano", num_classes=3, widths=(8, 8, 8), drop_rate=0.0, stochdepth_rate=0.0)
    images, labels = torch.randn(3, 3, 16, 16), torch.tensor([0, 1, 2])
    parameters = {k: p.detach() for k, p in net.named_parameters()}

    def loss(parameters, image, label):
        logits = torch.func.functional_call(net, parameters, (image[None],))
        return F.cross_entropy(logits, label[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)
    for i in range(3):
        net.zero_grad()
        F.cross_entropy(net(images[i : i + 1]), labels[i : i + 1]).backward()
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(each[name][i], parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_network_needs_a_third_less_memory():
    changes = {"widths": (32, 64, 96, 96), "group_width": 8, "drop_rate": 0.0, "stochdepth_rate": 0.0}
    net = create_model("nfnet_f0", num_classes=3, **changes)
    images = [torch.randn(n, 3, 32, 32) for n in (2, 4)]
    few, many = (saved_bytes(lambda x=x: net(x)) for x in images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("normfree.ops.conv2d.eager_training", lambda: False)
        plain = [saved_bytes(lambda x=x: net(x)) for x in images]
    assert many - few < 0.67 * (plain[1] - plain[0])  # of what grows with the batch


@pytest.mark.parametrize(
    ("backend", "kernel_size", "images"),
    [(TORCH, 3, 2), (PRODUCTS, 3, 2), (WINOGRAD, 3, 2), (PRODUCTS, 1, 2), (PRODUCTS, 1, 9)],
    ids=["torch", "products", "winograd", "one product", "many pixels"],
)
def test_backends_have_the_gradients_of_autograd(backend, kernel_size, images, monkeypatch):
    """All methods of each backend."""
    monkeypatch.setattr("normfree.ops.conv2d_backends.processor_kind", lambda: "AVX2")
    avx2 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    if backend is WINOGRAD and (library() is None or not avx2):
        pytest.skip("the kernels were not compiled, or the processor has no AVX2")
    torch.manual_seed(0)
    x, weight = torch.randn(images, 64, 16, 16), torch.randn(64, 64, kernel_size, kernel_size)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    padding = (kernel_size // 2,) * 2
    bias, grad, geometry = torch.randn(64), torch.randn(images, 64, 16, 16), Geometry(1, padding, 1)
    assert is_small_product(x, weight, geometry) == ((kernel_size, images) == (1, 2))
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    y = F.conv2d(*exact, padding=padding)
    wanted = [y.detach(), *torch.autograd.grad(y, exact, grad.double())]
    assert backend.supports(x, weight, bias, geometry)
    found = [
        backend.forward(x, weight, bias, geometry),
        backend.input_gradient(grad, x, weight, geometry),
        *backend.weight_gradient(grad, x, weight, geometry, needs=(True, True)),
    ]
    together = gradients(backend, grad, x, weight, geometry, (True, True, True))
    for got, exactly in zip([*found, *together], [*wanted, *wanted[1:]], strict=True):
        assert got is not None
        assert float((got - exactly).norm() / exactly.norm()) < 2e-6
    assert backend.weight_gradient(grad, x, weight, geometry, needs=(False, False)) == (None, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_under_autocast_are_those_of_float32_to_its_precision(dtype):
    """Under autocast the input of a convolution is of `dtype`, but its weight is float32."""
    net = create_model("nf_resnet_nano", num_classes=3)
    x, found = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), []
    for half in (False, True):
        net.zero_grad()
        with torch.autocast("cpu", dtype, enabled=half):
            loss = net.eval()(x).float().square().mean()
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    assert F.cosine_similarity(*found, dim=0) > 0.99


@pytest.mark.parametrize("size", [1, 3])
def test_under_autocast_a_weight_is_converted_once_in_each_direction(size):
    class Conversions(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.shapes = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default:
                self.shapes.append(args[0].shape)
            return function(*args, **(kwargs or {}))

    x = torch.randn(2, 32, 8, 8, dtype=torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(64, 32, size, size, requires_grad=True)
    options = {"stride": 1, "groups": 1, "padding": "same"}
    with Conversions() as found:
        with torch.autocast("cpu", torch.bfloat16):
            y = conv2d(x, weight, None, act=F.silu, **options)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert found.shapes.count(weight.shape) == 2
    assert weight.grad.dtype == torch.float32
