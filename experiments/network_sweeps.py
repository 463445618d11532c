"""Experiments on networks: small batches, depth, architecture, regularization, transfer, batches of one class.

[A] is arXiv 2101.08692, [B] is arXiv 2102.06171.
"""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import fmean
from typing import Any

from experiments.classify import Settings
from experiments.clipping_sweeps import AGC, BN, NF, STANDARD, batches, rates
from experiments.sweep import Arm, Pretraining, Sweep, Table
from experiments.verdicts import FAILS, HOLDS, UNDECIDED, Finding, Scores, as_good, both, expect, rows_of

GN = "GN"


def _small_rule(table: Table) -> list[Finding]:
    """Batch norm is scored with statistics that were measured again after the training. It fails at small batches if
    NF is ahead of it at the smallest batch, and by at least 5 points on average, or by diverged runs of BN alone, at 2
    or 4. NF does not depend on the batch size if no run diverged, and at the smallest batch it is as good as at the
    largest, within 2 points. Group norm is as good as NF if it is at the smallest batch."""
    small, large = table.points[0], table.points[-1]
    rows = [{**row, "top1": row.get("measured_top1", row.get("top1"))} for row in table.rows]
    table = Table(table.sweep, rows, tried=table.tried)
    gaps = {p: table.compare((NF, p), (BN, p)) for p in table.points[:2]}
    wide = [
        one.verdict == "ahead" and (one.paired is None or one.paired.difference >= 5) for one in gaps.values()
    ]
    known = all(one.verdict != UNDECIDED for one in gaps.values())
    lost = any(table.diverged(NF, p) for p in table.points)
    flat, group = table.compare((NF, small), (NF, large)), table.compare((GN, small), (NF, small))
    return [
        Finding(
            "bn-small-batch",
            both(expect(gaps[small], "ahead"), HOLDS if any(wide) else FAILS if known else UNDECIDED),
            "NF against BN, " + "; ".join(f"batch {p}: {one}" for p, one in gaps.items()),
            rows_of(*gaps.values()),
        ),
        Finding(
            "nf-small-batch",
            FAILS if lost else as_good(flat, margin=2),
            f"NF at batch {small} against {large}: {flat}",
            flat.rows,
        ),
        Finding("gn-small-batch", as_good(group), f"batch {small}, GN against NF: {group}", group.rows),
    ]


def small_batches() -> Sweep:
    """Batches of 2 to 16 images: NF, NF + AGC, BN and GN."""
    return Sweep(
        name="small_batches",
        title="Batches of 2 to 16 images",
        about="Batch norm estimates its statistics from the batch; the other arms do not. Its running statistics are "
        "averages over the last ten batches or so, so BN is also scored with statistics that are measured after the "
        "training, on training images. The rate is proportional to the batch size; its factor is chosen for each arm "
        "at batch 8.",
        base=Settings(images=4_000, epochs=3.0),
        images=STANDARD,
        arms={
            NF: Arm(candidates=rates(0.4, 1.0, 2.5)),
            AGC: Arm(changes={"clip": "agc", "clipping": 0.16}, candidates=rates(0.4, 1.0, 2.5)),
            BN: Arm(changes={"method": "batch"}, candidates=rates(0.4, 1.0, 2.5)),
            GN: Arm(changes={"method": "group"}, candidates=rates(0.4, 1.0, 2.5)),
        },
        axis="batch",
        points=batches(2, 4, 8, 16),
        choose_at="8",
        pairs=((NF, BN), (AGC, NF), (GN, BN)),
        decide=_small_rule,
        paper={(NF, "4"): 69.9, (BN, "4"): 55.7},
        source="[A] table 2, ImageNet at batch 4, from a summary of the paper; not checked against the paper itself",
    )


# --- depth ------------------------------------------------------------------------------------------------------


