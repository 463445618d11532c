"""Weights into networks: from a file or a mapping, in our names, the released ones or timm's; whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normfree.models.net import Net
from normfree.weights.haiku import read_haiku
from normfree.weights.names import to_our_names

MODEL_FILE = "model.safetensors"
#: Files that torch and others write as pickles; only `normfree convert` reads them, in a process of its own.
PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".pkl")
#: A safetensors header is parsed whole; 2,000 tensors take 250 kB, the library itself allows 100 MB.
MAX_HEADER = 8 << 20


def load_weights(net: Net, source: str | Path | Mapping[str, Any], *, head: bool = True) -> None:
    """Fills `net` with weights, strictly: every name and shape must agree, or nothing is loaded.

    Args:
        net: any network of ours. Its own numerics stay: timm's `dm_nfnet_f0` weights make `nfnet_f0` compute as
            the reference does, and `timm_dm_nfnet_f0` as timm does.
        source: a `.safetensors` file, a released `.npz` file, a model or run folder, or a state dict or haiku tree.
            Whose names they are is told from the names. With `num_classes=0` a classifier is passed over.
        head: load the classifier too; False leaves the network's own as it is, for other classes.

    Raises:
        ValueError: the source cannot be read, names are missing or unknown, shapes differ, or a value is not finite.
    """
    said = "the state dict" if isinstance(source, Mapping) else str(source)
    state = to_our_names(source if isinstance(source, Mapping) else read_weights(Path(source)))
    if not head:
        own = {k: v for k, v in net.state_dict().items() if k.startswith("head.")}
        state = {k: v for k, v in state.items() if not k.startswith("head.")} | own
    load_state_dict_(net, state, source=said)


def read_weights(path: Path) -> Mapping[str, Any]:
    """What a weights file holds, under the names it has there: a state dict, or a haiku tree for `.npz`.

    Raises:
        ValueError: the file is of no kind that is read here, or broken.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.is_dir():
        path = model_folder(path) / MODEL_FILE
    if not path.is_file():
        raise ValueError(f"{str(path)!r} does not exist. Give a file or folder of weights.")
    if path.suffix == ".npz":
        return read_haiku(path)
    if path.suffix in PICKLED:
        raise ValueError(
            f"{path} is a pickle, which may run code. Convert it first: normfree convert {path} FOLDER"
        )
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected .safetensors, .npz or a model folder.")
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > MAX_HEADER:
            raise ValueError(f"{path} is not a readable safetensors file: a header of {header:,} bytes.")
        state: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}.") from None
    return state


def model_folder(path: Path) -> Path:
    """`path` itself if it holds a model, or the `model/` folder of a run.

    Raises:
        ValueError: neither holds a `config.json` with a `model.safetensors`.
    """
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file() and (folder / MODEL_FILE).is_file():
            return folder
    raise ValueError(
        f"{str(path)!r} is no model folder: it needs config.json and model.safetensors, or a model/ "
        "folder with both, which a finished run has."
    )


def load_state_dict_(net: Net, state: Mapping[str, Tensor], *, source: str = "the state dict") -> None:
    """Like `net.load_state_dict`, but complete or not at all, and every difference is named.

    With `num_classes=0` the classifier in `state` is passed over.

    Raises:
        ValueError: names are missing or unknown, shapes differ, or a value is not finite.
    """
    own = net.state_dict()
    state = {k: v for k, v in state.items() if net.num_classes or not k.startswith("head.")}
    problems = [f"{k} is missing" for k in own.keys() - state.keys()]
    problems += [f"{k} is unknown" for k in state.keys() - own.keys()]
    for key in own.keys() & state.keys():
        if own[key].shape != state[key].shape:
            problems.append(f"{key} has shape {tuple(state[key].shape)}, expected {tuple(own[key].shape)}")
        elif state[key].is_floating_point() and not torch.isfinite(state[key]).all():
            problems.append(f"{key} has values that are not finite")
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(
            f"{source} does not fit {net.name} with {net.num_classes} classes: "
            f"{'; '.join(sorted(problems)[:8])}{more}."
        )
    net.load_state_dict(dict(state))
