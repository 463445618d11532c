"""The compiled kernels: loops over float32 tensors on a CPU for which PyTorch has no single operation.

pip compiles them if it finds a C compiler. Without them, and for other dtypes, devices or under tracing, we
fall back to equivalent PyTorch ops, which make more passes over memory.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# `native_version` in update.c; increase both with any change of a signature below.
VERSION = 3

# Elements below which one thread is faster than several.
SMALL = 2**16

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    # update.c
    "unit_squares": [*[_POINTER] * 3, _LONG, _INT],
    "scale_units": [*[_POINTER] * 3, _LONG, _INT],
    "update": [*[_POINTER] * 5, _FLOAT, _INT, _LONG, _INT],
    # standardize.c
    "standardize_forward": [*[_POINTER] * 3, _FLOAT, _LONG, _INT],
    "standardize_backward": [*[_POINTER] * 3, _FLOAT, _LONG, _INT],
    # winograd.c
    "winograd_filters": [*[_POINTER] * 2, *[_LONG] * 3, _INT, _INT, _LONG, _INT],
    "winograd_convolve": [*[_POINTER] * 6, *[_LONG] * 8, _INT, _LONG, _INT],
    "winograd_weight_gradient": [*[_POINTER] * 5, *[_LONG] * 8, _INT, _LONG, _INT],
    # activations.c
    **{f"{name}_forward": [*[_POINTER] * 2, _LONG, _INT] for name in ("gelu", "silu")},
    **{f"{name}_backward": [*[_POINTER] * 3, _LONG, _INT] for name in ("gelu", "silu")},
}


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None if no compiler was found when the package was installed.

    Raises:
        ImportError: they were compiled from another version of the package.
    """
    spec = importlib.util.find_spec("normfree.native._compiled")
    if spec is None or spec.origin is None:
        return None
    if sys.platform == "darwin":  # parallel.h finds global functions only, and PyTorch loads these for itself
        for openmp in Path(torch.__file__).parent.glob("lib/libomp.*"):
            ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
    found = ctypes.CDLL(spec.origin)
    version = ctypes.c_int.in_dll(found, "native_version").value
    if version != VERSION:
        raise ImportError(
            f"{spec.origin} was compiled from version {version} of its source. Allowed: version {VERSION}. "
            "Fix: delete this file and install the package again, in a checkout with: pip install --editable ."
        )
    for name, types in _SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = types, None
    return found


def float32_memory(count: int) -> Tensor:
    """Return new memory for `count` numbers, whatever PyTorch's default type and device are."""
    return torch.empty(count, dtype=torch.float32, device="cpu")


def run(name: str, *arguments: Tensor | float, count: int, elements: int) -> None:
    """Call a kernel, with as many threads as PyTorch uses, or one if there is little work.

    Args:
        name: of the C function.
        *arguments: its arguments before the last two; tensors are passed as their addresses.
        count: items to process, its last argument but one.
        elements: in all items together.
    """
    threads = torch.get_num_threads() if elements >= SMALL else 1
    plain = (a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
    getattr(library(), name)(*plain, count, threads)
