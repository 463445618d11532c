"""Clipping and SGD on parameters that FSDP2 shards: what one process computes, for 1, 2 and 4 gloo processes."""

import os
import subprocess
import sys

import pytest
import torch

WORLDS = (1, 2, 4)

WORK = '''
import multiprocessing, os, socket, sys, warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from normfree.models.zoo import create_model
from normfree.optim.agc import adaptive_clip_grad_
from normfree.optim.clipping import clip_grad_
from normfree.optim.named_gradients import NonFiniteGradientError
from normfree.optim.agc import unitwise_norm
from normfree.optim.groups import parameter_groups
from normfree.optim.sgd import SGD

folder = Path(sys.argv[1])
torch.set_num_threads(1)
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
    """As FSDP2 users do it: blocks, then the rest; scalars cannot be sharded and stay with every process."""
    scalars = {p for p in net.parameters() if p.ndim == 0}
    for stage in net.stages:
        for block in stage:
            fully_shard(block, mesh=mesh, ignored_params=scalars)
    fully_shard(net, mesh=mesh, ignored_params=scalars)
    return net


def whole(t):
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def numbers(report):
    return float(report), report.units, float(report.grad_norm)


def groups(net):
    return parameter_groups(net, weight_decay=2e-5, clipping=0.01)


def set_gradients(net, scale=1.0):
    """The same gradients in any world: small for some tensors, so that a part of the units is clipped."""
    for i, (name, p) in enumerate(net.named_parameters()):
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
            same = all(torch.equal(whole(p.grad).nan_to_num(7), before[n].nan_to_num(7))
                       for n, p in net.named_parameters())
            bad[target] = str(error), same
        loose = adaptive_clip_grad_(groups(net), error_if_nonfinite=False)
        bad[target] += (loose.units,)
    found["not finite"] = bad
    for p in net.parameters():
        p.grad = None
    return found


def train(net, rank, world):
    """Three steps on a batch of 8, each process its part; FSDP2 averages gradients, hence the factor."""
    optimizer = SGD(groups(net), 0.05)
    g = torch.Generator().manual_seed(1)
    reports = []
    for _ in range(3):
        images = torch.randn(8, 3, 32, 32, generator=g, dtype=torch.float64)
        labels = torch.randint(0, 3, (8,), generator=g)
        part = slice(rank * 8 // world, (rank + 1) * 8 // world)
        loss = F.cross_entropy(net(images[part]), labels[part], reduction="sum") / 8 * world
        loss.backward()
        for p in net.parameters():
            if world > 1 and not isinstance(p, DTensor):
                dist.all_reduce(p.grad)
                p.grad /= world
        reports.append(numbers(adaptive_clip_grad_(optimizer.param_groups)))
        optimizer.step()
        optimizer.zero_grad()
    state = {n: whole(t) for n, t in optimizer.named_state().items()}
    return reports, {n: whole(p) for n, p in net.named_parameters()}, state


def work(size, rank, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    net = spread(network(torch.float32), mesh)
    found = experiments(net, size)
    found["pieces"] = {n: tuple(p.to_local().shape) for n, p in net.named_parameters() if isinstance(p, DTensor)}
    found["train"] = train(spread(network(torch.float64), mesh), rank, size)
    if size == 2:
        column = torch.nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(1)]))
        column.grad = distribute_tensor(torch.ones(4, 6), mesh, [Shard(1)])
        try:
            adaptive_clip_grad_([column])
        except ValueError as error:
            found["columns"] = str(error)
    torch.save(found, folder / f"{size}-{rank}.pt")
    dist.destroy_process_group()


found = experiments(network(torch.float32), 1)
found["train"] = train(network(torch.float64), 0, 1)
torch.save(found, folder / "plain.pt")
for size in (1, 2, 4):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")  # one import of torch for all
    processes = [fork.Process(target=work, args=(size, rank, port)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit(f"world of {size}: {[process.exitcode for process in processes]}")
'''


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("sharded")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        [sys.executable, "-c", WORK, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return {path.stem: torch.load(path, weights_only=False) for path in folder.glob("*.pt")}


def names(size: int) -> list[str]:
    return [f"{size}-{rank}" for rank in range(size)]


def assert_close(ours: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], bound: float) -> None:
    assert ours.keys() == plain.keys()
    for name, value in plain.items():
        assert ours[name].shape == value.shape
        assert float((ours[name] - value).norm()) <= bound * float(value.norm()), name


def test_the_pieces_are_uneven_and_some_are_empty(found):
    rows = {
        name: [found[f"4-{rank}"]["pieces"][name][0] for rank in range(4)] for name in found["4-0"]["pieces"]
    }
    assert rows["head.weight"] == rows["head.bias"] == [1, 1, 1, 0]
    assert any(0 < r[-1] < r[0] for r in rows.values())
    assert any(".se." in name or "attention" in name for name in rows), sorted(rows)
    assert not any("skip_gain" in name for name in rows)


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("mode", ["agc", "norm", "value", "off"])
def test_every_mode_clips_as_one_process_does(found, size, mode):
    (fraction, units, norm), grads = found["plain"][mode]
    for name in names(size):
        report, ours = found[name][mode]
        assert report == (pytest.approx(fraction, abs=1e-7), units, pytest.approx(norm, rel=1e-6))
        assert_close(ours, grads, 1e-6)
    if mode != "off":
        assert 0.01 < fraction <= 1.0
        unclipped = found["plain"]["off"][1]
        changed = [n for n in grads if not torch.equal(grads[n], unclipped[n])]
        assert len(changed) > 10


def test_only_some_units_are_clipped(found):
    fraction, units, _ = found["plain"]["agc"][0]
    assert 0.1 < fraction < 0.9
    assert units > 500


@pytest.mark.parametrize("size", WORLDS)
def test_unit_norms_of_shards_are_those_of_the_whole(found, size):
    for name in names(size):
        assert_close(found[name]["norms"], found["plain"]["norms"], 1e-6)


@pytest.mark.parametrize("size", WORLDS)
def test_three_steps_of_training_are_those_of_one_process(found, size):
    reports, parameters, momentum = found["plain"]["train"]
    assert all(0.05 < fraction < 1.0 for fraction, _, _ in reports)
    for name in names(size):
        ours, theirs, state = found[name]["train"]
        for one, other in zip(ours, reports, strict=True):
            assert one == (pytest.approx(other[0], abs=1e-7), other[1], pytest.approx(other[2], rel=1e-6))
        assert_close(theirs, parameters, 1e-10)
        assert_close(state, momentum, 1e-10)


@pytest.mark.parametrize("size", WORLDS)
def test_what_is_not_finite_in_one_piece_is_named_by_all(found, size):
    plain = found["plain"]["not finite"]
    assert len(plain) == 2
    for name in names(size):
        for target, (message, untouched, units) in found[name]["not finite"].items():
            assert (message, untouched, units) == plain[target]
            assert untouched
            assert message.startswith(
                f"1 of {len(found['plain']['norms'])} gradients are not finite: {target!r}."
            )


def test_shards_of_columns_are_refused(found):
    for name in names(2):
        assert found[name]["columns"] == (
            "A parameter of shape (4, 6) is distributed as (Shard(dim=1),). Clipping takes shards along dimension 0 of "
            "one mesh dimension, the others replicated. Use fully_shard as it comes."
        )
