"""Clipping and SGD on parameters that FSDP2 shards give in 1, 2 and 4 processes what one process computes.

tests/workers/dtensor_worker.py computes; the tests compare.
"""

import pytest
import torch

WORLDS = (1, 2, 4)


@pytest.fixture(scope="module")
def found(worlds) -> dict:
    folder = worlds / "dtensor"
    return {path.stem: torch.load(path, weights_only=False) for path in folder.glob("*.pt")}


def names(size: int) -> list[str]:
    return [f"{size}-{rank}" for rank in range(size)]


def assert_close(ours: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], bound: float) -> None:
    assert ours.keys() == plain.keys()
    for name, value in plain.items():
        assert ours[name].shape == value.shape
        assert float((ours[name] - value).norm()) <= bound * float(value.norm()), name


def test_the_shards_are_uneven_and_some_are_empty(found):
    rows = {
        name: [found[f"4-{rank}"]["pieces"][name][0] for rank in range(4)] for name in found["4-0"]["pieces"]
    }
    assert rows["head.weight"] == rows["head.bias"] == [1, 1, 1, 0]
    assert any(0 < r[-1] < r[0] for r in rows.values())
    assert any(".se." in name or "attention" in name for name in rows), sorted(rows)
    gains = {name: counts for name, counts in rows.items() if name.endswith("skip_gain")}
    assert len(gains) == 3
    assert all(counts == [1, 0, 0, 0] for counts in gains.values())


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


@pytest.mark.works("PyTorch FSDP2", "attach_agc")
@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("unit", ["filter", "tensor"])
def test_attached_to_an_optimizer_of_pytorch_it_clips_as_one_process_does(found, size, unit):
    exempt, reports, parameters = found["plain"]["attached"][unit]
    assert exempt == ("head.weight",)
    assert all(0.05 < fraction < 1.0 for fraction, _, _ in reports)
    for name in names(size):
        ours = found[name]["attached"][unit]
        assert ours[0] == exempt
        for one, other in zip(ours[1], reports, strict=True):
            assert one == (pytest.approx(other[0], abs=1e-7), other[1], pytest.approx(other[2], rel=1e-6))
        assert_close(ours[2], parameters, 1e-10)


@pytest.mark.parametrize("size", WORLDS)
def test_all_processes_name_a_gradient_that_is_not_finite_in_one(found, size):
    plain = found["plain"]["not finite"]
    assert len(plain) == 2
    for name in names(size):
        for target, (message, untouched, units) in found[name]["not finite"].items():
            assert (message, untouched, units) == plain[target]
            assert untouched
            assert message.startswith(
                f"1 of {len(found['plain']['norms'])} gradients are not finite: {target!r}; none was changed."
            )


def test_shards_of_columns_are_an_error(found):
    for name in names(2):
        assert found[name]["columns"] == (
            "a parameter of shape (4, 6) has the placements (Shard(dim=1),). Allowed: shards along dimension 0 over "
            "one mesh dimension, replicated over the others. Fix: use fully_shard without shard_placement_fn."
        )
