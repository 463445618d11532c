"""The accuracy that int8 costs on a real task: CIFAR-10 as an image folder, float32 and int8 on the same test images.

    python -m experiments.int8_accuracy --data cifar10/        # with the folders train/ and test/
    python -m experiments.int8_accuracy --data cifar10/ --per-class 200 --epochs 4

1. `normfree train scratch` trains nf_resnet_nano on `--per-class` images of each class of train/, on one thread.
2. `normfree export` writes the ONNX file; `quantize` calibrates the int8 file on 512 training images.
3. Both files classify all images of test/.

Prints both accuracies, their difference with its 95 % bootstrap interval over images, and the p of McNemar's test.
Writes them to results/int8_accuracy.json. A folder `--out` that holds a finished run is not trained again.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch

from normfree import evaluate, export, from_pretrained, open_source, quantize
from normfree.cli import main as command
from normfree.files import atomic_write_text
from normfree.inference import sample_images
from normfree.onnx_net import open_onnx
from normfree.uncertainty import accuracy_text, bootstrap_interval, mcnemar

RESULTS = Path(__file__).parent / "results" / "int8_accuracy.json"
CALIBRATED, BATCH = 512, 32


def main(args: list[str] | None = None) -> int:
    """Train, quantize and compare; return 0."""
    parser = argparse.ArgumentParser(prog="python -m experiments.int8_accuracy", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument("--per-class", type=int, default=500, help="training images of each class")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/int8-accuracy"), help="folder of the run")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    start = time.perf_counter()
    images = options.out / "images"
    link_subset(options.data / "train", images, options.per_class)
    run = options.out / "run"
    if not (run / "model").is_dir():
        code = command(["train", "scratch", "--data", str(images), "--model", "nf_resnet_nano", "--length",
                        f"{options.epochs}ep", "--out", str(run)])  # fmt: skip
        if code:
            return code
    result = compare_files(run, images, options.data / "test")
    result["seconds"] = round(time.perf_counter() - start)
    atomic_write_text(RESULTS, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


def link_subset(source: Path, target: Path, per_class: int) -> None:
    """Make a folder of links to `per_class` random images of each class."""
    for folder in sorted(p for p in source.iterdir() if p.is_dir()):
        files = sorted(folder.iterdir())
        (target / folder.name).mkdir(parents=True, exist_ok=True)
        for file in random.Random(0).sample(files, min(per_class, len(files))):
            link = target / folder.name / file.name
            if not link.exists():
                link.symlink_to(file.resolve())


def compare_files(run: Path, train: Path, test: Path) -> dict[str, object]:
    """Export and quantize the network of a run; return the accuracies of both files on the test images."""
    model = from_pretrained(run)
    pre = model.preprocessing
    calibration = sample_images(open_source(str(train)).train, count=CALIBRATED, preprocessing=pre)
    report = export(model, run / "model.onnx", images=calibration[:64])
    small = quantize(report.path, run / "model.int8.onnx", calibration=calibration.split(BATCH))
    source = open_source(str(test), val_fraction=0.0).train
    correct = []
    for path in (report.path, small.path):
        score = evaluate(open_onnx(path)[0], source, preprocessing=pre, device="cpu")
        correct.append((score.predictions == score.labels).tolist())
    differences = [float(after) - float(before) for before, after in zip(*correct, strict=True)]
    low, high = bootstrap_interval(differences)
    return {
        "images": len(differences),
        "float32": accuracy_text(sum(correct[0]), len(correct[0])),
        "int8": accuracy_text(sum(correct[1]), len(correct[1])),
        "difference in points": round(100 * sum(differences) / len(differences), 3),
        "95 % interval": [round(100 * low, 3), round(100 * high, 3)],
        "McNemar p": round(mcnemar(*correct), 3),
        "bytes int8 / float32": round(small.bytes / small.float_bytes, 3),
        "median relative error of logits": round(small.error, 4),
    }


if __name__ == "__main__":
    sys.exit(main())
