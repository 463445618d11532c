"""`normfree convert timm:NAME|torchvision:NAME FILE.safetensors`: a network of another library without batch norm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfree.commands.foreign import create_network
from normfree.commands.usage import UsageError
from normfree.files import atomic_write
from normfree.suggest import problem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from normfree.preprocessing import Preprocessing
    from normfree.surgery.conversion_report import ConvertReport, How

# Number of images to which weights are fitted, and on which outputs are compared.
IMAGES = 128


def convert_foreign(source: str, target: Path, *, how: How, weights: str, images: str, key: str) -> str:
    """Create the network, load its weights, convert it, write the converted state dict; return the text to print."""
    from safetensors.torch import save_file

    from normfree.data.walk import find_images
    from normfree.inference import sample_images
    from normfree.surgery.convert import convert_batchnorm

    _check(source, target, how=how, weights=weights, images=images)
    net = _with_weights(source, weights, key) if weights else create_network(source)
    tensors = None
    if images:
        pre = _preprocessing(source, net)
        tensors = sample_images(find_images([images]), count=IMAGES, preprocessing=pre)
    model, report = convert_batchnorm(net.eval(), tensors, how=how)
    num_classes = _classifier(net.state_dict())[1]
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"source": source, "how": how, "num_classes": str(num_classes), "format": "pt"}
    atomic_write(target, lambda path: save_file(state, path, metadata=metadata))
    return _summary(source, target, report, num_classes)


def _check(source: str, target: Path, *, how: How, weights: str, images: str) -> None:
    """Raise UsageError for arguments that do not fit together."""
    if target.suffix != ".safetensors" or target.exists():
        raise UsageError(
            problem(f"the target of {source} is {target}", allowed="a new file that ends in .safetensors")
        )
    if how != "scratch" and not weights:
        raise UsageError(
            problem(f"{source} has random weights", allowed=f"--how {how} with trained weights",
                    fix="add --weights FILE, or --how scratch")
        )  # fmt: skip
    if how == "normalizer_free" and not images:
        raise UsageError(
            problem("--how normalizer_free has no images to fit weights to",
                    fix=f"add --images FOLDER; {IMAGES} images are enough")
        )  # fmt: skip


def _summary(source: str, target: Path, report: ConvertReport, num_classes: int) -> str:
    """Return the report and the code that opens the written file."""
    library, _, name = source.partition(":")
    create = f"{library}.create_model" if library == "timm" else "torchvision.models.get_model"
    return "\n".join(
        [
            str(report),
            f"{target}: open it with",
            f"  net = convert_batchnorm({create}({name!r}, num_classes={num_classes}), how={report.how!r}).model",
            f"  net.load_state_dict(safetensors.torch.load_file({str(target)!r}))",
        ]
    )


def _with_weights(source: str, weights: str, key: str) -> nn.Module:
    """Return the network with the weights of a file and as many classes as they have."""
    import torch

    from normfree.weights.load import PICKLED, read_weights
    from normfree.weights.torch_file import read_torch_file

    path = Path(weights)
    state: Mapping[str, Any] = (
        read_torch_file(path, key=key) if path.suffix in PICKLED else read_weights(path)
    )
    tensors = {name: torch.as_tensor(value) for name, value in state.items()}
    name, default = _classifier(create_network(source).state_dict())
    num_classes = len(tensors[name]) if name in tensors else default
    net = create_network(source, num_classes=num_classes)
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        details = [line.strip() for line in str(error).splitlines()][1:3]
        raise ValueError(
            f"{weights} does not fit {source} with {num_classes} classes: {' '.join(details)}"
        ) from None
    return net


def _classifier(state: Mapping[str, Tensor]) -> tuple[str, int]:
    """Return the name of the last layer's weight in a state dict, and the number of its outputs."""
    name = [n for n, t in state.items() if n.endswith("weight") and t.dim() > 1][-1]
    return name, len(state[name])


def _preprocessing(source: str, net: nn.Module) -> Preprocessing:
    """Return the preprocessing of a foreign network."""
    from normfree.preprocessing import Preprocessing

    config = getattr(net, "pretrained_cfg", None)
    if source.startswith("timm:") and config:
        return Preprocessing.from_config(config)
    # torchvision's presets resize to 256 pixels and crop the central 224.
    return Preprocessing(224, crop="center", crop_pct=224 / 256, interpolation="bilinear")
