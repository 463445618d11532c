"""Blocks compiled one by one: one graph for each shape, no break, the same numbers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from normfree.data.loader import Batch
from normfree.models.layers import StochasticDepth
from normfree.models.net import Block, Net, Region
from normfree.models.shared_weights import standardized_once
from normfree.models.zoo import create_model
from normfree.training.compiled import LIMIT, CompiledBlocks
from normfree.training.config import InputConfig
from normfree.training.trainer import Trainer

# Dynamo looks at the gradient of what a block is given, which autograd warns of.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

DEPTHS = (2, 4, 3, 3)
OPEN = {"drop_rate": 0.3, "stochdepth_rate": 0.4, "skip_gain": 0.5}
VARIANTS = {
    "nfnet_f0": {"widths": (8, 16, 24, 32), "depths": DEPTHS, "group_width": 4, "stem": "conv3", **OPEN},
    "nf_regnet_b0": {"widths": (16, 24, 32, 40), "depths": DEPTHS, **OPEN},
    "nf_resnet50": {"widths": (16, 32, 48, 64), "depths": DEPTHS, **OPEN},
    "timm_nf_resnet50": {"widths": (16, 32, 48, 64), "depths": DEPTHS, **OPEN},
}
#: A stage has one shape in its first block and one in all others.
SHAPES = 2 * len(DEPTHS)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def made(name: str = "nfnet_f0", **changes: object) -> Net:
    torch.manual_seed(0)
    net = create_model(name, num_classes=3, **(VARIANTS[name] | changes)).to(
        memory_format=torch.channels_last
    )
    assert isinstance(net, Net)
    return net.train()


def some_images(count: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    return images.contiguous(memory_format=torch.channels_last)


def passed(net: Net, compiled: CompiledBlocks | None = None, *, half: bool = False, parts: int = 1) -> Tensor:
    """Loss of a step; gradients are added to those that are there."""
    total = torch.zeros(())
    with contextlib.ExitStack() as stack:
        stack.enter_context(standardized_once(net))
        if compiled is not None:
            stack.enter_context(compiled.active())
        for part, images in enumerate(some_images().split(6 // parts)):
            torch.manual_seed(part)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                logits = net(images)
            loss = logits.float().square().sum()
            loss.backward()
            total += loss.detach()
    return total


def assert_one_graph_a_shape(counter: CompileCounterWithBackend, *, times: int = 1) -> None:
    """Of blocks, and one of the stem."""
    assert counter.frame_count == times * (SHAPES + 1)
    assert not counters["graph_break"]


def assert_same_gradients(net: nn.Module, twin: nn.Module) -> None:
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        error = float((p.grad - q.grad).norm())
        assert error <= 1e-5 * float(q.grad.norm()) + 1e-9, name
        assert p.ndim != 4 or p.grad.is_contiguous(memory_format=torch.channels_last), name


@pytest.mark.parametrize(
    "name",
    [
        "nf_resnet50",
        *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if name != "nf_resnet50"),
    ],
)
def test_training_has_one_graph_for_each_shape_of_a_block(name: str) -> None:
    """With dropout and stochastic depth of a rate that differs from block to block, as β does."""
    net, counter = made(name), CompileCounterWithBackend("eager")
    blocks = [m for m in net.modules() if isinstance(m, Block)]
    assert len({b.stochdepth.rate for b in blocks}) == len(blocks) == sum(DEPTHS)
    compiled = CompiledBlocks(net, backend=counter)
    for _ in range(3):
        passed(net, compiled)
    assert_one_graph_a_shape(counter)


def test_also_under_autocast_and_in_micro_batches() -> None:
    net, counter = made(), CompileCounterWithBackend("eager")
    compiled = CompiledBlocks(net, backend=counter)
    for _ in range(2):
        passed(net, compiled, half=True, parts=3)
    assert_one_graph_a_shape(counter)


def test_losses_and_gradients_are_those_without_it() -> None:
    net = made(depths=(1, 3, 1, 1))
    twin = copy.deepcopy(net)
    compiled = CompiledBlocks(net, backend="aot_eager")
    for _ in range(2):  # the second time on top of the first
        got, wanted = passed(net, compiled, parts=3), passed(twin, parts=3)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0.0)
    assert_same_gradients(net, twin)


def test_evaluation_has_one_graph_for_each_shape_and_the_same_logits() -> None:
    net, counter = made(), CompileCounterWithBackend("eager")
    compiled = CompiledBlocks(net.eval(), backend=counter)
    with torch.no_grad():
        wanted = net(some_images())
        assert counter.frame_count == 0  # not active
        for _ in range(2):
            with standardized_once(net), compiled.active():
                torch.testing.assert_close(net(some_images()), wanted, rtol=1e-5, atol=1e-6)
    assert_one_graph_a_shape(counter)


def test_without_shared_kernels_beta_would_be_compiled_in() -> None:
    """What `standardized_once` is needed for; the law above would fail without it."""
    net, counter = made(depths=(1, 4, 1, 1)), CompileCounterWithBackend("eager")
    with torch.no_grad(), CompiledBlocks(net.eval(), backend=counter).active():
        net(some_images())
    assert counter.frame_count == 7 + 1  # of five shapes


def test_outside_the_network_is_as_it_was() -> None:
    net = made()
    keys = set(net.state_dict())
    compiled = CompiledBlocks(net, backend="eager")
    regions = [module for module in net.modules() if isinstance(module, Region)]
    depths = [module for module in net.modules() if isinstance(module, StochasticDepth)]

    def stopped() -> None:
        with compiled.active():
            assert all(region.compiled_compute is not None for region in regions)
            assert any(depth.rate_tensors is not None for depth in depths)
            assert set(net.state_dict()) == keys
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        stopped()
    assert len(regions) == 1 + sum(DEPTHS)
    assert all(region.compiled_compute is None for region in regions)
    assert all(depth.rate_tensors is None for depth in depths)
    limit = torch._dynamo.config.recompile_limit
    with compiled.active():
        assert torch._dynamo.config.recompile_limit == max(limit, LIMIT)
    assert torch._dynamo.config.recompile_limit == limit


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_of_a_rate_in_a_tensor_are_those_of_the_rate(rescale: bool, dtype: torch.dtype) -> None:
    net = made("timm_nf_resnet50" if rescale else "nfnet_f0")
    block = next(m for m in net.modules() if isinstance(m, Block) and m.stochdepth.rate > 0.0)
    plain = block.stochdepth
    assert plain.rescale == rescale
    x = torch.zeros(1000, 1, 1, 1, dtype=dtype)
    with CompiledBlocks(net, backend="eager").active():
        assert plain.rate_tensors is not None
        torch.manual_seed(0)
        got = block.stochdepth(x)
        net.eval()
        assert block.stochdepth(x) is None
    net.train()
    torch.manual_seed(0)
    wanted = plain(x)
    assert got.dtype == dtype
    assert torch.equal(got, wanted)
    assert 0.0 < float((got == 0).float().mean()) < 1.0


def test_a_run_compiles_its_steps_and_nothing_else(
    small_trainer: Callable[..., Trainer], some_batch: Callable[[int], Batch]
) -> None:
    """With dropout, stochastic depth and a last micro-batch of another size; scoring stays as it is."""
    counter = CompileCounterWithBackend("eager")
    two = {"input": InputConfig(batch_size=6, image_size=16, micro_batch=4)}
    ours, theirs = small_trainer(compile=True, **two), small_trainer(**two)
    with torch.compiler.set_stance("default", force_backend=counter):
        for step in range(3):
            loss, correct, _ = ours.step(some_batch(step), step)
            wanted = theirs.step(some_batch(step), step)
            torch.testing.assert_close(loss, wanted[0], rtol=1e-5, atol=0.0)
            assert torch.equal(correct, wanted[1])
        assert counter.frame_count == 2 * (2 + 1)  # sizes; blocks and stem
        with torch.no_grad():
            images, _ = ours.prepare(some_batch(0), 0)
            torch.testing.assert_close(
                ours.net.eval()(images), theirs.net.eval()(images), rtol=1e-4, atol=1e-5
            )
    assert counter.frame_count == 2 * (2 + 1)
    assert not counters["graph_break"]


@pytest.mark.slow
def test_inductor_keeps_gradients_and_memory_formats() -> None:
    """Every gradient of a convolution's output and input is channels_last, as the tensor itself is."""
    # Inductor draws other numbers, so nothing is drawn.
    net = made(depths=(1, 2, 1, 1), drop_rate=0.0, stochdepth_rate=0.0)
    twin = copy.deepcopy(net)
    formats: dict[str, bool] = {}

    def watch(name: str, tensor: Tensor) -> None:
        formats[f"{name} out"] = tensor.is_contiguous(memory_format=torch.channels_last)
        tensor.register_hook(
            lambda grad: formats.update(
                {f"{name} grad": grad.is_contiguous(memory_format=torch.channels_last)}
            )
        )

    for name, module in net.named_modules():
        if isinstance(module, Block) or name == "stem":
            module.register_forward_hook(lambda _m, _i, out, name=name: watch(name, out))
    loss = passed(net, CompiledBlocks(net))
    torch.testing.assert_close(loss, passed(twin), rtol=1e-5, atol=0.0)
    assert_same_gradients(net, twin)
    assert len(formats) == 2 * 6
    assert all(formats.values()), formats
    assert all(
        p.grad.is_contiguous(memory_format=torch.channels_last) for p in net.parameters() if p.ndim == 4
    )
