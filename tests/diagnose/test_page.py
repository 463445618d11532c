"""The page: text stays text, figures are vectors in the page's colours, nothing is loaded."""

import re

import pytest

from normfree.diagnose.html_page import PageSection, figures, folded, image_cards, page, table
from normfree.diagnose.plotting import BLUE
from normfree.diagnose.run_figures import class_figure, confusion_figure, curve_figures, most_confused

HOSTILE = "<script>alert(1)</script><!--FACTS-->$x_1$"


def test_words_of_others_stay_text():
    body = (
        table([HOSTILE], [[HOSTILE]])
        + image_cards([(b"png", HOSTILE, [HOSTILE, HOSTILE])])
        + folded(HOSTILE, HOSTILE)
    )
    figure = class_figure({HOSTILE: {HOSTILE: 50.0}}, title=HOSTILE)
    body += figures([(figure, HOSTILE)])
    text = page(HOSTILE, "zebra", [PageSection(HOSTILE, body, HOSTILE)])
    assert "<script" not in text
    assert text.count("zebra") == 1  # a mark inside a text is not filled in
    assert text.count("alert(1)") > 8


def test_figures_take_the_colours_of_the_page_and_load_nothing():
    rows = [{"epoch": e, "loss": 1.0 / e, "top1": e, "ema_top1": e, "val_loss": 1.0} for e in (1.0, 2.0)]
    drawn = dict((label, figure) for figure, label in curve_figures({"run": rows}))
    assert list(drawn) == ["loss, nats over epochs", "validation top-1, % over epochs"]  # only what a run has
    html = figures([(figure, label) for label, figure in drawn.items()])
    assert html.count("<svg") == 2
    assert "var(--blue)" in html
    assert BLUE.lower() not in html.lower()
    loaded = re.findall(r'(?:href|src)="(?!#|data:)([^"]+)"', html)
    assert loaded == []
    assert html == figures([(figure, label) for label, figure in drawn.items()])  # no chance, no date


def test_a_confusion_matrix_counts():
    confusion = [[3, 1, 0], [0, 0, 0], [2, 2, 4]]
    assert most_confused(confusion, "abc") == [("c", "a", 2, 25.0), ("c", "b", 2, 25.0), ("a", "b", 1, 25.0)]
    figure = confusion_figure(confusion, "abc", title="t")
    assert sorted(t.get_text() for t in figure.axes[0].texts) == ["25", "25", "25", "50", "75"]


def test_more_runs_than_colours_are_not_drawn_as_one_another():
    rows = [{"epoch": 1.0, "lr": 0.1}]
    (figure, _), *rest = curve_figures({name: rows for name in "abcd"})
    assert not rest
    colours = {line.get_color() for line in figure.axes[0].lines}
    assert len(colours) == 4


@pytest.mark.parametrize("size", [1, 31])
def test_one_class_and_more_than_can_be_named(size):
    names = [f"class {i}" for i in range(size)]
    confusion = [[int(i == j) for j in range(size)] for i in range(size)]
    assert "<svg" in figures([(confusion_figure(confusion, names, title="t"), "confusion")])
