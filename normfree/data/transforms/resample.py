"""Bicubic resizing without antialiasing, as in TensorFlow 2's `tf.image.resize`, on which the released weights were
trained.
"""

from __future__ import annotations

import numpy as np

_A = -0.5  # Keys' cubic, as in TensorFlow; PyTorch's bicubic uses -0.75


def resize_bicubic(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize H W C of any type to `height` `width` C float32.

    Pixel centers are at half-integers, and each axis uses four taps for any scale factor. Values overshoot the input's
    range near edges. Taps outside the image get weight 0, and the other weights are normalized to sum 1.
    """
    rows, row_weights = _taps(image.shape[0], height)
    columns, column_weights = _taps(image.shape[1], width)
    x = image.astype(np.float32)
    tall = sum(x[rows[:, k]] * row_weights[:, k, None, None] for k in range(4))
    assert isinstance(tall, np.ndarray)
    wide = sum(tall[:, columns[:, k]] * column_weights[None, :, k, None] for k in range(4))
    assert isinstance(wide, np.ndarray)
    return wide


def _taps(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (indices, weights), both `size` x 4: the input pixels of each output pixel."""
    center = (np.arange(size) + 0.5) * (length / size) - 0.5
    first = np.floor(center).astype(np.int64)
    indices = first[:, None] + np.arange(-1, 3)
    distance = np.abs(center[:, None] - indices)
    near = ((_A + 2) * distance - (_A + 3)) * distance**2 + 1
    far = ((_A * distance - 5 * _A) * distance + 8 * _A) * distance - 4 * _A
    weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
    weights *= (indices >= 0) & (indices < length)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.clip(indices, 0, length - 1), weights.astype(np.float32)
