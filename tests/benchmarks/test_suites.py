"""Every suite returns its cases, small cases of each run, and invalid arguments give an error of one line."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

Script = Callable[[str], ModuleType]

CPU = torch.device("cpu")


@pytest.fixture
def bench(script: Script) -> Any:
    return script("harness").Bench(rounds=2, window_s=0.0, bandwidth=1e10, matmul=1e11)


def only_comparison_names(comparisons: Iterable[Any]) -> list[str]:
    return [c.case for c in comparisons]


def test_every_suite_returns_cases_for_its_devices(script: Script) -> None:
    for suite in script("suites").SUITES.values():
        for device in (CPU, torch.device("cuda")):
            if suite.budget(device) and all(importlib.util.find_spec(name) for name in suite.needs):
                cases = suite.cases(device, None)
                assert len({c.name for c in cases}) == len(cases) >= 1
                assert suite.about().endswith(".")


def test_the_cpu_suites_end_within_twenty_minutes(script: Script) -> None:
    suites = [s for s in script("suites").SUITES.values() if not s.by_name and s.name != "training_bfloat16"]
    assert sum(s.cpu_s + 10 for s in suites) < 20 * 60  # 10 s for the start of each process
    assert all(s.gpu_s <= 9 * 60 for s in suites)


def test_picks_of_the_results_page_name_suites(script: Script) -> None:
    known = script("suites").SUITES
    assert {pick.suite for pick in script("results_page").PICKS} <= set(known)


def test_training(script: Script, bench: Any) -> None:
    training = script("training")
    case = training.case(training.Network("test_nfnet", 32, 2, 0.25))
    comparisons = list(case.run(bench))
    deep = "test_nfnet, 32 px, batch 2, stochastic depth 0.25"
    names = [f"{c}, {part}" for c in ("test_nfnet, 32 px, batch 2", deep) for part in training.PARTS]
    assert only_comparison_names(comparisons) == names
    whole, passes = comparisons[:2]
    assert [t.arm.split()[0] for t in whole.timings] == ["timm", "normfree"]
    assert all(w.median > p.median for w, p in zip(whole.timings, passes.timings, strict=True))
    assert whole.floor is not None


def test_the_gate_of_training_detects_a_changed_weight_and_a_changed_update(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks, update_arms = script("networks"), script("update_arms")
    theirs, ours = networks.pair("test_nfnet", stochdepth=0.5)
    x, y = networks.batch(32, 2, CPU)
    assert networks.gradient_distance(theirs, ours, x, y) < 1e-5
    assert update_arms.update_distance(theirs, ours) < 1e-5
    with torch.no_grad():
        ours.head.weight[0] *= 1.01
    assert networks.gradient_distance(theirs, ours, x, y) > 1e-4
    theirs, ours = networks.pair("test_nfnet")
    monkeypatch.setattr(update_arms, "our_update", partial(update_arms.our_update, clipping=1.0))
    assert update_arms.update_distance(theirs, ours) > 1e-3


def test_update(script: Script, bench: Any) -> None:
    comparisons = list(script("update").case("test_nfnet", "tiny").run(bench))
    parts = ("clipping", "whole update", "weight standardization")
    assert only_comparison_names(comparisons) == [f"{part}, tiny" for part in parts]
    numbers = sum(p.numel() for p in script("networks").pair("test_nfnet")[1].parameters())
    assert comparisons[1].floor.ms == pytest.approx(1e3 * 28 * numbers / 1e10)


def check_inference(script: Script, bench: Any, columns: tuple[str, ...], batches: tuple[int, ...]) -> None:
    inference, runtimes, report = script("inference"), script("runtimes"), script("report")
    found = list(inference.case("test_nfnet", 32, batches, columns=columns).run(bench))
    assert bench.skipped == []
    assert [(c.row.rpartition(" ")[2], c.column) for c in found] == [
        (str(n), c) for n in batches for c in columns
    ]
    for comparison in found:
        theirs, ours = comparison.timings  # the best of each side
        assert (theirs.arm.startswith("timm"), ours.arm.startswith("normfree")) == (True, True)
        assert max(theirs.error, ours.error) <= runtimes.ALLOWED[comparison.column]
    lines = report.grid(found).splitlines()
    assert lines[0] == f"| timm by hand → normfree, ms | {' | '.join(columns)} |"
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        f"| test_nfnet, 32 px, batch {n}" for n in batches
    ]


def test_inference(script: Script, bench: Any) -> None:
    check_inference(script, bench, (script("runtimes").PYTORCH,), (1, 2))


@pytest.mark.slow
def test_inference_in_onnxruntime(script: Script, bench: Any) -> None:
    check_inference(script, bench, (script("runtimes").ONNXRUNTIME,), (1, 2))


def test_a_network_with_batch_norm_is_folded_on_both_sides(
    script: Script, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inference, runtimes = script("inference"), script("runtimes")
    monkeypatch.setattr(inference, "WITH_BATCH_NORM", ("test_resnet",))
    (found,) = inference.case("test_resnet", 32, (1,), columns=(runtimes.PYTORCH,)).run(bench)
    assert [t.arm.rpartition(" ")[0] for t in found.timings] == ["timm", "normfree, folded"]
    assert 0 < max(t.error for t in found.timings) <= runtimes.ALLOWED[runtimes.PYTORCH]  # folding rounds


def test_a_runtime_that_computes_something_else_is_left_out(
    script: Script, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inference, runtimes = script("inference"), script("runtimes")
    right, wrong = (lambda self: self.theirs), (lambda self: lambda x: torch.ones(len(x), 1000))

    def runs(self: Any, column: str) -> Any:
        return [("timm, x", right(self)), ("normfree, x", wrong(self))]

    monkeypatch.setattr(runtimes.Runtimes, "_runs", runs)
    assert list(inference.case("test_nfnet", 32, (1,), columns=(runtimes.ONNXRUNTIME,)).run(bench)) == []
    wrong_line, last = bench.skipped
    assert wrong_line.startswith("normfree, x: off by ")
    assert last == "test_nfnet, 32 px, batch 1, onnxruntime: no arm is left on one side"


def test_a_loop_of_public_names_takes_the_trainer_s_steps(script: Script, bench: Any) -> None:
    training = script("training")
    (found,) = training.loop_case("nf_resnet_nano", 32, 2).run(bench)
    assert [t.arm for t in found.timings] == ["trainer", "own loop"]
    assert found.timings[1].error < training.TOLERANCE


def test_allocated_memory_is_at_least_that_of_the_gradients(script: Script) -> None:
    memory, networks = script("memory"), script("networks")
    ours = networks.pair("test_nfnet")[1]
    gradients = sum(4 * p.numel() for p in ours.parameters())
    few, many = (memory.allocated(ours, 32, images, "NHWC") for images in (2, 8))
    assert gradients < few < many
    assert memory.comparison("x", {"a": [4.0], "b": [2.0]}, [4.0], 0.0).timings[1].ratio == 2


def test_small_scale(script: Script, bench: Any) -> None:
    (found,) = script("small_scale").case("nf_resnet_nano_64", 32, 2, steps=1).run(bench)
    assert [t.arm for t in found.timings] == [
        "timm", "normfree", "normfree, nf_resnet_nano_64", "normfree, resnet_nano_64 with batch norm",
    ]  # fmt: skip


def test_cifar_is_learned_and_missing_data_are_reported(script: Script, bench: Any) -> None:
    cifar = script("cifar")
    labels = torch.arange(32) % 2
    images = cifar.Images(0.1 * torch.randn(32, 3, 16, 16) + labels.view(-1, 1, 1, 1), labels)
    recipe = cifar.Recipe(8, 0.2, clipping=1.0, epochs=40, shift=2, average=0.5)
    seconds, accuracy = cifar.race(bench, "nf_resnet_nano", images, images, recipe, 0)
    assert seconds > 0
    assert accuracy >= cifar.TARGET
    assert list(cifar.case(None).run(bench)) == []
    assert bench.skipped == ["CIFAR-10 to 94 %: no data; pass its folder with --data FOLDER"]


def test_shifted_images_are_windows_of_the_padded_ones(script: Script) -> None:
    cifar = script("cifar")
    images = torch.arange(6 * 3 * 8 * 8.0).view(6, 3, 8, 8)
    padded = torch.nn.functional.pad(images, [2] * 4, mode="reflect")
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1)  # 6 3 5 5 8 8
    for i, moved in enumerate(cifar.shifted(images, 2)):
        both = torch.stack([moved, moved.flip(-1)])[:, :, None, None]
        assert (windows[i] == both).flatten(4).all(-1).all(1).any()


def test_convolutions(script: Script, bench: Any) -> None:
    convolutions = script("convolutions")
    for shape in (convolutions.Shape(32, 32, 6, 3, 2, group_width=16), convolutions.Shape(8, 12, 4)):
        comparisons = list(convolutions.case(shape, 2).run(bench))
        assert len(comparisons) == 3
        assert len(comparisons[0].timings) == (4 if shape.kernel_size == 1 else 3)
        assert all(c.floor.ms > 0 for c in comparisons)


def test_a_failed_process_is_detected(script: Script) -> None:
    startup = script("startup")
    python = [startup.sys.executable, "-c"]
    codes = ["print('nf')", "print('other')", "print('nf'); exit(1)"]
    assert [float(startup.process([*python, code], "nf")) for code in codes] == [1.0, 0.0, 0.0]


def test_startup_reports_the_time_beyond_that_of_torch(script: Script) -> None:
    summary = script("summary")
    values = {"import timm": [900.0], "import torch": [500.0], "from normfree import create_model": [510.0]}
    timings = tuple(summary.timing(k, v, [900.0], random.Random(0)) for k, v in values.items())
    found = script("startup").beyond_torch(summary.Comparison("startup", "import timm", timings, 0.0, 1))
    assert [t.facts["beyond_torch_ms"] for t in found.timings] == [400, 0, 10]


def test_invalid_arguments_give_an_error_of_one_line(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    run = script("run")
    for args, message in (
        (["trainin"], "unknown suite 'trainin'. Did you mean 'training'? Allowed: 'training', "),
        (
            ["update", "--only", "nfnet_f"],
            "unknown name 'nfnet_f'. Did you mean 'nfnet_f0'? Allowed: 'nfnet_f0'.",
        ),
        (["update", "--rounds", "0"], "--rounds is 0. Allowed: 1 or more."),
        (["update", "--budget-s", "0"], "--budget-s is 0. Allowed: seconds above 0."),
        (
            ["update", "--data", "x"],
            "--data for update, which reads none. Allowed: with small_scale or whole_job.",
        ),
        (["whole_job"], "whole_job without --data. Allowed: --data FOLDER with train/ and test/"),
        (["whole_job", "--data", "none"], "none has no train/. Allowed: --data FOLDER with train/ and test/"),
    ):
        assert run.main([*args, "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(message)
        assert error.count("\n") == 1


def test_a_named_suite_whose_packages_are_missing_is_an_error(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, suites = script("run"), script("suites")
    for name, extra in (("spectrogram", "interop"), ("loading", "bench")):
        monkeypatch.setitem(suites.SUITES, name, replace(suites.SUITES[name], needs=("no_such_package",)))
        assert run.main([name, "--only", "zz", "--device", "cpu"]) == 2
        wanted = f"{name} cannot run: no_such_package missing: pip install -e '.[{extra}]'\n"
        assert capsys.readouterr().err == wanted


def test_results_of_another_number_of_threads_are_only_printed(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = script("run")
    seen: list[bool] = []
    monkeypatch.setattr(run, "run_here", lambda suite, options, device: seen.append(options.no_write) or 0)
    monkeypatch.setattr(run.results_page, "update", lambda: None)
    for threads in (run.THREADS, run.THREADS + 1):
        monkeypatch.setattr(run.torch, "get_num_threads", lambda threads=threads: threads)
        assert run.main(["startup", "--device", "cpu"]) == 0
    assert seen == [False, True]
    assert "Prints only: with 3 threads; results/ has results of 2." in capsys.readouterr().out


def test_bfloat16_runs_where_training_would_choose_it(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = script("suites").SUITES["training_bfloat16"]
    for gain, obstacle in (
        (2.0, ""),
        (0.5, "convolutions in bfloat16 take 2.00 times as long as in float32 on this CPU"),
    ):
        monkeypatch.setattr("normfree.training.precision.cpu_gain", lambda gain=gain: gain)
        assert suite.obstacle(CPU) == obstacle


def test_a_suite_runs_and_writes_its_results(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, suites, machine = script("run"), script("suites"), script("machine")
    monkeypatch.setattr(machine, "COPIED", {"cpu": 1 << 20})
    monkeypatch.setattr(machine, "matmul_rate", lambda *args: 1e11)
    monkeypatch.setattr(run, "Bench", partial(run.Bench, window_s=0.0))
    monkeypatch.setattr(run, "settle", lambda *args: None)  # keep the threads and cores of the tests
    update = script("update")
    monkeypatch.setattr(update, "cases", lambda device: [update.case("test_nfnet", "tiny")])
    monkeypatch.setitem(suites.SUITES, "update", replace(suites.SUITES["update"], cpu_s=60))
    assert run.main(["update", "--device", "cpu", "--rounds", "5", "--out", str(tmp_path)]) == 0
    report = script("report")
    stem = "update" + report.suffix(machine.facts(CPU))
    result = report.read(tmp_path / f"{stem}.json")
    assert [c.rounds for c in result.comparisons] == [5, 5, 5]
    assert result.command == "python -m benchmarks.run update"
    assert "| whole update, tiny | normfree |" in (tmp_path / f"{stem}.md").read_text(encoding="utf-8")
    assert "# update" in capsys.readouterr().out
