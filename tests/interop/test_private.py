"""Private runs with the accountants of Opacus: the noise is enough, and little more than enough."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

import normfree
from experiments.catalog import DATA, experiment
from experiments.cells import Setup, finish
from experiments.claim_list import TEXTS
from normfree.training.accounting import ACCOUNTANTS, epsilon_of, noise_for
from normfree.training.config_io import with_overrides
from normfree.training.recipes import RECIPES

RUN = {"delta": 1e-5, "sample_rate": 0.01, "steps": 500}


@pytest.fixture(autouse=True)
def _needs_opacus():
    pytest.importorskip("opacus")


@pytest.mark.works("Opacus", "accountants in normfree train private")
@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_the_noise_spends_at_most_the_target_and_nearly_all_of_it(accountant):
    noise = noise_for(3.0, **RUN, accountant=accountant)
    spent = epsilon_of(noise, **RUN, accountant=accountant)
    assert 2.9 < spent <= 3.0
    assert epsilon_of(0.9 * noise, **RUN, accountant=accountant) > 3.0
    half = {**RUN, "steps": 250}
    assert 0 < epsilon_of(noise, **half, accountant=accountant) < spent


def test_prv_is_tighter_than_rdp_and_there_are_limits():
    assert noise_for(3.0, **RUN, accountant="prv") < noise_for(3.0, **RUN, accountant="rdp")
    assert noise_for(math.inf, **RUN, accountant="rdp") == 0.0
    assert epsilon_of(0.0, **RUN, accountant="rdp") == math.inf
    assert epsilon_of(1.0, **{**RUN, "steps": 0}, accountant="rdp") == 0.0


def test_a_run_spends_its_epsilon(tmp_path):
    data = "synthetic:classes=3,size=16,train=48,val=12"
    flags = ["--data", data, "--input.image_size", "16", "--input.batch_size", "32", "--input.workers", "0",
             "--length", "3st", "--device", "cpu", "--optim.clip", "private:epsilon=8,accountant=prv"]  # fmt: skip
    result = normfree.train(
        with_overrides(RECIPES["private"](), flags), tmp_path / "run", console=Console(quiet=True)
    )
    assert 7.8 < result.privacy["epsilon_prv"] <= 8.0 < result.privacy["epsilon_rdp"]


def test_the_smallest_setting_of_the_experiment_adds_noise_at_a_finite_epsilon(tmp_path):
    setup, one = Setup(preset="tiny", data=DATA["tiny"], runs=tmp_path), experiment("privacy", "tiny")
    one.size = replace(one.size, epsilons=("8", "inf"))
    page = one.report(finish(one, setup, jobs=0), setup, tmp_path)
    found = json.loads((tmp_path / "privacy_tiny.json").read_text(encoding="utf-8"))
    noise = {cell["point"]: cell["noise"] for cell in found["cells"]}
    size = one.size
    spent = epsilon_of(noise["8"], delta=size.delta, sample_rate=size.batch / size.train,
                       steps=round(size.epochs * size.train / size.batch), accountant="rdp")  # fmt: skip
    assert 7.8 < spent <= 8.0
    assert noise["inf"] == 0.0
    assert f"- {TEXTS['privacy', 'dp']}: **" in page
    assert "mean over epsilon 8: " in page
