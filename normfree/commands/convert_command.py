"""`normfree convert`: weights of others into a model folder, and networks into the released layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from normfree.commands.usage import UsageError
from normfree.files import atomic_write

if TYPE_CHECKING:
    from normfree.pretrained import TrainedModel


@dataclass
class ConvertArguments:
    """Weights of DeepMind, timm or others into a model folder; or any network into DeepMind's layout."""

    source: Positional[str]
    """A released .npz, a .safetensors, a .pth, a run or model folder of ours or timm's, hf-hub:OWNER/NAME; or
    timm:NAME or torchvision:NAME, whose batch norm is taken out."""
    target: Positional[str]
    """A new folder; or a new file that ends in .npz, for the released layout, or in .safetensors for another library's
    network."""
    model: str = ""
    """The row of the weights; default: recognised by names and shapes."""
    numerics: Literal["reference", "timm"] = "reference"
    """How DeepMind's weights compute: as their own code did, or as timm's dm_nfnet does."""
    key: str = ""
    """Which entry of a .pth holds the weights, when several might, for example state_dict_ema."""
    classes: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """A text file with one class name per line; default: those of the source, else numbers."""
    how: Literal["exact", "normalizer_free", "scratch"] = "exact"
    """timm:, torchvision: only. How batch norm is taken out: folded; folded with standardized kernels; rewritten."""
    weights: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """timm:, torchvision: only. The network's weights."""
    images: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = ""
    """timm:, torchvision: only. Pictures that kernels are fitted to, or that outputs are compared on."""


def convert(arguments: ConvertArguments) -> int:
    """Reads and checks everything first; the target then appears whole or not at all."""
    from normfree.commands.convert_batchnorm import convert_foreign
    from normfree.commands.foreign import LIBRARIES
    from normfree.weights.hub import PREFIX
    from normfree.weights.load import PICKLED

    target = Path(arguments.target)
    if arguments.source.startswith(LIBRARIES):
        print(
            convert_foreign(
                arguments.source, target, how=arguments.how, weights=arguments.weights, images=arguments.images,
                key=arguments.key,
            )
        )  # fmt: skip
        return 0
    if arguments.weights or arguments.images or arguments.how != "exact":
        raise UsageError(
            f"--how, --weights and --images are for timm:NAME and torchvision:NAME, not for {arguments.source}."
        )
    _check_target(target)
    folder = arguments.source.startswith(PREFIX) or Path(arguments.source).is_dir()
    if arguments.key and Path(arguments.source).suffix not in PICKLED:
        raise UsageError(
            f"--key {arguments.key}: only files of torch.save ({', '.join(PICKLED)}) have keys. Leave it out."
        )
    model, names, origin = _from_folder(arguments) if folder else _from_file(arguments)
    if arguments.classes:
        model = _with_classes(model, Path(arguments.classes))
    written = _write(target, model)
    pre = model.preprocessing
    parameters = sum(p.numel() for p in model.net.parameters())
    rows = [
        ("model", f"{model.net.name}, {parameters:,} parameters, {len(model.classes)} classes"),
        ("names", names),
        ("preprocessing", f"{pre.image_size} px, {pre.crop}, {pre.interpolation}"
                          f"{'' if pre.antialias else ' without antialiasing'}, mean {_numbers(pre.mean)}, "
                          f"std {_numbers(pre.std)} ({origin})"),
        ("weights", f"{written}, sha256 {_sha256(written)}"),
    ]  # fmt: skip
    for word, text in rows:
        print(f"{word:<15}{text}")
    return 0


# --- in ----------------------------------------------------------------------------------------------

_WHOSE = {"haiku": "DeepMind's (released layout)", "timm": "timm's", "ours": "normfree's"}


def _from_folder(arguments: ConvertArguments) -> tuple[TrainedModel, str, str]:
    from normfree.models.net import Net
    from normfree.pretrained import from_pretrained
    from normfree.weights.load import read_weights
    from normfree.weights.names import naming_of

    if arguments.model:
        raise UsageError(
            f"--model {arguments.model}: a folder's config.json says which network it is. Leave it out."
        )
    source = _downloaded(arguments.source)
    model = from_pretrained(source, numerics=arguments.numerics)
    assert isinstance(model.net, Net)  # folders hold no other
    return model, _WHOSE[naming_of(read_weights(source))], "from the folder"


