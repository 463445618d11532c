"""Experiments on networks: small batches, depth, architecture, regularization, transfer, batches of one class.

[A] is arXiv 2101.08692, [B] is arXiv 2102.06171.
"""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean
from typing import Any

from experiments.classify import Settings
from experiments.clipping_sweeps import AGC, BN, NF, STANDARD, batches, rates
from experiments.sweep import Arm, Pretraining, Sweep, Table
from experiments.verdicts import FAILS, HOLDS, UNDECIDED, Finding, both, comparison_text, expect

GN = "GN"


def _small_rule(table: Table) -> list[Finding]:
    """Batch norm fails at small batches if NF is ahead of it at the smallest batch, and by at least 5 points on
    average at 2 or 4. NF does not depend on the batch size if its means differ by at most 2 points. Group norm is
    equally good if NF is equal to it at the smallest batch."""
    small = table.points[0]
    against = table.compare((NF, small), (BN, small))
    gaps = {p: table.compare((NF, p), (BN, p)) for p in table.points[:2]}
    wide = [
        one for one in gaps.values() if one is not None and one.verdict == "ahead" and one.difference >= 5
    ]
    means = [mean for p in table.points if (mean := table.mean(NF, p)) is not None]
    flat = UNDECIDED if len(means) < len(table.points) else HOLDS if max(means) - min(means) <= 2 else FAILS
    group = table.compare((NF, small), (GN, small))
    numbers = "; ".join(f"batch {p}: {comparison_text(one)}" for p, one in gaps.items())
    return [
        Finding(
            "bn-small-batch",
            both(expect(against, "ahead"), HOLDS if wide else FAILS if against else UNDECIDED),
            f"NF against BN, {numbers}",
        ),
        Finding(
            "nf-small-batch", flat, "NF: " + ", ".join(f"{p}: {table.text(NF, p)}" for p in table.points)
        ),
        Finding(
            "gn-small-batch",
            expect(group, "equal"),
            f"batch {small}, NF against GN: {comparison_text(group)}",
        ),
    ]


def small_batches() -> Sweep:
    """Batches of 2 to 16 images: NF, NF + AGC, BN and GN."""
    return Sweep(
        name="small_batches",
        title="Batches of 2 to 16 images",
        about="Batch norm estimates its statistics from the batch; the other arms do not. The rate is "
        "proportional to the batch size; its "
        "factor is chosen for each arm at batch 8.",
        base=Settings(images=4_000, epochs=3.0),
        images=STANDARD,
        arms={
            NF: Arm(candidates=rates(0.1, 0.4, 1.0)),
            AGC: Arm(changes={"clip": "agc", "clipping": 0.16}, candidates=rates(0.1, 0.4, 1.0)),
            BN: Arm(changes={"method": "batch"}, candidates=rates(0.1, 0.4, 1.0)),
            GN: Arm(changes={"method": "group"}, candidates=rates(0.1, 0.4, 1.0)),
        },
        axis="batch",
        points=batches(2, 4, 8, 16),
        choose_at="8",
        pairs=((NF, BN), (AGC, NF), (GN, BN)),
        decide=_small_rule,
        paper={(NF, "4"): 69.9, (BN, "4"): 55.7},
        source="[A], ResNet-50 on ImageNet at batch 4",
    )


# --- depth ------------------------------------------------------------------------------------------------------


def depths() -> dict[str, dict[str, Any]]:
    """Return points of three stages of bottleneck blocks: 2 + 3 · blocks convolutions on the way, shortcuts not
    counted."""
    blocks = {"8": (1, 1, 0), "20": (2, 2, 2), "56": (6, 6, 6), "110": (12, 12, 12), "218": (24, 24, 24)}
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
    """Return a statistic after the last block before training, averaged over the seeds."""
    rows = [row for row in table.rows if (row["arm"], row["point"]) == (arm, point)]
    return fmean(row["signal_before"][name][-1] for row in rows)


