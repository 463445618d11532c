from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from normfree.data.transforms.evaluate import eval_transform
from normfree.data.transforms.mixing import mix
from normfree.data.transforms.normalize import IMAGENET_MEAN, IMAGENET_STD, normalize
from normfree.data.transforms.train import train_transform


def gradient(width: int, height: int) -> Image.Image:
    u, v = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([u * 255 / width, v * 255 / height, 0 * u], axis=2).astype(np.uint8))


def text_of(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        call()
    return str(caught.value)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- one image


def test_training_images_are_uint8_squares_that_follow_torchs_generator() -> None:
    transform = train_transform(image_size=24, randaugment="tv:2x9")
    torch.manual_seed(3)
    first, second = transform(gradient(60, 40)), transform(gradient(60, 40))
    assert (first.dtype, first.shape) == (torch.uint8, (3, 24, 24))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(transform(gradient(60, 40)), first)


def test_the_whole_area_without_a_flip_is_the_image() -> None:
    transform = train_transform(image_size=32, crop_min=1.0, crop_ratio=(1, 1), flip=0.0)
    image = gradient(32, 32)
    assert np.array_equal(transform(image).permute(1, 2, 0).numpy(), np.asarray(image))
    mirror = train_transform(image_size=32, crop_min=1.0, crop_ratio=(1, 1), flip=1.0)
    assert torch.equal(mirror(image), transform(image).flip(2))


def test_crops_keep_to_their_share_of_the_area() -> None:
    transform = train_transform(image_size=64, crop_min=0.25, crop_ratio=(1, 1), flip=0.0)
    torch.manual_seed(0)
    spans = [
        float(x[0].max()) - float(x[0].min()) for x in (transform(gradient(128, 128)) for _ in range(200))
    ]
    # a square crop of share a spans sqrt(a) of a ramp from 0 to 253
    assert 0.25**0.5 * 253 - 8 <= min(spans) < 140
    assert 240 < max(spans) <= 254


def test_randaugment_shows_the_fill_where_it_moves_the_edge() -> None:
    image = Image.new("RGB", (32, 32), (255, 255, 255))
    transform = train_transform(
        image_size=32, crop_min=1.0, flip=0.0, randaugment="tv:1x30", fill=(7, 90, 200)
    )
    torch.manual_seed(0)
    corners = {tuple(transform(image)[:, 0, 0].tolist()) for _ in range(60)}
    assert (7, 90, 200) in corners


@pytest.mark.parametrize("text", ["2", "2x31", "0x9", "x", "on", "2x9x1", "rand-m9"])
def test_a_wrong_randaugment(text: str) -> None:
    assert text_of(lambda: train_transform(image_size=8, randaugment=text)) == (
        f"randaugment={text!r}. Allowed: 'off', 'trivial', '<layers>x<magnitude>' (DeepMind's operations, 10 is "
        "their full range), 'tv:<layers>x<magnitude>' (torchvision's, 30 is); magnitudes up to 30; "
        "'simclr:<strength>'. Fix: randaugment='4x5'."
    )


def test_wrong_options_of_the_transforms() -> None:
    assert text_of(lambda: train_transform(image_size=8, crop_min=0.0)) == (
        "crop_min=0.0. Allowed: above 0, up to 1 (the whole area). Fix: crop_min=0.08."
    )
    assert text_of(lambda: train_transform(image_size=8, crop_ratio=(2, 1))) == (
        "crop_ratio=(2, 1). Allowed: two positive numbers, the smaller first. Fix: crop_ratio=(0.75, 1.333)."
    )
    assert text_of(lambda: train_transform(image_size=8, flip=2.0)) == (
        "flip=2.0. Allowed: a probability, 0 to 1. Fix: flip=0.5."
    )
    assert text_of(lambda: train_transform(image_size=8, interpolation="cubic")) == (
        "interpolation='cubic'. Allowed: bicubic, bilinear, nearest. Fix: interpolation='bicubic'."
    )
    assert text_of(lambda: eval_transform(image_size=8, crop="resize_crop")) == (
        "crop='resize_crop'. Allowed: resize_crop_32, crop_resize, squash, center, letterbox. "
        "Fix: crop='resize_crop_32'."
    )
    assert text_of(lambda: eval_transform(image_size=0)) == (
        "image_size=0. Allowed: 1 pixel or more. Fix: image_size=64."
    )


@pytest.mark.parametrize("size", [(1, 9000), (9000, 1), (3, 700)])
def test_a_long_thin_image_costs_no_more_than_its_crop(size: tuple[int, int]) -> None:
    image = gradient(*size)
    out = eval_transform(image_size=32, crop="center", crop_pct=0.9)(
        image
    )  # 35 x 315,000 if done in two steps
    assert out.shape == (3, 32, 32)
    assert (
        int(out[:2].float().std(dim=(1, 2)).min()) < 40
    )  # the middle of a ramp hardly changes along its length


def test_resize_crop_32_cuts_16_pixels_on_each_side() -> None:
    # An image of exactly S + 32 pixels is not resampled: the center comes back untouched.
    image = gradient(96, 96)
    out = eval_transform(image_size=64)(image)
    assert np.array_equal(out.permute(1, 2, 0).numpy(), np.asarray(image)[16:80, 16:80])


def test_crop_resize_keeps_the_aspect() -> None:
    # side = 32 / (32 + 32) * min(100, 64) = 32: nothing is resampled; offsets (100 - 32 + 1) // 2, (64 - 32 + 1) // 2
    image = gradient(100, 64)
    out = eval_transform(image_size=32, crop="crop_resize")(image)
    assert np.array_equal(out.permute(1, 2, 0).numpy(), np.asarray(image)[16:48, 34:66])


def test_squash_sees_everything() -> None:
    image = gradient(40, 40)
    out = eval_transform(image_size=40, crop="squash")(image)
    assert np.array_equal(out.permute(1, 2, 0).numpy(), np.asarray(image))
    wide = eval_transform(image_size=16, crop="squash")(gradient(64, 32))
    assert wide.shape == (3, 16, 16)
    assert float(wide[0, :, 0].float().mean()) < 16
    assert float(wide[0, :, -1].float().mean()) > 235


def test_resizing_is_antialiased() -> None:
    checkers = Image.fromarray(((np.indices((96, 96)).sum(0) % 2) * 255).astype(np.uint8)).convert("RGB")
    for crop in ("squash", "crop_resize", "resize_crop_32"):
        out = eval_transform(image_size=12, crop=crop)(checkers).float()
        assert (out - 127.5).abs().max() < 16, crop


def test_evaluation_needs_no_torchvision() -> None:
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "from normfree.data.transforms.evaluate import eval_transform\nfrom normfree.data.transforms.normalize import normalize\n"  # noqa: E501
        "from normfree.data.loader import eval_batches\n"
        "from PIL import Image; print(tuple(eval_transform(image_size=8)(Image.new('RGB', (9, 9))).shape))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert out.stdout.strip() == "(3, 8, 8)"


# --- batches


def test_normalize_is_the_formula() -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(1, 3, 1).view(1, 3, 16, 16)
    expected = [(images[0, c].double() / 255 - IMAGENET_MEAN[c]) / IMAGENET_STD[c] for c in range(3)]
    torch.testing.assert_close(
        normalize(images, dtype=torch.float64)[0], torch.stack(expected), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(normalize(images)[0].double(), torch.stack(expected), rtol=0, atol=2e-6)
    assert normalize(images, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(normalize(images[:, :1], mean=(0,), std=(1 / 255,)), images[:, :1].float())
    assert text_of(lambda: normalize(images[:, :1])) == (
        "3 means and 3 deviations for 1 channels. "
        "Allowed: one of each per channel. Fix: give as many numbers as the images have channels."
    )


def batch(n: int = 16, size: int = 12) -> tuple[Tensor, Tensor]:
    # image i has the value i everywhere and the label i: the content of a mix is visible in its values
    return torch.arange(n).float().view(n, 1, 1, 1).expand(n, 3, size, size).clone(), torch.arange(n)


def test_without_mixing_labels_become_one_hot_and_smoothing_is_the_formula() -> None:
    images, labels = batch()
    same, targets = mix(images, labels, num_classes=16, generator=generator())
    assert torch.equal(same, images)
    assert torch.equal(targets, torch.eye(16))
    _, smooth = mix(images, labels, num_classes=16, generator=generator(), label_smoothing=0.1)
    torch.testing.assert_close(smooth, torch.eye(16) * 0.9 + 0.1 / 16)


@pytest.mark.parametrize("options", [{"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}])
@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_targets_say_exactly_what_is_in_the_image(options: dict[str, float], n: int) -> None:
    images, labels = batch(n)
    for seed in range(5):
        mixed, targets = mix(images, labels, num_classes=n, generator=generator(seed), **options)
        torch.testing.assert_close(targets.sum(1), torch.ones(n))
        # the mean of image i is sum_k targets[i, k] * k, since image k has the value k
        torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ labels.float(), rtol=1e-5, atol=1e-5)
        assert int((targets > 0).sum(1).max()) <= 2


def test_mixup_is_one_blend_per_example_and_cutmix_a_box() -> None:
    images, labels = batch(64)
    mixed, targets = mix(images, labels, num_classes=64, generator=generator(), mixup=1.0, cutmix=1.0)
    for i in range(32):
        assert mixed[i].unique().numel() == 1  # a blend of two flat images is flat
    weights = targets[torch.arange(32), labels[:32]]
    assert weights.unique().numel() == 32  # one lambda per example, not per batch
    for i in range(32, 64):
        own = mixed[i, 0] == i
        assert mixed[i].unique().numel() <= 2
        rows, columns = own.any(1).nonzero().flatten(), own.any(0).nonzero().flatten()
        assert int(own.sum()) == len(rows) * len(columns)  # the own part is one full rectangle
        assert float(targets[i, i]) == pytest.approx(float(own.float().mean()))


def test_no_example_is_mixed_with_itself() -> None:
    images, labels = batch(8)
    for seed in range(100):
        _, targets = mix(images, labels, num_classes=8, generator=generator(seed), mixup=1.0)
        assert (targets.diagonal() < 1).all()


def test_mixup_weights_follow_the_beta_distribution() -> None:
    images, labels = batch(1000, size=1)
    weights = torch.cat(
        [
            mix(images, labels, num_classes=1000, generator=generator(seed), mixup=0.2)[1].diagonal()
            for seed in range(4)
        ]
    )
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)) = 0.1786 for a = 0.2
    assert float(weights.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(weights.var()) == pytest.approx(0.1786, abs=0.01)


def test_cutmix_boxes_have_the_expected_area() -> None:
    # u uniform, side sqrt(1 - u) =: s, so p(s) = 2 s; the expected share of an axis, clipped at the border about a
    # uniform center, is s - s^2 / 4, so the own share is int_0^1 2 s (s - s^2/4)^2 ds = 1/2 - 1/5 + 1/48 = 0.3208
    images, labels = torch.zeros(4000, 1, 64, 64), torch.zeros(4000, dtype=torch.int64)
    labels[::2] = 1
    images[::2] = 1
    own = []
    for seed in range(4):
        mixed, targets = mix(images, labels, num_classes=2, generator=generator(seed), cutmix=1.0)
        share = targets[torch.arange(4000), labels]
        if float(share.min()) < 1:  # an odd shift: the partner has the other label
            own.append(float(share.mean()))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), targets[:, 1])
    assert own
    # box sides are rounded down to even numbers of pixels: about 1.5 of 64 on average
    assert np.mean(own) == pytest.approx(0.3208 - 0.02, abs=0.02)


def test_mixing_repeats_with_the_generator_and_commutes_with_normalizing() -> None:
    raw = torch.randint(0, 256, (8, 3, 10, 10), generator=generator(5), dtype=torch.uint8)
    labels = torch.arange(8)
    state = torch.get_rng_state()
    a, ta = mix(normalize(raw), labels, num_classes=8, generator=generator(2), mixup=0.2, cutmix=1.0)
    b, tb = mix(raw.float(), labels, num_classes=8, generator=generator(2), mixup=0.2, cutmix=1.0)
    c, _ = mix(raw.float(), labels, num_classes=8, generator=generator(3), mixup=0.2, cutmix=1.0)
    assert torch.equal(ta, tb)
    torch.testing.assert_close(a, normalize(b), rtol=0, atol=1e-5)
    assert not torch.equal(b, c)
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_options_of_mix() -> None:
    images, labels = batch(2)

    def call(**options: float) -> Callable[[], object]:
        return lambda: mix(images, labels, num_classes=2, generator=generator(), **options)

    assert text_of(lambda: mix(images.byte(), labels, num_classes=2, generator=generator())) == (
        "mix of torch.uint8 images. Allowed: floating point. Fix: images = normalize(images)."
    )
    assert text_of(call(mixup=-0.1)) == "mixup=-0.1. Allowed: 0 (off) or more. Fix: mixup=0."
    assert text_of(call(cutmix=-1.0)) == "cutmix=-1.0. Allowed: 0 (off) or more. Fix: cutmix=0."
    assert text_of(call(label_smoothing=1.0)) == (
        "label_smoothing=1.0. Allowed: 0 (off) up to, not including, 1. Fix: label_smoothing=0.1."
    )
