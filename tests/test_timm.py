"""Our variants in timm's registry: `import normfree.timm`."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_data_config
from timm.models import group_parameters, is_model, model_entrypoint
from timm.optim import create_optimizer_v2

import normfree.timm
from normfree.models.variants import VARIANTS, name_in_timm, variant_of
from normfree.models.zoo import create_model
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel, from_pretrained, save_pretrained

TINY = {"widths": (32, 64, 96, 96), "depths": (1, 1, 1, 1), "group_width": 8}


@pytest.mark.works("timm", "normfree.timm")
@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_variant_is_registered_and_no_name_of_timm_is_changed(name: str) -> None:
    ours = name_in_timm(name)
    assert model_entrypoint(ours).__module__ == "normfree.timm"
    assert ours in timm.list_models(f"{ours}*")
    if ours != name:
        assert model_entrypoint(name).__module__.startswith("timm.models.")
    with torch.device("meta"):
        net = timm.create_model(ours)
    assert (net.name, net.variant, net.num_classes) == (name, variant_of(name), 1000)
    config = net.pretrained_cfg
    assert net.default_cfg is config
    assert config["architecture"] == ours
    assert net.get_submodule(config["first_conv"]).weight.shape[1] == 3
    assert net.get_submodule(config["classifier"]) is net.get_classifier()
    assert config["input_size"] == (3, net.variant.train_size, net.variant.train_size)
    data = resolve_data_config(model=net, use_test_size=True)
    assert data["input_size"] == (3, net.variant.test_size, net.variant.test_size)


def test_importing_it_again_registers_nothing_again() -> None:
    code = (
        "import importlib, timm, normfree.timm as plugin; before = timm.list_models()\n"
        "importlib.reload(plugin); assert timm.list_models() == before"
    )
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True)


def test_without_timm_the_error_names_the_fix() -> None:
    code = "import sys; sys.modules['timm'] = None\nimport normfree.timm"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.splitlines()[-1] == (
        'ModuleNotFoundError: normfree.timm needs timm, which is not installed. Fix: pip install "timm".'
    )


def test_the_interface_of_timms_networks() -> None:
    net = timm.create_model("nf_resnet_nano", in_chans=1, num_classes=0, drop_path_rate=0.2, drop_rate=0.1)
    assert (net.variant.stochdepth_rate, net.variant.drop_rate, net.in_chans) == (0.2, 0.1, 1)
    images = torch.randn(2, 1, 32, 32)
    net.eval()
    assert net(images).shape == (2, net.num_features) == (2, net.head_hidden_size)
    net.reset_classifier(7)
    maps = net.forward_features(images)
    assert net.forward_head(maps).shape == (2, 7) == (2, net.get_classifier().out_features)
    assert net.forward_head(maps, pre_logits=True).shape == (2, 256)
    net.reset_classifier(7, "max")
    assert not torch.equal(net.forward_head(maps, pre_logits=True), maps.mean((2, 3)) * net.feature_scale)
    last, features = net.forward_intermediates(images, indices=[0, -1])
    assert torch.equal(last, maps)
    assert [f.shape[1] for f in features] == [64, 256]
    net.set_grad_checkpointing()
    assert net.grad_checkpointing
    net.train()(images).sum().backward()
    assert (
        timm.create_model("nf_resnet_nano", global_pool="", num_classes=0)(torch.randn(1, 3, 32, 32)).ndim
        == 4
    )
    half = timm.create_model("nf_resnet_nano", dtype=torch.bfloat16, device="cpu")
    assert next(half.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("name", ["normfree_nfnet_f0", "bn_nfnet_f0"])
def test_layers_for_learning_rates(name: str, coarse: bool) -> None:
    """Stem, blocks (or stages) with the final convolution in the last group, head; layer decay of timm's optimizers."""
    net = timm.create_model(name, **TINY)
    groups = group_parameters(net, net.group_matcher(coarse=coarse))
    assert len(groups) == 6
    assert all(n.startswith("stem.") for n in groups[0])
    assert {n.split(".")[0] for n in groups[4]} >= {"stages", "final_conv"}
    assert all(n.startswith("head.") for n in groups[5])
    optimizer = create_optimizer_v2(net, opt="adamw", lr=1.0, layer_decay=0.5)
    scales = sorted({g["lr_scale"] for g in optimizer.param_groups})
    assert scales == [0.5**i for i in range(5, -1, -1)]


