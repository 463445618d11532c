"""A trained network as a unit that travels: weights, preprocessing, class names. Its form on disk is a Hugging Face
model folder: `config.json` with timm's keys, `model.safetensors`, a card `README.md`.

A network of a `timm_` row is written under timm's names, so that timm opens the folder; all others under ours.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from normfree._version import __version__
from normfree.models.net import Net
from normfree.models.variants import VARIANTS
from normfree.models.zoo import create_model
from normfree.onnx_net import OnnxNet, open_onnx
from normfree.preprocessing import Preprocessing
from normfree.weights.hub import PREFIX, fetch, upload
from normfree.weights.load import MODEL_FILE, load_weights, model_folder
from normfree.weights.names import timm_from_state_dict

#: Fields of a row that change training only, never what a trained network computes.
TRAINING_FIELDS = frozenset(
    (
        "classifier_std",
        "drop_rate",
        "stochdepth_rate",
        "stochdepth",
        "skip_gain",
        "train_size",
        "test_size",
        "randaugment",
    )
)


@dataclass(frozen=True)
class TrainedModel:
    """A network with what it needs to look at pictures and to name what it sees. `net` is an `OnnxNet` if it was read
    from an ONNX file: it predicts, and cannot be trained or changed."""

    net: Net | OnnxNet
    preprocessing: Preprocessing
    classes: tuple[str, ...]


# --- out ---------------------------------------------------------------------------------------------


def save_pretrained(model: TrainedModel, folder: str | Path, *, card: str = "") -> Path:
    """Writes the model folder: `config.json`, `model.safetensors` and, if given, the card. Returns the folder.

    Raises:
        ValueError: there is not one class name for each output, or the network is folded or from an ONNX file.
    """
    from safetensors.torch import save_file

    net = model.net
    folder = Path(folder)
    if not isinstance(net, Net):
        raise ValueError(
            f"{net.name} was read from an ONNX file, which holds no weights that could be trained. "
            "Save the run or model folder that it was exported from."
        )
    if net.folded:
        raise ValueError(
            "a folded network is no longer its row; save the network that was folded, or export it."
        )
    if len(model.classes) != net.num_classes:
        raise ValueError(
            f"{len(model.classes)} class names for {net.num_classes} outputs; give one for each."
        )
    folder.mkdir(parents=True, exist_ok=True)
    state, for_timm = net.state_dict(), _timm_knows(net)
    if for_timm:
        state = timm_from_state_dict(state, attention_at=net.variant.attention_at)
    tensors = {k: v.detach().contiguous().cpu() for k, v in state.items()}
    save_file(tensors, folder / MODEL_FILE, metadata={"format": "pt"})
    text = json.dumps(_config(net, model, for_timm), indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    shutil.copymode(
        folder / "config.json", folder / MODEL_FILE
    )  # safetensors lets nobody else read what it writes
    if card:
        (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def push_to_hub(folder: str | Path, repository: str, *, private: bool = False) -> str:
    """Uploads a model folder (or a run's) to `OWNER/NAME` on the Hugging Face hub; returns its address.

    Raises:
        ValueError: the folder is no model folder, or the hub refused.
    """
    return upload(model_folder(Path(folder)), repository, private=private)


def model_args(net: Net) -> dict[str, Any]:
    """The fields in which a network differs from the row of its name."""
    row, own = asdict(VARIANTS[net.name]), asdict(net.variant)
    return {k: v for k, v in own.items() if v != row[k]}


def _timm_knows(net: Net) -> bool:
    return net.name.startswith("timm_") and model_args(net).keys() <= TRAINING_FIELDS


def _config(net: Net, model: TrainedModel, for_timm: bool) -> dict[str, Any]:
    pre = model.preprocessing
    first = "stem.conv0"
    if for_timm:
        first = "stem.conv1" if net.variant.stem == "deep" or net.variant.stem == "deep_128" else "stem.conv"
    return {
        "architecture": net.name.removeprefix("timm_") if for_timm else net.name,
        "num_classes": net.num_classes,
        "num_features": net.num_features,
        "global_pool": "avg",
        "label_names": list(model.classes),
        # timm hands these to its constructor
        **({"model_args": {"in_chans": net.in_channels}} if for_timm and net.in_channels != 3 else {}),
        "pretrained_cfg": {
            **pre.to_config(), "num_classes": net.num_classes,
            "first_conv": first, "classifier": "head.fc" if for_timm else "head",
        },
        "normfree": {
            "version": __version__, "row": net.name, "in_channels": net.in_channels,
            "model_args": model_args(net), "preprocessing": asdict(pre),
        },
    }  # fmt: skip


# --- in ----------------------------------------------------------------------------------------------


def from_pretrained(
    source: str | Path, *, numerics: Literal["reference", "timm"] = "reference"
) -> TrainedModel:
    """The network of a model folder of ours or timm's, of a run folder, of `hf-hub:OWNER/NAME`, or of an ONNX file
    that `normfree export` wrote, in evaluation mode.

    Only safetensors are read, and every name and shape must agree. `numerics` says how timm's `dm_nfnet_f*`, which
    hold DeepMind's weights, compute: as DeepMind's code did, or as timm does (docs/weights.md says how far apart
    these are). Other folders have one meaning.

    Raises:
        ValueError: there is no such folder, or its parts contradict each other.
    """
    if str(source).endswith(".onnx") and not Path(source).is_dir():
        return _from_onnx(Path(source))
    folder = fetch(str(source)) if str(source).startswith(PREFIX) else model_folder(Path(source))
    about = describe(folder, numerics=numerics)
    try:
        net = create_model(about.row, num_classes=len(about.classes), **about.arguments)
        if not isinstance(net, Net):
            raise TypeError("'features_only' in model_args")
    except TypeError as error:
        raise ValueError(f"{folder}: config.json does not describe a network: {error}.") from None
    load_weights(net, folder)
    return TrainedModel(net.eval(), about.preprocessing, about.classes)


@dataclass(frozen=True)
class Description:
    """What a model folder's config.json says: the row, what `create_model` is given besides, what travels with it."""

    row: str
    arguments: dict[str, Any]
    preprocessing: Preprocessing
    classes: tuple[str, ...]


def describe(folder: str | Path, *, numerics: Literal["reference", "timm"] = "reference") -> Description:
    """Reads config.json of a model folder of ours or timm's, of a run folder, or from the hub; see `from_pretrained`.

    Raises:
        ValueError: there is none, or it contradicts itself.
    """
    folder = fetch(str(folder)) if str(folder).startswith(PREFIX) else model_folder(Path(folder))
    config = read_config(folder)
    try:
        ours = config.get("normfree")
        if ours is not None:
            row, arguments = ours["row"], {"in_channels": ours["in_channels"], **ours["model_args"]}
            pre = Preprocessing.from_fields(ours["preprocessing"])
            if not isinstance(row, str):
                raise TypeError(f"{row!r} for the name of a row")
        else:
            row, arguments = _row_of_timm(config, numerics)
            pre = Preprocessing.from_config(config["pretrained_cfg"])
        count = int(config["num_classes"])
        classes = tuple(config.get("label_names") or map(str, range(count)))
    except (
        TypeError,
        KeyError,
        AttributeError,
    ) as error:  # whoever wrote it: it is data, and may hold anything
        raise ValueError(f"{folder}: config.json does not describe a network: {error}.") from None
    if len(classes) != count:
        raise ValueError(f"{folder}: config.json names {len(classes)} classes, the network has {count}.")
    return Description(row, arguments, pre, classes)


def _from_onnx(path: Path) -> TrainedModel:
    net, metadata = open_onnx(path)
    try:
        pre = Preprocessing.from_fields(metadata["preprocessing"])
        pre.transform()  # words and numbers that make no sense are found here
        if not len(pre.mean) == len(pre.std) == net.in_channels:
            raise ValueError(f"{len(pre.mean)} means for {net.in_channels} channels")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: the preprocessing in its metadata makes no sense: {error}.") from None
    return TrainedModel(net.eval(), pre, tuple(metadata["classes"]))


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a model folder.

    Raises:
        ValueError: there is no such file, or it describes no model.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as a model's config: {error}.") from None
    wanted = {"architecture", "num_classes", "pretrained_cfg"}
    if not isinstance(config, dict) or not wanted <= config.keys():
        raise ValueError(f"{path}: expected the keys {', '.join(sorted(wanted))}.")
    return config


def _row_of_timm(config: Mapping[str, Any], numerics: str) -> tuple[str, dict[str, Any]]:
    """(row, arguments) for a folder that timm wrote."""
    if numerics not in ("reference", "timm"):
        raise ValueError(f"numerics={numerics!r}. Allowed: reference, timm.")
    name = str(config["architecture"])
    row = f"timm_{name}"
    if row not in VARIANTS:
        raise ValueError(f"architecture {name!r} is no normalizer-free network of timm's that is known here.")
    if numerics == "reference" and name.startswith("dm_"):
        row = name.removeprefix("dm_")
    theirs = dict(config.get("model_args") or {})
    args: dict[str, Any] = {"in_channels": theirs.pop("in_chans", 3)}
    for key, field in (("drop_rate", "drop_rate"), ("drop_path_rate", "stochdepth_rate")):
        if key in theirs:
            args[field] = theirs.pop(key)
    theirs.pop("num_classes", None)
    if theirs.get("global_pool") == "avg":
        del theirs["global_pool"]
    if theirs:
        raise ValueError(f"model_args {', '.join(sorted(theirs))} of timm's {name} are not known here.")
    return row, args
