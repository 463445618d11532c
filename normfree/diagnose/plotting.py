"""What all figures share: the palette, and the creation of a matplotlib figure."""

from __future__ import annotations

from typing import Any

from normfree.suggest import needs

# Okabe and Ito's palette, which color-blind readers can distinguish ("Color Universal Design", 2008).
BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#666666"


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure of `width` x `height` inches that needs no display.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    with needs("a figure", install="normfree[demo]"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