def depths() -> dict[str, dict[str, Any]]:
    """Return points of three stages of bottleneck blocks: 2 + 3 · blocks convolutions on the way, shortcuts not
    counted."""
    blocks = {"8": (1, 1, 0), "20": (2, 2, 2), "56": (6, 6, 6), "218": (24, 24, 24)}
    found: dict[str, dict[str, Any]] = {}
    for label, each in blocks.items():
        kept = [depth for depth in each if depth]
        shape = {
            "depths": tuple(kept),
            "widths": (32, 64, 128)[: len(kept)],
            "strides": (1, 2, 2)[: len(kept)],
        }
        found[label] = {"fields": shape}
    return found


def _signal(table: Table, arm: str, point: str, name: str) -> float:
    """Return a statistic after the last block before training, averaged over the seeds; NaN if it is missing."""
    found = [
        row["signal_before"][name][-1]
        for row in table.rows
        if (row["arm"], row["point"]) == (arm, point) and "signal_before" in row
    ]
    return fmean(found) if found else math.nan


def _depth_rule(table: Table) -> list[Finding]:
    """NF trains at any depth if at the largest it is as good as at 56. NF matches BN if it is as good at the largest
    depth. The mean shift costs accuracy if the cosine between images after the last
    block is above 0.8 without weight standardization and below 0.5 with it, before training, and NF without it is
    behind NF. Without any of it, signals explode with depth if the variance after the last block exceeds 100 at the
    largest depth, and the training fails: each run diverges or has less than half of NF's mean accuracy.
    SkipInit and FixUp, whose branches start at 0, are worse than NF if they are behind NF with a skip gain of 0, the
    published value, at the largest depth."""
    deep, reference = table.points[-1], table.points[len(table.points) // 2]
    own, bn = (table.compare(("NF", deep), other) for other in (("NF", reference), (BN, deep)))
    plain, nothing = "no weight standardization", "nothing"
    without, given = (_signal(table, arm, deep, "cosine") for arm in (plain, "NF"))
    shift = _holds(without > 0.8 and given < 0.5, known=not math.isnan(without + given))
    lost, failed = (table.compare((arm, deep), ("NF", deep)) for arm in (plain, nothing))
    runs, nf = table.of(nothing, deep), table.mean("NF", deep)
    trained = nf is not None and any(one is not None and one >= nf / 2 for one in runs)
    others = {arm: table.compare((arm, deep), ("NF, gain 0", deep)) for arm in ("SkipInit", "FixUp")}
    variance = _signal(table, nothing, deep, "variance")
    return [
        Finding("nf-deep", as_good(own), f"{deep} against {reference} layers: {own}", own.rows),
        Finding("nf-bn-deep", as_good(bn), f"{deep} layers, NF against BN: {bn}", bn.rows),
        Finding(
            "mean-shift",
            both(shift, expect(lost, "behind")),
            f"{deep} layers, cosine {without:.2f} without, {given:.2f} with; without against with: {lost}",
            lost.rows,
        ),
        Finding(
            "explosion",
            both(
                _holds(variance > 100, known=not math.isnan(variance)),
                _holds(not trained, known=nf is not None and len(runs) == len(table.of("NF", deep))),
            ),
            f"{deep} layers: variance {variance:.2g}, top-1 {table.text(nothing, deep)}; against NF: {failed}",
            failed.rows,
        ),
        Finding(
            "nf-skipinit-fixup",
            both(*(expect(one, "behind") for one in others.values())),
            "; ".join(f"{arm} against NF, gain 0: {one}" for arm, one in others.items()),
            rows_of(*others.values()),
        ),
    ]


def _holds(condition: bool, *, known: bool) -> str:
    """Return the verdict of a condition, UNDECIDED if its numbers are not known."""
    return UNDECIDED if not known else HOLDS if condition else FAILS


def depth() -> Sweep:
    """Depths of 8 to 218 layers, and signal propagation before and after the training (table 1 of [A])."""
    tried = rates(0.1, 0.3, 1.0, 3.0)
    arms = {
        "NF": Arm(candidates=tried),
        "NF, gain 0": Arm(changes={"fields": {"skip_gain": 0.0}}, candidates=tried),
        "SkipInit": Arm(changes={"method": "skipinit"}, candidates=tried),
        "FixUp": Arm(changes={"method": "fixup"}, candidates=tried),
        BN: Arm(changes={"method": "batch"}, candidates=(*tried, *rates(10.0, 30.0))),
        "no weight standardization": Arm(changes={"method": "unstandardized"}, candidates=tried),
        "nothing": Arm(
            changes={"method": "plain", "clip": "agc"}, candidates=rates(0.003, 0.01, 0.1, 0.3, 1.0)
        ),
    }
    return Sweep(
        name="depth",
        title="Depth, with and without norms",
        about="Bottleneck networks with ReLU of 8 to 218 layers. Each arm has its own rate at each depth. `nothing` "
        "has neither norms nor the "
        "scalars α and β, and is trained with AGC.",
        base=Settings(base="deep", images=4_000, epochs=3.0, batch=64, signal=True),
        images=STANDARD,
        arms=arms,
        axis="layers",
        points=depths(),
        pairs=tuple((name, BN) for name in arms if name != BN),
        decide=_depth_rule,
        source="[A] table 1, ResNets on ImageNet; published values not checked, so none is quoted",
    )


# --- from SE-ResNeXt-D to NFNet -----------------------------------------------------------------------------------

STEPS = ("baseline", "+ width pattern", "+ second conv", "+ mixup", "+ RandAugment", "+ cutmix")
FINAL, FINAL_BN = "final, own rate", "final with BN"


def _architecture_rule(table: Table) -> list[Finding]:
    """A step helps if it is ahead of the one before it. Batch norm in the final network does not help if the final NF
    network is as good, each with its own rate."""
    found = []
    for before, after in pairwise(STEPS):
        one = table.compare((after, ""), (before, ""))
        claim = f"step{after.replace('+', '').replace(' ', '-')}"
        found.append(Finding(claim, expect(one, "ahead"), f"{after}: {one}", one.rows))
    final = table.compare((FINAL, ""), (FINAL_BN, ""))
    return [*found, Finding("final-bn", as_good(final), f"NF against BN: {final}", final.rows)]


def architecture() -> Sweep:
    """Table 2 of [B]: from an SE-ResNeXt-D with AGC to NFNet-F0, with an eighth of the channels."""
    old = {"widths": (32, 64, 128, 256), "second_conv": False}
    grown: list[dict[str, Any]] = [
        {"fields": old},
        {"fields": {"second_conv": False}},
        {},
        {"mixup": 0.2},
        {"mixup": 0.2, "randaugment": "2x5"},
        {"mixup": 0.2, "randaugment": "2x5", "cutmix": 1.0},
    ]
    arms = {name: Arm(changes=changes) for name, changes in zip(STEPS, grown, strict=True)}
    own = rates(0.2, 0.4, 0.8, 1.6)
    arms[FINAL] = Arm(changes=grown[-1], candidates=own)
    arms[FINAL_BN] = Arm(changes={**grown[-1], "method": "batch", "clip": "off"}, candidates=own)
    paper = dict(zip(STEPS, (80.4, 80.9, 81.3, 82.2, 83.2, 83.6), strict=True)) | {FINAL_BN: 83.4}
    return Sweep(
        name="architecture",
        title="From SE-ResNeXt-D to NFNet",
        about="Table 2 of [B] with an eighth of the channels, at 32 px. The augmentation needs longer trainings than "
        "these 281 steps to help: it lowers the accuracy on training images, too.",
        base=Settings(base="f0", images=6_000, epochs=6.0, rate=0.4, clip="agc", clipping=0.08),
        images=STANDARD,
        arms=arms,
        pairs=(*zip(STEPS[1:], STEPS, strict=False), (FINAL, FINAL_BN)),
        decide=_architecture_rule,
        paper={(name, ""): value for name, value in paper.items()},
        source="[B] table 2, NFNet-F0 on ImageNet",
    )


# --- regularization -----------------------------------------------------------------------------------------------

KINDS = {
    "plain": {},
    "dropout": {"drop_rate": 0.3},
    "stochastic depth": {"stochdepth_rate": 0.2},
    "both": {"drop_rate": 0.3, "stochdepth_rate": 0.2},
}


def _regularization_rule(table: Table) -> list[Finding]:
    """Batch norm regularizes if the plain NF network fits the training images better than the plain BN network (ahead
    in top-1 on trained images) and the BN network is as good on test images. Explicit regularization gains NF more if
    the gain of NF by `both`, minus the gain of BN, seed by seed, is above 0 (ahead)."""
    plain = (f"{NF}, plain", ""), (f"{BN}, plain", "")
    trained, tested = table.other("trained_top1").compare(*plain), table.compare(*reversed(plain))
    rows = []
    for norm in (NF, BN):
        regularized, without = table.by_seed(f"{norm}, both"), table.by_seed(f"{norm}, plain")
        for seed in regularized.keys() & without.keys():
            pair = regularized[seed], without[seed]
            gain = None if pair[0] is None or pair[1] is None else pair[0] - pair[1]
            status = "diverged" if gain is None else "done"
            rows.append({"arm": norm, "point": "", "seed": seed, "status": status, "top1": gain})
    gains = Scores(rows).compare((NF, ""), (BN, ""))
    four = tuple((f"{norm}, {kind}", "") for norm in (NF, BN) for kind in ("plain", "both"))
    return [
        Finding(
            "bn-regularizes",
            both(expect(trained, "ahead"), as_good(tested)),
            f"on trained images, NF against BN: {trained}; on test images, BN against NF: {tested}",
            tested.rows,
        ),
        Finding(
            "explicit-regularization", expect(gains, "ahead"), f"gain of NF minus gain of BN: {gains}", four
        ),
    ]


def regularization() -> Sweep:
    """Batch norm's implicit regularization against dropout and stochastic depth."""
    arms = {
        f"{norm}, {kind}": Arm(changes={"fields": fields, "method": method}, candidates=tried)
        for norm, method, tried in ((NF, "nf", rates(0.2, 0.4, 0.8)), (BN, "batch", rates(0.8, 1.6, 3.2)))
        for kind, fields in KINDS.items()
    }
    return Sweep(
        name="regularization",
        title="Batch norm's regularization, dropout and stochastic depth",
        about="Small data and a long training, so that networks overfit. No network is clipped.",
        base=Settings(images=2_000, epochs=40.0),
        images=STANDARD,
        arms=arms,
        pairs=tuple(
            (f"{norm}, {kind}", f"{norm}, plain") for norm in (NF, BN) for kind in KINDS if kind != "plain"
        ),
        decide=_regularization_rule,
        source="[A] table 1, with and without dropout and stochastic depth; published values not checked, so none is "
        "quoted",
    )


# --- transfer -----------------------------------------------------------------------------------------------------


def _transfer_rule(table: Table) -> list[Finding]:
    """NF transfers better if it is ahead of BN at each resolution of fine-tuning. A larger resolution helps NF if the
    largest is ahead of the smallest. NF tolerates a test size of twice the training size as well as BN if it is as good
    at that size, for the networks that were fine-tuned at the smallest."""
    small, large = table.points[0], table.points[-1]
    each = {p: table.compare((AGC, p), (BN, p)) for p in table.points}
    grown = table.compare((AGC, large), (AGC, small))
    twice = 2 * table.sweep.settings(AGC, small, {}).size
    far = table.other(f"top1@{twice}").compare((AGC, small), (BN, small))
    return [
        Finding(
            "nf-transfer",
            both(*(expect(one, "ahead") for one in each.values())),
            "NF + AGC against BN: " + "; ".join(f"{p} px {one}" for p, one in each.items()),
            rows_of(*each.values()),
        ),
        Finding(
            "transfer-resolution",
            expect(grown, "ahead"),
            f"NF + AGC, {large} against {small} px: {grown}",
            grown.rows,
        ),
        Finding(
            "test-resolution",
            as_good(far),
            f"fine-tuned at {small}, tested at {twice} px, NF + AGC against BN: {far}",
            far.rows,
        ),
    ]


def transfer() -> Sweep:
    """Table 4 of [B]: pretraining on six classes, fine-tuning on four others at three resolutions."""
    return Sweep(
        name="transfer",
        title="Pretraining and fine-tuning at three resolutions",
        about="Pretraining on six of ten classes at 32 px, fine-tuning on the four others, a tenth of the "
        "images, at 32, 48 and 64 px, to which images of 32 px are enlarged. Each arm is pretrained at a rate of its "
        "own, and networks that were fine-tuned at 32 px are also tested at 40, 48 and 64 px.",
        base=Settings(images=320, epochs=8.0, batch=32),
        images=STANDARD,
        arms={
            AGC: Arm(changes={"clip": "agc", "clipping": 0.16}, candidates=rates(0.06, 0.2, 0.6, 1.8)),
            BN: Arm(changes={"method": "batch"}, candidates=rates(0.06, 0.2, 0.6, 1.8, 5.4)),
        },
        axis="px",
        points={"32": {"sizes": (32, 40, 48, 64)}, "48": {"size": 48}, "64": {"size": 64}},
        choose_at="32",
        pairs=((AGC, BN),),
        decide=_transfer_rule,
        seeds=5,
        pretraining=Pretraining(
            changes={"images": 4_800, "epochs": 10.0, "batch": 128},
            # The best on V of batch_size at this batch.
            by_method={"nf": {"rate": 0.8}, "batch": {"rate": 1.6}},
            classes=(0, 1, 2, 3, 4, 5),
        ),
        paper={
            (AGC, "32"): 79.5,
            (AGC, "48"): 80.9,
            (AGC, "64"): 81.1,
            (BN, "32"): 78.1,
            (BN, "48"): 79.6,
            (BN, "64"): 79.9,
        },
        paper_points={"32": "224", "48": "320", "64": "384"},
        source="[B] table 4, ResNet-50 pretrained on 300 million images, fine-tuned on ImageNet at 224, 320 and 384 px",
    )


# --- batches of one class -------------------------------------------------------------------------------------------


def _one_class_rule(table: Table) -> list[Finding]:
    """Batch norm relies on a mix of classes in its batch if BN with sorted devices is behind BN with mixed ones, and
    NF with sorted devices is equal to NF with mixed ones; its gradient is the same in both cases up to rounding."""
    found = {norm: table.compare((f"{norm}, sorted", ""), (f"{norm}, mixed", "")) for norm in (BN, NF)}
    numbers = "; ".join(f"{norm}: {one}" for norm, one in found.items())
    return [
        Finding(
            "bn-independence",
            both(expect(found[BN], "behind"), expect(found[NF], "equal")),
            numbers,
            rows_of(*found.values()),
        )
    ]


def one_class_batches() -> Sweep:
    """Devices with few classes each: statistics per device see one class, the gradient is that of the whole batch."""
    arms = {
        f"{norm}, {kind}": Arm(
            changes={
                "method": "batch" if norm == BN else "nf",
                "devices": 10,
                "sorted_batches": kind == "sorted",
            }
        )
        for norm in (BN, NF)
        for kind in ("mixed", "sorted")
    }
    return Sweep(
        name="one_class_batches",
        title="Devices that see one class each",
        about="Ten virtual devices of 16 images. `sorted` orders each batch by class, so that a device sees "
        "one or two classes. All arms "
        "sum the gradient of the same 160 images.",
        base=Settings(batch=160, images=4_000, epochs=4.0),
        images=STANDARD,
        arms=arms,
        pairs=((f"{BN}, sorted", f"{BN}, mixed"), (f"{NF}, sorted", f"{NF}, mixed")),
        decide=_one_class_rule,
        source="Irpan, The perils of batch norm (2017), states the effect without numbers",
    )
