"""Micro-batches by memory: the prediction equals what a real pass allocates; the chosen size fits and divides."""

import io
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from normfree.models.zoo import create_model
from normfree.training import loop, memory, micro_batch, run_folder
from normfree.training.config import Config, InputConfig
from normfree.training.config_io import load_config
from normfree.training.distributed.world import World
from normfree.training.gradient import BatchGradient
from normfree.training.memory import free_memory, largest, line, pass_bytes
from normfree.training.resolve import resolve
from normfree.training.trainer import Trainer

TINY = {"depths": (1, 1), "widths": (64, 128), "strides": (1, 2), "group_width": 16, "num_classes": 10}


def allocated(net: nn.Module, batch_size: int, image_size: int) -> int:
    """Return the peak of the bytes that a real pass allocates, as the profiler records the CPU allocator."""
    from torch.profiler import ProfilerActivity, profile

    net.train().to(memory_format=torch.channels_last)
    images = torch.rand(batch_size, 3, image_size, image_size).contiguous(memory_format=torch.channels_last)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        logits = net(images)
        F.cross_entropy(logits, torch.softmax(logits.detach(), dim=1), reduction="sum").backward()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.fixture(scope="module")
def nano_line() -> tuple[int, int]:
    """Return `line` of nf_resnet_nano with 3 classes at 32 px."""
    return line(create_model("nf_resnet_nano", num_classes=3), image_size=32)


@pytest.fixture
def predicted_once(monkeypatch: pytest.MonkeyPatch, nano_line: tuple[int, int]) -> tuple[int, int]:
    """Let trainers use the prediction that the module has made once."""
    monkeypatch.setattr(memory, "line", lambda net, **options: nano_line)
    return nano_line


@pytest.mark.parametrize(("name", "size", "fields", "batch_size"), [
    ("nf_resnet_nano", 32, {}, 12), ("nfnet_f0", 64, TINY, 2), ("resnet_nano", 32, {}, 12),
    pytest.param("nf_resnet_nano", 32, {}, 2, marks=pytest.mark.slow),
    pytest.param("nfnet_f0", 64, TINY, 12, marks=pytest.mark.slow),
    pytest.param("resnet_nano", 32, {}, 2, marks=pytest.mark.slow),
])  # fmt: skip
def test_the_prediction_is_what_a_real_pass_allocates(name, size, fields, batch_size):
    net = create_model(name, **fields)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    predicted = pass_bytes(net, batch_size=batch_size, image_size=size)
    assert all(
        torch.equal(t, before[n]) for n, t in net.state_dict().items()
    )  # running statistics of batch norm included
    assert all(p.grad is None for p in net.parameters())
    # the prediction counts temporary tensors of weight standardization, which the compiled kernels do not need
    spared = sum(p.nbytes for p in net.parameters())
    assert 0.97 * predicted - spared <= allocated(net, batch_size, size) <= 1.03 * predicted


