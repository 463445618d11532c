"""Differentially private training: what `optim.clip=private` means for a run, and which settings it cannot have.

    Poisson sample of the images -> gradient of each example, averaged over its augmented copies
    -> clipped to the norm `optim.clipping` -> sum + noise -> divided by the expected number of examples

Source: Abadi et al. 2016 (arXiv 1607.00133); De et al. 2022 (arXiv 2204.13650) for the copies and the hyperparameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from normfree.data.source import Split, as_streamed
from normfree.suggest import problem, unknown
from normfree.training.accounting import ACCOUNTANTS, epsilon_of, noise_for
from normfree.training.choices import CLIPS, is_private, learns_embeddings, parse_choice
from normfree.training.config import Config
from normfree.training.distributed.world import World
from normfree.training.secret import KEY_FILE, SecretKey

# A larger epsilon bounds nothing, and the accountants are not made for its tiny noise: PRV takes gigabytes at 1e6.
LARGEST_EPSILON = 100.0


@dataclass(frozen=True)
class PrivacyPlan:
    """What a private run promises, and the noise that it adds for it.

    Attributes:
        epsilon: target after `steps` steps; infinite: clipping without noise.
        delta: probability that the bound does not hold.
        clip: largest norm of the gradient of an example, C.
        accountant: "rdp" or "prv", which has found the noise.
        noise_multiplier: standard deviation of the noise of the summed gradient, divided by C.
        sample_rate: probability of each example in each step.
        steps: number of steps of the whole run.
        examples: expected number of examples in a step, by which the sum is divided.
    """

    epsilon: float
    delta: float
    clip: float
    accountant: str
    noise_multiplier: float
    sample_rate: float
    steps: int
    examples: float

    def spent(self, steps: int, accountant: str = "") -> float:
        """Return the epsilon of the first `steps` steps by this accountant, by default the one of the plan."""
        return epsilon_of(
            self.noise_multiplier, delta=self.delta, sample_rate=self.sample_rate, steps=steps,
            accountant=accountant or self.accountant,
        )  # fmt: skip

    def report(self, steps: int) -> dict[str, Any]:
        """Return what `steps` steps have spent, for results.json and the model card; an infinite epsilon is None."""
        spent = {f"epsilon_{name}": self.spent(steps, name) for name in ACCOUNTANTS}
        return {
            **{name: value if math.isfinite(value) else None for name, value in spent.items()},
            "delta": self.delta, "clip": self.clip, "noise_multiplier": self.noise_multiplier,
            "sample_rate": self.sample_rate, "steps": steps, "sampling": "poisson",
        }  # fmt: skip

    def text(self) -> str:
        """Return the line that a run prints at its start."""
        return (
            f"private: epsilon {self.epsilon:g} at delta {self.delta:g} after {self.steps:,} steps "
            f"({self.accountant}), noise multiplier {self.noise_multiplier:.4g}, "
            f"gradients of examples clipped to {self.clip:g}, Poisson samples of {self.examples:g} expected examples; "
            "AGC is off, because it bounds no example"
        )


def privacy_text(report: dict[str, Any]) -> str:
    """Return the sentence on what a run has spent, from `PrivacyPlan.report`."""
    bounds = ", ".join(
        f"{'infinite' if (epsilon := report[f'epsilon_{name}']) is None else f'{epsilon:.4g}'} by {name.upper()}"
        for name in ACCOUNTANTS
    )
    return (
        f"Differential privacy of the training images: epsilon {bounds}, at delta {report['delta']:g}; "
        f"{report['steps']:,} steps of Poisson samples with rate {report['sample_rate']:.4g}, gradients of examples "
        f"clipped to {report['clip']:g}, noise multiplier {report['noise_multiplier']:.4g}."
    )


def spent_so_far(plan: PrivacyPlan | None, step: int, log: Callable[[str], None]) -> dict[str, float]:
    """Print the epsilon that a private run has spent after `step` steps, and return its entry of metrics.jsonl."""
    if plan is None:
        return {}
    epsilon = plan.spent(step)
    log(f"epsilon {epsilon:.3g} of {plan.epsilon:g} at delta {plan.delta:g} is spent")
    return {"epsilon": epsilon} if math.isfinite(epsilon) else {}  # JSON has no infinity


def check_privacy(config: Config, *, norm: str, drop_rate: float, stochdepth_rate: float) -> None:
    """Check that a private run can have these settings; nothing is checked for other runs.

    Args:
        config: the config.
        norm: the normalization of the variant.
        drop_rate: of the network that will be trained.
        stochdepth_rate: of the network that will be trained.

    Raises:
        ValueError: an option of the privacy is out of range, or settings do not fit; one line for each.
    """
    if not is_private(config.optim.clip):
        return
    _epsilon(config)
    augment, optim, inputs = config.augment, config.optim, config.input
    mixed = "0, because a mixed image belongs to two examples"
    drawn = "0, because the gradient of an example would depend on the draws"
    rules: tuple[tuple[bool, str, str, str], ...] = (
        (norm == "batch", f"model={config.model}, which has batch norm",
         "models without batch statistics, because with them the gradient of an example depends on the others",
         f"--model nf_{config.model}, or normfree.convert_batchnorm in Python"),
        (learns_embeddings(config.objective), f"objective={config.objective}", "classify and bce, because the other "
         "losses compare examples with each other", "--objective classify"),
        (augment.mixup > 0, f"augment.mixup={augment.mixup:g}", mixed, "--augment.mixup 0"),
        (augment.cutmix > 0, f"augment.cutmix={augment.cutmix:g}", mixed, "--augment.cutmix 0"),
        (drop_rate > 0, f"net.drop_rate={drop_rate:g}", drawn, "--net.drop_rate 0"),
        (stochdepth_rate > 0, f"net.stochdepth_rate={stochdepth_rate:g}", drawn, "--net.stochdepth_rate 0"),
        (optim.sam_rho > 0, f"optim.sam_rho={optim.sam_rho:g}",
         "0, because the step uphill reads the images without noise", "--optim.sam_rho 0"),
        (optim.class_balance > 0, f"optim.class_balance={optim.class_balance:g}",
         "0, because the weights depend on the labels of all images", "--optim.class_balance 0"),
        (config.on_divergence != "stop", f"on_divergence={config.on_divergence}",
         "stop, because a second try would use the noise of a step twice", "--on_divergence stop"),
        (inputs.bad_images != "stop", f"input.bad_images={inputs.bad_images}",
         "stop, because a replacement would make one image count twice", "--input.bad_images stop"),
        (inputs.micro_batch == "auto", "input.micro_batch=auto", "a number of images", "--input.micro_batch 64"),
        (config.precision != "float32", f"precision={config.precision}", "float32, so that the norms of gradients are "
         "exact", "--precision float32"),
        (config.parallel != "replicated", f"parallel={config.parallel}", "replicated", "--parallel replicated"),
        (config.compile, "compile=true", "false", "--compile false"),
    )  # fmt: skip
    found = [
        problem(f"{given} in a private run", allowed=allowed, fix=fix)
        for wrong, given, allowed, fix in rules
        if wrong
    ]
    if found:
        raise ValueError("\n".join(found))


def plan_of(config: Config, *, samples: int, steps: int, world: World) -> PrivacyPlan | None:
    """Find the noise of a private run; return None for other runs.

    Raises:
        ValueError: several processes share the run, the device has no float64, a batch is larger than the data, or no
            noise is enough.
        ModuleNotFoundError: Opacus is not installed.
    """
    if not is_private(config.optim.clip):
        return None
    if world.size > 1:
        given = f"a private run with {world.size} processes"
        allowed = "one process, because noise and sampling come from one secret key"
        raise ValueError(problem(given, allowed=allowed, fix="run it without torchrun"))
    if world.device.type == "mps":
        given = "a private run on mps, which has no float64 for exact norms"
        raise ValueError(problem(given, allowed="cpu or cuda", fix="--device cpu"))
    examples = config.input.batch_size / config.augment.repeats
    if examples > samples:
        given = (
            f"input.batch_size={config.input.batch_size}, {examples:g} examples of {samples} training images"
        )
        fix = f"--input.batch_size {samples * config.augment.repeats}"
        raise ValueError(problem(given, allowed="at most all of them in a step", fix=fix))
    chosen, epsilon, rate = parse_choice(config.optim.clip, CLIPS), _epsilon(config), examples / samples
    if chosen["delta"] >= 1 / samples:
        given = (
            f"delta={chosen['delta']:g} with {samples:,} training images: publishing one would be as private"
        )
        raise ValueError(problem(given, allowed=f"below 1/{samples:,}", fix=f"delta={0.1 / samples:.1g}"))
    noise = noise_for(
        epsilon, delta=chosen["delta"], sample_rate=rate, steps=steps, accountant=chosen["accountant"]
    )
    return PrivacyPlan(
        epsilon, chosen["delta"], config.optim.clipping, chosen["accountant"], noise, rate, steps, examples
    )


def check_private_data(split: Split) -> None:
    """Check that the data of a private run can be sampled, and that its scores read no training images.

    Raises:
        ValueError: they cannot, or the training images are scored.
    """
    if as_streamed(split.train) is not None:
        given = "a private run on data that are read as a stream"
        allowed = (
            "data with access to each image, because a Poisson sample is not a part of a shuffled stream"
        )
        raise ValueError(problem(given, allowed=allowed, fix="a folder, or a packed file (normfree data)"))
    if not split.held_out:
        given = "no held-out images, so the scores would be those of private ones"
        raise ValueError(problem(given, allowed="a validation part", fix="--input.val_fraction 0.1"))


def open_secret(
    plan: PrivacyPlan, out: Path, saved: dict[str, Any] | None, *, ended: bool
) -> tuple[SecretKey | None, PrivacyPlan]:
    """Return the key of the run in `out`, created if the run begins, and the plan that the run began with.

    Args:
        plan: as the config and this version of Opacus give it.
        out: the run folder.
        saved: the state of the checkpoint that the run continues from, None if it begins.
        ended: no step remains, so no key is needed.

    Raises:
        ValueError: the run continues with another number of steps, or its key is gone.
    """
    path = out / KEY_FILE
    key = SecretKey.read(path)
    if saved is None:
        return key or SecretKey.create(path), plan
    began = saved["privacy"]
    if began["steps"] != plan.steps:
        given = f"{out} is a private run of {began['steps']} steps, and the length now gives {plan.steps}"
        allowed = "the same length, for which its noise was found"
        raise ValueError(
            problem(given, allowed=allowed, fix="leave --length out, or start another run with --out")
        )
    if key is None and not ended:
        given = f"{path} is gone, so the noise of the remaining steps cannot be the same"
        raise ValueError(problem(given, allowed="a run with its key", fix="start another run with --out"))
    # Checkpoints of earlier versions have no fingerprint.
    if key is not None and saved.get("privacy_key", key.fingerprint) != key.fingerprint:
        given = f"{path} is not the key that this run began with, so its noise would be another one"
        raise ValueError(problem(given, allowed="the key of the run", fix="start another run with --out"))
    return key, replace(plan, noise_multiplier=began["noise_multiplier"])


def state_of(plan: PrivacyPlan | None, key: SecretKey | None) -> dict[str, Any]:
    """Return the entries of a checkpoint's state: what the accountant needs besides the step, and a digest of the key,
    from which the key does not follow."""
    if plan is None:
        return {}
    state: dict[str, Any] = {"privacy": {**asdict(plan), "epsilon": str(plan.epsilon)}}
    return state if key is None else {**state, "privacy_key": key.fingerprint}


def _epsilon(config: Config) -> float:
    """Return the target epsilon.

    Raises:
        ValueError: an option of the privacy is not allowed.
    """
    chosen = parse_choice(config.optim.clip, CLIPS)
    for given, allowed, fix in (*_wrong_options(chosen.options), *_wrong_clip(config.optim.clipping)):
        raise ValueError(problem(f"optim.clip={config.optim.clip!r} with {given}", allowed=allowed, fix=fix))
    if chosen["accountant"] not in ACCOUNTANTS:
        raise ValueError(unknown("accountant", chosen["accountant"], ACCOUNTANTS))
    return float(chosen["epsilon"])


def _wrong_clip(clip: float) -> Iterator[tuple[str, str, str]]:
    if not 1e-6 <= clip <= 1e6:  # so that gradients and noise are far from the limits of float32
        yield f"optim.clipping={clip:g}", "1e-6 to 1e6", "--optim.clipping 1.0"


def _wrong_options(options: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    try:
        epsilon = float(options["epsilon"])
    except ValueError:
        epsilon = math.nan
    written = str(options["epsilon"]).strip().lower()
    if not (0 < epsilon <= LARGEST_EPSILON or written == "inf") or "_" in written:
        yield (
            f"epsilon={options['epsilon']}",
            f"a number above 0 and up to {LARGEST_EPSILON:g}, or inf for clipping without noise",
            "epsilon=8",
        )
    if not 0 < options["delta"] < 1:
        yield (
            f"delta={options['delta']:g}",
            "above 0 and below 1, less than 1 / training images",
            "delta=1e-5",
        )
