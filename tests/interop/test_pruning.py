"""Torch-Pruning removes channels from networks of every family, with all that depends on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import normfree
from normfree.models.layers import EfficientChannelAttention

SMALL = {"depths": (1, 2), "widths": (32, 64), "strides": (1, 2)}
FAMILIES = {
    "nf_resnet50": SMALL,
    "nfnet_f0": {**SMALL, "group_width": 8},
    "nf_regnet_b0": SMALL,
    "timm_eca_nfnet_l0": {**SMALL, "group_width": 8},
    "resnet50": SMALL,
}


def pruner_of_standardized_convolutions() -> Any:
    """Return a pruner of `WSConv2d`, as a user of Torch-Pruning writes it."""
    tp = pytest.importorskip("torch_pruning")

    class Pruner(tp.pruner.function.BasePruningFunc):
        TARGET_MODULES = normfree.WSConv2d

        def prune_out_channels(self, layer: normfree.WSConv2d, idxs: list[int]) -> nn.Module:
            kept = [i for i in range(layer.out_channels) if i not in set(idxs)]
            for name in ("weight", "gain", "bias"):
                setattr(layer, name, self._prune_parameter_and_grad(getattr(layer, name), kept, 0))
            return layer

        def prune_in_channels(self, layer: normfree.WSConv2d, idxs: list[int]) -> nn.Module:
            kept = [i for i in range(layer.in_channels) if i not in set(idxs)]
            kept = kept[: len(kept) // layer.groups]
            layer.weight = self._prune_parameter_and_grad(layer.weight, kept, 1)
            return layer

        def get_out_channels(self, layer: normfree.WSConv2d) -> int:
            return layer.out_channels

        def get_in_channels(self, layer: normfree.WSConv2d) -> int:
            return layer.in_channels

    return Pruner()


@pytest.mark.works("Torch-Pruning", "groups of channels of every family")
@pytest.mark.parametrize("target", ["stem.conv0", "stages.0.0.conv0", "stages.0.0.conv2"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_group_of_channels_is_removed_with_all_that_reads_it(name, target):
    tp = pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    net = normfree.create_model(name, num_classes=3, **FAMILIES[name]).eval()
    images = torch.randn(2, 3, 32, 32)
    # the one channel of the convolution over channels is not a channel of the network
    attentions = [m.conv for m in net.modules() if isinstance(m, EfficientChannelAttention)]
    graph = tp.DependencyGraph().build_dependency(
        net, example_inputs=images, ignored_layers=attentions,
        customized_pruners={normfree.WSConv2d: pruner_of_standardized_convolutions()},
    )  # fmt: skip
    conv = net.get_submodule(target)
    groups = net.stages[0][0].conv1.groups if target == "stages.0.0.conv0" else 1
    count, each = conv.weight.shape[0], conv.weight.shape[0] // groups
    removed = [g * each for g in range(groups)]  # the first channel of each group of the next convolution
    before = conv.weight.detach().clone()
    group = graph.get_pruning_group(conv, graph.get_pruner_of_module(conv).prune_out_channels, idxs=removed)
    convolutions = [d.dep.target.module for d in group if hasattr(d.dep.target.module, "groups")]
    assert len(set(convolutions)) > 1
    parameters = sum(p.numel() for p in net.parameters())
    group.prune()
    kept = [i for i in range(count) if i not in removed]
    assert torch.equal(conv.weight, before[kept])
    assert sum(p.numel() for p in net.parameters()) < parameters
    logits = net.train()(images)
    assert logits.shape == (2, 3)
    logits.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
