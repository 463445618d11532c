"""Private runs: the clipped and noisy gradient, its secrets, refusals, and a run that stops and goes on.

The accountants of Opacus are replaced by a simple formula; tests/interop/test_private.py has the real ones.
"""

import json
import math
import stat
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

import normfree
from normfree.cli import main
from normfree.commands.train_command import _config, parse
from normfree.data.loader import Batch, train_batches
from normfree.data.sources.synthetic import open_synthetic
from normfree.optim.per_example import clipped_gradient_sum, clipping_factors
from normfree.training import privacy
from normfree.training.config_io import to_toml, with_overrides
from normfree.training.distributed.world import World
from normfree.training.private_gradient import PrivateGradient
from normfree.training.recipes import RECIPES
from normfree.training.resolve import resolve
from normfree.training.secret import KEY_FILE, SecretKey
from normfree.training.stop import StoppedBySignal
from normfree.training.trainer import Trainer

DATA = "synthetic:classes=3,size=16,train=48,val=12"
SMALL = ("--data", DATA, "--model", "small", "--input.image_size", "16", "--input.batch_size", "16",
         "--augment.repeats", "2", "--input.workers", "0", "--input.micro_batch", "8", "--length", "4st",
         "--device", "cpu", "--log.every", "1", "--log.evaluate_every", "2st")  # fmt: skip


@pytest.fixture(autouse=True)
def accountant(monkeypatch):
    """Replace Opacus: a multiplier of 2, and an epsilon that grows with the steps."""
    monkeypatch.setattr(privacy, "noise_for", lambda epsilon, **_: 0.0 if math.isinf(epsilon) else 2.0)
    monkeypatch.setattr(
        privacy, "epsilon_of", lambda noise, *, steps, **_: steps / noise if noise else math.inf
    )


@pytest.fixture(autouse=True)
def small(monkeypatch):
    variant = replace(normfree.VARIANTS["nf_resnet_nano"], depths=(1, 1), widths=(8, 16), strides=(1, 2))
    monkeypatch.setitem(normfree.VARIANTS, "small", variant)
    monkeypatch.setitem(normfree.VARIANTS, "small_bn", replace(variant, norm="batch"))


def config(*flags: str) -> normfree.Config:
    return with_overrides(RECIPES["private"](), [*SMALL, *flags])


def trainer(*flags: str) -> Trainer:
    made = Trainer(resolve(config(*flags)), num_classes=3, samples=48)
    assert made.privacy is not None
    made.keep_private(SecretKey(bytes(range(32))), made.privacy)
    return made


def network_and_examples(dtype: torch.dtype) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    net = normfree.create_model("small", num_classes=3, skip_gain=1.0, stochdepth_rate=0.0, drop_rate=0.0)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, 16, 16, generator=generator, dtype=dtype)
    return net.to(dtype), images, torch.tensor([0, 0, 1, 1, 2, 2])


