"""Memory of a training pass, predicted without computing it, and the memory that is free.

The pass runs on fake tensors, which have shapes but no memory, while a ledger counts what would be allocated. So the
prediction includes what autograd saves, the masks of dropout and half precision, and depends on the network alone. It
does not include workspaces of convolutions or what the allocator rounds up; the fractions below leave space for these.
"""

from __future__ import annotations

import ctypes
import math
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from normfree.data.transforms.normalize import height_and_width
from normfree.native.dispatch import storage_id
from normfree.suggest import problem

# Fraction of the free memory to plan with, by device type. On a GPU, which a run has to itself, the plan is also tried.
# On a CPU it cannot be tried, and images, workers and other programs need memory too.
USABLE_FRACTIONS = {"cpu": 0.5}
USABLE_FRACTION = 0.9
# Batch sizes from which the memory of a pass is extrapolated linearly. They are large, so that the peak is at the same
# layer as for larger batches, and few convolutions are small (`ops.conv2d.is_small`), which save more for each image.
_SIZES = (64, 128)


class Ledger(TorchDispatchMode):
    """Count the bytes of live tensors that operations have allocated.

    Attributes:
        now: bytes alive now.
        peak: largest value of `now` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """Do not count the memory of these tensors, even if an operation returns it."""
        self._alive |= {storage_id(t.untyped_storage()) for t in tensors}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                address, size = storage_id(storage), storage.nbytes()
                if address not in self._alive:
                    self._alive.add(address)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, address, size)
        return result

    def _free(self, address: int, size: int) -> None:
        self._alive.discard(address)
        self.now -= size


def pass_bytes(
    net: nn.Module,
    *,
    batch_size: int,
    image_size: int | tuple[int, int],
    channels: int = 3,
    half: bool = False,
) -> int:
    """Return the peak memory in bytes of one forward and backward pass of `batch_size` images.

    It includes activations, standardized weights and gradients, but not weights and images. `net` may be on any device,
    the meta device included, and is not changed.

    Args:
        image_size: side of the images in pixels, or their height and width.
        channels: channels of the images.
        half: under autocast to bfloat16.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        state = {n: torch.empty(p.shape, dtype=p.dtype).requires_grad_(p.requires_grad)
                 for n, p in net.named_parameters()}  # fmt: skip
        state |= {n: torch.empty(b.shape, dtype=b.dtype) for n, b in net.named_buffers()}
        images = torch.empty(batch_size, channels, *height_and_width(image_size))
        images = images.to(memory_format=torch.channels_last)
        ledger = Ledger()
        ledger.ignore([*state.values(), images])
        training = net.training
        net.train()
        try:
            with ledger:
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    logits = torch.func.functional_call(net, state, (images,))
                logits = logits.float()
                F.cross_entropy(logits, torch.softmax(logits.detach(), dim=1), reduction="sum").backward()
        finally:
            net.train(training)
    return ledger.peak


def line(
    net: nn.Module, *, image_size: int | tuple[int, int], channels: int = 3, half: bool = False
) -> tuple[int, int]:
    """Return (fixed, each): a pass of n images needs about fixed + n * each bytes; see `pass_bytes`."""
    small, large = (
        pass_bytes(net, batch_size=n, image_size=image_size, channels=channels, half=half) for n in _SIZES
    )
    each = (large - small) // (_SIZES[1] - _SIZES[0])
    return max(0, small - _SIZES[0] * each), each


def largest(
    sizes: Sequence[int],
    *,
    needs: Callable[[int], int],
    limit: int,
    works: Callable[[int], bool] = lambda size: True,
) -> int:
    """Return the first of `sizes`, which fall, that is predicted to fit and passes a test.

    Args:
        needs: returns the predicted bytes of a size.
        limit: bytes that may be used.
        works: the test, called only for sizes that are predicted to fit.

    Raises:
        ValueError: not even the last size fits.
    """
    for size in sizes:
        if needs(size) <= limit and works(size):
            return size
    given = f"input.micro_batch is 'auto', but micro-batches of {sizes[-1]} need about {needs(sizes[-1]) / 1e9:.2f} GB"
    fix = "use a smaller --input.image_size, or --parallel sharded, or give a number to try anyway"
    raise ValueError(problem(given, allowed=f"{limit / 1e9:.2f} GB on this device", fix=fix))


def require_images_fit(count: int, shape: tuple[int, int, int], device: torch.device) -> None:
    """Check that the images of one step fit in main memory; the network needs more.

    Args:
        count: images that this process loads for a step.
        shape: channels, height and width.
        device: on a CPU, the images are also there as float32.

    Raises:
        ValueError: they do not fit.
    """
    each = math.prod(shape) * (5 if device.type == "cpu" else 1)
    free = free_memory()
    if count * each > free:
        given = f"{count:,} images of {' x '.join(map(str, shape))} in each step need {count * each / 1e9:,.1f} GB"
        fix = "use a smaller --input.batch_size" if each <= free else "use a smaller --input.image_size"
        raise ValueError(problem(given, allowed=f"{free / 1e9:.1f} GB, the memory that is free", fix=fix))


def free_bytes(device: torch.device) -> int:
    """Return the bytes that this process may plan with on `device`: a fraction of its share of the free memory."""
    return int(USABLE_FRACTIONS.get(device.type, USABLE_FRACTION) * free_on(device))


def free_on(device: torch.device) -> int:
    """Return this process's share of the bytes that are free on `device`."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    return free_memory() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _main_memory() -> int:
    """Return the bytes of main memory of a system that is not Linux."""
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kibibytes = ctypes.c_ulonglong()
    ctypes.windll.kernel32.GetPhysicallyInstalledSystemMemory(ctypes.byref(kibibytes))  # type: ignore[attr-defined]
    return 1024 * kibibytes.value


def free_memory(root: Path = Path("/")) -> int:
    """Return the bytes of main memory that are available, limited by what this container may still use."""
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(1024 * int(f[1]) for f in map(str.split, lines) if f[0] == "MemAvailable:")
    except (OSError, StopIteration):  # not Linux: assume that half is free
        free = _main_memory() // 2
    try:
        group = root / "sys/fs/cgroup"
        limit = int((group / "memory.max").read_text(encoding="ascii"))  # "max" if there is no limit
        free = min(free, limit - int((group / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):
        pass
    return max(0, free)
