"""Saving and loading of trained networks with their preprocessing and class names.

The format is a Hugging Face model folder: `config.json` with timm's keys, `model.safetensors` and a model card
`README.md`. Weights of `timm_` variants are written under timm's names, so that timm can open the folder; after
`import normfree.timm`, timm and transformers open the folders of all variants.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from normfree._version import __version__
from normfree.data.source import require_class_names
from normfree.exported_net import ExportedNet
from normfree.files import UnreadableFileError, atomic_write, atomic_write_text, read_json
from normfree.models import cost
from normfree.models.net import Net
from normfree.models.variant import Variant
from normfree.models.variants import VARIANTS, name_in_timm, variant_of
from normfree.models.zoo import create_model
from normfree.onnx_net import open_onnx
from normfree.openvino_net import open_openvino
from normfree.preprocessing import Preprocessing
from normfree.suggest import did_you_mean, problem, unknown
from normfree.weights.checksums import verify, write_checksums
from normfree.weights.hub import PREFIX, fetch, upload
from normfree.weights.load import load_weights
from normfree.weights.names import timm_from_state_dict
from normfree.weights.run_weights import MODEL_FILE, ModelFiles, model_files, model_folder
from normfree.weights.tensor_file import write_tensors

# The `problem_type` of a config.json whose classes are independent of each other.
MULTI_LABEL = "multi_label_classification"
# Bytes of a config.json that are read; the largest published one has 22,000 class names.
_CONFIG_BYTES, _MOST_CLASSES = 16_000_000, 1_000_000
_FIELDS = {field.name for field in fields(Variant)} | {"in_channels"}
# Fields of a `Variant` that affect training only, and not the outputs of a trained network.
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
    """A trained network with everything that predictions need.

    Attributes:
        net: the network. An `ExportedNet` if it was read from an ONNX or OpenVINO file; that can predict, but not be
            trained.
        preprocessing: how images become inputs of the network.
        classes: the class names, one per output.
        sigmoid: each class is present or absent by itself: probabilities are sigmoids of the logits, not a softmax.
        note: for a run that is not finished, which weights these are, else "".
    """

    net: Net | ExportedNet
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    sigmoid: bool = False
    note: str = ""

    def require_classes(self) -> None:
        """Check that the network has a classifier.

        Raises:
            ValueError: it gives features only, as after contrastive learning.
        """
        if not self.classes:
            fix = "write embeddings with normfree predict --embeddings FILE.npz, or train a classifier with normfree "
            fix += "train finetune --weights MODEL"
            raise ValueError(problem("the model has no classes, only embeddings", fix=fix))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities B K of logits B K, float32."""
        return logits.float().sigmoid() if self.sigmoid else logits.float().softmax(dim=1)


# --- saving ---------------------------------------------------------------------------------------------


def save_pretrained(model: TrainedModel, folder: str | Path, *, card: str = "") -> Path:
    """Write a model folder: `config.json`, `model.safetensors`, `SHA256SUMS`, and `README.md` if there is a card.

    `from_pretrained` reads the folder. timm reads it too if the network is a `timm_` variant.

    Args:
        model: the network with its preprocessing and classes.
        folder: the folder to write, which is created if needed. Existing files are replaced.
        card: text of the model card, Markdown.

    Returns:
        The folder.

    Raises:
        ValueError: the number of class names is not the number of outputs, or the network is folded or was read from
            an ONNX file.

    Examples:
        >>> import tempfile
        >>> import normfree
        >>> from normfree.preprocessing import Preprocessing
        >>> from normfree.pretrained import TrainedModel
        >>> net = normfree.create_model("nf_resnet_nano", num_classes=2)
        >>> model = TrainedModel(net, Preprocessing(image_size=32), ("cat", "dog"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = normfree.save_pretrained(model, folder, card="# Cats and dogs")
        ...     sorted(file.name for file in path.iterdir())
        ['README.md', 'SHA256SUMS', 'config.json', 'model.safetensors']
    """
    net = model.net
    folder = Path(folder)
    if not isinstance(net, Net):
        raise ValueError(
            problem(
                f"{net.name} was read from an ONNX file, which has no trainable weights",
                fix="save the run or model folder that the file was exported from",
            )
        )
    if net.folded:
        raise ValueError(
            problem(
                "the network is folded, so it is no longer the variant of its name",
                fix="save the network before `fold`, or export the folded one",
            )
        )
    if len(model.classes) != net.num_classes:
        raise ValueError(
            problem(
                f"there are {len(model.classes)} class names for {net.num_classes} outputs",
                allowed="one class name per output",
            )
        )
    state, for_timm = net.state_dict(), _timm_knows(net)
    if for_timm:
        state = timm_from_state_dict(state, attention_at=net.variant.attention_at)
    tensors = {k: v.detach().contiguous().cpu() for k, v in state.items()}
    text = json.dumps(_config(net, model, for_timm), indent=2, ensure_ascii=False)
    atomic_write_text(folder / "config.json", text + "\n")
    atomic_write(folder / MODEL_FILE, lambda path: write_tensors(path, tensors, metadata={"format": "pt"}))
    # safetensors makes its files readable only for their owner.
    shutil.copymode(folder / "config.json", folder / MODEL_FILE)
    if card:
        atomic_write_text(folder / "README.md", card)
    write_checksums(
        folder, ["config.json", MODEL_FILE]
    )  # last: a folder that is half replaced does not match
    return folder


