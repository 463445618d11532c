"""bfloat16 concerns the forward and backward pass alone: weights, statistics, update and average stay float32."""

import io
import shlex

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from normfree import adaptive_clip_grad_, create_model
from normfree.training import loop, run_folder
from normfree.training.config_io import with_overrides
from normfree.training.gradient import BatchGradient
from normfree.training.recipes import RECIPES

OFF = {"drop_rate": 0.0, "stochdepth_rate": 0.0, "skip_gain": 1.0}
# Measured cosine similarity of the two gradients: NFNet 0.99992, NF-RegNet and the small variant 0.99995, NF-ResNet-50
# 0.9972 to 0.9984, since the gradients of ReLU and max pooling jump where rounding changes a sign or a maximum.
FAMILIES = {
    "nfnet_f0": ({"widths": (32, 64, 96, 96), "depths": (1, 2, 3, 2), "group_width": 8, **OFF}, 0.999),
    "nf_regnet_b0": ({"widths": (24, 48, 96, 176), "depths": (1, 2, 3, 2), **OFF}, 0.999),
    "nf_resnet_micro": ({"widths": (16, 32, 64), **OFF}, 0.999),
    "nf_resnet50": ({"widths": (32, 64, 128, 256), "depths": (2, 2, 2, 2), **OFF}, 0.99),
}


def gradient(net: torch.nn.Module, images: Tensor, labels: Tensor, *, half: bool) -> Tensor:
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logits = net(images)
    assert logits.dtype == (torch.bfloat16 if half else torch.float32)
    F.cross_entropy(logits.float(), labels).backward()
    return torch.cat([p.grad.flatten().double() for p in net.parameters()])


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_in_bfloat16_and_float32_have_the_same_direction(name):
    changes, least = FAMILIES[name]
    torch.manual_seed(0)
    net = create_model(name, num_classes=10, **changes).to(memory_format=torch.channels_last)
    images, labels = torch.randn(12, 3, 64, 64), torch.arange(12) % 10
    for _ in range(2):  # at the start, and after ten steps
        exact, half = (gradient(net, images, labels, half=h) for h in (False, True))
        assert not torch.equal(exact, half)
        assert F.cosine_similarity(exact, half, dim=0) > least
        for _ in range(10):
            gradient(net, images, labels, half=False)
            adaptive_clip_grad_(net, 0.05)
            with torch.no_grad():
                for p in net.parameters():
                    p -= 0.05 * p.grad


def test_weights_momentum_average_gradients_and_loss_stay_float32(tmp_path, monkeypatch):
    flags = shlex.split(
        "--data synthetic:classes=3,size=16,train=40,val=8 --model nf_resnet_nano --input.image_size 16 "
        "--input.batch_size 8 --input.workers 0 --length 4st --optim.warmup 1st --precision bfloat16 --device cpu"
    )
    config = with_overrides(RECIPES["scratch"](), flags)
    seen, original = [], BatchGradient.__call__

    def recording(self, images, targets, step):
        found = original(self, images, targets, step)
        seen.append({t.dtype for t in (images, targets, *found, *(p.grad for p in self.net.parameters()))})
        return found

    monkeypatch.setattr(BatchGradient, "__call__", recording)
    monkeypatch.setattr(run_folder, "draw_curves", lambda *args, **kwargs: None)
    result = loop.train(config, tmp_path / "run", console=Console(file=io.StringIO()))
    assert seen == [{torch.float32}] * 4
    from safetensors.torch import load_file

    for file in (result.out / "checkpoints" / "step-00000004").glob("*.safetensors"):
        assert {t.dtype for t in load_file(file).values()} == {torch.float32}, file
