"""How an image becomes a network's input, and how that is written in a model folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from normfree.data.transforms.evaluate import CROP_PADDING, EVAL_CROPS, eval_transform
from normfree.data.transforms.normalize import IMAGENET_MEAN, IMAGENET_STD
from normfree.models.net import Net

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the network's input: RGB -> 3 S S, normalized. `crop`, `crop_pct` and
    `antialias` as in `eval_transform`; False is what DeepMind's weights were evaluated with."""

    image_size: int
    crop: str = "resize_crop_32"
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    antialias: bool = True
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def transform(self) -> Callable[[Image], Tensor]:
        """RGB picture -> grey levels 3 S S, uint8 if antialiased; `normalize` with mean and std does the rest."""
        return eval_transform(
            image_size=self.image_size,
            crop=self.crop,
            crop_pct=self.crop_pct,
            interpolation=self.interpolation,
            antialias=self.antialias,
        )

    def to_config(self) -> dict[str, Any]:
        """The same in timm's words, for `pretrained_cfg` of a config.json. `crop_resize`, which timm lacks, becomes
        its nearest (timm resizes, then crops), and so does resizing without antialiasing."""
        size = self.image_size
        # timm resizes to floor(S / crop_pct): half a pixel more keeps the quotient off the whole number below
        with_margin = size / (size + CROP_PADDING + 0.5)
        mode, pct = {
            "resize_crop_32": ("squash", with_margin),
            "crop_resize": ("center", with_margin),
        }.get(self.crop, (self.crop, self.crop_pct))
        return {
            "input_size": [len(self.mean), size, size], "crop_mode": mode, "crop_pct": pct,
            "interpolation": self.interpolation, "mean": list(self.mean), "std": list(self.std),
        }  # fmt: skip

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Preprocessing:
        """From a table of our own fields, as JSON brings it back, with lists for tuples."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**values)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocessing:
        """From timm's words. Test size and test crop are preferred, as in timm's own validation.

        Raises:
            ValueError: an entry is missing or makes no sense.
        """
        try:
            crop = config.get("crop_mode") or "center"
            if crop not in EVAL_CROPS:
                raise ValueError(f"crop_mode {crop!r}: known are {', '.join(EVAL_CROPS)}")
            return cls(
                image_size=int((config.get("test_input_size") or config["input_size"])[-1]),
                crop=crop,
                crop_pct=float(config.get("test_crop_pct") or config["crop_pct"]),
                interpolation=str(config["interpolation"]),
                mean=tuple(map(float, config["mean"])),
                std=tuple(map(float, config["std"])),
            )
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(
                f"pretrained_cfg of the model's config.json lacks or misstates {error}."
            ) from None


def assumed_preprocessing(net: Net, *, deepmind: bool) -> Preprocessing:
    """What weights without a folder were most likely made for: DeepMind's evaluation to the pixel, ours, or timm's."""
    half = (0.5,) * net.in_channels
    rgb = net.in_channels == 3 and net.name != "timm_test_nfnet"
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if rgb else (half, half)
    size = net.variant.test_size
    if not net.name.startswith("timm_") or net.name.startswith("timm_dm_"):
        # reference code: NFNets squash to S + 32, NF-RegNets and NF-ResNets keep the aspect; no antialiasing
        crop = "resize_crop_32" if net.name.startswith(("nfnet", "timm_dm")) else "crop_resize"
        return Preprocessing(size, crop=crop, antialias=not deepmind, mean=mean, std=std)
    # timm 1.0.31, default_cfgs of models/nfnet.py: crop_pct is 0.9 but for these
    special = {"timm_nf_resnet50": 0.94, "timm_test_nfnet": 0.95}
    light = net.name.startswith(("timm_nfnet_l", "timm_eca_nfnet_l"))
    crop_pct = 1.0 if light else special.get(net.name, 0.9)
    return Preprocessing(size, crop="center", crop_pct=crop_pct, mean=mean, std=std)
