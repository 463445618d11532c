"""The nearest-neighbor baseline against a search by hand."""

import torch
from PIL import Image

from experiments.pixel_neighbor import nearest, pixels
from normfree.data.source import ArraySource


def test_the_nearest_image_is_the_one_of_smallest_distance():
    x, y = torch.rand(7, 12), torch.rand(5, 12)
    expected = [min(range(7), key=lambda j: float((q - x[j]).double().norm())) for q in y]
    assert nearest(y, x).tolist() == expected
    assert nearest(x, x).tolist() == list(range(7))
    assert all(found != i for i, found in enumerate(nearest(x, x, skip_same=True).tolist()))


def test_pixels_are_block_averages():
    array = torch.randint(0, 256, (1, 8, 8, 3), dtype=torch.uint8)
    source = ArraySource(array.numpy(), [0], classes=["a"], names=["x"])
    expected = array[0].float().reshape(2, 4, 2, 4, 3).mean(dim=(1, 3)).flatten() / 255
    torch.testing.assert_close(
        pixels(source, 2)[0], expected, rtol=0, atol=1.01 / 255
    )  # two passes, each rounded
    assert isinstance(source.image(0), Image.Image)
