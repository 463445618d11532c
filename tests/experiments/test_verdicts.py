"""The rules of the verdicts on made-up scores: an effect, none, its opposite, diverged runs and missing runs."""

from itertools import product

import pytest

from experiments import sweep_page
from experiments.catalog import SWEEPS, experiment
from experiments.claim_list import CLAIMS
from experiments.contrastive_page import ARMS, findings, leak_of
from experiments.latency import PAIR
from experiments.latency import findings as latency_findings
from experiments.network_sweeps import FINAL, FINAL_BN
from experiments.privacy import findings as privacy_findings
from experiments.sweep import Table
from experiments.verdicts import FAILS, HOLDS, LOST, MARGIN, UNDECIDED, Scores, as_good, both, expect, spread

NOISE = (0.1, -0.2, 0.1, 0.1, -0.1)  # of the seeds; 0 on average over three and over five
LOW, MIDDLE, HIGH = 50.0, 57.0, 60.0


def rows_of(name, levels, **more):
    """Return a cell for each arm, point and seed of a sweep, with scores around the level of `levels`, a function of
    arm and point; None is an arm whose runs diverged."""
    sweep = experiment(name, "cpu")
    rows = []
    for (number, arm), point, seed in product(enumerate(sweep.arms), sweep.points, range(sweep.seeds)):
        level = levels(arm, point)
        noise = NOISE[seed] * (-1) ** number
        row = {"arm": arm, "point": point, "seed": seed, "status": "diverged" if level is None else "done"}
        if level is not None:
            row["top1"] = level + noise
        own = {key: value(arm, point) for key, value in more.items()}
        rows.append({**row, **{k: v + noise if isinstance(v, float) else v for k, v in own.items()}})
    return rows


def verdicts(name, rows, tried=()):
    sweep = experiment(name, "cpu")
    return {finding.claim: finding.verdict for finding in sweep.decide(Table(sweep, rows, tried=tried))}


def tried_at(**stable):
    """Return what arms tried at batch 512; each value maps rates to whether the run finished."""
    names = {"nf": "NF", "agc": "NF + AGC", "bn": "BN"}
    return [
        {"arm": names[arm], "point": "512",
         "tried": [{"changes": {"rate": r}, "status": "done" if good else "diverged"} for r, good in own.items()]}
        for arm, own in stable.items()
    ]  # fmt: skip


def by_arm(levels, other=HIGH):
    return lambda arm, point: levels.get((arm, point), levels.get(arm, other))


def signals(cosine, variance):
    """Return signals before the training: the cosine without weight standardization, the variance without scalars."""

    def found(arm, _point):
        return {
            "cosine": [0.1, cosine if arm == "no weight standardization" else 0.1],
            "variance": [1.0, variance if arm == "nothing" else 1.5],
        }

    return {"signal_before": found}


