"""The programs of the suite `whole_job` that are not ours: `python -m benchmarks.whole_job_arms ARM FOLDER ...`.

`timm` trains timm's network class with the parts of timm, in the order of timm's train.py. `torchvision` trains a
torchvision ResNet with batch norm by the recipe of torchvision's references, with its transforms and data loader. Each
prints a line after every epoch in the form of `normfree train`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.transforms import v2

from normfree.models.variants import variant_of
from normfree.models.zoo import create_model
from normfree.training.recipes import cifar

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10
WARMUP = 2  # epochs, as in the recipe
BASIC_LAYERS = (2, 2, 2)  # blocks at 32, 16 and 8 px
Batches = Iterable[tuple[Tensor, Tensor]]


def main() -> None:
    """Train one arm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("folder", type=Path, help="with train/ and val/, one folder per class in each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--half", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--batch-size", type=int, default=cifar().input.batch_size)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    ARMS[options.arm](options)


# --- timm -------------------------------------------------------------------------------------------------------


def timm_network(name: str, classes: int) -> nn.Module:
    """Return timm's class with the shape of our variant `name` for images of 32 px."""
    from timm.models.nfnet import NormFreeNet

    from benchmarks.small_scale import timm_shape

    net = NormFreeNet(timm_shape(variant_of(name)), num_classes=classes)
    net.stem.conv.stride, net.stem.pool = (1, 1), nn.Identity()  # timm has no stem without a reduction
    return net


def train_timm(options: argparse.Namespace) -> None:
    """Train with timm's parts, in the order of timm's train.py; all numbers are those of our recipe."""
    from timm.data import Mixup, create_dataset, create_loader
    from timm.loss import SoftTargetCrossEntropy
    from timm.models import model_parameters
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3, dispatch_clip_grad

    recipe = cifar()
    optim, augment, size = recipe.optim, recipe.augment, options.batch_size
    loaders = {}
    for part in ("train", "val"):
        data = create_dataset(
            "", root=str(options.folder), split=part, is_training=part == "train", batch_size=size
        )
        loaders[part] = create_loader(
            data, input_size=(3, 32, 32), batch_size=size if part == "train" else 500, is_training=part == "train",
            use_prefetcher=False, no_aug=False, scale=(augment.crop_min, 1.0), color_jitter=None, mean=MEAN, std=STD,
            interpolation="bilinear", crop_pct=1.0, num_workers=options.workers, pin_memory=False,
            device=torch.device("cpu"),
        )  # fmt: skip
    classes = len(loaders["train"].dataset.reader.class_to_idx)
    net = timm_network(recipe.model, classes).to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(
        net, opt="nesterov", lr=optim.lr, weight_decay=optim.weight_decay, momentum=0.9
    )
    average = ModelEmaV3(net, decay=optim.ema_decay, use_warmup=True)
    steps = len(loaders["train"])
    scheduler = cosine(optimizer, options.epochs, steps)
    mixing = Mixup(
        mixup_alpha=0.0,
        cutmix_alpha=augment.cutmix,
        label_smoothing=augment.label_smoothing,
        num_classes=classes,
    )
    loss_of, updates = SoftTargetCrossEntropy(), 0
    for epoch in range(options.epochs):
        net.train()
        for images, labels in loaders["train"]:
            mixed, targets = mixing(images.to(memory_format=torch.channels_last), labels)
            with torch.autocast("cpu", torch.bfloat16, enabled=options.half):  # --amp --amp-dtype bfloat16
                loss = loss_of(net(mixed), targets)
            optimizer.zero_grad()
            loss.backward()
            dispatch_clip_grad(model_parameters(net, exclude_head=True), value=optim.clipping, mode="agc")
            optimizer.step()
            updates += 1
            average.update(net, step=updates)
            scheduler.step_update(num_updates=updates)
        scores = [top1(each, loaders["val"], options.half) for each in (net, average.module)]
        scheduler.step(epoch + 1)
        report(epoch + 1, *scores)


def cosine(optimizer: torch.optim.Optimizer, epochs: int, steps: int) -> Any:
    """Return timm's schedule of our recipe: a linear warm-up of two epochs, then a cosine to 0 at the last step.

    With `warmup_prefix`, timm adds the warm-up to the number of epochs.
    """
    from timm.scheduler import create_scheduler_v2

    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=max(1, epochs - WARMUP), warmup_epochs=WARMUP, warmup_lr=0.0,
        warmup_prefix=True, step_on_epochs=False, updates_per_epoch=steps,
    )  # fmt: skip
    return scheduler


