"""Parameters that FSDP2 shards over processes (DTensors): their local rows, and norms and counts over all processes.

`torch.distributed.fsdp.fully_shard` cuts every parameter along dimension 0, which is also the dimension of AGC's
units. Each filter or row of a matrix is therefore whole in one process and needs no communication. A gain or a bias is
one unit, cut in pieces, and needs the sum of the squares of its pieces. A process may hold fewer rows than another, or
none. Parameters that are not sharded (skip gains: FSDP2 accepts no scalars) are equal in all processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from normfree.optim.units import UnitNorms, Units, scale_shape, tensor_norms

_PLAIN = (Tensor, torch.nn.Parameter)  # nearly all tensors there are, and the quicker question


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor. Asked by attribute: the class is loaded only by those who use it."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The rows that lie here, sharing memory; a plain tensor is returned as it is."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        rows: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return rows


def shard_group(tensors: Iterable[Tensor]) -> Any:
    """The process group over which the DTensors among `tensors` are cut along dimension 0, or None.

    Raises ValueError when they are cut along another dimension, are sums not yet made, or lie on different groups.
    """
    found: dict[tuple[int, ...], Any] = {}
    for tensor in filter(is_sharded, tensors):
        mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
        placements: Any = tensor.placements  # type: ignore[attr-defined]
        cut = [d for d, p in enumerate(placements) if not p.is_replicate()]
        if len(cut) > 1 or any(not placements[d].is_shard(0) for d in cut):
            raise ValueError(
                f"A parameter of shape {tuple(tensor.shape)} is distributed as {tuple(placements)}. Clipping takes "
                "shards along dimension 0 of one mesh dimension, the others replicated. Use fully_shard as it comes."
            )
        if cut:
            group = mesh.get_group(cut[0])
            found[tuple(torch.distributed.get_process_group_ranks(group))] = group
    if len(found) > 1:
        raise ValueError(
            f"Parameters lie on {len(found)} different process groups. One clipping call takes one. Give fully_shard "
            "the same mesh for all modules."
        )
    return next(iter(found.values()), None)


def is_cut(tensor: Tensor) -> bool:
    """Whether other processes hold other rows of it."""
    return is_sharded(tensor) and any(p.is_shard() for p in tensor.placements)  # type: ignore[attr-defined]


def counts_here(tensor: Tensor, group: Any) -> bool:
    """Whether this process counts `tensor` in a sum over `group`, where each is to count once."""
    return is_cut(tensor) or bool(torch.distributed.get_rank(group) == 0)


def sum_over(values: Tensor, group: Any) -> Tensor:
    """Sum over `group`, computed in float64, in the type of `values`. The same bits everywhere; `values` stays."""
    total = values.detach().to(torch.float64, copy=True)
    torch.distributed.all_reduce(total, group=group)
    return total.to(values.dtype)


def spread(values: Tensor, like: Tensor, *, rows: bool) -> Tensor:
    """A DTensor of `like`'s mesh: of one value for each row of `like` that lies here, or the same value everywhere."""
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
    """`UnitNorms` of tensors of which some are sharded over the processes of `group`; all processes make each call."""

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
        return spread(norms.reshape(scale_shape(norms, tensor)), tensor, rows=not single)

    def tensor_norms(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return _sum_norms(tensor_norms([local(t) for t in tensors]), tensors, self.group)

    def global_norm(self, unit_norms: list[Tensor], whole: list[Tensor], like: Tensor) -> Tensor:
        summed = [sum_over(n.double().square().sum(), self.group).sqrt() for n in unit_norms]
        return super().global_norm(summed, whole, like).to(torch.promote_types(like.dtype, torch.float32))

    def count_above(self, tensor: Tensor, bound: float) -> Tensor:
        found = super().count_above(local(tensor), bound)
        return found if counts_here(tensor, self.group) else torch.zeros_like(found)

    def total(self, counts: list[Tensor]) -> Tensor:
        return sum_over(super().total(counts), self.group)


class ShardedUnits(Units):
    """The units of the rows that this process holds. A unit that several processes hold is counted by the first."""

    def __init__(self, tensors: Sequence[Tensor], single: Sequence[bool], group: Any) -> None:
        super().__init__([local(t) for t in tensors], single)
        self.whole, self.group = list(tensors), group

    def single_norms(self) -> list[Tensor]:
        whole = [t for t, one in zip(self.whole, self.single, strict=True) if one]
        return _sum_norms(super().single_norms(), whole, self.group)

    def counted(self, values: Tensor) -> Tensor:
        first = torch.distributed.get_rank(self.group) == 0
        here = [
            counts_here(t, self.group) and (first or not one)
            for t, one in zip(self.whole, self.single, strict=True)
        ]
        mask = torch.tensor([h for h, size in zip(here, self.sizes, strict=True) for _ in range(size)])
        return torch.where(mask.to(values.device), values, torch.zeros_like(values))


def _sum_norms(norms: list[Tensor], tensors: Sequence[Tensor], group: Any) -> list[Tensor]:
    """Return 0-dim norms of whole tensors from those of the local pieces, with one all-reduce for all."""
    cut = [i for i, tensor in enumerate(tensors) if is_cut(tensor)]
    if not cut:
        return norms
    squares = torch.stack([norms[i].double() for i in cut]).square_()
    whole = sum_over(squares, group).sqrt()
    norms = list(norms)
    for i, norm in zip(cut, whole, strict=True):
        norms[i] = norm.to(norms[i].dtype)
    return norms
