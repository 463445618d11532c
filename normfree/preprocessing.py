"""Preprocessing of images for a network, and its form in the `config.json` of a model folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from normfree.data.transforms.decode import FULL_RANGE
from normfree.data.transforms.evaluate import CROP_PADDING, EVAL_CROPS, EvalTransform, eval_transform
from normfree.data.transforms.normalize import IMAGENET_MEAN, IMAGENET_STD, height_and_width
from normfree.models.net import Net
from normfree.models.variant import LARGEST
from normfree.suggest import problem, unknown

# crop_pct of timm's variants: 1 for the light NFNets (L0 to L2), these values, and 0.9 for all others.
# Source: default_cfgs of models/nfnet.py, timm 1.0.31.
TIMM_CROP_PCT = {"timm_nf_resnet50": 0.94, "timm_test_nfnet": 0.95}

# Largest side in px that is scaled to the input size without a margin: at ImageNet sizes the margin is 32 px, which
# would cut away the content of a small image.
SQUASH_UP_TO = 96


@dataclass(frozen=True)
class Preprocessing:
    """How an RGB image becomes the input of a network, 3 S S, normalized.

    Attributes:
        image_size: image size S in pixels.
        crop: one of `EVAL_CROPS`.
        crop_pct: for "squash" and "center", S divided by the size of the resized image.
        interpolation: interpolation of the resize, for example "bicubic".
        antialias: False to resize without antialiasing, as in the evaluation of DeepMind's weights.
        mean: mean of each channel, for values from 0 to 1.
        std: standard deviation of each channel, for values from 0 to 1.
        pixel_range: value of white in 16-bit gray images, for those who decode files.

    Raises:
        ValueError: a value is not possible. A model folder may come from anywhere.
    """

    image_size: int | tuple[int, int]
    crop: str = "resize_crop_32"
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    antialias: bool = True
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    pixel_range: int = FULL_RANGE

    def __post_init__(self) -> None:
        size = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,)
        sizes, numbers = len(size) in (1, 2), isinstance(self.mean, tuple) and isinstance(self.std, tuple)
        for name, possible, allowed in (
            (
                "image_size",
                sizes and _all_in(size, 1, LARGEST, int),
                "a side of 1 or more, or height and width",
            ),
            ("mean", numbers and _all_in(self.mean, -LARGEST, LARGEST), "a number for each channel"),
            ("std", numbers and _all_in(self.std, 1 / LARGEST, LARGEST), "a number above 0 for each channel"),
            ("crop_pct", _all_in((self.crop_pct,), 0, 1), "above 0, up to 1"),
            ("antialias", type(self.antialias) is bool, "True or False"),
            ("pixel_range", _all_in((self.pixel_range,), 1, FULL_RANGE, int), f"1 to {FULL_RANGE:,}"),
        ):
            if not possible:
                raise ValueError(problem(f"{name}={getattr(self, name)!r}", allowed=allowed))
        if not 1 <= len(self.mean) == len(self.std):
            raise ValueError(problem(f"mean={self.mean}, std={self.std}", allowed="as many of both"))
        self.transform()  # refuses the other options

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the inputs of the network."""
        return len(self.mean), *height_and_width(self.image_size)

    def transform(self) -> EvalTransform:
        """Return a function from an RGB image to 3 H W values from 0 to 255, uint8 if antialiased.

        Apply `normalize` with `mean` and `std` to its result; it converts to gray if they have one number.
        """
        return eval_transform(
            image_size=self.image_size,
            crop=self.crop,
            crop_pct=self.crop_pct,
            interpolation=self.interpolation,
            antialias=self.antialias,
        )

    def to_config(self) -> dict[str, Any]:
        """Return the preprocessing with timm's keys, for `pretrained_cfg` of a config.json.

        timm has no "crop_resize" and always uses antialiasing. These are approximated by the most similar settings;
        "letterbox" is what timm calls "border".
        """
        size = min(self.shape[1:])
        # timm resizes to floor(S / crop_pct). Half a pixel more protects the floor from rounding errors.
        with_margin = size / (size + CROP_PADDING + 0.5)
        mode, pct = {
            "resize_crop_32": ("squash", with_margin),
            "crop_resize": ("center", with_margin),
            "letterbox": ("border", 1.0),
        }.get(self.crop, (self.crop, self.crop_pct))
        return {
            "input_size": list(self.shape), "crop_mode": mode, "crop_pct": pct,
            "interpolation": self.interpolation, "mean": list(self.mean), "std": list(self.std),
        }  # fmt: skip

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Preprocessing:
        """Create a `Preprocessing` from a dict of its fields as read from JSON, with lists instead of tuples."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**values)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocessing:
        """Create a `Preprocessing` from a `pretrained_cfg` with timm's keys.

        Test size and test crop are preferred, as in timm's own validation.

        Raises:
            ValueError: an entry is missing or invalid.
        """
        try:
            crop = config.get("crop_mode") or "center"
            crop = "letterbox" if crop == "border" else crop
            height, width = map(int, (config.get("test_input_size") or config["input_size"])[-2:])
            if crop not in EVAL_CROPS:
                raise ValueError(unknown("crop_mode", crop, EVAL_CROPS).rstrip("."))
            return cls(
                image_size=height if height == width else (height, width),
                crop=crop,
                crop_pct=float(config.get("test_crop_pct") or config["crop_pct"]),
                interpolation=str(config["interpolation"]),
                mean=tuple(map(float, config["mean"])),
                std=tuple(map(float, config["std"])),
            )
        except (KeyError, TypeError, IndexError, ValueError, OverflowError) as error:
            raise ValueError(
                f"pretrained_cfg of the model's config.json has a missing or invalid entry: {error}."
            ) from None


def _all_in(values: tuple[object, ...], least: float, most: float, *kinds: type) -> bool:
    """Return True if all values are numbers of these kinds, by default integers or floats, from `least` to `most`."""
    return all(type(value) in (kinds or (int, float)) and least <= value <= most for value in values)  # type: ignore[operator]


def assumed_preprocessing(net: Net, *, deepmind: bool) -> Preprocessing:
    """Return the preprocessing that weights without a model folder were most likely trained with.

    Args:
        net: the network.
        deepmind: True for weights in DeepMind's format, which were evaluated without antialiasing.
    """
    pre = published_preprocessing(net.name, net.variant.test_size, deepmind=deepmind)
    if net.in_channels == 3:
        return pre
    half = (0.5,) * net.in_channels
    return replace(pre, mean=half, std=half)


def published_preprocessing(name: str, image_size: int, *, deepmind: bool = False) -> Preprocessing:
    """Return the preprocessing of RGB images that a variant is evaluated with in the code that it comes from.

    Args:
        name: name of the variant.
        image_size: size of the images in pixels.
        deepmind: True for weights in DeepMind's format, which were evaluated without antialiasing.

    Source: evaluation of the reference code; `default_cfgs` of timm 1.0.31 for variants of timm.
    """
    if not name.startswith("timm_") or name.startswith("timm_dm_"):
        # Reference code: NFNets resize to a square of S + 32; NF-RegNets and NF-ResNets keep the aspect ratio.
        crop = "resize_crop_32" if name.startswith(("nfnet", "timm_dm")) else "crop_resize"
        return Preprocessing(image_size, crop=crop, antialias=not deepmind)
    light = name.startswith(("timm_nfnet_l", "timm_eca_nfnet_l"))
    crop_pct = 1.0 if light else TIMM_CROP_PCT.get(name, 0.9)
    pre = Preprocessing(image_size, crop="center", crop_pct=crop_pct)
    half = (0.5, 0.5, 0.5)
    return replace(pre, mean=half, std=half) if name == "timm_test_nfnet" else pre
