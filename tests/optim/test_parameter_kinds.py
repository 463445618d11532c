"""What a parameter is follows from the type of its module: laws over our, timm's and torchvision's networks."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.optim import param_groups_weight_decay
from torch import nn
from torchvision.models import regnet

from normfree.models.net import Net
from normfree.models.variants import VARIANTS
from normfree.models.zoo import create_model
from normfree.optim.classifier import find_classifier
from normfree.optim.groups import ParameterGroups, parameter_groups
from normfree.optim.parameter_kinds import kind_of
from normfree.surgery.convert import convert_batchnorm

# Rules on names, which decided before types did: (group, pattern, decays, is clipped). The first match counts.
NAME_RULES = (
    ("gains and biases", r"(^|\.)(gain|bias|skip_gain)$", False, True),
    ("normalization", r"(^|\.)[^.]*norm[^.]*\.weight$", False, True),
    ("classifier", r"^head\.weight$", True, False),
    ("weights", r"(^|\.)weight$", True, True),
)
# Of each family of timm one network or two, with everything that is unusual about parameters and classifiers.
TIMM = """
beit_base_patch16_224 cait_xxs24_224 coat_tiny coatnet_nano_cc_224 convmixer_768_32 convnext_atto
crossvit_9_240 cspresnet50 deit_tiny_distilled_patch16_224 densenet121 dla34 dm_nfnet_f0 dpn48b eca_nfnet_l0
edgenext_xx_small efficientformer_l1 efficientnet_b0 ese_vovnet19b_dw fastvit_t8 ghostnet_100 gmixer_12_224
hardcorenas_a hgnetv2_b0 hrnet_w18_small inception_v3 lcnet_035 levit_128s maxvit_pico_rw_256 mixer_s32_224
mobilenetv4_conv_small mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_gap nf_regnet_b0 nf_resnet26
pit_ti_distilled_224 poolformer_s12 pvt_v2_b0 regnety_002 repvgg_a0 resnet18 resnetv2_50 rexnet_100
sam2_hiera_tiny senet154 swin_tiny_patch4_window7_224 tiny_vit_5m_224 tinynet_e tnt_s_patch16_224 tresnet_m
twins_svt_small vgg11 visformer_tiny vit_tiny_patch16_224 vit_medium_patch16_rope_reg1_gap_256 volo_d1_224
xception41 xcit_nano_12_p16_224
""".split()  # noqa: SIM905  one name a line is 60 lines


def by_name(groups: ParameterGroups) -> dict[str, str]:
    return {name: group["name"] for group in groups for name in group["param_names"]}


@contextmanager
def without_memory() -> Iterator[None]:
    """Build networks without values, and without drawing any, which takes most of the time on the meta device."""

    def keep(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return tensor

    original = regnet.BlockParams.from_init_params

    def on_cpu(*args: object, **options: object) -> object:  # its tensors must have values
        with torch.device("cpu"):
            return original(*args, **options)

    with pytest.MonkeyPatch.context() as patch, torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("normal_", "uniform_", "fill_", "zero_", "erfinv_", "clamp_"):
            patch.setattr(torch.Tensor, name, keep)
        patch.setattr(regnet.BlockParams, "from_init_params", on_cpu)
        yield


def test_the_groups_of_our_variants_are_those_of_the_rules_on_names() -> None:
    for variant, fields in VARIANTS.items():
        depths = tuple(min(depth, 2) for depth in fields.depths)  # deeper blocks repeat the second
        with without_memory():
            net = Net(replace(fields, depths=depths))
        expected: dict[str, tuple[float, float, list[str]]] = {}
        for name, _ in net.named_parameters():
            index = next(i for i, (_, pattern, _, _) in enumerate(NAME_RULES) if re.search(pattern, name))
            group, _, decays, clipped = NAME_RULES[index]
            expected.setdefault(group, (0.5 * decays, 0.1 * clipped, []))[2].append(name)
        found = parameter_groups(net, weight_decay=0.5, clipping=0.1)
        got = {g["name"]: (g["weight_decay"], g["clipping"], g["param_names"]) for g in found}
        assert got == expected, variant
        order = [rule[0] for rule in NAME_RULES if rule[0] in expected]
        assert [group["name"] for group in found] == order, variant


@pytest.mark.parametrize(
    ("owner", "name", "kind"),
    [
        (nn.Linear(3, 1), "weight", "weights"),
        (nn.Conv1d(1, 1, 3), "weight", "weights"),
        (nn.Conv2d(4, 4, 3, groups=4), "weight", "weights"),
        (nn.Linear(3, 2), "bias", "gains and biases"),
        (nn.LayerNorm((2, 3)), "weight", "normalization"),
        (nn.LayerNorm((2, 3)), "bias", "gains and biases"),
        (nn.InstanceNorm2d(3, affine=True), "weight", "normalization"),
        (nn.PReLU(4), "weight", "gains and biases"),
        (nn.Embedding(5, 3), "weight", "embeddings"),
        (nn.MultiheadAttention(4, 2), "in_proj_weight", "weights"),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), "bias_k", "gains and biases"),
        (nn.LSTM(3, 4), "weight_ih_l0", "weights"),
        (nn.LSTM(3, 4), "bias_ih_l0", "gains and biases"),
    ],
)
def test_kinds_of_the_parameters_of_torchs_layers(owner: nn.Module, name: str, kind: str) -> None:
    assert kind_of(owner, name, owner.get_parameter(name)) == kind


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("gamma", (4, 1, 1), "gains and biases"),
        ("temperature", (), "gains and biases"),
        ("cls_token", (1, 1, 4), "gains and biases"),
        ("register", (1, 3, 4), "embeddings"),
        ("pos_embed", (9, 4), "embeddings"),
        ("relative_position_bias_table", (9, 2), "embeddings"),
        ("projection", (4, 3), "weights"),
        ("w1", (2, 4, 3), "weights"),
    ],
)
def test_kinds_of_parameters_that_no_layer_has(name: str, shape: tuple[int, ...], kind: str) -> None:
    assert kind_of(nn.Module(), name, torch.empty(shape)) == kind


def test_parametrized_and_shared_weights() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    for layer in (net[0], net[2]):
        nn.utils.parametrizations.weight_norm(layer)
    kinds = by_name(parameter_groups(net))
    for at, kind in (("0", "weights"), ("2", "classifier")):
        prefix = f"{at}.parametrizations.weight.original"
        assert (kinds[prefix + "0"], kinds[prefix + "1"]) == ("gains and biases", kind)
    tied = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    tied[1].weight = tied[0].weight
    assert by_name(parameter_groups(tied)) == {"0.weight": "embeddings"}


def check(net: nn.Module) -> None:
    """Each parameter is in one group; matrices of linear layers decay, everything that torch calls bias does not."""
    groups = parameter_groups(net, weight_decay=0.5, clipping=0.1)
    names = [name for group in groups for name in group["param_names"]]
    trainable = [name for name, p in net.named_parameters() if p.requires_grad]
    assert sorted(names) == sorted(trainable)
    decayed = {name for group in groups if group["weight_decay"] for name in group["param_names"]}
    assert not any(name.endswith(".bias") for name in decayed)
    for prefix, module in net.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm):
            assert not decayed & {f"{prefix}.{name}" for name, _ in module.named_parameters()}, prefix
    torch.optim.AdamW(groups)


def check_timm(name: str) -> set[str]:
    """Compare with timm's classifier and its parameter groups; return what only timm decays."""
    with without_memory():
        net = timm.create_model(name)
    if not hasattr(net, "get_classifier"):  # encoders; one ends in a linear layer, others cannot be traced
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert parameter_groups(net)
        return set()
    check(net)
    groups = parameter_groups(net, weight_decay=0.5, clipping=0.1)
    unclipped = {n for group in groups if not group["clipping"] for n in group["param_names"]}
    found = net.get_classifier()
    heads = found if isinstance(found, tuple) else (found,)
    heads = [part for head in heads for part in (head if isinstance(head, nn.ModuleList) else [head])]
    theirs = [{id(p) for p in head.parameters()} for head in heads if isinstance(head, nn.Module)]
    parameters = dict(net.named_parameters())
    ours = {id(parameters[n]) for n in unclipped}
    assert ours <= set().union(*theirs)
    assert all(ours & head for head in theirs if head)  # of each head, its layer of logits

    no_decay = net.no_weight_decay() if hasattr(net, "no_weight_decay") else ()
    timms = param_groups_weight_decay(net, 0.5, no_weight_decay_list=no_decay)
    timm_decays = {id(p) for group in timms if group["weight_decay"] for p in group["params"]}
    decays = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decays <= timm_decays
    only_timm = {n for n, p in parameters.items() if id(p) in timm_decays - decays}
    kinds = by_name(groups)
    for n in only_timm:  # vectors of more than one dimension, and tables that timm's model does not list
        vector = parameters[n].numel() == max(parameters[n].shape)
        assert kinds[n] == "gains and biases" if vector else kinds[n] in ("embeddings", "normalization"), n
    return only_timm


