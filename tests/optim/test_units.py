"""Norms and factors of units by the kernels in C."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from normfree.native.library import library
from normfree.optim.units import Units

compiled = pytest.mark.skipif(
    library() is None, reason="no C compiler was there when the package was installed"
)


def some() -> tuple[list[Tensor], list[int]]:
    """Units of 1 to 1601 numbers, more of them than a thread takes at a time, in two memory formats."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(200, 17), (1601,), (), (40, 5, 3, 3), (64, 16, 1, 1), (50, 31)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors[3] = tensors[3].to(memory_format=torch.channels_last)
    return tensors, [200, 1, 1, 40, 64, 50]


@compiled
def test_norms_and_factors_of_units() -> None:
    tensors, sizes = some()
    assert Units.takes(tensors)
    units = Units(tensors, sizes)
    rows = [row for t, n in zip(tensors, sizes, strict=True) for row in t.reshape(n, -1)]
    expected = torch.stack([row.double().norm() for row in rows])
    torch.testing.assert_close(units.norms().double(), expected, rtol=3e-7, atol=0.0)
    factors = torch.linspace(0.0, 1.5, len(rows))
    factors[7] = 1.0
    wanted = [row * factor for row, factor in zip(rows, factors, strict=True)]
    units.scale_(factors)
    scaled = [row for t, n in zip(tensors, sizes, strict=True) for row in t.reshape(n, -1)]
    assert all(map(torch.equal, scaled, wanted))


@compiled
def test_a_long_unit_is_as_exact_as_a_short_one() -> None:
    """Three million numbers of nearly one size; with its squares added up in float32, by 16 lanes, it is 4e-4 off."""
    row = 1.0 + torch.rand(1, 3_000_001) / 1000
    (norm,) = Units([row], [1]).norms().tolist()
    assert norm == pytest.approx(float(row.double().norm()), rel=2e-7)


@compiled
@pytest.mark.parametrize("threads", [2, 3])
def test_bits_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    one = Units(*some()).norms()
    monkeypatch.setattr("normfree.native.library.SMALL", 0)
    torch.set_num_threads(threads)
    assert torch.equal(Units(*some()).norms(), one)


@compiled
@pytest.mark.parametrize(
    "odd",
    [torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.bfloat16), torch.zeros(4, 6)[:, ::2],
     torch.zeros(3, 4).T, torch.zeros(3, device="meta")],
)  # fmt: skip
def test_other_tensors_are_left_to_torch(odd: Tensor) -> None:
    assert not Units.takes([torch.zeros(2, 3), odd])
