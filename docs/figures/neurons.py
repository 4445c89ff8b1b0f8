"""The forward and the backward step of one neuron, L = (relu(w x + b) - t)², with its numbers.

The numbers are what `jax.jvp` and `jax.vjp` return for that neuron.
"""

import jax
import jax.numpy as jnp
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures import drawing
from forwax.lab import style

__all__ = ["backward_step", "forward_step"]

X = 2.0
TARGET = 1.0
PARAMETERS = (1.5, -1.0)
DIRECTION = (1.0, -1.0)

# The canvas, in inches: one column per step of the program; the parameters w and b share the first
# column.
COLUMNS = {
    "w": (1.25, 3.55),
    "b": (1.25, 2.05),
    "z": (3.95, 2.8),
    "h": (6.45, 2.8),
    "L": (8.95, 2.8),
}
FORMULAS = {
    "w": "",
    "b": "",
    "z": "$z = wx + b$",
    "h": r"$h = \mathrm{relu}(z)$",
    "L": "$L = (h - t)^2$",
}
FORWARD_RULES = {
    "z": r"$\dot z = x\,\dot w + \dot b$",
    "h": r"$\dot h = \mathrm{relu}'(z)\,\dot z$",
    "L": r"$\dot L = 2(h - t)\,\dot h$",
}
BACKWARD_RULES = {
    "z": r"$\bar w = x\,\bar z,\ \ \bar b = \bar z$",
    "h": r"$\bar z = \mathrm{relu}'(z)\,\bar h$",
    "L": r"$\bar h = 2(h - t)\,\bar L$",
}
KEPT = {"z": "$x$", "h": "$z$", "L": r"$h,\ t$"}
VALUE, TANGENT, COTANGENT, MEMORY = (
    style.PALETTE[name] for name in ("value", "tangent", "cotangent", "memory")
)
MEMORY_INK = "#b87a00"
MEMORY_ROW = 0.5


