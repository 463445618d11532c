"""Every normalizer-free network of timm 1.0.31 against timm itself, with the same random weights."""

import re

import pytest
import timm
import torch

from normfree.models.cost import count
from normfree.models.variants import list_models, variant_of
from normfree.models.zoo import create_model
from normfree.weights.hub import TAGS, repository_of
from normfree.weights.load import load_weights
from normfree.weights.names import state_dict_from_timm, timm_from_state_dict

NAMES = [name.removeprefix("timm_") for name in list_models("timm_*")]
LIGHT = {
    "dm_nfnet_f0", "eca_nfnet_l0", "test_nfnet", "nf_resnet26", "nf_seresnet26", "nf_ecaresnet26", "nf_regnet_b0",
    "nf_regnet_b3",
}  # fmt: skip
WITH_WEIGHTS = [name if name in LIGHT else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
TOLERANCE = 1e-5  # relative L2 error, float32


def changed_timm(name, **kwargs):
    """Return timm's network with all parameters changed, so that no branch is closed and no gain is 1."""
    torch.manual_seed(0)
    net = timm.create_model(name, **kwargs)
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if parameter.ndim == 0 or key.endswith("gain"):
                parameter.uniform_(0.8, 1.2)
            else:
                parameter.add_(0.1 * parameter.std().nan_to_num(1.0) * torch.randn_like(parameter))
    return net


def distance(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def test_no_network_of_timm_is_missing():
    theirs = [name for name in timm.list_models(module="nfnet")]
    assert sorted(theirs) == sorted(NAMES)
    tags = {n.split(".")[0]: n.split(".")[1] for n in timm.list_models(module="nfnet", pretrained=True)}
    assert tags == TAGS


@pytest.mark.works("timm", "timm_ variants, weights both ways")
@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_same_function_and_same_weights_both_ways(name):
    theirs = changed_timm(name)
    ours = create_model(f"timm_{name}")
    load_weights(ours, theirs.state_dict())
    errors = []
    for size in ((64, 64), (97, 75)):
        images = torch.randn(2, 3, *size)
        for training in (False, True):  # default rates of dropout and stochastic depth are 0 in both
            with torch.no_grad():
                errors.append(distance(ours.train(training)(images), theirs.train(training)(images)))
    print(f"{name}: {max(errors):.1e}")  # pytest -s shows the table of docs/weights.md
    assert max(errors) < TOLERANCE
    back = timm_from_state_dict(ours.state_dict(), attention_at=ours.variant.attention_at)
    timm.create_model(name).load_state_dict(back, strict=True)
    assert all(torch.equal(back[key], value) for key, value in theirs.state_dict().items())


FAMILIES = {
    "dm_nfnet_f0",
    "eca_nfnet_l0",
    "test_nfnet",
    "nf_resnet26",
    "nf_seresnet26",
    "nf_ecaresnet26",
    "nf_regnet_b0",
}


@pytest.mark.works("timm", "features_only of timm_ variants")
@pytest.mark.parametrize(
    "name", [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_same_feature_maps(name):
    """Strides 2 to 32, the last map after the final convolution."""
    theirs = changed_timm(name, features_only=True).eval()
    # timm's extractor renames stem.conv1 to stem_conv1 and stages.0 to stages_0
    renamed = {re.sub(r"^(stem|stages)_", r"\1.", k): v for k, v in theirs.state_dict().items()}
    ours = create_model(f"timm_{name}", features_only=True).eval()
    ours.load_state_dict(state_dict_from_timm(renamed))
    images = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        maps, wanted = ours(images), theirs(images)
    assert [m.shape for m in maps] == [m.shape for m in wanted]
    assert max(distance(a, b) for a, b in zip(maps, wanted, strict=True)) < TOLERANCE
    assert [info["num_chs"] for info in ours.feature_info] == theirs.feature_info.channels()
    assert (
        [info["reduction"] for info in ours.feature_info]
        == theirs.feature_info.reduction()
        == [2, 4, 8, 16, 32]
    )


@pytest.mark.parametrize("pool", ["max", "avgmax", ""])
def test_same_pooling(pool):
    theirs = changed_timm("test_nfnet", num_classes=0, global_pool=pool).eval()
    ours = create_model("timm_test_nfnet", num_classes=0, global_pool=pool).eval()
    load_weights(ours, theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert distance(ours(images), theirs(images)) < TOLERANCE


@pytest.mark.parametrize("name", ["dm_nfnet_f0", "eca_nfnet_l1", "nf_regnet_b2", "nf_seresnet26"])
def test_differences_are_due_to_rounding(name):
    """In float64 the differences vanish: the function is the same, though a network may amplify rounding errors."""
    theirs = changed_timm(name).double().eval()
    ours = create_model(f"timm_{name}").double().eval()
    load_weights(ours, theirs.state_dict())
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert distance(ours(images), theirs(images)) < 1e-13


@pytest.mark.parametrize("name", ["dm_nfnet_f0", "nf_resnet26", "nf_regnet_b0", "eca_nfnet_l0"])
def test_same_gradients(name):
    theirs = changed_timm(name, num_classes=5)
    ours = create_model(f"timm_{name}", num_classes=5)
    load_weights(ours, theirs.state_dict())
    images = torch.randn(2, 3, 48, 48)
    for net in (ours, theirs):
        net.train()(images).square().sum().backward()
    grads = timm_from_state_dict(
        {k: p.grad for k, p in ours.named_parameters()}, attention_at=ours.variant.attention_at
    )
    for key, parameter in theirs.named_parameters():
        assert distance(grads[key], parameter.grad) < 1e-4, key


@pytest.mark.parametrize("name", NAMES)
def test_same_size_and_stage_shapes(name):
    with torch.device("meta"):
        theirs = timm.create_model(name)
        ours = create_model(f"timm_{name}")
    parameters = sum(p.numel() for p in theirs.parameters())
    assert (
        parameters
        == sum(p.numel() for p in ours.parameters())
        == count(variant_of(f"timm_{name}")).parameters
    )
    for key in ("num_chs", "reduction"):
        assert [i[key] for i in ours.feature_info] == [i[key] for i in theirs.feature_info]
    cfg = theirs.default_cfg
    assert (ours.variant.train_size, ours.variant.test_size) == (
        cfg["input_size"][-1], (cfg.get("test_input_size") or cfg["input_size"])[-1],
    )  # fmt: skip


def test_stochastic_depth_equals_that_of_timm():
    theirs = timm.create_model("test_nfnet", drop_path_rate=0.3)
    ours = create_model("timm_test_nfnet", stochdepth_rate=0.3)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for s in theirs.stages for b in s]
    assert [b.stochdepth.rate for s in ours.stages for b in s] == pytest.approx(rates, rel=1e-6)
    layer = ours.stages[3][0].stochdepth
    mask = layer.train()(torch.zeros(20_000, 1, 1, 1))
    assert sorted(set(mask.flatten().tolist())) == pytest.approx([0.0, 1 / 0.7])
    assert float(mask.mean()) == pytest.approx(1.0, abs=0.02)  # seven standard deviations


@pytest.mark.slow
def test_differences_between_timm_and_the_reference():
    """The numbers of docs/weights.md: most of the difference comes from 1e-5 added to the variance."""
    theirs = changed_timm("dm_nfnet_f0")
    images = torch.randn(2, 3, 64, 64)
    logits = {}
    for label, variant, overrides in (
        ("timm", "timm_dm_nfnet_f0", {}),
        ("eps", "nfnet_f0", {"ws_eps": "add"}),
        ("gelu", "nfnet_f0", {"activation": "gelu_erf"}),
        ("reference", "nfnet_f0", {}),
    ):
        net = create_model(variant, **overrides).eval()
        load_weights(net, theirs.state_dict())
        with torch.no_grad():
            logits[label] = net(images)
    distances = {label: distance(value, logits["reference"]) for label, value in logits.items()}
    print(distances)
    assert 1e-3 < distances["timm"] < 1e-1
    assert 1e-5 < distances["gelu"] < 3e-3
    assert distances["eps"] == pytest.approx(distances["timm"], rel=0.1)


def test_published_weights_have_one_repository():
    assert repository_of("nfnet_f3") == repository_of("timm_dm_nfnet_f3") == "timm/dm_nfnet_f3.dm_in1k"
    assert repository_of("timm_eca_nfnet_l2") == "timm/eca_nfnet_l2.ra3_in1k"
    with pytest.raises(ValueError, match=r"no published weights are known for 'nf_resnet50'.*Allowed: "):
        repository_of("nf_resnet50")