def save_description(model: TrainedModel, folder: Path) -> None:
    """Write the `config.json` of a model folder whose weights are elsewhere: those of a run are in its checkpoints."""
    assert isinstance(model.net, Net)
    text = json.dumps(_config(model.net, model, _timm_knows(model.net)), indent=2, ensure_ascii=False)
    atomic_write_text(folder / "config.json", text + "\n")


def push_to_hub(folder: str | Path, repository: str, *, private: bool = False) -> str:
    """Upload a model folder to the Hugging Face hub.

    Needs `normfree[hub]` and a token of the hub (`hf auth login`).

    Args:
        folder: a model folder, or a run folder that contains one.
        repository: `OWNER/NAME`; created if it does not exist.
        private: True to create a private repository.

    Returns:
        The URL of the repository.

    Raises:
        ValueError: the folder is not a model folder, or the hub refused the upload.
        ModuleNotFoundError: huggingface_hub is not installed.

    Examples:
        `tests/test_pretrained.py` runs this code with a local replacement of the hub.

        >>> import normfree
        >>> normfree.push_to_hub("runs/emoji", "me/emoji-nfnet", private=True)  # doctest: +SKIP
        'https://huggingface.co/me/emoji-nfnet'
    """
    return upload(model_folder(Path(folder)), repository, private=private)


def model_args(net: Net) -> dict[str, Any]:
    """Return the fields in which the variant of a network differs from the variant of its name."""
    published, own = asdict(VARIANTS[net.name]), asdict(net.variant)
    return {k: v for k, v in own.items() if v != published[k]}


def _timm_knows(net: Net) -> bool:
    """Return True if timm can build the network from its name."""
    return net.name.startswith("timm_") and model_args(net).keys() <= TRAINING_FIELDS | {"global_pool"}


def _config(net: Net, model: TrainedModel, for_timm: bool) -> dict[str, Any]:
    """Return the contents of config.json."""
    pre, changed = model.preprocessing, model_args(net)
    first, architecture = "stem.conv0", name_in_timm(net.name)
    # timm passes these to its constructor.
    for_constructor = {} if net.in_channels == 3 else {"in_chans": net.in_channels}
    if for_timm:
        first = "stem.conv1" if net.variant.stem == "deep" or net.variant.stem == "deep_128" else "stem.conv"
        architecture = net.name.removeprefix("timm_")
        for_constructor |= {k: v for k, v in changed.items() if k == "global_pool"}
    else:
        for_constructor |= changed
    return {
        "architecture": architecture,
        "num_classes": net.num_classes,
        "num_features": net.num_features,
        "global_pool": net.global_pool,
        "label_names": list(model.classes),
        # Hugging Face's name for it, which its pipelines read too.
        **({"problem_type": MULTI_LABEL} if model.sigmoid else {}),
        **({"model_args": for_constructor} if for_constructor else {}),
        "pretrained_cfg": {
            **pre.to_config(), "num_classes": net.num_classes,
            "first_conv": first, "classifier": "head.fc" if for_timm else "head",
        },
        "normfree": {
            "version": __version__, "row": net.name, "in_channels": net.in_channels,
            "model_args": changed, "preprocessing": asdict(pre),
        },
    }  # fmt: skip


