"""Parameters that FSDP2 shards over processes (DTensors): their local rows, and norms and counts over all processes.

`torch.distributed.fsdp.fully_shard` splits every parameter along dimension 0, which is also the dimension of AGC's
units. Each filter or row of a matrix is therefore complete in one process and needs no communication. A gain or a bias
is one unit that is split, and its norm needs the sum of the squares over all processes. A process may have fewer rows
than another, or none: a skip gain has one row, in the first process. FSDP2 does not accept 0-dim parameters. Those of
other networks are not sharded and are equal in all processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from normfree.optim.units import UnitNorms, Units, scale_shape, tensor_norms
from normfree.suggest import problem

# The types of nearly all tensors; comparing types is faster than looking for an attribute.
_PLAIN = (Tensor, torch.nn.Parameter)


def is_sharded(tensor: Tensor) -> bool:
    """Return True for a DTensor, without importing the class."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """Return the rows of a DTensor that this process has, as a view; return a plain tensor itself."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        rows: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return rows


def shard_group(tensors: Iterable[Tensor]) -> Any:
    """Return the process group over which the DTensors among `tensors` are sharded along dimension 0, or None.

    Raises:
        ValueError: they are sharded along another dimension, are partial sums, or have different groups.
    """
    found: dict[tuple[int, ...], Any] = {}
    for tensor in filter(is_sharded, tensors):
        mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
        placements: Any = tensor.placements  # type: ignore[attr-defined]
        sharded = [d for d, p in enumerate(placements) if not p.is_replicate()]
        if len(sharded) > 1 or any(not placements[d].is_shard(0) for d in sharded):
            raise ValueError(
                problem(
                    f"a parameter of shape {tuple(tensor.shape)} has the placements {tuple(placements)}",
                    allowed="shards along dimension 0 over one mesh dimension, replicated over the others",
                    fix="use fully_shard without shard_placement_fn",
                )
            )
        if sharded:
            group = mesh.get_group(sharded[0])
            found[tuple(torch.distributed.get_process_group_ranks(group))] = group
    if len(found) > 1:
        raise ValueError(
            problem(
                f"the parameters are sharded over {len(found)} different process groups",
                allowed="one process group for each clipping call",
                fix="pass the same mesh to fully_shard for all modules",
            )
        )
    return next(iter(found.values()), None)


def is_split(tensor: Tensor) -> bool:
    """Return True if other processes have other rows of the tensor."""
    return is_sharded(tensor) and any(p.is_shard() for p in tensor.placements)  # type: ignore[attr-defined]


def counts_in_this_process(tensor: Tensor, group: Any) -> bool:
    """Return True if this process adds its part of `tensor` to a sum over `group`, in which each element counts once.

    Each process adds its rows of a split tensor; the first process adds a replicated tensor.
    """
    return is_split(tensor) or bool(torch.distributed.get_rank(group) == 0)


def sum_over(values: Tensor, group: Any) -> Tensor:
    """Return the sum over `group`, computed in float64, in the dtype of `values`; the same bits in all processes."""
    total = values.detach().to(torch.float64, copy=True)
    torch.distributed.all_reduce(total, group=group)
    return total.to(values.dtype)


def as_dtensor(values: Tensor, like: Tensor, *, rows: bool) -> Tensor:
    """Return a DTensor on the mesh of `like`: one value for each local row of `like`, or one replicated value."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    if not rows:
        return DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
    shape = torch.Size([like.shape[0], *values.shape[1:]])
    placements: Any = like.placements  # type: ignore[attr-defined]
    return DTensor.from_local(
        values, mesh, placements, run_check=False, shape=shape, stride=(1,) * len(shape)
    )


def norms_for(tensors: Iterable[Tensor], *, unit: str = "filter") -> UnitNorms:
    """Return the norms for these tensors: `ShardedUnitNorms` if any of them is sharded, else `UnitNorms`."""
    group = shard_group(tensors)
    return UnitNorms(unit) if group is None else ShardedUnitNorms(group, unit)


class ShardedUnitNorms(UnitNorms):
    """`UnitNorms` for tensors of which some are sharded over the processes of `group`.

    Every process must make each call.
    """

    def __init__(self, group: Any, unit: str = "filter") -> None:
        super().__init__(unit)
        self.group = group

    def units(self, tensors: Sequence[Tensor]) -> Units:
        return ShardedUnits(tensors, [self.is_one_unit(t) for t in tensors], self.group)

    def unitwise(self, tensor: Tensor) -> Tensor:
        if not is_sharded(tensor):
            return super().unitwise(tensor)
        single = self.is_one_unit(tensor)
        norms = ShardedUnits([tensor], [single], self.group).norms()
        return as_dtensor(norms.reshape(scale_shape(norms, tensor)), tensor, rows=not single)

    def tensor_norms(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return _sum_norms(tensor_norms([local(t) for t in tensors]), tensors, self.group)

    def global_norm(self, unit_norms: list[Tensor], whole: list[Tensor], like: Tensor) -> Tensor:
        summed = [sum_over(n.double().square().sum(), self.group).sqrt() for n in unit_norms]
        return super().global_norm(summed, whole, like).to(torch.promote_types(like.dtype, torch.float32))

    def count_above(self, tensor: Tensor, bound: float) -> Tensor:
        found = super().count_above(local(tensor), bound)
        return found if counts_in_this_process(tensor, self.group) else torch.zeros_like(found)

    def total(self, counts: list[Tensor]) -> Tensor:
        return sum_over(super().total(counts), self.group)


class ShardedUnits(Units):
    """The units of the rows of this process. The first process counts the units that several processes share."""

    def __init__(self, tensors: Sequence[Tensor], single: Sequence[bool], group: Any) -> None:
        super().__init__([local(t) for t in tensors], single)
        self.whole, self.group = list(tensors), group

    def single_norms(self) -> list[Tensor]:
        whole = [t for t, one in zip(self.whole, self.single, strict=True) if one]
        return _sum_norms(super().single_norms(), whole, self.group)

    def counted(self, values: Tensor) -> Tensor:
        first = torch.distributed.get_rank(self.group) == 0
        here = [
            counts_in_this_process(t, self.group) and (first or not one)
            for t, one in zip(self.whole, self.single, strict=True)
        ]
        mask = torch.tensor([h for h, size in zip(here, self.sizes, strict=True) for _ in range(size)])
        return torch.where(mask.to(values.device), values, torch.zeros_like(values))


def _sum_norms(norms: list[Tensor], tensors: Sequence[Tensor], group: Any) -> list[Tensor]:
    """Return 0-dim norms of whole tensors from the norms of the local rows, with one all-reduce for all."""
    split = [i for i, tensor in enumerate(tensors) if is_split(tensor)]
    if not split:
        return norms
    squares = torch.stack([norms[i].double() for i in split]).square_()
    whole = sum_over(squares, group).sqrt()
    norms = list(norms)
    for i, norm in zip(split, whole, strict=True):
        norms[i] = norm.to(norms[i].dtype)
    return norms
