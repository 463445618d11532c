"""A contract for every variant, and the laws of the residual scheme."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from normfree.models.features import FeatureNet, take_indices
from normfree.models.layers import WSConv2d
from normfree.models.net import expected_betas
from normfree.models.variants import VARIANTS, list_models, variant_of
from normfree.models.zoo import create_model

TINY = {"widths": (32, 64, 96, 96), "depths": (1, 2, 2, 1), "group_width": 8, "num_classes": 10}
SMALL = ["nf_regnet_b0", "nf_resnet26", "resnet26", "nf_resnet_nano", "resnet_nano"]
COMPILED_IF_SLOW = ["nfnet_f0", "nf_regnet_b0", "nf_resnet26", "resnet26", "resnet_nano"]


def shrunk(name: str) -> dict:
    """Return overrides that keep the structure of a variant at a fraction of its size."""
    variant = variant_of(name)
    group = min(variant.group_width, 8)
    widths = tuple(16 * (i + 1) for i in range(len(variant.widths)))
    depths = tuple(min(d, 2) for d in variant.depths)
    return {"widths": widths, "depths": depths, "group_width": group, "stochdepth_rate": 0.0}


def open_branches_(net: nn.Module) -> nn.Module:
    """Set the gains that start at 0, so that every branch contributes."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith(("skip_gain", "conv2.gain")):
                p.fill_(0.7)
    return net


@pytest.mark.parametrize("name", list(VARIANTS))
def test_contract(name):
    """Shapes, heads, features, gradients of every parameter, and memory formats, for each variant."""
    torch.manual_seed(0)
    net = open_branches_(create_model(name, num_classes=7, **shrunk(name)))
    x = torch.randn(2, 3, 37, 41)
    net.train()
    loss = net(x).square().sum()
    loss.backward()
    missing = [n for n, p in net.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert missing == []
    if variant_of(name).classifier_std:  # a classifier of zeros passes no gradient back
        dead = [n for n, p in net.named_parameters() if p.grad.abs().max() == 0]
        assert dead == []
    net.eval()
    with torch.no_grad():
        logits, maps = net(x), net.forward_features(x)
        assert logits.shape == (2, 7)
        assert maps.shape[:2] == (2, net.num_features)
        torch.testing.assert_close(net.forward_head(maps), logits)
        features = net.forward_head(maps, pre_logits=True)
        torch.testing.assert_close(net.get_classifier()(features), logits)
        fast = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(fast, logits, rtol=1e-4, atol=1e-5)
        net.reset_classifier(0)
        torch.testing.assert_close(net(x), features, rtol=1e-4, atol=1e-5)
        assert isinstance(net.get_classifier(), nn.Identity)
        net.reset_classifier(3)
        assert net(x).shape == (2, 3)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_features_only_returns_one_map_per_resolution(name):
    torch.manual_seed(0)
    backbone = open_branches_(create_model(name, features_only=True, **shrunk(name))).eval()
    x = torch.randn(1, 3, 65, 65)
    maps = backbone(x)
    reductions = [info["reduction"] for info in backbone.feature_info]
    first = 1 if variant_of(name).stem == "conv3" else 2
    assert reductions == [first * 2**i for i in range(len(reductions))]
    assert len(maps) == len(reductions) == len(variant_of(name).depths) + (first == 2)
    for map_, info in zip(maps, backbone.feature_info, strict=True):
        side = math.ceil(65 / info["reduction"])
        assert map_.shape == (1, info["num_chs"], side, side)
    sum(m.square().sum() for m in backbone.train()(torch.randn(2, 3, 65, 65))).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ["nfnet_f0", "nf_regnet_b0", "bn_nfnet_f0", "nf_resnet_nano", "nf_resnet26"])
