"""Laws of the optimizer: schedules, averages, adaptive clipping, units, and weight standardization."""

import copy
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from normfree.models.layers import standardize
from normfree.ops.standardize import standardize_all
from normfree.optim.agc import adaptive_clip_grad_, unitwise_norm
from normfree.optim.clipping import clip_grad_
from normfree.optim.ema import Ema, ema_decay
from normfree.optim.schedule import SCHEDULES, constant, schedule_multiplier

fractions = st.floats(0, 1)
falling = st.sampled_from(["warmup_cosine", "warmup_linear"])
seeds = st.integers(0, 999)
shapes = st.sampled_from([(1,), (5,), (3, 4), (1, 4), (4, 1), (3, 2, 3, 3), (2, 1, 1, 1), (2, 3, 4), ()])


def tensor(shape, seed, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameter(shape, seed, scale=1.0):
    """Return a parameter with a gradient."""
    made = nn.Parameter(tensor(shape, seed))
    made.grad = tensor(shape, seed + 1, scale)
    return made


@given(st.sampled_from(sorted(SCHEDULES)), fractions, fractions, fractions)
def test_a_rate_is_between_zero_and_the_peak_and_above_the_final_one_after_the_warmup(
    name, progress, warmup, final
):
    rate = schedule_multiplier(name, progress, warmup=warmup, final=final)
    assert 0 <= rate <= 1 + 1e-12
    assert progress < warmup or rate >= final - 1e-12


@given(st.sampled_from(sorted(SCHEDULES)), fractions, fractions, fractions, fractions)
def test_a_rate_rises_in_the_warmup_and_never_after_it(name, one, other, warmup, final):
    early, late = sorted((one, other))
    before, after = (schedule_multiplier(name, p, warmup=warmup, final=final) for p in (early, late))
    if late <= warmup:
        assert before <= after
    elif early >= warmup:
        assert before >= after - 1e-12


@given(falling, st.floats(0, 0.99), fractions)
def test_a_schedule_joins_its_warmup_at_the_peak_and_ends_at_the_final_rate(name, warmup, final):
    near = {
        p: schedule_multiplier(name, p, warmup=warmup, final=final)
        for p in (warmup, min(1, warmup + 1e-9), 1.0)
    }
    assert near[warmup] == pytest.approx(1)
    assert near[min(1, warmup + 1e-9)] == pytest.approx(1, abs=1e-6)
    assert near[1.0] == pytest.approx(final, abs=1e-9)


@given(fractions, fractions, fractions)
def test_all_schedules_have_the_same_warmup(progress, warmup, final):
    assume(progress <= warmup)
    rates = {make(progress, warmup=warmup, final=final) for make in SCHEDULES.values()}
    assert warmup == 0 or rates == {constant(progress, warmup=warmup)}


@given(st.floats(), fractions, st.sampled_from(["progress", "warmup", "final"]))
def test_a_fraction_outside_of_0_to_1_is_a_value_error_that_names_it(value, other, argument):
    assume(not 0 <= value <= 1)
    arguments = {"progress": other, "warmup": other, "final": other, argument: value}
    with pytest.raises(ValueError, match=argument):
        schedule_multiplier("warmup_cosine", arguments.pop("progress"), **arguments)


@given(st.integers(0, 10**7), st.integers(0, 10**7), fractions)
def test_the_decay_of_an_average_rises_to_its_bound(step, more, decay):
    early, late = ema_decay(step, decay=decay), ema_decay(step + more, decay=decay)
    assert early <= late <= decay
    assert ema_decay(step, decay=decay, ramp=False) == decay


@given(seeds, st.integers(1, 4), fractions)
def test_the_average_of_equal_weights_is_these_weights(seed, updates, decay):
    model = nn.Linear(3, 2)
    model.weight.data = tensor((2, 3), seed)
    ema = Ema(model, decay=decay)
    for _ in range(updates):
        ema.update(model)
    assert torch.equal(ema.module.weight, model.weight)
    assert ema.num_updates == updates


@given(seeds, st.integers(1, 4), fractions)
def test_an_average_stays_between_the_weights_that_it_has_seen(seed, updates, decay):
    model = nn.Linear(3, 2, bias=False)
    seen = [tensor((2, 3), seed + k) for k in range(updates + 1)]
    model.weight.data = seen[0].clone()
    ema = Ema(model, decay=decay)
    for weight in seen[1:]:
        model.weight.data = weight.clone()
        ema.update(model)
    low, high = torch.stack(seen).amin(0), torch.stack(seen).amax(0)
    assert (ema.module.weight >= low - 1e-6).all()
    assert (ema.module.weight <= high + 1e-6).all()


@given(shapes, seeds)
def test_the_norms_of_units_add_up_to_the_norm_of_the_tensor(shape, seed):
    x = tensor(shape, seed)
    norms = unitwise_norm(x)
    assert norms.ndim == x.ndim
    torch.testing.assert_close(norms.norm(), x.norm())
    torch.testing.assert_close(unitwise_norm(x, unit="tensor").sum(), x.norm())


@given(st.sampled_from([(3, 4), (3, 2, 3, 3), (2, 3, 4)]), seeds, st.randoms(use_true_random=False))
def test_the_norm_of_a_unit_does_not_depend_on_the_order_of_units_and_weights(shape, seed, random):
    x = tensor(shape, seed)
    order = random.sample(range(shape[0]), shape[0])
    torch.testing.assert_close(unitwise_norm(x[order]), unitwise_norm(x)[order])
    torch.testing.assert_close(unitwise_norm(x.flip(-1)), unitwise_norm(x))


clippings = st.floats(1e-3, 10.0)
scales = st.sampled_from([1e-4, 0.1, 1.0, 100.0])


@given(shapes, seeds, scales, clippings)
def test_a_clipped_unit_is_at_its_limit_and_the_others_keep_every_bit(shape, seed, scale, clipping):
    p = parameter(shape, seed, scale)
    before = p.grad.clone()
    limit = clipping * unitwise_norm(p.detach()).clamp(min=1e-3)
    over = (unitwise_norm(before) > limit).expand_as(before)
    report = adaptive_clip_grad_([p], clipping)
    after = unitwise_norm(p.grad)
    assert torch.equal(p.grad[~over], before[~over])
    assert (after <= limit * (1 + 1e-5)).all()
    assert (p.grad.abs() <= before.abs()).all()
    assert (p.grad * before >= 0).all()
    torch.testing.assert_close(report.grad_norm, before.norm())
    assert float(report) == pytest.approx(float((unitwise_norm(before) > limit).float().mean()))


@given(shapes, seeds, scales, clippings)
def test_clipping_again_changes_nothing_of_note(shape, seed, scale, clipping):
    p = parameter(shape, seed, scale)
    adaptive_clip_grad_([p], clipping)
    once = p.grad.clone()
    adaptive_clip_grad_([p], clipping)
    torch.testing.assert_close(p.grad, once)


@given(shapes, seeds, scales, clippings, st.integers(-6, 6))
def test_clipping_is_equivariant_to_a_common_scale(shape, seed, scale, clipping, power):
    p = parameter(shape, seed, scale)
    scaled = nn.Parameter(p.detach() * 2.0**power)
    scaled.grad = p.grad * 2.0**power
    # eps bounds the norm of the weights, so it is scaled too. Powers of 2 are exact.
    adaptive_clip_grad_([p], clipping, eps=1e-3)
    adaptive_clip_grad_([scaled], clipping, eps=1e-3 * 2.0**power)
    torch.testing.assert_close(scaled.grad, p.grad * 2.0**power, rtol=1e-5, atol=1e-6 * 2.0**power)


@given(shapes, seeds, st.floats(0.01, 1.0), st.floats(1.0, 10.0))
def test_a_larger_limit_never_leaves_less_of_the_gradient(shape, seed, small, factor):
    tight, loose = parameter(shape, seed), parameter(shape, seed)
    adaptive_clip_grad_([tight], small)
    adaptive_clip_grad_([loose], small * factor)
    assert (tight.grad.abs() <= loose.grad.abs() * (1 + 1e-6)).all()


@given(st.sampled_from(["norm", "value"]), shapes, seeds, scales, st.floats(1e-3, 100))
def test_the_other_rules_keep_their_bound_and_the_sign(mode, shape, seed, scale, clipping):
    p = parameter(shape, seed, scale)
    before = p.grad.clone()
    clip_grad_([p], mode=mode, clipping=clipping)
    size = p.grad.norm() if mode == "norm" else p.grad.abs().max()
    assert size <= clipping * (1 + 1e-5)
    assert (p.grad * before >= 0).all()
    clip_grad_([p], mode="off", clipping=clipping)
    assert (p.grad.abs() <= before.abs()).all()


weights = st.sampled_from([(3, 2, 3, 3), (4, 1, 3, 3), (2, 8, 1, 1), (1, 3, 5, 5)])


@given(weights, seeds, st.floats(0.1, 10), st.floats(-3, 3))
def test_a_standardized_weight_does_not_depend_on_scale_and_shift_of_a_filter(shape, seed, scale, shift):
    weight, gain = tensor(shape, seed).double(), torch.ones(shape[0], dtype=torch.float64)
    standardized = standardize(weight, gain)
    torch.testing.assert_close(standardize(scale * weight + shift, gain), standardized)
    torch.testing.assert_close(standardize(-weight, gain), -standardized)


@given(weights, seeds, st.floats(0.1, 3))
def test_a_standardized_filter_has_mean_0_and_the_variance_of_its_gain_by_its_inputs(shape, seed, scale):
    gain = tensor((shape[0],), seed + 1).double()
    flat = standardize(tensor(shape, seed).double(), gain, scale=scale).flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(shape[0], dtype=torch.float64))
    torch.testing.assert_close(flat.pow(2).sum(1), (scale * gain) ** 2, rtol=1e-3, atol=1e-9)