BETTER_TRIED = tried_at(nf={0.2: True, 0.4: False}, agc={0.4: True, 0.8: True}, bn={0.4: True})
WORSE_TRIED = tried_at(nf={0.2: True, 0.4: True}, agc={0.2: True, 0.4: False}, bn={0.4: False})
FINAL_SCORES = {FINAL: LOW, FINAL_BN: HIGH}
STEPS = ("baseline", "+ width pattern", "+ second conv", "+ mixup", "+ RandAugment", "+ cutmix")
LAMBDAS = {("λ 0.02", "512"): HIGH, ("λ 0.16", "32"): HIGH}
LAMBDAS_REVERSED = {("λ 0.16", "512"): HIGH, ("λ 0.02", "32"): HIGH}
SHALLOW = {"no weight standardization": LOW, "nothing": 11.0, "SkipInit": LOW, "FixUp": LOW}
WORSE = dict.fromkeys(("all", "LARS", "global norm", *(f"not stage {k}" for k in range(3))), LOW) | {
    "tensors": MIDDLE,
    "layers": MIDDLE,
}
GAIN_0 = {("NF, gain 0", "10 epochs"): LOW, ("NF + AGC, gain 0", "10 epochs"): LOW}
# Sweep -> (scores with which every claim holds, more numbers), the same with which every claim fails.
CASES = {
    "batch_size": (
        rows_of("batch_size", by_arm({("NF", "512"): LOW})),
        rows_of("batch_size", by_arm({("NF", "32"): LOW, ("NF + AGC", "512"): LOW})),
    ),
    "clipping_factor": (
        rows_of("clipping_factor", by_arm(LAMBDAS | {("none", "32"): HIGH}, LOW)),
        rows_of("clipping_factor", by_arm(LAMBDAS_REVERSED | {("none", "512"): HIGH + 2}, LOW)),
    ),
    "clipped_layers": (
        rows_of("clipped_layers", by_arm(WORSE)),
        rows_of("clipped_layers", by_arm({"default": LOW, "not the stem": LOW - 5})),
    ),
    "skip_gain": (
        rows_of("skip_gain", by_arm({**GAIN_0, "NF + AGC, gain 0 not clipped": HIGH + 5})),
        rows_of("skip_gain", by_arm({("NF + AGC, gain 0", "40 epochs"): LOW, "NF + AGC, gain 0 not clipped": LOW - 5})),
    ),
    "optimizers": (
        rows_of("optimizers", by_arm({"SGD, AGC": LOW, "SGD": LOW, "Muon": LOW}), average_top1=lambda *_: HIGH),
        rows_of("optimizers", by_arm({"Muon, AGC": LOW}), average_top1=lambda *_: LOW - 5),
    ),
    "small_batches": (
        rows_of("small_batches", by_arm({("BN", "2"): LOW})),
        rows_of("small_batches", by_arm({("NF", "2"): MIDDLE, ("GN", "2"): LOW})),
    ),
    "depth": (
        rows_of("depth", by_arm(SHALLOW), **signals(0.95, 1e6)),
        rows_of("depth", by_arm({("NF", "218"): LOW, "SkipInit": LOW}), **signals(0.3, 2.0)),
    ),
    "architecture": (
        rows_of("architecture", lambda arm, _: LOW + 2 * STEPS.index(arm) if arm in STEPS else HIGH),
        rows_of("architecture", lambda arm, _: HIGH - 2 * STEPS.index(arm) if arm in STEPS else FINAL_SCORES[arm]),
    ),
    "regularization": (
        rows_of("regularization", by_arm({"NF, plain": MIDDLE, "BN, both": HIGH, "BN, plain": HIGH}),
                trained_top1=lambda arm, _: 99.0 if arm.startswith("NF") else 90.0),
        rows_of("regularization", by_arm({"BN, plain": LOW}), trained_top1=lambda *_: 90.0),
    ),
    "transfer": (
        rows_of("transfer", by_arm({"BN": LOW, ("NF + AGC", "32"): MIDDLE}), **{"top1@64": lambda *_: HIGH}),
        rows_of("transfer", by_arm({"NF + AGC": LOW}), **{"top1@64": lambda arm, _: LOW if "AGC" in arm else HIGH}),
    ),
    "one_class_batches": (
        rows_of("one_class_batches", by_arm({"BN, sorted": LOW})),
        rows_of("one_class_batches", by_arm({"NF, sorted": LOW})),
    ),
}  # fmt: skip


def test_every_sweep_has_a_case():
    assert CASES.keys() == SWEEPS.keys()


@pytest.mark.parametrize("name", CASES)
def test_an_effect_holds_and_its_opposite_does_not(name):
    claims = {claim.key for own in CLAIMS.values() for claim in own if claim.experiment == name}
    good, bad = CASES[name]
    assert verdicts(name, good, BETTER_TRIED) == dict.fromkeys(claims, HOLDS)
    assert verdicts(name, bad, WORSE_TRIED) == dict.fromkeys(claims, FAILS)


@pytest.mark.parametrize("name", CASES)
def test_missing_runs_make_a_claim_undecided_and_never_hold(name):
    """Without an arm, a run or a score, each verdict is the same as with them, or undecided."""
    everything = verdicts(name, [])
    assert set(everything.values()) == {UNDECIDED}
    for rows, tried in zip(CASES[name], (BETTER_TRIED, WORSE_TRIED), strict=True):
        whole = verdicts(name, rows, tried)
        cells = {(row["arm"], row["point"]) for row in rows}
        assert len(cells) > 1
        for arm, point in cells:
            own = [row for row in rows if (row["arm"], row["point"]) == (arm, point)]
            others = [row for row in rows if row not in own]
            scoreless = [{k: v for k, v in row.items() if "top1" not in k} for row in own]
            for kept in ([], own[:-1], own[:1], scoreless):
                for claim, verdict in verdicts(name, [*others, *kept], tried).items():
                    assert verdict in (whole[claim], UNDECIDED), (claim, arm, point)


