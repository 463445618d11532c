"""Read PyTorch's files (.pth, .pt, .bin) in a child process, where a malicious file can do no harm.

Such a file is a pickle. PyTorch's restricted reader (`weights_only`) had two vulnerabilities through which files ran
code (CVE-2025-32434, CVE-2026-24747; both fixed in every torch that this package supports). It therefore runs in a
child process with limits on memory, time and file size, which returns safetensors. This file is also the program of the
child, so it imports torch and safetensors only in functions, and no other module of this package.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# Keys under which training programs store a state dict; `state_dict_ema` has the averaged weights in timm and others.
WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema")
# Prefixes of all names in a state dict: of DataParallel, of torch.compile, and of modules that hold the network.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.")
# Limits of the child beyond an idle one: memory in bytes, and processor time, 2 s plus 1 s for each 50 MB.
MEMORY_SLACK, SECONDS, BYTES_PER_SECOND = 400 << 20, 2, 50_000_000
# Bytes by which the tensors may exceed the file. Only expanded views would exceed it.
SLACK = 1 << 20
# Limits of the file: its bytes (the largest published network takes 1.8 GB, and a checkpoint with averages and momentum
# four times that), the bytes of the pickle that describes its tensors (250 for each), and their number.
MAX_BYTES, MAX_PICKLE, MAX_TENSORS = 16 << 30, 8 << 20, 20_000
# Exit code of the child if its one line of output has the reason why it refused the file.
_REFUSED = 3


def read_torch_file(path: str | Path, *, key: str = "") -> dict[str, Any]:
    """Read the state dict in a PyTorch file. Prefixes that all names share (`PREFIXES`) are removed.

    Args:
        path: a file that `torch.save` wrote: a state dict, or a mapping with a state dict under one of `WRAPPERS`.
        key: the entry of the mapping that has the state dict; needed if several could.

    Returns:
        The tensors by name, on the CPU.

    Raises:
        ValueError: the file is broken, contains anything except dense tensors of numbers, has several state dicts, or
            reading it took more memory or time than a valid file of its size needs.
    """
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{str(path)!r} does not exist. Fix: give a file that torch.save wrote.")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes. Allowed: at most {MAX_BYTES:,}.")
    with tempfile.TemporaryDirectory(prefix="normfree-") as folder:
        out = Path(folder, "weights.safetensors")
        # -P: nothing is imported from the folder of this file.
        command = [sys.executable, "-P", __file__, str(path.resolve()), str(out), key]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=2 * _seconds(size) + 60, check=False
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
    """Limit this process for a file of `size` bytes. Systems without such limits (Windows) have none."""
    try:
        import resource

        mapped = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return
    # Twice the file: the tensors, and a copy while they are written.
    limits = {
        resource.RLIMIT_AS: mapped + 2 * size + MEMORY_SLACK,
        resource.RLIMIT_CPU: math.ceil(time.process_time()) + _seconds(size),
        resource.RLIMIT_FSIZE: size + 2 * SLACK,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def state_dict_in(content: object, *, key: str = "") -> Mapping[str, Any]:
    """Return the state dict in the result of `torch.load`: the result itself, or its one entry that is a state dict.

    Raises:
        ValueError: there is none, or there are several and no `key` is given.
    """
    from torch import Tensor

    if not isinstance(content, Mapping):
        raise ValueError(
            f"it has a {type(content).__name__}. Allowed: a state dict. Fix: torch.save(net.state_dict(), path)."
        )
    if key:
        if not isinstance(content.get(key), Mapping):
            known = [k for k, v in content.items() if isinstance(k, str) and isinstance(v, Mapping)]
            raise ValueError(f"there is no state dict under {key!r}. Allowed: {_names(known) or 'none'}.")
        return content[key]
    if content and all(isinstance(v, Tensor) for v in content.values()):
        return content
    found = [k for k in WRAPPERS if isinstance(content.get(k), Mapping)]
    if len(found) > 1:
        raise ValueError(
            f"it has several state dicts: {', '.join(found)}. Fix: choose one, for example --key {found[-1]}."
        )
    if not found:
        raise ValueError(
            f"it has {_names(content) or 'nothing'}. Allowed: tensors, or one of {', '.join(WRAPPERS)}."
        )
    return content[found[0]]


def plain_tensors(state: Mapping[str, Any], *, size: int) -> dict[str, Any]:
    """Return the tensors of a state dict, each with its own memory, without the common prefixes of the names.

    Args:
        state: tensors by name.
        size: bytes of the file.

    Raises:
        ValueError: an entry is not a dense tensor of numbers, or the tensors exceed `size` by more than `SLACK` bytes.
    """
    import torch

    numbers = (
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int8, torch.int16, torch.int32,
        torch.int64,
    )  # fmt: skip
    if len(state) > MAX_TENSORS:
        raise ValueError(f"it has {len(state):,} entries. Allowed: at most {MAX_TENSORS:,}.")
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
            f"{len(wrong)} entries are not dense tensors of numbers: {_names(wrong) or 'it is empty'}."
        )
    if sum(v.numel() * v.element_size() for v in state.values()) > size + SLACK:
        raise ValueError(f"its tensors are larger than the {size:,} bytes of the file.")
    prefix = _common_prefix(names)
    own: dict[str, Any] = {}
    seen: set[int] = set()
    for name, value in state.items():
        tensor = value.detach()
        storage = tensor.untyped_storage()
        # Views and tied weights are copied; the memory of all others is kept.
        if storage.nbytes() != tensor.numel() * tensor.element_size() or storage.data_ptr() in seen:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensor.untyped_storage().data_ptr())
        own[name.removeprefix(prefix)] = tensor.contiguous()
    return own


def check_archive(path: Path) -> None:
    """Check the directory of a file that is a zip, as `torch.save` writes it; do nothing for the older format.

    Raises:
        ValueError: a member is compressed, so that it may be far larger than the file; or the pickle is too large.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            shown = ascii(member.filename[-60:])
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(
                    f"its member {shown} is compressed. Allowed: members as torch.save writes them."
                )
            if member.filename.endswith(".pkl") and member.file_size > MAX_PICKLE:
                raise ValueError(
                    f"its pickle has {member.file_size:,} bytes. Allowed: at most {MAX_PICKLE:,}."
                )