def test_every_choice_of_maps_gives_the_same_maps(name):
    """Also by timm's method, by its pruning, and by hooks on the modules of `feature_info`."""
    torch.manual_seed(0)
    net, x = (
        open_branches_(create_model(name, num_classes=5, **shrunk(name))).eval(),
        torch.randn(1, 3, 64, 64),
    )
    hooked: dict[str, torch.Tensor] = {}
    hooks = [
        net.get_submodule(info["module"]).register_forward_hook(
            lambda _m, _i, out, key=info["module"]: hooked.update({key: out})
        )
        for info in net.feature_info
    ]
    last, maps = net.forward_intermediates(x)
    torch.testing.assert_close(last, net.forward_features(x))
    for map_, info in zip(maps, net.feature_info, strict=True):
        assert torch.equal(map_, hooked[info["module"]])
    for hook in hooks:
        hook.remove()
    for chosen in ((0,), (1,), (0, 2), (-1,), (1, -1), 2):
        wanted = [maps[i] for i in take_indices(len(maps), chosen)]
        backbone = FeatureNet(copy.deepcopy(net), out_indices=chosen)
        pruned = copy.deepcopy(net)
        kept = pruned.prune_intermediate_layers(chosen, prune_norm=True)
        early, some = net.forward_intermediates(x, chosen, stop_early=True)
        for got in (
            backbone(x),
            some,
            net.forward_intermediates(x, chosen, intermediates_only=True),
            pruned.forward_intermediates(x, kept, intermediates_only=True),
            pickle.loads(pickle.dumps(backbone))(x),
        ):
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), chosen
        assert torch.equal(early, last if kept[-1] == len(maps) - 1 else maps[kept[-1]])
        assert pruned.num_features == net.feature_info[kept[-1]]["num_chs"]
        # no layer is left that the maps do not need
        for part in (backbone.train(), pruned.train()):
            images = torch.randn(2, 3, 64, 64)
            outputs = part(images) if part is backbone else part.forward_intermediates(images, kept)[1]
            sum(m.square().sum() for m in outputs).backward()
            unused = [n for n, p in part.named_parameters() if p.grad is None]
            assert unused == []
            part.zero_grad()
            part.eval()
    with pytest.raises(ValueError, match=r"^output_fmt='NHWC'\. Allowed: NCHW\.$"):
        net.forward_intermediates(x, output_fmt="NHWC")


def test_feature_info_of_the_f0():
    assert create_model("nfnet_f0", **TINY).feature_info == [
        {"num_chs": 64, "reduction": 2, "module": "stem.conv2"},
        {"num_chs": 32, "reduction": 4, "module": "stages.0"},
        {"num_chs": 64, "reduction": 8, "module": "stages.1"},
        {"num_chs": 96, "reduction": 16, "module": "stages.2"},
        {"num_chs": 192, "reduction": 32, "module": "final_conv"},
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"features_only": True, "out_indices": (9,)},
            "out_indices=(9,). Allowed: indices from 0 (the finest map) to 4 (the last stage), or negative ones "
            "counted from the end. Fix: use out_indices=(0, 1, 2, 3, 4) for all maps, or a part of it.",
        ),
        (
            {"out_indices": (1,)},
            "out_indices=(1,) without features_only. Allowed: features_only=True. Fix: add it, or drop out_indices.",
        ),
    ],
)  # fmt: skip
def test_feature_errors(arguments, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  # compared below
        create_model("nfnet_f0", **arguments, **TINY)
    assert str(error.value) == message


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", ""])
def test_pooling(pool):
    net = open_branches_(create_model("nf_resnet_nano", num_classes=0, global_pool=pool)).eval()
    x = torch.randn(2, 3, 32, 32)
    maps = net.forward_features(x) * net.feature_scale
    flat = maps.flatten(2)
    wanted = {
        "avg": flat.mean(2), "max": flat.amax(2), "avgmax": (flat.mean(2) + flat.amax(2)) / 2, "": maps
    }[pool]  # fmt: skip
    torch.testing.assert_close(net(x), wanted)
    other = create_model("nf_resnet_nano", num_classes=4, weights=None)
    other.reset_classifier(0, pool)
    assert (other.global_pool, other.variant.global_pool) == (pool, pool)


def test_invalid_pooling_is_refused():
    with pytest.raises(ValueError, match=r"^num_classes=1000 with global_pool=''\. Allowed: num_classes=0\."):
        create_model("nf_resnet_nano", global_pool="")
    with pytest.raises(ValueError, match=r"^global_pool='mean'\. .*Allowed: avg, max, avgmax, \.$"):
        create_model("nf_resnet_nano", global_pool="mean")


def test_in_channels_and_one_pixel_images():
    net = create_model("nfnet_f0", in_channels=1, **TINY).eval()
    assert net.stem.conv0.weight.shape[1] == 1
    assert torch.isfinite(net(torch.randn(2, 1, 1, 1))).all()


def test_betas_of_f0_equal_those_of_the_reference():
    flat = [beta for stage in expected_betas((1, 2, 6, 3), 0.2) for beta in stage]
    expected = [1, 0.980581, 0.980581, 0.96225, 0.980581, 0.96225, 0.944911, 0.928477, 0.912871, 0.898027,
                0.980581, 0.96225]  # fmt: skip
    assert flat == pytest.approx(expected, abs=5e-7)


def test_a_skip_gain_of_zero_makes_a_block_the_identity():
    net = create_model("nfnet_f0", **TINY).eval()
    x = torch.randn(1, 64, 8, 8)
    assert torch.equal(net.stages[1][1](x), x)


def test_variance_follows_one_plus_k_alpha_squared():
    """[A] section 3: after block k of a stage the channel variance is 1 + k·α² if the skip gains are 1."""
    torch.manual_seed(0)
    net = create_model("nf_resnet50", num_classes=0).eval()
    variances: list[float] = []
    with torch.no_grad():
        for stage in net.stages:
            for block in stage:
                block.skip_gain.fill_(1.0)
                block.register_forward_hook(
                    lambda _m, _i, out: variances.append(out.var(dim=(0, 2, 3), correction=0).mean().item())
                )
        net(torch.randn(8, 3, 160, 160))
    expected = [1 + k * 0.04 for depth in (3, 4, 6, 3) for k in range(1, depth + 1)]
    assert variances == pytest.approx(expected, rel=0.15)


def test_an_image_does_not_influence_others():
    """Without batch statistics, logits of an image do not depend on its batch; those of the batch-norm twin do."""
    x = torch.randn(4, 3, 32, 32)
    alone, batch = {}, {}
    for name in ("nf_resnet_nano", "resnet_nano"):
        torch.manual_seed(0)
        net = open_branches_(create_model(name, num_classes=5, stochdepth_rate=0.0)).train()
        alone[name], batch[name] = net(x[:1]), net(x)[:1]
    torch.testing.assert_close(alone["nf_resnet_nano"], batch["nf_resnet_nano"], rtol=1e-4, atol=1e-6)
    assert (alone["resnet_nano"] - batch["resnet_nano"]).norm() > 0.1 * alone["resnet_nano"].norm()


@pytest.mark.parametrize("name", ["nfnet_f0", "nf_regnet_b0", "resnet26"])
def test_gradient_checkpointing_does_not_change_gradients(name):
    grads = []
    for enable in (False, True):
        torch.manual_seed(0)
        net = open_branches_(create_model(name, num_classes=5, **shrunk(name))).train()
        net.set_grad_checkpointing(enable)
        x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(2)  # stochastic depth draws the same masks again in the recomputation
        net(x).square().sum().backward()
        grads.append({n: p.grad for n, p in net.named_parameters()})
    for name_, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name_], grad, msg=name_)