@pytest.mark.works("timm", "parameter_groups")
@pytest.mark.parametrize("name", TIMM)
def test_timms_networks(name: str) -> None:
    check_timm(name)


@pytest.mark.slow
def test_all_networks_of_timm() -> None:
    failed = {}
    for name in timm.list_models():
        try:
            check_timm(name)
        except (AssertionError, ValueError) as error:
            failed[name] = error
    assert failed == {}


def test_timm_decays_gains_and_position_biases_and_we_do_not() -> None:
    assert {name.rpartition(".")[2] for name in check_timm("nf_resnet26")} == {"gain"}
    assert check_timm("resnet18") == set()


def torchvision_model(name: str) -> nn.Module:
    backbone = name in torchvision.models.list_models(
        module=torchvision.models.detection
    ) + torchvision.models.list_models(module=torchvision.models.segmentation)
    with without_memory():
        options = {"weights_backbone": None} if backbone else {}
        return torchvision.models.get_model(name, weights=None, **options)


CLASSIFICATION = torchvision.models.list_models(module=torchvision.models)


def one_of_each_family(names: list[str]) -> list[Any]:
    """Return the names as parameters of a test, all but the first of each family marked as slow."""
    families: set[str] = set()
    chosen = []
    for name in names:
        family = re.split(r"_|\d", name)[0]
        chosen.append(pytest.param(name, marks=[pytest.mark.slow] if family in families else []))
        families.add(family)
    return chosen


