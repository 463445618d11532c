"""`normfree convert`: weights of other libraries to a model folder, or a network to DeepMind's file format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from normfree.commands.usage import UsageError
from normfree.files import UnreadableFileError, atomic_write, read_text, sha256_of
from normfree.suggest import number_of, problem

if TYPE_CHECKING:
    from normfree.preprocessing import Preprocessing
    from normfree.pretrained import TrainedModel


@dataclass
class ConvertArguments:
    """Convert weights of DeepMind, timm and others to a model folder, or a network to DeepMind's file format; or remove
    batch norm from a network of timm or torchvision."""

    source: Annotated[Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """What to convert: an .npz file released by DeepMind, a .safetensors or .pth file, a run or model folder of
    normfree or timm, hf-hub:OWNER/NAME; or timm:NAME or torchvision:NAME, whose batch norm is removed."""
    target: Annotated[Positional[str], tyro.conf.arg(metavar="TARGET")]
    """A new folder; or a new file that ends in .npz, for DeepMind's format, or in .safetensors for timm:NAME and
    torchvision:NAME."""
    model: Annotated[str, tyro.conf.arg(metavar="NAME")] = ""
    """Model name of the weights; default: found by the names and shapes of the weights."""
    numerics: Literal["reference", "timm"] = "reference"
    """For DeepMind's NFNets: compute as DeepMind's code does, or as timm's dm_nfnet does."""
    key: Annotated[str, tyro.conf.arg(metavar="KEY")] = ""
    """Entry of a .pth file that contains the weights, if there are several, for example state_dict_ema."""
    classes: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Text file with one class name per line; default: the names in the source, else numbers."""
    how: Literal["exact", "normalizer_free", "scratch"] = "exact"
    """How to remove batch norm (timm:, torchvision: only): fold it; fold it and standardize the weights; or rewrite the
    architecture with new random weights."""
    weights: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """File with the network's weights (timm:, torchvision: only)."""
    images: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = ""
    """Images to fit standardized weights to and to compare outputs on (timm:, torchvision: only)."""


def convert(arguments: ConvertArguments) -> int:
    """Read and check everything, then write the target atomically; return 0."""
    from normfree.commands.convert_foreign import convert_foreign
    from normfree.commands.foreign import PREFIXES

    target = Path(arguments.target)
    if arguments.source.startswith(PREFIXES):
        text = convert_foreign(arguments.source, target, how=arguments.how, weights=arguments.weights,
                               images=arguments.images, key=arguments.key)  # fmt: skip
        print(text)
        return 0
    is_folder = _check(arguments, target)
    model, naming, origin = _from_folder(arguments) if is_folder else _from_file(arguments)
    if arguments.classes:
        model = _with_classes(model, Path(arguments.classes))
    _print_summary(model, naming, origin, _write(target, model))
    return 0


def _check(arguments: ConvertArguments, target: Path) -> bool:
    """Raise UsageError for arguments that do not fit together; return True if the source is a folder."""
    from normfree.weights.hub import PREFIX
    from normfree.weights.load import PICKLED

    if arguments.weights or arguments.images or arguments.how != "exact":
        raise UsageError(
            problem(f"--how, --weights or --images is given for {arguments.source}",
                    allowed="these options with timm:NAME and torchvision:NAME", fix="leave them out")
        )  # fmt: skip
    _check_target(target)
    if arguments.key and Path(arguments.source).suffix not in PICKLED:
        raise UsageError(
            problem(f"--key {arguments.key} is given for {arguments.source}",
                    allowed=f"files written by torch.save ({', '.join(PICKLED)})", fix="leave --key out")
        )  # fmt: skip
    is_folder = arguments.source.startswith(PREFIX) or Path(arguments.source).is_dir()
    if is_folder and arguments.model:
        raise UsageError(
            problem(f"--model {arguments.model} is given for a folder, whose config.json names the network",
                    fix="leave --model out")
        )  # fmt: skip
    return is_folder


def _check_target(target: Path) -> None:
    """Raise UsageError if the target would overwrite something."""
    if target.suffix == ".npz":
        exists, allowed = target.exists(), "a new file"
    else:
        exists = target.exists() and (not target.is_dir() or any(target.iterdir()))
        allowed = "a new or an empty folder"
    if exists:
        raise UsageError(
            problem(
                f"{target} already exists", allowed=allowed, fix="choose another name, or remove it first"
            )
        )


# --- reading -----------------------------------------------------------------------------------------

_NAMINGS = {"haiku": "DeepMind's (released layout)", "timm": "timm's", "ours": "normfree's"}


def _from_folder(arguments: ConvertArguments) -> tuple[TrainedModel, str, str]:
    """Return the model of a folder, the naming of its weights, and where its preprocessing comes from."""
    from normfree.models.net import Net
    from normfree.pretrained import from_pretrained
    from normfree.weights.hub import PREFIX, fetch
    from normfree.weights.load import read_weights
    from normfree.weights.names import naming_of

    source = arguments.source
    folder = fetch(source) if source.startswith(PREFIX) else Path(source)
    model = from_pretrained(folder, numerics=arguments.numerics)
    assert isinstance(model.net, Net)  # only a file can be an ONNX model
    return model, _NAMINGS[naming_of(read_weights(folder))], "from the folder"