@pytest.mark.parametrize(
    "name", ["nf_resnet_nano", *(pytest.param(name, marks=pytest.mark.slow) for name in COMPILED_IF_SLOW)]
)
def test_compiles_without_graph_breaks(name):
    """fullgraph=True raises at the first break; the backend "aot_eager" runs the captured graphs."""
    torch.manual_seed(0)
    net = open_branches_(create_model(name, num_classes=5, **shrunk(name))).train()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 33, 33)
    torch.manual_seed(1)
    expected = net(x)
    torch.manual_seed(1)
    got = compiled(x)
    got.square().sum().backward()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["nfnet_f0", *SMALL])
def test_exports_with_a_dynamic_batch(name):
    net = open_branches_(create_model(name, num_classes=5, **shrunk(name))).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-4, atol=1e-5)


def test_initial_values_equal_those_of_the_reference():
    torch.manual_seed(0)
    net = create_model("nfnet_f0", num_classes=100)
    for module in net.modules():
        if isinstance(module, WSConv2d):
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.2)
            assert (module.gain == 1).all()
            assert (module.bias == 0).all()
    assert net.head.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert all(p == 0 for n, p in net.named_parameters() if n.endswith("skip_gain"))
    assert create_model("nf_regnet_b0").head.weight.abs().max() == 0


def test_stochastic_depth_grows_from_zero_and_stays_below_the_full_rate():
    net = create_model("nfnet_f0", **{**TINY, "stochdepth_rate": 0.25})
    rates = [block.stochdepth.rate for stage in net.stages for block in stage]
    assert rates == pytest.approx([0.25 * i / 6 for i in range(6)])


def test_variants_named_in_the_documentation_exist():
    assert len(list_models("nfnet_f[0-7]")) == len(list_models("nfnet_f[0-7]_plus")) == 8
    assert len(list_models("nf_regnet_b[0-8]")) == 9
    assert len(list_models("bn_nfnet_f[0-3]")) == 4
    depths = ("26", "50", "101", "152", "200", "288")
    assert {f"{p}resnet{d}" for p in ("nf_", "") for d in depths} <= set(list_models("*resnet*"))
