"""Tests of adaptive gradient clipping."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from normfree.optim.agc import adaptive_clip_grad_, unitwise_norm
from normfree.optim.groups import parameter_groups
from normfree.optim.named_gradients import NonFiniteGradientError

SHAPES = [
    (),
    (7,),
    (1, 9),
    (9, 1),
    (1, 1, 1, 5),
    (6, 4),
    (6, 4, 3),
    (8, 4, 3, 3),
    (8, 1, 3, 3),
    (4, 3, 2, 2, 2),
]


@pytest.fixture(autouse=True, params=["compiled", "plain"])
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test with the compiled kernels and without them."""
    if request.param == "plain":
        monkeypatch.setattr("normfree.optim.units.library", lambda: None)
    else:
        request.getfixturevalue("compiled")


def parameter(
    shape: tuple[int, ...], *, scale: float = 1.0, grad_scale: float = 1.0, seed: int = 0
) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    result = nn.Parameter(scale * torch.randn(shape, generator=generator))
    # Units whose gradients differ by orders of magnitude, so that some are clipped and some are not.
    spread = torch.logspace(-6, 1, shape[0] if shape else 1).reshape(-1, *[1] * (len(shape) - 1))
    result.grad = grad_scale * torch.randn(shape, generator=generator) * (spread if shape else spread[0])
    return result


def by_hand(p: Tensor, g: Tensor, clipping: float, eps: float) -> Tensor:
    """Return the clipped gradient by the formula in float64, one unit after another."""
    p, g = p.detach().double(), g.double().clone()
    single = sum(n != 1 for n in p.shape) <= 1
    pairs = [(p, g)] if single else list(zip(p, g, strict=True))
    for weights, grad in pairs:
        limit = clipping * max(float(weights.norm()), eps)
        if float(grad.norm()) > limit:
            grad.mul_(limit / max(float(grad.norm()), 1e-6))
    return g


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("clipping", [0.01, 0.16])
def test_equals_the_formula(shape: tuple[int, ...], clipping: float) -> None:
    p = parameter(shape)
    expected = by_hand(p, p.grad, clipping, 1e-3)
    adaptive_clip_grad_(p, clipping)
    torch.testing.assert_close(p.grad.double(), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    ("shape", "norm_shape"),
    [
        ((), ()),
        ((7,), (1,)),
        ((1, 7), (1, 1)),
        ((7, 1), (1, 1)),
        ((1, 1, 1, 7), (1, 1, 1, 1)),
        ((7, 1, 1, 1), (1, 1, 1, 1)),
        ((5, 7), (5, 1)),
        ((1, 5, 7), (1, 1, 1)),
        ((5, 7, 3), (5, 1, 1)),
        ((5, 1, 3, 3), (5, 1, 1, 1)),
        ((5, 2, 3, 3, 3), (5, 1, 1, 1, 1)),
    ],
)
def test_units_of_each_shape(shape: tuple[int, ...], norm_shape: tuple[int, ...]) -> None:
    ones = torch.ones(shape)
    norm = unitwise_norm(ones)
    assert norm.shape == norm_shape
    per_unit = ones.numel() / max(norm.numel(), 1)
    torch.testing.assert_close(norm, torch.full(norm_shape, per_unit**0.5))


def test_no_unit_exceeds_its_limit_and_none_grows() -> None:
    for seed, shape in enumerate(SHAPES):
        p = parameter(shape, grad_scale=10.0, seed=seed)
        before = unitwise_norm(p.grad)
        adaptive_clip_grad_(p, 0.02)
        after = unitwise_norm(p.grad)
        limit = 0.02 * unitwise_norm(p).clamp(min=1e-3)
        assert bool((after <= limit * (1 + 1e-6)).all() or (after == before).all())
        assert bool((after <= before).all())


def test_below_the_limit_every_bit_is_kept() -> None:
    p = parameter((64, 9), grad_scale=3.0)
    before, norms = p.grad.clone(), unitwise_norm(p.grad).flatten()
    below = norms < 0.0099 * unitwise_norm(p).flatten()
    report = adaptive_clip_grad_(p, 0.01)
    assert 0 < int(below.sum()) < 64
    assert torch.equal(p.grad[below].view(torch.int32), before[below].view(torch.int32))
    assert not torch.isclose(p.grad[~below], before[~below]).all(dim=1).any()
    assert float(report) == pytest.approx(1 - float(below.float().mean()))


def test_clipping_twice_is_clipping_once() -> None:
    p = parameter((16, 3, 3, 3))
    adaptive_clip_grad_(p)
    once = p.grad.clone()
    adaptive_clip_grad_(p)
    torch.testing.assert_close(p.grad, once, rtol=1e-6, atol=0.0)


def test_scaling_weights_and_gradients_scales_the_result() -> None:
    p, q = parameter((16, 12)), parameter((16, 12))
    with torch.no_grad():
        q.mul_(8.0)  # a power of two, so that scaling is exact
    q.grad.mul_(8.0)
    adaptive_clip_grad_(p)
    adaptive_clip_grad_(q)
    assert torch.equal(q.grad, 8.0 * p.grad)


