"""The few strokes that the figures are made of: a canvas in inches, text, boxes and arrows."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from forwax.lab import style

__all__ = ["HEIGHT", "WIDTH", "arrow", "box", "canvas", "chip", "tint", "write"]

WIDTH, HEIGHT = 10.4, 5.3


def canvas(title: str, subtitle: str) -> tuple[Figure, Axes]:
    """Return a figure of WIDTH × HEIGHT with its headings; its one bare axes measures inches.

    >>> figure, axes = canvas("A title", "and what to see")
    >>> [float(x) for x in axes.get_xlim()]
    [0.0, 10.4]
    """
    figure = style.new_figure(WIDTH, HEIGHT)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.set_axis_off()
    write(axes, 0.4, HEIGHT - 0.36, title, size=15, ha="left", weight="bold")
    write(axes, 0.4, HEIGHT - 0.72, subtitle, style.MUTED, size=11, ha="left")
    return figure, axes


def write(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    colour: str = style.INK,
    size: float = 11,
    **look: Any,
) -> None:
    """Write text with its centre at (x, y)."""
    axes.text(
        x,
        y,
        text,
        color=colour,
        fontsize=size,
        **{"ha": "center", "va": "center", **look},
    )


def box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    edge: Any,
    fill: Any = "white",
    **look: Any,
) -> None:
    """Draw a rounded box with its centre at (x, y)."""
    corner = (x - width / 2, y - height / 2)
    rounding = "round,pad=0,rounding_size=0.09"
    axes.add_patch(
        FancyBboxPatch(
            corner,
            width,
            height,
            boxstyle=rounding,
            edgecolor=edge,
            facecolor=fill,
            **look,
        )
    )


def chip(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    """Write a quantity on a tinted ground of its colour."""
    box(axes, x, y, 1.3, 0.34, "none", tint(colour))
    write(axes, x, y - 0.01, text, colour, size=13)


def arrow(
    axes: Axes,
    tail: tuple[float, float],
    head: tuple[float, float],
    colour: str,
    **look: Any,
) -> None:
    """Draw an arrow from tail to head, points in the units of the axes."""
    look = {
        "linewidth": 1.9,
        "arrowstyle": "-|>",
        "mutation_scale": 13,
        "shrinkA": 0,
        "shrinkB": 0,
        **look,
    }
    axes.add_patch(FancyArrowPatch(tail, head, color=colour, **look))


def tint(colour: str, amount: float = 0.14) -> tuple[float, float, float]:
    """Return the colour "#rrggbb" mixed with white, of which it keeps the given amount.

    >>> tint("#000000", 0.25)
    (0.75, 0.75, 0.75)
    """
    red, green, blue = (
        1 - amount + amount * int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)
    )
    return red, green, blue