@given(weights, seeds)
def test_filters_are_standardized_one_by_one(shape, seed):
    weight, gain = tensor(shape, seed), tensor((shape[0],), seed + 1)
    together = standardize(weight, gain)
    each = [standardize(weight[i : i + 1], gain[i : i + 1]) for i in range(shape[0])]
    torch.testing.assert_close(together, torch.cat(each))


@given(
    st.lists(st.tuples(weights, seeds, st.floats(0.1, 3)), min_size=1, max_size=3),
    st.sampled_from(["floor", "add"]),
)
def test_many_weights_at_once_are_the_same_as_each_alone(cases, eps):
    made = [(tensor(shape, seed), tensor((shape[0],), seed + 1), scale) for shape, seed, scale in cases]
    together = standardize_all(*(list(column) for column in zip(*made, strict=True)), eps=eps)
    for result, (weight, gain, scale) in zip(together, made, strict=True):
        torch.testing.assert_close(
            result, standardize(weight, gain, scale=scale, eps=eps), rtol=1e-4, atol=1e-6
        )


@given(seeds, st.integers(1, 5))
def test_an_average_continues_from_its_state_bit_for_bit(seed, updates):
    model = nn.Linear(3, 2)
    ema, again = Ema(model, decay=0.9), Ema(model, decay=0.9)
    for k in range(updates):
        model.weight.data = tensor((2, 3), seed + k)
        ema.update(model)
    again.load_state_dict(copy.deepcopy(ema.state_dict()))
    model.weight.data = tensor((2, 3), seed + updates)
    for average in (ema, again):
        average.update(model)
    assert torch.equal(again.module.weight, ema.module.weight)
    assert not math.isnan(float(ema.module.weight.sum()))