def test_a_gain_of_zero_is_clipped_to_eps_times_clipping() -> None:
    gain = nn.Parameter(torch.zeros(()))
    gain.grad = torch.tensor(-3.0)
    adaptive_clip_grad_(gain, clipping=0.01, eps=1e-3)
    assert float(gain.grad) == pytest.approx(-1e-5, rel=1e-6)


def test_the_division_has_the_lower_bound_of_the_reference() -> None:
    # |g| = 1e-7 exceeds the limit 1e-5 * 1e-3 = 1e-8, and is divided by 1e-6 instead of itself.
    gain = nn.Parameter(torch.zeros(()))
    gain.grad = torch.tensor(1e-7)
    adaptive_clip_grad_(gain, clipping=1e-5, eps=1e-3)
    assert float(gain.grad) == pytest.approx(1e-9, rel=1e-6)


def test_an_empty_parameter_has_no_unit() -> None:
    many = [nn.Parameter(torch.zeros(shape)) for shape in ((0, 3), (0,))]
    for p in many:
        p.grad = torch.zeros_like(p)
    assert adaptive_clip_grad_(many).units == 0


def test_a_gain_vector_is_one_unit() -> None:
    gain = nn.Parameter(torch.ones(64))
    gain.grad = torch.zeros(64)
    gain.grad[3] = 0.05  # the limit of the vector is 0.01 * 8; an element alone would be clipped to 0.01
    assert float(adaptive_clip_grad_(gain)) == 0.0
    assert gain.grad[3] == 0.05


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_does_not_matter(memory_format: torch.memory_format) -> None:
    p = parameter((8, 4, 3, 3))
    expected = by_hand(p, p.grad, 0.01, 1e-3)
    p.grad = p.grad.contiguous(memory_format=memory_format)
    adaptive_clip_grad_(p)
    torch.testing.assert_close(p.grad.double(), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_have_float32_norms(dtype: torch.dtype) -> None:
    # 4096 ones: bfloat16 sums stop growing at 256, float16 squares of 300 overflow.
    p = nn.Parameter(torch.full((2, 4096), 300.0, dtype=dtype))
    p.grad = torch.full((2, 4096), 300.0, dtype=dtype)
    assert unitwise_norm(p).dtype == torch.float32
    expected = float(torch.tensor(300.0, dtype=dtype)) * 64
    torch.testing.assert_close(unitwise_norm(p), torch.full((2, 1), expected))
    report = adaptive_clip_grad_(p, 0.01)
    assert float(report) == 1.0
    torch.testing.assert_close(p.grad, torch.full_like(p, 3.0), rtol=1e-2, atol=0.0)


def test_float64_stays_float64() -> None:
    p = nn.Parameter(parameter((6, 5)).detach().double())
    p.grad = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = by_hand(p, p.grad, 0.01, 1e-3)
    adaptive_clip_grad_(p)
    torch.testing.assert_close(p.grad, expected, rtol=1e-14, atol=0.0)


def test_mixed_dtypes_in_one_call() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    many = [nn.Parameter(torch.ones(4, 4, dtype=d)) for d in dtypes] + [nn.Parameter(torch.ones(4))]
    for p in many:
        p.grad = torch.ones_like(p)
    report = adaptive_clip_grad_(many, 0.5)
    assert (float(report), report.units) == (1.0, 17)
    for p in many:
        assert torch.equal(p.grad, torch.full_like(p, 0.5))


def test_every_kind_of_input_gives_the_same_result() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 5))
    image = torch.randn(2, 3, 4, 4)
    inputs = [
        lambda: net,
        lambda: net.parameters(),
        lambda: list(net.parameters()),
        lambda: net.named_parameters(),
        lambda: [{"params": list(net.parameters())}],
        lambda: [{"params": net.named_parameters(), "clipping": 0.01}],
        lambda: torch.optim.AdamW(net.named_parameters(), eps=1e-8).param_groups,
    ]
    results = []
    for make in inputs:
        net.zero_grad()
        net(image).square().sum().backward()
        report = adaptive_clip_grad_(make(), clipping=0.01)
        results.append((float(report), report.units, torch.cat([p.grad.flatten() for p in net.parameters()])))
    assert results[0][1] == 8 + 1 + 5 + 1
    assert results[0][0] > 0
    for fraction, units, flat in results[1:]:
        assert (fraction, units) == results[0][:2]
        assert torch.equal(flat, results[0][2])


def test_a_group_may_have_its_own_clipping_or_none() -> None:
    many = [nn.Parameter(torch.ones(4)) for _ in range(3)]
    for p in many:
        p.grad = torch.ones(4)
    groups = [
        {"params": many[0], "clipping": 0.25},
        {"params": [many[1]], "clipping": 0.0},
        {"params": [many[2]]},
    ]
    report = adaptive_clip_grad_(groups, clipping=0.5)
    assert [float(p.grad[0]) for p in many] == [0.25, 1.0, 0.5]
    assert (float(report), report.units) == (1.0, 2)
    assert float(report.grad_norm) == pytest.approx(12**0.5)