def _downloaded(source: str) -> Path:
    from normfree.weights.hub import PREFIX, fetch

    return fetch(source) if source.startswith(PREFIX) else Path(source)


def _from_file(arguments: ConvertArguments) -> tuple[TrainedModel, str, str]:
    from normfree.models.net import Net
    from normfree.models.recognize import ends
    from normfree.models.zoo import create_model
    from normfree.preprocessing import assumed_preprocessing
    from normfree.pretrained import TrainedModel
    from normfree.weights.load import load_state_dict_
    from normfree.weights.names import naming_of, to_our_names

    content = _content(arguments)
    try:
        row = arguments.model or _row(content, arguments.numerics)
        state = to_our_names(content)
    except ValueError as error:
        raise ValueError(f"{arguments.source}: {error}") from None
    num_classes, in_channels = ends(state)
    net = create_model(row, num_classes=num_classes, in_channels=in_channels)
    assert isinstance(net, Net)
    load_state_dict_(net, state, source=arguments.source)
    names = tuple(map(str, range(num_classes)))
    naming = naming_of(content)
    pre = assumed_preprocessing(net, deepmind=naming == "haiku")
    return TrainedModel(net.eval(), pre, names), _WHOSE[naming], "assumed from the row"


def _content(arguments: ConvertArguments) -> Mapping[str, Any]:
    from normfree.weights.load import PICKLED, read_weights
    from normfree.weights.torch_file import read_torch_file

    path = Path(arguments.source)
    return read_torch_file(path, key=arguments.key) if path.suffix in PICKLED else read_weights(path)


def _row(content: Mapping[str, Any], numerics: str) -> str:
    from normfree.models.recognize import recognize
    from normfree.models.variants import VARIANTS

    rows = recognize(content)
    if numerics == "timm" and not rows[0].startswith("timm_"):
        rows = [n for n in (f"timm_dm_{rows[0]}",) if n in VARIANTS]
        if not rows:
            raise UsageError(
                "--numerics timm: only DeepMind's NFNets, F0 to F6, compute in two ways. Leave it out."
            )
    return rows[0]


def _with_classes(model: TrainedModel, path: Path) -> TrainedModel:
    from dataclasses import replace

    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--classes {path}: {error}.") from None
    expected = len(model.classes)
    if len(names) != expected or not all(n.strip() for n in names):
        raise UsageError(f"--classes {path}: {len(names)} lines, {sum(not n.strip() for n in names)} of them empty; "
                         f"the network has {expected} classes. Give one name per line.")  # fmt: skip
    return replace(model, classes=tuple(n.strip() for n in names))


# --- out ---------------------------------------------------------------------------------------------


def _check_target(target: Path) -> None:
    if target.suffix == ".npz":
        if target.exists():
            raise UsageError(f"{target} exists already. Choose another name, or remove it first.")
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(
            f"{target} exists already and is not an empty folder. Choose another, or remove it first."
        )


def _write(target: Path, model: TrainedModel) -> Path:
    """Writes the target beside its place and moves it there. Returns the file with the weights."""
    from normfree.pretrained import save_pretrained
    from normfree.weights.load import MODEL_FILE

    if target.suffix == ".npz":
        tree = _released(model)
        return atomic_write(target, lambda place: _write_haiku(place, tree))
    return atomic_write(target, lambda place: save_pretrained(model, place)) / MODEL_FILE


def _write_haiku(place: Path, tree: Any) -> None:
    from normfree.weights.haiku import write_haiku

    write_haiku(place, tree)


def _released(model: TrainedModel) -> Any:
    from normfree.weights.names import haiku_from_state_dict

    name = model.net.name
    if name.startswith("timm_") and not name.startswith("timm_dm_"):
        raise UsageError(
            f"{name} computes as timm does, which the released layout cannot say. Convert it to a folder."
        )
    return haiku_from_state_dict(model.net.state_dict())


def _sha256(path: Path) -> str:
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{v:.3f}" for v in values)