# --- loading ----------------------------------------------------------------------------------------------


def from_pretrained(
    source: str | Path, *, numerics: Literal["reference", "timm"] = "reference"
) -> TrainedModel:
    """Load a trained network with its preprocessing and class names.

    Only safetensors files are read, and the names and shapes of all tensors must match the network.

    Args:
        source: a model folder of `save_pretrained` or timm, a run folder, finished or not,
            `hf-hub:OWNER/NAME[@REVISION]`, an ONNX or OpenVINO (.xml) file that `export`
            wrote, or a folder with such a file.
        numerics: for timm's `dm_nfnet_f*`, which have DeepMind's weights, whether to compute like DeepMind's code
            ("reference") or like timm ("timm"); docs/weights.md has the differences. It has no effect on other models.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: there is no such folder or file, or its contents are invalid.

    Examples:
        >>> import tempfile
        >>> import normfree
        >>> from normfree.preprocessing import Preprocessing
        >>> from normfree.pretrained import TrainedModel
        >>> net = normfree.create_model("nf_resnet_nano", num_classes=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = normfree.save_pretrained(TrainedModel(net, Preprocessing(32), ("cat", "dog")), folder)
        ...     model = normfree.from_pretrained(folder)
        >>> model.classes, model.preprocessing.image_size, model.net.training
        (('cat', 'dog'), 32, False)
    """
    if (file := _exported_file(str(source))) is not None:
        return _from_exported(file)
    files = _files(source)
    about = _described(files, numerics)
    try:
        _check_size(about, files.weights)
        net = create_model(about.variant, num_classes=len(about.classes), **about.arguments)
        if not isinstance(net, Net):
            raise TypeError("'features_only' in model_args")
    except TypeError as error:
        raise ValueError(f"{files.folder}: config.json does not describe a network: {error}.") from None
    load_weights(net, files.folder if files.weights.parent == files.folder else files.weights)
    return TrainedModel(net.eval(), about.preprocessing, about.classes, about.sigmoid, files.note)


def _check_size(about: Description, weights: Path) -> None:
    """Raise `TypeError` if a network would have more parameters than the file of its weights has bytes."""
    overrides = {"in_channels": 3, **about.arguments}
    in_channels = overrides.pop("in_channels")
    variant = variant_of(about.variant).with_overrides(overrides)
    parameters = cost.count(variant, num_classes=len(about.classes), in_channels=in_channels).parameters
    if parameters > (size := weights.stat().st_size):
        raise TypeError(f"a network of {parameters:,} parameters, and {weights.name} has {size:,} bytes")


def _files(source: str | Path) -> ModelFiles:
    """Return the files of a model folder, a run folder or a repository of the hub."""
    return model_files(fetch(str(source)) if str(source).startswith(PREFIX) else Path(source))


@dataclass(frozen=True)
class Description:
    """The contents of a model folder's config.json.

    Attributes:
        variant: name of the variant.
        arguments: other arguments of `create_model`.
        preprocessing: the preprocessing.
        classes: the class names.
        sigmoid: as in `TrainedModel`.
        note: as in `TrainedModel`.
    """

    variant: str
    arguments: dict[str, Any]
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    sigmoid: bool = False
    note: str = ""


def describe(folder: str | Path, *, numerics: Literal["reference", "timm"] = "reference") -> Description:
    """Read the config.json of a model folder, a run folder or a repository of the hub; see `from_pretrained`.

    Raises:
        ValueError: there is no such file, or its contents are invalid.
    """
    return _described(_files(folder), numerics)


