"""The secret key of private runs: who can read it, Poisson samples, and noise with the stated distribution."""

import stat

import numpy as np
import pytest

from normfree.training.secret import SecretKey

KEY = SecretKey(bytes(range(32)))


def test_a_key_is_new_each_time_can_be_read_by_its_owner_alone_and_comes_back(tmp_path):
    path = tmp_path / "privacy.key"
    first = SecretKey.create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = SecretKey.read(path)
    assert np.array_equal(again.gaussian((5,), 3, "w"), first.gaussian((5,), 3, "w"))
    second = SecretKey.create(path)
    assert not np.array_equal(second.gaussian((5,), 3, "w"), first.gaussian((5,), 3, "w"))


def test_a_missing_or_partial_key_is_none_and_an_open_one_is_refused(tmp_path):
    path = tmp_path / "privacy.key"
    assert SecretKey.read(path) is None
    path.write_text("abcd\n")
    path.chmod(0o600)
    assert SecretKey.read(path) is None
    SecretKey.create(path)
    path.chmod(0o640)
    with pytest.raises(ValueError, match=r"can be read by other users.* Allowed: mode 0600"):
        SecretKey.read(path)


def test_every_purpose_has_noise_of_its_own_and_no_block_repeats(monkeypatch):
    noise = [KEY.gaussian((100,), step, name) for step in (0, 1) for name in ("a", "b")]
    correlations = np.corrcoef(noise) - np.eye(4)
    assert np.abs(correlations).max() < 0.5  # 5 standard errors
    monkeypatch.setattr("normfree.training.secret._BLOCK", 16)
    blocks = KEY.gaussian((4, 16), 0, "a")
    assert len(np.unique(blocks)) == blocks.size


def test_noise_is_standard_normal():
    """Moments and the distribution function (Kolmogorov and Smirnov; 1.95 is exceeded with probability 0.001)."""
    from statistics import NormalDist

    count = 200_000
    noise = np.sort(KEY.gaussian((count,), 0, "w"))
    error = count**-0.5
    assert abs(noise.mean()) < 4 * error
    assert abs(noise.std() - 1) < 4 * error / 2**0.5
    assert abs((noise**4).mean() - 3) < 4 * 96**0.5 * error
    points = np.linspace(-3.5, 3.5, 200)
    exact = np.array([NormalDist().cdf(x) for x in points])
    assert np.abs(np.searchsorted(noise, points) / count - exact).max() * count**0.5 < 1.95


def test_neighboring_entries_are_independent():
    noise = KEY.gaussian((200_000,), 0, "w")
    for lag in (1, 2, 3):
        for power in (1, 2):
            a, b = noise[:-lag] ** power, noise[lag:] ** power
            assert abs(np.corrcoef(a, b)[0, 1]) < 4 * len(a) ** -0.5


def test_samples_are_poisson_samples():
    """Each image is drawn by itself with the rate: sizes are binomial, images and steps are independent."""
    count, rate, steps = 400, 0.3, 2000
    drawn = np.zeros((steps, count))
    for step in range(steps):
        drawn[step, KEY.members(count, rate, step=step)] = 1
    deviation = (rate * (1 - rate)) ** 0.5
    assert abs(drawn.mean() - rate) < 4 * deviation / drawn.size**0.5
    assert np.abs(drawn.mean(axis=0) - rate).max() < 5 * deviation / steps**0.5
    sizes = drawn.sum(axis=1)
    assert abs(sizes.var() / (count * rate * (1 - rate)) - 1) < 5 * (2 / steps) ** 0.5
    centered = drawn - rate
    assert abs((centered[1:] * centered[:-1]).mean()) < 4 * deviation**2 / drawn.size**0.5
    assert abs((centered[:, 1:] * centered[:, :-1]).mean()) < 4 * deviation**2 / drawn.size**0.5


def test_all_images_are_drawn_at_rate_1():
    assert KEY.members(5, 1.0, step=0).tolist() == [0, 1, 2, 3, 4]
