"""Images per second that `normfree serve` answers on loopback, with and without batching.

    python -m benchmarks.serve_load [FOLDER ...] [--seconds 8] [--concurrency 1 8 32]

Without folders, nf_resnet_nano_64 and nf_resnet50 run with random weights, which are as fast as trained ones. `ab`
(Debian: apache2-utils) generates the load: it posts one JPEG of 500 x 375 pixels over persistent connections. Server,
decoding and load generator share the machine. Prints a table and writes benchmarks/results/serve.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from normfree import create_model, save_pretrained
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel

RESULTS = Path(__file__).parent / "results" / "serve.json"
SHOWN = ("requests_per_second", "p50_ms", "p99_ms", "mean_batch")


def random_model(name: str, classes: int, folder: Path) -> Path:
    """Write a model folder with random weights; return its path."""
    net = create_model(name, num_classes=classes).eval()
    pre = Preprocessing(image_size=net.variant.test_size)
    return save_pretrained(TrainedModel(net, pre, tuple(map(str, range(classes)))), folder / name)


def photo(path: Path) -> Path:
    """Write a smooth random image with about as many bytes as a photograph of its size; return its path."""
    noise = np.random.default_rng(0).integers(0, 255, (47, 63, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(path, "JPEG", quality=90)
    return path


@contextmanager
def server(folder: Path, max_batch: int) -> Iterator[str]:
    """Run `normfree serve` and yield its address."""
    args = ["serve", str(folder), "--port", "0", "--max-batch", str(max_batch)]
    process = subprocess.Popen([sys.executable, "-m", "normfree", *args], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found, "the server did not start"
        yield found[0]
    finally:
        process.terminate()
        process.wait()


def counted(address: str) -> tuple[float, float]:
    """Return the numbers of batches and images that the server has processed."""
    with urllib.request.urlopen(address + "metrics") as response:
        text = response.read().decode()
    values = [
        re.search(rf"^normfree_batch_size_{kind} (\S+)$", text, re.MULTILINE) for kind in ("count", "sum")
    ]
    return tuple(float(v[1]) if v else 0.0 for v in values)  # type: ignore[return-value]


def load(tool: str, address: str, body: Path, *, concurrency: int, seconds: float) -> dict[str, float]:
    """Run the load generator once; return requests/s, latencies in milliseconds and the mean batch size."""

    def ab(requests: int) -> str:
        args = f"-q -k -l -s 300 -n {requests} -c {concurrency} -T image/jpeg".split()
        done = subprocess.run(
            [tool, *args, "-p", str(body), address + "predict"], capture_output=True, text=True
        )
        return done.stdout + done.stderr

    def number(pattern: str, text: str) -> float:
        found = re.search(pattern, text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    ab(2 * concurrency)  # the first batch of each size is slower
    rate = number(r"^Requests per second:\s+([\d.]+)", ab(2 * concurrency))
    batches, images = counted(address)
    text = ab(max(4 * concurrency, 20, int(rate * seconds)))
    after = counted(address)
    if number(r"^Non-2xx responses:\s+(\d+)", text) or not number(r"^Requests per second:\s+([\d.]+)", text):
        raise RuntimeError(text)
    return {
        "requests": number(r"^Complete requests:\s+(\d+)", text),
        "requests_per_second": number(r"^Requests per second:\s+([\d.]+)", text),
        "p50_ms": number(r"^\s+50%\s+(\d+)", text),
        "p99_ms": number(r"^\s+99%\s+(\d+)", text),
        "mean_batch": round((after[1] - images) / max(1.0, after[0] - batches), 2),
    }


def main() -> None:
    """Measure all folders, print the table and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="run or model folders")
    parser.add_argument("--seconds", type=float, default=8.0, help="approximate duration of each measurement")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32], help="open connections")
    arguments = parser.parse_args()
    tool = shutil.which("ab")
    if tool is None:
        raise SystemExit("ab is missing: apt-get install apache2-utils")
    with tempfile.TemporaryDirectory() as temporary:
        body = photo(Path(temporary) / "photo.jpg")
        folders = arguments.folders
        weights = "as given" if folders else "random"
        if not folders:
            shapes = (("nf_resnet_nano_64", 10), ("nf_resnet50", 1000))
            folders = [random_model(name, classes, Path(temporary)) for name, classes in shapes]
        rows = []
        print(
            f"{'model':<20}{'batch':>6}{'clients':>8}{'requests/s':>12}{'p50 ms':>9}{'p99 ms':>9}{'mean batch':>12}"
        )
        for folder in folders:
            for concurrency in arguments.concurrency:
                for max_batch in (1, 16):  # in turn, so that both run under the same load of the machine
                    with server(folder, max_batch) as address:
                        row = load(tool, address, body, concurrency=concurrency, seconds=arguments.seconds)
                    rows.append({"model": folder.name, "max_batch": max_batch, "clients": concurrency, **row})
                    values = (max_batch, concurrency, *(row[k] for k in SHOWN))
                    print(f"{folder.name:<20}" + "".join(f"{v:>12g}" for v in values), flush=True)
        facts = {
            "weights": weights, "image": f"JPEG, 500 x 375 pixels, {body.stat().st_size:,} bytes",
            "load_tool": "ab -k", "max_delay_ms": 5,
            "cpus": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__,
            "torch_threads": torch.get_num_threads(), "rows": rows,
        }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
