"""The range test: right within a factor on problems whose limit is known, blind to noise, and nothing but a test."""

import io
import json
import math
import shlex

import pytest
import torch
from rich.console import Console

from normfree.cli import main
from normfree.optim.sgd import SGD
from normfree.tools.find_lr import STEPS, find_lr, judge, lines, range_test, sweep_rates
from normfree.training.config_io import with_overrides
from normfree.training.divergence import DivergedError
from normfree.training.recipes import RECIPES

FLAGS = shlex.split(
    "--data synthetic:classes=3,size=16,train=48,val=12 --model nf_resnet_nano --input.image_size 16 "
    "--input.batch_size 8 --input.workers 0 --augment.randaugment off"
)


def quadratic(curvatures: list[float], *, momentum: float, seed: int = 0, noise: float = 0.1):
    """step(rate) of SGD on ½ Σ h x² from x = 1, with normal noise on its gradient."""
    h = torch.tensor(curvatures, dtype=torch.float64)
    x = torch.ones_like(h).requires_grad_()
    sgd = SGD([x], 0.0, momentum=momentum, nesterov=momentum > 0)
    generator = torch.Generator().manual_seed(seed)

    def step(rate: float) -> float:
        loss = float((h * x.detach() ** 2).sum()) / 2
        x.grad = h * x.detach() + noise * torch.randn(len(h), generator=generator, dtype=torch.float64)
        sgd.set_lr(rate)
        sgd.step()
        return loss

    return step


@pytest.mark.parametrize(
    ("curvatures", "momentum"),
    [
        ([1.0], 0.0),
        ([1.0, 0.3, 0.1], 0.0),
        ([10.0, 3.0, 1.0, 0.3, 0.1], 0.0),
        ([1.0], 0.9),
        ([1.0, 0.3, 0.1], 0.9),
        ([10.0, 3.0, 1.0, 0.3, 0.1], 0.9),
        ([100.0, 1.0], 0.9),
    ],
)
def test_on_a_quadratic_it_is_stable_and_within_four_of_the_limit(curvatures, momentum):
    """x <- (1 - rate h) x shrinks below rate 2 / h; with Nesterov momentum m below (2 + 2m) / (1 + 2m) / h. For one
    curvature and no momentum the best rate is 1 / h, half of the limit."""
    limit = (2 + 2 * momentum) / (1 + 2 * momentum) / max(curvatures)
    for seed in range(5):
        result = range_test(quadratic(curvatures, momentum=momentum, seed=seed), sweep_rates())
        assert limit / 4 < result.suggested < limit, seed
        assert result.bounded


def test_the_rate_goes_with_the_inverse_of_the_curvature():
    one, ten = (
        range_test(quadratic([h], momentum=0.9, noise=0.1 * h**0.5), sweep_rates()) for h in (1.0, 10.0)
    )
    assert one.suggested / ten.suggested == pytest.approx(10.0, rel=0.3)


def test_rates_are_geometric():
    rates = sweep_rates(low=1e-3, high=1.0, steps=4)
    assert rates == pytest.approx([1e-3, 1e-2, 1e-1, 1.0])
    assert len(sweep_rates()) == STEPS == 121


def judged(shape):
    rates = sweep_rates()
    return judge(rates, [shape(math.log10(r)) for r in rates])


def test_the_edge_is_where_half_of_the_fall_is_lost():
    def valley(x: float) -> float:  # 2 up to 1e-3, falls to 1 at 1e-2, rises from 1e-1 by 1 a decade
        return 2 - min(1, max(0, x + 3)) + max(0, x + 1)

    result = judged(valley)
    assert result.edge == pytest.approx(10**-0.5, rel=0.13)  # to one rate of the sweep
    assert result.suggested == pytest.approx(result.edge / 3)


def test_three_wild_losses_in_a_row_move_the_edge_by_three_rates_at_most():
    def valley(x: float) -> float:
        return 2 - 0.5 * min(2, max(0, x + 3)) + 9 * max(0, x + 1)

    rates = sweep_rates()
    losses = [valley(math.log10(r)) for r in rates]
    calm = judge(rates, losses)
    for at in range(5, 80, 10):
        wild = [1e6 if at <= i < at + 3 else v for i, v in enumerate(losses)]
        assert abs(math.log10(judge(rates, wild).edge / calm.edge)) < 3.5 / 20


