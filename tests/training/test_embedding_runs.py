"""Runs that learn embeddings: the gradient of a step, the files at the end, and what can be done with them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from normfree import contrastive_loss, from_pretrained, nt_xent, open_source, triplet_loss
from normfree.cli import main
from normfree.data.loader import train_batches
from normfree.embeddings import nearest_of_same_label
from normfree.training import loop
from normfree.training.config_io import load_config, with_overrides
from normfree.training.projection import ProjectionHead
from normfree.training.recipes import RECIPES
from normfree.training.resolve import resolve
from normfree.training.trainer import Trainer

DATA = "synthetic:classes=3,size=16,train=24,val=18"
SMALL = ("--data", DATA, "--model", "nf_resnet_nano", "--input.image_size", "16", "--input.batch_size", "16",
         "--input.workers", "0", "--length", "4st", "--optim.warmup", "1st", "--device", "cpu",
         "--net.skip_gain", "0.5")  # fmt: skip


def config(*flags: str, recipe: str = "simclr"):
    return with_overrides(RECIPES[recipe](), [*SMALL, *flags])


def trainer(*flags: str, recipe: str = "simclr") -> Trainer:
    return Trainer(resolve(config(*flags, recipe=recipe)), num_classes=3, samples=24)


def first_batch(made: Trainer):
    batches = train_batches(
        open_source(DATA).train, made.transform, batch_size=16, seed=0, num_steps=1,
        repeats=made.config.augment.repeats,
    )  # fmt: skip
    return next(batches)


def gradient(*flags: str, recipe: str = "simclr") -> tuple[torch.Tensor, float, float]:
    made = trainer(*flags, recipe=recipe)
    made.net.double()
    images, targets = made.prepare(first_batch(made), 0)
    loss, correct = made.gradients(images.double(), targets, 0)
    return torch.cat([p.grad.flatten() for p in made.net.parameters()]), float(loss), float(correct)


LOSSES = {
    "simclr:temperature=0.3,dim=8": lambda z, y: nt_xent(z[0::2], z[1::2], temperature=0.3),
    "triplet:margin=0.5,mining=all": lambda z, y: triplet_loss(z, y, margin=0.5),
    "pairwise:margin=0.7": lambda z, y: contrastive_loss(z, y, negative_margin=0.7),
}


@pytest.mark.parametrize("objective", LOSSES)
def test_the_gradient_of_a_step_is_that_of_the_loss_in_any_number_of_micro_batches(objective):
    flags = ("--objective", objective)
    made = trainer(*flags)
    net = made.net.double().train()
    batch = first_batch(made)
    images, _ = made.prepare(batch, 0)
    z = net(images.double())
    loss = LOSSES[objective](z, batch.labels)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in net.parameters()])
    labels = torch.arange(16) // 2 if objective.startswith("simclr") else batch.labels
    hits = int(nearest_of_same_label(z.detach(), labels).sum())
    for more in ((), *(("--input.micro_batch", m) for m in ("8", "5", "2")),
                 ("--parallel", "exact", "--input.micro_batch", "4")):  # fmt: skip
        found, value, correct = gradient(*flags, *more)
        assert float((found - expected).norm() / expected.norm()) < 1e-12, more
        assert value == pytest.approx(float(loss.detach()), rel=1e-12)
        assert correct == hits


def test_dropout_and_stochastic_depth_do_not_depend_on_the_pass():
    """With an exact sum, each micro-batch is encoded twice; with one micro-batch, once."""
    flags = ("--net.drop_rate", "0.3", "--net.stochdepth_rate", "0.5")
    once, twice = gradient(*flags)[0], gradient(*flags, "--parallel", "exact", "--input.micro_batch", "16")[0]
    assert float((once - twice).norm() / once.norm()) < 1e-12


def test_the_last_layer_of_the_projection_is_not_clipped():
    made = trainer()
    assert isinstance(made.net.head, ProjectionHead)
    assert made.net.head.weight.shape == (128, 256)
    off = [n for g in made.optimizer.param_groups if not g["clipping"] for n in g["param_names"]]
    assert off == ["head.weight"]
    metric = trainer(recipe="metric")  # compares the features themselves
    assert all(g["clipping"] for g in metric.optimizer.param_groups)
    assert metric.net(torch.zeros(1, 3, 16, 16)).shape == (1, 256)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--augment.repeats", "1"), "augment.repeats=1 with objective 'simclr'. Allowed: 2, because two views"),
        (("--augment.mixup", "0.2"), "augment.mixup=0.2 with objective 'simclr'. Allowed: 0, because a mixed image"),
        (("--augment.cutmix", "1"), "Fix: --augment.cutmix 0."),
        (("--optim.class_balance", "1"), "Fix: --optim.class_balance 0."),
        (("--optim.sam_rho", "0.1"), "Fix: --optim.sam_rho 0."),
        (("--model", "resnet_nano", "--input.micro_batch", "8"), "change the gradient (off by 31 to 90 % in tests"),
        (("--model", "resnet_nano", "--input.micro_batch", "auto"), "input.micro_batch=auto with a batch-norm twin"),
        (("--objective", "simclr:temperature=0"), "objective 'simclr' with temperature=0,dim=128. Allowed: a temp"),
        (("--objective", "pairwise:margin=3"), "objective 'pairwise' with margin=3. Allowed: 0 to 2"),
        (("--objective", "triplet:mining=hardest"), "unknown mining 'hardest'. Did you mean 'hard'?"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused_before_the_run(flags, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared
        resolve(config(*flags))
    assert message in str(error.value)


def test_a_batch_norm_twin_can_learn_with_the_whole_batch_in_one_pass():
    assert torch.isfinite(gradient("--model", "resnet_nano")[0]).all()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Return a folder with two classes, and one with images alone."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, channel in (("photos/red", 0), ("photos/blue", 2), ("flat", 1)):
        (root / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 60, (24, 20, 3), dtype=np.uint8)
            pixels[..., channel] += 180
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a run with labels, which the scores use."""
    out = tmp_path_factory.mktemp("runs") / "simclr-1"
    flags = ("--input.micro_batch", "4", "--log.every", "2", "--log.evaluate_every", "2st")
    loop.train(config(*flags), out, console=Console(quiet=True))
    return out