# --- the gradient ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_the_clipped_sum_is_that_of_a_loop_over_examples_and_their_copies(chunk):
    net, images, targets = network_and_examples(torch.float64)
    bound, expected, clipped = 0.7, [torch.zeros_like(p) for p in net.parameters()], 0
    for x, y in zip(images.split(2), targets.split(2), strict=True):
        own = torch.autograd.grad(torch.nn.functional.cross_entropy(net(x), y), list(net.parameters()))
        norm = torch.cat([g.flatten() for g in own]).norm()
        clipped += int(norm > bound)
        expected = [e + g * min(1.0, float(bound / norm)) for e, g in zip(expected, own, strict=True)]
    assert clipped > 0
    found = clipped_gradient_sum(net, images, targets, max_norm=bound, copies=2, chunk=chunk)
    for wanted, sums in zip(expected, found.values(), strict=True):
        torch.testing.assert_close(sums, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bound", [1e-3, 0.5, 1.0])
def test_no_clipped_gradient_has_a_norm_above_the_bound(dtype, bound):
    """Not even by rounding: norms of the products in their own data type, computed in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((200, 7, 3), (200, 50), (200, 1))
    gradients = {str(s): torch.randn(*s, generator=generator, dtype=dtype) * torch.logspace(-6, 6, 200, dtype=dtype)
                 .view(-1, *[1] * (len(s) - 1)) for s in shapes}  # fmt: skip
    factors = clipping_factors(gradients, bound)
    assert 0 < int((factors < 1).sum()) < 200
    products = [factors.to(dtype).view(-1, *[1] * (g.ndim - 1)) * g for g in gradients.values()]
    norms = torch.stack([p.double().flatten(1).norm(dim=1) for p in products]).norm(dim=0)
    assert float(norms.max()) <= bound
    assert float(norms.max()) > bound * (1 - 1e-5)


def test_an_example_is_left_alone_below_the_bound_and_an_empty_sample_has_a_sum_of_zero():
    net, images, targets = network_and_examples(torch.float64)
    torch.nn.functional.cross_entropy(net(images), targets, reduction="sum").backward()
    sums = clipped_gradient_sum(net, images, targets, max_norm=1e9)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(sums[name], parameter.grad, rtol=1e-12, atol=1e-12)
    assert not any(s.any() for s in clipped_gradient_sum(net, images[:0], targets[:0], max_norm=1.0).values())


def test_the_gradient_is_the_clipped_sum_plus_noise_of_the_stated_deviation_over_the_expected_number():
    made = trainer()
    assert isinstance(made.gradients, PrivateGradient)
    plan, (images, targets) = made.privacy, (torch.randn(12, 3, 16, 16), torch.eye(3).repeat_interleave(4, 0))
    made.gradients(images, targets, 0)
    sums = clipped_gradient_sum(made.net, images, targets, max_norm=plan.clip, copies=2)
    noise = torch.cat([(p.grad * plan.examples - sums[n]).flatten() for n, p in made.net.named_parameters()])
    deviation = plan.noise_multiplier * plan.clip
    assert (plan.examples, deviation) == (8.0, 2.0)
    assert abs(float(noise.mean())) < 4 * deviation / len(noise) ** 0.5
    assert abs(float(noise.std()) / deviation - 1) < 4 / (2 * len(noise)) ** 0.5
    again = {n: p.grad for n, p in made.net.named_parameters()}
    made.gradients(images, targets, 0, micro_batch=4)
    for name, parameter in made.net.named_parameters():
        torch.testing.assert_close(parameter.grad, again[name], rtol=1e-4, atol=1e-6)
    made.gradients(images, targets, 1)
    assert not torch.allclose(made.net.head.weight.grad, again["head.weight"], atol=0.05)


def test_a_step_without_images_moves_the_weights_by_noise_alone():
    made = trainer()
    source = open_synthetic(DATA).train
    (batch,) = train_batches(source, made.transform, batch_size=16, seed=0, num_steps=1, repeats=2,
                             members=lambda step: np.array([], dtype=np.int64))  # fmt: skip
    assert isinstance(batch, Batch)
    assert tuple(batch.images.shape) == (0, 3, 16, 16)
    before = made.net.head.weight.detach().clone()
    made.step(batch, 0)
    assert not torch.equal(made.net.head.weight, before)
    assert torch.isfinite(made.net.head.weight).all()


def test_batches_hold_the_drawn_images_with_their_copies_for_any_number_of_workers_and_any_first_step():
    made = trainer()
    source = open_synthetic(DATA).train
    members = made.members(48)
    make = lambda **o: list(train_batches(source, made.transform, batch_size=16, seed=0, num_steps=4, repeats=2,  # noqa: E731
                                          members=members, **o))  # fmt: skip
    batches = make()
    for step, batch in enumerate(batches):
        assert batch.indices.tolist() == members(step).repeat(2).tolist()
    assert len({len(batch) for batch in batches}) > 1
    for one, other in zip(batches[2:], make(start_step=2, workers=1), strict=True):
        assert torch.equal(one.images, other.images)


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "small_bn"), r"model=small_bn, which has batch norm in a private run\. Allowed: models without"),
        (("--augment.mixup", "0.2"), r"augment\.mixup=0\.2 in a private run\. Allowed: 0, because a mixed image"),
        (("--net.stochdepth_rate", "0.1"), r"net\.stochdepth_rate=0\.1 in a private run\. .* depend on the draws"),
        (("--optim.sam_rho", "0.05"), r"optim\.sam_rho=0\.05 in a private run"),
        (("--on_divergence", "rollback"), r"on_divergence=rollback in a private run\. .* noise of a step twice"),
        (("--input.bad_images", "skip"), r"input\.bad_images=skip in a private run"),
        (("--objective", "triplet"), r"objective=triplet in a private run"),
        (("--optim.clip", "private:epsilon=0"), r"epsilon=0\. Allowed: a number above 0 and up to 100, or inf"),
        (("--optim.clip", "private:epsilon=1e6"), r"epsilon=1e6\. Allowed: a number above 0 and up to 100"),
        (("--optim.clip", "private:epsilon=1e400"), r"epsilon=1e400\. Allowed"),
        (("--optim.clip", "private:epsilon=8_0"), r"epsilon=8_0\. Allowed"),
        (("--optim.clipping", "1e300"), r"optim\.clipping=1e\+300\. Allowed: 1e-6 to 1e6"),
        (("--optim.clip", "private:delta=1"), r"delta=1\. Allowed: above 0 and below 1"),
        (("--optim.clip", "private:accountant=rdb"), r"rdb.*Did you mean 'rdp'"),
    ],
)  # fmt: skip
def test_what_a_private_run_cannot_have_is_refused_with_the_reason(flags, message):
    with pytest.raises(ValueError, match=message):
        resolve(config(*flags))


def test_a_batch_above_the_data_and_several_processes_are_refused():
    with pytest.raises(ValueError, match=r"100 examples of 48 training images\. .*--input\.batch_size 96"):
        trainer("--input.batch_size", "200")
    with pytest.raises(ValueError, match="one process, because noise and sampling come from one secret key"):
        privacy.plan_of(config(), samples=48, steps=4, world=World(device=torch.device("cpu"), size=2))


def test_a_delta_that_lets_one_image_be_published_is_refused():
    with pytest.raises(
        ValueError, match=r"delta=0\.03 with 48 training images.* Allowed: below 1/48\. Fix: delta=0\.002\."
    ):
        trainer("--optim.clip", "private:epsilon=8,delta=0.03")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("epsilon=8,clip=1,clip=2", "--privacy has clip 2 times"),
        ("epsilon=8,epsilon=3", "--privacy has epsilon 2 times"),
        ("epsilon=8,delta=", "a value for delta, as in private:"),
        ("", "--privacy has no value"),  # such as that of a shell variable that is not set
    ],
)
def test_options_of_privacy_are_given_once_and_with_a_value(options, message, capsys):
    assert main(["train", "private", *SMALL, "--privacy", options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [
        ("--privacy", "epsilon=8", "--optim.clip", "agc"),
        ("--optim.clip=agc", "--privacy", "epsilon=8"),
        ("--privacy", "epsilon=8,clip=1", "--optim.clipping", "100"),
        ("--privacy", "epsilon=8", "--privacy", "epsilon=3"),
        ("--optim.clip", "agc"),
    ],
)
def test_no_other_option_takes_the_privacy_away(more, capsys, tmp_path):
    assert main(["train", "private", *SMALL, *more, "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert "set the same key" in message or "which is not private" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "bound"),
    [
        (("scratch", "--privacy", "epsilon=8"), 1.0),  # not its λ of AGC
        (("scratch", "--optim.clip", "private:epsilon=8"), 1.0),
        (("private", "--privacy", "epsilon=8"), 1.0),
        (("scratch", "--privacy", "epsilon=8,clip=0.5"), 0.5),
        (("scratch", "--optim.clipping", "0.5", "--privacy", "epsilon=8"), 0.5),
        (("private", "--privacy=epsilon=8", "--optim.clipping=0.5"), 0.5),
    ],
)
def test_without_clip_the_bound_is_one_whatever_the_recipe(arguments, bound):
    assert _config(parse(arguments))[0].optim.clipping == bound


def test_without_clip_the_bound_of_a_private_config_stays(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(to_toml(config("--optim.clipping", "0.5")), encoding="utf-8")
    found, _ = _config(parse([str(file), "--privacy", "epsilon=3"]))
    assert (found.optim.clip, found.optim.clipping) == ("private:epsilon=3", 0.5)


def test_data_without_validation_images_are_refused():
    with pytest.raises(ValueError, match="no held-out images"):
        privacy.check_private_data(replace(open_synthetic(DATA), held_out=False))


def test_find_lr_is_refused(capsys):
    assert main(["train", "private", *SMALL, "--find-lr"]) == 2
    assert "--find-lr for a private run" in capsys.readouterr().err


# --- runs -----------------------------------------------------------------------------------------------------


def run(out, *flags: str):
    return normfree.train(config(*flags), out, console=Console(quiet=True))


def tensors(out) -> dict[str, torch.Tensor]:
    return normfree.from_pretrained(out / "model").net.state_dict()


def test_a_run_of_the_command_reports_epsilon_and_deletes_its_key(tmp_path, capsys):
    out = tmp_path / "private-1"
    command = ["train", "private", *SMALL, "--privacy", "epsilon=3,delta=1e-6,clip=0.5", "--out", str(out)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "noise multiplier 2, gradients of examples clipped to 0.5" in shown
    assert "AGC is off" in shown
    assert "epsilon 2 of 3 at delta 1e-06 is spent" in shown
    spent = json.loads((out / "results.json").read_text())["privacy"]
    assert (spent["epsilon_rdp"], spent["epsilon_prv"], spent["delta"], spent["clip"]) == (
        2.0,
        2.0,
        1e-6,
        0.5,
    )
    assert "epsilon 2 by RDP, 2 by PRV, at delta 1e-06" in (out / "model" / "README.md").read_text()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["epsilon"] for row in rows if "epsilon" in row] == [1.0, 2.0]
    assert not any("loss" in row or "train_top1" in row or "clipped" in row for row in rows)
    assert not (out / KEY_FILE).exists()
    assert main(["train", str(out)]) == 0  # a finished run needs no key


def test_two_runs_of_one_config_differ_and_no_key_leaves_the_key_file(tmp_path, monkeypatch):
    made: list[bytes] = []

    class Watched(SecretKey):
        def __init__(self, secret):
            made.append(secret)
            super().__init__(secret)

    monkeypatch.setattr(privacy, "SecretKey", Watched)
    one, two = tmp_path / "one", tmp_path / "two"
    run(one)
    run(two)
    assert len(set(made)) == 2
    first, second = tensors(one), tensors(two)
    assert not all(torch.equal(first[name], second[name]) for name in first)
    for file in (f for out in (one, two) for f in out.rglob("*") if f.is_file()):
        content = file.read_bytes()
        for secret in made:
            assert secret not in content, file
            assert secret.hex().encode() not in content, file


def test_a_run_that_was_stopped_goes_on_exactly_with_its_key_and_not_without(tmp_path, monkeypatch):
    secret = bytes(range(32))
    monkeypatch.setattr("normfree.training.secret.secrets.token_bytes", lambda size: secret)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole)
    step = Trainer.step

    def stopping(self, batch, number):
        if number == 2:
            raise KeyboardInterrupt
        return step(self, batch, number)

    monkeypatch.setattr(Trainer, "step", stopping)
    with pytest.raises((KeyboardInterrupt, StoppedBySignal)):
        run(parts, "--log.checkpoint_every", "2st")
    monkeypatch.setattr(Trainer, "step", step)
    key = parts / KEY_FILE
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    text = key.read_text()
    key.unlink()
    with pytest.raises(ValueError, match=r"privacy\.key is gone"):
        run(parts, "--log.checkpoint_every", "2st")
    SecretKey.create(key)
    key.write_text("00" * 32)
    with pytest.raises(ValueError, match=r"privacy\.key is not the key that this run began with"):
        run(parts, "--log.checkpoint_every", "2st")
    key.write_text(text)
    key.chmod(0o600)
    with pytest.raises(ValueError, match=r"private run of 4 steps, and the length now gives 6"):
        run(parts, "--log.checkpoint_every", "2st", "--length", "6st")
    run(parts, "--log.checkpoint_every", "2st")
    assert all(torch.equal(value, tensors(whole)[name]) for name, value in tensors(parts).items())


def test_an_infinite_epsilon_clips_without_noise(tmp_path):
    result = run(tmp_path / "run", "--optim.clip", "private:epsilon=inf")
    assert result.privacy["epsilon_rdp"] is None
    assert result.privacy["noise_multiplier"] == 0.0
