"""The demo's network against its batch-norm twin under the same recipe, three seeds each.

    python -m experiments.demo_seeds [--jobs 2] [--seeds 3]

Runs `normfree train demo --model M --seed S` for both variants, two at a time on one core each, in runs/demo-seeds/.
Finished runs are kept, and interrupted runs continue. Writes experiments/results/demo_seeds.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from normfree.training.recipes import demo

RUNS = Path("runs/demo-seeds")
RESULT = Path(__file__).parent / "results" / "demo_seeds.md"


def run(model: str, seed: int, threads: int) -> dict[str, Any]:
    """Run one training in its own process; return its results.json."""
    out = RUNS / f"{model}-{seed}"
    if not (out / "results.json").exists():
        if (out / "config.toml").exists():
            args = [str(out)]
        else:
            args = ["demo", "--model", model, "--seed", str(seed), "--out", str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run([sys.executable, "-m", "normfree", "train", *args], check=True, env=environment,
                       stdout=subprocess.DEVNULL)  # fmt: skip
    return json.loads((out / "results.json").read_text())


def main() -> None:
    """Run all seeds and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    network = demo().model
    models = [network, network.removeprefix("nf_")]
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        futures = {(m, s): pool.submit(run, m, s, threads) for s in range(arguments.seeds) for m in models}
        results = {cell: future.result() for cell, future in futures.items()}
    lines = [
        "# The demo's network and its batch-norm twin",
        "",
        f"`python -m experiments.demo_seeds --seeds {arguments.seeds}`: `normfree train demo` with only the model "
        "changed. Top-1 in percent on the validation emoji: mean ± standard deviation over seeds, and each seed.",
        "",
        "| model | averaged weights | seeds | last weights | seeds |",
        "|---|---|---|---|---|",
    ]
    for model in models:
        cells = [model]
        for kind in ("average", "weights"):
            top1 = [results[model, seed][kind]["top1"] for seed in range(arguments.seeds)]
            spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
            cells += [f"{statistics.mean(top1):.1f} ± {spread:.1f}", ", ".join(f"{x:.1f}" for x in top1)]
        lines.append("| " + " | ".join(cells) + " |")
    images = results[models[0], 0]["average"]["images"]
    error = 100 * (0.2 / images) ** 0.5
    lines += [
        "",
        f"{images} validation images, so the binomial standard error of one figure is about {error:.1f} points. "
        f"{platform.machine()}, CPU, {threads} thread(s) per run.",
    ]
    RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
