"""The HTML page: text is escaped, figures are SVG in the colors of the page, and no other file is loaded."""

import re

import pytest

from normfree.diagnose.html_page import PageSection, figures, folded, image_cards, page, table
from normfree.diagnose.plotting import BLUE
from normfree.diagnose.run_figures import class_figure, confusion_figure, curve_figures, most_confused

HOSTILE = "<script>alert(1)</script><!--FACTS-->$x_1$"


def test_text_is_escaped() -> None:
    body = (
        table([HOSTILE], [[HOSTILE]])
        + image_cards([(b"png", HOSTILE, [HOSTILE, HOSTILE])])
        + folded(HOSTILE, HOSTILE)
    )
    figure = class_figure({HOSTILE: {HOSTILE: 50.0}}, title=HOSTILE)
    body += figures([(figure, HOSTILE)])
    text = page(HOSTILE, "zebra", [PageSection(HOSTILE, body, HOSTILE)])
    assert "<script" not in text
    # A template marker inside a text is not replaced.
    assert text.count("zebra") == 1
    assert text.count("alert(1)") > 8


def test_figures_use_the_colors_of_the_page_and_load_nothing() -> None:
    rows = [{"epoch": e, "loss": 1.0 / e, "top1": e, "ema_top1": e, "val_loss": 1.0} for e in (1.0, 2.0)]
    drawn = dict((label, figure) for figure, label in curve_figures({"run": rows}))
    # Only figures for which the run has values.
    assert list(drawn) == ["loss, nats over epochs", "validation top-1, % over epochs"]
    html = figures([(figure, label) for label, figure in drawn.items()])
    assert html.count("<svg") == 2
    assert "var(--blue)" in html
    assert BLUE.lower() not in html.lower()
    loaded = re.findall(r'(?:href|src)="(?!#|data:)([^"]+)"', html)
    assert loaded == []
    # The SVG contains no random ids and no date.
    assert html == figures([(figure, label) for label, figure in drawn.items()])


def test_the_confusion_matrix_shows_percent_and_the_most_frequent_errors() -> None:
    confusion = [[3, 1, 0], [0, 0, 0], [2, 2, 4]]
    assert most_confused(confusion, "abc") == [("c", "a", 2, 25.0), ("c", "b", 2, 25.0), ("a", "b", 1, 25.0)]
    figure = confusion_figure(confusion, "abc", title="t")
    assert sorted(t.get_text() for t in figure.axes[0].texts) == ["25", "25", "25", "50", "75"]


def test_four_runs_have_four_colors() -> None:
    rows = [{"epoch": 1.0, "lr": 0.1}]
    (figure, _), *rest = curve_figures({name: rows for name in "abcd"})
    assert not rest
    colors = {line.get_color() for line in figure.axes[0].lines}
    assert len(colors) == 4


@pytest.mark.parametrize("size", [1, 31])
def test_one_class_and_more_classes_than_can_be_labeled(size: int) -> None:
    names = [f"class {i}" for i in range(size)]
    confusion = [[int(i == j) for j in range(size)] for i in range(size)]
    assert "<svg" in figures([(confusion_figure(confusion, names, title="t"), "confusion")])
