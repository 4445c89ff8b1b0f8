"""The picture of ``forwax optimize``: ways over contours; loss against steps and seconds."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from forwax.lab import style
from forwax.lab.optimize.descent import Descent, Descents, Plan, Timings, label
from forwax.lab.report import Json

GROUND = LinearSegmentedColormap.from_list("ground", ["#ffffff", "#dbe3f0", "#aab9d6"])
MOST_POINTS = 1500
THIN: Json = {"linewidth": 0.6, "alpha": 0.3}


@style.styled
def draw(plan: Plan, descents: Descents, timings: Timings) -> Figure:
    """Draw the comparison: every run thin, the median thick; contours only for two variables.

    Args:
        plan: What all runs share.
        descents: The runs of each method, by a name of the palette.
        timings: The seconds of one run of each method.

    Example: `style.save(draw(plan, descents, timings), "optimize-beale.png")`.
    """
    if len(plan.start) == 2:
        figure = style.new_figure(13.2, 4.3)
        ways, by_step, by_second = figure.subplots(1, 3, width_ratios=[1.25, 1, 1])
        _draw_ways(ways, plan, descents)
    else:
        figure = style.new_figure(9.0, 4.3)
        by_step, by_second = figure.subplots(1, 2)
    minimum = plan.function.minimum
    for name, descent in descents.items():
        _draw_losses(by_step, 1.0, name, descent, minimum)
        seconds_per_step = timings[name].seconds / plan.iterations
        _draw_losses(by_second, seconds_per_step, name, descent, minimum)
    by_step.set(
        title="Loss against iterations",
        xlabel="iteration",
        ylabel="$f(x)$" if minimum == 0 else "$f(x) - f^*$",
        yscale="log",
    )
    by_step.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    by_step.xaxis.set_major_formatter("{x:,.0f}")
    by_step.legend()
    by_second.set(
        title="Loss against seconds",
        xlabel="seconds of one compiled run (logarithmic)",
        xscale="log",
        yscale="log",
    )
    by_second.sharey(by_step)
    return figure


def _look(name: str) -> Json:
    """Return the look of a method's median, backprop's above the others."""
    return {
        "color": style.colour(name),
        "linewidth": 2.4,
        "zorder": 4 if name == "backprop" else 3,
    }


def _draw_losses(
    axes: Axes, scale: float, name: str, descent: Descent, minimum: float
) -> None:
    """Draw f above its minimum, every run and their median at each step, against scaled steps."""
    shown = _thinned(descent.values.shape[1])[1:]
    x = scale * shown
    values = descent.ranked[:, shown] - minimum
    look = _look(name)
    if np.any(values != values[0]):
        axes.plot(x, _positive(values).T, **look | THIN)
    text = label(name)
    if descent.non_finite:
        text += f"\n{descent.non_finite} of {len(values)} runs not finite"
    axes.plot(x, _positive(np.median(values, axis=0)), label=text, **look)


def _positive(values: np.ndarray) -> np.ndarray:
    """Return the values with what a logarithmic axis cannot show left out."""
    return np.where((values > 0) & np.isfinite(values), values, np.nan)


def _thinned(length: int) -> np.ndarray:
    """Return the indices that are drawn: all early ones, and evenly spaced ones after."""
    return np.union1d(
        np.arange(min(length, 300)),
        np.linspace(0, length - 1, min(length, MOST_POINTS)).astype(int),
    )


def _draw_ways(axes: Axes, plan: Plan, descents: Descents) -> None:
    """Draw the ways of all runs over the contours of the function."""
    ways = {name: np.array(descent.points) for name, descent in descents.items()}
    corners = _frame(
        plan, np.concatenate([points.reshape(-1, 2) for points in ways.values()])
    )
    _draw_contours(axes, plan, corners)
    shown = _thinned(plan.iterations + 1)
    for name, points in ways.items():
        look = _look(name)
        axes.plot(*points[:, shown].T, **look | THIN)
        # the run whose final value is the median, or the lower one of the two in the middle
        ranks = np.argsort(descents[name].final, kind="stable")
        axes.plot(*points[ranks[(len(ranks) - 1) // 2], shown].T, **look)
    axes.plot(*plan.start, "o", color=style.INK, zorder=6, label="start")
    axes.plot(
        *np.array(plan.function.minima).T,
        "*",
        markersize=14,
        markerfacecolor=style.PALETTE["memory"],
        markeredgecolor=style.INK,
        zorder=6,
        label="minimum",
    )
    axes.set(
        title=f"{plan.function.name.replace('_', '-').title()}: where the runs go",
        xlim=corners[:, 0],
        ylim=corners[:, 1],
        xlabel="$x_1$",
        ylabel="$x_2$",
    )
    axes.grid(False)
    axes.legend(frameon=True, edgecolor="none")


def _draw_contours(axes: Axes, plan: Plan, corners: np.ndarray) -> None:
    """Draw the function's height, evenly spaced in its logarithm."""
    x, y = np.meshgrid(*np.linspace(corners[0], corners[1], 240).T)
    points = np.stack([x, y], axis=-1)  # [240, 240, 2]
    values = jax.vmap(jax.vmap(plan.function))(jnp.asarray(points))
    heights = np.asarray(values) - plan.function.minimum
    # at a minimum the logarithm has no lower end
    floor = max(np.quantile(heights, 0.004), 1e-6 * heights.max())
    logarithm = np.log10(np.maximum(heights, floor))
    levels = np.linspace(logarithm.min(), logarithm.max(), 15)
    axes.contourf(x, y, logarithm, levels=levels, cmap=GROUND)
    axes.contour(
        x,
        y,
        logarithm,
        levels=levels,
        colors="white",
        linewidths=0.6,
        linestyles="solid",
    )


def _frame(plan: Plan, points: np.ndarray) -> np.ndarray:
    """Return the corners around start, ways in the domain, and the minimum found, [2, 2]."""
    domain = np.array([plan.function.lower, plan.function.upper])
    inside = np.all((points >= domain[0]) & (points <= domain[1]), axis=1)
    ways = np.vstack([plan.start, points[inside]])
    found = min(plan.function.minima, key=lambda minimum: math.dist(minimum, ways[-1]))
    ways = np.vstack([ways, found])
    margin = np.maximum(0.15 * np.ptp(ways, axis=0), 0.04 * np.ptp(domain, axis=0))
    return np.array([ways.min(axis=0) - margin, ways.max(axis=0) + margin])
