"""The profiler changes no bit of a run, its shares add up, and times are assigned to the right part."""

import io
import json
import shlex
import time
from contextlib import nullcontext

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from normfree.models.layers import WSConv2d
from normfree.native.library import library
from normfree.training import loop, profile, run_folder
from normfree.training.config_io import with_overrides
from normfree.training.profile import BEFORE, PARTS, PHASES, profiled, span
from normfree.training.recipes import RECIPES

FLAGS = shlex.split(
    "--data synthetic:classes=3,size=16,train=48,val=12 --model nf_resnet_nano --input.image_size 16 "
    "--input.batch_size 8 --input.workers 0 --length 8st --optim.warmup 1st --log.evaluate_every 8st"
)


def train(out, *flags: str) -> str:
    text = io.StringIO()
    loop.train(
        with_overrides(RECIPES["scratch"](), [*FLAGS, *flags]), out, console=Console(file=text, width=500)
    )
    return text.getvalue()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "draw_curves", lambda *args, **kwargs: None)
        out = tmp_path_factory.mktemp("runs")
        texts = train(out / "plain"), train(out / "profiled", "--log.to", "profile=2")
        patch.setattr("normfree.training.update.FusedUpdate.create", lambda *args, **kwargs: None)
        train(out / "calls", "--log.to", "profile=2")
        return out, *texts


def test_a_profile_changes_no_bit(runs):
    a, b = (
        load_file(runs[0] / name / "checkpoints/step-00000008/model.safetensors")
        for name in ("plain", "profiled")
    )
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not (runs[0] / "plain" / "profile").exists()


# Phases of a run with the update in one pass, and with separate calls.
IN_RUN = {"profiled": set(PHASES) - ({"clip"} if library() else set()), "calls": set(PHASES)}


def test_the_log_names_the_files(runs):
    folder = runs[0] / "profiled" / "profile"
    assert f"profile of 2 steps: {folder}/table.txt, and {folder}/trace.json for Perfetto\n" in runs[2]


@pytest.mark.parametrize("name", IN_RUN)
def test_the_trace_has_the_phases(runs, name):
    folder = runs[0] / name / "profile"
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    counts = {n: sum(e.get("name") == n and e.get("cat") == "user_annotation" for e in events)
              for n in (*PHASES, profile.STANDARDIZATION)}  # fmt: skip
    layers = sum(isinstance(m, WSConv2d) for m in net().modules())
    assert counts == {**{n: 2 * (n in IN_RUN[name]) for n in PHASES}, profile.STANDARDIZATION: 2 * layers}


def net():
    from normfree.models.zoo import create_model

    return create_model("nf_resnet_nano", num_classes=3)


def section(text: str, title: str) -> dict[str, tuple[float, float]]:
    """Return milliseconds and percent by name, from the section of the table that begins with `title`."""
    lines = text[text.index(title) :].splitlines()[1:]
    found = {}
    for line in lines:
        if not line.endswith("%"):
            break
        name, ms, percent, _ = line.rsplit(None, 3)
        found[name.strip()] = (float(ms), float(percent))
    return found


@pytest.mark.parametrize("name", IN_RUN)
def test_the_shares_of_the_table_add_up(runs, name):
    text = (runs[0] / name / "profile" / "table.txt").read_text()
    first = text.splitlines()[0]
    assert first.startswith("2 steps after 3, ")
    phases, parts = section(text, "phase, "), section(text, "part, CPU")
    assert set(phases) == {*IN_RUN[name], "rest"}
    assert set(parts) == {*PARTS, "other"} - (set(PHASES) - IN_RUN[name])
    for shares in (phases, parts):
        assert sum(percent for _, percent in shares.values()) == pytest.approx(100, abs=0.5)
        assert all(ms >= 0 for ms, _ in shares.values())
    assert sum(ms for ms, _ in phases.values()) == pytest.approx(float(first.split()[4]), rel=0.01)
    assert parts["convolution"][0] > 0
    assert "aten::" in text