@pytest.mark.works("torchvision", "parameter_groups")
@pytest.mark.parametrize("name", one_of_each_family(CLASSIFICATION))
def test_torchvisions_classifiers_are_found(name: str) -> None:
    """The classifier is the layer with as many outputs as there are classes."""
    net = torchvision_model(name)
    check(net)
    (found,) = find_classifier(net)
    layer = net.get_submodule(found)
    assert 1000 in (getattr(layer, "out_features", 0), getattr(layer, "out_channels", 0))
    (classifier,) = [g for g in parameter_groups(net) if g["clipping"] == 0.0]
    assert classifier["param_names"] == [f"{found}.weight"]


def others() -> list[str]:
    return sorted(set(torchvision.models.list_models()) - set(CLASSIFICATION))


@pytest.mark.parametrize("name", one_of_each_family(others()))
def test_torchvisions_other_networks(name: str) -> None:
    """Detectors cannot be traced: a warning names them, and everything is clipped."""
    net = torchvision_model(name)
    detects = not hasattr(net, "fc") and name in torchvision.models.list_models(
        module=torchvision.models.detection
    ) + torchvision.models.list_models(module=torchvision.models.optical_flow)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        groups = parameter_groups(net, weight_decay=0.5, clipping=0.1)
    assert detects == bool(caught)
    none = detects or name.startswith("lraspp")  # the sum of two layers of different widths
    assert none == ("classifier" not in by_name(groups).values())
    if detects:
        assert "was not found, since torch.fx cannot trace it" in str(caught[0].message)
        assert parameter_groups(net, clipping=0.0)  # nothing is clipped, so nothing is missing


