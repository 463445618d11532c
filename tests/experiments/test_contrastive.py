"""The smallest setting of the experiment on the leak, and its verdict."""

import json
import os
import signal

import pytest
import torch

from experiments import contrastive
from experiments.cells import Setup
from experiments.claim_list import CLAIMS
from experiments.contrastive import SIZES, losses_on, network
from normfree import open_source
from normfree.training.stop import StoppedBySignal

TINY, CPU = SIZES["tiny"], torch.device("cpu")
SOURCE = open_source("synthetic:classes=3,size=16,train=24,val=4").train


def test_only_statistics_per_device_notice_that_views_were_moved():
    """The law behind the experiment: without batch statistics, and with those of the whole batch, nothing leaks."""
    source = SOURCE
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
    losses_on(nets["bn_device"], TINY, SOURCE, device=CPU)
    assert all(torch.equal(value, before[name]) for name, value in nets["bn_device"].state_dict().items())


def test_the_smallest_setting_runs_writes_a_page_and_continues(reported):
    one, done, page, folder = reported("contrastive")
    found = json.loads((folder / "contrastive_tiny.json").read_text())
    assert [f"| {arm} | 0.1 |" in page for arm in contrastive.ARMS] == [True] * 4
    assert abs(found["cells"]["nf"][0]["leak"]) < 1e-5
    assert "NF does not: **undecided**. leak in nats: nf 0.000" in page  # one seed decides nothing
    claims = {
        claim.key for section in CLAIMS.values() for claim in section if claim.experiment == "contrastive"
    }
    assert {finding["claim"] for finding in found["findings"]} == claims
    assert len(done) == len(one.all_cells())


def test_a_stopped_training_continues_with_the_same_bits(tmp_path, monkeypatch):
    setup, folders = Setup(preset="tiny", runs=tmp_path), [tmp_path / "whole", tmp_path / "stopped"]
    for folder in folders:
        folder.mkdir()

    def trained(folder):
        return contrastive.train(
            TINY, "bn_shuffled", rate=0.1, seed=0, source=SOURCE, folder=folder, setup=setup
        )

    whole, found = trained(folders[0])
    step = contrastive.SimCLR.step

    def stop_after_the_first(self, batch):
        step(self, batch)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(contrastive.SimCLR, "step", stop_after_the_first)
    with pytest.raises(StoppedBySignal):
        trained(folders[1])
    monkeypatch.setattr(contrastive.SimCLR, "step", step)
    again, facts = trained(folders[1])
    assert facts["train_loss"] == found["train_loss"]
    pairs = zip(whole.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
