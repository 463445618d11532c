"""Tests of `FreshPairs` against numbers of the reference code's doubled batch, and of its properties."""

from pathlib import Path

import numpy as np
import pytest
import torch

from normfree.data.loader import train_batches
from normfree.data.source import ArraySource
from normfree.data.transforms.mixing import FreshPairs, paired_targets, smooth
from normfree.data.transforms.train import AfterMixing, train_transform

REFERENCE = dict(np.load(Path(__file__).parents[2] / "reference" / "augment.npz"))


class Told:
    """A generator that returns the numbers drawn by the reference code."""

    def __init__(self, ratio):
        self.ratio = ratio

    def beta(self, *_):
        return self.ratio


def chw(image):
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def test_the_reference_batch_from_its_own_draws(monkeypatch):
    """Check which images are paired (quarters), how they are mixed, and the weights of their labels."""
    images, labels, masks = REFERENCE["mix|images"], REFERENCE["mix|labels"], REFERENCE["mix|mask"]
    pairs = FreshPairs(mixup=0.2, cutmix=1.0)
    for output in range(4):
        own, other, cut = pairs.positions(output, 4)
        assert cut == (output >= 2)
        assert labels[own] == REFERENCE["mixed|labels"][output]
        assert labels[other] == REFERENCE["mixed|mix_labels"][output]
        mask = masks[own][None].transpose(0, 3, 1, 2).astype(np.float32)
        monkeypatch.setattr("normfree.data.transforms.mixing._boxes", lambda *_, mask=mask: mask)
        rng = Told(REFERENCE["mix|mixup_ratio"][own])
        mixed, share = pairs.combine(chw(images[own]), chw(images[other]), cut=cut, rng=rng)
        torch.testing.assert_close(mixed, chw(REFERENCE["mixed|images"][output]), rtol=0, atol=1e-4)
        assert share == pytest.approx(float(REFERENCE["mixed|ratio"][output]), abs=1e-6)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0.0), (0.0, 1.0), (0.2, 1.0)])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_every_image_that_is_read_is_used_once(mixup, cutmix, batch_size):
    pairs = FreshPairs(mixup=mixup, cutmix=cutmix)
    used = [position for output in range(batch_size) for position in pairs.positions(output, batch_size)[:2]]
    assert sorted(used) == list(range(2 * batch_size))
    by_cutmix = sum(pairs.positions(output, batch_size)[2] for output in range(batch_size))
    assert by_cutmix == (0 if cutmix == 0 else batch_size if mixup == 0 else batch_size // 2)


def test_targets_of_pairs():
    targets = paired_targets(
        torch.tensor([0, 2]),
        torch.tensor([1, 2]),
        torch.tensor([0.25, 0.7]),
        num_classes=4,
        label_smoothing=0.1,
    )
    wanted = torch.tensor([[0.25, 0.75, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]) * 0.9 + 0.025
    torch.testing.assert_close(targets, wanted)
    torch.testing.assert_close(smooth(wanted, 0.0), wanted)


def test_nothing_to_mix_is_an_error():
    said = r"^fresh pairs with mixup=0\.0, cutmix=0\.0\. Allowed: 0 or more, and one of them above 0\. Fix: mixup."
    with pytest.raises(ValueError, match=said):
        FreshPairs()


def stream(pairs, *, workers=0, start=0, rank=0, world_size=1, batch_size=6):
    rng = np.random.default_rng(0)
    source = ArraySource(
        rng.integers(0, 255, (17, 12, 12, 3), dtype=np.uint8), [i % 5 for i in range(17)], classes=list("abcde"),
        names=[str(i) for i in range(17)],
    )  # fmt: skip
    transform = train_transform(image_size=8)
    return list(train_batches(source, transform, batch_size=batch_size, seed=4, num_steps=5, start_step=start,
                              workers=workers, rank=rank, world_size=world_size, pairs=pairs))  # fmt: skip


def same(a, b):
    return all(
        torch.equal(getattr(a, f), getattr(b, f))
        for f in ("images", "labels", "partners", "share", "indices")
    )


@pytest.mark.parametrize("after", [None, AfterMixing("2x10")])
def test_batches_depend_on_nothing_but_seed_and_step(after):
    pairs = FreshPairs(mixup=0.2, cutmix=1.0, after=after)
    whole = stream(pairs)
    assert whole[0].images.dtype == (torch.float32 if after is None else torch.uint8)
    assert all(same(a, b) for a, b in zip(whole, stream(pairs, workers=2), strict=True))
    assert all(same(a, b) for a, b in zip(whole[3:], stream(pairs, start=3), strict=True))
    parts = [stream(pairs, rank=r, world_size=3) for r in range(3)]
    for step, batch in enumerate(whole):
        together = torch.cat([part[step].images for part in parts])
        assert torch.equal(together, batch.images)


def test_a_step_reads_twice_the_batch():
    seen = [i for b in stream(FreshPairs(cutmix=1.0), batch_size=17) for i in b.indices.tolist()]
    # 17 of the 34 positions of each step are first images: over one epoch of positions each image comes at most once
    first = stream(FreshPairs(cutmix=1.0), batch_size=17)[0]
    assert sorted(first.indices.tolist()) == list(range(17))
    assert first.epoch == 0
    assert stream(FreshPairs(cutmix=1.0), batch_size=17)[1].epoch == 2
    assert len(seen) == 85