def test_a_parameter_passed_twice_is_clipped_once() -> None:
    p = nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    assert adaptive_clip_grad_([p, p], 0.5).units == 1
    assert torch.equal(p.grad, torch.full((4,), 0.5))


def test_parameters_without_gradient_are_skipped() -> None:
    with_grad, without = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    with_grad.grad = torch.ones(4)
    assert adaptive_clip_grad_([without, with_grad]).units == 1
    assert without.grad is None
    nothing = adaptive_clip_grad_([without])
    assert (float(nothing), nothing.units, float(nothing.grad_norm)) == (0.0, 0, 0.0)


def test_works_after_backward_with_another_optimizer() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(1, 4, 2), nn.Flatten(), nn.Linear(32, 3))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    images, labels = torch.randn(6, 1, 3, 3, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        adaptive_clip_grad_(net, clipping=0.01)
        assert bool((unitwise_norm(net[0].weight.grad) <= 0.010001 * unitwise_norm(net[0].weight)).all())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_is_named_and_nothing_changes(bad: float) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    net[1].weight.grad[2, 1] = bad
    before = [p.grad.clone() for p in net.parameters()]
    with pytest.raises(NonFiniteGradientError) as caught:
        adaptive_clip_grad_(net)
    assert str(caught.value) == (
        "1 of 4 gradients are not finite: '1.weight'; none was changed. Allowed: finite gradients. "
        "Fix: skip this step or lower the learning rate; under a GradScaler pass error_if_nonfinite=False."
    )
    assert caught.value.names == ("1.weight",)
    for p, old in zip(net.parameters(), before, strict=True):
        assert torch.equal(p.grad.nan_to_num(7.0, 8.0, 9.0), old.nan_to_num(7.0, 8.0, 9.0))


def test_an_exempt_gradient_is_checked_as_well() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([1.0, float("nan"), 1.0])
    with pytest.raises(NonFiniteGradientError, match=r"'parameter 0 of shape \(3,\)'"):
        adaptive_clip_grad_([{"params": [p], "clipping": 0.0}])


def test_five_names_are_listed_and_the_rest_counted() -> None:
    many = [nn.Parameter(torch.ones(2)) for _ in range(7)]
    for p in many:
        p.grad = torch.full((2,), float("inf"))
    with pytest.raises(
        NonFiniteGradientError, match=r"7 of 7 .*'parameter 4 of shape \(2,\)' and 2 more; none was changed"
    ):
        adaptive_clip_grad_(many)


def test_without_the_check_only_finite_units_are_clipped() -> None:
    p = nn.Parameter(torch.ones(3, 4))
    p.grad = torch.ones(3, 4)
    p.grad[0, 0], p.grad[1, 0] = float("inf"), float("nan")
    report = adaptive_clip_grad_(p, 0.5, error_if_nonfinite=False)
    assert p.grad[0].tolist() == [float("inf"), 1.0, 1.0, 1.0]
    assert p.grad[1, 1:].tolist() == [1.0, 1.0, 1.0]
    assert p.grad[2].tolist() == [0.5] * 4
    assert float(report) == pytest.approx(1 / 3)


def test_the_classifier_weight_is_exempt_and_its_bias_is_not() -> None:
    net = nn.ModuleDict({"stem": nn.Linear(4, 4), "head": nn.Linear(4, 3)})
    for p in net.parameters():
        p.grad = torch.full_like(p, 5.0)
    adaptive_clip_grad_(parameter_groups(net, weight_decay=0.0, clipping=0.01, classifier="head"))
    assert torch.equal(net["head"].weight.grad, torch.full((3, 4), 5.0))
    for clipped in (net["head"].bias, net["stem"].weight, net["stem"].bias):
        assert float(clipped.grad.abs().max()) < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"clipping": -1.0},
            "clipping is -1.0. Allowed: 0 or more. Fix: pass clipping=0.01, the published value.",
        ),
        (
            {"clipping": float("nan")},
            "clipping is nan. Allowed: 0 or more. Fix: pass clipping=0.01, the published value.",
        ),
        ({"eps": -1.0}, "eps is -1.0. Allowed: 0 or more. Fix: pass eps=0.001, the published value."),
    ],
)
def test_negative_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        adaptive_clip_grad_(nn.Linear(2, 2), **arguments)


def test_sparse_gradients_and_other_types_are_errors() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    message = "the gradient of 'weight' is sparse. Allowed: dense gradients. Fix: build the layer with sparse=False."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        adaptive_clip_grad_(table)
    message = (
        "cannot clip an object of type str. Allowed: a module, a tensor, tensors, (name, tensor) pairs, or "
        "parameter groups. Fix: pass model.named_parameters() or optimizer.param_groups."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        adaptive_clip_grad_(dict(nn.Linear(2, 2).named_parameters()))
