"""Opacus takes networks of every family and converted networks, in all its modes, with the right gradients."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfree

MODES = ("hooks", "functorch", "ew", "ghost")
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-12}
SMALL = {"depths": (1, 2), "widths": (16, 32), "strides": (1, 2)}
FAMILIES = {
    "nf_resnet50": SMALL,
    "nfnet_f0": {**SMALL, "group_width": 8},
    "nf_regnet_b0": {**SMALL, "classifier_std": 0.1},
    "timm_test_nfnet": SMALL,
    "timm_eca_nfnet_l0": {**SMALL, "group_width": 8},
    "timm_nf_resnet26": SMALL,
}
TWINS = {"resnet50": SMALL, "bn_nfnet_f0": {**SMALL, "group_width": 8}}
LABELS = torch.tensor([0, 1, 2, 1])


@pytest.fixture(autouse=True)
def _registered():
    """Our layers are registered with Opacus."""
    pytest.importorskip("opacus")
    import normfree.opacus  # noqa: F401


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=dtype)


def network(name: str, **fields: object) -> nn.Module:
    torch.manual_seed(0)
    rates = {"drop_rate": 0.0, "stochdepth_rate": 0.0}
    changes = {**rates, **{**FAMILIES, **TWINS}[name], **fields}
    net = normfree.create_model(name, num_classes=3, **changes)
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if key.endswith(("skip_gain", "conv2.gain")):
                parameter.fill_(0.5)
    return net.train()


def assert_same_samples(make: Callable[[], nn.Module], mode: str, dtype: torch.dtype) -> None:
    """Compare what Opacus computes for each example with `per_example_gradients`."""
    from opacus.grad_sample.utils import wrap_model

    x, bound = images(dtype), BOUNDS[dtype]
    wanted = normfree.per_example_gradients(make().to(dtype), x, LABELS)
    net = make().to(dtype)
    private = wrap_model(net, grad_sample_mode=mode, **({"max_grad_norm": 1.0} if mode == "ghost" else {}))
    F.cross_entropy(private(x), LABELS).backward()
    if mode == "ghost":
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in wanted.values()]).norm(dim=0)
        torch.testing.assert_close(private.get_norm_sample(), norms, rtol=bound, atol=0.0)
        return
    for name, parameter in net.named_parameters():
        error = (parameter.grad_sample - wanted[name]).norm()
        assert error <= bound * wanted[name].norm().clamp(min=1e-3), name


@pytest.mark.works("Opacus", "networks of every family")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_examples_are_those_of_per_example_gradients(name, mode, dtype):
    assert_same_samples(lambda: network(name), mode, dtype)


def converted(name: str, **options: object) -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model, _ = normfree.convert_batchnorm(getattr(torchvision.models, name)(num_classes=3), **options)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


@pytest.mark.works("Opacus", "convert_batchnorm")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_converted_networks_have_the_same_gradients(name, mode):
    from opacus.validators import ModuleValidator

    assert ModuleValidator.is_valid(converted(name))
    assert_same_samples(lambda: converted(name), mode, torch.float64)


@pytest.mark.works("Opacus", "convert_batchnorm")
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
def test_standardized_conversions_have_the_same_gradients(mode):
    """The blocks of torchvision add the shortcut in place; the conversion lets hooks see the tensor before."""
    from opacus.validators import ModuleValidator

    assert ModuleValidator.is_valid(converted("resnet18", how="normalizer_free"))
    assert_same_samples(lambda: converted("resnet18", how="normalizer_free"), mode, torch.float64)


@pytest.mark.works("Opacus", "convert_batchnorm")
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
def test_converted_architectures_have_the_same_gradients(mode):
    assert_same_samples(lambda: converted("resnet18", how="scratch", skip_gain=0.5), mode, torch.float64)


@pytest.mark.works("Opacus", "fold")
@pytest.mark.parametrize("mode", MODES)
def test_folded_networks_have_the_same_gradients(mode):
    assert_same_samples(lambda: normfree.fold(network("nfnet_f0").eval()).train(), mode, torch.float64)


@pytest.mark.refuses("Opacus", "batch-norm twins", reason="an example's gradient depends on the batch")
@pytest.mark.parametrize("name", TWINS)
def test_batch_norm_twins_are_refused(name):
    from opacus.validators import ModuleValidator
    from opacus.validators.errors import UnsupportedModuleError

    with pytest.raises(UnsupportedModuleError, match="BatchNorm"):
        ModuleValidator.validate(network(name), strict=True)


@pytest.mark.refuses("Opacus", "stochastic depth", reason="an example's gradient depends on the draws")
@pytest.mark.parametrize("name", ["nfnet_f0", "nf_resnet50"])
def test_stochastic_depth_is_refused_and_fixed(name):
    from opacus.validators import ModuleValidator
    from opacus.validators.errors import UnsupportedModuleError

    net = network(name, stochdepth_rate=0.3)
    with pytest.raises(UnsupportedModuleError, match=r"stochastic depth with rate .* ModuleValidator\.fix"):
        ModuleValidator.validate(net, strict=True)
    fixed = ModuleValidator.fix(net)
    assert ModuleValidator.is_valid(fixed)
    assert not ModuleValidator.is_valid(net)
    torch.testing.assert_close(fixed(images()), network(name)(images()))


@pytest.mark.works("Opacus", "stochastic depth of timm_ variants")
@pytest.mark.parametrize("name", ["timm_eca_nfnet_l0", "timm_nf_resnet26"])
def test_blocks_without_a_gain_of_their_own_are_not_computed_again_and_may_be_dropped(name):
    from opacus.grad_sample.utils import wrap_model

    net = network(name, stochdepth_rate=0.6).double()
    private = wrap_model(net, grad_sample_mode="hooks", loss_reduction="sum")
    F.cross_entropy(private(images(torch.float64)), LABELS, reduction="sum").backward()
    for key, parameter in net.named_parameters():
        torch.testing.assert_close(
            parameter.grad_sample.sum(0), parameter.grad, rtol=1e-9, atol=1e-12, msg=key
        )


@pytest.mark.works("Opacus", "PrivacyEngine.make_private")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["nf_resnet50", "nfnet_f0", "timm_eca_nfnet_l0"])
def test_three_private_steps_change_every_parameter(name, mode):
    from opacus import PrivacyEngine

    net = network(name)
    before = {k: p.detach().clone() for k, p in net.named_parameters()}
    data = torch.utils.data.TensorDataset(images(), LABELS)
    engine = PrivacyEngine()
    private, optimizer, *criterion, loader = engine.make_private(
        module=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), criterion=nn.CrossEntropyLoss(),
        data_loader=torch.utils.data.DataLoader(data, batch_size=2), noise_multiplier=1.0, max_grad_norm=1.0,
        grad_sample_mode=mode, poisson_sampling=False,
    )  # fmt: skip
    loss = criterion[0] if criterion else nn.CrossEntropyLoss()
    for x, y in [*loader, *loader][:3]:
        optimizer.zero_grad()
        loss(private(x), y).backward()
        optimizer.step()
    assert engine.get_epsilon(delta=1e-5) > 0
    for key, parameter in net.named_parameters():
        assert torch.isfinite(parameter).all()
        assert not torch.equal(parameter, before[key]), key


def test_an_empty_batch_of_poisson_sampling_is_allowed():
    from opacus import PrivacyEngine

    net = network("timm_test_nfnet")
    data = torch.utils.data.TensorDataset(images(), LABELS)
    private, optimizer, _ = PrivacyEngine().make_private(
        module=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=2), noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    F.cross_entropy(private(images()[:0]), LABELS[:0], reduction="sum").backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_the_recipe_of_the_docs_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs" / "derivatives.md"
    (recipe,) = re.findall(r"```py\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    namespace: dict = {}
    exec(compile(recipe, str(page), "exec"), namespace)
    assert namespace["epsilon"] > 0
