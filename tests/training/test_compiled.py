"""Blocks compiled one by one: one graph for each shape, no graph breaks, the same results."""

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
from normfree.models.layers import Region, StochasticDepth
from normfree.models.net import Block, Net
from normfree.models.shared_weights import standardized_once
from normfree.models.zoo import create_model
from normfree.training.compiled import LIMIT, CompiledBlocks
from normfree.training.config import InputConfig
from normfree.training.trainer import Trainer

# Dynamo reads the gradient of a block's input, which makes autograd warn.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

DEPTHS = (2, 4, 3, 3)
OPEN = {"drop_rate": 0.3, "stochdepth_rate": 0.4, "skip_gain": 0.5}
VARIANTS = {
    "nfnet_f0": {"widths": (8, 16, 24, 32), "depths": DEPTHS, "group_width": 4, "stem": "conv3", **OPEN},
    "nf_regnet_b0": {"widths": (16, 24, 32, 40), "depths": DEPTHS, **OPEN},
    "nf_resnet50": {"widths": (16, 32, 48, 64), "depths": DEPTHS, **OPEN},
    "timm_nf_resnet50": {"widths": (16, 32, 48, 64), "depths": DEPTHS, **OPEN},
}
# In a stage, the first block has one shape and all others have another.
SHAPES = 2 * len(DEPTHS)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def small_net(name: str = "nfnet_f0", **changes: object) -> Net:
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


def run_step(
    net: Net, compiled: CompiledBlocks | None = None, *, half: bool = False, parts: int = 1
) -> Tensor:
    """Return the loss of a step, which adds to the gradients."""
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
    """Check for one graph for each shape of a block, and one for the stem."""
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
    """With dropout, and stochastic depth whose rate differs from block to block, as β does."""
    net, counter = small_net(name), CompileCounterWithBackend("eager")
    blocks = [m for m in net.modules() if isinstance(m, Block)]
    assert len({b.stochdepth.rate for b in blocks}) == len(blocks) == sum(DEPTHS)
    compiled = CompiledBlocks(net, backend=counter)
    for _ in range(3):
        run_step(net, compiled)
    assert_one_graph_a_shape(counter)


def test_one_graph_for_each_shape_under_autocast_and_in_micro_batches() -> None:
    net, counter = small_net(), CompileCounterWithBackend("eager")
    compiled = CompiledBlocks(net, backend=counter)
    for _ in range(2):
        run_step(net, compiled, half=True, parts=3)
    assert_one_graph_a_shape(counter)


def test_losses_and_gradients_equal_those_without_compilation() -> None:
    net = small_net(depths=(1, 3, 1, 1))
    twin = copy.deepcopy(net)
    compiled = CompiledBlocks(net, backend="aot_eager")
    for _ in range(2):  # the second time gradients are accumulated
        got, wanted = run_step(net, compiled, parts=3), run_step(twin, parts=3)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0.0)
    assert_same_gradients(net, twin)


def test_evaluation_has_one_graph_for_each_shape_and_the_same_logits() -> None:
    net, counter = small_net(), CompileCounterWithBackend("eager")
    compiled = CompiledBlocks(net.eval(), backend=counter)
    with torch.no_grad():
        wanted = net(some_images())
        assert counter.frame_count == 0  # not active
        for _ in range(2):
            with standardized_once(net), compiled.active():
                torch.testing.assert_close(net(some_images()), wanted, rtol=1e-5, atol=1e-6)
    assert_one_graph_a_shape(counter)


@pytest.mark.slow
def test_without_shared_weights_blocks_are_compiled_for_each_beta() -> None:
    """The reason for `standardized_once`: without it the test above fails."""
    net, counter = small_net(depths=(1, 4, 1, 1)), CompileCounterWithBackend("eager")
    with torch.no_grad(), CompiledBlocks(net.eval(), backend=counter).active():
        net(some_images())
    assert counter.frame_count == 7 + 1  # of five shapes


def test_leaving_the_context_restores_the_network() -> None:
    net = small_net()
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
def test_masks_for_a_rate_in_a_tensor_equal_those_for_the_number(rescale: bool, dtype: torch.dtype) -> None:
    net = small_net("timm_nf_resnet50" if rescale else "nfnet_f0")
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


def test_a_run_compiles_only_its_steps(
    small_trainer: Callable[..., Trainer], some_batch: Callable[[int], Batch]
) -> None:
    """With dropout, stochastic depth and a last micro-batch of another size; scoring is not compiled."""
    counter = CompileCounterWithBackend("eager")
    two = {"input": InputConfig(batch_size=6, image_size=16, micro_batch=4)}
    compiling, plain = small_trainer(compile=True, **two), small_trainer(**two)
    with torch.compiler.set_stance("default", force_backend=counter):
        for step in range(3):
            loss, correct, _ = compiling.step(some_batch(step), step)
            wanted = plain.step(some_batch(step), step)
            torch.testing.assert_close(loss, wanted[0], rtol=1e-5, atol=0.0)
            assert torch.equal(correct, wanted[1])
        assert counter.frame_count == 2 * (2 + 1)  # sizes; blocks and stem
        with torch.no_grad():
            images, _ = compiling.prepare(some_batch(0), 0)
            torch.testing.assert_close(
                compiling.net.eval()(images), plain.net.eval()(images), rtol=1e-4, atol=1e-5
            )
    assert counter.frame_count == 2 * (2 + 1)
    assert not counters["graph_break"]


@pytest.mark.slow
def test_inductor_keeps_gradients_and_memory_formats() -> None:
    """Outputs of stem and blocks, and their gradients, are channels_last."""
    # Inductor has another random number generator, so nothing is drawn.
    net = small_net(depths=(1, 2, 1, 1), drop_rate=0.0, stochdepth_rate=0.0)
    twin = copy.deepcopy(net)
    formats: dict[str, bool] = {}

    def record(name: str, tensor: Tensor) -> None:
        formats[f"{name} out"] = tensor.is_contiguous(memory_format=torch.channels_last)
        tensor.register_hook(
            lambda grad: formats.update(
                {f"{name} grad": grad.is_contiguous(memory_format=torch.channels_last)}
            )
        )

    for name, module in net.named_modules():
        if isinstance(module, Block) or name == "stem":
            module.register_forward_hook(lambda _m, _i, out, name=name: record(name, out))
    loss = run_step(net, CompiledBlocks(net))
    torch.testing.assert_close(loss, run_step(twin), rtol=1e-5, atol=0.0)
    assert_same_gradients(net, twin)
    assert len(formats) == 2 * 6
    assert all(formats.values()), formats
    assert all(
        p.grad.is_contiguous(memory_format=torch.channels_last) for p in net.parameters() if p.ndim == 4
    )
