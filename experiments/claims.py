"""The claims of the two papers and of the literature on batch norm, with our verdicts: writes docs/claims.md.

    python -m experiments.claims
    python -m experiments.claims --judge      # first judge the committed results again, after a rule was changed

A verdict comes from the results that are committed in experiments/results/: from the findings of an experiment that
has been run, else from a page of an earlier program or of a test, quoted here. A claim without either is "not run
yet". `python -m experiments.run` writes the page after its experiments.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments import finetune
from experiments.candidates import ends
from experiments.catalog import DEFAULT, NAMES, experiment
from experiments.claim_list import CLAIMS, NOT_RUN, Claim, Evidence
from experiments.contrastive import Contrastive
from experiments.pages import markdown
from experiments.privacy import Privacy
from experiments.sweep import Sweep
from experiments.verdicts import FAILS, HOLDS, UNDECIDED, Scores, as_good, expect
from normfree.files import atomic_write_text

ROOT = Path(__file__).parents[1]
CORES = 2  # of the machine that the estimates are for
RESULTS, PAGE = ROOT / "experiments" / "results", ROOT / "docs" / "claims.md"


INTRODUCTION = """\
# The claims of the papers, and what we found

[A] is arXiv 2101.08692, [B] is arXiv 2102.06171. Written by `python -m experiments.claims` from the committed
results. `make reproduce DATA=FOLDER` runs those that are missing. Networks and data are small (CIFAR-10 at 32 px
unless stated), so a claim that does not hold here may hold on ImageNet, and the other way round. The images are a
copy of CIFAR-10 as JPEG of quality 75, so accuracies compare arms with each other, not with published ones. Numbers
of [B] are those of its tables, and of its figure 2a as read off. No copy of [A] was at hand: its sections and
tables are named, its numbers are not checked, and the pages quote none of them, except two from a summary that are
marked as such.

Differences are in percentage points of test accuracy, with 95 % intervals. *Ahead* and *behind* mean that the
interval excludes 0, *equal* that it lies within 1 point of 0, *undecided* anything else. *As good as*, the test of
many claims, means that the whole interval lies above -1 point, or above another margin that the rule names: it can
hold where a difference is *undecided*, and be undecided where an arm is *behind* by a little. *Sees 2.8* means that
as many seeds with this spread see a gap of 2.8 points in 8 of 10 experiments. † marks verdicts on an arm whose best
rate or λ is at an end of those that were tried, so that a better one may exist. With so many intervals, some verdicts
are wrong by chance.

The rules of the verdicts are on the pages of the experiments. They were fixed before the runs, except for rows
without an experiment of `make reproduce`, and these changes after results had been seen:

- The rule for `as good as` used to ignore its margin where an interval excludes 0. Three claims that did not hold
  became undecided: that NF matches BN at small batches, that NF with AGC matches BN with one rate for all, and that
  NF is as good as synchronized BN.
- Two claims were added: that BN allows larger rates, and that a skip gain of 0 should not be clipped.
- Rates were added in `batch_size`, `contrastive`, `depth`, `transfer` and `optimizers`, after runs with fewer had been
  scored on the test images. In `transfer`, batch norm trains better at a larger rate: a claim that held, that NF
  transfers better, became undecided.
- The fine-tuning on photographs of solar cells used to choose its rates on the images that it reported. It was run
  again with test images that choose nothing, and with more rates. An undecided claim, that NF fine-tunes better on
  them, holds.
- That training fails without norm and scalars used to need a comparison with NF, which a single diverged run makes
  undecided, although the other runs were random guesses. A run that diverges or guesses has failed now: an undecided
  claim holds.
- An arm whose network learns nothing at a rate no longer bears it. The harm of the leak is judged by the same
  network without the leak, no longer by NF. These changed no verdict.