def _from_file(arguments: ConvertArguments) -> tuple[TrainedModel, str, str]:
    """Return the model of a weight file, the naming of its weights, and where its preprocessing comes from."""
    from normfree.models.net import Net
    from normfree.models.recognize import ends
    from normfree.models.zoo import create_model
    from normfree.preprocessing import assumed_preprocessing
    from normfree.pretrained import TrainedModel
    from normfree.weights.load import load_state_dict_
    from normfree.weights.names import naming_of, to_our_names

    weights = _read(arguments)
    try:
        name = arguments.model or _model_name(weights, arguments.numerics)
        state = to_our_names(weights)
    except ValueError as error:
        raise ValueError(f"{arguments.source}: {error}") from None
    num_classes, in_channels = ends(state)
    net = create_model(name, num_classes=num_classes, in_channels=in_channels)
    assert isinstance(net, Net)
    load_state_dict_(net, state, source=arguments.source)
    classes = tuple(map(str, range(num_classes)))
    naming = naming_of(weights)
    pre = assumed_preprocessing(net, deepmind=naming == "haiku")
    return TrainedModel(net.eval(), pre, classes), _NAMINGS[naming], "assumed from the variant"


def _read(arguments: ConvertArguments) -> Mapping[str, Any]:
    """Return the weights of the source file under the names that it uses."""
    from normfree.weights.load import PICKLED, read_weights
    from normfree.weights.torch_file import read_torch_file

    path = Path(arguments.source)
    return read_torch_file(path, key=arguments.key) if path.suffix in PICKLED else read_weights(path)


def _model_name(weights: Mapping[str, Any], numerics: str) -> str:
    """Return the name of the variant that has these weights and computes as `numerics` states."""
    from normfree.models.recognize import recognize
    from normfree.models.variants import VARIANTS

    names = recognize(weights)
    if numerics == "timm" and not names[0].startswith("timm_"):
        names = [n for n in (f"timm_dm_{names[0]}",) if n in VARIANTS]
        if not names:
            raise ValueError(
                problem("--numerics is timm", allowed="reference, except for DeepMind's NFNets, F0 to F6",
                        fix="leave --numerics out")
            )  # fmt: skip
    return names[0]


def _with_classes(model: TrainedModel, path: Path) -> TrainedModel:
    """Return the model with the class names of a text file."""
    from dataclasses import replace

    try:
        names = [line.strip() for line in read_text(path, limit=10_000_000).splitlines()]
    except UnreadableFileError as error:
        raise UsageError(f"--classes: {error}") from None
    expected = len(model.classes)
    if len(names) != expected or not all(names):
        raise UsageError(
            problem(f"--classes {path} has {len(names)} lines, {names.count('')} of them empty",
                    allowed=f"{number_of(expected, 'line')} with one class name each")
        )  # fmt: skip
    return replace(model, classes=tuple(names))


# --- writing -----------------------------------------------------------------------------------------


def _write(target: Path, model: TrainedModel) -> Path:
    """Write the target atomically; return the file that contains the weights."""
    from normfree.pretrained import save_pretrained
    from normfree.weights.haiku import write_haiku
    from normfree.weights.run_weights import MODEL_FILE

    if target.suffix == ".npz":
        tree = _haiku_tree(model)
        return atomic_write(target, lambda path: write_haiku(path, tree))
    return atomic_write(target, lambda path: save_pretrained(model, path)) / MODEL_FILE


def _haiku_tree(model: TrainedModel) -> Any:
    """Return the weights in DeepMind's layout."""
    from normfree.weights.names import haiku_from_state_dict

    name = model.net.name
    if name.startswith("timm_") and not name.startswith("timm_dm_"):
        raise UsageError(
            problem(f"{name} computes as timm does, which DeepMind's file format cannot express",
                    fix="convert it to a folder")
        )  # fmt: skip
    return haiku_from_state_dict(model.net.state_dict())


def _print_summary(model: TrainedModel, naming: str, origin: str, written: Path) -> None:
    """Print what was converted, and the checksum of the written file."""
    parameters = sum(p.numel() for p in model.net.parameters())
    lines = {
        "model": f"{model.net.name}, {parameters:,} parameters, {number_of(len(model.classes), 'class')}",
        "names": naming,
        "preprocessing": f"{_describe(model.preprocessing)} ({origin})",
        "weights": f"{written}, sha256 {sha256_of(written)}",
    }
    for name, text in lines.items():
        print(f"{name:<15}{text}")


def _describe(pre: Preprocessing) -> str:
    """Return the preprocessing in one line."""
    antialias = "" if pre.antialias else " without antialiasing"
    mean, std = (" ".join(f"{v:.3f}" for v in values) for values in (pre.mean, pre.std))
    return f"{pre.image_size} px, {pre.crop}, {pre.interpolation}{antialias}, mean {mean}, std {std}"