# --- torchvision ------------------------------------------------------------------------------------------------


def torchvision_network(width: int, classes: int) -> ResNet:
    """Return torchvision's ResNet of basic blocks for images of 32 px: three stages of `width`, 2 and 4 times that."""
    net = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=classes)
    net.inplanes = width
    net.conv1, net.bn1, net.maxpool = (
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.Identity(),
    )
    for stage, blocks in enumerate(BASIC_LAYERS):
        made = net._make_layer(BasicBlock, width << stage, blocks, stride=2 if stage else 1)
        setattr(net, f"layer{stage + 1}", made)
    net.layer4, net.fc = nn.Identity(), nn.Linear(width << 2, classes)
    for module in net.modules():  # as in the constructor of ResNet
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def width_of(parameters: int, classes: int) -> int:
    """Return the width, in steps of 4, at which torchvision's ResNet comes closest to a number of parameters."""

    def size(width: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in torchvision_network(width, classes).parameters())

    return min(range(8, 257, 4), key=lambda width: abs(size(width) - parameters))


def train_torchvision(options: argparse.Namespace) -> None:
    """Train by the recipe of torchvision's references: SGD, and a rate that falls to a tenth after each third.

    Their rate of 0.1 is for 256 images. The crop is the usual one for CIFAR-10, since theirs cuts to 8 % of an image.
    """
    recipe = cifar()
    size = options.batch_size
    tail = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    transforms = {
        "train": v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *tail]), "val": v2.Compose(tail),
    }  # fmt: skip
    loaders = {
        part: torch.utils.data.DataLoader(
            ImageFolder(str(options.folder / part), transform), batch_size=size if part == "train" else 500,
            shuffle=part == "train", drop_last=part == "train", num_workers=options.workers,
            persistent_workers=options.workers > 0,
        )
        for part, transform in transforms.items()
    }  # fmt: skip
    classes = len(loaders["train"].dataset.classes)  # type: ignore[attr-defined]  # ImageFolder
    ours = create_model(recipe.model, num_classes=classes)
    net = torchvision_network(width_of(sum(p.numel() for p in ours.parameters()), classes), classes)
    net = net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 0.1 * size / 256, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=-(-options.epochs // 3), gamma=0.1)
    for epoch in range(options.epochs):
        net.train()
        for images, labels in loaders["train"]:
            with torch.autocast("cpu", torch.bfloat16, enabled=options.half):
                loss = F.cross_entropy(net(images.to(memory_format=torch.channels_last)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        report(epoch + 1, top1(net, loaders["val"], options.half))


# --- both -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def top1(net: nn.Module, batches: Batches, half: bool) -> float:
    """Return the accuracy in percent; `half` uses autocast to bfloat16."""
    net.eval()
    right = total = 0
    for images, labels in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = net(images.to(memory_format=torch.channels_last))
        right += int((logits.argmax(dim=1) == labels).sum())
        total += len(labels)
    return 100.0 * right / total


def report(epoch: int, weights: float, average: float | None = None) -> None:
    """Print the scores after an epoch, as `normfree train` does."""
    averaged = "" if average is None else f"  averaged {average:.2f} %"
    print(f"epoch {epoch:5.1f}  top-1 {weights:.2f} %{averaged}", flush=True)


ARMS: dict[str, Callable[[argparse.Namespace], None]] = {"timm": train_timm, "torchvision": train_torchvision}

if __name__ == "__main__":
    main()
