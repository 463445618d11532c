"""Borders of zeros equal those of PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from normfree.ops.padding import without_border, zero_border


@pytest.mark.parametrize("border", [(0, 0, 0, 0), (0, 1, 0, 1), (1, 1, 1, 1), (2, 3, 0, 1), (0, 0, 4, 0)])
@pytest.mark.parametrize("shape", [(2, 5, 4, 3), (1, 1, 1, 1), (0, 3, 3, 2)])
def test_a_border_of_zeros_equals_that_of_torch_and_can_be_removed(shape, border):
    x = torch.randn(shape)
    left, right, top, bottom = border
    padded = zero_border(x, border)
    assert torch.equal(padded, F.pad(x, (0, 0, left, right, top, bottom)))
    assert padded.is_contiguous()
    assert torch.equal(without_border(padded.permute(0, 3, 1, 2), border), x.permute(0, 3, 1, 2))