class HeadFirst(nn.Module):
    """The order of registration is not that of the computation."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(8, 3), nn.Linear(4, 8)

    def forward(self, x: torch.Tensor, *, scale: float) -> dict[str, torch.Tensor]:
        features = self.body(x * scale).relu()
        return {"logits": self.head(features).softmax(-1), "features": features}


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) if x.sum() > 0 else self.two(x)


class Residual(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class Pair(nn.Module):
    """A distilled network: the mean of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.dist = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        return (self.head(x) + self.dist(x)) / 2


@pytest.mark.parametrize(
    ("net", "names"),
    [
        (HeadFirst(), ["head"]),
        (Pair(), ["head", "dist"]),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), []),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 9, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)), ["1"]),
        (nn.Sequential(nn.Linear(4, 8), Residual(nn.Linear(8, 8), nn.Linear(8, 8))), []),
        (nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoderLayer(8, 2)), []),
        (nn.Linear(2, 2), [""]),
        (nn.ReLU(), []),
        (nn.DataParallel(HeadFirst()), ["module.head"]),
        (nn.Sequential(nn.Conv2d(3, 3, 3), timm.create_model("nf_resnet26", num_classes=2)), ["1.head.fc"]),
        (nn.Sequential(timm.create_model("resnet18", num_classes=0), nn.Linear(512, 2)), ["1"]),
        (create_model("nf_resnet_nano", features_only=True), []),
        (create_model("resnet_nano", features_only=True), []),
        (create_model("nf_resnet_nano", num_classes=0), []),
    ],
)
def test_layers_that_feed_the_output(net: nn.Module, names: list[str]) -> None:
    modes = [module.training for module in net.modules()]
    assert find_classifier(net) == names
    assert [module.training for module in net.modules()] == modes


def test_converted_networks_keep_their_classifier() -> None:
    net = torchvision.models.resnet18()
    for how in ("exact", "normalizer_free", "scratch"):
        assert find_classifier(convert_batchnorm(net, how=how).model) == ["fc"]


def test_a_network_that_cannot_be_traced_needs_the_name() -> None:
    net = Branching()
    message = r"the classifier of a Branching was not found, since torch\.fx cannot trace it\. Allowed: .* Fix: name it"
    with pytest.raises(ValueError, match=message):
        find_classifier(net)
    with pytest.warns(UserWarning, match=message + r".* Its weight is clipped like all others\."):
        groups = parameter_groups(net)
    assert "classifier" not in by_name(groups).values()
    named = by_name(parameter_groups(net, classifier=("one", "two")))
    assert {n for n, kind in named.items() if kind == "classifier"} == {"one.weight", "two.weight"}
    assert "classifier" not in by_name(parameter_groups(net, classifier=())).values()
    by_pattern = parameter_groups(net, unclipped=("two.weight",))
    assert [g["param_names"] for g in by_pattern if not g["clipping"]] == [["two.weight"]]
    wrong = r"^classifier has 'onne', which is no module of Branching\. Did you mean 'one'\? Allowed: "
    with pytest.raises(ValueError, match=wrong):
        parameter_groups(net, classifier="onne")


def test_the_last_linear_layer_of_a_named_module_counts() -> None:
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1)
    net.head = nn.Sequential(nn.Linear(192, 8), nn.GELU(), nn.Linear(8, 3))
    for groups in (parameter_groups(net), parameter_groups(net, classifier="head")):
        kinds = by_name(groups)
        assert (kinds["head.0.weight"], kinds["head.2.weight"]) == ("weights", "classifier")


def test_groups_print_as_a_table() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    groups = parameter_groups(net, weight_decay=0.5, clipping=0.1, lr_multipliers={"^3": 10.0})
    assert str(groups).splitlines() == [
        "group             tensors  numbers  weight decay  clipping    lr  parameters",
        "gains and biases        2        8          none       0.1   × 1  '0.bias' and 1 more",
        "gains and biases        1        2          none       0.1  × 10  '3.bias'",
        "normalization           1        4          none       0.1   × 1  '1.weight'",
        "classifier              1        8           0.5      none  × 10  '3.weight'",
        "weights                 1      108           0.5       0.1   × 1  '0.weight'",
    ]
    assert groups == list(groups)
