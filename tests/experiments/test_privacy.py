"""The smallest setting of the experiment on privacy, the law of its steps, and its verdict."""

import hashlib
import json
import math
from dataclasses import replace

import pytest
import torch

from experiments.claim_list import CLAIMS
from experiments.privacy import ARMS, SIZES, network, train
from normfree import open_source, per_example_gradients
from normfree.training.secret import SecretKey

TINY, CPU = SIZES["tiny"], torch.device("cpu")


@pytest.mark.parametrize("arm", ARMS)
def test_no_arm_has_batch_statistics_so_every_example_has_a_gradient(arm):
    net = network(TINY, arm, classes=3, seed=0).double()
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    every = per_example_gradients(net, images, torch.arange(3))
    alone = per_example_gradients(net, images[1:2], torch.tensor([1]))
    for name, gradients in every.items():
        torch.testing.assert_close(gradients[1:2], alone[name], rtol=1e-10, atol=1e-12)


def test_no_example_moves_the_weights_by_more_than_rate_times_bound_over_batch():
    """Without noise, the whole movement is at most rate · clip · (number of drawn examples) / (expected number)."""
    size = replace(TINY, average=0.0, clip=0.1)
    source = open_source("synthetic:classes=3,size=16,train=32,val=4").train
    net, noise = train(size, "nf", epsilon=math.inf, rate=0.5, seed=0, source=source, device=CPU)
    assert noise == 0.0
    pairs = zip(net.parameters(), network(size, "nf", classes=3, seed=0).parameters(), strict=True)
    moved = torch.stack([(a - b).detach().norm() for a, b in pairs]).norm()
    secret = SecretKey(hashlib.sha256(b"privacy 0").digest())
    drawn = sum(len(secret.members(32, 8 / 32, step=step)) for step in range(4))
    assert 0 < float(moved) <= 0.5 * 0.1 * drawn / 8 * (1 + 1e-4)


def test_the_smallest_setting_runs_and_writes_page_plot_and_json(reported):
    one, done, page, folder = reported("privacy")
    assert "| inf | 0 |" in page
    assert (folder / "privacy_tiny.png").stat().st_size > 1000
    found = json.loads((folder / "privacy_tiny.json").read_text())
    assert [cell["arm"] for cell in found["cells"]] == [*ARMS, *ARMS]
    assert all(0 <= cell["top1"] <= 100 for cell in found["cells"])
    assert len(done) == len(one.all_cells())
    claims = {claim.key for section in CLAIMS.values() for claim in section if claim.experiment == "privacy"}
    assert {finding["claim"] for finding in found["findings"]} == claims
