"""The key `optim.body`: frozen parts stay, multipliers reach every layer, and refusals name the part."""

import io
import shlex

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from normfree import create_model, parameter_groups
from normfree.training import loop
from normfree.training.body import freeze_, frozen_modules, layers, lr_multipliers
from normfree.training.config import Config
from normfree.training.config_io import with_overrides

FLAGS = shlex.split(
    "--data synthetic:classes=3,size=16,train=24,val=6 --model nf_resnet_nano --input.image_size 16 "
    "--input.batch_size 8 --input.workers 0 --length 4st --optim.warmup 1st --log.evaluate_every 4st "
    "--log.checkpoint_every 2st --net.drop_rate 0.3 --net.stochdepth_rate 0.5 --net.skip_gain 0.5 --device cpu"
)


def run(out, *flags):
    config = with_overrides(Config(), [*FLAGS, *flags])
    loop.train(config, out, console=Console(file=io.StringIO(), width=200))
    return load_file(out / "checkpoints/step-00000002/model.safetensors"), load_file(
        out / "checkpoints/step-00000004/model.safetensors"
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_frozen_body_stays_bit_for_bit_and_the_classifier_trains(tmp_path, optimizer):
    first, last = run(tmp_path / "run", "--optim.body", "freeze", "--optim.optimizer", optimizer)
    changed = {k for k in first if not torch.equal(first[k], last[k])}
    assert changed == {"head.weight", "head.bias"}
    average = load_file(tmp_path / "run/model/model.safetensors")
    assert all(torch.equal(average[k], last[k]) for k in last if k not in changed)
    log = (tmp_path / "run/log.txt").read_text()
    assert "771 of " in log  # 256 * 3 + 3
    assert "parameters are trained, the others are frozen" in log


def test_parts_can_be_frozen(tmp_path):
    first, last = run(tmp_path / "run", "--optim.body", "train:freeze=stem,stages.0.0,*.gain,lr=0.5")
    kept = {k for k in first if torch.equal(first[k], last[k])}
    assert kept == {k for k in first if k.startswith(("stem.", "stages.0.0.")) or k.endswith(".gain")}


def test_a_frozen_part_computes_as_in_evaluation():
    torch.manual_seed(0)
    net = create_model("resnet26", num_classes=3, widths=(16, 32), depths=(1, 1), strides=(1, 2))
    freeze_(net, "train:freeze=stem,stages.0")
    net.train()
    for module in frozen_modules(net):
        module.eval()
    norms = {n: m for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {n.partition(".")[0] for n, m in norms.items() if m.training} == {"stages", "final_norm"}
    before = {n: m.running_mean.clone() for n, m in norms.items()}
    net(torch.randn(4, 3, 16, 16))
    moved = {n for n, m in norms.items() if not torch.equal(m.running_mean, before[n])}
    assert moved == {n for n in norms if n.startswith(("stages.1", "final_norm"))}


def test_multipliers_fall_from_the_classifier_to_the_stem():
    net = create_model(
        "nfnet_f0", num_classes=3, depths=(1, 2), widths=(16, 32), strides=(1, 2), group_width=8
    )
    names = layers(net)
    assert names == ["stem", "stages.0.0", "stages.1.0", "stages.1.1", "final_conv", "head"]
    factors = lr_multipliers(net, "train:lr=0.5,layer_decay=0.1")
    groups = parameter_groups(net, weight_decay=0.1, clipping=0.1, lr_multipliers=factors)
    found = {n: g["lr_multiplier"] for g in groups for n in g["param_names"]}
    assert found.keys() == {n for n, _ in net.named_parameters()}
    for name, factor in found.items():
        depth = len(names) - 1 - next(i for i, layer in enumerate(names) if name.startswith(f"{layer}."))
        assert factor == pytest.approx(0.5 * 0.1**depth if depth else 1.0), name
    assert lr_multipliers(net, "train") == {}
    freeze_(net, "train:freeze=stem,stages.0")
    parameter_groups(net, weight_decay=0.1, clipping=0.1, lr_multipliers=lr_multipliers(net, "train:lr=0.5"))


def test_a_learning_rate_of_zero_for_the_body_moves_the_classifier_only(tmp_path):
    first, last = run(tmp_path / "run", "--optim.body", "train:lr=0", "--optim.weight_decay", "0")
    assert {k for k in first if not torch.equal(first[k], last[k])} == {"head.weight", "head.bias"}


def test_an_unknown_part_and_a_network_without_anything_to_train_are_refused():
    net = create_model("nf_resnet_nano", num_classes=3)
    with pytest.raises(ValueError, match=r"freezes 'stages\.9'.*Allowed: 'stem', .*Did you mean 'stages\.2'"):
        freeze_(net, "train:freeze=stages.9")
    with pytest.raises(ValueError, match="freezes every parameter"):
        freeze_(net, "train:freeze=*")
