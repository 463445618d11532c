"""Load weights into a network from a file or a mapping, in our names, the released ones or timm's; all or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normfree.suggest import problem
from normfree.weights.haiku import read_haiku
from normfree.weights.names import to_our_names

MODEL_FILE = "model.safetensors"
# Suffixes of files that torch and others write as pickles; only `normfree convert` reads them, in a separate process.
PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".pkl")
# Largest safetensors header that is parsed, in bytes. 2,000 tensors take 250 kB; the library itself allows 100 MB.
MAX_HEADER = 8 << 20
# Names of the classifier's parameters begin with this.
_CLASSIFIER = "head."


def load_weights(net: nn.Module, source: str | Path | Mapping[str, Any], *, head: bool = True) -> None:
    """Load weights into a network. Every name and shape must match, otherwise nothing is loaded.

    The network keeps its own numerics: with timm's `dm_nfnet_f0` weights, `nfnet_f0` computes as the reference code
    does and `timm_dm_nfnet_f0` as timm does.

    Args:
        net: a network with the parameter names of this package, as `create_model` returns.
        source: a `.safetensors` file, a released `.npz` file, a model folder or run folder, a state dict, or a haiku
            tree `{module: {name: array}}`. Our names, the released ones and timm's are recognized. If the network has
            no classifier (`num_classes=0`), a classifier in the source is ignored.
        head: load the classifier too. False keeps the network's own, for other classes.

    Raises:
        ValueError: the source cannot be read, names are missing or unknown, shapes differ, or a value is not finite.

    Examples:
        >>> trained = normfree.create_model("nf_resnet_nano", num_classes=3)
        >>> net = normfree.create_model("nf_resnet_nano", num_classes=5)
        >>> normfree.load_weights(net, trained.state_dict(), head=False)
        >>> (net.stem.conv0.weight == trained.stem.conv0.weight).all().item()
        True
    """
    title = "the state dict" if isinstance(source, Mapping) else str(source)
    state = to_our_names(source if isinstance(source, Mapping) else read_weights(Path(source)))
    if not head:
        own = {k: v for k, v in net.state_dict().items() if k.startswith(_CLASSIFIER)}
        state = {k: v for k, v in state.items() if not k.startswith(_CLASSIFIER)} | own
    load_state_dict_(net, state, source=title)


def read_weights(path: Path) -> Mapping[str, Any]:
    """Read a weights file and return its tensors under their own names: a state dict, or a haiku tree for `.npz`.

    Args:
        path: a `.safetensors` or `.npz` file, a model folder or a run folder.

    Raises:
        ValueError: the file is broken or of another kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.is_dir():
        path = model_folder(path) / MODEL_FILE
    if not path.is_file():
        raise ValueError(problem(f"{str(path)!r} does not exist", fix="give a file or folder of weights"))
    if path.suffix == ".npz":
        return read_haiku(path)
    kinds = ".safetensors, .npz or a model folder"
    if path.suffix in PICKLED:
        raise ValueError(
            problem(
                f"{path} is a pickle, which may run code",
                allowed=kinds,
                fix=f"convert it first with normfree convert {path} FOLDER",
            )
        )
    if path.suffix != ".safetensors":
        raise ValueError(problem(f"{path} is of an unknown kind", allowed=kinds))
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
    """Return `path` if it is a model folder, or the model folder `path/model` of a run.

    Raises:
        ValueError: neither contains both `config.json` and `model.safetensors`.
    """
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file() and (folder / MODEL_FILE).is_file():
            return folder
    raise ValueError(
        problem(
            f"{str(path)!r} is not a model folder",
            allowed=f"a folder with config.json and {MODEL_FILE}, or a run folder whose model/ has both",
            fix="give the folder of a finished run, or one that save_pretrained wrote",
        )
    )


def load_state_dict_(net: nn.Module, state: Mapping[str, Tensor], *, source: str = "the state dict") -> None:
    """Load a state dict like `net.load_state_dict`, but all or nothing, and report every difference.

    A classifier in `state` is ignored if the network has none.

    Args:
        net: a network with the parameter names of this package.
        state: tensors by our names.
        source: what error messages call the state.

    Raises:
        ValueError: names are missing or unknown, shapes differ, or a value is not finite; nothing was changed.
    """
    own = net.state_dict()
    if not any(key.startswith(_CLASSIFIER) for key in own):
        state = {k: v for k, v in state.items() if not k.startswith(_CLASSIFIER)}
    problems = [f"{k} is missing" for k in own.keys() - state.keys()]
    problems += [f"{k} is unknown" for k in state.keys() - own.keys()]
    for key in own.keys() & state.keys():
        if own[key].shape != state[key].shape:
            problems.append(f"{key} has shape {tuple(state[key].shape)}, expected {tuple(own[key].shape)}")
        elif state[key].is_floating_point() and not torch.isfinite(state[key]).all():
            problems.append(f"{key} has values that are not finite")
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        listed = "; ".join(sorted(problems)[:8])
        raise ValueError(f"{source} does not fit {_title(net)}: {listed}{more}.")
    net.load_state_dict(dict(state))


def _title(net: nn.Module) -> str:
    """Return what error messages call a network: its name and number of classes if it has them, else its class."""
    name = getattr(net, "name", "") or type(net).__name__
    classes = getattr(net, "num_classes", None)
    return f"{name} with {classes} classes" if isinstance(classes, int) else str(name)