def work(mode: str):
    """Return a layer, and a step that only standardizes or convolves, forward and backward."""
    torch.manual_seed(0)
    layer, x = WSConv2d(8, 4), torch.randn(2, 8, 8, 8)

    def step() -> None:
        if mode == "standardize":
            layer.standardized_weight().sum().backward()
        else:
            torch.nn.functional.conv2d(x, layer.weight).sum().backward()

    return layer, step


# The rest of such a step: sum up, begin the backward pass, keep the gradient.
AROUND = ("aten::sum", "aten::ones_like", "autograd::engine::evaluate_function: SumBackward0",
          "autograd::engine::evaluate_function: torch::autograd::AccumulateGrad")  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "part"), [("standardize", profile.STANDARDIZATION), ("convolve", "convolution")]
)
def test_the_operations_of_a_part_are_assigned_to_it(mode, part):
    """Counted in operations, forward and backward: shares of time depend on the machine."""
    layer, step = work(mode)
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded,
        profile._marked(layer),
    ):
        step()
    events = list(recorded.events())
    expected = [e for e in events if not any(profile_ancestor(e, name) for name in AROUND)]
    counted = profile._parts(events)
    assert counted[part][0] == pytest.approx(sum(e.self_cpu_time_total for e in expected))
    assert set(counted) == {part, "other"}
    assert any(e.name.startswith("autograd::") for e in expected)
    assert len(expected) >= 10


def test_the_wait_for_a_batch_is_data(tmp_path):
    def batches():
        for i in range(6):
            time.sleep(0.02)  # never shorter
            yield i

    for _ in profiled(batches(), steps=3, net=None, folder=tmp_path / "profile", log=lambda text: None):
        pass
    text = (tmp_path / "profile" / "table.txt").read_text()
    for title in ("phase, ", "part, CPU"):
        assert section(text, title)["data"][0] >= 20


def test_backward_time_is_assigned_to_the_part_of_the_forward_operation(tmp_path):
    """Without the numbers that link them, half of the time of the standardization would be in no part."""
    layer, step = work("standardize")
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded,
        profile._marked(layer),
    ):
        step()
    events = list(recorded.events())
    backward = sum(e.self_cpu_time_total for e in events if profile_ancestor(e, "autograd::"))
    counted = profile._parts(events)["weight standardization"][0]
    forward = sum(e.self_cpu_time_total for e in events if profile_ancestor(e, profile.STANDARDIZATION))
    assert backward > 0
    assert forward < counted <= forward + backward + 1


def profile_ancestor(event, name: str) -> bool:
    while event is not None:
        if event.name.startswith(name):
            return True
        event = event.cpu_parent
    return False


def test_batches_are_passed_on_and_the_marks_are_removed(tmp_path):
    layer = WSConv2d(3, 4)
    seen = []
    for batch in profiled(iter_of(9), steps=2, net=layer, folder=tmp_path / "p", log=seen.append):
        assert (layer.marker is not nullcontext) == (len(seen) == 0 and batch < BEFORE + 2)
        last = batch
    assert last == 8
    assert layer.marker is nullcontext
    assert type(span("x")).__name__ == "nullcontext"


def iter_of(count: int):
    yield from range(count)


@pytest.mark.parametrize(("length", "message"), [
    (BEFORE, "no profile: it starts after 3 steps, and the run ended before that"),
    (BEFORE + 1, "profile of 1 step: "),
])  # fmt: skip
def test_a_run_shorter_than_its_profile(tmp_path, length, message):
    seen: list[str] = []
    batches = profiled(iter_of(length), steps=5, net=WSConv2d(3, 4), folder=tmp_path / "p", log=seen.append)
    assert list(batches) == list(range(length))
    assert len(seen) == 1
    assert seen[0].startswith(message)


def test_closing_it_closes_the_batches_and_stops_the_profiler(tmp_path):
    closed = []

    def batches():
        try:
            yield from range(9)
        finally:
            closed.append(True)

    layer = WSConv2d(3, 4)
    stream = profiled(batches(), steps=3, net=layer, folder=tmp_path / "p", log=lambda text: None)
    for _ in range(5):
        next(stream)
    stream.close()
    assert closed == [True]
    assert layer.marker is nullcontext
    assert not (tmp_path / "p").exists()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        pass  # would fail if the first were still on
