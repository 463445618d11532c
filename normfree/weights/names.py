"""Maps between the names of our state dicts, of the released haiku trees, and of timm's state dicts.

The maps are bijections, so translating back and forth is exact. A haiku tree is `{module: {name: array}}` with
convolution weights H W I O and linear weights I O. Skip gains are 0-dim in haiku and timm, and have shape (1,) here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normfree.suggest import problem

HaikuTree = dict[str, dict[str, np.ndarray]]

# --- haiku <-> ours ----------------------------------------------------------------------------------

# Names in the released trees, by family: of the stem, of a block, and of the linear layers of squeeze-excite.
_STEM = {"NFNet": r"stem_conv\1", "NF_ResNet": "initial_conv", "NF_RegNet": "initial_conv"}
_BLOCK = {"NFNet": "nf_block", "NF_ResNet": "nf_res_block", "NF_RegNet": "nf_block"}
_SE_TO_HAIKU = {"attention.fc0": "squeeze_excite/~/linear", "attention.fc1": "squeeze_excite/~/linear_1"}
_SE_FROM_HAIKU = {v: k for k, v in _SE_TO_HAIKU.items()}


def state_dict_from_haiku(tree: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Convert a released parameter tree (NFNet, NF-ResNet or NF-RegNet) to our state dict, exactly.

    The stages follow from the tree itself: the first block of each stage is the one with a `conv_shortcut`.

    Raises:
        ValueError: names are not those of the released code (the message lists them), or two names stand for the same
            parameter.
    """
    families = {module.split("/")[0] for module in tree}
    if len(families) != 1 or not families <= set(_BLOCK):
        raise ValueError(
            problem(
                f"the haiku tree has modules of {sorted(families)}", allowed=f"one of {', '.join(_BLOCK)}"
            )
        )
    family = families.pop()
    modules = {module.split("/~/", 1)[1]: arrays for module, arrays in tree.items() if "/~/" in module}
    blocks = _block_names(modules, _BLOCK[family])
    state: dict[str, Tensor] = {}
    unknown: list[str] = [module for module in tree if "/~/" not in module]
    for module, arrays in modules.items():
        ours = _module_from_haiku(module, blocks)
        for name, array in arrays.items():
            key = _parameter_from_haiku(ours, name)
            if ours is None or key is None:
                unknown.append(f"{family}/~/{module}:{name}")
                continue
            _check_new(key, state)
            tensor = _to_tensor(np.asarray(array))
            state[key] = tensor.reshape(1) if name == "skip_gain" and tensor.ndim == 0 else tensor
    if unknown:
        raise ValueError(
            f"{len(unknown)} names in the haiku tree are not those of the released {family}: "
            f"{', '.join(sorted(unknown)[:10])}."
        )
    return state


