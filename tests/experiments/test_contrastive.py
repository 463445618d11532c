"""The smallest setting of the experiment on the leak, the virtual batch norm that it uses, and its verdict."""

import json

import pytest
import torch
from torch import nn

from experiments import contrastive
from experiments.contrastive import PRESETS, VirtualBatchNorm, losses_on, main, network, parts, verdict
from normfree import VARIANTS

TINY, CPU = PRESETS["tiny"], torch.device("cpu")


@pytest.fixture(autouse=True)
def unchanged_variants():
    before = dict(VARIANTS)
    yield
    VARIANTS.clear()
    VARIANTS.update(before)


def test_a_virtual_device_normalizes_like_a_device_of_its_own():
    torch.manual_seed(0)
    x = torch.randn(12, 5, 4, 4, dtype=torch.float64) * 3 + 1
    norm = nn.BatchNorm2d(5).double()
    nn.init.uniform_(norm.weight)
    nn.init.normal_(norm.bias)
    virtual = VirtualBatchNorm(norm, 3)
    alone = [nn.BatchNorm2d(5).double() for _ in range(3)]
    for each in alone:
        each.load_state_dict(norm.state_dict())
    expected = torch.cat([each(part) for each, part in zip(alone, x.split(4), strict=True)])
    torch.testing.assert_close(virtual(x), expected)
    virtual.eval()
    means = torch.stack([each.running_mean for each in alone]).mean(dim=0)
    variances = torch.stack([each.running_var for each in alone]).mean(dim=0)
    shape = (1, 5, 1, 1)
    by_hand = (x - means.view(shape)) / (variances.view(shape) + norm.eps).sqrt()
    torch.testing.assert_close(virtual(x), by_hand * norm.weight.view(shape) + norm.bias.view(shape))


def test_only_statistics_per_device_notice_that_views_were_moved():
    """The law behind the experiment: without batch statistics, and with those of the whole batch, nothing leaks."""
    source = parts(TINY, TINY.data)["test"]
    leak = {}
    for arm in contrastive.ARMS:
        found = losses_on(network(TINY, arm, seed=0), TINY, source, device=CPU)
        leak[arm] = abs(found["shuffled"] - found["own"])
    assert leak["nf"] < 1e-5
    assert leak["bn_global"] < 1e-5
    assert leak["bn_device"] == leak["bn_shuffled"] > 1e-3  # the same untrained network


def test_all_arms_start_with_the_same_convolutions_and_scoring_changes_nothing():
    nets = {arm: network(TINY, arm, seed=3) for arm in contrastive.ARMS}
    weights = [net.stem.conv0.weight for net in nets.values()]
    assert all(torch.equal(weight, weights[1]) for weight in weights[2:])
    before = {name: value.clone() for name, value in nets["bn_device"].state_dict().items()}
    losses_on(nets["bn_device"], TINY, parts(TINY, TINY.data)["test"], device=CPU)
    assert all(torch.equal(value, before[name]) for name, value in nets["bn_device"].state_dict().items())


def test_training_choice_and_test_images_are_different_images():
    own = parts(TINY, TINY.data)
    names = {name: {source.name(i) for i in range(len(source))} for name, source in own.items()}
    assert {name: len(found) for name, found in names.items()} == {"train": 32, "choice": 16, "test": 24}
    assert not names["train"] & names["choice"]
    assert not (names["train"] | names["choice"]) & names["test"]


def test_the_smallest_setting_runs_writes_a_page_and_continues(tmp_path, capsys):
    args = ["--preset", "tiny", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    main(args)
    page = (tmp_path / "results" / "contrastive_tiny.md").read_text()
    found = json.loads((tmp_path / "results" / "contrastive_tiny.json").read_text())["cells"]
    assert [f"| {arm} | 0.1 |" in page for arm in contrastive.ARMS] == [True] * 4
    assert abs(found["nf"][0]["leak"]) < 1e-5
    assert "| does not leak |" in page
    capsys.readouterr()
    main(args)
    assert '"arm"' not in capsys.readouterr().out  # no cell ran again


def cells(leaks, probes, diverged=False):
    return [{"leak": a, "probe": b, "diverged": diverged} for a, b in zip(leaks, probes, strict=True)]


def test_the_verdict_follows_the_rule():
    nf = cells([0.0, 0.0, 0.0], [48.8, 48.2, 49.1])
    found = verdict({
        "nf": nf,
        "bn_device": cells([1.12, 1.05, 1.2], [45.6, 44.9, 46.1]),
        "bn_shuffled": cells([0.07, 0.2, -0.1], [47.2, 49.5, 48.0]),
        "bn_global": cells([0.0, 0.0, 0.0], [48.9, 48.1, 49.3]),
    })  # fmt: skip
    assert {arm: f["leak"] for arm, f in found.items()} == {
        "nf": "does not leak", "bn_device": "leaks", "bn_shuffled": "undecided", "bn_global": "does not leak",
    }  # fmt: skip
    probes = [found[arm]["probe"].verdict for arm in contrastive.ARMS[1:]]
    assert probes == ["behind", "undecided", "equal"]
    assert found["nf"]["exchange"] == "needs no exchange"
    alone = verdict({arm: cells([0.0], [1.0]) for arm in contrastive.ARMS})  # one seed decides nothing
    assert alone["bn_device"]["probe"] is None
    broken = verdict({arm: cells([0.0] * 2, [1.0] * 2, diverged=arm == "nf") for arm in contrastive.ARMS})
    assert broken["bn_global"]["probe"] is None
