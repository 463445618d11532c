"""The losses of `objective`: formulas, sums over micro-batches, and what a model with independent classes predicts."""

import json
import math

import pytest
import torch
from PIL import Image
from rich.console import Console

from normfree import Config, export, from_pretrained, predict, train
from normfree.data.transforms.normalize import normalize
from normfree.onnx_net import open_onnx
from normfree.training.choices import parse_choice, uses_sigmoid
from normfree.training.config import ConfigError
from normfree.training.config_io import with_overrides
from normfree.training.loss import batch_loss, binary_cross_entropy

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])
TARGETS = torch.tensor([[1.0, 0.0, 1.0], [0.9, 0.05, 0.05]])


def by_hand(targets: torch.Tensor) -> torch.Tensor:
    p = LOGITS.double().sigmoid()
    return -(targets * p.log() + (1 - targets) * (1 - p).log()).sum()


def test_binary_cross_entropy_is_its_formula():
    expected = by_hand(TARGETS.double())
    torch.testing.assert_close(binary_cross_entropy(LOGITS, TARGETS).double(), expected / 3)
    torch.testing.assert_close(batch_loss("bce:sum=yes")(LOGITS, TARGETS).double(), expected)
    hard = by_hand((TARGETS > 0.2).double())
    torch.testing.assert_close(batch_loss("bce:threshold=0.2")(LOGITS, TARGETS).double(), hard / 3)


@pytest.mark.parametrize("objective", ["classify", "bce"])
def test_micro_batches_add_up(objective):
    loss = batch_loss(objective)
    parts = sum(loss(LOGITS[i : i + 1], TARGETS[i : i + 1]) for i in range(2))
    torch.testing.assert_close(parts, loss(LOGITS, TARGETS))


@pytest.mark.parametrize(
    ("value", "allowed"),
    [
        (
            "bcee",
            "classify; bce:threshold=0.0,sum=no; simclr:temperature=0.2,dim=128; triplet:margin=0.2,mining=hard; "
            "pairwise:margin=1.0. Did you mean 'bce'?",
        ),
        ("bce:treshold=1", "bce:threshold=0.0,sum=no. Did you mean 'threshold'?"),
        ("bce:threshold=", "a value for threshold, as in bce:threshold=0.0,sum=no."),
        ("bce:sum=yes,sum=no", "one value for sum, as in bce:threshold=0.0,sum=no."),
        ("bce:threshold=-1", "numbers of 0 or more, for example threshold=0.0."),
        ("bce:sum=1", "sum=yes or sum=no."),
        ("classify:x=1", "classify."),
    ],
)
def test_what_is_wrong_with_an_objective(value, allowed):
    with pytest.raises(ConfigError) as error:
        with_overrides(Config(), ["--objective", value])
    assert error.value.problems == (f"objective={value!r}. Allowed: {allowed}",)


def test_options_have_the_types_of_their_defaults():
    choices = {"a": {"betas": (0.9, 0.999), "steps": 5, "flag": False, "name": "x"}}
    choice = parse_choice("a:betas=0.8/0.9,steps=3,name=b,c", choices)
    assert choice.options == {"betas": (0.8, 0.9), "steps": 3, "flag": False, "name": "b,c"}
    for wrong in ("a:betas=0.8", "a:steps=1.5", "a:flag=true"):
        with pytest.raises(ValueError, match=r"for example|or flag=no"):
            parse_choice(wrong, choices)
    assert uses_sigmoid("bce:sum=yes")
    assert not uses_sigmoid("classify")


def test_a_run_with_bce_predicts_sigmoids_everywhere(tmp_path):
    pytest.importorskip("onnx")
    config = Config(
        data="synthetic:classes=3,size=16,train=8,val=4", model="nf_resnet_nano", length="2st", device="cpu",
        objective="bce", input={"image_size": 16, "batch_size": 4, "workers": 0},
        augment={"mixup": 0.2, "cutmix": 1.0},
    )  # fmt: skip
    result = train(config, tmp_path / "run", console=Console(quiet=True))
    assert 0.5 < result.average.loss < 0.9  # the mean over classes of a network that knows nothing: ln 2
    about = json.loads((tmp_path / "run/model/config.json").read_text())
    assert about["problem_type"] == "multi_label_classification"
    model = from_pretrained(tmp_path / "run")
    Image.new("RGB", (16, 16), (200, 10, 10)).save(tmp_path / "a.png")
    (prediction,) = predict(model, [tmp_path / "a.png"], top=3, device="cpu")
    pixels = model.preprocessing.transform()(Image.open(tmp_path / "a.png"))
    logits = model.net(normalize(pixels[None])).detach()[0].tolist()
    found = dict(zip(prediction.classes, prediction.probabilities, strict=True))
    assert [found[c] for c in model.classes] == pytest.approx([1 / (1 + math.exp(-x)) for x in logits])
    export(model, tmp_path / "m.onnx")
    assert open_onnx(tmp_path / "m.onnx")[1]["sigmoid"] is True
    assert from_pretrained(tmp_path / "m.onnx").sigmoid


def test_class_balance_is_refused_with_bce(tmp_path):
    config = with_overrides(Config(), ["--objective", "bce", "--optim.class_balance", "1"])
    with pytest.raises(ValueError, match=r"class_balance=1 with objective='bce'\. Allowed: 0"):
        train(config, tmp_path / "run", console=Console(quiet=True))
