"""Write the table of predicted costs into docs/scale.md: `python docs/make_scale.py`, a minute or more.

The costs are predictions, not measurements: multiply-accumulates are counted, memory is what `normfree.training.memory`
predicts for a pass in bfloat16, and time follows from PEAK, FRACTION and LINKS.
"""

from __future__ import annotations

from pathlib import Path

import torch

from normfree.models.cost import count
from normfree.models.variants import VARIANTS
from normfree.models.zoo import create_model
from normfree.training.memory import USABLE_FRACTION, line

NAMES = (*(f"nfnet_f{n}" for n in range(8)), "nfnet_f7_plus")
IMAGES, EPOCHS, BATCH = 1_281_167, 360, 4096  # ImageNet's training set; [B] section 4.3
# Dense bfloat16 FLOP/s from NVIDIA's data sheets (SXM), and the fraction of them that training is assumed to reach:
# the prediction for compiled timm networks on an H200; our networks have not been measured there.
PEAK = {"A100": 312e12, "H100, H200": 989e12}
FRACTION = 0.30
MEMORY = 80e9  # bytes of the GPU for which the micro-batch is given
# Bytes per second that a GPU sends and receives at the same time: NVLink within a machine, 400 Gbit/s between machines.
LINKS = {1: 0.0, 8: 450e9, 64: 50e9, 512: 50e9}
BEGIN, END = "<!-- begin: docs/make_scale.py -->", "<!-- end: docs/make_scale.py -->"


def days(name: str, *, gpus: int, peak: float) -> float:
    """Return the days of a whole training on `gpus` GPUs.

    Each step computes, then sums the float32 gradients in one ring all-reduce that does not overlap with computation.
    """
    variant = VARIANTS[name]
    cost = count(variant, image_size=variant.train_size)
    # 2 FLOP per multiply-accumulate; the backward pass costs two forward passes.
    compute = BATCH / gpus * 6 * cost.macs / (FRACTION * peak)
    exchange = 2 * (gpus - 1) / gpus * 4 * cost.parameters / LINKS[gpus] if gpus > 1 else 0.0
    return (compute + exchange) * IMAGES * EPOCHS / BATCH / 86400


def entry(name: str) -> str:
    """Return the line of one network."""
    variant = VARIANTS[name]
    cost = count(variant, image_size=variant.train_size)
    with torch.device("meta"):
        net = create_model(name)
    fixed, each = line(net, image_size=variant.train_size, half=True)
    state = 16 * cost.parameters  # weights, gradients, momentum, average in float32
    most = {parts: (USABLE_FRACTION * MEMORY - state / parts - fixed) / each for parts in (1, 8)}
    size = {parts: 1 << (max(1, int(n)).bit_length() - 1) for parts, n in most.items()}
    time = [days(name, gpus=n, peak=PEAK["H100, H200"]) for n in LINKS]
    return (
        f"| `{name}` | {cost.parameters / 1e6:.0f} M | {variant.train_size} | {cost.macs / 1e9:.1f} "
        f"| {state / 1e9:.1f} | {fixed / 1e9:.1f} | {each / 1e6:.0f} | {size[1]} | {size[8]} | "
        f"{days(name, gpus=1, peak=PEAK['A100']):,.1f} | " + " | ".join(map(_number, time)) + " |"
    )


def _number(value: float) -> str:
    return f"{value:,.1f}" if value >= 1 else f"{value:.2f}"


def table() -> str:
    """Return the table."""
    head = (
        "| network | parameters | px | GMAC | state GB | pass GB | + MB per image | micro-batch | sharded by 8 "
        "| 1 A100 | " + " | ".join(f"{n} H100" for n in LINKS) + " |"
    )
    return "\n".join([head, "|---" + "|--:" * 13 + "|", *map(entry, NAMES)])


if __name__ == "__main__":
    page = Path(__file__).with_name("scale.md")
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")