def haiku_from_state_dict(state: Mapping[str, Tensor]) -> HaikuTree:
    """Convert our state dict to a tree with the released names; the inverse of `state_dict_from_haiku`.

    Raises:
        ValueError: names have no released counterpart, such as those of batch-norm twins; the message lists them.
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
    flat = {name: i for i, name in enumerate(block_names)}
    wrong = [
        f"stages.{s}.{b}"
        for s, b in block_names
        if (b == 0) != (f"stages.{s}.{b}.conv_shortcut.weight" in state)
    ]
    if wrong:  # the names in a tree do not have the stage
        allowed = "a shortcut with weights in the first block of each stage and in no other"
        raise ValueError(problem(f"the shortcut of {wrong[0]}", allowed=allowed))
    tree: HaikuTree = {}
    unknown: list[str] = []
    for key, tensor in state.items():
        module, name = _module_to_haiku(key, family, flat)
        if module is None:
            unknown.append(key)
            continue
        array = _to_array(tensor)
        tree.setdefault(f"{family}/~/{module}", {})[name] = (
            array.reshape(()) if name == "skip_gain" else array
        )
    if unknown:
        raise ValueError(
            f"{len(unknown)} names have no counterpart in the released {family}: {', '.join(unknown[:10])}."
        )
    return tree


def _block_names(modules: Mapping[str, Any], block: str) -> dict[str, str]:
    """Return our block names ("stages.1.0") by the flat released ones ("nf_block_3")."""
    indices = {int(m[1] or 0) for name in modules if (m := re.match(rf"{block}(?:_(\d+))?(?:/|$)", name))}
    names, stage, within = {}, -1, 0
    for index in sorted(indices):
        name = f"{block}_{index}" if index else block
        if f"{name}/~/conv_shortcut" in modules:
            stage, within = stage + 1, 0
        names[name] = f"stages.{stage}.{within}"
        within += 1
    return names


def _module_from_haiku(module: str, blocks: Mapping[str, str]) -> str | None:
    if m := re.fullmatch(r"stem_conv(\d)", module):
        return f"stem.conv{m[1]}"
    fixed = {"initial_conv": "stem.conv0", "final_conv": "final_conv", "linear": "head"}
    if module in fixed:
        return fixed[module]
    block, _, rest = module.partition("/~/")
    if block not in blocks:
        return None
    if rest in ("", "conv0", "conv1", "conv1b", "conv2", "conv_shortcut"):
        return f"{blocks[block]}.{rest}".rstrip(".")
    return f"{blocks[block]}.{_SE_FROM_HAIKU[rest]}" if rest in _SE_FROM_HAIKU else None


def _parameter_from_haiku(module: str | None, name: str) -> str | None:
    # Convolutions have w, gain and bias, linear layers w and b, blocks skip_gain.
    leaf = {"w": "weight", "b": "bias", "bias": "bias", "gain": "gain", "skip_gain": "skip_gain"}.get(name)
    return f"{module}.{leaf}" if module is not None and leaf is not None else None


def _module_to_haiku(key: str, family: str, flat: Mapping[tuple[int, ...], int]) -> tuple[str | None, str]:
    module, _, leaf = key.rpartition(".")
    linear = module == "head" or ".attention." in module
    names = {"weight": "w", "bias": "b" if linear else "bias", "gain": "gain", "skip_gain": "skip_gain"}
    if leaf not in names:
        return None, ""
    if m := re.fullmatch(r"stem\.conv(\d)", module):
        return m.expand(_STEM[family]), names[leaf]
    if module in ("final_conv", "head"):
        return {"final_conv": "final_conv", "head": "linear"}[module], names[leaf]
    m = re.fullmatch(
        r"stages\.(\d+)\.(\d+)(?:\.(conv0|conv1b?|conv2|conv_shortcut|attention\.fc[01]))?", module
    )
    if m is None:
        return None, ""
    index = flat[int(m[1]), int(m[2])]
    block = f"{_BLOCK[family]}_{index}" if index else _BLOCK[family]
    rest = _SE_TO_HAIKU.get(m[3], m[3])
    return (f"{block}/~/{rest}" if rest else block), names[leaf]


def _to_tensor(array: np.ndarray) -> Tensor:
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim)  # HWIO -> OIHW, IO -> OI
    # ascontiguousarray turns 0-d arrays into 1-d ones; reshape restores the shape.
    moved = array.transpose(axes) if axes else array
    return torch.from_numpy(np.ascontiguousarray(moved).reshape(moved.shape).copy())


def _to_array(tensor: Tensor) -> np.ndarray:
    array = tensor.detach().cpu().numpy()
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim)
    moved = array.transpose(axes) if axes else array
    return np.ascontiguousarray(moved).reshape(moved.shape).copy()


# --- timm <-> ours -----------------------------------------------------------------------------------

_TIMM_BLOCK = {"conv1": "conv0", "conv2": "conv1", "conv2b": "conv1b", "conv3": "conv2"}
_TIMM_BLOCK |= {"downsample.conv": "conv_shortcut"}
_TIMM_GATE = {"fc1": "fc0", "fc2": "fc1", "conv": "conv"}
_OURS_BLOCK = {v: k for k, v in _TIMM_BLOCK.items()}
_OURS_GATE = {v: k for k, v in _TIMM_GATE.items()}


def state_dict_from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict of timm's `NormFreeNet` (timm 1.0.31) to our names and shapes.

    timm stores gains as (O, 1, 1, 1) and the linear layers of squeeze-excite as 1x1 convolutions.

    Raises:
        ValueError: names are not timm's (the message lists them), or two names stand for the same parameter.
    """
    ours: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in state.items():
        module, _, leaf = key.rpartition(".")
        name = _module_from_timm(module) if leaf in ("weight", "bias", "gain", "skipinit_gain") else None
        if name is None:
            unknown.append(key)
            continue
        _check_new(f"{name}.{leaf}".replace("skipinit_gain", "skip_gain"), ours)
        if leaf == "skipinit_gain":
            ours[f"{name}.skip_gain"] = tensor.reshape(1) if tensor.ndim == 0 else tensor
        else:
            flat = leaf == "gain" or (".attention.fc" in name and leaf == "weight")
            ours[f"{name}.{leaf}"] = (
                tensor.reshape(tensor.shape[: 1 if leaf == "gain" else 2]) if flat else tensor
            )
    if unknown:
        raise ValueError(
            f"{len(unknown)} names are not those of timm's NormFreeNet: {', '.join(sorted(unknown)[:10])}."
        )
    return ours


