"""`attach_agc` gives, bit for bit, the weights of a loop that clips by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfree.models.zoo import create_model
from normfree.native.library import library
from normfree.optim.agc import adaptive_clip_grad_
from normfree.optim.attach import attach_agc
from normfree.optim.ema import Ema
from normfree.optim.groups import parameter_groups
from normfree.optim.sgd import SGD

CLIPPING = 0.02


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 8), nn.ReLU(), nn.Linear(8, 3)
    )


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, 8, 8, generator=generator), torch.randint(3, (4,), generator=generator)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "fused adamw": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
}


def make(kind: str, net: nn.Module) -> torch.optim.Optimizer:
    if kind == "muon":  # takes matrices only
        return torch.optim.Muon([p for p in net.parameters() if p.ndim == 2], lr=0.01)
    return OPTIMIZERS[kind](net.parameters())


def by_hand(net: nn.Module, optimizer: torch.optim.Optimizer, *, unit: str = "filter") -> None:
    params = {id(p) for group in optimizer.param_groups for p in group["params"]}
    clipped = [(n, p) for n, p in net.named_parameters() if n != "5.weight" and id(p) in params]
    adaptive_clip_grad_(clipped, CLIPPING, unit=unit)
    optimizer.step()
    optimizer.zero_grad()


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.works("PyTorch", "attach_agc")
@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("kind", [*OPTIMIZERS, "muon"])
def test_steps_are_those_of_a_loop_that_clips(kind, closure):
    nets = [network(), network()]
    optimizers = [make(kind, net) for net in nets]
    handle = attach_agc(optimizers[0], CLIPPING, model=nets[0])
    assert handle.exempt == ("5.weight",)
    assert handle.report is None
    for step in range(4):
        x, y = batch(step)

        def loss(x=x, y=y):
            optimizers[0].zero_grad()
            found = F.cross_entropy(nets[0](x), y)
            found.backward()
            return found

        if closure:
            assert optimizers[0].step(loss).item() > 0
        else:
            loss()
            optimizers[0].step()
        assert 0 < float(handle.report) <= 1
        F.cross_entropy(nets[1](x), y).backward()
        by_hand(nets[1], optimizers[1])
    assert_same(*nets)


def test_accumulated_gradients_are_clipped_once_at_the_step():
    nets = [network(), network()]
    optimizers = [make("sgd", net) for net in nets]
    attach_agc(optimizers[0], CLIPPING, model=nets[0])
    for step in range(4):
        for net in nets:
            (F.cross_entropy(net(batch(step)[0]), batch(step)[1]) / 2).backward()
        if step % 2:
            optimizers[0].step()
            optimizers[0].zero_grad()
            by_hand(nets[1], optimizers[1])
    assert_same(*nets)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "fused adamw"])
@pytest.mark.parametrize("explicit", [False, True])
def test_under_a_grad_scaler_the_unscaled_gradients_are_clipped(kind, explicit):
    """A fused optimizer unscales inside its step, after the hook. The scale is a power of two, so nothing rounds."""
    nets = [network(), network()]
    optimizers = [make(kind, net) for net in nets]
    handle = attach_agc(optimizers[0], CLIPPING, model=nets[0])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        x, y = batch(step)
        scaler.scale(F.cross_entropy(nets[0](x), y)).backward()
        if explicit:
            scaler.unscale_(optimizers[0])
        scaler.step(optimizers[0])
        scaler.update()
        optimizers[0].zero_grad()
        F.cross_entropy(nets[1](x), y).backward()
        norm = torch.cat([p.grad.flatten() for n, p in nets[1].named_parameters() if n != "5.weight"]).norm()
        assert float(handle.report.grad_norm) == pytest.approx(float(norm), rel=1e-5)
        by_hand(nets[1], optimizers[1])
    assert_same(*nets)


def test_a_step_that_the_scaler_skips_changes_nothing():
    net = network()
    optimizer = make("adamw", net)
    attach_agc(optimizer, CLIPPING, model=net, error_if_nonfinite=True)
    before = copy.deepcopy(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(F.cross_entropy(net(batch(0)[0]), batch(0)[1])).backward()
    net[0].weight.grad[0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert_same(net, before)


def test_unit_tensor_clips_whole_tensors():
    nets = [network(), network()]
    optimizers = [make("sgd", net) for net in nets]
    handle = attach_agc(optimizers[0], CLIPPING, model=nets[0], unit="tensor")
    for net in nets:
        F.cross_entropy(net(batch(0)[0]), batch(0)[1]).backward()
    optimizers[0].step()
    by_hand(nets[1], optimizers[1], unit="tensor")
    assert handle.report.units == 5  # weights and biases, without the classifier's weight
    assert_same(*nets)


def test_groups_may_have_their_own_clipping_and_patterns_exempt():
    net = network()
    groups = [{"params": net[0].parameters(), "clipping": 0.0}, {"params": net[3:].parameters()}]
    optimizer = torch.optim.SGD(groups, 0.1)
    handle = attach_agc(optimizer, CLIPPING, model=net, exempt=("5.*",))
    assert handle.exempt == ("5.weight", "5.bias")
    F.cross_entropy(net(batch(0)[0]), batch(0)[1]).backward()
    optimizer.step()
    assert handle.report.units == 8 + 1  # of layer 3


def test_removed_it_clips_no_more():
    nets = [network(), network()]
    optimizers = [make("sgd", net) for net in nets]
    attach_agc(optimizers[0], 1e-6, model=nets[0]).remove()
    for net, optimizer in zip(nets, optimizers, strict=True):
        F.cross_entropy(net(batch(0)[0]), batch(0)[1]).backward()
        optimizer.step()
    assert_same(*nets)


def test_a_gradient_that_is_not_finite_raises_only_on_request():
    net = network()
    for raises in (False, True):
        optimizer = make("sgd", net)
        handle = attach_agc(optimizer, CLIPPING, model=net, error_if_nonfinite=raises)
        F.cross_entropy(net(batch(0)[0]), batch(0)[1]).backward()
        net[0].weight.grad[0] = float("nan")
        if raises:
            with pytest.raises(ValueError, match=r"gradients are not finite: '0\.weight'"):
                optimizer.step()
        else:
            optimizer.step()
            assert handle.report.grad_norm.isnan()
        handle.remove()
        optimizer.zero_grad()


def test_without_a_model_everything_can_be_clipped():
    net = network()
    optimizer = make("sgd", net)
    handle = attach_agc(optimizer, CLIPPING, exempt=())
    F.cross_entropy(net(batch(0)[0]), batch(0)[1]).backward()
    optimizer.step()
    assert handle.report.units == 4 + 8 + 3 + 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exempt is 'classifier' without a model. Fix: pass model=model, or exempt="),
        (
            {"model": nn.Linear(1, 1)},
            "no parameter of the optimizer is one of the model. Fix: pass the model",
        ),
        ({"clipping": -1.0, "exempt": ()}, "clipping is -1.0"),
        ({"unit": "layer", "exempt": ()}, "unknown unit 'layer'"),
        ({"exempt": ("6.weight",)}, "exempt has '6.weight', which matches no parameter. Did you mean '"),
    ],
)
def test_wrong_arguments(options, message):
    net = network()
    if "6.weight" in options.get("exempt", ()):
        options["model"] = net
    clipping = options.pop("clipping", CLIPPING)
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(".", r"\.")):
        attach_agc(make("sgd", net), clipping, **options)


def test_the_classifiers_of_a_distilled_network_are_exempt_and_a_body_has_none():
    import timm

    distilled = timm.create_model("levit_128s", num_classes=3)
    optimizer = torch.optim.SGD(distilled.parameters(), 0.1)
    assert attach_agc(optimizer, model=distilled).exempt == ("head.linear.weight", "head_dist.linear.weight")
    body = timm.create_model("resnet18", num_classes=0)
    assert attach_agc(torch.optim.SGD(body.parameters(), 0.1), model=body).exempt == ()


def test_an_unknown_classifier_must_be_named():
    class Layers(nn.Module):  # as a LightningModule without forward
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

    net = Layers()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"the classifier of a Layers was not found.*exempt='head\.weight'"):
        attach_agc(optimizer, model=net)
    assert attach_agc(optimizer, model=net, exempt="head.weight").exempt == ("head.weight",)


def averaged_loop(kind: str, *, formats: bool = True, steps: int = 4):
    """Return what `attach_agc` with `ema` reaches, and a loop that clips, steps and averages by three calls."""
    found = []
    for attached in (True, False):
        torch.manual_seed(0)
        net = create_model("nf_resnet_nano", num_classes=3, skip_gain=1.0, drop_rate=0.0, stochdepth_rate=0.0)
        net = net.to(memory_format=torch.channels_last) if formats else net
        groups = parameter_groups(net, weight_decay=1e-3, clipping=CLIPPING)
        optimizer = SGD(groups, 0.1) if kind == "sgd" else torch.optim.AdamW(net.parameters(), 0.01)
        ema = Ema(net, decay=0.9)
        handle = attach_agc(optimizer, CLIPPING, model=net, ema=ema) if attached else None
        reports = []
        for step in range(steps):
            images, labels = batch(step)
            F.cross_entropy(net(images), labels).backward()
            if not attached:
                clipped = (
                    groups
                    if kind == "sgd"
                    else [(n, p) for n, p in net.named_parameters() if n != "head.weight"]
                )
                report = adaptive_clip_grad_(clipped, CLIPPING)
            optimizer.step()
            if handle is None:
                ema.update(net)
            else:
                report = handle.report
            optimizer.zero_grad()
            reports.append((float(report), report.units, float(report.grad_norm)))
        found.append((net, ema, reports, handle, optimizer))
    return found


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_average_moves_inside_the_step(kind):
    (net, ema, reports, handle, _), (other, by_calls, expected, _, _) = averaged_loop(kind)
    if kind == "adamw" or library() is None:
        assert_same(net, other)
        assert_same(ema.module, by_calls.module)
    else:  # one pass: the same to rounding
        assert handle._update is not None
        for one, two in ((net, other), (ema.module, by_calls.module)):
            for p, q in zip(one.parameters(), two.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    assert ema.num_updates == by_calls.num_updates == 4
    torch.testing.assert_close(reports, expected, rtol=1e-5, atol=1e-7)


def test_one_pass_follows_changes_of_groups_and_ends_with_the_handle():
    if library() is None:
        pytest.skip("no C compiler was there when the package was installed")
    (net, ema, _, handle, optimizer), _ = averaged_loop("sgd", steps=1)
    extra = nn.Parameter(torch.ones(4))
    net.register_parameter("extra", extra)
    ema.module.register_parameter("extra", nn.Parameter(torch.ones(4), requires_grad=False))
    optimizer.add_param_group({"params": [("extra", extra)], "clipping": 0.0})
    extra.grad = torch.ones(4)
    optimizer.step()
    assert handle._update is not None
    assert (extra < 1).all()
    handle.remove()
    before = ema.num_updates
    optimizer.step()
    assert ema.num_updates == before
    assert optimizer.fused_step is None


def test_closures_and_gradients_that_are_not_finite_in_one_pass():
    if library() is None:
        pytest.skip("no C compiler was there when the package was installed")
    (net, ema, _, handle, optimizer), _ = averaged_loop("sgd", steps=1)
    images, labels = batch(0)

    def closure():
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        return loss

    start = net.head.weight.detach().clone()
    assert torch.isfinite(optimizer.step(closure))
    assert not torch.equal(net.head.weight, start)
    optimizer.zero_grad()
    start = copy.deepcopy((net.state_dict(), ema.module.state_dict()))
    net(images * float("nan")).sum().backward()
    optimizer.step()
    assert not torch.isfinite(handle.report.grad_norm)
    for before, now in zip(start, (net.state_dict(), ema.module.state_dict()), strict=True):
        assert all(torch.equal(before[k], now[k]) for k in before)


def test_an_average_needs_the_model():
    net = network()
    with pytest.raises(ValueError, match=r"ema is given without a model\. Fix: pass model=model"):
        attach_agc(make("sgd", net), CLIPPING, exempt=(), ema=Ema(net))
