"""The tiny preset of the experiments, whose cells run in the process of the test."""

from pathlib import Path

import pytest
import torch

from experiments.catalog import DATA, experiment
from experiments.cells import Setup, finish


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def setup(tmp_path_factory) -> Setup:
    return Setup(preset="tiny", data=DATA["tiny"], runs=tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def reported(setup, tmp_path_factory):
    """Return a function that runs a tiny experiment once and returns it, its results and its page, and its folder."""
    folder, known = tmp_path_factory.mktemp("results"), {}

    def run(name: str):
        if name not in known:
            one = experiment(name, "tiny")
            done = finish(one, setup, jobs=0)
            known[name] = one, done, one.report(done, setup, Path(folder))
        return (*known[name], Path(folder))

    return run
