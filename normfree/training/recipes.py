"""Recipes: functions that return a `Config`.

Each docstring gives the command and the measured hardware, time and accuracy, or "Not yet run". Values that follow from
others are computed, for example the learning rate from the batch size. This file does not import PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from normfree.training.config import AugmentConfig, Config, InputConfig, LogConfig, NetConfig, OptimConfig


def demo() -> Config:
    """A small NF-ResNet with AGC on the embedded emoji: 72 px images in nine classes. The default recipe.

    Command: `normfree train`. Measured on two cores of an AMD EPYC: 169 s; top-1 on 374 held-out emoji with seed 0:
    72.2 %, and 68.7 % after a change that affects only rounding (before this change, over three seeds, averaged
    weights: 70.9 ± 1.1 %). The largest class has 19.3 % of the images. Half of these emoji have since become the test
    part; the training images are the same.
    """
    return Config(
        data="emoji",
        model="nf_resnet_micro_64",
        length="45ep",
        # The images are small and in memory: a worker would only occupy a core.
        input=InputConfig(batch_size=32, workers=0, test_fraction=0.1),
        augment=AugmentConfig(crop_min=0.4, mixup=0.2, cutmix=1.0),
        optim=OptimConfig(lr=0.1, weight_decay=3e-4, clipping=0.05, warmup="2ep", ema_decay=0.999),
        log=LogConfig(evaluate_every="5ep", checkpoint_every="10ep"),
    )


def scratch() -> Config:
    """Training on your own folder from random weights: the NFNet recipe of [B] with a batch that fits on one device.

    The network is NFNet-F0 if it fits in the memory of the GPU, else a smaller one, and without a GPU that of the demo;
    `--model NAME` names another. Image sizes, dropout, stochastic depth and RandAugment come from its variant. The
    clipping threshold λ is above the paper's 0.01 because small batches need a larger one ([B] section 4.1). Skip gains
    start at 1 because in the few thousand steps of a small folder a skip gain that starts at 0 would hardly change.
    Command: `normfree train --data photos/`. Not yet run at full size.
    """
    batch_size = 32
    return Config(
        model="fit",
        length="90ep",
        net=NetConfig(skip_gain=1.0),
        input=InputConfig(batch_size=batch_size, workers="auto", test_fraction=0.1),
        augment=AugmentConfig(randaugment="auto", mixup=0.2, cutmix=1.0),
        optim=OptimConfig(lr=0.1 * batch_size / 256, clipping=0.04),
    )


def cifar() -> Config:
    """A small NF-ResNet on CIFAR-10. A tenth of the training images validates; the published test part is scored once.

    Command: `normfree train cifar --data cifar10:download=yes`. Not yet run to the end.
    """
    return Config(
        data="cifar10",
        model="nf_resnet_micro",
        length="30ep",
        input=InputConfig(image_size=32, batch_size=128, workers="auto", test_fraction=0.1),
        augment=AugmentConfig(crop_min=0.5, cutmix=1.0),
        optim=OptimConfig(lr=0.2, weight_decay=5e-4, clipping=0.02, warmup="2ep", ema_decay=0.999),
    )


def finetune() -> Config:
    """Fine-tuning a trained network on your own folder; the classifier is replaced if the classes differ.

    The network and the image sizes come from the weights. Low learning rate, moderate crops, no mixing, and a weight
    average over about a hundred steps; skip gains are already trained. The run ends when a third of its length has
    brought no better score. A shorter patience can mistake the noise at the high learning rates early in the cosine
    schedule for a plateau. The published fine-tuning (`imagenet_finetune`) is for millions of images.
    Command: `normfree train finetune --data photos/ --weights FOLDER`. Measured with learning rate 0.08 on 1,313
    photographs of solar cells in four grades, starting from nf_resnet_nano_64 trained on emoji: 69.1 ± 0.1 % of 1,311
    test images (largest class 57.5 %). Not yet run on a large network.
    """
    epochs = 30
    return Config(
        model="auto",
        length=f"{epochs}ep",
        patience=epochs // 3,
        input=InputConfig(batch_size=32, workers="auto", test_fraction=0.1),
        augment=AugmentConfig(crop_min=0.4),
        optim=OptimConfig(lr=0.02, weight_decay=1e-5, clipping=0.04, warmup="1ep", ema_decay=0.99),
    )


def simclr() -> Config:
    """Contrastive learning without labels: two views of each image get similar embeddings (SimCLR).

    Works on class folders, whose labels only the scores use, and on a flat folder of images. Crops, colors and
    temperature are those of SimCLR for small images (arXiv 2002.05709, appendix B.9, which also leaves the blur out). A
    batch of 512 holds 256 images. `--input.micro_batch 64` needs less memory and gives the same gradient.
    Command: `normfree train simclr --data photos/`. Not yet run to the end.
    """
    batch_size = 512
    return Config(
        data="emoji",
        model="nf_resnet_micro_64",
        objective="simclr:temperature=0.2,dim=128",
        length="200ep",
        net=NetConfig(drop_rate=0.0, stochdepth_rate=0.0),
        input=InputConfig(batch_size=batch_size, workers="auto", test_fraction=0.1),
        augment=AugmentConfig(repeats=2, randaugment="simclr:0.5"),
        optim=OptimConfig(
            lr=0.15 * batch_size / 256, weight_decay=1e-4, clipping=0.08, warmup="10ep", ema_decay=0.99
        ),
        log=LogConfig(evaluate_every="20ep", checkpoint_every="20ep"),
    )


def metric() -> Config:
    """Metric learning on class folders: images of a class get similar embeddings (triplets with the hardest examples).

    The embedding is the network's pooled features. Each image occurs twice in a batch, so it always has a positive.
    Command: `normfree train metric --data photos/`. Not yet run to the end.
    """
    return simclr().model_copy(update={"objective": "triplet:margin=0.2,mining=hard"})


def private() -> Config:
    """Differentially private training: DP-SGD with the choices of De et al. 2022 (arXiv 2204.13650).

    No normalization, dropout or mixing; four augmented copies of each image, whose gradients are averaged before they
    are clipped; a large batch, plain SGD at a constant rate, and a weight average. A batch of 2048 holds 512 images.
    Noise and sampling come from a secret key; needs `pip install 'normfree[private]'`, the accountants of Opacus.
    Command: `normfree train private --data photos/ --privacy epsilon=8,delta=1e-5,clip=1.0`. Not yet run to the end.
    """
    copies = 4
    return Config(
        data="cifar10",
        model="nf_resnet_nano",
        length=f"{15 * copies}ep",
        precision="float32",  # so that the norms of gradients are exact
        net=NetConfig(drop_rate=0.0, stochdepth_rate=0.0, skip_gain=1.0),
        input=InputConfig(
            image_size=32, batch_size=512 * copies, micro_batch=64 * copies, workers=2, test_fraction=0.1
        ),
        augment=AugmentConfig(crop_min=0.6, repeats=copies, label_smoothing=0.0),
        optim=OptimConfig(
            optimizer="sgd:momentum=0,nesterov=no",
            schedule="constant",
            lr=2.0,
            weight_decay=0.0,
            warmup="0ep",
            clip="private:epsilon=8,delta=1e-05",
            clipping=1.0,
            ema_decay=0.99,
        ),
        log=LogConfig(evaluate_every="5ep"),
    )


# --- recipes of the papers --------------------------------------------------------------------------------------

# Folder with train/ and val/, each with one folder per class. Use --data FOLDER for another one.
_IMAGENET = "data/imagenet"


def imagenet_nfnet(level: int) -> Config:
    """NFNet-F{level} on ImageNet, with the published settings.

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
    """NF-RegNet-B{level} on ImageNet, with the settings of the released config.

    Batch 1024, 360 epochs, peak learning rate 0.4, no clipping, mixup and cutmix of fresh images, float32.
    Command: `normfree train imagenet-nf-regnet-b{level} --data FOLDER`. Not yet run. Published top-1: {top1}.
    """
    return Config(
        data=_IMAGENET,
        model=f"nf_regnet_b{level}",
        length="360ep",
        precision="float32",
        input=InputConfig(batch_size=1024, micro_batch=64, workers=16, eval_crop="crop_resize"),
        augment=AugmentConfig(mixup=0.2, cutmix=1.0, mix_with="fresh"),
        # These weight decays are from the released config; the listing in [A] has half of them.
        optim=OptimConfig(
            lr=0.4,
            schedule=f"warmup_cosine:final={0.001 / 0.4:g}",
            weight_decay=5e-5 + 1e-5 * level,
            clip="off",
        ),
        log=LogConfig(evaluate_every="5ep"),
    )


