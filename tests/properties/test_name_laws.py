"""Laws of names: variants, published weights, and the names of parameters in three libraries."""

import contextlib
import functools

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from normfree.models.variant import Variant, rounded
from normfree.models.variants import VARIANTS, list_models, name_in_timm, variant_of
from normfree.models.zoo import create_model
from normfree.preprocessing import Preprocessing
from normfree.weights import hub
from normfree.weights.names import (
    haiku_from_state_dict,
    naming_of,
    state_dict_from_haiku,
    state_dict_from_timm,
    timm_from_state_dict,
    to_our_names,
)

variants = st.sampled_from(sorted(VARIANTS))


@given(
    st.one_of(
        st.text(max_size=30), variants.flatmap(lambda name: st.text("abf0.", max_size=3).map(name.__add__))
    )
)
@example("dm_nfnet_f0.dm_in1k")
@example("eca_nfnet_l0.ra2_in1k")
def test_an_unknown_variant_is_a_value_error_that_suggests_known_ones(name):
    assume(name not in VARIANTS)
    with pytest.raises(ValueError, match="unknown model") as caught:
        variant_of(name)
    text = str(caught.value)
    for before in ("Did you mean '", "of that name is '"):
        if before in text:
            assert text.partition(before)[2].partition("'")[0] in VARIANTS


@given(st.one_of(variants, variants.map(lambda name: name[:-1] + "*"), st.text("*?[]nf_", max_size=6)))
def test_a_pattern_lists_variants_in_their_order(pattern):
    found = list_models(pattern)
    assert [name for name in VARIANTS if name in set(found)] == found
    assert pattern not in VARIANTS or found == [pattern]
    assert set(found) <= set(list_models(f"{pattern}*"))


def test_names_in_timm_differ():
    assert len({name_in_timm(name) for name in VARIANTS}) == len(VARIANTS)


@given(variants, st.text(max_size=6))
def test_a_repository_is_named_by_its_architecture_and_its_only_tag(name, tag):
    try:
        repository = hub.repository_of(name)
    except ValueError as error:
        assert "no published weights" in str(error)
        return
    architecture, _, published = repository.removeprefix("timm/").partition(".")
    assert hub.TAGS[architecture] == published
    assert hub.repository_of(name, tag=published) == repository
    assume(tag not in ("", published))
    with pytest.raises(ValueError, match="tag"):
        hub.repository_of(name, tag=tag)


# No revision, and no further part of a path.
part = st.text(st.characters(exclude_characters="@/:"), max_size=12)


@given(part, part, st.text(max_size=12))
def test_an_address_that_names_no_repository_is_refused_before_the_network(one, other, revision):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "_hub", lambda: pytest.fail("asks the network"))
        for address in (
            f"{hub.PREFIX}@{revision}",
            f"{hub.PREFIX}{one}/{other}/@{revision}",
            f"hf{one}/{other}",
        ):
            with pytest.raises(ValueError, match="is not the address"):
                hub.fetch(address)


fields = st.sampled_from(list(Variant.__dataclass_fields__))
anything = st.one_of(st.none(), st.booleans(), st.integers(-2, 9), st.floats(), st.text(max_size=5),
                     st.lists(st.integers(-2, 9), max_size=4))  # fmt: skip


@given(variants, st.dictionaries(st.one_of(fields, st.text(max_size=5)), anything, max_size=3))
@example("nfnet_f0", {"depths": []})
@example("nfnet_f0", {"drop_rate": float("nan")})
@example("nfnet_f0", {"widths": [True, 1, 1, 1]})
def test_any_overrides_are_a_variant_or_a_value_error(name, overrides):
    with contextlib.suppress(ValueError):
        changed = VARIANTS[name].with_overrides(overrides)
        assert changed.with_overrides(overrides) == changed
        assert all(0 <= rate < 1 for rate in changed.stochdepth_rates())
        assert changed.stochdepth_rates() == sorted(changed.stochdepth_rates())


@given(st.floats(0, 1e6), st.sampled_from([1, 2, 8, 64]))
def test_a_rounded_width_is_a_multiple_and_at_least_nine_tenths(value, divisor):
    near = rounded(value, divisor)
    assert near % divisor == 0
    assert near >= divisor
    assert near >= 0.9 * value
    assert near - value <= divisor


FAMILIES = ("nfnet_f0", "nf_resnet50", "nf_regnet_b0")


