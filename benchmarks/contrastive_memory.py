"""Memory of a contrastive step: the whole batch in one pass against the exact cached gradient, on a CPU under Linux.

    python -m benchmarks.contrastive_memory [--model NAME] [--batch N] [--size S]

Each arm takes one step, forward and backward, in a new process, which reports by how much the step raises the peak of
its resident set beyond weights and images. The gradients of all arms are compared with that of the single pass. Writes
benchmarks/results/contrastive_memory.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory import CLEAR, MIB, status
from normfree import cached_backward, create_model, nt_xent
from normfree.models.net import Net
from normfree.training.allocator import keep_freed_memory
from normfree.training.memory import line
from normfree.training.projection import project_

RESULT = Path(__file__).parent / "results" / "contrastive_memory.md"
# Relative L2 difference of gradients in float32, where a rounding can change the sign of the input of a ReLU.
TOLERANCE = 1e-3


def network(name: str) -> Net:
    """Return the network with its projection, equal in all processes."""
    torch.manual_seed(0)
    net = create_model(name, num_classes=0, skip_gain=1.0, stochdepth_rate=0.0, drop_rate=0.0)
    assert isinstance(net, Net)
    project_(net, 128)
    return net.to(memory_format=torch.channels_last).train()


def loss(embeddings: Tensor) -> Tensor:
    """Return NT-Xent of views of which neighbors belong together."""
    return nt_xent(embeddings[0::2], embeddings[1::2], temperature=0.2)


def step(name: str, *, views: int, size: int, micro_batch: int, gradient: Path) -> dict[str, float]:
    """Take one step in this process, save its gradient, and return the growth of the peak in bytes, and seconds."""
    net = network(name)
    images = torch.rand(views, 3, size, size, generator=torch.Generator().manual_seed(1))
    images = images.contiguous(memory_format=torch.channels_last)
    keep_freed_memory()  # as `normfree train` does
    CLEAR.write_text("5")  # reset the peak
    before, begun = status("VmRSS"), time.perf_counter()
    if micro_batch:
        value = float(cached_backward(net, images, loss, micro_batch=micro_batch))
    else:
        whole = loss(net(images))
        whole.backward()
        value = float(whole.detach())
    grown, seconds = status("VmHWM") - before, time.perf_counter() - begun
    torch.save(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]), gradient)
    return {"bytes": grown, "seconds": seconds, "loss": value}


def measure(
    name: str, *, views: int, size: int, micro_batches: Sequence[int], folder: Path
) -> list[dict[str, Any]]:
    """Return the measurement of each arm; 0 is the single pass."""
    found: list[dict[str, Any]] = []
    for micro_batch in (0, *micro_batches):
        gradient = folder / f"{micro_batch}.pt"
        given = ["--step", str(micro_batch), "--gradient", str(gradient)]
        command = [sys.executable, "-m", "benchmarks.contrastive_memory", "--model", name, "--batch", str(views),
                   "--size", str(size), *given]  # fmt: skip
        done = subprocess.run(
            command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
        )
        arm = json.loads(done.stdout)
        own, whole = torch.load(gradient), torch.load(folder / "0.pt")
        difference = float((own - whole).norm() / whole.norm())
        if difference > TOLERANCE:
            raise SystemExit(f"micro-batches of {micro_batch}: gradients differ by {difference:.1e}")
        found.append({**arm, "micro_batch": micro_batch, "difference": difference})
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def page(name: str, *, views: int, size: int, found: Sequence[dict[str, Any]]) -> str:
    """Return the page of results."""
    fixed, each = line(network(name), image_size=size)
    lines = [
        "# Memory of a contrastive step", "",
        f"`python -m benchmarks.contrastive_memory --model {name} --batch {views} --size {size}`: one step of NT-Xent "
        f"on {views} views of {size} px, float32, on a CPU; growth of the peak of the resident set beyond weights and "
        f"images, each arm in a new process. Predicted for the single pass: {(fixed + views * each) / MIB:,.0f} MiB. "
        "The machine was shared with other work, so the seconds only show the order of the price.", "",
        "| step | peak, MiB | of the single pass | gradient differs by | seconds |", "|---|--:|--:|--:|--:|",
    ]  # fmt: skip
    for arm in found:
        title = f"cached, micro-batches of {arm['micro_batch']}" if arm["micro_batch"] else "single pass"
        share = arm["bytes"] / found[0]["bytes"]
        lines.append(
            f"| {title} | {arm['bytes'] / MIB:,.0f} | {100 * share:.1f} % | {arm['difference']:.1e} "
            f"| {arm['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all arms, or one step in this process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="nf_resnet_micro_64")
    parser.add_argument("--batch", type=int, default=4096, help="views")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1024, 256, 64])
    parser.add_argument("--step", type=int, help="take one step with this micro-batch, 0 for a single pass")
    parser.add_argument("--gradient", type=Path, help="with --step: where to save the gradient")
    given = parser.parse_args()
    if given.step is not None:
        found = step(
            given.model, views=given.batch, size=given.size, micro_batch=given.step, gradient=given.gradient
        )
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        arms = measure(given.model, views=given.batch, size=given.size, micro_batches=given.micro_batches,
                       folder=Path(folder))  # fmt: skip
    text = page(given.model, views=given.batch, size=given.size, found=arms)
    RESULT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
