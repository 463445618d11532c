"""`normfree convert timm:NAME|torchvision:NAME FILE.safetensors`: a network of another library, without batch norm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfree.commands.foreign import create_network
from normfree.commands.usage import UsageError
from normfree.files import atomic_write

if TYPE_CHECKING:
    from torch import Tensor, nn

    from normfree.preprocessing import Preprocessing
    from normfree.surgery.conversion_report import ConvertReport, How

#: How many pictures kernels are fitted to.
PICTURES = 128


def convert_foreign(source: str, target: Path, *, how: How, weights: str, images: str, key: str) -> str:
    """Builds the network, loads its weights, converts it, writes the converted state dict. Returns what to print."""
    from safetensors.torch import save_file

    from normfree.surgery.convert import convert_batchnorm

    if target.suffix != ".safetensors" or target.exists():
        raise UsageError(
            f"{target}: the target of {source} is a new file that ends in .safetensors, since a network of another "
            "library has no model folder here."
        )
    if how != "scratch" and not weights:
        raise UsageError(f"{source} has no weights of its own here. Add --weights FILE, or --how scratch.")
    if how == "normalizer_free" and not images:
        raise UsageError(
            "--how normalizer_free fits kernels to pictures. Add --images FOLDER; 128 are enough."
        )
    net = _built(source, weights, key) if weights else create_network(source, None)
    pictures = _pictures(images, _preprocessing(source, net)) if images else None
    model, report = convert_batchnorm(net.eval(), pictures, how=how)
    classes = _classifier(net.state_dict())[1]
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    about = {"source": source, "how": how, "num_classes": str(classes), "format": "pt"}
    atomic_write(target, lambda place: save_file(state, place, metadata=about))
    return _said(source, target, report, classes)


def _said(source: str, target: Path, report: ConvertReport, classes: int) -> str:
    library, _, name = source.partition(":")
    create = f"{library}.create_model" if library == "timm" else "torchvision.models.get_model"
    return "\n".join(
        [
            str(report),
            f"{target}: open it with",
            f"  net = convert_batchnorm({create}({name!r}, num_classes={classes}), how={report.how!r}).model",
            f"  net.load_state_dict(safetensors.torch.load_file({str(target)!r}))",
        ]
    )


def _built(source: str, weights: str, key: str) -> nn.Module:
    import torch

    from normfree.weights.load import PICKLED, read_weights
    from normfree.weights.torch_file import read_torch_file

    path = Path(weights)
    state: Mapping[str, Any] = (
        read_torch_file(path, key=key) if path.suffix in PICKLED else read_weights(path)
    )
    tensors = {name: torch.as_tensor(value) for name, value in state.items()}
    name, default = _classifier(create_network(source, None).state_dict())
    classes = len(tensors[name]) if name in tensors else default
    net = create_network(source, classes)
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        first = [line.strip() for line in str(error).splitlines()][1:3]
        raise ValueError(
            f"{weights} does not fit {source} with {classes} classes: {' '.join(first)}"
        ) from None
    return net


def _classifier(state: Mapping[str, Tensor]) -> tuple[str, int]:
    """Name and number of outputs of the last layer of a state dict."""
    name = [n for n, t in state.items() if n.endswith("weight") and t.dim() > 1][-1]
    return name, len(state[name])


def _preprocessing(source: str, net: nn.Module) -> Preprocessing:
    from normfree.preprocessing import Preprocessing

    config = getattr(net, "pretrained_cfg", None)
    if source.startswith("timm:") and config:
        return Preprocessing.from_config(config)
    # torchvision's presets: 256 px, of which the middle 224
    return Preprocessing(224, crop="center", crop_pct=224 / 256, interpolation="bilinear")


def _pictures(folder: str, pre: Preprocessing) -> Tensor:
    import torch

    from normfree.data.transforms.decode import load_image
    from normfree.data.transforms.normalize import normalize
    from normfree.inference import find_images

    files = find_images([folder])
    count = min(PICTURES, len(files))
    chosen = [files[i * len(files) // count] for i in range(count)]
    transform = pre.transform()
    return normalize(torch.stack([transform(load_image(f)) for f in chosen]), mean=pre.mean, std=pre.std)
