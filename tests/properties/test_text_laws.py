"""Laws of text: data specifications, braces, suggestions, escapes, and the cells of tables."""

import contextlib
import re
import tempfile
from pathlib import Path

from hypothesis import assume, example, given
from hypothesis import strategies as st

from normfree.data.record import SampleRecord, read_records, write_records
from normfree.data.sources.listed import ListedImage, read_lines
from normfree.data.sources.storage import StoredFile, braces
from normfree.data.sources.synthetic import DEFAULTS, options_of
from normfree.data.spec import is_yes, parse_spec
from normfree.files import csv_text, read_csv, spreadsheet_cell, write_text
from normfree.suggest import closest, did_you_mean, one_line, printable, some_names, unknown

names = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=8)
# Text without a comma that an option follows.
values = st.from_regex(r"[^,=]{1,8}(,[^,=\w][^,=]{0,5})?", fullmatch=True)
wild = st.text(st.characters(), max_size=20)  # also control characters and halves of surrogate pairs


@given(names, values, st.dictionaries(names, values, max_size=3))
def test_a_specification_has_the_target_and_options_that_are_written(scheme, target, options):
    text = f"{scheme}:{target}" + "".join(f",{name}={value}" for name, value in options.items())
    assert parse_spec(text, allowed=list(options)) == (target, options)


@given(names, st.dictionaries(names, values, max_size=3), st.randoms())
def test_the_order_of_options_of_named_data_does_not_matter(scheme, options, random):
    parts = [f"{name}={value}" for name, value in options.items()]
    text = ":".join(filter(None, (scheme, ",".join(random.sample(parts, len(parts))))))
    assert parse_spec(text, allowed=list(options), named=True) == ("", options)


@given(wild, st.lists(names, max_size=3), st.booleans())
@example("a:,b=", ["b"], True)
@example("\udcff:\0,a=\ud800", ["a"], False)
def test_any_specification_is_parsed_or_a_value_error(text, allowed, named):
    with contextlib.suppress(ValueError):
        target, options = parse_spec(text, allowed=allowed, named=named)
        assert options.keys() <= set(allowed)
        assert all(options.values())
        for option in options:
            with contextlib.suppress(ValueError):
                assert is_yes(options, option) == (options[option] == "yes")
        assert named or target


@given(st.dictionaries(st.sampled_from(sorted(DEFAULTS)), st.integers(8, 9)), st.booleans())
def test_synthetic_data_have_the_numbers_that_are_written(numbers, colon):
    text = "synthetic" + ":" * (colon or bool(numbers)) + ",".join(f"{k}={v}" for k, v in numbers.items())
    assert options_of(text) == {**DEFAULTS, **numbers}


@given(st.integers(0, 2000), st.integers(0, 50), st.integers(0, 6))
def test_a_range_in_braces_is_every_number_once_in_order(low, more, width):
    found = braces(f"a-{{{low:0{width}}..{low + more:0{width}}}}.tar", "")
    assert [int(name[2:-4]) for name in found] == list(range(low, low + more + 1))
    if len(str(low)) <= width:
        assert len({len(name) for name in found}) == 1 + (len(str(low + more)) > width) * (low + more > low)


@given(
    st.lists(st.lists(st.text("abc", max_size=2), min_size=2, max_size=3), max_size=4),
    st.text("xyz", max_size=2),
)
def test_braces_are_the_product_of_their_parts(groups, between):
    found = braces(between.join(f"{{{','.join(group)}}}" for group in groups), "")
    expected = [""]
    for index, group in enumerate(groups):
        expected = [head + between * (index > 0) + part for head in expected for part in group]
    assert found == expected


@given(st.text("{},.0129ab*", max_size=30))
@example("{1..1}" * 5000)
@example("{a,b}" * 5000)
@example("{0.." + "9" * 5000 + "}")
def test_any_braces_expand_to_names_without_braces_or_are_a_value_error(text):
    with contextlib.suppress(ValueError):
        assert not any(set("{}") & set(name) for name in braces(text, text))


@given(st.text("abc/@?:.", max_size=12), names, names)
def test_an_address_is_shown_without_password_and_query(path, user, secret):
    assume(secret not in f"https://host/{path}")
    shown = StoredFile(f"https://{user}:{secret}@host/{path.replace('@', '')}?{secret}").shown
    assert secret not in shown
    assert shown.startswith("https://host/")