@pytest.mark.parametrize("name", CASES)
def test_nothing_holds_where_all_runs_diverged(name):
    rows = [{k: row[k] for k in ("arm", "point", "seed")} | {"status": "diverged"} for row in CASES[name][0]]
    assert HOLDS not in verdicts(name, rows).values()


@pytest.mark.parametrize(
    ("name", "diverging", "expected"),
    [
        ("batch_size", ("NF",), {"nf-large-batch": HOLDS, "agc-gain": HOLDS, "nf-competitive": FAILS}),
        ("batch_size", ("NF + AGC",), {"agc-large-batch": FAILS, "agc-gain": FAILS}),
        ("batch_size", ("BN",), {"nf-large-batch": FAILS, "agc-large-batch": HOLDS}),
        ("clipping_factor", ("none",), {"no-clipping": HOLDS, "small-lambda": FAILS}),
        ("clipped_layers", ("LARS", "all"), {"lars": HOLDS, "head-unclipped": HOLDS}),
        ("clipped_layers", ("default",), {"lars": FAILS, "head-unclipped": FAILS, "unit-wise": FAILS}),
        ("skip_gain", ("NF + AGC, gain 0",), {"skip-gain-long": FAILS, "skip-gain-unclipped": HOLDS}),
        ("optimizers", ("SGD, AGC, SAM",), {"sam": FAILS}),
        ("small_batches", ("BN",), {"bn-small-batch": HOLDS}),
        ("small_batches", ("NF",), {"bn-small-batch": FAILS, "nf-small-batch": FAILS, "gn-small-batch": HOLDS}),
        ("depth", ("nothing",), {"explosion": HOLDS}),
        ("depth", ("NF",), {"nf-deep": UNDECIDED, "nf-bn-deep": FAILS, "explosion": UNDECIDED, "mean-shift": FAILS}),
        ("depth", ("NF", "nothing", "FixUp"), {"explosion": UNDECIDED, "nf-skipinit-fixup": HOLDS}),
        ("depth", ("NF, gain 0",), {"nf-skipinit-fixup": FAILS}),
    ],
)  # fmt: skip
def test_diverged_runs_decide_only_against_runs_that_did_not(name, diverging, expected):
    rows = [
        {**row, "status": "diverged", "top1": None} if row["arm"] in diverging else row
        for row in CASES[name][0]
    ]
    found = verdicts(name, rows, BETTER_TRIED)
    assert {claim: found[claim] for claim in expected} == expected


