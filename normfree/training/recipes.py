"""Recipes: functions that return a `Config`. Each states command, hardware, time and accuracy seen, or "not yet run".

Derived numbers are computed here, so that they stay derived. No torch in this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from normfree.training.config import AugmentConfig, Config, InputConfig, LogConfig, NetConfig, OptimConfig


def demo() -> Config:
    """The main job: a small NF-ResNet with AGC on the embedded emoji, 72 px pictures in nine groups.

    Command: `normfree train`. Two cores of an AMD EPYC: 169 s; top-1 on 374 unseen emoji, seed 0: 72.2 %, and 68.7 %
    after a change in rounding alone (three seeds of the former, averaged weights: 70.9 ± 1.1 %; largest class 19.3 %).
    """
    return Config(
        data="emoji",
        model="nf_resnet_micro_64",
        length="45ep",
        input=InputConfig(
            batch_size=32, workers=0
        ),  # small pictures in memory: a worker would only take a core
        augment=AugmentConfig(crop_min=0.4, mixup=0.2, cutmix=1.0),
        optim=OptimConfig(lr=0.1, weight_decay=3e-4, clipping=0.05, warmup="2ep", ema_decay=0.999),
        log=LogConfig(evaluate_every="5ep", checkpoint_every="10ep"),
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
        net=NetConfig(skip_gain=1.0),
        input=InputConfig(batch_size=batch_size, workers=4),
        augment=AugmentConfig(randaugment="auto", mixup=0.2, cutmix=1.0),
        optim=OptimConfig(lr=0.1 * batch_size / 256, clipping=0.04),
    )


def cifar() -> Config:
    """CIFAR-10 with a small NF-ResNet: `normfree train cifar --data cifar10:download=yes`. Not yet run to the end."""
    return Config(
        data="cifar10",
        model="nf_resnet_micro",
        length="30ep",
        input=InputConfig(image_size=32, batch_size=128, workers=2),
        augment=AugmentConfig(crop_min=0.5, cutmix=1.0),
        optim=OptimConfig(lr=0.2, weight_decay=5e-4, clipping=0.02, warmup="2ep", ema_decay=0.999),
    )


def finetune() -> Config:
    """A folder of one's own from a trained network, with a new head if its classes are others.

    The network is the folder's, and so are the sizes, or the row's where they agree. A low rate, gentle crops, no
    mixing, an average over about a hundred steps; branches are open already. The run ends when a third of it has
    brought no better score: the rate falls to 0 along a cosine, so early on a shorter wait would take the noise of a
    high rate for a plateau. The published fine-tuning (`imagenet_finetune`) is for millions of images.
    Command: `normfree train finetune --data photos/ --weights FOLDER`. Seen, with rate 0.04, on 1,311 photographs of
    solar cells in four grades from the emoji's nf_resnet_nano_64: 70.6 ± 0.3 % (largest class 57.4 %). Not yet run on a
    large network.
    """
    epochs = 30
    return Config(
        model="auto",
        length=f"{epochs}ep",
        patience=epochs // 3,
        input=InputConfig(batch_size=32, workers=2),
        augment=AugmentConfig(crop_min=0.4),
        optim=OptimConfig(lr=0.02, weight_decay=1e-5, clipping=0.04, warmup="1ep", ema_decay=0.99),
    )


# --- the papers' --------------------------------------------------------------------------------------

_IMAGENET = "data/imagenet"  # train/ and val/, a folder for each class; say --data FOLDER for another place


def imagenet_nfnet(level: int) -> Config:
    """NFNet-F{level} on ImageNet, as published.

    Batch 4096, 360 epochs, AGC 0.01, half mixup and half cutmix of fresh images, RandAugment after mixing, bfloat16
    ([B] section 4.3 and table 1; released code).
    Command: `normfree train imagenet-nfnet-f{level} --data FOLDER`. Not yet run. Published top-1: {top1}.
    """
    batch_size = 4096
    return Config(
        data=_IMAGENET,
        model=f"nfnet_f{level}",
        length="360ep",
        precision="bfloat16",
        input=InputConfig(batch_size=batch_size, micro_batch=64, workers=16),
        augment=AugmentConfig(randaugment="auto", mixup=0.2, cutmix=1.0, mix_with="fresh"),
        optim=OptimConfig(lr=0.1 * batch_size / 256),
        log=LogConfig(evaluate_every="5ep"),
    )


def imagenet_nf_regnet(level: int) -> Config:
    """NF-RegNet-B{level} on ImageNet, as in the released config.

    Batch 1024, 360 epochs, peak rate 0.4, no clipping, mixup and cutmix of fresh images, float32.
    Command: `normfree train imagenet-nf-regnet-b{level} --data FOLDER`. Not yet run. Published top-1: {top1}.
    """
    return Config(
        data=_IMAGENET,
        model=f"nf_regnet_b{level}",
        length="360ep",
        input=InputConfig(batch_size=1024, micro_batch=64, workers=16, eval_crop="crop_resize"),
        augment=AugmentConfig(mixup=0.2, cutmix=1.0, mix_with="fresh"),
        # [A]'s listing halves these decays; the released config has them so
        optim=OptimConfig(lr=0.4, final_lr=0.001 / 0.4, weight_decay=5e-5 + 1e-5 * level, clip="off"),
        log=LogConfig(evaluate_every="5ep"),
    )


def agc_ablation(model: str, clip: str) -> Config:
    """{model} in the large-batch ablation, clipping {clip}.

    [B] section 4.1 and appendix D: 90 epochs, rate 0.1 · batch / 256, plain augmentation. For other batches, of 256 to
    4096: `--input.batch_size 4096 --optim.lr 1.6`.
    Command: `normfree train {name} --data FOLDER`. Not yet run. Published top-1 at batch 1024: {top1}.
    """
    batch_size = 1024
    return Config(
        data=_IMAGENET,
        model=model,
        length="90ep",
        net=NetConfig(stochdepth_rate=0.0),
        input=InputConfig(batch_size=batch_size, micro_batch=64, workers=16, image_size=224, eval_crop="crop_resize"),
        optim=OptimConfig(lr=0.1 * batch_size / 256, weight_decay=1e-4, clip="agc" if clip == "agc" else "off",
                    ema_decay=0.0),  # no average: it equals the weights
        log=LogConfig(evaluate_every="5ep"),
    )  # fmt: skip


def imagenet_finetune(model: str) -> Config:
    """{model}, from large-scale pretraining to ImageNet.

    [B] section 5 and appendix: 15,000 steps of 2048, rate 0.1. NFNets add SAM with 0.05, decay 1e-5, dropout 0.25 and
    stochastic depth 0.1; ResNets have none of these and see 384 px (the paper also gives 224 and 320).
    Command: `normfree train {name} --data FOLDER --weights FOLDER`. Not yet run: no such weights are public.
    """
    big = model.startswith("nfnet")
    return Config(
        data=_IMAGENET,
        model=model,
        length="15000st",
        precision="bfloat16",
        net=NetConfig(drop_rate=0.25 if big else 0.0, stochdepth_rate=0.1 if big else 0.0),
        input=InputConfig(batch_size=2048, micro_batch=64, workers=16, image_size="auto" if big else 384),
        optim=OptimConfig(lr=0.1, warmup="5000st", weight_decay=1e-5 if big else 0.0, ema_decay=0.9999,
                    sam_rho=0.05 if big else 0.0),
        log=LogConfig(evaluate_every="1000st", checkpoint_every="1000st"),
    )  # fmt: skip


def large_pretraining(model: str) -> Config:
    """{model}, pretraining on a large labelled set.

    As [B] section 5 did on JFT-300M: 224 px, crops and flips only, decay 1e-6 (ResNets 1e-5, batch 1024, rate 0.4), no
    average.
    Command: `normfree train {name} --data FOLDER`. Not yet run: that data set is not public.
    """
    big = model.startswith("nfnet")
    return Config(
        data="data/pretraining",
        model=model,
        length="40ep" if big else "10ep",
        precision="bfloat16",
        input=InputConfig(batch_size=4096 if big else 1024, micro_batch=64, workers=16, image_size=224),
        optim=OptimConfig(
            lr=1.6 if big else 0.4, weight_decay=1e-6 if big else 1e-5, warmup="5000st", ema_decay=0.0
        ),
        log=LogConfig(evaluate_every="1ep", checkpoint_every="1ep"),
    )


def _named(
    make: Callable[..., Config], name: str, arguments: dict[str, Any], **words: str
) -> dict[str, Callable[[], Config]]:
    """`make` with its arguments given, under `name`, with a docstring that says which one it is."""

    def recipe() -> Config:
        return make(**arguments)

    recipe.__doc__ = (make.__doc__ or "").format(name=name, **arguments, **words)
    return {name: recipe}


def _all() -> dict[str, Callable[[], Config]]:
    recipes: dict[str, Callable[[], Config]] = {
        "demo": demo,
        "scratch": scratch,
        "finetune": finetune,
        "cifar": cifar,
    }
    # [B] table 3; F6 was trained with SAM at a distance that the paper does not state (--optim.sam_rho), F7 not at all
    for level, top1 in enumerate(("83.6", "84.7", "85.1", "85.7", "85.9", "86.0", "86.5 with SAM", "none")):
        recipes |= _named(imagenet_nfnet, f"imagenet-nfnet-f{level}", {"level": level}, top1=top1)
    for level, top1 in enumerate(
        ("77.0", "78.7", "80.0", "81.2", "82.5", "83.0")
    ):  # [A] figure, mixup and cutmix
        recipes |= _named(imagenet_nf_regnet, f"imagenet-nf-regnet-b{level}", {"level": level}, top1=top1)
    # [B] figure 2a at batch 1024
    for model, clip, top1 in (
        ("nf_resnet50", "agc", "76.95"), ("nf_resnet50", "off", "76.9"), ("resnet50", "off", "76.4"),
        ("nf_resnet200", "agc", "79.6"), ("nf_resnet200", "off", "79.5"), ("resnet200", "off", "78.9"),
    ):  # fmt: skip
        name = f"ablation-{model.replace('_', '-')}{'-agc' if clip == 'agc' else ''}"
        recipes |= _named(agc_ablation, name, {"model": model, "clip": clip}, top1=top1)
    for model in ("nfnet_f4_plus", "nfnet_f4", "nf_resnet50", "nf_resnet101", "nf_resnet152", "nf_resnet200"):
        word = model.replace("_", "-")
        recipes |= _named(large_pretraining, f"pretrain-{word}", {"model": model})
        recipes |= _named(imagenet_finetune, f"imagenet-finetune-{word}", {"model": model})
    return recipes


#: Recipes by the name that `normfree train NAME` takes.
RECIPES: dict[str, Callable[[], Config]] = _all()
