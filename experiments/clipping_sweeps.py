"""Experiments on optimization: batch size, λ, what is clipped and how, skip gains, optimizers. [B] is arXiv
2102.06171."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.classify import Settings
from experiments.sweep import Arm, Images, Sweep, Table
from experiments.verdicts import FAILS, HOLDS, UNDECIDED, Finding, Scores, as_good, both, expect, rows_of

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


def rates_tried(table: Table, arm: str, point: str) -> dict[float, bool]:
    """Return the rates that an arm tried on V, and whether a run with each did not diverge and has at least half of
    the arm's best accuracy: networks that are as good as random have not learned at that rate."""
    found: dict[float, bool] = {}
    for entry in table.tried:
        if (entry["arm"], entry["point"]) == (arm, point):
            best = max((one.get("top1") or 0.0 for one in entry["tried"]), default=0.0)
            for one in entry["tried"]:
                rate, learned = one["changes"]["rate"], (one.get("top1") or 0.0) >= best / 2
                found[rate] = found.get(rate, False) or (one["status"] == "done" and learned)
    return found


def _larger_rates(claim: str, table: Table, arm: str, point: str) -> Finding:
    """Return whether an arm bears a rate that NF does not, of the rates that both tried."""
    own, plain = (rates_tried(table, name, point) for name in (arm, NF))
    common = own.keys() & plain.keys()
    lost = [rate for rate in common if not plain[rate]]
    gained, less = [rate for rate in lost if own[rate]], any(plain[r] and not own[r] for r in common)
    verdict = FAILS if less or (lost and not gained) else HOLDS if gained else UNDECIDED
    stable = [max((rate for rate, good in tried.items() if good), default=0.0) for tried in (own, plain)]
    shown = f"{arm} up to {stable[0]:g}, {NF} up to {stable[1]:g}" if common else "no rates were tried"
    return Finding(claim, verdict, f"batch {point}, one run for each rate: {shown}", seeds=1)


def _batch_size_rule(table: Table) -> list[Finding]:
    """Each arm with its own rate. At the largest batch, NF loses accuracy if it is behind BN, AGC recovers it if NF +
    AGC is as good as BN, and gains accuracy if NF + AGC is ahead of NF. AGC, or BN, allows larger rates if on V, at
    the largest batch, it trains at a rate at which NF does not, and nowhere the other way round; an arm trains at a
    rate if the run does not diverge and has at least half of the arm's best accuracy. NF matches BN at small batches if
    it is as good as BN at the smallest."""
    small, large = table.points[0], table.points[-1]
    nf, agc = (table.compare((arm, large), (BN, large)) for arm in (NF, AGC))
    gain, low = table.compare((AGC, large), (NF, large)), table.compare((NF, small), (BN, small))
    levels = ", ".join(f"{arm} {table.text(arm, large)}" for arm in (BN, NF, AGC))
    return [
        Finding(
            "nf-large-batch", expect(nf, "behind"), f"batch {large}: {levels}; NF against BN: {nf}", nf.rows
        ),
        Finding("agc-large-batch", as_good(agc), f"batch {large}, NF + AGC against BN: {agc}", agc.rows),
        Finding("agc-gain", expect(gain, "ahead"), f"batch {large}, NF + AGC against NF: {gain}", gain.rows),
        _larger_rates("agc-rates", table, AGC, large),
        _larger_rates("bn-large-rates", table, BN, large),
        Finding("nf-competitive", as_good(low), f"batch {small}, NF against BN: {low}", low.rows),
    ]


def batch_size() -> Sweep:
    """Figure 2a of [B], each arm with its own rate."""
    agc = [(0.2, 0.16), (0.4, 0.16), (0.8, 0.16), (0.4, 0.08), (0.4, 0.02), (0.8, 0.02), (1.6, 0.02)]
    return Sweep(
        name="batch_size",
        title="Accuracy against batch size",
        about="Figure 2a of [B] (arXiv 2102.06171) at the size of CIFAR-10: batch norm, no norm, and no "
        "norm with AGC. Unlike "
        "in the paper, each arm has its own rate (and λ) at each batch size.",
        base=Settings(),
        images=STANDARD,
        arms={
            BN: Arm(changes={"method": "batch"}, candidates=rates(0.2, 0.4, 0.8, 1.6, 3.2)),
            NF: Arm(candidates=rates(0.05, 0.1, 0.2, 0.4, 0.8, 1.6)),
            AGC: Arm(changes={"clip": "agc"}, candidates=[{"rate": r, "clipping": c} for r, c in agc]),
        },
        axis="batch",
        points=batches(32, 128, 512),
        pairs=((NF, BN), (AGC, BN)),
        decide=_batch_size_rule,
        seeds=5,
        paper=FIGURE_2A,
        paper_points={"32": "256", "128": "1,024", "512": "4,096"},
        source="[B] figure 2a, ResNet-50 on ImageNet at batches 256, 1,024 and 4,096, read off the figure",
    )


# --- λ, and what is clipped -----------------------------------------------------------------------------------

