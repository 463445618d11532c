"""Recipes: functions that return a `Config`. Each states command, hardware, time and accuracy seen, or "not yet run".

Derived numbers are computed here, so that they stay derived. No torch in this file.
"""

from __future__ import annotations

from collections.abc import Callable

from normfree.train.config import Augment, Config, Input, Log, Net, Optim


def demo() -> Config:
    """The main job: a small NF-ResNet with AGC on the embedded emoji, 72 px pictures in nine groups.

    Command: `normfree train`. Two cores of an AMD EPYC: 188 s, top-1 72.7 % on 374 unseen emoji (seed 0; three
    seeds, averaged weights: 70.9 ± 1.1 %; largest class 19.3 %).
    """
    return Config(
        data="emoji",
        model="nf_resnet_micro_64",
        length="45ep",
        input=Input(batch_size=32, workers=0),  # small pictures in memory: a worker would only take a core
        augment=Augment(crop_min=0.4, mixup=0.2, cutmix=1.0),
        optim=Optim(lr=0.1, weight_decay=3e-4, clipping=0.05, warmup="2ep", ema_decay=0.999),
        log=Log(evaluate_every="5ep", checkpoint_every="10ep"),
    )


def scratch() -> Config:
    """A folder of one's own from random weights: the NFNet recipe of [B], at a batch that fits one device.

    Sizes, dropout, stochastic depth and RandAugment come from the model's row. λ is above the paper's 0.01
    because small batches want more ([B] section 4.1), and branches start open: in the few thousand steps of a small
    folder a skip gain that starts at 0 would hardly move. Command: `normfree train --data photos/`. Not yet run
    at full size.
    """
    batch_size = 32
    return Config(
        model="nfnet_f0",
        length="90ep",
        net=Net(skip_gain=1.0),
        input=Input(batch_size=batch_size, workers=4),
        augment=Augment(randaugment="auto", mixup=0.2, cutmix=1.0),
        optim=Optim(lr=0.1 * batch_size / 256, clipping=0.04),
    )


def cifar() -> Config:
    """CIFAR-10 with a small NF-ResNet: `normfree train cifar --input.download true`. Not yet run to the end."""
    return Config(
        data="cifar10",
        model="nf_resnet_micro",
        length="30ep",
        input=Input(image_size=32, batch_size=128, workers=2),
        augment=Augment(crop_min=0.5, cutmix=1.0),
        optim=Optim(lr=0.2, weight_decay=5e-4, clipping=0.02, warmup="2ep", ema_decay=0.999),
    )


#: Recipes by the name that `normfree train NAME` takes.
RECIPES: dict[str, Callable[[], Config]] = {"demo": demo, "scratch": scratch, "cifar": cifar}