def agc_ablation(model: str, clip: str) -> Config:
    """{model} in the ablation of batch sizes, with clipping {clip}.

    [B] section 4.1 and appendix D: 90 epochs, learning rate 0.1 · batch / 256, only crops and flips. For other batch
    sizes, from 256 to 4096, set both: `--input.batch_size 4096 --optim.lr 1.6`.
    Command: `normfree train {name} --data FOLDER`. Not yet run. Published top-1 at batch 1024: {top1}.
    """
    batch_size = 1024
    return Config(
        data=_IMAGENET,
        model=model,
        length="90ep",
        precision="float32",
        net=NetConfig(stochdepth_rate=0.0),
        input=InputConfig(batch_size=batch_size, micro_batch=64, workers=16, image_size=224, eval_crop="crop_resize"),
        optim=OptimConfig(lr=0.1 * batch_size / 256, weight_decay=1e-4, clip="agc" if clip == "agc" else "off",
                    ema_decay=0.0),  # with decay 0 the average equals the weights
        log=LogConfig(evaluate_every="5ep"),
    )  # fmt: skip


def imagenet_finetune(model: str) -> Config:
    """Fine-tuning of {model} on ImageNet after large-scale pretraining.

    [B] section 5 and appendix: 15,000 steps with batch 2048, learning rate 0.1. NFNets add SAM with radius 0.05, weight
    decay 1e-5, dropout 0.25 and stochastic depth 0.1; ResNets use none of these and images of 384 px (the paper also
    reports 224 and 320).
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
    """Pretraining of {model} on a large labeled data set.

    As in [B] section 5 on JFT-300M: 224 px, only crops and flips, weight decay 1e-6 (ResNets: 1e-5, batch 1024,
    learning rate 0.4), no weight average.
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
    make: Callable[..., Config], name: str, arguments: dict[str, Any], **texts: str
) -> dict[str, Callable[[], Config]]:
    """Return {name: recipe}, where recipe() calls `make` with `arguments` and has its docstring, filled in."""

    def recipe() -> Config:
        return make(**arguments)

    recipe.__doc__ = (make.__doc__ or "").format(name=name, **arguments, **texts)
    return {name: recipe}


