"""Verdict, page and plot of the experiment on what batch statistics leak in contrastive learning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from experiments.candidates import edge_lines, section
from experiments.choices import Choices
from experiments.pages import markdown, verdict_lines
from experiments.verdicts import (
    FAILS,
    HOLDS,
    RULE,
    UNDECIDED,
    Compared,
    Finding,
    Scores,
    as_good,
    both,
    expect,
    rows_of,
    spread,
)
from normfree.diagnose.plotting import BLUE, GREEN, new_figure
from normfree.uncertainty import mean_interval

ARMS = ("nf", "bn_device", "bn_shuffled", "bn_global")
LEAK, QUIET = 0.1, 1e-3  # nats: what is called a leak, and what is called none
LEAKS, DOES_NOT_LEAK = "leaks", "does not leak"
NUMBERS = (
    "train_loss",
    "loss",
    "loss_shuffled",
    "leak",
    "knn",
    "probe",
)  # of a cell, in the order of the table


def leak_of(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return whether the runs of an arm leak.

    "Leaks": the 95 % interval of the leak over seeds lies above 0.1 nats. "Does not leak": the leak of each run is
    below 0.001 nats. "Undecided": neither, or a run diverged, or there are fewer than two runs.
    """
    leaks = [cell["leak"] for cell in cells if cell["status"] == "done"]
    if len(leaks) < max(2, len(cells)):
        return UNDECIDED
    if mean_interval(leaks).low > LEAK:
        return LEAKS
    return DOES_NOT_LEAK if all(abs(leak) < QUIET for leak in leaks) else UNDECIDED


def compare_probes(
    cells: Mapping[str, Sequence[Mapping[str, Any]]], arm: str, baseline: str = "nf"
) -> Compared:
    """Return how the linear probe of an arm compares with that of another one, paired by seed."""
    rows = ({**cell, "arm": name, "point": ""} for name in (arm, baseline) for cell in cells.get(name, ()))
    return Scores(rows, key="probe").compare((arm, ""), (baseline, ""))


def findings(cells: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Finding]:
    """Batch norm leaks, and NF does not, if `bn_device` leaks and `nf` does not leak. The leak costs accuracy if the
    linear probe of `bn_device` is behind those of `bn_shuffled` and `bn_global`, the same network without the leak. NF
    needs no exchange if it does not leak and the probe of
    `nf` is as good as that of `bn_global`."""
    state = {arm: leak_of(cells.get(arm, ())) for arm in ARMS}
    leaks = {LEAKS: HOLDS, DOES_NOT_LEAK: FAILS}.get(state["bn_device"], UNDECIDED)
    quiet = {DOES_NOT_LEAK: HOLDS, LEAKS: FAILS}.get(state["nf"], UNDECIDED)
    costs = {arm: compare_probes(cells, "bn_device", arm) for arm in ("bn_shuffled", "bn_global")}
    whole = compare_probes(cells, "nf", "bn_global")
    against = "; ".join(f"against {arm}: {one}" for arm, one in costs.items())
    numbers = ", ".join(
        f"{arm} {spread([c['leak'] for c in own if 'leak' in c], digits=3)}" for arm, own in cells.items()
    )
    return [
        Finding(
            "contrastive-leak",
            both(leaks, quiet),
            f"leak in nats: {numbers}",
            (("nf", ""), ("bn_device", "")),
        ),
        Finding(
            "contrastive-harm",
            both(*(expect(one, "behind") for one in costs.values())),
            f"linear probe of bn_device {against}",
            rows_of(*costs.values()),
        ),
        Finding(
            "contrastive-exchange",
            both(quiet, as_good(whole)),
            f"linear probe, nf against bn_global: {whole}",
            whole.rows,
        ),
    ]


def page(found: Mapping[str, Any], choices: Choices, *, image: str) -> str:
    """Return the page of results, from what the JSON holds; `image` is the name of the file that `draw` writes."""
    size, cells, chosen = found["size"], found["cells"], found["chosen"]
    batch, devices = size["batch"], size["devices"]
    rule = " ".join(f"{leak_of.__doc__} {findings.__doc__}".partition("\n")[2].split())
    rows = []
    for arm, own in cells.items():
        good = [cell for cell in own if cell["status"] == "done"]
        values = [
            spread([cell[name] for cell in good], digits=1 if name in ("knn", "probe") else 3)
            for name in NUMBERS
        ]
        shown = leak_of(own)
        shown += f"; probe against nf: {compare_probes(cells, arm)}" if arm != "nf" else ""
        shown += f"; {len(own) - len(good)} of {len(own)} diverged" if len(good) < len(own) else ""
        rows.append([arm, f"{own[0]['rate']:g}", *values, shown])
    head = [
        "arm",
        "rate",
        "training loss",
        "test loss",
        "shuffled",
        "leak, nats",
        "neighbors %",
        "linear probe %",
        "verdict",
    ]
    return "\n".join(
        [
            "# What batch statistics leak in contrastive learning",
            "",
            f"`{found['command']}`: a small network and its batch-norm twin, {size['train']} training images, batches "
            f"of {batch} images on {devices} virtual devices, {size['epochs']:g} epochs, temperature "
            f"{size['temperature']:g}, scored on {size['test']} test images. A loss of {math.log(2 * batch - 1):.3f} "
            f"nats is chance; {math.log(2 * batch / devices - 1):.3f} is that of a network that recognizes the device "
            "alone. The leak is the loss with second views shuffled over the devices minus the loss without, of the "
            "same network with batch statistics. "
            f"Mean ± standard deviation of {found['seeds']} seeds; rates chosen on V.",
            "",
            *verdict_lines(found),
            *edge_lines(chosen, choices),
            "",
            f"![Leak and accuracy of each arm]({image})",
            "",
            *markdown(head, rows),
            "",
            *section(chosen, choices),
            f"The rule: {rule} {RULE}",
            "",
            f"{found['cpu_minutes']:.0f} minutes of CPU time on {found['machine']}; torch {found['torch']}.",
            "",
        ]
    )


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw leak and linear probe of each arm: mean and standard deviation, and each seed as a dot."""
    figure = new_figure(8, 3.2)
    panels = (("leak", "leak, nats", BLUE), ("probe", "linear probe, top-1 %", GREEN))
    for axis, (name, label, color) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for index, own in enumerate(found["cells"].values()):
            values = [cell[name] for cell in own if cell["status"] == "done"]
            if values:
                error = stdev(values) if len(values) > 1 else 0.0
                axis.bar(index, fmean(values), yerr=error, color=color, alpha=0.5, capsize=4)
                axis.plot([index] * len(values), values, ".", color="black", markersize=4)
        axis.set_xticks(range(len(found["cells"])), list(found["cells"]))
        axis.set_ylabel(label)
        axis.grid(axis="y", alpha=0.25)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, format="png")