def _common_prefix(names: list[str]) -> str:
    """Return the prefix of all names that wrappers have added: DataParallel, torch.compile and Lightning.

    >>> _common_prefix(["module._orig_mod.stem.weight", "module._orig_mod.head.bias"])
    'module._orig_mod.'
    """
    prefix = ""
    while found := next((p for p in PREFIXES if all(n.startswith(prefix + p) for n in names)), ""):
        prefix += found
    return prefix


def _names(keys: Iterable[object]) -> str:
    """Return the first 8 keys, at most 60 characters of each, or the type of a key that is not a string or integer."""
    return ", ".join(str(k)[:60] if isinstance(k, str | int) else type(k).__name__ for k in list(keys)[:8])


def _child(path: Path, out: Path, key: str) -> None:
    """Read `path` within limits and write its state dict to `out` as safetensors."""
    import argparse
    import warnings

    import torch
    from safetensors.torch import save_file

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # the stacks of more threads would count as memory
    size = path.stat().st_size
    _limit(size)
    check_archive(path)
    # timm's and other programs' checkpoints hold their options in a Namespace, a plain object of fields.
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, map_location="cpu", weights_only=True)
    save_file(plain_tensors(state_dict_in(content, key=key), size=size), out)


def _main(args: list[str]) -> int:
    """Run `_child`. Print the reason and return `_REFUSED` if it refused the file, return 1 if memory ran out."""
    try:
        _child(Path(args[0]), Path(args[1]), args[2])
    except MemoryError:
        return 1
    except BaseException as error:  # any error that the file causes in torch becomes one line
        text = " ".join(str(error).split())
        if isinstance(error, RuntimeError) and ("allocate" in text or "bad_alloc" in text):
            return 1
        if not isinstance(error, ValueError):
            # The message of torch goes on to recommend reading the file without protection.
            asked = re.search(r"GLOBAL (\S+)", text)
            what = f"it asks for {asked[1]}" if asked else "it is broken, or not a file of torch.save"
            fix = "save only weights, with torch.save(net.state_dict(), path)"
            text = f"{what}. Allowed: tensors in mappings. Fix: {fix}."
        printable = "".join(c if c.isprintable() else "?" for c in text)
        print(printable if len(printable) < 400 else f"{printable[:400]} ...", flush=True)
        return _REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
