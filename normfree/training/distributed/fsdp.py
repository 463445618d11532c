"""parallel="sharded": FSDP2 shards weights, gradients, momentum and averaged weights over the processes, by rows.

The parameters of each block are gathered for its forward and backward pass and then freed; gradients are reduced and
scattered. Checkpoints and evaluations use whole tensors.
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
    """Shard the parameters of `net`, which is on the CPU, and move the rows of this process to its device.

    This is done block by block, so no device ever holds the whole network. Gradients become sums over the processes
    because each process already divides its loss by the size of the whole batch; FSDP2's default would divide again.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in (block for stage in net.stages for block in stage.children()):
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Without this, a factor of 1 uses an operation that NCCL has and gloo does not.
            module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """Return all rows of `tensor` on this device. Collective."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full.detach()


def gather_first(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Return whole copies of all tensors on the CPU of rank 0, and an empty dict on other ranks. Collective.

    Tensors are gathered one at a time, so a device needs memory for only the largest.
    """
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if world.is_main:
            found[name] = full.cpu()
    return found


def check_fits(targets: Mapping[str, Tensor], saved: Mapping[str, Tensor], *, owner: str) -> None:
    """Raise the ValueError of `copy_named_` if names or shapes of `saved` differ from those of `targets`."""
    shapes = {name: torch.empty(t.shape, device="meta") for name, t in targets.items()}
    copy_named_(shapes, {name: t.to("meta") for name, t in saved.items()}, owner=owner)


@torch.no_grad()
def scatter_first_(targets: Mapping[str, Tensor], saved: Mapping[str, Tensor], world: World) -> None:
    """Copy the whole tensors `saved` of rank 0 into the rows of all processes; other ranks pass {}. Collective."""
    from torch.distributed.tensor import distribute_tensor

    for name, target in targets.items():
        source = saved[name] if world.is_main else torch.empty(target.shape)
        source = source.reshape(target.shape).to(world.device, target.dtype).contiguous()
        if is_split(target):
            like: Any = target
            local(target).copy_(local(distribute_tensor(source, like.device_mesh, like.placements)))
        else:
            world.copy_first_([source])
            target.copy_(source)


@torch.no_grad()
def fill_(plain: nn.Module, net: nn.Module) -> None:
    """Copy the whole tensors of `net` into `plain`, the same network without shards. Collective."""
    source = net.state_dict()
    for name, target in plain.state_dict().items():
        target.copy_(whole(source[name]))
