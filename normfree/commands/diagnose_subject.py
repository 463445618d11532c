"""The network that `normfree diagnose` examines, and the images that it runs on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from normfree.commands.foreign import PREFIXES, create_network
from normfree.commands.usage import UsageError, with_classes
from normfree.suggest import problem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from normfree.data.source import Source
    from normfree.preprocessing import Preprocessing


@dataclass
class Subject:
    """A network, and what is known about its input.

    Attributes:
        net: the network.
        title: name of the network for headings.
        size: side of its images in pixels, or their height and width.
        channels: channels of its images.
        classifier: name of the weight that AGC does not clip; "" if there is none.
        data: the data of its run; "" if it has no run.
        source: the opened validation part of `data`.
        preprocessing: None for random weights.
        classes: class names; empty if it has none.
    """

    net: nn.Module
    title: str
    size: int | tuple[int, int]
    channels: int = 3
    classifier: str = "head.weight"
    data: str = ""
    source: Source | None = None
    preprocessing: Preprocessing | None = None
    classes: tuple[str, ...] = ()


def open_subject(model: str, data: str) -> Subject:
    """Return the network that `model` names. `data` sets the number of classes of a new one.

    Raises:
        UsageError: `model` names nothing that can be examined.
    """
    if model.startswith(PREFIXES):
        return _foreign(model)
    if model.startswith("hf-hub:") or Path(model).exists():
        return _trained(model, data)
    return _untrained(model, data)


def _untrained(model: str, data: str) -> Subject:
    """Return a variant with random weights."""
    from normfree.data.sources.open import open_labeled
    from normfree.models.variants import variant_of
    from normfree.models.zoo import create_model

    try:
        variant = variant_of(model)
    except ValueError as error:
        others = "a run or model folder, timm:NAME or torchvision:NAME"
        raise UsageError(f"{str(error).rstrip('.')}. Also allowed: {others}.") from None
    classes = tuple(open_labeled(data).classes) if data else ()
    # At a skip gain of 0, branches would contribute nothing and get no gradient. The plots of [A] use 1.
    net = create_model(model, num_classes=len(classes) or 1000, skip_gain=1.0)
    gains = ", skip gains 1" if variant.norm == "none" else ""
    return Subject(net, f"{model}, random weights{gains}", variant.train_size, classes=classes)


def _trained(model: str, data: str) -> Subject:
    """Return the network of a run or model folder."""
    from normfree.models.net import Net
    from normfree.pretrained import from_pretrained
    from normfree.training.config_io import load_config
    from normfree.training.run_data import open_run_data

    trained = from_pretrained(model)
    if not isinstance(trained.net, Net):
        raise UsageError(
            problem(f"{model} is an ONNX file, whose blocks cannot be observed", allowed="a run or model folder",
                    fix="give the folder that the file was exported from")
        )  # fmt: skip
    pre, config = trained.preprocessing, Path(model) / "config.toml"
    subject = Subject(trained.net, model, pre.image_size, trained.net.in_channels, preprocessing=pre,
                      classes=trained.classes)  # fmt: skip
    if config.is_file() and not data:
        run = load_config(config)
        subject.data = run.data
        subject.source = open_run_data(Path(model), fix=f"normfree diagnose {model} DATA").val
    return subject


def _foreign(model: str) -> Subject:
    """Return a network of another library with random weights."""
    from torch import nn

    net = create_network(model)
    _, size, _ = getattr(net, "default_cfg", {}).get("input_size", (3, 224, 224))
    last = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)][-1:]
    return Subject(net, f"{model}, random weights", size, classifier="".join(f"{n}.weight" for n in last))


def load_images(
    subject: Subject, data: str, *, count: int, image_size: int, given: bool = True
) -> tuple[Tensor, Tensor, str]:
    """Return normalized images B C H W, labels B, and what the images are.

    `given`: the user asked for `count` images; otherwise fewer are used if the data has fewer.
    Without data, images are noise and labels are random numbers, to be taken modulo the number of classes.
    """
    import torch

    from normfree.data.sources.open import open_labeled
    from normfree.data.transforms.normalize import height_and_width
    from normfree.inference import sample
    from normfree.preprocessing import Preprocessing

    name, size = data or subject.data, image_size or subject.size
    if not name:
        labels = torch.randint(2**31, (count,))
        return torch.randn(count, subject.channels, *height_and_width(size)), labels, "images of N(0, 1)"
    source = subject.source or open_labeled(name)
    if not given and len(source) < count:
        count = max(2, len(source))
    if len(source) < count:
        raise UsageError(
            problem(f"--batch-size is {count}", allowed=f"at most {len(source)}, the number of images of {name}",
                    fix=f"--batch-size {len(source)}")
        )  # fmt: skip
    if data and subject.preprocessing:
        source = with_classes(data, source, subject.classes)
    pre = subject.preprocessing or Preprocessing(image_size=size)
    if image_size:
        pre = replace(pre, image_size=size)
    return *sample(source, count=count, preprocessing=pre), f"images of {name}"
