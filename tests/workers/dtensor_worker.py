"""Tasks of tests/optim/test_dtensor.py, run in every process of a world."""

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from normfree.models.zoo import create_model
from normfree.optim.agc import adaptive_clip_grad_, unitwise_norm
from normfree.optim.attach import attach_agc
from normfree.optim.clipping import clip_grad_
from normfree.optim.groups import parameter_groups
from normfree.optim.named_gradients import NonFiniteGradientError
from normfree.optim.sgd import SGD

# A block without a branch returns a view of its input; nothing here changes it in place.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
TINY = {"depths": (1, 2), "widths": (20, 36), "strides": (1, 2), "group_width": 8, "num_classes": 3}


def network(dtype):
    torch.manual_seed(0)
    net = create_model("nfnet_f0", **TINY, drop_rate=0.0, stochdepth_rate=0.0)
    for name, p in net.named_parameters():
        if name.endswith("skip_gain"):
            p.data.fill_(0.5)
        elif name == "head.weight":
            p.data.normal_(std=0.1)
    return net.to(dtype)


def spread(net, mesh):
    """As FSDP2 users do it: blocks, then the rest."""
    for stage in net.stages:
        for block in stage:
            fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def whole(t):
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def numbers(report):
    return float(report), report.units, float(report.grad_norm)


def groups(net):
    return parameter_groups(net, weight_decay=2e-5, clipping=0.01)


def set_gradients(net, scale=1.0):
    """The same gradients in any world: small for some tensors, so that a part of the units is clipped."""
    for i, p in enumerate(net.parameters()):
        g = torch.Generator().manual_seed(i)
        value = torch.randn(p.shape, generator=g, dtype=p.dtype) * scale * 10.0 ** -(i % 5)
        if p.ndim > 1:
            value *= torch.rand(p.shape[0], *[1] * (p.ndim - 1), generator=g, dtype=p.dtype) ** 4
        p.grad = distribute_tensor(value, p.device_mesh, p.placements) if isinstance(p, DTensor) else value


def experiments(net, world):
    found = {}
    for mode, clipping in (("agc", 0.01), ("norm", 0.5), ("value", 0.05), ("off", 0.01)):
        set_gradients(net)
        report = clip_grad_(groups(net), mode=mode, clipping=clipping)
        found[mode] = numbers(report), {n: whole(p.grad) for n, p in net.named_parameters()}
    found["norms"] = {n: whole(unitwise_norm(p)) for n, p in net.named_parameters()}
    bad = {}
    for target in ("stages.0.0.conv0.bias", "head.weight"):
        set_gradients(net)
        grad = dict(net.named_parameters())[target].grad
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        if local.numel() and (world == 1 or dist.get_rank() == (1 if target == "head.weight" else world - 1)):
            local.view(-1)[-1] = float("nan")
        before = {n: whole(p.grad) for n, p in net.named_parameters()}
        try:
            adaptive_clip_grad_(groups(net))
        except NonFiniteGradientError as error:
            same = all(
                torch.equal(whole(p.grad).nan_to_num(7), before[n].nan_to_num(7))
                for n, p in net.named_parameters()
            )
            bad[target] = str(error), same
        loose = adaptive_clip_grad_(groups(net), error_if_nonfinite=False)
        bad[target] += (loose.units,)
    found["not finite"] = bad
    for p in net.parameters():
        p.grad = None
    return found


def backward(net, generator, rank, world):
    """Gradients of a batch of 8, each process its part; FSDP2 averages gradients, hence the factor."""
    images = torch.randn(8, 3, 32, 32, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (8,), generator=generator)
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    loss = F.cross_entropy(net(images[part]), labels[part], reduction="sum") / 8 * world
    loss.backward()
    for p in net.parameters():
        if world > 1 and not isinstance(p, DTensor):
            dist.all_reduce(p.grad)
            p.grad /= world


def train(net, rank, world):
    """Three steps of our SGD."""
    optimizer = SGD(groups(net), 0.05)
    g = torch.Generator().manual_seed(1)
    reports = []
    for _ in range(3):
        backward(net, g, rank, world)
        reports.append(numbers(adaptive_clip_grad_(optimizer.param_groups)))
        optimizer.step()
        optimizer.zero_grad()
    state = {n: whole(t) for n, t in optimizer.named_state().items()}
    return reports, {n: whole(p) for n, p in net.named_parameters()}, state


def train_attached(net, rank, world, unit):
    """Three steps of PyTorch's AdamW with `attach_agc`, on the batches and with the sums of `train`."""
    optimizer = torch.optim.AdamW(net.parameters(), 0.01, foreach=False)
    agc = attach_agc(optimizer, 0.01, model=net, unit=unit)
    g = torch.Generator().manual_seed(1)
    reports = []
    for _ in range(3):
        backward(net, g, rank, world)
        optimizer.step()
        optimizer.zero_grad()
        reports.append(numbers(agc.report))
    return agc.exempt, reports, {n: whole(p) for n, p in net.named_parameters()}


def everything(world, folder):
    """Do all experiments and save what this process has found to SIZE-RANK.pt; a world of one also to plain.pt."""
    path, size, rank = Path(folder), world.size, world.rank
    if size == 1:
        found = experiments(network(torch.float32), 1)
        found["train"] = train(network(torch.float64), 0, 1)
        found["attached"] = {
            unit: train_attached(network(torch.float64), 0, 1, unit) for unit in ("filter", "tensor")
        }
        torch.save(found, path / "plain.pt")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (size,))
    net = spread(network(torch.float32), mesh)
    found = experiments(net, size)
    found["pieces"] = {
        n: tuple(p.to_local().shape) for n, p in net.named_parameters() if isinstance(p, DTensor)
    }
    found["train"] = train(spread(network(torch.float64), mesh), rank, size)
    found["attached"] = {
        unit: train_attached(spread(network(torch.float64), mesh), rank, size, unit)
        for unit in ("filter", "tensor")
    }
    if size == 2:
        column = torch.nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(1)]))
        column.grad = distribute_tensor(torch.ones(4, 6), mesh, [Shard(1)])
        try:
            adaptive_clip_grad_([column])
        except ValueError as error:
            found["columns"] = str(error)
    torch.save(found, path / f"{size}-{rank}.pt")
    if size == 1:
        dist.destroy_process_group()
