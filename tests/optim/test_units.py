"""Tests of norms and scaling of units, by the compiled kernels and by PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from normfree.native.library import library
from normfree.optim.units import NativeUnits, UnitNorms, Units, tensor_norms

compiled = pytest.mark.skipif(
    library() is None, reason="no C compiler was there when the package was installed"
)


SINGLE = [False, True, True, False, False, False]


def some() -> tuple[list[Tensor], list[int]]:
    """Return tensors with units of 1 to 1601 numbers, more than one thread takes at a time, in two formats."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(200, 17), (1601,), (), (40, 5, 3, 3), (64, 16, 1, 1), (50, 31)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors[3] = tensors[3].to(memory_format=torch.channels_last)
    return tensors, [200, 1, 1, 40, 64, 50]


@pytest.mark.parametrize("kind", [pytest.param(NativeUnits, marks=compiled), Units])
def test_norms_and_factors_of_units(kind: type[Units]) -> None:
    tensors, sizes = some()
    units = kind(tensors, SINGLE)
    assert units.sizes == sizes
    rows = [row for t, n in zip(tensors, sizes, strict=True) for row in t.reshape(n, -1)]
    expected = torch.stack([row.double().norm() for row in rows])
    torch.testing.assert_close(units.norms().double(), expected, rtol=3e-7, atol=0.0)
    factors = torch.linspace(0.0, 1.5, len(rows))
    factors[7] = 1.0
    wanted = [row * factor for row, factor in zip(rows, factors, strict=True)]
    units.scale_(factors, factors != 1.0)
    scaled = [row for t, n in zip(tensors, sizes, strict=True) for row in t.reshape(n, -1)]
    assert all(map(torch.equal, scaled, wanted))


def test_a_unit_is_a_filter_or_a_tensor() -> None:
    tensors, sizes = some()
    assert UnitNorms().count(tensors) == sum(sizes)
    whole = UnitNorms("tensor")
    assert whole.count(tensors) == len(tensors)
    torch.testing.assert_close(
        whole.units(tensors).norms(), torch.stack(tensor_norms(tensors)), rtol=3e-7, atol=0.0
    )
    with pytest.raises(ValueError, match="unknown unit 'layer'"):
        UnitNorms("layer")


@compiled
def test_a_long_unit_is_as_exact_as_a_short_one() -> None:
    """Three million numbers of nearly one size; with its squares added up in float32, by 16 lanes, it is 4e-4 off."""
    row = 1.0 + torch.rand(1, 3_000_001) / 1000
    (norm,) = NativeUnits([row], [False]).norms().tolist()
    assert norm == pytest.approx(float(row.double().norm()), rel=2e-7)


@compiled
@pytest.mark.parametrize("threads", [2, 3])
def test_bits_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    one = NativeUnits(some()[0], SINGLE).norms()
    monkeypatch.setattr("normfree.native.library.SMALL", 0)
    torch.set_num_threads(threads)
    assert torch.equal(NativeUnits(some()[0], SINGLE).norms(), one)


@compiled
@pytest.mark.parametrize(
    "odd",
    [torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.bfloat16), torch.zeros(4, 6)[:, ::2],
     torch.zeros(3, 4).T, torch.zeros(3, device="meta")],
)  # fmt: skip
def test_other_tensors_are_left_to_torch(odd: Tensor) -> None:
    assert not NativeUnits.supports([torch.zeros(2, 3), odd])
