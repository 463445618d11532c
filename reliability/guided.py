"""A coverage-guided run of one parser, in a process of its own, by atheris.

    python -m reliability.guided NAME RUNS SEED

Inputs that reach new code go to runs/fuzz/NAME/, from which the next run continues, and an input that ends in another
error than `ValueError`, takes longer than 20 seconds or needs 3 GB goes there as crash-*, timeout-* or oom-*. Nothing
that is instrumented may be imported before `main` does, so this module imports nothing of normfree.
"""

from __future__ import annotations

import sys
from pathlib import Path

STARTS = Path(__file__).parents[1] / "runs" / "fuzz"
# Top-level packages, which is all that atheris compares. Those of Python's library are pure Python in what they parse.
_CODE = ["normfree", "PIL", "csv", "json", "tarfile", "tomllib", "zipfile"]
_LONGEST = 4096  # bytes of an input, unless a seed is longer


def main(name: str, runs: int, seed: int) -> None:
    """Fuzz one parser; an error ends the process."""
    import atheris

    for module in [module for module in sys.modules if module.partition(".")[0] in _CODE]:
        del sys.modules[module]  # else it would stay as it is
    starts = STARTS / name
    starts.mkdir(parents=True, exist_ok=True)
    with atheris.instrument_imports(include=_CODE):
        from reliability.parsers import accepts, inputs

        seeds = inputs(name)
        for data in seeds:
            accepts(name, data)  # imports what it needs
    for number, data in enumerate(seeds):
        (starts / f"seed-{number}").write_bytes(data)
    longest = max(_LONGEST, *(2 * len(data) for data in seeds))
    options = [f"-runs={runs}", f"-seed={seed}", f"-max_len={longest}", "-timeout=20", "-rss_limit_mb=3000",
               "-verbosity=0", "-print_final_stats=1", f"-artifact_prefix={starts}/"]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(starts)], lambda data: accepts(name, data) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