def test_one_more_layer_needs_one_more_tensor():
    def chain(layers: int) -> int:
        sigmoids = [nn.Sigmoid() for _ in range(layers)]
        net = nn.Sequential(nn.Conv2d(3, 3, 1), *sigmoids, nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
        return pass_bytes(net, batch_size=7, image_size=8)

    assert chain(5) - chain(4) == chain(40) - chain(39) == 4 * 7 * 3 * 8 * 8


def test_half_precision_needs_less_and_the_meta_device_the_same():
    net = create_model("nf_resnet_nano")
    whole = pass_bytes(net, batch_size=8, image_size=32)
    assert 0.4 < pass_bytes(net, batch_size=8, image_size=32, half=True) / whole < 0.7
    with torch.device("meta"):
        empty = create_model("nf_resnet_nano")
    assert pass_bytes(empty, batch_size=8, image_size=32) == whole


def test_the_linear_prediction_holds_for_larger_batches(nano_line):
    net = create_model("nf_resnet_nano", num_classes=3)
    fixed, each = nano_line
    assert fixed + 100 * each == pytest.approx(pass_bytes(net, batch_size=100, image_size=32), rel=1e-3)


def test_the_largest_that_fits_and_works():
    sizes, tried = [8, 4, 2, 1], []

    def needs(size: int) -> int:
        return 100 + 10 * size

    def works(size: int) -> bool:
        tried.append(size)
        return size <= 2

    assert largest(sizes, needs=needs, limit=180) == 8
    assert largest(sizes, needs=needs, limit=179) == 4
    assert largest(sizes, needs=needs, limit=179, works=works) == 2
    assert tried == [4, 2]  # a size that is not predicted to fit is not tried
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        largest(sizes, needs=lambda size: 3 * 10**9, limit=2 * 10**9)
    assert str(error.value) == (
        "input.micro_batch is 'auto', but micro-batches of 1 need about 3.00 GB. Allowed: 2.00 GB on this device. "
        "Fix: use a smaller --input.image_size, or --parallel sharded, or give a number to try anyway."
    )


def test_free_memory_respects_the_limit_of_the_container(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   8000 kB\n")
    assert free_memory(tmp_path) == 8000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    for bound, expected in (("max", 8000 * 1024), ("5000", 2000), ("1000", 0)):
        (group / "memory.max").write_text(bound + "\n")
        (group / "memory.current").write_text("3000\n")
        assert free_memory(tmp_path) == expected


def config(*, image_size: int = 16, **more: object) -> Config:
    inputs = InputConfig(image_size=image_size, batch_size=24, micro_batch="auto", workers=0)
    return Config.model_validate(
        {"data": "synthetic:classes=3,size=16,train=24,val=3", "model": "nf_resnet_nano", "device": "cpu",
         "length": "1st", "input": inputs, **more}
    )  # fmt: skip


@pytest.mark.parametrize(("mode", "images", "expected"), [
    ("replicated", 24, 24), ("replicated", 13, 12), ("replicated", 11, 8), ("replicated", 1, 1),
    ("exact", 13, 12), ("exact", 11, 6), ("exact", 5, 3),
])  # fmt: skip
def test_a_limit_decides_the_micro_batch(monkeypatch, predicted_once, mode, images, expected):
    net = create_model("nf_resnet_nano", num_classes=3)
    fixed, each = predicted_once
    weights = sum(4 * p.numel() for p in net.parameters())
    # weights, gradients, momentum and average; with "exact" also the partial sums
    copies = 4 + (24 // expected).bit_length() * (mode == "exact")
    monkeypatch.setattr(memory, "free_bytes", lambda device: copies * weights + fixed + images * each)
    trainer = Trainer(resolve(config(parallel=mode, image_size=32)), num_classes=3, samples=24)
    assert trainer.config.input.micro_batch == expected
    assert 24 % expected == 0


def test_all_processes_use_the_smallest_size_found(monkeypatch, predicted_once):
    trainer = Trainer(resolve(config()), num_classes=3, samples=24)
    monkeypatch.setattr(World, "all_gather", lambda self, value: [value, 6, 12])
    parts = trainer.gradients, trainer.optimizer, trainer.config
    assert micro_batch.choose(lambda fits: 24, *parts, num_classes=3) == 6

    def none(fits: object) -> int:
        raise ValueError("nothing fits")

    with pytest.raises(ValueError, match=r"^nothing fits$"):
        micro_batch.choose(none, *parts, num_classes=3)
    monkeypatch.setattr(World, "all_gather", lambda self, value: [value, "nothing fits there"])
    with pytest.raises(ValueError, match=r"^nothing fits there$"):  # also in a process where it fits
        micro_batch.choose(lambda fits: 24, *parts, num_classes=3)


def test_trying_leaves_no_trace(predicted_once):
    trainer = Trainer(resolve(config(model="resnet_nano")), num_classes=3, samples=24)
    before = {n: t.clone() for n, t in trainer.net.state_dict().items()}
    chosen, seen = trainer.gradients.micro_batch, []

    class Small(BatchGradient):
        def __call__(self, images, targets, step, *, micro_batch=None):
            seen.append((len(images), micro_batch))
            result = super().__call__(images, targets, step, micro_batch=micro_batch)
            if micro_batch > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return result

    small = Small(trainer.net, trainer.config, world=trainer.world, micro_batch=chosen)
    assert [
        micro_batch.fits_on_device(size, small, trainer.optimizer, trainer.config, num_classes=3)
        for size in (24, 8, 4)
    ] == [False, False, True]
    assert seen == [(24, 24), (16, 8), (8, 4)]  # two micro-batches, so that gradients are summed
    assert small.micro_batch == chosen
    assert all(torch.equal(t, before[n]) for n, t in trainer.net.state_dict().items())
    assert all(p.grad is None for p in trainer.net.parameters())


def test_the_run_writes_the_number_to_its_config(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "draw_curves", lambda *args, **kwargs: None)
    out = io.StringIO()
    loop.train(config(), tmp_path / "run", console=Console(file=out))
    assert load_config(tmp_path / "run" / "config.toml").input.micro_batch == 24
    assert "micro-batches of 24 images\n" in out.getvalue()
    assert loop.train(load_config(tmp_path / "run" / "config.toml"), tmp_path / "run").steps == 1


@pytest.mark.slow
def test_the_table_of_costs_is_written_by_its_script():
    docs = Path(__file__).parents[2] / "docs"
    script = runpy.run_path(str(docs / "make_scale.py"))
    page = (docs / "scale.md").read_text(encoding="utf-8")
    assert script["entry"]("nfnet_f0") in page
    entries = page.partition(script["BEGIN"])[2].partition(script["END"])[0].strip().splitlines()[2:]
    assert [entry.split("`")[1] for entry in entries] == list(script["NAMES"])
    for entry in entries:  # times are arithmetic, so all are checked
        name, days = entry.split("`")[1], [float(cell) for cell in entry.split("|")[-5:-1]]
        expected = [script["days"](name, gpus=n, peak=script["PEAK"]["H100, H200"]) for n in script["LINKS"]]
        assert days == pytest.approx(expected, abs=0.05)