@pytest.mark.parametrize(
    ("name", "reductions"),
    [
        ("nf_resnet_nano", [1, 2, 4]),
        ("nf_resnet_nano_64", [2, 4, 8, 16]),
        ("nf_regnet_b0", [2, 4, 8, 16, 32]),
    ],
)
def test_features(name: str, reductions: list[int]) -> None:
    torch.manual_seed(0)
    net = timm.create_model(name, features_only=True, in_chans=1).eval()
    assert net.feature_info.reduction() == reductions
    images = torch.randn(1, 1, 64, 64)
    maps = net(images)
    assert [m.shape[1] for m in maps] == net.feature_info.channels()
    assert [64 // m.shape[2] for m in maps] == reductions
    torch.manual_seed(0)
    some = timm.create_model(name, features_only=True, in_chans=1, out_indices=(1, -1)).eval()
    assert [torch.equal(a, b) for a, b in zip(some(images), (maps[1], maps[-1]), strict=True)] == [True, True]
    torch.manual_seed(0)
    hooked = timm.create_model(
        name, features_only=True, in_chans=1, feature_cls="hook", out_indices=tuple(range(len(reductions)))
    ).eval()
    assert [torch.equal(a, b) for a, b in zip(hooked(images), maps, strict=True)] == [True] * len(maps)
    sum(m.sum() for m in net.train()(torch.randn(2, 1, 64, 64))).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("name", "theirs"), [("timm_test_nfnet", "test_nfnet"), ("timm_nf_resnet50", "nf_resnet50")]
)
@pytest.mark.parametrize("channels", [3, 1])
def test_published_weights_are_translated(name: str, theirs: str, channels: int, tmp_path: Path) -> None:
    """What timm downloads has timm's names; here a file replaces the download."""
    torch.manual_seed(0)
    source = timm.create_model(theirs, num_classes=9).eval()
    save_file(source.state_dict(), tmp_path / "x.safetensors")
    overlay = {"file": str(tmp_path / "x.safetensors"), "num_classes": 9}
    arguments = {
        "pretrained": True,
        "pretrained_cfg_overlay": overlay,
        "in_chans": channels,
        "num_classes": 9,
    }
    ours = timm.create_model(name, **arguments).eval()
    wanted = timm.create_model(theirs, **arguments).eval()
    images = torch.randn(2, channels, 64, 64)
    torch.testing.assert_close(ours(images), wanted(images), rtol=1e-4, atol=1e-5)
    other = timm.create_model(name, **(arguments | {"num_classes": 4})).eval()
    assert other(images).shape == (2, 4)
    assert torch.equal(other.stem.conv0.weight, ours.stem.conv0.weight)
    features = timm.create_model(name, features_only=True, **(arguments | {"num_classes": 1000})).eval()
    assert torch.equal(features.model.stem.conv0.weight, ours.stem.conv0.weight)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("nf_resnet_nano", {}),
        ("nf_resnet26", {}),
        ("resnet26", {"global_pool": "max"}),
        ("nf_resnet_nano", {"widths": (16, 32), "depths": (1, 1), "strides": (1, 2), "in_channels": 4}),
        ("timm_test_nfnet", {"global_pool": "avgmax", "in_channels": 1}),
        ("timm_test_nfnet", {"alpha": 0.5}),
    ],
)
def test_timm_opens_the_folders_of_every_variant(name: str, fields: dict, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = create_model(name, num_classes=3, **fields).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    half = (0.5,) * net.in_channels
    model = TrainedModel(net, Preprocessing(32, crop="squash", mean=half, std=half), ("a", "b", "c"))
    save_pretrained(model, tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, net.in_channels, 32, 32)
    torch.testing.assert_close(theirs(images), net(images), rtol=1e-4, atol=1e-5)
    assert tuple(resolve_data_config(model=theirs)["input_size"]) == (net.in_channels, 32, 32)
    again = from_pretrained(tmp_path).net
    assert (again.variant, again.global_pool) == (net.variant, net.global_pool)
    torch.testing.assert_close(again(images), net(images))


def test_the_plugin_is_no_shadow_of_timm() -> None:
    assert normfree.timm is not timm
    assert is_model("resnet18")
