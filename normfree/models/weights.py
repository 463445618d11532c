"""Weights in and out: name maps between the released haiku trees and our state dicts, and the model folder.

A haiku tree is `{module: {name: array}}` with kernels H W I O and linear weights I O. Maps are bijections, so
that translating there and back is exact.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normfree._version import __version__
from normfree.models.net import Net
from normfree.models.variants import VARIANTS

HaikuTree = dict[str, dict[str, np.ndarray]]

# --- haiku <-> ours ----------------------------------------------------------------------------------

#: Our module name (with `.` for levels) -> the released one, in order; `{b}` is a block's flat name.
_STEM = {"NFNet": r"stem_conv\1", "NF_ResNet": "initial_conv", "NF_RegNet": "initial_conv"}
_BLOCK = {"NFNet": "nf_block", "NF_ResNet": "nf_res_block", "NF_RegNet": "nf_block"}
_SE_TO_HAIKU = {"se.fc0": "squeeze_excite/~/linear", "se.fc1": "squeeze_excite/~/linear_1"}
_SE_FROM_HAIKU = {v: k for k, v in _SE_TO_HAIKU.items()}


def state_dict_from_haiku(tree: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """A released parameter tree (NFNet, NF-ResNet or NF-RegNet) as our state dict, exactly.

    Stages are found from the tree itself: a stage's first block is the one with a `conv_shortcut`.

    Raises:
        ValueError: a module or parameter name is not of the released kind; all such names are listed.
    """
    families = {module.split("/")[0] for module in tree}
    if len(families) != 1 or not families <= set(_BLOCK):
        raise ValueError(
            f"haiku tree with modules of {sorted(families)}: expected one of {', '.join(_BLOCK)}."
        )
    family = families.pop()
    modules = {module.split("/~/", 1)[1]: arrays for module, arrays in tree.items() if "/~/" in module}
    places = _places(modules, _BLOCK[family])
    state: dict[str, Tensor] = {}
    unknown: list[str] = [module for module in tree if "/~/" not in module]
    for module, arrays in modules.items():
        ours = _module_from_haiku(module, places)
        for name, array in arrays.items():
            key = _parameter_from_haiku(ours, name)
            if ours is None or key is None:
                unknown.append(f"{family}/~/{module}:{name}")
                continue
            state[key] = _to_tensor(np.asarray(array))
    if unknown:
        raise ValueError(
            f"{len(unknown)} names in the haiku tree are not of the released {family}: "
            f"{', '.join(sorted(unknown)[:10])}."
        )
    return state


def haiku_from_state_dict(state: Mapping[str, Tensor]) -> HaikuTree:
    """Our state dict as a tree in the released naming; the inverse of `state_dict_from_haiku`.

    Raises:
        ValueError: a name has no released counterpart (batch-norm twins have none); all such are listed.
    """
    family = (
        "NFNet"
        if "stem.conv1.weight" in state
        else "NF_RegNet"
        if "final_conv.weight" in state
        else "NF_ResNet"
    )
    block_names = sorted(
        {tuple(map(int, m.groups())) for k in state if (m := re.match(r"stages\.(\d+)\.(\d+)\.", k))}
    )
    flat = {place: i for i, place in enumerate(block_names)}
    tree: HaikuTree = {}
    unknown: list[str] = []
    for key, tensor in state.items():
        module, name = _module_to_haiku(key, family, flat)
        if module is None:
            unknown.append(key)
            continue
        tree.setdefault(f"{family}/~/{module}", {})[name] = _to_array(tensor)
    if unknown:
        raise ValueError(
            f"{len(unknown)} names have no counterpart in the released {family}: {', '.join(unknown[:10])}."
        )
    return tree


def _places(modules: Mapping[str, Any], block: str) -> dict[str, str]:
    """Flat block name ("nf_block_3") -> ours ("stages.1.0")."""
    indices = {int(m[1] or 0) for name in modules if (m := re.match(rf"{block}(?:_(\d+))?(?:/|$)", name))}
    places, stage, within = {}, -1, 0
    for index in sorted(indices):
        name = f"{block}_{index}" if index else block
        if f"{name}/~/conv_shortcut" in modules:
            stage, within = stage + 1, 0
        places[name] = f"stages.{stage}.{within}"
        within += 1
    return places


def _module_from_haiku(module: str, places: Mapping[str, str]) -> str | None:
    if m := re.fullmatch(r"stem_conv(\d)", module):
        return f"stem.conv{m[1]}"
    fixed = {"initial_conv": "stem.conv0", "final_conv": "final_conv", "linear": "head"}
    if module in fixed:
        return fixed[module]
    block, _, rest = module.partition("/~/")
    if block not in places:
        return None
    if rest in ("", "conv0", "conv1", "conv1b", "conv2", "conv_shortcut"):
        return f"{places[block]}.{rest}".rstrip(".")
    return f"{places[block]}.{_SE_FROM_HAIKU[rest]}" if rest in _SE_FROM_HAIKU else None


def _parameter_from_haiku(module: str | None, name: str) -> str | None:
    # convolutions say w, gain, bias; linears w, b; a block has skip_gain
    leaf = {"w": "weight", "b": "bias", "bias": "bias", "gain": "gain", "skip_gain": "skip_gain"}.get(name)
    return f"{module}.{leaf}" if module is not None and leaf is not None else None


def _module_to_haiku(key: str, family: str, flat: Mapping[tuple[int, ...], int]) -> tuple[str | None, str]:
    module, _, leaf = key.rpartition(".")
    linear = module == "head" or ".se." in module
    names = {"weight": "w", "bias": "b" if linear else "bias", "gain": "gain", "skip_gain": "skip_gain"}
    if leaf not in names:
        return None, ""
    if m := re.fullmatch(r"stem\.conv(\d)", module):
        return m.expand(_STEM[family]), names[leaf]
    if module in ("final_conv", "head"):
        return {"final_conv": "final_conv", "head": "linear"}[module], names[leaf]
    m = re.fullmatch(r"stages\.(\d+)\.(\d+)(?:\.(conv0|conv1b?|conv2|conv_shortcut|se\.fc[01]))?", module)
    if m is None:
        return None, ""
    index = flat[int(m[1]), int(m[2])]
    block = f"{_BLOCK[family]}_{index}" if index else _BLOCK[family]
    rest = _SE_TO_HAIKU.get(m[3], m[3])
    return (f"{block}/~/{rest}" if rest else block), names[leaf]


def _to_tensor(array: np.ndarray) -> Tensor:
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim)  # HWIO -> OIHW, IO -> OI
    # ascontiguousarray makes a 0-d array 1-d, so scalars (skip gains) keep their shape by reshape
    moved = array.transpose(axes) if axes else array
    return torch.from_numpy(np.ascontiguousarray(moved).reshape(moved.shape).copy())


def _to_array(tensor: Tensor) -> np.ndarray:
    array = tensor.detach().cpu().numpy()
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim)
    moved = array.transpose(axes) if axes else array
    return np.ascontiguousarray(moved).reshape(moved.shape).copy()


# --- the model folder --------------------------------------------------------------------------------


def model_args(net: Net) -> dict[str, Any]:
    """The fields in which a network differs from the row of its name."""
    row, own = asdict(VARIANTS[net.name]), asdict(net.variant)
    return {k: v for k, v in own.items() if v != row[k]}


def save_model_folder(
    folder: Path,
    net: Net,
    *,
    classes: tuple[str, ...] = (),
    preprocessing: Mapping[str, Any] | None = None,
    card: str = "",
) -> None:
    """Writes `config.json` (timm's keys), `model.safetensors` and, if given, the card `README.md`.

    `preprocessing` goes into `pretrained_cfg`: input_size, mean, std, interpolation, crop_mode.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": net.name,
        "num_classes": net.num_classes,
        "num_features": net.num_features,
        "global_pool": "avg",
        "label_names": list(classes),
        "model_args": {"in_channels": net.in_channels, **model_args(net)},
        "pretrained_cfg": {**(preprocessing or {}), "first_conv": "stem.conv0", "classifier": "head"},
        "library": f"normfree {__version__}",
    }
    tensors = {k: v.detach().contiguous().cpu() for k, v in net.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    if card:
        (folder / "README.md").write_text(card, encoding="utf-8")


def read_model_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a model folder, or of a run folder that holds one.

    Raises:
        ValueError: there is no such file, or it is not ours.
    """
    path = model_folder(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a model's config: {error}.") from None
    wanted = {"architecture", "num_classes", "model_args"}
    if not isinstance(config, dict) or not wanted <= config.keys():
        raise ValueError(f"{path}: expected the keys {', '.join(sorted(wanted))}.")
    return config


def model_folder(path: Path) -> Path:
    """`path` itself if it holds a model, or the `model/` folder of a run.

    Raises:
        ValueError: neither holds a `config.json` with a `model.safetensors`.
    """
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            return folder
    raise ValueError(
        f"{str(path)!r} is no model folder: it needs config.json and model.safetensors, or a model/ "
        "folder with both, which a finished run has."
    )


def load_model_folder_weights_(net: Net, path: Path) -> None:
    """Fills `net` with the weights of a model folder, strictly: every name and shape must agree.

    Raises:
        ValueError: names are missing or unknown, shapes differ, or a value is not finite; nothing is loaded.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = model_folder(path) / "model.safetensors"
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}.") from None
    load_state_dict_(net, state, source=str(file))


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
