"""parallel="sharded": FSDP2 spreads weights, gradients, momentum and average over the processes, by rows.

Each block is gathered for its forward and backward pass and let go again; gradients come back summed and cut. Scalars
(skip gains), which FSDP2 does not take, stay whole everywhere. Checkpoints and scores see whole tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normfree.models.net import Net
from normfree.optim.dtensor import is_sharded, is_split, local
from normfree.optim.named_state import copy_named_
from normfree.training.distributed.world import World


def shard_(net: Net, world: World) -> None:
    """Cuts the parameters of `net`, which lies on the CPU, and moves the rows of this process to its device.

    Block by block, so that no device ever holds the whole network. Gradients will be sums over the processes, since
    each one's loss is already divided by the whole batch; FSDP2 by itself would divide again.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    scalars = {p for p in net.parameters() if p.ndim == 0}
    for block in (block for stage in net.stages for block in stage.children()):
        fully_shard(block, mesh=mesh, ignored_params=scalars)
    fully_shard(net, mesh=mesh, ignored_params=scalars)
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(
                True
            )  # else a factor of 1 asks gloo for what only NCCL has
    for scalar in scalars:
        scalar.data = scalar.data.to(world.device)


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All rows of `tensor`, on this device. Every process makes the call."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full.detach()


def gather_first(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole copies of all tensors, on the first process's CPU; the others get none. One tensor at a time, so that a
    device needs room for the largest only. Every process makes the call."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if world.is_main:
            found[name] = full.cpu()
    return found


def check_fits(targets: Mapping[str, Tensor], saved: Mapping[str, Tensor], *, owner: str) -> None:
    """Raises ValueError, as `copy_named_` does, if names or shapes of `saved` are not those of `targets`."""
    shapes = {name: torch.empty(t.shape, device="meta") for name, t in targets.items()}
    copy_named_(shapes, {name: t.to("meta") for name, t in saved.items()}, owner=owner)


@torch.no_grad()
def scatter_first_(targets: Mapping[str, Tensor], saved: Mapping[str, Tensor], world: World) -> None:
    """Copies the first process's whole tensors into everybody's rows. `saved` is empty in all others; every process
    makes the call."""
    from torch.distributed.tensor import distribute_tensor

    for name, target in targets.items():
        source = saved[name] if world.is_main else torch.empty(target.shape)
        source = source.to(world.device, target.dtype).contiguous()
        if is_split(target):
            like: Any = target
            local(target).copy_(local(distribute_tensor(source, like.device_mesh, like.placements)))
        else:
            world.copy_first_([source])
            target.copy_(source)


@torch.no_grad()
def fill_(plain: nn.Module, net: nn.Module) -> None:
    """Copies the whole tensors of `net` into `plain`, the same network uncut. Every process makes the call."""
    source = net.state_dict()
    for name, target in plain.state_dict().items():
        target.copy_(whole(source[name]))