@pytest.mark.parametrize(
    ("name", "arm"), [("depth", "nothing"), ("optimizers", "Muon, AGC"), ("transfer", "BN")]
)
def test_a_page_is_made_of_arms_that_diverged(name, arm, tmp_path):
    sweep = experiment(name, "cpu")
    more = {"rate": 0.1, "clipping": 0.0, "clipped": 0.0, "cpu_seconds": 1.0, "test_images": 100}
    trained = {"trained_top1": 60.0, "step_ms": 1.0}
    rows = [
        {**row, **more, "status": "diverged", "top1": None}
        if row["arm"] == arm
        else {**trained, **row, **more}
        for row in CASES[name][0]
    ]
    found = {
        **dict.fromkeys(("command", "machine", "torch"), "x"),
        **dict.fromkeys(("finished", "expected", "cpu_minutes"), 1),
        "name": name,
        "title": sweep.title,
        "stem": name,
        "images": vars(sweep.images),
        "cells": rows,
        "complete": True,
        "findings": [one.as_json() for one in sweep.decide(Table(sweep, rows))],
        "chosen": [],
        "seeds": sweep.seeds,
    }
    page = sweep_page.page(sweep, found)
    assert f"({sweep.seeds} of {sweep.seeds} diverged)" in page
    lost, others = (0, sweep.seeds) if name == "transfer" else (sweep.seeds, 0)  # there BN is the baseline
    assert f"{lost} of {sweep.seeds} runs diverged, against {others} of {sweep.seeds}" in page
    sweep_page.draw(sweep, found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5_000


@pytest.mark.parametrize(("level", "expected"), [(10.0, HOLDS), (HIGH, FAILS)])
def test_a_training_fails_if_each_run_diverges_or_guesses(level, expected):
    rows = [
        {**row, "top1": level} if row["arm"] == "nothing" and row["top1"] is not None else row
        for row in CASES["depth"][0]
    ]
    first = next(row for row in rows if row["arm"] == "nothing" and row["point"] == "218")
    first |= {"status": "diverged", "top1": None}
    assert verdicts("depth", rows)["explosion"] == expected


@pytest.mark.parametrize(
    ("nf", "agc", "expected"),
    [
        ({0.2: True, 0.4: False}, {0.2: True, 0.4: True}, HOLDS),
        ({0.4: True, 0.8: True}, {0.8: True, 1.6: True}, UNDECIDED),  # NF did not try 1.6
        ({0.4: False, 0.8: False}, {0.4: False, 0.8: False}, FAILS),
        ({0.4: True}, {0.4: False}, FAILS),
        ({}, {0.4: True}, UNDECIDED),
    ],
)
def test_larger_rates_are_judged_at_the_rates_that_both_arms_tried(nf, agc, expected):
    assert verdicts("batch_size", CASES["batch_size"][0], tried_at(nf=nf, agc=agc))["agc-rates"] == expected


def scores(**arms):
    return Scores(
        {"arm": arm, "point": "", "seed": seed, "status": "diverged" if x is None else "done", "top1": x}
        for arm, own in arms.items()
        for seed, x in enumerate(own)
    )


def test_no_difference_is_equal_only_if_the_interval_is_narrow():
    found = scores(a=[58.0, 59.0, 60.0], b=[58.1, 58.9, 60.1], c=[50.0, 59.0, 66.0])
    narrow, wide = found.compare(("a", ""), ("b", "")), found.compare(("c", ""), ("a", ""))
    assert (narrow.verdict, wide.verdict) == ("equal", "undecided")
    assert str(narrow).startswith("equal -0.0 (-0.3 to +0.3); sees ")
    assert (expect(narrow, "ahead"), expect(wide, "ahead", "equal")) == (FAILS, UNDECIDED)
    assert (as_good(narrow), as_good(wide)) == (HOLDS, UNDECIDED)
    assert MARGIN == 1.0


def test_as_good_allows_differences_within_the_margin():
    base = [58.0, 59.0, 60.0]
    found = scores(base=base, close=[x - 0.3 for x in base], near=[57.2, 58.1, 58.8], far=[55.0, 56.1, 57.0])
    close, near, far = (found.compare((arm, ""), ("base", "")) for arm in ("close", "near", "far"))
    assert (close.verdict, near.verdict, far.verdict) == ("behind", "behind", "behind")
    assert (as_good(close), as_good(near), as_good(far)) == (HOLDS, UNDECIDED, FAILS)
    assert as_good(far, margin=5) == HOLDS


def test_divergence_is_counted_and_never_averaged():
    assert LOST == 2
    found = scores(a=[50.0, None, 52.0], b=[50.0, 51.0, 52.0], c=[None, None, 40.0])
    assert found.text("a") == "51.0 ± 1.4 (1 of 3 diverged)"
    assert found.mean("a") is None
    assert str(found.compare(("a", ""), ("b", ""))) == "undecided, 1 of 3 runs diverged, against 0 of 3"
    assert str(found.compare(("c", ""), ("b", ""))) == "behind, 2 of 3 runs diverged, against 0 of 3"
    assert found.compare(("b", ""), ("c", "")).verdict == "ahead"
    assert found.compare(("c", ""), ("a", "")).verdict == "undecided"


def test_scores_of_different_seeds_are_not_compared():
    rows = [
        {"arm": arm, "point": "", "seed": seed, "status": "done", "top1": 50.0}
        for arm, seeds in (("a", (0, 1, 2)), ("b", (0, 1, 3)), ("c", (0,)))
        for seed in seeds
    ]
    found = Scores(rows)
    for other in "bcd":
        assert str(found.compare(("a", ""), (other, ""))) == "undecided, runs are missing"
    assert found.compare(("c", ""), ("c", "")).verdict == "undecided"  # one seed decides nothing
    assert Scores([{**rows[0], "top1": float("nan")}]).of("a") == []
    assert both() == UNDECIDED
    assert spread([]) == "–"


# --- the experiments that are no sweeps -----------------------------------------------------------------------


def cells(leaks, probes):
    lost = {"status": "diverged"}
    return [
        {"seed": seed, **(lost if leak is None else {"leak": leak, "probe": probe, "status": "done"})}
        for seed, (leak, probe) in enumerate(zip(leaks, probes, strict=True))
    ]


NF = cells([0.0, 0.0, 0.0], [48.8, 48.2, 49.1])
DEVICE = cells([1.12, 1.05, 1.2], [45.6, 44.9, 46.1])
SHUFFLED = cells([0.07, 0.2, -0.1], [48.6, 48.3, 48.9])
WHOLE = cells([0.0, 0.0, 0.0], [48.9, 48.1, 49.3])
LEAKING = dict(zip(ARMS, (NF, DEVICE, SHUFFLED, WHOLE), strict=True))


def contrastive(**changes):
    found = {finding.claim: finding.verdict for finding in findings({**LEAKING, **changes})}
    return tuple(found[f"contrastive-{claim}"] for claim in ("leak", "harm", "exchange"))


def test_the_rule_on_the_leak():
    assert list(map(leak_of, LEAKING.values())) == ["does not leak", "leaks", "undecided", "does not leak"]
    assert contrastive() == (HOLDS, HOLDS, HOLDS)
    assert contrastive(bn_device=NF) == (FAILS, FAILS, HOLDS)
    assert contrastive(nf=DEVICE) == (FAILS, HOLDS, FAILS)
    assert contrastive(bn_shuffled=DEVICE, bn_global=DEVICE) == (HOLDS, FAILS, HOLDS)
    assert contrastive(bn_global=cells([0.0] * 3, [52.8, 52.1, 53.2])) == (HOLDS, HOLDS, FAILS)
    balanced = cells([1.0, -1.0, 0.0], [48.8, 48.2, 49.1])  # a mean of 0 is no absence of a leak
    assert contrastive(nf=balanced) == (UNDECIDED, HOLDS, UNDECIDED)


def test_a_leak_is_not_decided_by_missing_or_diverged_runs():
    nothing = {arm: [] for arm in ARMS}
    assert contrastive(**nothing) == (UNDECIDED,) * 3
    assert contrastive(nf=NF[:1]) == (UNDECIDED, HOLDS, UNDECIDED)
    assert contrastive(bn_device=DEVICE[:1]) == (UNDECIDED, UNDECIDED, HOLDS)
    assert contrastive(nf=cells([0.0, None, 0.0], [48.8, 0, 49.1])) == (UNDECIDED, HOLDS, UNDECIDED)
    assert contrastive(bn_device=cells([1.1, None, None], [45, 0, 0])) == (UNDECIDED, HOLDS, HOLDS)


def times(first, second):
    pairs = zip(PAIR, (first, second), strict=True)
    return [
        {"arm": arm, "seed": seed, "seconds_per_image": t} for arm, own in pairs for seed, t in enumerate(own)
    ]


def test_the_rule_on_times_is_on_the_interval_of_their_ratio():
    (faster,) = latency_findings(times([1.0, 1.1, 0.9], [8.0, 8.8, 7.2]))
    assert faster.verdict == HOLDS
    assert faster.numbers.startswith("torchvision efficientnet_b7 takes 8.00 (8.00 to 8.00) times as long")
    assert latency_findings(times([8.0, 8.1, 7.9], [1.0, 1.1, 1.0]))[0].verdict == FAILS
    assert latency_findings(times([1.0, 1.0, 1.0], [0.5, 2.0, 1.0]))[0].verdict == UNDECIDED
    assert latency_findings([]) == latency_findings(times([1.0, 1.1], [8.0])) == []
    assert latency_findings(times([1.0], [8.0])) == []


def private(**arms):
    """Return the verdicts on privacy, with the same scores at epsilon 3 and 8, and 0 at 1."""
    rows = [
        {"arm": arm, "point": point, "seed": seed, "status": "diverged" if x is None else "done", "top1": x}
        for arm, own in arms.items()
        for point in ("1", "3", "8")
        for seed, x in enumerate(own if point != "1" else [0.0] * len(own))
    ]
    return {one.claim: one.verdict for one in privacy_findings(Scores(rows), ("1", "3", "8", "inf"))}


def test_the_rule_on_privacy():
    nf, low, lost = [40.4, 41.0, 40.1], [35.6, 36.4, 35.0], [None, None, 35.0]
    assert private(nf=nf, group=low, converted=nf) == {"dp": HOLDS, "dp-converted": HOLDS}
    assert private(nf=low, group=nf, converted=low) == {"dp": FAILS, "dp-converted": HOLDS}
    assert private(nf=nf, group=lost, converted=low) == {"dp": HOLDS, "dp-converted": FAILS}
    assert private(nf=nf, group=low[:2], converted=[]) == {"dp": UNDECIDED, "dp-converted": UNDECIDED}
    (dp, _) = privacy_findings(Scores([]), ("inf",))
    assert (dp.verdict, dp.numbers) == (UNDECIDED, "nf against group, no epsilon of 3 or 8")