def _described(files: ModelFiles, numerics: str) -> Description:
    """Return the contents of the config.json of a model; see `describe`."""
    folder = files.folder
    config = read_config(folder)
    try:
        ours = config.get("normfree")
        if ours is not None:
            variant, arguments = ours["row"], {"in_channels": ours["in_channels"], **ours["model_args"]}
            pre = Preprocessing.from_fields(ours["preprocessing"])
            if not isinstance(variant, str):
                raise TypeError(f"'row' is {variant!r}, not the name of a variant")
            # Other arguments of `create_model` would read other files or ask the network.
            if foreign := sorted(arguments.keys() - _FIELDS):
                raise TypeError(f"{', '.join(map(repr, foreign))} in 'model_args' is no field of a variant")
        else:
            variant, arguments = _timm_variant(config, numerics)
            pre = Preprocessing.from_config(config["pretrained_cfg"])
        count = int(config["num_classes"])
        if not 0 <= count <= _MOST_CLASSES:
            raise TypeError(f"'num_classes' is {count}")
        labels = config.get("label_names") or [str(number) for number in range(count)]
        if not isinstance(labels, list):
            raise TypeError("'label_names' is not a list")
        classes = tuple(labels)
        require_class_names(classes, source=str(folder))
    # The file may come from anywhere, so any entry may be missing or have the wrong type.
    except (TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"{folder}: config.json does not describe a network: {error}.") from None
    if len(classes) != count:
        raise ValueError(f"{folder}: config.json has {len(classes)} class names for {count} outputs.")
    return Description(
        variant, arguments, pre, classes, config.get("problem_type") == MULTI_LABEL, files.note
    )


def _exported_file(source: str) -> Path | None:
    """Return the ONNX or OpenVINO file that `source` names, or the only one of a folder without a config.json."""
    path = Path(source)
    if source.endswith((".onnx", ".xml")) and not path.is_dir():
        return path
    if path.is_dir() and not any((path / name).exists() for name in ("config.json", "config.toml", "model")):
        files = [*path.glob("*.xml"), *path.glob("*.onnx")]
        return files[0] if len(files) == 1 else None
    return None


def _from_exported(path: Path) -> TrainedModel:
    """Load a model from an ONNX or OpenVINO file."""
    net, metadata = open_onnx(path) if path.suffix == ".onnx" else open_openvino(path)
    try:
        pre = Preprocessing.from_fields(metadata["preprocessing"])
        # Invalid options are found here.
        pre.transform()
        if not len(pre.mean) == len(pre.std) == net.in_channels:
            raise ValueError(f"{len(pre.mean)} mean(s) for {net.in_channels} channels")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: the preprocessing in its metadata is invalid: {error}.") from None
    return TrainedModel(net.eval(), pre, tuple(metadata["classes"]), metadata.get("sigmoid") is True)


def read_config(folder: Path) -> dict[str, Any]:
    """Read the `config.json` of a model folder.

    Raises:
        ValueError: there is no such file, or it does not describe a model.
    """
    path = folder / "config.json"
    try:
        config = read_json(path, limit=_CONFIG_BYTES)
    except UnreadableFileError as error:
        raise ValueError(f"{path} cannot be read as a model's config: {error}") from None
    verify(folder, "config.json")
    wanted = {"architecture", "num_classes", "pretrained_cfg"}
    if not wanted <= config.keys():
        raise ValueError(
            problem(f"{path} does not describe a model", allowed=f"the keys {', '.join(sorted(wanted))}")
        )
    return config


def _timm_variant(config: Mapping[str, Any], numerics: str) -> tuple[str, dict[str, Any]]:
    """Return the name of the variant and the other arguments of `create_model` for a folder that timm wrote."""
    if numerics not in ("reference", "timm"):
        raise ValueError(unknown("numerics", numerics, ("reference", "timm")))
    name = str(config["architecture"])
    variant = f"timm_{name}"
    if variant not in VARIANTS:
        known = [other.removeprefix("timm_") for other in VARIANTS if other.startswith("timm_")]
        raise ValueError(
            problem(
                f"timm's architecture {name!r} is not supported.{did_you_mean(name, known)}",
                allowed=f"normalizer-free networks of timm: {', '.join(known)}",
            )
        )
    if numerics == "reference" and name.startswith("dm_"):
        variant = name.removeprefix("dm_")
    theirs = dict(config.get("model_args") or {})
    args: dict[str, Any] = {"in_channels": theirs.pop("in_chans", 3)}
    for key, field in (("drop_rate", "drop_rate"), ("drop_path_rate", "stochdepth_rate")):
        if key in theirs:
            args[field] = theirs.pop(key)
    theirs.pop("num_classes", None)
    if "global_pool" in theirs:
        args["global_pool"] = theirs.pop("global_pool")
    if theirs:
        raise ValueError(f"model_args {', '.join(sorted(theirs))} of timm's {name} are not supported.")
    return variant, args