"""


def findings(results: Path) -> dict[tuple[str, str], Evidence]:
    """Return what the committed results of experiments say, by (experiment, claim)."""
    found: dict[tuple[str, str], Evidence] = {}
    for path in sorted(results.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        at_end = {(entry["arm"], entry["point"]) for entry in content.get("chosen", ()) if ends(entry)}
        for finding in content.get("findings", ()):
            evidence = Evidence(
                finding["verdict"],
                finding["numbers"],
                content["command"],
                str(finding.get("seeds") or content["seeds"]),
                content["machine"],
                f"experiments/results/{path.stem}.md",
                at_end=any(tuple(row) in at_end for row in finding.get("rows", ())),
            )
            found.setdefault((path.stem, finding["claim"]), evidence)
    return found | _shared_rate(results) | _finetune(results)


def _shared_rate(results: Path) -> dict[tuple[str, str], Evidence]:
    """Return what the earlier experiment on the batch size, with one rate for all arms, says by today's rule."""
    content = _read(results / "batch_size_shared_rate.json")
    if not content:
        return {}
    scores = Scores({**cell, "point": str(cell["batch"])} for cell in content["cells"])
    about = Evidence(
        "", "", "an earlier program", "3", content["machine"], "experiments/results/batch_size_shared_rate.md"
    )
    large = scores.compare(("nf_agc", "512"), ("bn", "512"))
    small = scores.compare(("nf", "32"), ("bn", "32"))
    note = "rates and λ were chosen on the reported images"
    return {
        ("batch_size_shared_rate", "agc-large-batch-shared"): replace(
            about,
            verdict=as_good(large),
            numbers=f"batch 512, NF + AGC against BN: {large}; NF diverged in "
            f"{scores.diverged('nf', '512')} of 3; {note}",
        ),
        ("batch_size_shared_rate", "nf-competitive-shared"): replace(
            about,
            verdict=as_good(small),
            numbers=f"batch 32, NF against BN: {small}; {note}",
        ),
    }


def _finetune(results: Path) -> dict[tuple[str, str], Evidence]:
    """Return what the fine-tuning on photographs of solar cells says."""
    content = _read(results / "finetune.json")
    if not content:
        return {}
    rows: list[dict[str, Any]] = []
    for cell in content["cells"]:
        own = finetune.Cell(**cell["cell"])
        if own == finetune.Cell(own.arm, finetune.PLAIN, own.seed):
            row = {"arm": own.arm, "point": "", "seed": own.seed, "status": "done"}
            rows.append({**row, **cell["test"], "twice": content["sizes"][own.name()]["128"]})
    chosen = [
        {
            "best": {"rate": content["rates"][arm]},
            "tried": [{"changes": {"rate": float(rate)}} for rate in tried],
        }
        for arm, tried in content["probes"].items()
    ]
    about = Evidence(
        "",
        "",
        "python -m experiments.finetune --elpv WHEEL",
        "3",
        content["machine"],
        "experiments/results/finetune.md",
        at_end=any(map(ends, chosen)),
    )
    pair = ("NF + AGC", ""), ("BN twin", "")
    same, balanced, far = (Scores(rows, key=key).compare(*pair) for key in ("top1", "balanced_top1", "twice"))
    return {
        ("finetune", "nf-transfer-elpv"): replace(
            about,
            verdict=expect(same, "ahead"),
            numbers=f"NF + AGC against BN: {same}; mean over classes: {balanced}",
        ),
        ("finetune", "test-resolution-elpv"): replace(
            about,
            verdict=as_good(far),
            numbers=f"trained at 64, tested at 128 px, NF + AGC against BN: {far}",
        ),
    }


def judge_again(results: Path = RESULTS) -> None:
    """Judge the committed results by today's rules, and write their pages, plots and JSON again."""
    for name in NAMES:
        one, content = experiment(name, "cpu"), _read(results / f"{name}.json")
        if isinstance(one, Sweep | Contrastive | Privacy) and content:
            one.publish(content, results)


