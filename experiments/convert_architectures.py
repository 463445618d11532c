"""Which networks of torchvision and timm lose their batch norm, in each of the three ways, and why others do not.

    python -m experiments.convert_architectures [--only PATTERN]

Random weights, random running statistics, two images of Gaussian noise at 96 px;
rewritten networks get 128 px. Small members of each family. Writes experiments/results/convert_architectures.md.
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

from normfree.surgery.batchnorm import batchnorms
from normfree.surgery.conversion_report import ConvertReport
from normfree.surgery.convert import convert_batchnorm

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
SIZES = {
    "maxvit_t": 224,
    "levit_128s": 224,
    "bat_resnext26ts": 256,
}  # what takes one size only; the others 96 px, rewritten ones 128
WAYS = ("exact", "normalizer_free", "scratch")
RESULT = Path(__file__).parent / "results" / "convert_architectures.md"


class Recorder(fx.Interpreter):
    """Average channel variance after every sum that a skip gain reaches, by the skip gain's name."""

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
    torch.manual_seed(0)
    make = timm.create_model if library == "timm" else torchvision.models.get_model
    net: nn.Module = make(name)
    with torch.no_grad():
        for norm in batchnorms(net).values():
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.7, 1.5)
    return net.eval()


def try_one(library: str, name: str) -> dict[str, str]:
    """What each way says of a network, in a few words."""
    net, said = build(library, name), {}
    parameters = sum(p.numel() for p in net.parameters())
    for way in WAYS:
        try:
            said[way] = _words(net, way, SIZES.get(name))
        except ValueError as error:
            said[way] = "no: " + re.sub(r"\s+", " ", str(error)).split(". ")[0].rstrip(".")[:150]
    return {"name": f"{library} `{name}`", "parameters": f"{parameters / 1e6:.1f} M", **said}


def _words(net: nn.Module, way: str, size: int | None) -> str:
    def noise(side: int, seed: int) -> Tensor:
        return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(seed))

    if way == "scratch":
        worst = []
        for seen in (None, noise(size or 128, 0)):
            model, report = convert_batchnorm(net, seen, how="scratch", skip_gain=1.0)
            recorder = Recorder(model)
            with torch.no_grad():
                recorder.run(noise(size or 128, 1))
            worst.append(_worst(report, recorder.found))
        count = report.counts
        gates = f", {count['gate doubled']} gates" if count["gate doubled"] else ""
        return f"{count['skip gain']} branches{gates}; {worst[0]}; {worst[1]}"
    report = convert_batchnorm(net, noise(size or 96, 0), how=way).report
    counts = ", ".join(f"{n} {change}" for change, n in sorted(report.counts.items()))
    return f"{report.error:.1e}; {counts}"


def _worst(report: ConvertReport, found: dict[str, float]) -> str:
    ratios = [found[c.layer] / c.variance for c in report.layers if c.layer in found and c.variance]
    return f"×{max(ratios, key=lambda r: abs(math.log(r))):.2f}" if ratios else "no sums"


def page(rows: list[dict[str, str]]) -> str:
    lines = [
        "# Which networks lose their batch norm",
        "",
        "`python -m experiments.convert_architectures`: random weights and running statistics, Gaussian images. "
        "**Exact** and **normalizer-free**: ‖converted − original‖ / ‖original‖ of the outputs on two images (which "
        "normalizer-free is fitted to), and where the norms went. **From scratch**: residual branches and gates found; "
        "then measured by predicted variance after the sum that is farthest off, without having seen an image, and "
        "with gains set on two others.",
        "",
        "| network | parameters | exact | normalizer-free | from scratch |",
        "|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(row[k] for k in ("name", "parameters", *WAYS)) + " |" for row in rows]
    done = [sum(not row[way].startswith("no: ") for row in rows) for way in WAYS]
    total = len(rows)
    summary = (
        f"{total} networks: {done[0]} convert exactly, {done[1]} to normalizer-free, {done[2]} from scratch."
    )
    return "\n".join([*lines, "", summary, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", help="shell pattern of library:name; writes no page")
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