def _neuron(w: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the values z, h and L of the neuron."""
    z = w * X + b
    h = jax.nn.relu(z)
    return z, h, (h - TARGET) ** 2


def _size(name: str) -> tuple[float, float]:
    """Return the width and height of a node's box."""
    return (1.5, 0.95) if name in "wb" else (1.6, 1.4)


def _link(
    axes: Axes, source: str, target: str, upper: bool, colour: str, back: bool = False
) -> None:
    """Draw the upper or lower arrow between two nodes, and from target to source when `back`."""
    (x0, y0), (x1, y1) = COLUMNS[source], COLUMNS[target]
    left, right = x0 + _size(source)[0] / 2 + 0.06, x1 - _size(target)[0] / 2 - 0.06
    if source in "wb":
        offset, turn = (0.11 if upper else -0.11), (0.36 if source == "w" else -0.36)
        ends = (left, y0 + offset), (right, y1 + turn + offset)
    else:
        level = y0 + (0.03 if upper else -0.38)
        ends = (left, level), (right, level)
    tail, head = ends[::-1] if back else ends
    drawing.arrow(axes, tail, head, colour)


def _nodes(
    axes: Axes,
    values: dict[str, float],
    others: dict[str, float],
    accent: str,
    colour: str,
) -> None:
    """Draw every box with its formula, its value and its tangent or cotangent."""
    for name, (x, y) in COLUMNS.items():
        width, height = _size(name)
        drawing.box(axes, x, y, width, height, style.MUTED, linewidth=1.1)
        if FORMULAS[name]:
            drawing.write(axes, x, y + 0.45, FORMULAS[name], size=13)
        top = y + (0.2 if name in "wb" else 0.03)
        drawing.chip(axes, x, top, f"${name} = {values[name]:g}$", VALUE)
        drawing.chip(
            axes, x, top - 0.41, rf"${accent}{{{name}}} = {others[name]:g}$", colour
        )
    _data(axes, "z", f"data  $x = {X:g}$")
    _data(axes, "L", f"target  $t = {TARGET:g}$")


def _data(axes: Axes, name: str, text: str) -> None:
    """Draw what comes from the data, above the node that it enters."""
    x, y = COLUMNS[name]
    drawing.arrow(axes, (x, y + 1.1), (x, y + 0.75), VALUE)
    drawing.write(axes, x, y + 1.25, text, VALUE, size=11)


def _flows(
    axes: Axes, lower: str, colour: str, upper: str = "values", back: bool = False
) -> None:
    """Draw the two arrows between all neighbours, and name their colours at the top right."""
    for source, target in ("wz", "bz", "zh", "hL"):
        _link(axes, source, target, True, VALUE)
        _link(axes, source, target, False, colour, back)
    left, right, y = drawing.WIDTH - 2.3, drawing.WIDTH - 1.9, drawing.HEIGHT - 0.36
    drawing.arrow(axes, (left, y), (right, y), VALUE)
    drawing.write(axes, right + 0.12, y, upper, VALUE, size=10.5, ha="left")
    drawing.arrow(
        axes,
        (right if back else left, y - 0.28),
        (left if back else right, y - 0.28),
        colour,
    )
    drawing.write(axes, right + 0.12, y - 0.28, lower, colour, size=10.5, ha="left")


def _cell(axes: Axes, x: float, text: str, full: bool) -> None:
    """Draw one cell of memory: full and amber, or already free and dashed."""
    edge, fill = (
        (MEMORY, drawing.tint(MEMORY, 0.35)) if full else (style.MUTED, "white")
    )
    drawing.box(
        axes,
        x,
        MEMORY_ROW,
        1.3,
        0.42,
        edge,
        fill,
        linewidth=1.2,
        linestyle="-" if full else (0, (3, 3)),
    )
    drawing.write(
        axes, x, MEMORY_ROW - 0.01, text, style.INK if full else style.MUTED, size=12
    )


def _store(axes: Axes, x: float) -> None:
    """Draw the way into the memory below a box and back out of it."""
    drawing.arrow(axes, (x - 0.14, 1.55), (x - 0.14, 0.8), MEMORY, linewidth=1.4)
    drawing.arrow(axes, (x + 0.14, 0.8), (x + 0.14, 1.55), MEMORY, linewidth=1.4)
    drawing.write(axes, x - 0.26, 1.17, "store", style.MUTED, size=9.5, ha="right")
    drawing.write(axes, x + 0.26, 1.17, "read back", style.MUTED, size=9.5, ha="left")


def _caption(axes: Axes, name: str, text: str, colour: str) -> None:
    """Write a conclusion between a node and its memory."""
    drawing.write(axes, COLUMNS[name][0], 1.28, text, colour, size=11.5)


def _memory(axes: Axes, text: str) -> None:
    """Name the row of memory and say how it grows."""
    drawing.write(
        axes, 0.5, MEMORY_ROW, "memory", MEMORY_INK, size=11, ha="left", weight="bold"
    )
    drawing.write(axes, 1.32, MEMORY_ROW, text, style.MUTED, size=9.5, ha="left")


def _numbers(w: float, b: float, steps: tuple[jax.Array, ...]) -> dict[str, float]:
    """Return one number for each box."""
    return dict(zip(COLUMNS, (w, b, *map(float, steps)), strict=True))


@style.styled
def forward_step() -> Figure:
    """Draw forward mode: values and tangents flow together from left to right, and nothing is kept.

    Example: `style.save(forward_step(), "forward-step.png")`.
    """
    values, tangents = jax.jvp(_neuron, PARAMETERS, DIRECTION)
    slope = float(tangents[-1])
    figure, axes = drawing.canvas(
        "The forward step",
        "One pass carries each value and its tangent: how it changes along $v$.",
    )
    _nodes(
        axes,
        _numbers(*PARAMETERS, values),
        _numbers(*DIRECTION, tangents),
        r"\dot",
        TANGENT,
    )
    _flows(axes, "tangents", TANGENT)
    for name, rule in FORWARD_RULES.items():
        drawing.write(axes, COLUMNS[name][0], 1.83, rule, TANGENT, size=13)
        last = name == "L"
        _cell(
            axes, COLUMNS[name][0], r"$L,\ \dot L$" if last else "free again", full=last
        )
    estimate = ", ".join(f"{{{slope * direction:g}}}" for direction in DIRECTION)
    _caption(axes, "w", r"direction $v = (\dot w, \dot b)$", TANGENT)
    _caption(
        axes, "h", rf"slope $\dot L = \langle\nabla L, v\rangle = {slope:g}$", TANGENT
    )
    _caption(axes, "L", rf"forward gradient $\dot L\,v = ({estimate})$", TANGENT)
    _memory(axes, "one step's values\nat a time")
    return figure


@style.styled
def backward_step() -> Figure:
    """Draw reverse mode: values flow right and are kept, then cotangents flow back and use them.

    Example: `style.save(backward_step(), "backward-step.png")`.
    """
    values, pull_back = jax.vjp(_neuron, *PARAMETERS)
    bar_w, bar_b = map(float, pull_back((jnp.zeros(()), jnp.zeros(()), jnp.ones(()))))
    bar_h = jax.grad(lambda h: (h - TARGET) ** 2)(values[1])
    figure, axes = drawing.canvas(
        "The backward step",
        "Values go right and are kept; then cotangents, the slopes of $L$, come back.",
    )
    # The bias is added to z, so the cotangent of z is that of b.
    cotangents = _numbers(bar_w, bar_b, (jnp.array(bar_b), bar_h, jnp.ones(())))
    _nodes(axes, _numbers(*PARAMETERS, values), cotangents, r"\bar", COTANGENT)
    _flows(axes, "cotangents, then", COTANGENT, "values, first", back=True)
    for name, rule in BACKWARD_RULES.items():
        drawing.write(axes, COLUMNS[name][0], 1.83, rule, COTANGENT, size=13)
        _cell(axes, COLUMNS[name][0], KEPT[name], full=True)
        _store(axes, COLUMNS[name][0])
    _caption(axes, "w", r"gradient $\nabla L = (\bar w, \bar b)$", COTANGENT)
    _memory(axes, "grows with the\nnumber of steps")
    return figure