def _read(path: Path) -> Mapping[str, Any]:
    """Return the content of a JSON file, empty if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def evidence_for(claim: Claim, found: Mapping[tuple[str, str], Evidence]) -> Evidence:
    """Return our result on a claim."""
    own = found.get((claim.experiment, claim.key)) or claim.known
    if own is not None:
        return own
    command = f"python -m experiments.run --only {claim.experiment}" if claim.experiment in NAMES else ""
    return Evidence(command=command)


def table(results: Path = RESULTS) -> str:
    """Return the text of docs/claims.md."""
    found = findings(results)
    each = {
        section: [(claim, evidence_for(claim, found)) for claim in claims]
        for section, claims in CLAIMS.items()
    }
    counts = {
        verdict: sum(e.verdict == verdict for own in each.values() for _, e in own)
        for verdict in (HOLDS, FAILS, UNDECIDED, NOT_RUN)
    }
    lines = [
        INTRODUCTION,
        ", ".join(f"{verdict}: {count}" for verdict, count in counts.items()) + ".",
        "",
    ]
    head = ["claim", "published", "verdict", "ours", "command", "seeds", "hardware"]
    for section, own in each.items():
        rows = []
        for claim, evidence in own:
            where = (
                f"; [all](../{evidence.page})"
                if evidence.page.startswith("experiments")
                else f"; [page]({Path(evidence.page).name})"
                if evidence.page
                else ""
            )
            command = (
                f"`{evidence.command}`"
                if evidence.command.startswith(("python", "pytest"))
                else evidence.command or "–"
            )
            rows.append(
                [
                    claim.text,
                    claim.published,
                    f"**{evidence.verdict}**" + " †" * evidence.at_end
                    if evidence.verdict != NOT_RUN
                    else NOT_RUN,
                    evidence.numbers,
                    command + where,
                    evidence.seeds,
                    evidence.hardware,
                ]
            )
        lines += [f"## {section}", "", *markdown(head, rows), ""]
    failed = [(claim, e) for own in each.values() for claim, e in own if e.verdict == FAILS]
    return "\n".join([*lines, *_reasons(failed), *_experiments(results)]) + "\n"


def _reasons(failed: Sequence[tuple[Claim, Evidence]]) -> list[str]:
    """Return the section on claims that do not hold: what we think the reason is."""
    return [
        "## What does not hold here, and why we think so",
        "",
        "Reasons are hypotheses, unless an experiment is named.",
        "",
        *markdown(
            ["claim", "ours", "why"],
            [[claim.text, own.numbers, claim.reason or "–"] for claim, own in failed],
        ),
        "",
    ]


def _experiments(results: Path) -> list[str]:
    """Return the section on the experiments: cells, and measured or estimated minutes on two cores."""
    rows, total = [], 0.0
    for name in NAMES:
        one = experiment(name, "cpu")
        cells = one.all_cells()
        measured = _read(results / f"{name}.json").get("cpu_minutes")
        estimate = sum(map(one.minutes, cells)) / (1 if one.alone else CORES)
        minutes = estimate if measured is None else measured / CORES
        shown = f"~ {minutes:.0f}" if measured is None else f"{minutes:.0f}"
        total += minutes if name in DEFAULT else 0.0
        done = (
            f"[results](../experiments/results/{name}.md)" if (results / f"{name}.md").exists() else NOT_RUN
        )
        command = "make reproduce" if name in DEFAULT else f"--only {name}"
        rows.append([f"`{name}`", one.title, str(len(cells)), shown, command, done])
    return [
        "## The experiments",
        "",
        f"`make reproduce DATA=FOLDER` runs those of the papers, about {total / 60:.1f} hours on {CORES} cores, and "
        'continues after an interruption; `OPTIONS="--only NAME"` runs one, also one of the others, and '
        "`OPTIONS=--dry-run` prints the cells. `make privacy DATA=FOLDER` is `--only privacy` with the extra that it "
        "needs, the accountants of Opacus. Minutes are measured CPU time divided by the number of cores, or, after ~, "
        "an estimate from short measured steps. FOLDER has the images "
        "of CIFAR-10 in train/ and test/; the name `cifar10` uses those in data/.",
        "",
        *markdown(["name", "title", "cells", "minutes", "run by", "state"], rows),
    ]


def write(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Write docs/claims.md."""
    atomic_write_text(page, table(results))


if __name__ == "__main__":
    if "--judge" in sys.argv[1:]:
        judge_again()
    write()
