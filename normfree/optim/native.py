"""The kernels of `native.c` for float32 tensors on a CPU.

pip compiles them where it finds a C compiler with OpenMP. Elsewhere, and for other tensors, torch's own operations do
the same in more passes over memory. They read the table that `normfree.optim.kernels` describes.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

#: Numbers per tensor in the table.
COLUMNS = 8

#: `native_version` in native.c: changes with any signature there.
VERSION = 1

#: Elements below which one thread is faster than several.
SMALL = 2**16

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "unit_squares": [*[_POINTER] * 3, _LONG, _INT],
    "scale_units": [*[_POINTER] * 3, _LONG, _INT],
    "update": [*[_POINTER] * 5, _FLOAT, _INT, _LONG, _INT],
}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None: no compiler was found when the package was installed.

    Raises ImportError if they were compiled from another version of the package.
    """
    spec = importlib.util.find_spec("normfree.optim._native")
    if spec is None or spec.origin is None:
        return None
    found = ctypes.CDLL(spec.origin)
    version = ctypes.c_int.in_dll(found, "native_version").value
    if version != VERSION:
        raise ImportError(
            f"{spec.origin} was compiled from version {version} of native.c. This package needs version {VERSION}. "
            "Install it again, in a checkout by: pip install --editable ."
        )
    for name, types in _SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = types, None
    return found


def run(name: str, *arguments: Tensor | float, units: int, elements: int) -> None:
    """Calls kernel `name` with `arguments`, tensors as their addresses, for so many units of so many elements in all,
    by as many threads as torch uses."""
    threads = torch.get_num_threads() if elements >= SMALL else 1
    plain = (a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
    getattr(library(), name)(*plain, units, threads)


def owner_of(units: Sequence[int]) -> Tensor:
    """int32: which tensor each unit belongs to, if tensor i has units[i] of them."""
    index = torch.arange(len(units), dtype=torch.int32)
    return index.repeat_interleave(torch.tensor(units, dtype=torch.long))


class Units:
    """The units of some tensors, one after the other: their norms, and a factor for each.

    tensors: such that `takes` says yes.
    sizes: the number of units of each.
    """

    def __init__(self, tensors: Sequence[Tensor], sizes: Sequence[int]) -> None:
        rows, first, self._elements = [], 0, 0
        for tensor, size in zip(tensors, sizes, strict=True):
            rows.append([0, tensor.data_ptr(), 0, 0, tensor.numel() // size, first, 0, 0])
            first += size
            self._elements += tensor.numel()
        self._tensors = tensors  # whose addresses the table has
        self._table, self._owner = torch.tensor(rows, dtype=torch.int64), owner_of(sizes)

    @staticmethod
    def takes(tensors: Sequence[Tensor]) -> bool:
        """Whether the kernels are there and can work on all of these: plain float32 tensors on a CPU, with every unit
        in one run of memory."""
        return bool(tensors) and all(map(_has_runs, tensors)) and library() is not None

    def norms(self) -> Tensor:
        """L2 norm of every unit, float32."""
        squares = torch.empty(len(self._owner))
        self._run("unit_squares", squares)
        return squares.sqrt_()

    def scale_(self, factors: Tensor) -> None:
        """Multiplies each unit by its factor (float32), and does not touch those whose factor is 1."""
        self._run("scale_units", factors.contiguous())

    def _run(self, name: str, values: Tensor) -> None:
        run(name, self._table, self._owner, values, units=len(self._owner), elements=self._elements)


def _has_runs(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.is_cpu
        and tensor.dtype == torch.float32
        and (
            tensor.is_contiguous()
            or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
        )
    )