def _depth_rule(table: Table) -> list[Finding]:
    """NF trains at any depth if at the largest it is ahead of, or equal to, itself at 56. NF matches BN if it is
    ahead or equal at the largest depth. Weight standardization prevents the mean shift if the cosine between images
    after the last block is above 0.8 without it and below 0.5 with it, before training, and NF is ahead of NF without
    it. Without any of it, signals explode with depth if the variance after the last block exceeds 100 at the largest
    depth, and the training diverges or reaches less than half of NF's accuracy. SkipInit and FixUp are behind NF if
    they are so at the largest depth."""
    deep, reference = table.points[-1], table.points[len(table.points) // 2]
    own, bn = (table.compare(("NF", deep), other) for other in (("NF", reference), (BN, deep)))
    plain, cosines = "no weight standardization", {}
    for arm in ("NF", plain):
        cosines[arm] = _signal(table, arm, deep, "cosine")
    shift = HOLDS if cosines[plain] > 0.8 and cosines["NF"] < 0.5 else FAILS
    lost = (
        HOLDS if table.diverged(plain, deep) else expect(table.compare((plain, deep), ("NF", deep)), "behind")
    )
    variance, nothing, nf = (
        _signal(table, "nothing", deep, "variance"),
        table.mean("nothing", deep),
        table.mean("NF", deep),
    )
    broken = nothing is None or (nf is not None and nothing < nf / 2)
    others = {arm: table.compare((arm, deep), ("NF", deep)) for arm in ("SkipInit", "FixUp")}
    worse = [HOLDS if table.diverged(arm, deep) else expect(one, "behind") for arm, one in others.items()]
    return [
        Finding(
            "nf-deep",
            FAILS if table.diverged("NF", deep) else expect(own, "ahead", "equal"),
            f"{deep} against {reference} layers: {comparison_text(own)}",
        ),
        Finding(
            "nf-bn-deep", expect(bn, "ahead", "equal"), f"{deep} layers, NF against BN: {comparison_text(bn)}"
        ),
        Finding(
            "mean-shift",
            both(shift, lost),
            f"{deep} layers, cosine {cosines[plain]:.2f} without, {cosines['NF']:.2f} with; "
            f"top-1 {table.text(plain, deep)} and {table.text('NF', deep)}",
        ),
        Finding(
            "explosion",
            both(HOLDS if variance > 100 else FAILS, HOLDS if broken else FAILS),
            f"{deep} layers: variance {variance:.2g}, top-1 {table.text('nothing', deep)}",
        ),
        Finding(
            "nf-skipinit-fixup",
            both(*worse),
            "; ".join(f"{arm} against NF: {comparison_text(one)}" for arm, one in others.items()),
        ),
    ]


def depth() -> Sweep:
    """Depths of 8 to 218 layers, and signal propagation before and after the training (table 1 and figure 1 of [A])."""
    tried = rates(0.05, 0.1, 0.3)
    arms = {
        "NF": Arm(candidates=tried),
        "NF, gain 0": Arm(changes={"fields": {"skip_gain": 0.0}}, candidates=tried),
        "SkipInit": Arm(changes={"method": "skipinit"}, candidates=tried),
        "FixUp": Arm(changes={"method": "fixup"}, candidates=tried),
        BN: Arm(changes={"method": "batch"}, candidates=tried),
        "no weight standardization": Arm(changes={"method": "unstandardized"}, candidates=tried),
        "nothing": Arm(changes={"method": "plain", "clip": "agc"}, candidates=rates(0.01, 0.1)),
    }
    return Sweep(
        name="depth",
        title="Depth, with and without norms",
        about="Bottleneck networks with ReLU of 8 to 218 layers. Rates are chosen at 56 layers. `nothing` "
        "has neither norms nor the "
        "scalars α and β, and is trained with AGC.",
        base=Settings(base="deep", images=4_000, epochs=3.0, batch=64, signal=True),
        images=STANDARD,
        arms=arms,
        axis="layers",
        points={k: v for k, v in depths().items() if k != "110"},
        choose_at="56",
        pairs=tuple((name, BN) for name in arms if name != BN),
        decide=_depth_rule,
        source="[A] table 1, ResNet-50 on ImageNet without regularization: FixUp 74.0, SkipInit 73.7, NF 75.8, BN 76.8",
    )


# --- from SE-ResNeXt-D to NFNet -----------------------------------------------------------------------------------

STEPS = ("baseline", "+ width pattern", "+ second conv", "+ mixup", "+ RandAugment", "+ cutmix")


def _architecture_rule(table: Table) -> list[Finding]:
    """A step helps if it is ahead of the one before it. Batch norm in the final network does not help if the final NF
    network is ahead or equal, and costs time if each run's CPU time of a step exceeds that of NF by at least 10 %."""
    found = []
    for before, after in pairwise(STEPS):
        one = table.compare((after, ""), (before, ""))
        found.append(
            Finding(
                f"step{after.replace('+', '').replace(' ', '-')}",
                expect(one, "ahead"),
                f"{after}: {comparison_text(one)}",
            )
        )
    final = table.compare((STEPS[-1], ""), ("final with BN", ""))
    times = table.other("step_ms")
    nf, bn = times.good(STEPS[-1]), times.good("final with BN")
    slower = UNDECIDED if not nf or not bn else HOLDS if min(bn) > 1.1 * max(nf) else FAILS
    ratio = f"{fmean(bn) / fmean(nf):.2f} times the CPU time of a step" if nf and bn else "no times"
    return [
        *found,
        Finding("final-bn", expect(final, "ahead", "equal"), f"NF against BN: {comparison_text(final)}"),
        Finding("bn-time", slower, f"BN {ratio}"),
    ]


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
    arms["final with BN"] = Arm(
        changes={**grown[-1], "method": "batch", "clip": "off"}, candidates=rates(0.2, 0.4, 0.8)
    )
    paper = dict(zip(STEPS, (80.4, 80.9, 81.3, 82.2, 83.2, 83.6), strict=True)) | {"final with BN": 83.4}
    return Sweep(
        name="architecture",
        title="From SE-ResNeXt-D to NFNet",
        about="Table 2 of [B] with an eighth of the channels, at 32 px. Step times are CPU times on one "
        "core, so they do not depend on "
        "other load; the paper's are those of TPUs. The augmentation needs longer trainings than these to help.",
        base=Settings(base="f0", images=6_000, epochs=6.0, rate=0.4, clip="agc", clipping=0.08),
        images=STANDARD,
        arms=arms,
        pairs=(*zip(STEPS[1:], STEPS, strict=False), ("final with BN", STEPS[-1])),
        decide=_architecture_rule,
        paper={(name, ""): value for name, value in paper.items()},
        source="[B] tables 2 and 6, NFNet-F0 on ImageNet",
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
    in top-1 on trained images) and is not ahead of it on test images. Explicit regularization replaces it if the gain
    of NF by `both`, minus the gain of BN, seed by seed, is above 0 (ahead)."""
    trained = table.other("trained_top1").compare((f"{NF}, plain", ""), (f"{BN}, plain", ""))
    tested = table.compare((f"{NF}, plain", ""), (f"{BN}, plain", ""))
    rows = []
    for norm in (NF, BN):
        pairs = zip(table.of(f"{norm}, both"), table.of(f"{norm}, plain"), strict=True)
        rows += [
            {
                "arm": norm,
                "point": "",
                "seed": seed,
                "status": "done" if None not in pair else "diverged",
                "top1": pair[0] - pair[1] if None not in pair else None,
            }
            for seed, pair in enumerate(pairs)
        ]
    gains = Table(table.sweep, rows).compare((NF, ""), (BN, ""))
    return [
        Finding(
            "bn-regularizes",
            both(expect(trained, "ahead"), expect(tested, "behind", "equal", "undecided")),
            f"NF against BN: on trained images {comparison_text(trained)}; on test images {comparison_text(tested)}",
        ),
        Finding(
            "explicit-regularization",
            expect(gains, "ahead"),
            f"gain of NF minus gain of BN: {comparison_text(gains)}",
        ),
    ]


def regularization() -> Sweep:
    """Batch norm's implicit regularization against dropout and stochastic depth."""
    arms = {
        f"{norm}, {kind}": Arm(
            changes={"fields": fields, **({"method": "batch"} if norm == BN else {"clip": "agc"})}
        )
        for norm in (NF, BN)
        for kind, fields in KINDS.items()
    }
    return Sweep(
        name="regularization",
        title="Batch norm's regularization, dropout and stochastic depth",
        about="Small data and a long training, so that networks overfit. The rates of NF (with AGC) and BN are 0.4.",
        base=Settings(images=2_000, epochs=40.0),
        images=STANDARD,
        arms=arms,
        pairs=tuple(
            (f"{norm}, {kind}", f"{norm}, plain") for norm in (NF, BN) for kind in KINDS if kind != "plain"
        ),
        decide=_regularization_rule,
        source="[A] table 1: regularization gains 1 to 1.9 points for NF and -0.4 to 0.7 for BN",
    )


# --- transfer -----------------------------------------------------------------------------------------------------


def _transfer_rule(table: Table) -> list[Finding]:
    """NF transfers better if it is ahead of BN at each resolution of fine-tuning. A larger resolution helps NF if the
    largest is ahead of the smallest. NF tolerates a test size of twice the training size as well as BN if it is ahead
    or equal at that size, for the networks that were fine-tuned at the smallest."""
    each = {p: table.compare((AGC, p), (BN, p)) for p in table.points}
    grown = table.compare((AGC, table.points[-1]), (AGC, table.points[0]))
    largest = max(
        (key for row in table.rows for key in row if key.startswith("top1@")),
        key=lambda key: int(key[5:]),
        default="top1",
    )
    far = table.other(largest).compare((AGC, table.points[0]), (BN, table.points[0]))
    return [
        Finding(
            "nf-transfer",
            both(*(expect(one, "ahead") for one in each.values())),
            "NF + AGC against BN: " + "; ".join(f"{p} px {comparison_text(one)}" for p, one in each.items()),
        ),
        Finding(
            "transfer-resolution",
            expect(grown, "ahead"),
            f"NF + AGC, {table.points[-1]} against {table.points[0]} px: {comparison_text(grown)}",
        ),
        Finding(
            "test-resolution",
            expect(far, "ahead", "equal"),
            f"fine-tuned at {table.points[0]}, tested at {largest[5:] or '?'} px, "
            f"NF + AGC against BN: {comparison_text(far)}",
        ),
    ]


def transfer() -> Sweep:
    """Table 4 of [B]: pretraining on six classes, fine-tuning on four others at three resolutions."""
    return Sweep(
        name="transfer",
        title="Pretraining and fine-tuning at three resolutions",
        about="Pretraining on six of ten classes at 32 px, fine-tuning on the four others, a tenth of the "
        "images, at 32, 48 and 64 px. "
        "Networks that were fine-tuned at 32 px are also tested at 40, 48 and 64 px.",
        base=Settings(images=320, epochs=8.0, batch=32),
        images=STANDARD,
        arms={
            AGC: Arm(changes={"clip": "agc", "clipping": 0.16}, candidates=rates(0.02, 0.06, 0.2)),
            BN: Arm(changes={"method": "batch"}, candidates=rates(0.02, 0.06, 0.2)),
        },
        axis="px",
        points={"32": {"sizes": (32, 40, 48, 64)}, "48": {"size": 48}, "64": {"size": 64}},
        choose_at="32",
        pairs=((AGC, BN),),
        decide=_transfer_rule,
        seeds=5,
        pretraining=Pretraining(
            changes={"images": 4_800, "epochs": 10.0, "batch": 128, "rate": 0.4}, classes=(0, 1, 2, 3, 4, 5)
        ),
        paper={
            (AGC, "32"): 79.5,
            (AGC, "48"): 80.9,
            (AGC, "64"): 81.1,
            (BN, "32"): 78.1,
            (BN, "48"): 79.6,
            (BN, "64"): 79.9,
        },
        source="[B] table 4, ResNet-50 pretrained on 300 million images, fine-tuned on ImageNet at 224, 320 and 384 px",
    )


# --- batches of one class -------------------------------------------------------------------------------------------


def _one_class_rule(table: Table) -> list[Finding]:
    """Batch norm relies on a mix of classes in its batch if BN with sorted devices is behind BN with mixed ones, and
    NF does not if the two are equal or undecided for it; the gradient of NF is the same in both cases up to rounding.
    """
    found = {norm: table.compare((f"{norm}, sorted", ""), (f"{norm}, mixed", "")) for norm in (BN, NF)}
    numbers = "; ".join(f"{norm}: {comparison_text(one)}" for norm, one in found.items())
    return [
        Finding(
            "bn-independence",
            both(expect(found[BN], "behind"), expect(found[NF], "equal", "undecided")),
            numbers,
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
