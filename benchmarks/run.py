"""The benchmarks: `python benchmarks/run.py SUITE [NAME ...] [--rounds N]`. Writes results/SUITE.json and .md."""

from __future__ import annotations

import argparse
from functools import partial

import harness
import inference
import training

SUITES = {
    "inference": inference.suite,
    "training": training.suite,
    "training_bfloat16": partial(training.suite, half=True),
    "update": training.update_suite,
}


def main() -> None:
    """Parses, runs, writes, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("names", nargs="*", help="networks; default all of the suite")
    parser.add_argument("--rounds", type=int, default=11)
    words = parser.parse_args()
    comparisons = SUITES[words.suite](words.names, rounds=words.rounds)
    if not words.names:
        print(harness.write(words.suite, comparisons).read_text(encoding="utf-8"))
    else:
        print(harness.table(comparisons))


if __name__ == "__main__":
    main()