@given(wild)
def test_what_is_printed_controls_no_terminal(text):
    shown = printable(text)
    assert all(c.isprintable() or c in "\n\t\u200c\u200d" for c in shown)
    assert "\x1b" not in shown
    shown.encode("utf-8")
    assert printable(shown) == shown
    assert shown == text or not text.isprintable()


@given(wild)
def test_one_line_is_one_line(text):
    for shown in (one_line(text), printable(text, one_line=True)):
        assert len(f"a{shown}a".splitlines()) == 1
        assert "\t" not in shown
        shown.encode("utf-8")
    assert one_line(one_line(text)) == one_line(text)


@given(wild, st.lists(wild, max_size=5))
def test_only_known_names_are_suggested(name, known):
    assume(name not in known)
    match = closest(name, known)
    assert match is None or match in known
    assert did_you_mean(name, known) == (f" Did you mean {match!r}?" if match else "")
    assert all(repr(one) in unknown("thing", name, known) for one in known)


@given(st.lists(names, min_size=1, max_size=5), st.integers(0, 7), st.sampled_from("xyz"))
def test_a_name_with_one_letter_changed_is_found_again(known, at, letter):
    name = max(known, key=len)
    assume(len(name) > 3)
    changed = name[: at % len(name)] + letter + name[at % len(name) + 1 :]
    assert closest(changed, known) is not None


@given(st.lists(wild, max_size=9), st.integers(1, 9))
def test_some_names_account_for_all_names(listed, limit):
    text = some_names(listed, limit=limit)
    more = re.search(r" and (\d+) more$", text)
    assert (int(more[1]) if more else 0) == max(0, len(listed) - limit)
    assert all(repr(name) in text for name in listed[:limit])


@given(wild)
def test_a_cell_is_no_formula_and_keeps_its_text(text):
    cell = spreadsheet_cell(text)
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    assert cell.removeprefix("'") == text.removeprefix("'")
    assert spreadsheet_cell(cell) == cell


utf8 = st.text(st.characters(codec="utf-8"), max_size=12)


@given(
    st.lists(st.lists(st.one_of(utf8, st.text(",;'\"\r\n ", max_size=4)), min_size=1, max_size=4), max_size=4)
)
@example([["\r"], [""]])
def test_a_table_is_read_as_it_was_written(rows):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.csv")
        write_text(path, csv_text(rows))
        assert read_csv(path, limit=10_000) == rows


@given(st.lists(st.builds(SampleRecord, *[utf8] * 4), max_size=4))
@example([SampleRecord("train", 'a "quoted", cat', "new\nline\r\n.png", "")])
@example([SampleRecord("train", "cat", "\r", "")])
def test_samples_are_read_as_they_were_written(records):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "samples.csv")
        write_records(records, path)
        assert read_records(path) == records


# Names without separators of labels and spaces around them.
plain = st.from_regex(r"[A-Za-z0-9_äé](?:[A-Za-z0-9_ äé.-]{0,8}[A-Za-z0-9_])?", fullmatch=True)
paths = plain.map("{}.png".format)


@given(st.lists(st.tuples(paths, plain, st.sampled_from(["train", "val", "test"])), min_size=2, max_size=5),
       st.sampled_from([",", ";", "\t"]), st.permutations(range(3)), st.booleans())  # fmt: skip
def test_a_table_is_read_in_any_order_of_columns_and_any_dialect(rows, delimiter, order, mark):
    lines = [("image", "label", "split"), *rows]
    text = "".join(delimiter.join(line[i] for i in order) + "\n" for line in lines)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.tsv" if delimiter == "\t" else "a.csv")
        path.write_text("\ufeff" * mark + text, encoding="utf-8")
        assert read_lines(path) == [ListedImage(image, (label,), part) for image, label, part in rows]


@given(st.lists(st.tuples(paths, plain.filter(lambda name: " " not in name)), min_size=1, max_size=5),
       st.sampled_from([" ", "\t", ","]))  # fmt: skip
def test_a_list_of_files_is_read_with_any_gap(rows, gap):
    assume(not any(label.lower().endswith(".png") for _, label in rows))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.txt")
        path.write_text("".join(f"{image}{gap}{label}\n" for image, label in rows), encoding="utf-8")
        assert read_lines(path) == [ListedImage(image, (label,)) for image, label in rows]
