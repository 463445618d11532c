"""Laws of fine-tuning: rare classes count as if repeated, a plateau ends a run, image sizes follow the weights."""

import io
import json
import os
import re
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from normfree.commands import train_command as commands
from normfree.data.loader import Batch
from normfree.data.transforms.mixing import smooth
from normfree.models.zoo import create_model
from normfree.preprocessing import Preprocessing
from normfree.pretrained import Description, TrainedModel, save_pretrained
from normfree.scores import Evaluation
from normfree.training import checkpoint, loop, run_folder
from normfree.training.class_weights import class_weights, weigh, weighted_top1
from normfree.training.config import Config
from normfree.training.config_io import load_config, with_overrides
from normfree.training.early_stopping import Best
from normfree.training.recipes import RECIPES
from normfree.training.resolve import resolve
from normfree.training.stop import StoppedBySignal

DATA = "synthetic:classes=3,size=16,train=48,val=12"
FLAGS = shlex.split(
    f"--data {DATA} --model nf_resnet_nano --input.image_size 16 --input.batch_size 8 --input.workers 0 --length 20st "
    "--optim.warmup 2st --log.evaluate_every 2st --log.checkpoint_every 3st --device cpu --patience 0 "
    "--input.test_fraction 0"
)


@pytest.fixture(autouse=True, scope="module")
def _no_plots() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "draw_curves", lambda *args, **kwargs: None)
        yield


def config(*flags: str) -> Config:
    return with_overrides(RECIPES["finetune"](), [*FLAGS, *flags])


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


class Labels:
    """The labels of a data source."""

    def __init__(self, *counts: int) -> None:
        self.classes = tuple(str(i) for i in range(len(counts)))
        self.labels = [c for c, count in enumerate(counts) for _ in range(count)]

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, index: int) -> int:
        return self.labels[index]


# --- class balance ------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
def test_weights_are_powers_of_the_counts_and_one_on_average(power):
    counts = (1508, 295, 106, 715)  # as in a data set of solar cells
    weights = class_weights(Labels(*counts), power).double()
    assert float((weights * torch.tensor(counts)).sum() / sum(counts)) == pytest.approx(1, rel=1e-6)
    for i, j in ((0, 1), (2, 3)):
        assert float(weights[i] / weights[j]) == pytest.approx((counts[j] / counts[i]) ** power, rel=1e-6)
    assert class_weights(Labels(3, 0, 1), 1.0).tolist() == [pytest.approx(2 / 3), 0.0, 2.0]
    assert class_weights(Labels(*counts), 0.0) is None


def full_batch(labels: list[int]) -> Batch:
    """Return a batch in which images of class 0 differ and those of class 1 are all the same image."""
    images = []
    for index, label in enumerate(labels):
        generator = torch.Generator().manual_seed(1000 if label else index)
        images.append(torch.randint(256, (3, 16, 16), generator=generator, dtype=torch.uint8))
    names = tuple(str(label) for label in labels)
    return Batch(torch.stack(images), torch.tensor(labels), torch.arange(len(labels)), names, 0, 0)


def gradient(batch: Batch, *flags: str, weights: torch.Tensor | None = None) -> torch.Tensor:
    size = str(len(batch))
    off = ("--net.drop_rate", "0", "--net.stochdepth_rate", "0", "--input.batch_size", size)
    trainer = loop.Trainer(resolve(config(*off, *flags)), num_classes=2, samples=4, class_weights=weights)
    trainer.net.double()
    images, targets = trainer.prepare(batch, 0)
    trainer.gradients(images.double(), targets.double(), 0)
    return torch.cat([p.grad.flatten() for p in trainer.net.parameters()])


def test_power_one_is_training_on_a_set_in_which_the_rare_class_is_repeated():
    """In float64, on full batches: three images of one class and one of the other, against that one three times."""
    few, repeated = full_batch([0, 0, 0, 1]), full_batch([0, 0, 0, 1, 1, 1])
    weights = class_weights(Labels(3, 1), 1.0)
    balanced = gradient(few, "--optim.class_balance", "1", weights=weights)
    expected = gradient(repeated)
    plain = gradient(few)
    assert float((balanced - expected).norm() / expected.norm()) < 1e-6  # weights and targets are float32
    assert float((plain - expected).norm() / expected.norm()) > 0.1


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_the_weighted_gradient_stays_a_sum_over_images(micro_batch):
    weights, batch = class_weights(Labels(3, 1), 0.5), full_batch([0, 0, 0, 1])
    whole, cut = (
        gradient(batch, "--optim.class_balance", "0.5", "--input.micro_batch", str(m), weights=weights)
        for m in (0, micro_batch)
    )
    assert float((whole - cut).norm() / whole.norm()) < 1e-12


