"""PyTorch's own files (.pth, .pt, .bin), read where they can do no harm: `read_torch_file`.

Such a file is a pickle. torch's restricted reader (`weights_only`) had two holes through which files ran code
(CVE-2025-32434, CVE-2026-24747; both closed in every torch this package runs with), so it works in a child process
with limits on memory, time and files, and what comes back is safetensors. This file is also that child's program.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Keys under which training programs keep a state dict: most, timm's and others' averaged weights.
WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema")
#: Limits of the child beyond what an idle one takes: memory, and seconds at 50 MB/s.
MEMORY_SLACK, SECONDS, BYTES_PER_SECOND = 400 << 20, 60, 50_000_000
#: Bytes by which the tensors may exceed the file: they never do, unless views make much of little.
SLACK = 1 << 20
_REFUSED = 3  # the child's exit code when its one line of output says why


def read_torch_file(path: str | Path, *, key: str = "") -> dict[str, Any]:
    """The state dict in a file of torch's, on the CPU; a `module.` before every name is taken off.

    Args:
        path: a file that `torch.save` wrote: a state dict, or a mapping with one under `WRAPPERS`.
        key: which entry of the mapping holds it, when several might.

    Raises:
        ValueError: the file is broken, holds anything but dense tensors of numbers, has several state dicts, or reading
            it took more memory or time than an honest file of its size does.
    """
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{str(path)!r} does not exist. Give a file that torch.save wrote.")
    size = path.stat().st_size
    with tempfile.TemporaryDirectory(prefix="normfree-") as folder:
        out = Path(folder, "weights.safetensors")
        # -P: nothing is imported from this file's folder. The child needs torch and safetensors, none of our modules.
        words = [sys.executable, "-P", __file__, str(path.resolve()), str(out), key]
        try:
            done = subprocess.run(
                words, stdin=subprocess.DEVNULL, capture_output=True, timeout=2 * _seconds(size) + 60, check=False
            )  # fmt: skip
            code, line = done.returncode, done.stdout.decode(errors="replace").strip()
        except subprocess.TimeoutExpired:
            code, line = -1, ""
        if code == _REFUSED:
            raise ValueError(f"{path}: {line}")
        if code or not out.is_file():
            raise ValueError(
                f"{path}: reading it took more memory or time than {size:,} bytes of weights can need."
            )
        return dict(load_file(out))


def _seconds(size: int) -> int:
    return SECONDS + size // BYTES_PER_SECOND


# --- in the child ------------------------------------------------------------------------------------


def _limit(size: int) -> None:
    """Bounds this process for a file of `size` bytes. Where the system knows no such limits, there are none."""
    try:
        import resource

        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return
    # the tensors, and once more while they are written
    limits = {
        resource.RLIMIT_AS: mapped + 2 * size + MEMORY_SLACK,
        resource.RLIMIT_CPU: _seconds(size),
        resource.RLIMIT_FSIZE: size + 2 * SLACK,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def state_dict_in(content: object, *, key: str = "") -> Mapping[str, Any]:
    """The state dict in what torch.load returned: itself, or its one entry that is one.

    Raises:
        ValueError: there is none, or several and no `key`.
    """
    from torch import Tensor

    if not isinstance(content, Mapping):
        raise ValueError(
            f"it holds a {type(content).__name__}. Allowed: a state dict. Fix: torch.save(net.state_dict())"
        )
    if key:
        if not isinstance(content.get(key), Mapping):
            known = [k for k, v in content.items() if isinstance(k, str) and isinstance(v, Mapping)]
            raise ValueError(f"there is no state dict under {key!r}. Allowed: {_words(known) or 'none'}.")
        return content[key]
    if content and all(isinstance(v, Tensor) for v in content.values()):
        return content
    found = [k for k in WRAPPERS if isinstance(content.get(k), Mapping)]
    if len(found) > 1:
        raise ValueError(f"it has several state dicts: {', '.join(found)}. Choose one: --key {found[-1]}")
    if not found:
        raise ValueError(
            f"it has {_words(content) or 'nothing'}. Allowed: tensors, or one of {', '.join(WRAPPERS)}."
        )
    return content[found[0]]


def plain_tensors(state: Mapping[str, Any], *, size: int) -> dict[str, Any]:
    """The tensors of a state dict, each in memory of its own, without a `module.` that all names begin with.

    Raises:
        ValueError: an entry is no dense tensor of numbers, or all together exceed `size` bytes.
    """
    import torch

    numbers = (
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int8, torch.int16, torch.int32,
        torch.int64,
    )  # fmt: skip
    names = [k for k in state if isinstance(k, str)]
    wrong = [
        k
        for k, v in state.items()
        if not isinstance(k, str)
        or type(v) not in (torch.Tensor, torch.nn.Parameter)
        or v.layout != torch.strided
        or v.device.type != "cpu"
        or v.dtype not in numbers
    ]
    if wrong or not names:
        raise ValueError(
            f"{len(wrong)} entries are no dense tensors of numbers: {_words(wrong) or 'it is empty'}."
        )
    if sum(v.numel() * v.element_size() for v in state.values()) > size + SLACK:
        raise ValueError(f"its tensors stand for more than the {size:,} bytes of the file.")
    prefix = "module." if all(k.startswith("module.") for k in names) else ""  # DataParallel's
    own: dict[str, Any] = {}
    seen: set[int] = set()
    for name, value in state.items():
        tensor = value.detach()
        storage = tensor.untyped_storage()
        # views and tied weights are copied apart, all others stay where they are
        if storage.nbytes() != tensor.numel() * tensor.element_size() or storage.data_ptr() in seen:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensor.untyped_storage().data_ptr())
        own[name.removeprefix(prefix)] = tensor.contiguous()
    return own


def _words(keys: Any) -> str:
    return ", ".join(str(k)[:60] if isinstance(k, str | int) else type(k).__name__ for k in list(keys)[:8])


def _child(path: Path, out: Path, key: str) -> None:
    import warnings

    import torch
    from safetensors.torch import save_file

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # more would count as memory
    size = path.stat().st_size
    _limit(size)
    content = torch.load(path, map_location="cpu", weights_only=True)
    save_file(plain_tensors(state_dict_in(content, key=key), size=size), out)


def _main(words: list[str]) -> int:
    try:
        _child(Path(words[0]), Path(words[1]), words[2])
    except MemoryError:
        return 1
    except BaseException as error:  # whatever the file made torch say becomes one line
        text = " ".join(str(error).split())
        if isinstance(error, RuntimeError) and ("allocate" in text or "bad_alloc" in text):
            return 1
        if not isinstance(error, ValueError):
            # torch's own words go on to recommend reading it without protection
            asked = re.search(r"GLOBAL (\S+)", text)
            what = f"it asks for {asked[1]}" if asked else "it is broken, or no file of torch.save"
            text = (
                f"{what}. Allowed: tensors in mappings. Fix: torch.save(net.state_dict()) where it was made."
            )
        printable = "".join(c if c.isprintable() else "?" for c in text)
        print(printable if len(printable) < 400 else f"{printable[:400]} ...", flush=True)
        return _REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