LAMBDAS = (0.01, 0.02, 0.04, 0.08, 0.16)


def _factor_rule(table: Table) -> list[Finding]:
    """The best λ is the one with the highest mean of those without a diverged run. Larger batches need a smaller λ if
    the best λ at the largest batch is smaller than at the smallest, and at the largest batch the λ that is best at
    the smallest is behind. A too small λ costs accuracy at small batches if the smallest λ is behind no clipping at
    the smallest batch. Training without AGC is worse at the largest batch if it is behind the best λ."""
    small, large = table.points[0], table.points[-1]
    arms = [arm for arm in table.sweep.arms if arm != "none"]
    means = {
        p: {arm: mean for arm in arms if (mean := table.mean(arm, p)) is not None} for p in (small, large)
    }
    best = {p: max(own, key=own.__getitem__, default="") for p, own in means.items()}
    numbers = "; ".join(f"batch {p}: best {best[p] or 'none'}" for p in (small, large))
    if not all(best.values()) or any(len(table.of(arm, p)) < 2 for arm in arms for p in best):
        return [
            Finding(claim, UNDECIDED, numbers) for claim in ("lambda-batch", "small-lambda", "no-clipping")
        ]
    moved = table.compare((best[small], large), (best[large], large))
    smaller = HOLDS if float(best[large].split()[-1]) < float(best[small].split()[-1]) else FAILS
    tight = table.compare((arms[0], small), ("none", small))
    open_ = table.compare(("none", large), (best[large], large))
    return [
        Finding(
            "lambda-batch",
            both(smaller, expect(moved, "behind")),
            f"{numbers}; at {large}, {best[small]} against {best[large]}: {moved}",
            moved.rows,
        ),
        Finding(
            "small-lambda",
            expect(tight, "behind"),
            f"batch {small}, {arms[0]} against none: {tight}",
            tight.rows,
        ),
        Finding(
            "no-clipping",
            expect(open_, "behind"),
            f"batch {large}, none against {best[large]}: {open_}",
            open_.rows,
        ),
    ]


