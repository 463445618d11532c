"""Timing that adds up: shares from counted multiplications, every arm run, errors before minutes are spent."""

import json

import pytest
import torch

from normfree.cli import main
from normfree.models.cost import count
from normfree.models.variants import variant_of
from normfree.tools import speed as speeds
from normfree.tools.speed import Speed, matmul_rate, measure


def test_shares_by_hand():
    macs = count(variant_of("nf_resnet_nano"), image_size=32).macs
    speed = Speed("nf_resnet_nano", 4, 32, "cpu", 2.0, 1.0, 0.5, flops=2.0 * 4 * macs, peak_bytes=0)
    assert speed.macs == macs
    assert speed.share(speed.predict_s) == pytest.approx(1.0)  # at that rate the products take one second
    assert speed.share(speed.folded_s) == pytest.approx(2.0)
    assert speed.share(speed.train_s, passes=3) == pytest.approx(1.5)


def test_every_arm_runs_once_more_than_it_counts(monkeypatch):
    runs = []
    original = speeds._timed
    monkeypatch.setattr(speeds, "_timed", lambda run, device: runs.append(run) or original(run, device))
    speed = measure("nf_resnet_nano", batch_size=2, image_size=16, device="cpu", rounds=2)
    assert len(runs) == 3 * 3 + 6  # three arms, three turns; six products
    assert min(speed.train_s, speed.predict_s, speed.folded_s, speed.flops) > 0
    assert (speed.batch_size, speed.image_size, speed.device) == (2, 16, "cpu")
    assert speed.peak_bytes > 2**20


def test_the_rate_is_that_of_the_fastest_product(monkeypatch):
    times = iter((3.0, 0.5, 2.0))
    monkeypatch.setattr(speeds, "_timed", lambda run, device: run() is None or next(times))
    side = speeds._PROBE
    assert matmul_rate(torch.device("cpu"), rounds=2) == 2 * side**3 / 0.5


def test_the_command(capsys):
    args = [
        "bench",
        "nf_resnet_nano",
        "--batch-size",
        "2",
        "--image-size",
        "16",
        "--rounds",
        "1",
        "--device",
        "cpu",
    ]
    assert main(args) == 0
    said = capsys.readouterr().out
    assert "nf_resnet_nano" in said
    assert "on cpu; the floor is the time of the multiplications alone" in said
    assert main([*args, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["name"], facts["batch_size"]) == ("nf_resnet_nano", 2)
    assert facts["folded_share"] > 0
    assert main(["bench", "nf_resnet_nano", "nfnet_f00"]) == 2
    assert capsys.readouterr().err.startswith("normfree: unknown model 'nfnet_f00'. Did you mean 'nfnet_f0'?")
    assert main([*args, "--rounds", "0"]) == 2
    assert capsys.readouterr().err == "normfree: rounds=0. Allowed: 1 or more.\n"
