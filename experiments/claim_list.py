"""The claims of docs/claims.md: texts, sources, the experiment on each, and results of earlier programs.

[A] is arXiv 2101.08692, [B] is arXiv 2102.06171.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from experiments.verdicts import FAILS, HOLDS

NOT_RUN = "not run yet"


@dataclass(frozen=True)
class Evidence:
    """Our result on a claim.

    Attributes:
        verdict: HOLDS, FAILS, UNDECIDED or NOT_RUN.
        numbers: our numbers.
        command: what produces them.
        seeds: how many runs.
        hardware: on which machine.
        page: file with all results, relative to the repository; "" if there is none.
        quotes: parts of that file that a test looks for.
        at_end: it is about an arm whose best rate or λ is at an end of those that were tried.
    """

    verdict: str = NOT_RUN
    numbers: str = "–"
    command: str = ""
    seeds: str = "–"
    hardware: str = "–"
    page: str = ""
    quotes: tuple[str, ...] = ()
    at_end: bool = False


@dataclass(frozen=True)
class Claim:
    """A claim of the papers or of others.

    Attributes:
        key: in the findings of an experiment.
        text: what is claimed.
        published: where.
        experiment: the one on it.
        known: our result from an earlier program or a test, used if the experiment has none.
        reason: if the claim does not hold here, why we think so.
    """

    key: str
    text: str
    published: str
    experiment: str = ""
    known: Evidence | None = None
    reason: str = ""


EPYC = "2 cores of AMD EPYC"
_SPP = Evidence(
    HOLDS,
    "",
    "python -m experiments.signal_propagation",
    "1",
    EPYC,
    "experiments/results/signal_propagation.md",
)
_TEST = Evidence(HOLDS, "", "", "–", EPYC, "docs/results.md")
_SCALE = "pytest tests/training/distributed/test_world.py"

UNDERFIT = (
    "281 steps are too few: the accuracy on training images falls by as much (`architecture`), so there is nothing yet "
    "that augmentation could prevent. The paper trains for 360 epochs."
)

SCALE = (
    "At a larger size padding takes a smaller share of each map, so its statistics differ from those in training. "
    "Batch norm's running statistics fix the scale in every layer; NF has none. NFNets are tested at a size that is "
    "larger by a third, not twofold."
)
CLOSED = (
    "AGC limits the gradient of a gain below 10⁻³ to λ · 10⁻³, and where its sign changes from step to step the gain "
    "does not grow: after 312 steps 16 of the 18 gains of three saved networks are below 0.03, all of those that were "
    "not clipped above 0.3, and without clipping them the difference is within the noise of three seeds, -3.1 to +2.3 "
    "points (`skip_gain`). The papers train for a hundred thousand steps and more."
)

# Section of the page -> its claims. [A] is arXiv 2101.08692, [B] is arXiv 2102.06171.
CLAIMS: dict[str, tuple[Claim, ...]] = {
    "Batch norm: what it gives": (
        Claim(
            "bn-downscales",
            "with BN before ReLU, each block adds a branch of constant variance, so the variance grows by the same "
            "amount with every block of a stage and is reset by a transition",
            "De and Smith 2020; [A] section 3",
            known=replace(
                _SPP,
                numbers="ReLU-BN-conv: 7.00 after 6 blocks, predicted 7; largest deviation 0.6 % (BN-ReLU-conv 8.4 %)",
                quotes=("6.998 (7.000)", "prediction: 0.6 %", "prediction: 8.4 %"),
            ),
        ),
        Claim(
            "mean-shift-spp",
            "with ReLU and no norm, means grow along a network until all images look alike; BN, and weight "
            "standardization, prevent it",
            "[A] section 4.1",
            known=replace(
                _SPP,
                numbers="ResNet-50, cosine of two images after the last block: 0.90 without weight "
                "standardization, 0.01 "
                "with it, 0.02 with ReLU-BN-conv",
                quotes=("| 4.312 | 0.902 |", "| 0.005 (0.000) | 0.011 |", "| 0.001 (0.000) | 0.015 |"),
            ),
        ),
        Claim("mean-shift", "the mean shift costs accuracy in training", "[A] section 4.1", "depth"),
        Claim(
            "bn-regularizes",
            "BN regularizes: without it a network fits the training images better, but not the test images",
            "[A] section 1; Luo et al. 2019",
            "regularization",
            reason="In 625 steps batch norm fits the training images better, not worse: it learns faster, and neither "
            "network has fitted them all. What its noise costs would show in longer trainings.",
        ),
        Claim(
            "explicit-regularization",
            "dropout and stochastic depth gain NF networks more than BN networks",
            "[A] table 1",
            "regularization",
        ),
        Claim(
            "bn-large-rates",
            "BN allows larger learning rates, and so larger batches, than a network without norm",
            "Santurkar et al. 2018; [B] section 2",
            "batch_size",
        ),
    ),
    "Batch norm: what it costs": (
        Claim(
            "bn-dependence",
            "with BN, the output for an image depends on the other images of the batch; without it, it does not",
            "[B] section 1",
            known=replace(
                _TEST,
                command="pytest tests/diagnose",
                numbers="NF networks: no bit of an output or gradient changes when the other images do",
                quotes=(
                    "outputs and gradients of one image when the other images of the batch are replaced",
                    "no bit changes",
                ),
            ),
        ),
        Claim(
            "bn-distributed",
            "BN makes results depend on the number of devices and micro-batches",
            "[B] section 1",
            known=replace(
                _TEST,
                command=_SCALE,
                page="docs/scale.md",
                numbers="largest difference of a gradient in float64: NF 4.4e-15, BN 33 to 90 %",
                quotes=("4.4e-15", "33 % to 77 %", "68 % to 90 %"),
            ),
        ),
        Claim(
            "bn-small-batch",
            "BN fails at small batches, NF does not",
            "[A] table 2",
            "small_batches",
            Evidence(
                HOLDS,
                "fine-tuning at batch 2: 25.8 ± 3.3 % with batch statistics, 56.9 ± 0.6 % after BN was "
                "removed; 374 images that also chose rates",
                "python -m experiments.convert_efficientnet",
                "3",
                EPYC,
                "experiments/results/convert_efficientnet.md",
                ("25.8 ± 3.3", "56.9 ± 0.6"),
            ),
        ),
        Claim(
            "nf-small-batch",
            "the accuracy of NF does not depend on the batch size, down to 2",
            "[A] table 2",
            "small_batches",
        ),
        Claim(
            "gn-small-batch",
            "group norm is as good as NF at small batches",
            "Wu and He 2018",
            "small_batches",
        ),
        Claim(
            "bn-independence",
            "BN loses accuracy if each device sees images of one class",
            "Irpan 2017",
            "one_class_batches",
        ),
        Claim(
            "contrastive-leak",
            "with statistics per device, BN leaks which images belong together in contrastive learning; NF does not",
            "MoCo section 3.3; [B] section 1",
            "contrastive",
        ),
        Claim(
            "contrastive-harm", "the leak costs accuracy of a linear probe", "MoCo section 3.3", "contrastive"
        ),
        Claim(
            "contrastive-exchange",
            "NF needs no exchange of statistics: it is as good as synchronized BN",
            "[B] section 1",
            "contrastive",
        ),
        Claim(
            "bn-time",
            "BN costs time: a training step of the network with BN takes longer",
            "[B] table 6",
            "latency",
        ),
    ),
    "Signal propagation and depth": (
        Claim(
            "nf-variance",
            "in an NF network the variance after block k of a stage is 1 + kα²",
            "[A] section 4",
            known=replace(
                _SPP,
                numbers="NF-ResNet-50: within 3.0 % in all blocks; NFNet-F0 with strided shortcuts: within 4.4 %",
                quotes=("prediction: 3.0 %", "prediction: 4.4 %"),
            ),
        ),
        Claim(
            "nf-variance-pooled",
            "the variance after block k of a stage is 1 + kα² also with NFNet's pooled shortcuts, on noise",
            "not stated by the papers",
            known=replace(
                _SPP,
                verdict=FAILS,
                numbers="NFNet-F0: off by up to 98.9 %, since pooling reduces the variance of noise",
                quotes=("prediction: 98.9 %",),
            ),
            reason=(
                "The prediction assumes that average pooling keeps the variance. It does for smooth maps, and "
                "reduces that of noise, whose neighbors are independent. `normfree diagnose` says so."
            ),
        ),
        Claim(
            "explosion",
            "without norm and scalars, the variance explodes with depth, and training fails",
            "De and Smith 2020",
            "depth",
        ),
        Claim("nf-deep", "NF networks train at 218 layers as well as at 56", "[A] table 1", "depth"),
        Claim("nf-bn-deep", "deep NF networks match their BN twins", "[A] table 1", "depth"),
        Claim(
            "nf-skipinit-fixup",
            "NF is better than SkipInit and FixUp, all with branches that start at 0",
            "[A] table 1",
            "depth",
        ),
        Claim(
            "skip-gain-short",
            "a skip gain of 0, the published value, costs accuracy in short trainings",
            "not stated by the papers",
            "skip_gain",
        ),
        Claim(
            "skip-gain-long",
            "with AGC and four times as many steps, 312, a skip gain of 0 costs no accuracy",
            "[A], [B] use 0",
            "skip_gain",
            reason=CLOSED,
        ),
        Claim(
            "skip-gain-unclipped",
            "with AGC, a skip gain of 0 trains better if the gain itself is not clipped",
            "not stated by the papers",
            "skip_gain",
        ),
    ),
    "Adaptive gradient clipping": (
        Claim(
            "nf-large-batch",
            "without clipping, NF networks lose accuracy at large batches",
            "[B] figure 2a",
            "batch_size",
        ),
        Claim("agc-large-batch", "with AGC, NF matches BN at large batches", "[B] figure 2a", "batch_size"),
        Claim(
            "agc-large-batch-shared",
            "with AGC, NF matches BN at large batches with one rate for all, as in the paper",
            "[B] figure 2a",
            "batch_size_shared_rate",
        ),
        Claim(
            "agc-gain",
            "AGC gains accuracy at large batches, each arm at its own rate",
            "[B] figure 2a",
            "batch_size",
        ),
        Claim("agc-rates", "AGC allows larger learning rates", "[B] section 4", "batch_size"),
        Claim(
            "nf-competitive",
            "at small batches NF matches BN without clipping",
            "[B] figure 2a",
            "batch_size",
        ),
        Claim(
            "nf-competitive-shared",
            "at small batches NF matches BN without clipping, with one rate for all",
            "[B] figure 2a",
            "batch_size_shared_rate",
        ),
        Claim("lambda-batch", "larger batches need a smaller λ", "[B] figure 2b", "clipping_factor"),
        Claim(
            "small-lambda", "a small λ costs accuracy at small batches", "[B] section 4.1", "clipping_factor"
        ),
        Claim(
            "no-clipping",
            "at the largest batch, training without AGC is worse at the same rate",
            "[B] figure 2b",
            "clipping_factor",
        ),
        Claim("head-unclipped", "the classifier should not be clipped", "[B] section 4.1", "clipped_layers"),
        Claim(
            "stem-unclipped",
            "the stem need not be clipped",
            "[B] section 4.1",
            "clipped_layers",
            reason=(
                "At this rate the network diverges without clipping. Its stem is one convolution, and the stem of "
                "NFNets has four. By default the stem is clipped, as in the released code."
            ),
        ),
        Claim(
            "all-stages", "at large batches all stages must be clipped", "[B] section 4.1", "clipped_layers"
        ),
        Claim(
            "unit-wise",
            "unit-wise norms are at least as good as those of layers or tensors",
            "[B] section 4.1",
            "clipped_layers",
        ),
        Claim("lars", "AGC is better than LARS", "[B] section 4", "clipped_layers"),
        Claim(
            "norm-clipping",
            "AGC is better than clipping by the global norm with a tuned threshold",
            "[B] section 4",
            "clipped_layers",
        ),
    ),
    "Architecture, optimizers, transfer": (
        Claim("step-width-pattern", "NFNet's width pattern helps", "[B] table 2", "architecture"),
        Claim("step-second-conv", "a second 3×3 convolution helps", "[B] table 2", "architecture"),
        Claim("step-mixup", "mixup helps", "[B] table 2", "architecture", reason=UNDERFIT),
        Claim("step-RandAugment", "RandAugment helps", "[B] table 2", "architecture", reason=UNDERFIT),
        Claim("step-cutmix", "cutmix helps", "[B] table 2", "architecture"),
        Claim("final-bn", "BN in the final network does not help", "[B] table 2", "architecture"),
        Claim(
            "f1-b7",
            "NFNet-F1 trains faster than EfficientNet-B7 of the same accuracy",
            "[B] table 3",
            "latency",
        ),
        Claim("sam", "SAM helps with AGC", "[B] table 3", "optimizers"),
        Claim("sam-unclipped", "SAM helps without AGC", "Foret et al. 2021", "optimizers"),
        Claim(
            "ema", "averaged weights are at least as good as the last ones", "[B] section 4.3", "optimizers"
        ),
        Claim("muon-agc", "AGC helps Muon", "not stated by the papers", "optimizers"),
        Claim(
            "nf-transfer",
            "pretrained NF networks fine-tune better than BN networks, at three resolutions",
            "[B] table 4",
            "transfer",
        ),
        Claim(
            "nf-transfer-elpv",
            "pretrained NF networks fine-tune better than BN networks on 1,313 photographs of solar cells, batch 8, "
            "one resolution",
            "[B] table 4",
            "finetune",
        ),
        Claim("transfer-resolution", "a larger resolution of fine-tuning helps", "[B] table 4", "transfer"),
        Claim(
            "test-resolution",
            "NF tolerates a test size of twice the training size as well as BN",
            "not stated by the papers",
            "transfer",
            reason=SCALE,
        ),
        Claim(
            "test-resolution-elpv",
            "NF tolerates a test size of twice the training size as well as BN, on the photographs of solar cells",
            "not stated by the papers",
            "finetune",
            reason=SCALE,
        ),
    ),
    "Privacy": (
        Claim(
            "dp",
            "under differential privacy, NF networks reach the accuracy of group norm",
            "not stated by the papers; De et al. 2022 train with group norm",
            "privacy",
        ),
        Claim(
            "dp-converted",
            "a network whose batch norm was folded trains privately as well as an NF network",
            "not stated by the papers",
            "privacy",
        ),
    ),
}

# Texts by (experiment, key of a finding).
TEXTS = {(claim.experiment, claim.key): claim.text for own in CLAIMS.values() for claim in own}
