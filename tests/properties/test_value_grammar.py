"""Laws of the grammars within config values: lengths, sizes, workers, folds, and names with options."""

import contextlib
import re

from hypothesis import assume, example, given
from hypothesis import strategies as st

from normfree.training import choices
from normfree.training.choices import Choice, parse_choice
from normfree.training.config import channels_of, loggers_in, profile_steps, size_of, steps_of
from normfree.training.config_values import check_val_fraction, check_workers, fold_in, workers_in
from normfree.training.synonyms import what_to_use

ALL = {
    name: getattr(choices, name)
    for name in ("OBJECTIVES", "OPTIMIZERS", "CLIPS", "SCHEDULES", "BODIES", "DIVERGENCES")
}
counts = st.integers(1, 10**7)


@st.composite
def written_choices(draw):
    """Return a table of choices, a name, the values of some of its options, and these options as text."""
    table = ALL[draw(st.sampled_from(sorted(ALL)))]
    name = draw(st.sampled_from(sorted(table)))
    given_options = draw(st.lists(st.sampled_from(sorted(table[name])), unique=True)) if table[name] else []
    values, parts = {}, []
    numbers = st.floats(0, 1e30)
    for option in given_options:
        match table[name][option]:
            case bool():
                values[option] = draw(st.booleans())
                text = "yes" if values[option] else "no"
            case int():
                values[option] = draw(st.integers(-(10**9), 10**9))
                text = str(values[option])
            case tuple() as default:
                values[option] = tuple(draw(numbers) for _ in default)
                text = "/".join(map(repr, values[option]))
            case float():
                values[option] = draw(numbers)
                text = repr(values[option])
            case _:  # a text; it may have commas that no option follows
                values[option] = text = draw(
                    st.from_regex(r"[a-z0-9.*]{0,6}(,[a-z0-9.*]{0,6})?", fullmatch=True)
                )
        parts.append(f"{option}={text}")
    return table, name, values, parts


@given(written_choices())
def test_a_choice_has_the_options_that_are_written(case):
    table, name, values, parts = case
    text = name + ":" * bool(parts) + ",".join(parts)
    assert parse_choice(text, table) == Choice(name, {**table[name], **values})


@given(written_choices(), st.randoms())
def test_the_order_of_options_does_not_matter(case, random):
    table, name, _, parts = case
    assume(len(parts) > 1)
    one, other = (f"{name}:{','.join(order)}" for order in (parts, random.sample(parts, len(parts))))
    assert parse_choice(one, table) == parse_choice(other, table)


@given(st.sampled_from(sorted(ALL)), st.text(max_size=20))
@example("CLIPS", "agc:")
@example("OPTIMIZERS", "adamw:betas=0.9/")
@example("DIVERGENCES", "rollback:times=" + "9" * 5000)
def test_any_text_is_a_choice_with_all_options_or_a_value_error(table, text):
    names = sorted(ALL[table])
    for written in (text, f"{names[0]}:{text}", f"{names[-1]}:{text}=1"):
        with contextlib.suppress(ValueError):
            found = parse_choice(written, ALL[table])
            assert found.options.keys() == ALL[table][found.name].keys()


@given(st.sampled_from(sorted(ALL)), st.text(max_size=8))
def test_what_an_error_allows_is_the_default(table, text):
    names = ALL[table]
    assume(text not in names and ":" not in text)
    try:
        parse_choice(text, names)
    except ValueError as error:
        offered = str(error).partition(". Did you mean")[0].rstrip(".").split("; ")
        assert [parse_choice(form, names) for form in offered] == [
            Choice(n, dict(o)) for n, o in names.items()
        ]
    else:
        raise AssertionError(text)


@given(st.integers(0, 10**9), counts, counts)
def test_steps_are_that_number_of_steps(steps, samples, batch_size):
    assert steps_of(f"{steps}st", samples=samples, batch_size=batch_size) == steps


@given(st.integers(0, 10**4), st.integers(0, 10**4), counts, counts)
def test_more_epochs_are_never_fewer_steps(epochs, more, samples, batch_size):
    few, many = (steps_of(f"{n}ep", samples=samples, batch_size=batch_size) for n in (epochs, epochs + more))
    assert few <= many


@given(st.integers(0, 10**4), counts, counts)
def test_epochs_are_steps_within_half_a_step(epochs, samples, batch_size):
    steps = steps_of(f"{epochs}ep", samples=samples, batch_size=batch_size)
    assert abs(steps * batch_size - epochs * samples) * 2 <= batch_size


@given(st.integers(1, 999_999), st.integers(1, 999_999), st.sampled_from(["", "1x", "3x"]))
def test_a_size_has_the_height_width_and_channels_that_are_written(height, width, channels):
    text = f"{channels}{height}x{width}"
    assert size_of(text) == (height if height == width else (height, width))
    assert channels_of(text) == (1 if channels == "1x" else 3)


@given(
    st.one_of(
        st.integers(-(10**9), 10**9), st.text(max_size=20), st.from_regex(r"(auto|\d+)(:deadline=[\d.]+)?")
    )
)
@example("٣")
@example("²")
@example("1:deadline=0.0")
def test_workers_are_a_count_and_a_deadline_or_a_value_error(value):
    with contextlib.suppress(ValueError):
        checked = check_workers(value)
        assert check_workers(checked) == checked
        count, deadline = workers_in(checked)
        assert count is None or 0 <= count <= 256
        assert deadline is None or deadline > 0


@given(st.one_of(st.floats(), st.text(max_size=12), st.from_regex(r"fold:\d{1,4}/\d{1,4}")))
@example("1e-400")
@example("fold:٢/٥")
def test_a_validation_fraction_is_a_share_or_a_fold_or_a_value_error(value):
    with contextlib.suppress(ValueError):
        checked = check_val_fraction(value)
        assert check_val_fraction(checked) == checked
        fold = fold_in(checked)
        assert 0 <= checked < 1 if fold is None else 1 <= fold[0] <= fold[1]


@given(st.lists(st.sampled_from(["tensorboard", "wandb", "profile=7", " wandb ", ""]), max_size=5))
def test_loggers_are_named_once_and_the_last_profile_counts(names):
    found = loggers_in(",".join(names))
    assert set(found) == {name.strip() for name in names} & {"tensorboard", "wandb"}
    assert loggers_in(",".join(found)) == found
    assert profile_steps(",".join(names)) == (7 if "profile=7" in names else 0)


@given(st.text(max_size=20), st.text(max_size=10))
@example("epochs", "3")
@example("lr0", "1e-3")
def test_what_other_programs_call_a_key_leads_to_a_flag_with_its_value(key, value):
    use = what_to_use(key, value)
    assert use == "" or use.startswith(("--", "normfree"))
    if re.fullmatch(r"\d+", value) and re.search(r" [\d.]+(ep|st|)$", what_to_use(key)):
        assert re.search(rf" {value}(ep|st|)$", use)