def test_a_run_writes_scores_of_neighbors_and_probe_and_a_body(run):
    results = json.loads((run / "results.json").read_text())
    for name in ("knn_top1", "probe_top1", "recall_at_1"):
        assert results[name] == results["average"][name]
        assert 0 <= results[name] <= 100
    low, high = results["average"]["top1_interval"]
    assert low < results["knn_top1"] < high
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "recall_at_1" in row] == [2, 4]
    assert all(0 <= row["train_top1"] <= 100 for row in rows if "train_top1" in row)
    model = from_pretrained(run)
    assert model.classes == ()
    assert model.net(torch.zeros(1, 3, 16, 16)).shape == (1, 256)
    tested = results["test"]
    assert tested["images"] == len(open_source(DATA, test_fraction=0.1).test)
    card = (run / "model" / "README.md").read_text()
    assert "test images, which chose nothing and were scored once: " in card
    assert "256 features and has no classes" in card
    assert (run / "curves.png").exists()


def test_the_body_holds_the_averaged_weights_without_the_projection(run):
    from safetensors.torch import load_file

    saved = load_file(run / "checkpoints" / "step-00000004" / "ema.safetensors")
    body = from_pretrained(run).net.state_dict()
    assert {name for name in saved if name not in body} == {
        "head.weight", "head.bias", "head.hidden.weight", "head.hidden.bias",
    }  # fmt: skip
    assert all(torch.equal(body[name], saved[name]) for name in body)


def test_a_run_that_continues_is_the_uninterrupted_run(run, tmp_path, monkeypatch):
    out = tmp_path / "again"
    step = Trainer.step

    def killed(self, batch, at):
        if at == 3:
            raise KeyboardInterrupt
        return step(self, batch, at)

    flags = ("--input.micro_batch", "4", "--log.checkpoint_every", "2st")
    monkeypatch.setattr(Trainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config(*flags), out, console=Console(quiet=True))
    monkeypatch.setattr(Trainer, "step", step)
    loop.train(load_config(out / "config.toml"), out, console=Console(quiet=True))
    one, other = (from_pretrained(folder).net.state_dict() for folder in (run, out))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_fine_tuning_starts_from_the_body(run, photos, tmp_path, capsys):
    out = tmp_path / "tuned"
    assert main(["train", "finetune", "--data", str(photos / "photos"), "--weights", str(run), "--length", "2st",
                 "--input.batch_size", "4", "--input.workers", "0", "--out", str(out)]) == 0  # fmt: skip
    assert f"a new classifier for 2 classes on the network of {run}" in capsys.readouterr().out
    assert from_pretrained(out).classes == ("blue", "red")


def test_commands_say_what_a_body_is_for(run, photos, capsys):
    assert main(["show", str(run)]) == 0
    assert "# nearest neighbors " in capsys.readouterr().out
    for verb in (["eval", str(run), str(photos / "photos")], ["export", str(run)],
                 ["predict", str(run), str(photos)], ["serve", str(run), "--port", "0"]):  # fmt: skip
        assert main(verb) == 2, verb
        assert "the model has no classes, only embeddings. Fix: " in capsys.readouterr().err


def test_eval_names_the_command_that_gives_a_body_classes(run, capsys):
    assert main(["eval", str(run)]) == 2
    error = capsys.readouterr().err
    assert f"Fix: train a classifier with normfree train finetune --data FOLDER --weights {run}." in error
    assert "scored on" not in error


def test_a_flat_folder_needs_no_labels(photos, tmp_path, capsys):
    out = tmp_path / "flat"
    flat = str(photos / "flat")
    assert main(["train", "simclr", *SMALL, "--data", flat, "--input.val_fraction", "0.4", "--length", "2st",
                 "--out", str(out)]) == 0  # fmt: skip
    printed = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    scored, tested = results["average"]["images"], results["test"]["images"]
    counts = (
        f"{12 - scored - tested} images without labels to train on, {scored} to validate, {tested} to test"
    )
    assert f"{flat}: {counts}" in printed
    assert printed.count("two views find each other: ") == 2
    assert results["view_top1"] == results["average"]["top1"]
    assert "knn_top1" not in results
    assert (
        main(["diagnose", str(out), "--out", str(tmp_path / "plots"), "--report", str(tmp_path / "r.html")])
        == 0
    )
    assert main(["train", "scratch", *SMALL, "--data", flat, "--out", str(tmp_path / "x")]) == 2
    assert "holds 12 images and no class folders" in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["triplet:margin=0.5,mining=all", "pairwise"])
def test_metric_learning_lowers_the_loss_on_its_batches(tmp_path, objective):
    flags = ("--length", "30st", "--log.every", "10", "--optim.lr", "0.1", "--log.evaluate_every", "30st",
             "--augment.randaugment", "off", "--augment.crop_min", "0.5")  # fmt: skip
    loop.train(
        config("--objective", objective, *flags, recipe="metric"), tmp_path, console=Console(quiet=True)
    )
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.95 * losses[0], losses