def clipping_factor() -> Sweep:
    """Figure 2b of [B]: λ against batch size."""
    arms = {f"λ {value:g}": Arm(changes={"clip": "agc", "clipping": value}) for value in LAMBDAS}
    return Sweep(
        name="clipping_factor",
        title="λ against batch size",
        about="Figure 2b of [B]: the clipping factor λ of AGC at three batch sizes, with one rate "
        "proportional to the batch size, as in the paper. `recommended_clipping` computes a λ from samples of each "
        "run, to be compared with the best one.",
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
    """Each arm against the default, AGC of everything but the classifier, at the same rate. The classifier should not
    be clipped if `all` is behind. The stem need not be clipped if `not the stem` is as good. All stages must be clipped
    if each `not stage k` is behind. Unit-wise norms are at least as good if the default is as good as `tensors` and
    `layers`. AGC is better than LARS and the global norm if they are behind."""
    found = {arm: table.compare((arm, ""), ("default", "")) for arm in table.sweep.arms}

    def behind(arm: str) -> str:
        return expect(found[arm], "behind")

    def default_as_good(arm: str) -> str:
        return as_good(table.compare(("default", ""), (arm, "")))

    def finding(claim: str, arms: Sequence[str], verdict: Callable[[str], str] = behind) -> Finding:
        shown = "; ".join(f"{arm} {table.text(arm)}, {found[arm]}" for arm in arms)
        return Finding(claim, both(*map(verdict, arms)), shown, rows_of(*(found[arm] for arm in arms)))

    return [
        finding("head-unclipped", ["all"]),
        finding("stem-unclipped", ["not the stem"], lambda arm: as_good(found[arm])),
        finding("all-stages", [arm for arm in found if arm.startswith("not stage")]),
        finding("unit-wise", ["tensors", "layers"], default_as_good),
        finding("lars", ["LARS"]),
        finding("norm-clipping", ["global norm"]),
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


FREE_GAIN = f"{AGC}, gain 0 not clipped"


def _gain_rule(table: Table) -> list[Finding]:
    """A skip gain of 0 costs accuracy in short trainings if it is behind a gain of 1 at the shorter length, both for
    NF and for NF + AGC. The cost vanishes with length if at the longer one it is as good for NF + AGC. It comes from
    clipping the gains if at the longer length a gain of 0 that is not clipped is ahead of one that is."""
    short, long = table.points[0], table.points[-1]
    found = {
        (arm, p): table.compare((f"{arm}, gain 0", p), (f"{arm}, gain 1", p))
        for arm in (NF, AGC)
        for p in (short, long)
    }
    free = table.compare((FREE_GAIN, long), (f"{AGC}, gain 0", long))
    lost = [found[arm, short] for arm in (NF, AGC)]
    shown = "; ".join(f"{arm}: {one}" for arm, one in zip((NF, AGC), lost, strict=True))
    return [
        Finding(
            "skip-gain-short",
            both(*(expect(one, "behind") for one in lost)),
            f"{short}, {shown}",
            rows_of(*lost),
        ),
        Finding(
            "skip-gain-long",
            as_good(found[AGC, long]),
            f"{long}, {AGC}: {found[AGC, long]}",
            found[AGC, long].rows,
        ),
        Finding(
            "skip-gain-unclipped",
            expect(free, "ahead"),
            f"{long}, not clipped against clipped: {free}",
            free.rows,
        ),
    ]


def skip_gain() -> Sweep:
    """Skip gains that start at 0, the published value, and at 1."""
    arms = {}
    for gain in (0, 1):
        fields = {"fields": {"skip_gain": float(gain)}}
        arms[f"NF, gain {gain}"] = Arm(changes=fields, candidates=rates(0.05, 0.1, 0.2, 0.4))
        arms[f"NF + AGC, gain {gain}"] = Arm(
            changes={**fields, "clip": "agc", "clipping": 0.04}, candidates=rates(0.2, 0.4, 0.8)
        )
    free = {**arms[f"{AGC}, gain 0"].changes, "unclipped": ("head.weight", "*.skip_gain")}
    arms[FREE_GAIN] = Arm(changes=free, candidates=rates(0.2, 0.4, 0.8))
    return Sweep(
        name="skip_gain",
        title="Skip gains that start at 0 and at 1",
        about="The published networks start with a skip gain of 0 in each branch. While a gain is below 10⁻³, AGC "
        "limits its gradient to λ · 10⁻³, so branches open slowly. 10 and 40 epochs of 4,000 "
        "images at batch 512 are 78 and 312 steps. The arm with gains that are not clipped was added after the others "
        "had been run.",
        base=Settings(batch=512, images=4_000),
        images=STANDARD,
        arms=arms,
        axis="length",
        points={"10 epochs": {"epochs": 10.0}, "40 epochs": {"epochs": 40.0}},
        choose_at="10 epochs",
        pairs=(
            (f"{NF}, gain 0", f"{NF}, gain 1"),
            (f"{AGC}, gain 0", f"{AGC}, gain 1"),
            (FREE_GAIN, f"{AGC}, gain 1"),
        ),
        decide=_gain_rule,
        source="[A] and [B] use 0 and do not report 1",
    )


OPTIMIZER_PAIRS = (("SGD, AGC, SAM", "SGD, AGC"), ("SGD, SAM", "SGD"), ("Muon, AGC", "Muon"))


def _optimizer_rule(table: Table) -> list[Finding]:
    """SAM and AGC help an optimizer if they are ahead of the same without them. The average of the weights is at least
    as good if it is as good as the last weights of the same runs."""
    found = []
    for claim, (arm, baseline) in zip(("sam", "sam-unclipped", "muon-agc"), OPTIMIZER_PAIRS, strict=True):
        one = table.compare((arm, ""), (baseline, ""))
        found.append(Finding(claim, expect(one, "ahead"), f"{arm} against {baseline}: {one}", one.rows))
    last = [{**row, "arm": "weights"} for row in table.rows if row["arm"] == "SGD, AGC"]
    averaged = [{**row, "arm": "average", "top1": row.get("average_top1")} for row in last]
    own = Scores([*last, *averaged]).compare(("average", ""), ("weights", ""))
    return [
        *found,
        Finding("ema", as_good(own), f"averaged against last weights: {own}", (("SGD, AGC", ""),)),
    ]


def optimizers() -> Sweep:
    """SAM, averaged weights and Muon, with and without AGC."""
    agc = {"clip": "agc", "clipping": 0.08}
    muon = {"optimizer": "muon", "scaled": False, "decay": 0.05}
    arms = {
        "SGD": Arm(candidates=rates(0.2, 0.4, 0.8, 1.6)),
        "SGD, AGC": Arm(changes={**agc, "average": 0.99}, candidates=rates(0.2, 0.4, 0.8, 1.6)),
        "SGD, SAM": Arm(changes={"sam": 0.05}, candidates=rates(0.2, 0.4, 0.8, 1.6)),
        "SGD, AGC, SAM": Arm(changes={**agc, "sam": 0.05}, candidates=rates(0.2, 0.4, 0.8, 1.6)),
        "Muon": Arm(changes=muon, candidates=rates(0.001, 0.003, 0.01, 0.03)),
        "Muon, AGC": Arm(changes={**muon, **agc}, candidates=rates(0.001, 0.003, 0.01, 0.03)),
    }
    return Sweep(
        name="optimizers",
        title="SAM, averaged weights and Muon, with and without AGC",
        about="Each optimizer with its own rate, at batch 128; SAM with one radius, 0.05. Muon's rates are used as "
        "given; gains and biases are moved by AdamW. AGC acts on the gradient before Muon orthogonalizes it, and AdamW "
        "divides by its scale, so little of the clipping is left in the step.",
        base=Settings(),
        images=STANDARD,
        arms=arms,
        pairs=OPTIMIZER_PAIRS,
        decide=_optimizer_rule,
        source="[B] table 3: NFNet-F5 86.0, with SAM 86.3",
    )
