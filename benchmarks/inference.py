"""Inference before and after folding, against timm's same network with the same weights, float32.

Every arm runs in both memory formats; the better one of each is reported, so no side wins by layout.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import timm
import torch
from harness import Arm, Comparison, compare
from torch import nn

from normfree.models.weights import load_weights
from normfree.models.zoo import create_model
from normfree.surgery.fold import fold

#: timm's name, image size
CASES = (
    ("dm_nfnet_f0", 192),
    ("eca_nfnet_l0", 224),
    ("nf_resnet50", 224),
    ("nf_regnet_b1", 256),
)
BATCHES = (1, 8)
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def shaken(net: nn.Module) -> nn.Module:
    """Random weights in which every branch is open."""
    torch.manual_seed(0)
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if parameter.ndim == 0 or key.endswith("gain"):
                parameter.uniform_(0.5, 1.0)
    return net.eval()


def suite(names: Sequence[str] = (), *, rounds: int = 11) -> list[Comparison]:
    """One comparison per network and batch size; `names` chooses networks."""
    results = []
    for name, size in CASES:
        if names and name not in names:
            continue
        theirs = shaken(timm.create_model(name))
        ours = create_model(f"timm_{name}").eval()
        load_weights(ours, theirs.state_dict())
        networks: dict[str, nn.Module] = {"timm": theirs, "normfree": ours, "normfree, folded": fold(ours)}
        for batch in BATCHES:
            images = torch.randn(batch, 3, size, size)
            arms = []
            for label, net in networks.items():
                for word, layout in FORMATS.items():
                    placed = copy.deepcopy(net).to(memory_format=layout)
                    inputs = images.to(memory_format=layout)
                    arms.append(Arm(f"{label} {word}", lambda n=placed, x=inputs: n(x)))
            case = f"{name}, {size} px, batch {batch}"
            results.append(compare(case, arms, rounds=rounds, choose=best_formats))
            told = (f"{t.arm} {t.speedup:.2f}" for t in results[-1].timings)
            print(case, *told, sep="  ", flush=True)
    return results


def best_formats(medians: dict[str, float]) -> list[str]:
    """The faster memory format of each network, timm's first."""
    best: dict[str, str] = {}
    for arm in medians:
        network = arm.rpartition(" ")[0]
        if network not in best or medians[arm] < medians[best[network]]:
            best[network] = arm
    return list(best.values())
