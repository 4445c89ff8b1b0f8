"""The forward gradient of a function of two parameters, computed with `forwax.value_and_grad`.

Left: a random direction v, the slope <g, v> as a projection of the gradient g, and the estimate
slope · v. Right: many estimates. Their mean is g, and none of them points away from g, since <g,
slope·v> = slope² is never negative.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import forwax as fx
from figures import drawing
from forwax.lab import style

__all__ = ["forward_gradient"]

POINT = (0.9, 0.5)
CONDITION = 3.0
ESTIMATES = 4096
TRUE = style.PALETTE["backprop"]
ESTIMATE = style.PALETTE["forward"]
DIRECTION = style.PALETTE["forward-16"]
DIRECTION_INK = "#b87a00"
SHOWN = 800


@style.styled
def forward_gradient(key: jax.Array | None = None) -> Figure:
    """Draw one direction, slope and estimate, and the cloud of estimates around the gradient.

    Args:
        key: The PRNG key of the estimates, `jax.random.key(0)` when None. The left side shows the
            one among them whose arrows are easiest to tell apart.

    Example: `style.save(forward_gradient(jax.random.key(1)), "forward-gradient.png")`.
    """
    gradient, estimates = _estimates(jax.random.key(0) if key is None else key)
    figure, _ = drawing.canvas(
        "The forward gradient",
        "One slope times its own random direction: noisy, but right on average.",
    )
    left = figure.add_axes(
        (0.038, 0.03, 0.43, 0.7), title="One direction, its slope, its estimate"
    )
    right = figure.add_axes(
        (0.53, 0.03, 0.43, 0.7),
        title=f"{SHOWN} of {ESTIMATES:,} estimates around the gradient",
    )
    for axes in (left, right):
        axes.set(aspect="equal", xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.grid(False)
    _one_estimate(left, gradient, *_legible(gradient, estimates))
    _many_estimates(right, gradient, estimates)
    return figure


def _estimates(key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradient [2] at POINT and forward gradients [ESTIMATES, 2] of a quadratic."""
    loss = fx.functions.quadratic(CONDITION)
    rule = fx.WeightPerturbation(tangents=fx.tangents.Normal())
    _, gradient = fx.value_and_grad(loss, fx.Backprop())(key, jnp.array(POINT))
    estimate = jax.jit(jax.vmap(fx.value_and_grad(loss, rule), in_axes=(0, None)))
    _, estimates = estimate(jax.random.split(key, ESTIMATES), jnp.array(POINT))
    return np.asarray(gradient), np.asarray(estimates)


