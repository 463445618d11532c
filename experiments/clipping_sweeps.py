"""Experiments on optimization: batch size, λ, what is clipped and how, skip gains, optimizers. [B] is arXiv
2102.06171."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.classify import Settings
from experiments.sweep import Arm, Images, Sweep, Table
from experiments.verdicts import FAILS, HOLDS, UNDECIDED, Finding, both, comparison_text, expect

STANDARD = Images(train=8_000, choice=2_000, test=5_000)
BN, NF, AGC = "BN", "NF", "NF + AGC"

# [B] figure 2a, top-1 in percent on ImageNet, ResNet-50, read off the figure; points hidden by others ± 0.1. Its batch
# sizes 256, 1024 and 4096, the largest and two that are smaller by the same factors as here.
FIGURE_2A: Mapping[tuple[str, str], float | str] = {
    (BN, "32"): 76.9,
    (BN, "128"): 76.4,
    (BN, "512"): 76.8,
    (NF, "32"): 76.6,
    (NF, "128"): 76.9,
    (NF, "512"): "fails (< 70)",
    (AGC, "32"): 76.8,
    (AGC, "128"): 76.95,
    (AGC, "512"): 76.7,
}


def rates(*values: float, **more: Any) -> tuple[dict[str, Any], ...]:
    """Return candidates that differ in their learning rate."""
    return tuple({"rate": value, **more} for value in values)


def batches(*sizes: int) -> dict[str, dict[str, int]]:
    """Return points that differ in their batch size."""
    return {str(size): {"batch": size} for size in sizes}


def stable_rate(table: Table, arm: str, point: str) -> float:
    """Return the largest rate tried on V that did not diverge, 0 if all did."""
    own = next(entry for entry in table.tried if (entry["arm"], entry["point"]) == (arm, point))
    return max((one["changes"]["rate"] for one in own["tried"] if one["status"] == "done"), default=0.0)


def _batch_size_rule(table: Table) -> list[Finding]:
    """At the largest batch, each arm with its own rate: NF fails if two runs diverge or it is behind BN. AGC recovers
    the accuracy if NF + AGC is ahead of BN or equal to it, and is worth something if it is ahead of NF, or NF fails
    and it does not. AGC allows larger rates if the largest rate on V that did not diverge is larger with AGC than
    without. Small batches: BN needs none of this if NF is ahead of or equal to BN at the smallest batch."""
    small, large = table.points[0], table.points[-1]
    nf, agc = (table.compare((arm, large), (BN, large)) for arm in (NF, AGC))
    gain = table.compare((AGC, large), (NF, large))
    fails = table.diverged(NF, large) >= 2 or (nf is not None and nf.verdict == "behind")
    settled = fails or (nf is not None and nf.verdict != "undecided")
    recovered = FAILS if table.diverged(AGC, large) else expect(agc, "ahead", "equal")
    with_agc, without = stable_rate(table, AGC, large), stable_rate(table, NF, large)
    levels = ", ".join(f"{arm} {table.text(arm, large)}" for arm in (BN, NF, AGC))
    return [
        Finding(
            "nf-large-batch", HOLDS if fails else FAILS if settled else UNDECIDED, f"batch {large}: {levels}"
        ),
        Finding("agc-large-batch", recovered, f"batch {large}, NF + AGC against BN: {comparison_text(agc)}"),
        Finding(
            "agc-gain",
            HOLDS
            if table.diverged(NF, large) >= 2 and not table.diverged(AGC, large)
            else expect(gain, "ahead"),
            f"batch {large}, NF + AGC against NF: {comparison_text(gain)}",
        ),
        Finding(
            "agc-rates",
            HOLDS if with_agc > without else FAILS,
            f"batch {large}: up to {with_agc:g} with AGC, {without:g} without",
        ),
        Finding(
            "nf-competitive",
            expect(table.compare((NF, small), (BN, small)), "ahead", "equal"),
            f"batch {small}, NF against BN: {comparison_text(table.compare((NF, small), (BN, small)))}",
        ),
    ]


def batch_size() -> Sweep:
    """Figure 2a of [B], each arm with its own rate."""
    agc = [(0.2, 0.16), (0.4, 0.16), (0.4, 0.08), (0.4, 0.02), (0.8, 0.02), (1.6, 0.02)]
    return Sweep(
        name="batch_size",
        title="Accuracy against batch size",
        about="Figure 2a of [B] (arXiv 2102.06171) at the size of CIFAR-10: batch norm, no norm, and no "
        "norm with AGC. Unlike "
        "in the paper, each arm has its own rate (and λ) at each batch size.",
        base=Settings(),
        images=STANDARD,
        arms={
            BN: Arm(changes={"method": "batch"}, candidates=rates(0.2, 0.4, 0.8, 1.6)),
            NF: Arm(candidates=rates(0.1, 0.2, 0.4, 0.8)),
            AGC: Arm(changes={"clip": "agc"}, candidates=[{"rate": r, "clipping": c} for r, c in agc]),
        },
        axis="batch",
        points=batches(32, 128, 512),
        pairs=((NF, BN), (AGC, BN)),
        decide=_batch_size_rule,
        seeds=5,
        paper=FIGURE_2A,
        source="[B] figure 2a, ResNet-50 on ImageNet at batches 256, 1,024 and 4,096, read off the figure",
    )


# --- λ, and what is clipped -----------------------------------------------------------------------------------

LAMBDAS = (0.01, 0.02, 0.04, 0.08, 0.16)


def _factor_rule(table: Table) -> list[Finding]:
    """The best λ is the one with the highest mean of those without a diverged run. Larger batches need a smaller λ if
    the best λ at the largest batch is smaller than at the smallest, and at the largest batch the λ that is best at
    the smallest diverges or is behind. A too small λ costs accuracy at small batches if the smallest λ is behind no
    clipping at the smallest batch. No clipping fails at the largest batch if a run diverges or it is behind the best
    λ."""
    small, large = table.points[0], table.points[-1]
    best = {
        p: max(
            (a for a in table.sweep.arms if a != "none" and table.mean(a, p) is not None),
            key=lambda a, p=p: table.mean(a, p) or 0.0,
            default="",
        )
        for p in (small, large)
    }
    numbers = "; ".join(f"batch {p}: best {best[p] or 'none'}" for p in (small, large))
    if not best[small] or not best[large]:
        return [
            Finding(claim, UNDECIDED, numbers) for claim in ("lambda-batch", "small-lambda", "no-clipping")
        ]
    moved = table.compare((best[small], large), (best[large], large))
    worse = HOLDS if table.diverged(best[small], large) else expect(moved, "behind")
    smaller = HOLDS if float(best[large].split()[-1]) < float(best[small].split()[-1]) else FAILS
    first = next(iter(table.sweep.arms))
    tight = table.compare((first, small), ("none", small))
    open_ = table.compare(("none", large), (best[large], large))
    return [
        Finding(
            "lambda-batch",
            both(smaller, worse),
            f"{numbers}; at {large}, {best[small]} against {best[large]}: {comparison_text(moved)}",
        ),
        Finding(
            "small-lambda",
            expect(tight, "behind"),
            f"batch {small}, {first} against none: {comparison_text(tight)}",
        ),
        Finding(
            "no-clipping",
            HOLDS if table.diverged("none", large) else expect(open_, "behind"),
            f"batch {large}: none {table.text('none', large)}, {best[large]} {table.text(best[large], large)}",
        ),
    ]


def clipping_factor() -> Sweep:
    """Figure 2b of [B]: λ against batch size."""
    arms = {f"λ {value:g}": Arm(changes={"clip": "agc", "clipping": value}) for value in LAMBDAS}
    return Sweep(
        name="clipping_factor",
        title="λ against batch size",
        about="Figure 2b of [B]: the clipping factor λ of AGC at three batch sizes, with one rate "
        "proportional to the batch size, "
        "as in the paper.",
        base=Settings(epochs=5.0),
        images=STANDARD,
        arms={**arms, "none": Arm()},
        axis="batch",
        points=batches(32, 128, 512),
        pairs=tuple((name, "none") for name in arms),
        decide=_factor_rule,
        source="figure 2b of [B] has no numbers to read off; at batch 4,096 its best λ is 0.01, and larger "
        "λ are unstable",
    )


def _layers_rule(table: Table) -> list[Finding]:
    """Each arm against the default, AGC of everything but the classifier, at the same rate. Clipping the classifier
    does not help if `all` is not ahead. The stem need not be clipped if `not the stem` is ahead or equal. All stages
    must be clipped if each `not stage k` diverges in a run or is behind. Unit-wise is best if `tensors` and `layers`
    are behind or equal. LARS and global norm clipping are worse if they are behind or diverge."""

    def against(arm: str) -> Any:
        return table.compare((arm, ""), ("default", ""))

    def worse(arm: str, *allowed: str) -> str:
        return HOLDS if table.diverged(arm) else expect(against(arm), "behind", *allowed)

    def shown(*arms: str) -> str:
        return "; ".join(f"{arm} {table.text(arm)}, {comparison_text(against(arm))}" for arm in arms)

    stages = [arm for arm in table.sweep.arms if arm.startswith("not stage")]
    return [
        Finding("head-unclipped", worse("all", "equal"), shown("all")),
        Finding(
            "stem-unclipped",
            FAILS if table.diverged("not the stem") else expect(against("not the stem"), "ahead", "equal"),
            shown("not the stem"),
        ),
        Finding("all-stages", both(*(worse(arm) for arm in stages)), shown(*stages)),
        Finding(
            "unit-wise", both(worse("tensors", "equal"), worse("layers", "equal")), shown("tensors", "layers")
        ),
        Finding("lars", worse("LARS"), shown("LARS")),
        Finding("norm-clipping", worse("global norm"), shown("global norm")),
    ]


def clipped_layers() -> Sweep:
    """Section 4.1 of [B]: what is clipped, and by which rule."""
    stages = ("stages.0.*", "stages.1.*", "stages.2.*")
    arms = {
        "default": Arm(),
        "all": Arm(changes={"unclipped": ()}),
        "not the stem": Arm(changes={"unclipped": ("head.weight", "stem.*")}),
        **{f"not stage {k}": Arm(changes={"unclipped": ("head.weight", stages[k])}) for k in range(3)},
        **{
            f"only stage {k}": Arm(
                changes={"unclipped": ("head.weight", "stem.*", *(p for p in stages if p != stages[k]))}
            )
            for k in range(3)
        },
        "tensors": Arm(changes={"clip": "tensor"}, candidates=[{"clipping": c} for c in (0.01, 0.02, 0.04)]),
        "layers": Arm(changes={"clip": "layer"}, candidates=[{"clipping": c} for c in (0.01, 0.02, 0.04)]),
        "global norm": Arm(
            changes={"clip": "norm"}, candidates=[{"clipping": c} for c in (0.1, 0.3, 1.0, 3.0)]
        ),
        "LARS": Arm(
            changes={"clip": "off", "optimizer": "lars"},
            candidates=[{"trust": t} for t in (0.001, 0.003, 0.01, 0.03)],
        ),
        "none, own rate": Arm(changes={"clip": "off"}, candidates=rates(0.1, 0.2)),
    }
    return Sweep(
        name="clipped_layers",
        title="What is clipped, and by which rule",
        about="Section 4.1 of [B] at batch 512 and a rate that the network without clipping cannot bear: "
        "parts that are not clipped, "
        "whole tensors and whole layers in place of units, the global norm, and LARS.",
        base=Settings(batch=512, rate=0.4, clip="agc", clipping=0.02),
        images=STANDARD,
        arms=arms,
        pairs=tuple((name, "default") for name in arms if name != "default"),
        decide=_layers_rule,
        source="[B] section 4.1 states these results without a table",
    )


# --- skip gains, optimizers -------------------------------------------------------------------------------------


def _gain_rule(table: Table) -> list[Finding]:
    """A skip gain of 0 costs accuracy in short trainings if it is behind a gain of 1 at the shorter length, both for
    NF and for NF + AGC. The cost vanishes with length if at the longer one it is ahead or equal for NF + AGC."""
    short, long = table.points[0], table.points[-1]
    found = {
        (arm, p): table.compare((f"{arm}, gain 0", p), (f"{arm}, gain 1", p))
        for arm in (NF, AGC)
        for p in (short, long)
    }
    lost = [
        HOLDS if table.diverged(f"{arm}, gain 0", short) else expect(found[arm, short], "behind")
        for arm in (NF, AGC)
    ]
    numbers = "; ".join(f"{arm}, {point}: {comparison_text(one)}" for (arm, point), one in found.items())
    return [
        Finding("skip-gain-short", both(*lost), numbers),
        Finding("skip-gain-long", expect(found[AGC, long], "ahead", "equal"), numbers),
    ]


def skip_gain() -> Sweep:
    """Skip gains that start at 0, the published value, and at 1."""
    arms = {}
    for gain in (0, 1):
        fields = {"fields": {"skip_gain": float(gain)}}
        arms[f"NF, gain {gain}"] = Arm(changes=fields, candidates=rates(0.1, 0.2, 0.4))
        arms[f"NF + AGC, gain {gain}"] = Arm(
            changes={**fields, "clip": "agc", "clipping": 0.04}, candidates=rates(0.2, 0.4, 0.8)
        )
    return Sweep(
        name="skip_gain",
        title="Skip gains that start at 0 and at 1",
        about="The published networks start with a skip gain of 0 in each branch. Under AGC such a gain "
        "moves by at most rate · λ · "
        "10⁻³ in a step, so branches open slowly. Two lengths of training at batch 512.",
        base=Settings(batch=512, images=4_000),
        images=STANDARD,
        arms=arms,
        axis="length",
        points={"10 epochs": {"epochs": 10.0}, "40 epochs": {"epochs": 40.0}},
        choose_at="10 epochs",
        pairs=((f"{NF}, gain 0", f"{NF}, gain 1"), (f"{AGC}, gain 0", f"{AGC}, gain 1")),
        decide=_gain_rule,
        source="[A] and [B] use 0 and do not report 1",
    )


def _optimizer_rule(table: Table) -> list[Finding]:
    """SAM, the average of the weights, and AGC help an optimizer if they are ahead of the same without them. The
    average is compared with the last weights of the same runs."""

    def against(arm: str, baseline: str) -> Any:
        return table.compare((arm, ""), (baseline, ""))

    pairs = {
        "sam": ("SGD, AGC, SAM", "SGD, AGC"),
        "sam-unclipped": ("SGD, SAM", "SGD"),
        "muon-agc": ("Muon, AGC", "Muon"),
    }
    found = [
        Finding(
            claim,
            expect(against(*pair), "ahead"),
            f"{pair[0]} against {pair[1]}: {comparison_text(against(*pair))}",
        )
        for claim, pair in pairs.items()
    ]
    last = [{**row, "arm": "weights"} for row in table.rows if row["arm"] == "SGD, AGC, average"]
    averaged = [{**row, "arm": "average", "top1": row.get("average_top1")} for row in last]
    own = Table(table.sweep, [*last, *averaged]).compare(("average", ""), ("weights", ""))
    return [
        *found,
        Finding(
            "ema", expect(own, "ahead", "equal"), f"averaged against last weights: {comparison_text(own)}"
        ),
    ]


def optimizers() -> Sweep:
    """SAM, averaged weights and Muon, with and without AGC."""
    agc = {"clip": "agc", "clipping": 0.08}
    muon = {"optimizer": "muon", "scaled": False, "decay": 0.05}
    arms = {
        "SGD": Arm(candidates=rates(0.2, 0.4, 0.8)),
        "SGD, AGC": Arm(changes=agc, candidates=rates(0.2, 0.4, 0.8)),
        "SGD, SAM": Arm(changes={"sam": 0.05}, candidates=rates(0.2, 0.4, 0.8)),
        "SGD, AGC, SAM": Arm(changes={**agc, "sam": 0.05}, candidates=rates(0.2, 0.4, 0.8)),
        "SGD, AGC, average": Arm(changes={**agc, "average": 0.99}, candidates=rates(0.2, 0.4, 0.8)),
        "Muon": Arm(changes=muon, candidates=rates(0.001, 0.003, 0.01)),
        "Muon, AGC": Arm(changes={**muon, **agc}, candidates=rates(0.001, 0.003, 0.01)),
    }
    return Sweep(
        name="optimizers",
        title="SAM, averaged weights and Muon, with and without AGC",
        about="Each optimizer with its own rate, at batch 128. Muon's rates are used as given; weights of "
        "gains and biases are moved by "
        "AdamW.",
        base=Settings(),
        images=STANDARD,
        arms=arms,
        pairs=tuple((name, "SGD") for name in arms if name != "SGD"),
        decide=_optimizer_rule,
        source="[B] table 3: NFNet-F5 86.0, with SAM 86.3",
    )