@functools.cache
def parameters_of(name):
    """Return the parameters of a small network of the family of `name`, by our names."""
    small = {"depths": (2, 1), "widths": (32, 64), "strides": VARIANTS[name].strides[:2], "group_width": 8}
    return create_model(name, num_classes=3, **small).state_dict()


# A family, a seed of its numbers, and the order of its names.
cases = st.tuples(st.sampled_from(FAMILIES), st.integers(0, 99), st.randoms(use_true_random=False))


def state_of(case):
    family, seed, random = case
    state, generator = parameters_of(family), torch.Generator().manual_seed(seed)
    names = random.sample(sorted(state), len(state))
    return {name: torch.randn(state[name].shape, generator=generator) for name in names}


def same(one, other):
    return one.keys() == other.keys() and all(
        one[n].shape == other[n].shape and one[n].equal(other[n]) for n in one
    )


@given(cases)
def test_names_of_the_released_code_and_back_are_the_same_state(case):
    state = state_of(case)
    tree = haiku_from_state_dict(state)
    assert naming_of(tree) == "haiku"
    assert same(state_dict_from_haiku(tree), state)
    assert same(to_our_names(tree), state)


@given(cases, st.sampled_from(["end", "middle"]))
def test_names_of_timm_and_back_are_the_same_state(case, attention_at):
    state = state_of(case)
    theirs = timm_from_state_dict(state, attention_at=attention_at)
    assert len(theirs) == len(state)
    assert naming_of(theirs) == "timm"
    assert same(state_dict_from_timm(theirs), state)
    assert same(to_our_names(theirs), state)


@given(cases)
def test_our_names_stay_as_they_are(case):
    state = state_of(case)
    assert naming_of(state) == "ours"
    assert same(to_our_names(to_our_names(state)), state)


keys = st.one_of(
    st.text(max_size=12),
    st.from_regex(
        r"(stem|stages\.\d{1,2}\.\d{1,2}|head)\.?(conv\d?|attn|attn_last\.fc1|fc|skipinit_gain)?\.?(weight|gain)?"
    ),
)


@given(st.dictionaries(keys, st.just(torch.zeros(1)), max_size=4))
@example({"stem.conv.weight": torch.zeros(1), "stem.conv1.weight": torch.zeros(1)})
@example({"stages.٣.0.conv3.weight": torch.zeros(1)})
def test_any_names_are_translated_or_a_value_error(state):
    for translate in (state_dict_from_timm, timm_from_state_dict, haiku_from_state_dict, to_our_names):
        with contextlib.suppress(ValueError):
            translate(state)


modules = st.one_of(keys, st.sampled_from(["NFNet", "NFNet/~/nf_block/~/conv0", "NF_ResNet/~/linear"]))
arrays = st.dictionaries(st.sampled_from(["w", "b", "x"]), st.just([1.0]), max_size=2)


@given(st.dictionaries(modules, arrays, max_size=3))
def test_any_tree_is_translated_or_a_value_error(tree):
    with contextlib.suppress(ValueError):
        state_dict_from_haiku(tree)


sizes = st.one_of(st.integers(33, 600), st.tuples(st.integers(33, 600), st.integers(33, 600)))


@given(sizes, st.sampled_from(["squash", "center", "letterbox"]), st.floats(0.5, 1.0), st.integers(1, 4))
def test_a_preprocessing_is_what_its_config_gives(size, crop, pct, channels):
    if isinstance(size, tuple) and size[0] == size[1]:
        size = size[0]
    pct = 1.0 if crop == "letterbox" else pct
    before = Preprocessing(size, crop=crop, crop_pct=pct, mean=(0.5,) * channels, std=(0.25,) * channels)
    assert Preprocessing.from_config(before.to_config()) == before


config_keys = st.sampled_from(
    ["input_size", "test_input_size", "crop_mode", "crop_pct", "interpolation", "mean", "std"]
)
json_values = st.one_of(
    anything, st.dictionaries(st.text(max_size=2), st.none(), max_size=1), st.lists(st.none(), max_size=3)
)


@given(st.dictionaries(config_keys, json_values))
@example({"input_size": [3, float("inf"), 2], "crop_pct": 1, "interpolation": "x", "mean": [], "std": []})
@example({"input_size": {"a": 1, "b": 2}, "crop_pct": 1, "interpolation": "x", "mean": [], "std": []})
@example({"crop_mode": []})
def test_any_config_of_preprocessing_is_read_or_a_value_error(config):
    with contextlib.suppress(ValueError):
        assert isinstance(Preprocessing.from_config(config), Preprocessing)