def test_a_mixed_image_counts_each_label_by_its_weight():
    """Its loss is the sum over its two labels of share · weight · loss for that label alone, with smoothing."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    one, other = torch.tensor([0, 1, 2, 3, 3]), torch.tensor([3, 2, 2, 0, 1])
    share = torch.rand(5, 1, generator=generator, dtype=torch.float64)
    hard = [F.one_hot(x, 4).double() for x in (one, other)]
    mixed = weigh(share * hard[0] + (1 - share) * hard[1], weights, label_smoothing=0.1)
    alone = [F.cross_entropy(logits, smooth(h, 0.1), reduction="none") for h in hard]
    expected = share[:, 0] * weights[one] * alone[0] + (1 - share[:, 0]) * weights[other] * alone[1]
    torch.testing.assert_close(F.cross_entropy(logits, mixed, reduction="none"), expected)


def test_both_ways_of_mixing_are_weighed():
    weights = class_weights(Labels(3, 1), 1.0)
    flags = ("--optim.class_balance", "1", "--augment.mixup", "0.5", "--input.batch_size", "4")
    trainer = loop.Trainer(resolve(config(*flags)), num_classes=2, samples=4, class_weights=weights)
    plain = loop.Trainer(
        resolve(config(*flags, "--optim.class_balance", "0", "--augment.label_smoothing", "0")),
        num_classes=2, samples=4,
    )  # fmt: skip
    batch = full_batch([0, 0, 0, 1])
    pairs = Batch(**{**vars(batch), "partners": torch.tensor([1, 1, 0, 0]), "share": torch.full((4,), 0.25)})
    for given in (batch, pairs):
        targets = plain.prepare(given, 0)[1]
        assert torch.equal(trainer.prepare(given, 0)[1], weigh(targets, weights, label_smoothing=0.1))


@pytest.fixture(scope="module")
def unbalanced(tmp_path_factory) -> str:
    """Return a folder with 12 training images of one class and 4 of the other."""
    root = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for part, counts in (("train", (12, 4)), ("val", (3, 3))):
        for name, count in zip(("many", "few"), counts, strict=True):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return str(root)


def test_class_weights_come_from_the_training_images_and_power_zero_changes_no_bit(
    tmp_path, unbalanced, monkeypatch
):
    given = []
    original = loop.Trainer.__init__

    def recording(self, *args, **kwargs):
        given.append(kwargs["class_weights"])
        original(self, *args, **kwargs)

    monkeypatch.setattr(loop.Trainer, "__init__", recording)
    flags = ("--data", unbalanced, "--length", "2st", "--log.evaluate_every", "2st")
    for name, power in (("plain", None), ("zero", "0"), ("one", "1")):
        more = () if power is None else ("--optim.class_balance", power)
        loop.train(config(*flags, *more), tmp_path / name, console=quiet())
    assert given[:2] == [None, None]
    assert load_config(tmp_path / "one" / "config.toml").data == unbalanced
    assert given[2].tolist() == [
        pytest.approx(2.0),
        pytest.approx(2 / 3),
    ]  # classes in alphabetical order: few, many
    plain, zero, one = (weights_after(tmp_path / name, 2) for name in ("plain", "zero", "one"))
    assert all(torch.equal(plain[k], zero[k]) for k in plain)
    assert any(not torch.equal(plain[k], one[k]) for k in plain)
    scores = json.loads((tmp_path / "one" / "results.json").read_text())["average"]
    assert scores["balanced_top1"] == pytest.approx(sum(scores["per_class_top1"].values()) / 2)


def test_the_score_weighs_images_as_the_loss_does():
    labels, answers = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 0, 0, 1, 1, 0])
    seen = Evaluation(75.0, 100.0, 0.5, 8, ("a", "b"), labels, answers, torch.zeros(8))
    assert weighted_top1(seen, None) == 75.0
    assert weighted_top1(seen, class_weights(Labels(6, 2), 1.0)) == pytest.approx(100 * (5 / 6 + 1 / 2) / 2)


# --- plateau ------------------------------------------------------------------------------------------


def test_the_best_score_is_replaced_by_a_better_one_or_by_an_equal_one_with_lower_loss():
    best, seen = Best(), []
    course = [(50, 1), (60, 1), (60, 1), (60, 2), (59, 0), (60, 0.5), (10, 0.1), (20, 0.1), (30, 0.1)]
    for step, (top1, loss) in enumerate(course, 1):
        best = best.after(top1, loss, step)
        seen.append((best.step, best.waited))
        assert best.plateau(3) == (seen[-1][1] == 3)
        assert not best.plateau(0)
        assert Best.of_state({"best": json.loads(json.dumps(best.state()))}) == best
    assert seen == [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3), (6, 0), (6, 1), (6, 2), (6, 3)]


# Top-1 after steps 2, 4, ...: the best is after step 4, later after step 12.
SCORES = [40.0, 50.0, 45.0, 50.0, 49.0, 60.0, 60.0, 60.0, 60.0, 60.0]


@pytest.fixture(scope="module", autouse=True)
def _prescribed_scores() -> Iterator[None]:
    """With patience, replace top-1 of the average by SCORES, so that the plateau is known."""
    original, stepping, done = loop.score, loop.Trainer.step, [0]

    def counted(self, batch, step):
        done[0] = step + 1
        return stepping(self, batch, step)

    def prescribed(trainer, split, stop=None):
        scores = original(trainer, split, stop)
        if scores is None:
            return None
        weights, average = scores
        if not trainer.config.patience:
            return weights, average
        return weights, Evaluation(**{**vars(average), "top1": SCORES[done[0] // 2 - 1], "loss": 1.0})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "score", prescribed)
        patch.setattr(loop.Trainer, "step", counted)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory, _prescribed_scores) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    loop.train(config("--patience", "3"), out, console=quiet())
    return out


def weights_after(out: Path, step: int, file: str = "model") -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / checkpoint.name_of(step) / f"{file}.safetensors")


def test_a_plateau_ends_the_run_and_the_best_average_becomes_the_model(tmp_path):
    out, console = tmp_path / "run", quiet()
    result = loop.train(config("--patience", "3"), out, console=console)
    assert (result.steps, result.step) == (10, 4)  # 50 after step 4, then 45, 50, 49
    text = console.file.getvalue()
    assert "no better score in 3 evaluations: the best one, 50.00 %, was after step 4\n" in text
    assert "the model is that of step 4, which scored best\n" in text
    assert (out / "checkpoints" / "best").read_text() == "step-00000004\n"
    best, model = weights_after(out, 4, "ema"), load_file(out / "model" / "model.safetensors")
    assert all(torch.equal(model[k], best[k]) for k in model)
    assert any(not torch.equal(model[k], v) for k, v in weights_after(out, 10, "ema").items())
    scores = json.loads((out / "results.json").read_text())
    assert (scores["steps"], scores["step"]) == (10, 4)
    assert (
        "4 steps of 8 images,\nthe best of 10 by the validation images, trained"
        in (out / "model/README.md").read_text()
    )

    before = (out / "model" / "model.safetensors").read_bytes()
    again = loop.train(
        load_config(out / "config.toml"), out, console=quiet()
    )  # a finished run takes no further step
    assert (again.steps, again.step) == (10, 4)
    assert (out / "model" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("stop", [3, *(pytest.param(s, marks=pytest.mark.slow) for s in (5, 8)), 9])
def test_a_resumed_run_stops_after_the_same_step_as_an_uninterrupted_one(tmp_path, monkeypatch, whole, stop):
    counted = loop.Trainer.step

    def stopping(self, batch, step):
        result = counted(self, batch, step)
        if step + 1 == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(loop.Trainer, "step", stopping)
    with pytest.raises(StoppedBySignal):
        loop.train(config("--patience", "3"), tmp_path / "run", console=quiet())
    monkeypatch.setattr(loop.Trainer, "step", counted)
    result = loop.train(load_config(tmp_path / "run" / "config.toml"), tmp_path / "run", console=quiet())
    assert (result.steps, result.step) == (10, 4)
    mine, theirs = (out / "model" / "model.safetensors" for out in (tmp_path / "run", whole))
    assert mine.read_bytes() == theirs.read_bytes()
    for file in ("model", "ema", "optim"):
        mine, theirs = (weights_after(out, 10, file) for out in (tmp_path / "run", whole))
        assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


def test_patience_that_is_not_exhausted_changes_only_the_saved_model(tmp_path):
    """The training is the same bit for bit; the model is that of the best evaluation instead of the last."""
    plain = loop.train(config(), tmp_path / "plain", console=quiet())
    patient = loop.train(config("--patience", "8"), tmp_path / "patient", console=quiet())
    assert (plain.steps, plain.step, patient.steps, patient.step) == (20, 20, 20, 12)
    mine, theirs = (weights_after(tmp_path / name, 20) for name in ("plain", "patient"))
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    last, best = weights_after(tmp_path / "plain", 20, "ema"), weights_after(tmp_path / "patient", 12, "ema")
    for name, expected in (("plain", last), ("patient", best)):
        model = load_file(tmp_path / name / "model" / "model.safetensors")
        assert all(torch.equal(model[k], expected[k]) for k in model)


def test_the_best_checkpoint_survives_a_kill_before_the_pointer_is_written(tmp_path, monkeypatch):
    """The resumed run writes the pointer, so that the checkpoint is not deleted."""
    out = tmp_path / "run"

    def killed(folder, name, target):
        if name == "best" and target == checkpoint.name_of(4):
            raise KeyboardInterrupt
        original(folder, name, target)

    original = checkpoint.point
    monkeypatch.setattr(checkpoint, "point", killed)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config("--patience", "3"), out, console=quiet())
    monkeypatch.setattr(checkpoint, "point", original)
    assert (out / "checkpoints" / "best").read_text() == "step-00000002\n"
    result = loop.train(load_config(out / "config.toml"), out, console=quiet())
    assert (result.steps, result.step) == (10, 4)


def test_a_run_does_not_continue_with_another_patience(whole):
    with pytest.raises(ValueError, match=r"was started with another patience\. Fix: drop the change"):
        loop.train(config("--patience", "9"), whole, console=quiet())


# --- values that come with the weights ----------------------------------------------------------------------


def folder_of(path: Path, model: str, size: int, **overrides) -> str:
    net = create_model(model, num_classes=2, **overrides)
    save_pretrained(TrainedModel(net, Preprocessing(image_size=size), ("a", "b")), path)
    return str(path)


@pytest.mark.parametrize(
    ("model", "tested", "sizes"),
    [
        ("nf_resnet_nano_64", 64, (64, 64)),  # as its variant
        ("nf_resnet_nano_64", 100, (100, 100)),
        ("nf_resnet50", 384, (384, 384)),
        ("nfnet_f1", 320, (224, 320)),
        ("nfnet_f0", 320, (256, 320)),  # 240 is 7.5 times 32
        ("nf_regnet_b0", 224, (192, 224)),
        ("nf_regnet_b0", 288, (256, 288)),  # the variant's ratio, 6/7, in multiples of 32 px: 247 -> 256
    ],
)
def test_image_sizes_come_from_the_weights_with_the_ratio_of_the_variant(monkeypatch, model, tested, sizes):
    about = Description(model, {}, Preprocessing(image_size=tested), ("a", "b"))
    monkeypatch.setattr("normfree.training.resolve.describe", lambda folder: about)
    inputs = resolve(with_overrides(RECIPES["finetune"](), ["--weights", "net"])).config.input
    assert (inputs.image_size, inputs.eval_size) == sizes


def test_image_sizes_and_activation_come_from_the_weights_unless_given(tmp_path):
    folder = folder_of(tmp_path / "net", "nf_resnet_nano_64", 96, activation="relu")
    base = ("--data", DATA, "--weights", folder)
    resolved = resolve(with_overrides(RECIPES["finetune"](), base)).config
    assert (resolved.model, resolved.net.activation) == ("nf_resnet_nano_64", "relu")
    assert (resolved.input.image_size, resolved.input.eval_size) == (96, 96)
    given = resolve(with_overrides(RECIPES["finetune"](), [*base, "--input.image_size", "80"])).config
    assert (given.input.image_size, given.input.eval_size) == (80, 80)
    assert resolve(resolved).config == resolved


def test_weights_of_a_network_that_no_config_describes_are_refused(tmp_path):
    folder = folder_of(tmp_path / "net", "nf_resnet_nano_64", 64, widths=(32, 64, 128), se_ratio=0.25)
    message = (
        f"the network of {folder} differs from nf_resnet_nano_64 in se_ratio, widths, which a run cannot change. "
        "Allowed: differences in activation and alpha. "
        "Fix: train it in Python, with from_pretrained and an optimizer."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        resolve(with_overrides(RECIPES["finetune"](), ["--data", DATA, "--weights", folder]))


def test_download_is_replaced_by_the_address_of_the_repository(monkeypatch):
    about = Description("nfnet_f0", {}, Preprocessing(image_size=256), ("a", "b"))
    monkeypatch.setattr("normfree.training.resolve.describe", lambda folder: about)
    flags = ["--data", DATA, "--model", "nfnet_f0", "--weights", "download"]
    resolved = resolve(with_overrides(RECIPES["finetune"](), flags))
    assert resolved.config.weights == "hf-hub:timm/dm_nfnet_f0.dm_in1k"


def test_data_and_weights_alone_mean_fine_tuning(monkeypatch):
    chosen = []
    monkeypatch.setattr(commands, "_train", lambda config, folder: chosen.append((config, folder)) or 0)
    for args, name in (
        ([], "demo"),
        (["--data", "photos"], "scratch"),
        (["--data=photos", "--weights=net"], "finetune"),
    ):
        commands.train(args)
        assert chosen[-1][1].name.startswith(f"{name}-")
        assert chosen[-1][0].length == RECIPES[name]().length