def test_a_loss_that_does_not_fall_gives_no_rate():
    generator = torch.Generator().manual_seed(0)
    result = judged(lambda x: 2.0 + 0.1 * float(torch.randn((), generator=generator)))
    assert result.suggested is None
    assert lines(result)[-1] == (
        "no suggestion: the loss did not decrease by more than its noise. Larger batches have less noise."
    )
    assert judged(lambda x: 2.0).suggested is None


def test_a_loss_that_never_rises_is_reported():
    result = judged(lambda x: 2.0 - 0.1 * max(0, x + 4))
    assert (result.edge, result.bounded) == (pytest.approx(10.0), False)
    assert lines(result)[-1] == (
        "suggested: --optim.lr 3.3 or more: a third of 10, the highest learning rate tried, at which the loss had not "
        "risen again"
    )


@pytest.mark.parametrize("end", [float("nan"), float("inf"), 9.0, DivergedError("gradient")])
def test_it_stops_when_the_loss_explodes(end):
    asked = []

    def step(rate: float) -> float:
        asked.append(rate)
        if len(asked) <= 40:
            return 2.0
        if isinstance(end, Exception):
            raise end
        return end

    result = range_test(step, sweep_rates())
    assert len(asked) == (43 if end == 9.0 else 41)  # 9 > 4 * 2, in the median of five
    assert all(math.isfinite(v) for v in result.losses)


def test_an_explosion_at_once_is_an_error():
    with pytest.raises(ValueError, match="diverges") as error:
        range_test(lambda rate: float("nan"), sweep_rates())
    assert str(error.value) == (
        "the loss diverges at a learning rate of 1e-05, at the start of the range test. Fix: check the weights and the "
        "data, which are more likely the cause than the learning rate."
    )


@pytest.fixture(scope="module")
def tested(tmp_path_factory):
    out = tmp_path_factory.mktemp("range")
    text = io.StringIO()
    config = with_overrides(RECIPES["scratch"](), FLAGS)
    return find_lr(config, out, console=Console(file=text)), out, text.getvalue()


def test_a_config_has_one_range_test(tested, tmp_path, capsys):
    first, out, _ = tested
    flags = "--length 90ep --optim.lr 7.0 --optim.warmup 20ep --optim.schedule warmup_linear --log.to wandb"
    assert main(["train", *FLAGS, *flags.split(), "--find-lr", "--out", str(tmp_path / "again")]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "again" / "find_lr.json").read_text() == (out / "find_lr.json").read_text()
    assert f"--optim.lr {first.suggested:.2g}" in printed


def test_what_it_writes_is_what_it_found_and_no_run(tested):
    result, out, text = tested
    assert {p.name for p in out.iterdir()} == {"find_lr.json", "find_lr.png"}
    written = json.loads((out / "find_lr.json").read_text())
    assert written["suggested"] == result.suggested
    assert written["losses"] == list(result.losses)
    lines = text.splitlines()
    assert lines[lines.index("     lr    loss") + 1] == f"1.0e-05  {result.smoothed[0]:6.3f}"


def test_the_first_loss_is_the_run_s_own(tested):
    """Same weights, same first batch, whatever the rate."""
    from normfree.data.loader import train_batches
    from normfree.data.sources.open import open_source
    from normfree.training.resolve import resolve
    from normfree.training.trainer import Trainer

    resolved = resolve(with_overrides(RECIPES["scratch"](), FLAGS))
    split = open_source(resolved.config.data)
    trainer = Trainer(resolved, num_classes=3, samples=48)
    batch = next(train_batches(split.train, trainer.transform, batch_size=8, seed=0, num_steps=1))
    assert float(trainer.step(batch, 0)[0]) == tested[0].losses[0]


def test_a_run_folder_is_not_written_to(tmp_path, capsys):
    (tmp_path / "config.toml").write_text('data = "emoji"\n')
    assert main(["train", *FLAGS, "--find-lr", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"normfree: {tmp_path} contains a run, and --find-lr does not train. Fix: choose another --out.\n"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["config.toml"]


def test_several_processes_are_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", *FLAGS, "--find-lr", "--out", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.startswith(
        "normfree: --find-lr in several processes. Allowed: one process"
    )
    assert not (tmp_path / "x").exists()
