"""Convolutions with packed weights: the results of plain ones, and never those of an old weight."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from normfree.deploy import packed_conv2d
from normfree.deploy.fold import fold
from normfree.deploy.packed_conv2d import PackedConv2d
from normfree.models.activations import ACTIVATIONS
from normfree.models.layers import Conv2d
from normfree.models.zoo import create_model

CASES = [  # channels, filters, kernel size, stride, groups, bias, padding
    (16, 24, 1, 1, 1, True, "same"),
    (16, 32, 3, 1, 2, True, "same"),
    (16, 32, 3, 2, 4, False, "same"),
    (3, 8, 7, 2, 1, True, "symmetric"),
    (8, 8, 1, 1, 8, True, "same"),
    (64, 96, 3, 1, 2, True, "same"),
]


def layer(case, *, kind=PackedConv2d):
    channels, filters, size, stride, groups, bias, padding = case
    torch.manual_seed(0)
    made = kind(channels, filters, kernel_size=size, stride=stride, groups=groups, bias=bias, padding=padding)
    if bias:
        nn.init.normal_(made.bias)
    return made


@pytest.mark.parametrize("act", [None, "gelu_erf"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_equal_those_of_the_plain_convolution(case, memory_format, act):
    conv, plain = layer(case), layer(case, kind=Conv2d).double()
    conv = conv.to(memory_format=memory_format)
    fn = ACTIVATIONS[act] if act else None
    for shape in ((2, 12, 12), (1, 9, 11), (5, 30, 17)):
        x = torch.randn(shape[0], case[0], *shape[1:]).to(memory_format=memory_format)
        for _ in range(3):
            with torch.no_grad():
                exact = plain(x.double(), act=fn)
                assert float((conv(x, act=fn) - exact).norm() / exact.norm()) < 4e-6
        assert conv._packed.shape == x.shape


def test_weights_are_packed_for_a_shape_that_occurs_twice_in_succession():
    conv, one, two = layer(CASES[1]), torch.randn(1, 16, 8, 8), torch.randn(4, 16, 8, 8)
    shapes = []
    with torch.no_grad():
        for x in (one, two, one, two, two, one, two, one, one):
            conv(x)
            shapes.append(conv._packed and conv._packed.shape[0])
    assert shapes == [None, None, None, None, 4, 4, 4, 4, 1]


def changed_in_place(conv):
    with torch.no_grad():
        conv.weight.mul_(2.0)


def loaded(conv):
    conv.load_state_dict({k: 2 * v for k, v in conv.state_dict().items()})


def replaced(conv):
    conv.weight = nn.Parameter(2 * conv.weight.detach())


def assigned_to_data(conv):
    conv.weight.data = 2 * conv.weight.data


def stepped(conv):
    conv.weight.grad = -conv.weight.detach()
    torch.optim.SGD([conv.weight], 1.0).step()


@pytest.mark.parametrize("change", [changed_in_place, loaded, replaced, assigned_to_data, stepped])
def test_a_changed_weight_is_packed_again(change):
    conv, x = layer((16, 32, 3, 1, 2, False, "same")), torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        conv(x)
        before = conv(x)
        packed = conv._packed.weight
        conv(x)
        assert conv._packed.weight is packed
    change(conv)
    with torch.no_grad():
        torch.testing.assert_close(conv(x), 2 * before, rtol=1e-5, atol=1e-5)


def test_copies_and_files_have_no_packed_weight():
    conv, x = layer(CASES[1]), torch.randn(1, 16, 8, 8)
    with torch.inference_mode():
        conv(x)
        y = conv(x)
    assert conv._packed is not None
    file = io.BytesIO()
    torch.save(conv, file)
    assert len(file.getvalue()) < 2 * conv.weight.numel() * 4
    for other in (copy.deepcopy(conv), torch.load(io.BytesIO(file.getvalue()), weights_only=False)):
        assert other._packed is None
        assert list(other.state_dict()) == ["weight", "bias"]
        with torch.inference_mode():
            torch.testing.assert_close(other(x), y)


def test_it_is_the_plain_convolution_in_all_other_cases(monkeypatch):
    """With gradients, other dtypes, autocast, compiler, tracer, transforms, dispatch modes, or without oneDNN."""
    conv, x = layer(CASES[1]), torch.randn(2, 16, 8, 8)
    monkeypatch.setattr(packed_conv2d, "_Packed", None)  # calling it would fail
    conv(x).sum().backward()
    assert conv.weight.grad is not None
    plain = layer(CASES[1], kind=Conv2d)
    plain(x).sum().backward()
    assert torch.equal(conv.weight.grad, plain.weight.grad)
    with torch.no_grad():
        conv(x)  # the second call would pack
        copy.deepcopy(conv).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert conv(x).dtype == torch.bfloat16
        with monkeypatch.context() as patch:
            patch.setattr(torch._C, "_get_mkldnn_enabled", lambda: False)
            conv(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sizes become constants
            assert "aten::_convolution" in str(torch.jit.trace(conv, x, check_trace=False).inlined_graph)
        torch.compile(conv, backend="eager", fullgraph=True)(x)
        assert any("conv2d" in str(n.target) for n in torch.export.export(conv, (x,)).graph.nodes)
        torch.func.vmap(conv)(x[None])
        conv(x[:0])
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            conv(x)
        assert counter.get_total_flops() == 2 * 2 * 32 * 8 * 8 * 8 * 9


def test_all_convolutions_of_a_folded_network_are_packed():
    net = create_model("nfnet_f0", num_classes=3, widths=(32, 64, 96, 96), depths=(1, 1, 1, 1), group_width=8)
    folded, x = fold(net), torch.randn(2, 3, 48, 48)
    with torch.inference_mode():
        folded(x)
        y, wanted = folded(x), net.eval()(x)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-6)
    convs = [m for m in folded.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == sum("conv" in k and k.endswith(".weight") for k in net.state_dict())
    assert all(conv._packed is not None for conv in convs)
    assert all(m._packed is None for m in fold(folded).modules() if isinstance(m, PackedConv2d))
