"""Laws of configs: flags, TOML files, and the order in which they are applied."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from normfree.training.config import Config, ConfigError
from normfree.training.config_io import keys, load_config, to_toml, with_overrides

lengths = st.one_of(
    st.integers(0, 10**6).map(lambda n: f"{n}st"),
    st.integers(0, 10**5).map(lambda n: f"{n / 100}ep"),
)
rates = st.floats(0.0, 0.99).map(str)
sizes = st.one_of(
    st.integers(1, 999).map(str),
    st.tuples(st.integers(1, 999), st.integers(1, 999)).map(lambda s: f"{s[0]}x{s[1]}"),
)
# Any text that a config may hold: a command line has no zero byte, and TOML no half of a surrogate pair.
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
VALUES = {
    "data": texts,
    "model": texts,
    "weights": texts,
    "length": lengths,
    "seed": st.integers(0, 2**63 - 1).map(str),
    "patience": st.integers(0, 10**6).map(str),
    "compile": st.sampled_from(["true", "false"]),
    "precision": st.sampled_from(["auto", "float32", "bfloat16"]),
    "objective": st.sampled_from(["classify", "bce:sum=yes", "simclr:temperature=0.5,dim=8"]),
    "on_divergence": st.sampled_from(["stop", "rollback:lr=0.5", "rollback:times=2"]),
    "net.drop_rate": st.one_of(st.just("auto"), rates),
    "net.alpha": st.floats(-10, 10).map(str),
    "input.image_size": st.one_of(
        st.just("auto"), sizes, sizes.filter(lambda s: "x" in s).map("1x{}".format)
    ),
    "input.eval_size": sizes,
    "input.batch_size": st.integers(1, 10**6).map(str),
    "input.micro_batch": st.one_of(st.just("auto"), st.integers(0, 10**6).map(str)),
    "input.workers": st.sampled_from(["auto", "0", "256", "auto:deadline=1.5", "3:deadline=60"]),
    "input.val_fraction": st.one_of(rates, st.just("fold:2/5")),
    "augment.crop_min": st.floats(1e-3, 1.0).map(str),
    "augment.mixup": st.floats(0, 1e6).map(str),
    "augment.mix_with": st.sampled_from(["batch", "fresh"]),
    "optim.lr": st.one_of(st.just("auto"), st.floats(1e-9, 1e3).map(str)),
    "optim.weight_decay": st.floats(0, 1).map(str),
    "optim.optimizer": st.sampled_from(["sgd", "sgd:momentum=0.5", "adamw", "muon:ns_steps=3"]),
    "optim.clip": st.sampled_from(["agc", "norm", "off", "agc:eps=0.01,unclipped=head.*,stem.conv0.*"]),
    "optim.warmup": lengths,
    "log.every": st.integers(1, 10**9).map(str),
    "log.to": st.sampled_from(["", "wandb", "tensorboard,profile=20"]),
}
assignments = st.dictionaries(st.sampled_from(sorted(VALUES)), st.none(), max_size=6).flatmap(
    lambda chosen: st.fixed_dictionaries({key: VALUES[key] for key in chosen})
)


def flags_of(values):
    return [f"--{key}={value}" for key, value in values.items()]


@given(assignments)
def test_a_config_is_what_its_toml_file_gives(values):
    config = with_overrides(Config(), flags_of(values))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.toml")
        path.write_text(to_toml(config), encoding="utf-8", newline="\n")
        assert load_config(path) == config


@given(assignments)
def test_flags_with_an_equals_sign_and_with_a_space_are_the_same(values):
    assume(not any(value.startswith("--") and len(value) > 2 for value in values.values()))
    spaced = [part for key, value in values.items() for part in (f"--{key}", value)]
    assert with_overrides(Config(), spaced) == with_overrides(Config(), flags_of(values))


@given(assignments)
def test_the_same_flags_again_change_nothing(values):
    once = with_overrides(Config(), flags_of(values))
    assert with_overrides(once, flags_of(values)) == once


@given(assignments, st.randoms())
def test_the_order_of_flags_for_different_keys_does_not_matter(values, random):
    flags = flags_of(values)
    shuffled = random.sample(flags, len(flags))
    assert with_overrides(Config(), shuffled) == with_overrides(Config(), flags)


@given(st.sampled_from(sorted(VALUES)), st.data())
def test_the_last_of_several_flags_for_one_key_counts(key, data):
    first, last = data.draw(VALUES[key]), data.draw(VALUES[key])
    both = with_overrides(Config(), [f"--{key}={first}", f"--{key}={last}"])
    assert both == with_overrides(Config(), [f"--{key}={last}"])


@given(st.lists(st.one_of(st.text(max_size=30), st.sampled_from([f"--{key}" for key in keys()])), max_size=6))
@example(["--"])
@example(["--optim", "3"])
@example(["--=", "--optim.lr", "nan", "--input.batch_size", "1e400"])
@example(["--seed", "9" * 5000])
@example(["--net.alpha", "\udcff"])
def test_any_flags_are_a_config_or_a_config_error(flags):
    try:
        assert isinstance(with_overrides(Config(), flags), Config)
    except ConfigError as error:
        assert error.problems
        assert all(error.problems)


@given(st.sampled_from(keys()), st.one_of(texts, st.integers().map(str), st.floats().map(str)))
def test_any_value_of_a_known_key_is_accepted_or_named_in_the_error(key, value):
    try:
        config = with_overrides(Config(), [f"--{key}={value}"])
    except ConfigError as error:
        assert all(key in line for line in error.problems)
    else:
        assert with_overrides(config, [f"--{key}={value}"]) == config


toml_values = st.recursive(
    st.one_of(st.booleans(), st.integers(-(2**70), 2**70), st.floats(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=5,
)


@given(
    st.dictionaries(
        st.one_of(st.sampled_from([*keys(), "optim", "input", "log"]), texts), toml_values, max_size=4
    )
)
@example({"optim": {"momentum": 0.5, "optimizer": []}})
@example({"log": {"profile": {"a": 1}, "to": 3}})
@example({"log": {"profile": "x"}})
def test_any_tree_in_a_file_is_a_config_or_a_config_error(tree):
    import tomli_w

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.toml")
        path.write_text(tomli_w.dumps(tree), encoding="utf-8")
        try:
            config = load_config(path)
        except ConfigError as error:
            assert all(str(path) in line for line in error.problems)
        else:
            assert load_config(path) == config


@given(st.binary(max_size=200))
@example(b"\xff")
@example(b"a" + b".a" * 250 + b" = 1")
@example(b"a = " + b"[" * 5000)
def test_any_bytes_as_a_file_are_a_config_or_a_config_error(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.toml")
        path.write_bytes(data)
        try:
            load_config(path)
        except ConfigError as error:
            assert "\n" not in str(error)


@given(
    st.lists(
        st.text("abcdefghijklmnopqrstuvwxyz_.", min_size=1, max_size=12), min_size=1, max_size=5, unique=True
    )
)
def test_every_unknown_key_is_named_and_only_known_keys_are_suggested(unknown):
    sections = {key.partition(".")[0] for key in keys()}
    unknown = [key for key in unknown if key not in keys() and key not in sections]
    assume(unknown)
    with pytest.raises(ConfigError) as caught:
        with_overrides(Config(), [f"--{key}=1" for key in unknown])
    assert len(caught.value.problems) == len(unknown)
    for key, line in zip(unknown, caught.value.problems, strict=True):
        assert repr(key) in line
        if "Did you mean" in line:
            assert line.partition("Did you mean '")[2].rstrip("'?") in {*keys(), *sections}
