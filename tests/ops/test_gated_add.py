"""shortcut + gate · branch: values and gradients, for all dtypes and shapes of gates."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from normfree.ops.gated_add import add_images, gated_add, kept_images, spatial_mean

B, C, H, W = 3, 4, 5, 6
GATES = {"one number": (), "an image": (B, 1, 1, 1), "a channel": (B, C, 1, 1)}


def random_map(*shape, dtype=torch.float64):
    made = torch.randn(shape, dtype=dtype)
    if len(shape) == 4:
        made = made.contiguous(memory_format=torch.channels_last)
    return made.requires_grad_()


@pytest.mark.parametrize("some", [False, True], ids=["all images", "some images"])
@pytest.mark.parametrize("shape", GATES.values(), ids=GATES)
def test_values_and_gradients_are_those_of_the_formula(shape, some):
    kept = torch.tensor([0, 2]) if some else None
    shortcut, branch = random_map(B, C, H, W), random_map(2 if some else B, C, H, W)
    gate = random_map(*((2, *shape[1:]) if some and shape else shape))
    got = gated_add(shortcut, branch, gate, kept=kept)
    wanted = add_images(shortcut, branch * gate, kept) if some else shortcut + branch * gate
    torch.testing.assert_close(got, wanted, rtol=1e-14, atol=1e-14)
    up, inputs = torch.randn_like(wanted), (shortcut, branch, gate)
    for one, two in zip(
        torch.autograd.grad(got, inputs, up), torch.autograd.grad(wanted, inputs, up), strict=True
    ):
        assert one.shape == two.shape
        torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-13)


def test_second_derivatives():
    shortcut, branch, gate = random_map(2, 2, 3, 3), random_map(2, 2, 3, 3), random_map(2, 2, 1, 1)
    assert torch.autograd.gradgradcheck(lambda *x: gated_add(*x, kept=None), (shortcut, branch, gate))


def test_only_required_gradients_are_computed():
    for wanted in range(3):
        inputs = [random_map(B, C, H, W), random_map(B, C, H, W), random_map(B, C, 1, 1)]
        for i, tensor in enumerate(inputs):
            tensor.requires_grad_(i == wanted)
        gated_add(*inputs, kept=None).sum().backward()
        assert [t.grad is not None for t in inputs] == [i == wanted for i in range(3)]


def test_different_dtypes_and_an_empty_batch():
    shortcut, branch = (
        random_map(B, C, H, W, dtype=torch.float32),
        random_map(B, C, H, W, dtype=torch.bfloat16),
    )
    gate = random_map(B, C, 1, 1, dtype=torch.float32)
    y = gated_add(shortcut, branch, gate, kept=None)
    y.sum().backward()
    assert y.dtype == torch.float32
    assert [t.grad.dtype for t in (shortcut, branch, gate)] == [torch.float32, torch.bfloat16, torch.float32]
    empty = random_map(0, C, H, W), random_map(0, C, H, W), random_map()
    gated_add(*empty, kept=None).sum().backward()
    assert float(empty[2].grad) == 0.0


class FullSizeWrites(TorchDispatchMode):
    """Records the operations that write a tensor as large as the map."""

    def __init__(self, size):
        super().__init__()
        self.size, self.names = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (
            isinstance(out, torch.Tensor)
            and out.numel() == self.size
            and out.untyped_storage().nbytes() >= 4 * self.size
        ):
            self.names.append(func.overloadpacket.__name__)
        return out


def test_the_backward_pass_writes_the_map_twice_where_autograd_writes_it_five_times(monkeypatch):
    monkeypatch.setattr(
        "normfree.ops.gated_add.PRODUCTS", 1
    )  # as if the map were large: products of one image at a time
    x, y, gate = (random_map(*s, dtype=torch.float32) for s in ((B, C, H, W), (B, C, H, W), (B, C, 1, 1)))
    passes = []
    for mean, join in (
        (spatial_mean, lambda *a: gated_add(*a, kept=None)),
        (lambda t: t.mean((2, 3)), torch.addcmul),
    ):
        out = join(x, y, gate * mean(y)[:, :, None, None])
        with FullSizeWrites(out.numel()) as full:
            torch.autograd.grad(out, (x, y, gate), torch.ones_like(out))
        passes.append([name for name in full.names if name in ("mul", "div", "add", "add_", "addcmul")])
    assert passes[0] in (["mul", "add_"], ["mul", "add"])
    assert len(passes[1]) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_over_pixels_has_the_bits_of_the_mean(dtype):
    x = torch.randn(2, 7, 12, 12, dtype=dtype)
    wanted = x.mean((2, 3))
    assert torch.equal(spatial_mean(x), wanted)
    with torch.no_grad():
        assert torch.equal(spatial_mean(x), wanted)


def test_the_mean_over_pixels_in_bfloat16_is_rounded_twice():
    """The sum is rounded, and then its quotient; each time by at most half a unit, 2^-8 of the value."""
    x = torch.rand(2, 7, 7, 7).bfloat16()
    exact = x.double().mean((2, 3))
    torch.testing.assert_close(spatial_mean(x).double(), exact, rtol=2 * 2**-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_mean_is_a_view(dtype):
    """A full map would be NCHW, and every sum with a channels_last map would be slow."""
    x = torch.randn(2, 7, 12, 12, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    (found,) = torch.autograd.grad(spatial_mean(x).sum(), x)
    assert found.untyped_storage().nbytes() <= 2 * 7 * x.element_size()


@pytest.mark.parametrize(("dropped", "left_out"), [(0, 0), (3, 0), (4, 4), (40, 39)])
def test_images_are_left_out_if_at_least_a_tenth_is_dropped(dropped, left_out):
    mask = torch.ones(40, 1, 1, 1)
    mask[:dropped] = 0.0
    found, kept = kept_images(mask, independent=True)
    assert len(found) == 40 - left_out
    assert (kept is None) == (left_out == 0)
    assert found.sum() == mask.sum()
