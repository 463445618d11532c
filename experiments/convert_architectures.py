"""Conversion of torchvision's and timm's networks to networks without batch norm, with each of the three methods.

    python -m experiments.convert_architectures [--only PATTERN]

Random weights, random running statistics, two images of Gaussian noise at 96 px (128 px with how="scratch"). One small
network of each family. Writes experiments/results/convert_architectures.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import re
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, fx, nn

from normfree import convert_batchnorm
from normfree.surgery.batchnorm import batchnorms
from normfree.surgery.conversion_report import ConvertReport

TORCHVISION = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet",
    "inception_v3", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large",
    "regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnet34", "resnet50", "resnext50_32x4d",
    "shufflenet_v2_x0_5", "squeezenet1_1", "vgg11_bn", "wide_resnet50_2", "vit_b_16", "swin_t",
    "maxvit_t",
)  # fmt: skip
TIMM = (
    "resnet18", "resnet26d", "resnet50", "resnet50c", "resnetaa50", "resnext50_32x4d", "seresnet50",
    "ecaresnet26t", "skresnet18", "seresnext26d_32x4d", "resnetv2_50", "resnetv2_50d", "resnetrs50",
    "res2net50_14w_8s", "resnest14d", "regnetx_002", "regnety_002", "regnetv_040", "regnetz_b16",
    "efficientnet_b0", "efficientnet_lite0", "tf_efficientnet_b0", "tf_efficientnetv2_b0",
    "efficientnet_es", "mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv3_large_100",
    "mobilenetv4_conv_small", "mnasnet_100", "fbnetc_100", "spnasnet_100", "semnasnet_075", "mixnet_s",
    "hardcorenas_a", "tinynet_e", "lcnet_050", "ghostnet_100", "repvgg_a0", "mobileone_s0",
    "hgnetv2_b0", "cspresnet50", "cspdarknet53", "darknet53", "densenet121", "dla34", "dpn48b",
    "ese_vovnet19b_dw", "hrnet_w18_small", "inception_v3", "rexnet_100", "selecsls42b", "vgg11_bn",
    "xception41", "nf_resnet26", "convmixer_768_32", "gernet_s", "bat_resnext26ts", "levit_128s",
    "test_resnet", "test_efficientnet",
)  # fmt: skip
# Networks that accept one image size only.
SIZES = {"maxvit_t": 224, "levit_128s": 224, "bat_resnext26ts": 256}
METHODS = ("exact", "normalizer_free", "scratch")
RESULT = Path(__file__).parent / "results" / "convert_architectures.md"


class Recorder(fx.Interpreter):
    """Interpreter that records the average channel variance after every sum with a skip gain, by its name."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module.eval())
        self.found: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        for node in n.all_input_nodes:
            if str(node.target).startswith("skip_gains.") and isinstance(out, Tensor):
                self.found[str(node.target)] = float(out.var((0, 2, 3), correction=0).mean())
        return out


def build(library: str, name: str) -> nn.Module:
    """Return a network with random weights and random running statistics, in evaluation mode."""
    torch.manual_seed(0)
    make = timm.create_model if library == "timm" else torchvision.models.get_model
    net: nn.Module = make(name)
    with torch.no_grad():
        for norm in batchnorms(net).values():
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.7, 1.5)
    return net.eval()


def try_one(library: str, name: str) -> dict[str, str]:
    """Return a short result of each method for one network."""
    net, outcome = build(library, name), {}
    parameters = sum(p.numel() for p in net.parameters())
    for method in METHODS:
        try:
            outcome[method] = _outcome(net, method, SIZES.get(name))
        except ValueError as error:
            outcome[method] = "no: " + re.sub(r"\s+", " ", str(error)).split(". ")[0].rstrip(".")[:150]
    return {"name": f"{library} `{name}`", "parameters": f"{parameters / 1e6:.1f} M", **outcome}


def _outcome(net: nn.Module, method: str, size: int | None) -> str:
    """Convert the network and return the text of its table cell."""

    def noise(side: int, seed: int) -> Tensor:
        return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(seed))

    if method == "scratch":
        worst = []
        for images in (None, noise(size or 128, 0)):
            model, report = convert_batchnorm(net, images, how="scratch", skip_gain=1.0)
            recorder = Recorder(model)
            with torch.no_grad():
                recorder.run(noise(size or 128, 1))
            worst.append(_worst(report, recorder.found))
        count = report.counts
        gates = f", {count['gate doubled']} gates" if count["gate doubled"] else ""
        return f"{count['skip gain']} branches{gates}; {worst[0]}; {worst[1]}"
    report = convert_batchnorm(net, noise(size or 96, 0), how=method).report
    counts = ", ".join(f"{n} {change}" for change, n in sorted(report.counts.items()))
    return f"{report.error:.1e}; {counts}"


def _worst(report: ConvertReport, found: dict[str, float]) -> str:
    """Return the ratio of measured to predicted variance that is farthest from 1."""
    ratios = [found[c.layer] / c.variance for c in report.layers if c.layer in found and c.variance]
    return f"×{max(ratios, key=lambda r: abs(math.log(r))):.2f}" if ratios else "no sums"


def page(rows: list[dict[str, str]]) -> str:
    """Return the text of the page."""
    lines = [
        "# Which networks can be converted",
        "",
        "`python -m experiments.convert_architectures`: random weights and running statistics, Gaussian images. "
        "**Exact** and **normalizer-free**: ‖converted − original‖ / ‖original‖ of the outputs on two images (to which "
        "normalizer-free is fitted), and how the norms were replaced. **From scratch**: number of residual branches "
        "and gates, then measured over predicted variance after the sum with the largest deviation, first without "
        "images, then with gains set on two other images.",
        "",
        "| network | parameters | exact | normalizer-free | from scratch |",
        "|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(row[k] for k in ("name", "parameters", *METHODS)) + " |" for row in rows]
    done = [sum(not row[method].startswith("no: ") for row in rows) for method in METHODS]
    total = len(rows)
    summary = (
        f"{total} networks: {done[0]} convert exactly, {done[1]} to normalizer-free, {done[2]} from scratch."
    )
    return "\n".join([*lines, "", summary, ""])


def main() -> None:
    """Convert all networks and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", help="shell pattern of library:name; does not write the page")
    parser.add_argument("--cells", type=Path, default=Path("runs/convert-architectures"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for library, names in (("torchvision", TORCHVISION), ("timm", TIMM)):
        for name in names:
            if not fnmatch.fnmatch(f"{library}:{name}", arguments.only):
                continue
            path = arguments.cells / f"{library}-{name}.json"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(try_one(library, name)), encoding="utf-8")
            rows.append(json.loads(path.read_text(encoding="utf-8")))
            print(rows[-1], flush=True)
    if arguments.only == "*":
        RESULT.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
