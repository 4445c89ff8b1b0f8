"""The one look of all pictures: palette, fonts, light axes; and saving in one move.

Pictures use `matplotlib.figure.Figure` and never `pyplot`, so they need no display and share no
global state. Draw inside a function decorated with `styled`; save with `save`::

    @style.styled
    def loss_curves(...) -> Figure:
        figure = style.new_figure(7, 4)
        axes = figure.subplots()
        axes.plot(steps, loss, color=style.PALETTE["forward"])
        return figure
"""

from pathlib import Path

import matplotlib
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from forwax.lab.report import replacing

INK = "#22283a"
MUTED = "#6b7385"
FAINT = "#e4e7ee"

PALETTE: dict[str, str] = {
    "backprop": "#2b3a67",
    "forward": "#e4572e",
    "forward-16": "#f0a202",
    "low-rank": "#97001b",
    "projection": "#1b998b",
    "activity": "#d98dea",
    "finite-difference": "#a36b4b",
    "exact": "#4b8b20",
    "feedback": "#91b58f",
    "direct-feedback": "#a2ab6f",
    "learned-feedback": "#b5179e",
    "value": "#3a78b5",
    "tangent": "#e4572e",
    "cotangent": "#1b998b",
    "memory": "#f0a202",
    "ink": INK,
    "muted": MUTED,
    "faint": FAINT,
}
"""The colour of each rule (backprop, forward, ...) and of each part of a diagram, by name.

Those of the rules differ to colour-blind eyes too.
"""

# a context manager that decorates is made anew for each call
styled = matplotlib.rc_context(fname=Path(__file__).with_name("forwax.mplstyle"))
"""Decorates a function: forwax.mplstyle is in force while it runs; the caller's own comes back."""

_CYCLE: list[str] = styled(
    lambda: matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
)()


@styled
def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of that size in inches, with constrained layout, without a window.

    >>> new_figure(6, 4).get_size_inches().tolist()
    [6.0, 4.0]
    """
    return Figure(figsize=(width, height), layout="constrained")


def colour(name: str, index: int = 0) -> str:
    """Return the colour of a rule; a name outside `PALETTE` gets the index-th of a fixed cycle.

    >>> colour("backprop") == PALETTE["backprop"], colour("mine", 1) == PALETTE["projection"]
    (True, True)
    """
    return PALETTE.get(name, _CYCLE[index % len(_CYCLE)])


def headline(figure: Figure, text: str) -> None:
    """Write a bold line above the figure, at its left."""
    figure.suptitle(text, x=0.01, ha="left", fontweight="bold", fontsize=11)


def plain_numbers(axis: Axis, minor_digits: str = "") -> None:
    """Write the numbers of a logarithmic axis as 10 and 0.5, not as powers of ten.

    Args:
        axis: the x or y axis.
        minor_digits: write minor ticks too, where their first digit is one of these.
    """
    axis.set_major_formatter("{x:g}")
    if minor_digits:
        axis.set_minor_formatter(
            lambda x, _: f"{x:g}" if f"{x:e}"[0] in minor_digits else ""
        )


@styled
def save(figure: Figure, path: str | Path, dpi: float = 160) -> Path:
    """Save the figure in one move, in the format that the path's suffix names; return the path.

    Raises:
        ValueError: When matplotlib cannot write that format.

    Example: `save(figure, "runs/curves.png")`.
    """
    path = Path(path)
    if not path.suffix:
        raise ValueError(
            f"A picture's path needs a suffix such as .png, .svg or .pdf, but got {str(path)!r}."
        )
    with replacing(path) as draft:
        figure.savefig(draft, format=path.suffix[1:].lower(), dpi=dpi)
    return path
