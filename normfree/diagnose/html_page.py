"""A self-contained HTML page with figures, tables and images. It loads no other files and contains no scripts."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from normfree.diagnose.plotting import BLUE, GRAY, GREEN, ORANGE

if TYPE_CHECKING:
    from PIL.Image import Image

# Colors of a figure -> CSS variables of the page, which have other values in dark mode. Black, white and #b0b0b0 are
# matplotlib's colors for text, background and grid.
_THEME = {
    BLUE: "--blue", ORANGE: "--orange", GREEN: "--green", GRAY: "--soft",
    "#000000": "--ink", "#ffffff": "--card", "#b0b0b0": "--line",
}  # fmt: skip


@dataclass(frozen=True)
class PageSection:
    """A section of a page.

    Attributes:
        title: the heading, plain text.
        body: the content, HTML.
        note: a short explanation below the heading, plain text.
    """

    title: str
    body: str
    note: str = ""


def page(title: str, facts: str, sections: Iterable[PageSection]) -> str:
    """Return the HTML of the whole page. `title` and `facts` (one line below the title) are plain text."""
    parts = []
    for number, section in enumerate(sections):
        note = f"<p class=note>{html.escape(section.note)}</p>" if section.note else ""
        parts.append(
            f'<section id="s{number}"><h2>{html.escape(section.title)}</h2>{note}{section.body}</section>'
        )
    template = files("normfree.diagnose").joinpath("html_page.html").read_text(encoding="utf-8")
    texts = {
        "TITLE": html.escape(title), "FACTS": html.escape(facts), "SECTIONS": "\n".join(parts)
    }  # fmt: skip
    return re.sub("<!--([A-Z]+)-->", lambda mark: texts[mark[1]], template)


def figures(drawn: Iterable[tuple[Any, str]]) -> str:
    """Return the HTML of (matplotlib figure, description) pairs, next to each other if the window is wide enough.

    Figures are SVG and use the colors of the page, in light and dark mode.
    """
    blocks = [
        f'<figure role="img" aria-label="{html.escape(label)}">{_svg(figure, label)}</figure>'
        for figure, label in drawn
    ]
    return f'<div class="figures">{"".join(blocks)}</div>'


def _svg(figure: Any, label: str) -> str:
    """Return a figure as an SVG element that scales with the page and uses its colors."""
    import matplotlib

    text = io.StringIO()
    # Text stays text instead of outlines. The hash salt makes ids deterministic, and different for each figure.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    drawing = text.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(
        r'(<svg[^>]*?) width="[^"]*"',
        r"\1",
        re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", drawing, count=1),
        count=1,
    )
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    for color, variable in _THEME.items():
        drawing = re.sub(f"{color}\\b", f"var({variable})", drawing, flags=re.IGNORECASE)
    return drawing


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: int = 1) -> str:
    """Return the HTML of a table of plain text. Columns from index `numbers` on are numbers, aligned to the right."""

    def cell(tag: str, column: int, value: object) -> str:
        kind = ' class="n"' if column >= numbers else ""
        return f"<{tag}{kind}>{html.escape(str(value))}</{tag}>"

    lines = ["".join(cell("th", i, v) for i, v in enumerate(head))]
    lines += ["".join(cell("td", i, v) for i, v in enumerate(row)) for row in rows]
    return f'<div class="wide"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def image_cards(shown: Iterable[tuple[bytes, str, Sequence[str]]]) -> str:
    """Return the HTML of a grid of images.

    Args:
        shown: (PNG or JPEG, alternative text, lines of plain text below the image, the first of them bold) of each
            image.
    """
    cards = []
    for data, alt, lines in shown:
        kind = "jpeg" if data.startswith(b"\xff\xd8") else "png"
        source = f"data:image/{kind};base64," + base64.b64encode(data).decode("ascii")
        first, *others = (html.escape(line) for line in lines)
        text = "".join(f"<span>{line}</span>" for line in others)
        cards.append(f'<li><img src="{source}" alt="{html.escape(alt)}"><strong>{first}</strong>{text}</li>')
    return f'<ul class="images">{"".join(cards)}</ul>'


def jpeg(image: Image) -> bytes:
    """Return an image as JPEG, for `image_cards`."""
    out = io.BytesIO()
    image.save(out, format="JPEG", quality=90)
    return out.getvalue()


def folded(summary: str, text: str) -> str:
    """Return the HTML of a long text that is hidden until `summary` is clicked."""
    return f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>"