def timm_from_state_dict(state: Mapping[str, Tensor], *, attention_at: str = "end") -> dict[str, Tensor]:
    """Convert our state dict to timm's names and shapes; the inverse of `state_dict_from_timm`.

    Args:
        state: tensors by our names.
        attention_at: that of the variant. timm calls the attention `attn_last` at the "end" of a branch and `attn` in
            its "middle".

    Raises:
        ValueError: names have no counterpart in timm, such as those of batch-norm twins; the message lists them.
    """
    deep = "stem.conv1.weight" in state
    theirs: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in state.items():
        module, _, leaf = key.rpartition(".")
        name = _module_to_timm(module, deep=deep, gate="attn" if attention_at == "middle" else "attn_last")
        if name is None or leaf not in ("weight", "bias", "gain", "skip_gain"):
            unknown.append(key)
        elif leaf == "skip_gain":
            theirs[f"{name}.skipinit_gain"] = tensor.reshape(())
        else:
            as_conv = leaf == "gain" or (".attention.fc" in key and leaf == "weight")
            shape = (*tensor.shape, *(1,) * (4 - tensor.ndim)) if as_conv else tensor.shape
            theirs[f"{name}.{leaf}"] = tensor.reshape(shape)
    if unknown:
        raise ValueError(f"{len(unknown)} names have no counterpart in timm: {', '.join(unknown[:10])}.")
    return theirs


def _check_new(key: str, state: Mapping[str, Any]) -> None:
    """Raise ValueError if two foreign names, such as `stem.conv` and `stem.conv1`, stand for our name `key`."""
    if key in state:
        raise ValueError(problem(f"two names stand for {key!r}", allowed="one name for each parameter"))


def _module_from_timm(module: str) -> str | None:
    if m := re.fullmatch(r"stem\.conv(\d?)", module):
        return f"stem.conv{int(m[1]) - 1 if m[1] else 0}"
    if module in ("final_conv", "head.fc"):
        return module.removesuffix(".fc")
    m = re.fullmatch(r"(stages\.\d+\.\d+)(?:\.(.+))?", module)
    if m is None or m[2] is None:
        return m and m[1]
    if m[2] in _TIMM_BLOCK:
        return f"{m[1]}.{_TIMM_BLOCK[m[2]]}"
    gate, _, part = m[2].partition(".")
    return (
        f"{m[1]}.attention.{_TIMM_GATE[part]}"
        if gate in ("attn", "attn_last") and part in _TIMM_GATE
        else None
    )


def _module_to_timm(module: str, *, deep: bool, gate: str) -> str | None:
    if m := re.fullmatch(r"stem\.conv(\d)", module):
        return f"stem.conv{int(m[1]) + 1}" if deep else "stem.conv"
    if module in ("final_conv", "head"):
        return {"final_conv": "final_conv", "head": "head.fc"}[module]
    m = re.fullmatch(r"(stages\.\d+\.\d+)(?:\.(.+))?", module)
    if m is None or m[2] is None:
        return m and m[1]
    if m[2] in _OURS_BLOCK:
        return f"{m[1]}.{_OURS_BLOCK[m[2]]}"
    part = m[2].removeprefix("attention.")
    return f"{m[1]}.{gate}.{_OURS_GATE[part]}" if part in _OURS_GATE else None


def shaped_as(saved: Tensor, like: Tensor) -> Tensor:
    """Return `saved` in the shape of `like` if one of them is 0-dim and the other has shape (1,); else `saved`.

    Skip gains were 0-dim in the files of earlier versions.
    """
    if {saved.shape, like.shape} == {torch.Size(()), torch.Size((1,))}:
        return saved.reshape(like.shape)
    return saved


# --- any naming --------------------------------------------------------------------------------------


def naming_of(state: Mapping[str, Any]) -> str:
    """Return "haiku", "timm" or "ours", judged by the names alone."""
    if state and all(isinstance(value, Mapping) for value in state.values()):
        return "haiku"
    timm = re.compile(
        r"head\.fc\.|stages\.\d+\.\d+\.(conv3|conv2b|downsample|attn|attn_last|skipinit_gain)\b|stem\.conv\."
    )
    return "timm" if any(timm.match(name) for name in state) else "ours"


def to_our_names(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Convert a state dict or haiku tree with our, the released or timm's names to our state dict.

    Raises:
        ValueError: names belong to none of the three namings; the message lists them.
    """
    naming = naming_of(state)
    if naming == "haiku":
        return state_dict_from_haiku(state)
    return state_dict_from_timm(state) if naming == "timm" else dict(state)
