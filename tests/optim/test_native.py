"""The kernels in C: how they are found, and that threads and registers do not show in the bits."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from normfree.optim import native
from normfree.optim.native import Units, library

compiled = pytest.mark.skipif(
    library() is None, reason="no C compiler was there when the package was installed"
)


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Looks for the library anew, now and after the test."""
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_where_a_compiler_is_the_kernels_are() -> None:
    assert library() is not None


@compiled
def test_a_library_of_another_version_is_an_error(monkeypatch: pytest.MonkeyPatch, forgotten: None) -> None:
    monkeypatch.setattr(native, "VERSION", 99)
    message = "was compiled from version 1 of native.c. This package needs version 99. Install it again"
    with pytest.raises(ImportError, match=re.escape(message)):
        library()


def test_without_a_library_there_is_none(monkeypatch: pytest.MonkeyPatch, forgotten: None) -> None:
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    assert library() is None
    assert not Units.takes([torch.zeros(3)])


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
@pytest.mark.parametrize("threads", [2, 3])
def test_bits_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    one = Units(*some()).norms()
    monkeypatch.setattr(native, "SMALL", 0)
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