def _legible(gradient: np.ndarray, estimates: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the direction v and the slope of the estimate that is easiest to read.

    Both follow from the estimate e = slope·v, up to a common sign, because <g, e> = slope².
    """
    slopes = np.sqrt(np.maximum(estimates @ gradient, 1e-12))
    directions = estimates / slopes[:, None]
    lengths = np.linalg.norm(directions, axis=1)
    cosines = slopes / lengths / np.linalg.norm(gradient)
    clockwise = directions[:, 0] * gradient[1] > directions[:, 1] * gradient[0]
    best = np.argmin(
        np.abs(lengths - 1.45) + 2 * np.abs(cosines - 0.65) + 10 * ~clockwise
    )
    return directions[best], float(slopes[best])


def _one_estimate(
    axes: Axes, gradient: np.ndarray, direction: np.ndarray, slope: float
) -> None:
    """Draw a random direction, its slope as a projection, and the estimate, over contours."""
    origin = np.array(POINT)
    unit = direction / np.linalg.norm(direction)
    below = np.array([unit[1], -unit[0]])
    axes.set(xlim=(-0.25, 4.25), ylim=(-0.95, 2.75))
    _contours(axes)
    foot = origin + (gradient @ unit) * unit
    tip = origin + slope * direction
    _line(axes, origin - 0.8 * unit, tip + 0.6 * unit)
    _line(axes, origin + gradient, foot)
    _right_angle(axes, foot, unit, -below)
    _vector(axes, origin, tip, ESTIMATE, 5.5, 25)
    _vector(axes, origin, origin + direction, DIRECTION, 2.2, 15)
    _vector(axes, origin, origin + gradient, TRUE, 2.8, 17)
    axes.plot(
        *foot,
        "o",
        markerfacecolor="white",
        markeredgecolor=style.INK,
        markersize=5.5,
        zorder=6,
    )
    _label(axes, origin + gradient + (0, 0.15), "gradient $g$", TRUE)
    _label(
        axes,
        origin + 0.55 * direction + 0.2 * below,
        "direction $v$",
        DIRECTION_INK,
        rotation=_angle(unit),
    )
    slope_text = rf"slope $\langle g, v\rangle = {slope:.2f}$"
    _label(
        axes,
        foot + 0.22 * unit - 0.2 * below,
        slope_text,
        style.INK,
        rotation=_angle(unit),
        ha="left",
    )
    _label(
        axes,
        tip + 0.26 * below,
        r"estimate $\langle g, v\rangle\, v$",
        ESTIMATE,
        rotation=_angle(unit),
    )


def _many_estimates(axes: Axes, gradient: np.ndarray, estimates: np.ndarray) -> None:
    """Draw the cloud of estimates, their mean, and the line that none of them crosses."""
    size = float(np.linalg.norm(gradient))
    unit = gradient / size
    across = np.array([unit[1], -unit[0]])
    axes.set(xlim=(-2.15 * size, 2.55 * size), ylim=(-1.05 * size, 2.82 * size))
    _line(axes, -9 * size * across, 9 * size * across)
    axes.plot(
        *estimates[:SHOWN].T,
        "o",
        color=ESTIMATE,
        markersize=3.2,
        alpha=0.32,
        markeredgewidth=0,
    )
    _vector(axes, np.zeros(2), gradient, TRUE, 2.8, 17)
    mean = estimates.mean(axis=0)
    axes.plot(
        *mean,
        "o",
        markerfacecolor="none",
        markeredgecolor=style.INK,
        markeredgewidth=1.4,
        markersize=12,
        zorder=6,
    )
    _label(axes, 0.5 * gradient - 0.14 * size * across, "$g$", TRUE)
    _label(axes, mean + 0.3 * size * unit, "mean of all", style.INK)
    aside = 0.85 * size * across - 0.2 * size * unit
    _label(
        axes,
        aside,
        "no estimate on this side",
        style.MUTED,
        rotation=_angle(across),
        size=10.5,
    )


def _contours(axes: Axes) -> None:
    """Draw the contours of the quadratic function over the whole axes."""
    x, y = np.meshgrid(
        np.linspace(*axes.get_xlim(), 200), np.linspace(*axes.get_ylim(), 200)
    )
    levels = 0.5 * (0.55 * np.arange(1, 12)) ** 2
    values = 0.5 * (x**2 + CONDITION * y**2)
    axes.contour(
        x, y, values, levels=levels, colors="#dfe3ec", linewidths=0.9, zorder=0
    )


def _vector(
    axes: Axes,
    tail: np.ndarray,
    head: np.ndarray,
    colour: str,
    width: float,
    size: float,
) -> None:
    """Draw a vector."""
    ends = (float(tail[0]), float(tail[1])), (float(head[0]), float(head[1]))
    drawing.arrow(axes, *ends, colour, linewidth=width, mutation_scale=size, zorder=4)
    axes.plot(*tail, "o", color=style.INK, markersize=5.5, zorder=6)


def _line(axes: Axes, start: np.ndarray, end: np.ndarray) -> None:
    """Draw a dashed line between two points."""
    axes.plot(
        *zip(start, end, strict=True),
        color=style.MUTED,
        linewidth=1,
        linestyle=(0, (4, 3)),
        zorder=1,
    )


def _right_angle(
    axes: Axes, corner: np.ndarray, one: np.ndarray, other: np.ndarray
) -> None:
    """Mark the right angle between two unit vectors."""
    points = corner + 0.14 * np.array([-one, other - one, other])
    axes.plot(*points.T, color=style.MUTED, linewidth=1, zorder=2)


def _angle(direction: np.ndarray) -> float:
    """Return the direction's angle in degrees, turned so that text along it reads rightwards."""
    x, y = direction if direction[0] >= 0 else -direction
    return float(np.degrees(np.arctan2(y, x)))


def _label(
    axes: Axes,
    point: np.ndarray,
    text: str,
    colour: str,
    size: float = 11.5,
    **look: Any,
) -> None:
    """Write text on a white ground, so that lines and dots do not cross it."""
    ground = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8}
    x, y = point
    drawing.write(
        axes,
        x,
        y,
        text,
        colour,
        size,
        bbox=ground,
        zorder=7,
        rotation_mode="anchor",
        **look,
    )