def _all() -> dict[str, Callable[[], Config]]:
    """Return all recipes by name."""
    recipes: dict[str, Callable[[], Config]] = {
        "demo": demo,
        "scratch": scratch,
        "finetune": finetune,
        "simclr": simclr,
        "metric": metric,
        "private": private,
        "cifar": cifar,
    }
    # [B] table 3. F6 was trained with SAM, whose radius (--optim.sam_rho) is not stated; F7 was not trained.
    for level, top1 in enumerate(("83.6", "84.7", "85.1", "85.7", "85.9", "86.0", "86.5 with SAM", "none")):
        recipes |= _named(imagenet_nfnet, f"imagenet-nfnet-f{level}", {"level": level}, top1=top1)
    # [A], figure of NF-RegNets with mixup and cutmix.
    for level, top1 in enumerate(("77.0", "78.7", "80.0", "81.2", "82.5", "83.0")):
        recipes |= _named(imagenet_nf_regnet, f"imagenet-nf-regnet-b{level}", {"level": level}, top1=top1)
    # [B] figure 2a at batch 1024
    for model, clip, top1 in (
        ("nf_resnet50", "agc", "76.95"), ("nf_resnet50", "off", "76.9"), ("resnet50", "off", "76.4"),
        ("nf_resnet200", "agc", "79.6"), ("nf_resnet200", "off", "79.5"), ("resnet200", "off", "78.9"),
    ):  # fmt: skip
        name = f"ablation-{model.replace('_', '-')}{'-agc' if clip == 'agc' else ''}"
        recipes |= _named(agc_ablation, name, {"model": model, "clip": clip}, top1=top1)
    for model in ("nfnet_f4_plus", "nfnet_f4", "nf_resnet50", "nf_resnet101", "nf_resnet152", "nf_resnet200"):
        suffix = model.replace("_", "-")
        recipes |= _named(large_pretraining, f"pretrain-{suffix}", {"model": model})
        recipes |= _named(imagenet_finetune, f"imagenet-finetune-{suffix}", {"model": model})
    return recipes


# Recipes by the NAME in `normfree train NAME`. The defaults of a recipe are RECIPES[NAME]().
RECIPES: dict[str, Callable[[], Config]] = _all()
# The recipe that `normfree train` runs if none is named.
DEFAULT_RECIPE = "demo"
