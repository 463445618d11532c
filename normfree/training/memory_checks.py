"""Does a network fit in the memory of this machine? Checked before it is built, and before its first pass."""

from __future__ import annotations

import math

import torch
from torch import nn

from normfree.data.transforms.normalize import height_and_width
from normfree.models.cost import count
from normfree.models.variant import Variant
from normfree.optim.torch_optimizers import state_tensors
from normfree.suggest import number_of, problem
from normfree.training import memory
from normfree.training.choices import OPTIMIZERS, parse_choice
from normfree.training.config import Config, channels_of, size_of
from normfree.training.distributed.world import World

# More bytes than a pass needs for each multiply-accumulate: 0.01 (NFNet-F0) to 0.07 (NF-ResNet micro) were predicted.
MOST_BYTES_PER_MAC = 0.2


def state_bytes(weights: int, config: Config) -> int:
    """Return the bytes that a run keeps for a network whose weights have `weights` bytes.

    These are weights, gradients, their average, the state of the optimizer, and with SAM the weights to restore.
    """
    kept = state_tensors(parse_choice(config.optim.optimizer, OPTIMIZERS).name)
    return weights * (3 + kept + bool(config.optim.sam_rho))


def require_state_fits(variant: Variant, config: Config, *, num_classes: int, world: World) -> None:
    """Check, before the network is built, that its weights and what a run keeps for them fit in memory.

    Raises:
        ValueError: they do not.
    """
    parameters = count(
        variant, num_classes=num_classes, in_channels=channels_of(config.input.image_size)
    ).parameters
    need = state_bytes(4 * parameters, config) // (world.size if config.parallel == "sharded" else 1)
    free = memory.free_on(world.device)
    if need > free:
        given = (
            f"{config.model} has {parameters / 1e6:.1f} M parameters, which with their gradients, average and "
            f"optimizer need {need / 1e9:.1f} GB"
        )
        fix = "choose a smaller --model; normfree list prints their sizes"
        raise ValueError(problem(given, allowed=f"{free / 1e9:.1f} GB, the memory that is free", fix=fix))


def require_pass_fits(net: nn.Module, variant: Variant, config: Config, *, world: World) -> None:
    """Check that a training pass of the network fits in main memory, which the system would else end without a message.

    A GPU is not checked: there, full memory is an error of its own. Micro-batches of "auto" are chosen to fit.

    Raises:
        ValueError: it does not fit.
    """
    size = config.input.micro_batch or world.part(config.input.batch_size)
    if size == "auto" or world.device.type != "cpu":
        return
    shape = height_and_width(size_of(config.input.image_size))
    free = memory.free_on(world.device)
    cost = count(variant, image_size=math.isqrt(shape[0] * shape[1]))
    state = state_bytes(sum(p.numel() * p.element_size() for p in net.parameters()), config)
    if state + MOST_BYTES_PER_MAC * size * cost.macs < free:
        return  # the prediction takes seconds
    half = config.precision == "bfloat16"
    fixed, each = memory.line(net, image_size=shape, channels=channels_of(config.input.image_size), half=half)
    need = state + fixed + size * each
    if need > free:
        images = f"{number_of(size, 'image')} of {shape[0]} x {shape[1]}"
        given = f"{images} at once through {config.model} need {need / 1e9:.1f} GB"
        fix = "use a smaller --input.image_size or --model"
        if state + fixed + each < free:
            fix = "--input.micro_batch auto: smaller parts, the same gradients"
        raise ValueError(problem(given, allowed=f"{free / 1e9:.1f} GB, the memory that is free", fix=fix))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return True for the errors that PyTorch raises when the memory of a GPU or of the CPU is full."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def full_memory(config: Config, *, device: torch.device, size: int) -> str:
    """Return the message for memory that was full in a pass of `size` images."""
    given = f"the memory of {device} is full: {config.model} with micro-batches of {size} images"
    fix = "start again with --input.micro_batch auto, or with a smaller --input.image_size or --model"
    return problem(given, fix=fix)
