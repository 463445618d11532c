"""The compiled kernels are found where a compiler was, and stay away where they are not wanted."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from normfree.native import library as library_file
from normfree.native.library import library
from normfree.native.memory import is_plain, laid_out_as, same_layout, unwatched

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
    monkeypatch.setattr(library_file, "VERSION", 99)
    message = "was compiled from version 1 of its source. This package needs version 99. Install it again"
    with pytest.raises(ImportError, match=re.escape(message)):
        library()


def test_without_a_library_there_is_none(monkeypatch: pytest.MonkeyPatch, forgotten: None) -> None:
    monkeypatch.setattr(library_file.importlib.util, "find_spec", lambda name: None)
    assert library() is None


@pytest.mark.parametrize(
    ("tensor", "plain"),
    [
        (torch.zeros(()), True), (torch.zeros(2, 3), True), (torch.nn.Parameter(torch.zeros(2)), True),
        (torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), True), (torch.zeros(3, 4).T, False),
        (torch.zeros(4, 6)[:, ::2], False), (torch.zeros(3, dtype=torch.float64), False),
        (torch.zeros(3, dtype=torch.bfloat16), False), (torch.zeros(3, device="meta"), False),
        (torch.nn.Buffer(torch.zeros(3)), True),
    ],
)  # fmt: skip
def test_kernels_take_float32_without_gaps(tensor: Tensor, plain: bool) -> None:
    assert is_plain(tensor) == plain


def test_who_watches_is_seen() -> None:
    assert unwatched()
    with FlopCounterMode(display=False):
        assert not unwatched()
    with forward_ad.dual_level():
        assert not unwatched()
    seen = []
    torch.func.vmap(lambda x: seen.append(unwatched()) or x)(torch.zeros(2))
    torch.jit.trace(lambda x: seen.append(unwatched()) or x + 1, torch.zeros(2), check_trace=False)
    assert seen == [False, False]
    assert unwatched()


def test_layouts_are_the_same_or_made_so() -> None:
    rows = torch.arange(24.0).view(2, 3, 2, 2)
    other = rows.to(memory_format=torch.channels_last)
    assert not same_layout(rows, other)
    assert same_layout(
        rows[:1, :1], other[:1, :1].as_strided((1, 1, 2, 2), (9, 7, 2, 1))
    )  # sizes of 1 do not count
    assert laid_out_as(rows, rows) is rows
    moved = laid_out_as(other, rows)
    assert same_layout(moved, other)
    assert torch.equal(moved, rows)
