"""Goal 11: losses that are known, checkpoints of earlier formats, equal runs of one seed, and work without a network.

python -m reliability.golden     record the losses again, after a change that is meant to change them
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.machine import cpu_info
from normfree.diagnose.metrics_file import read_metrics
from normfree.files import atomic_write_text
from reliability.goals import Case, Result
from reliability.records import ROOT
from reliability.runs import FLAGS, Job, differences, finish, scratch, uninterrupted

LOSSES = Path(__file__).with_name("golden.json")
FORMATS = ROOT / "tests" / "reliability" / "formats"
STEPS = 100
# One network of each family, at a size at which a step takes a fraction of a second.
NETWORKS = {
    "nf_resnet_nano": ("--input.image_size", "16"),
    "timm_test_nfnet": ("--input.image_size", "32"),
    "nf_regnet_b0": ("--input.image_size", "32", "--net.stochdepth_rate", "0"),
}
# Largest relative difference of a loss on another processor or version of PyTorch: ten times the largest difference,
# 3.6e-6, that was measured with AVX2 in place of AVX-512 (ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2).
TOLERANCE = 4e-5
OFFLINE = "without a network: the command does its work and opens no connection"


def cases(count: int) -> Iterator[Case]:
    """Return all checks, of at most `count` networks."""
    for network in list(NETWORKS)[:count]:
        yield Case(f"losses of {STEPS} steps are the known ones", network, partial(known_losses, network))
    for file in sorted(FORMATS.glob("*.tar.xz")):
        yield Case("a run of an earlier format resumes", file.name, partial(resumed_format, file))
    for ranks in (1, 2):
        yield Case("two runs of one seed are equal", f"{ranks} processes", partial(equal_runs, ranks))
    for command in COMMANDS:
        yield Case(OFFLINE, command, partial(offline, command))


def losses_of(network: str) -> list[float]:
    """Return the losses of the first steps of training."""
    flags = (*FLAGS, "--model", network, *NETWORKS[network], "--length", f"{STEPS}st", "--optim.lr", "0.01",
             "--log.evaluate_every", f"{STEPS}st", "--log.checkpoint_every", f"{STEPS}st")  # fmt: skip
    with scratch() as folder:
        out = Path(folder) / "run"
        finish(out, flags=flags)
        return [row["loss"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row]


def machine() -> dict[str, str]:
    """Return what decides the bits of a loss."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {"processor": cpu_info("model name"), "capability": capability, "torch": torch.__version__}


def known_losses(network: str) -> Result:
    """Compare losses with the recorded ones: bits on the machine that recorded them, else with a tolerance."""
    recorded = json.loads(LOSSES.read_text(encoding="utf-8"))
    wanted = [float.fromhex(text) for text in recorded["losses"][network]]
    found = losses_of(network)
    worst = max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))
    tolerance = 0.0 if machine() == recorded["machine"] else TOLERANCE
    passed = sum(abs(a - b) <= tolerance * abs(b) for a, b in zip(found, wanted, strict=True))
    return Result(len(wanted), passed, f"largest relative difference {worst:.1e}")


def record() -> None:
    """Write golden.json."""
    losses = {network: [loss.hex() for loss in losses_of(network)] for network in NETWORKS}
    atomic_write_text(LOSSES, json.dumps({"machine": machine(), "losses": losses}, indent=0) + "\n")


def resumed_format(file: Path) -> Result:
    """Continue a run that an earlier version has stopped after step 4 of 8."""
    with scratch() as folder:
        with tarfile.open(file) as archive:
            archive.extractall(folder, filter="data")
        out = Path(folder) / "run"
        job = Job(["train", str(out)], output=Path(folder) / "output.txt")
        code, printed = job.wait()[0], job.printed()
        steps = [row["step"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
        wrong = [] if code == 0 else [f"exit code {code}: {printed[-300:]}"]
        wrong += [] if f"continuing {out} after step 4" in printed else ["it did not continue"]
        wrong += [] if steps == list(range(1, 9)) else [f"steps {steps}"]
        wrong += [] if (out / "model" / "model.safetensors").exists() else ["no model"]
    return Result(1, int(not wrong), "; ".join(wrong))


def equal_runs(ranks: int) -> Result:
    """Compare two runs of one config."""
    whole, _ = uninterrupted(ranks=ranks)
    with scratch() as folder:
        out = Path(folder) / "run"
        finish(out, ranks=ranks)
        wrong = differences(whole, out)
    return Result(1, int(not wrong), ", ".join(wrong))


# By name: the arguments of one or several commands. They run in a folder with `run`, `images` and `image.png`.
COMMANDS = {
    "list": "list",
    "show": "show nf_resnet50",
    "train": f"train {' '.join(FLAGS)} --out new",
    "resume": "train run",
    "fine-tune": f"train {' '.join(FLAGS)} --weights run/model --out tuned",
    "eval": "eval run images",
    "predict": "predict run image.png",
    "diagnose": "diagnose run",
    "export to ONNX, predict with it": "export run --format onnx --out run.onnx; predict run.onnx image.png",
    "convert": "convert run/model copy",
    "audit of a folder": f"train {' '.join(FLAGS)} --data images --input.val_fraction 0.5 --out photos",
}


def offline(command: str) -> Result:
    """Run a command in a process that cannot open connections."""
    whole, _ = uninterrupted()
    with scratch() as folder:
        out = Path(folder)
        shutil.copytree(whole, out / "run")
        for name in ("disk", "ring"):
            (out / "images" / name).mkdir(parents=True)
            for index in range(6):
                Image.new("RGB", (16, 16), (40 * index, 0, 0)).save(out / "images" / name / f"{index}.png")
        Image.new("RGB", (16, 16)).save(out / "image.png")
        wrong = []
        for part in COMMANDS[command].split("; "):
            job = Job(part.split(), output=out / "output.txt", prepare=NoNetwork(out))
            if code := job.wait()[0]:
                wrong.append(f"exit code {code}: {job.printed()[-300:]}")
        tried = out / "connections.txt"
        wrong += [tried.read_text(encoding="utf-8")] if tried.exists() else []
    return Result(1, int(not wrong), "; ".join(wrong))


@dataclass(frozen=True)
class NoNetwork:
    """Called in a process before the command: it will work in `folder`, and connections are refused and recorded."""

    folder: Path

    def __call__(self) -> None:
        os.chdir(self.folder)
        sys.addaudithook(self.refuse)

    def refuse(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Refuse to look up a name or to connect to anything except a socket in the file system."""
        local = bool(arguments) and event != "socket.getaddrinfo" and isinstance(arguments[-1], str | bytes)
        if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo") and not local:
            with (self.folder / "connections.txt").open("a", encoding="utf-8") as file:
                file.write(f"{event} {arguments[1:]}\n")
            raise PermissionError(f"{event} is refused")


if __name__ == "__main__":
    record()
