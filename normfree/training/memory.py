"""How many images a micro-batch may have: what a pass needs, predicted without computing, against what is free.

The pass runs on fake tensors, which have shapes but no memory, under a ledger of what would be allocated. So the
prediction knows what autograd keeps, dropped masks and half precision, and is the same function of the network
everywhere. Not in it: workspaces of convolutions and what an allocator rounds up; hence the shares below.
"""

from __future__ import annotations

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

from normfree.native.dispatch import storage_id

#: Part of the free memory that is planned with. A GPU is a run's own, and the plan is tried there; on a CPU there is
#: no trying, and pictures, workers and other programs live in the same memory.
SHARES = {"cpu": 0.5}
SHARE = 0.9
#: Sizes between which a pass is taken to grow linearly; large, so that the peak lies where it does for larger ones.
_SIZES = (16, 32)


class Ledger(TorchDispatchMode):
    """Counts bytes of tensors that operations make and that are alive: `now`, and `peak`, the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """Their memory is not counted, also where an operation returns it."""
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


def pass_bytes(net: nn.Module, *, batch_size: int, image_size: int, half: bool = False) -> int:
    """Most bytes that one forward and backward pass of `batch_size` images has allocated at a time: activations,
    standardized weights, gradients. Weights and images are not in it. `half`: under autocast to bfloat16.

    `net` may lie anywhere, the meta device included, and is left alone.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        state = {n: torch.empty(p.shape, dtype=p.dtype).requires_grad_(p.requires_grad)
                 for n, p in net.named_parameters()}  # fmt: skip
        state |= {n: torch.empty(b.shape, dtype=b.dtype) for n, b in net.named_buffers()}
        images = torch.empty(batch_size, 3, image_size, image_size)
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


def line(net: nn.Module, *, image_size: int, half: bool = False) -> tuple[int, int]:
    """(fixed, each): a pass of n images needs about fixed + n * each bytes; see `pass_bytes`."""
    small, large = (pass_bytes(net, batch_size=n, image_size=image_size, half=half) for n in _SIZES)
    each = (large - small) // (_SIZES[1] - _SIZES[0])
    return max(0, small - _SIZES[0] * each), each


def largest(
    sizes: Sequence[int],
    *,
    needs: Callable[[int], int],
    limit: int,
    works: Callable[[int], bool] = lambda size: True,
) -> int:
    """The first of `sizes` (falling) whose predicted bytes `needs` stay within `limit`, and that `works`.

    Raises:
        ValueError: not even the last of them.
    """
    for size in sizes:
        if needs(size) <= limit and works(size):
            return size
    raise ValueError(
        f"input.micro_batch='auto': {sizes[-1]} at a time need about {needs(sizes[-1]) / 1e9:.2f} GB, and "
        f"{limit / 1e9:.2f} GB can be used here. Use a smaller --input.image_size, --parallel sharded, or a number to "
        "try anyway."
    )


def free_bytes(device: torch.device) -> int:
    """Bytes that this process may plan with on `device`: its share of what is free, part SHARE or SHARES of it."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
    else:
        free = free_memory() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return int(SHARES.get(device.type, SHARE) * free)


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that are free, or that this container may still take, whichever is less."""
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(1024 * int(words[1]) for words in map(str.split, lines) if words[0] == "MemAvailable:")
    except (OSError, StopIteration):  # not Linux: half of what there is
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        group = root / "sys/fs/cgroup"
        bound = int((group / "memory.max").read_text(encoding="ascii"))  # the word "max" where there is none
        free = min(free, bound - int((group / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):
        pass
    return max(0, free)
