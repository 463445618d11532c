import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed():
    torch.set_num_threads(1)  # small tensors, and the same sums in the same order on every machine
    torch.manual_seed(0)
