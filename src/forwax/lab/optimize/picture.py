"""The picture of ``forwax optimize``: both ways over the contours, loss against iterations, loss against seconds."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from forwax.lab import style
from forwax.lab.optimize.descent import Descent, Plan, Timing

__all__ = ["draw"]

GROUND = LinearSegmentedColormap.from_list("ground", ["#ffffff", "#dbe3f0", "#aab9d6"])
MOST_POINTS = 1500


@style.styled
def draw(plan: Plan, descents: Mapping[str, Descent], timings: Mapping[str, Timing]) -> Figure:
    """Draw the comparison: every run thin, the median thick; contours only for two variables.

    Args:
        plan: What all runs share.
        descents: The runs of each method, by a name of the palette.
        timings: The seconds of one run of each method.

    Example: `style.save(draw(plan, descents, timings), "optimize-beale.png")`.
    """
    planar = len(plan.start) == 2
    figure = style.new_figure(13.2 if planar else 9.0, 4.3)
    panels = figure.subplots(1, 3 if planar else 2, width_ratios=[1.25, 1, 1] if planar else None)
    if planar:
        _draw_ways(panels[0], plan, descents)
    by_iteration, by_second = panels[-2:]
    for name, descent in descents.items():
        iterations = np.arange(plan.iterations + 1)
        _draw_losses(by_iteration, iterations, name, descent, plan.function.minimum)
        _draw_losses(
            by_second,
            iterations * timings[name].seconds / plan.iterations,
            name,
            descent,
            plan.function.minimum,
        )
    _dress(by_iteration, by_second, plan)
    return figure


def _draw_losses(axes: Axes, x: np.ndarray, name: str, descent: Descent, minimum: float) -> None:
    """Draw the distance of f from its minimum, every run and their median at each step, where x is positive."""
    shown = _thin(len(x))[1:]
    # what is not a number ranks above all numbers, and a logarithmic axis shows neither it nor zero
    values = np.where(np.isfinite(descent.values), descent.values, np.inf)[:, shown] - minimum
    middle = np.median(values, axis=0)
    for run in () if np.array_equal(values.min(axis=0), values.max(axis=0)) else values:
        axes.plot(x[shown], _positive(run), color=style.colour(name), linewidth=0.6, alpha=0.3)
    lost = f"\n{descent.non_finite} of {len(values)} runs not finite" if descent.non_finite else ""
    label = (name if name == "backprop" else f"{name} gradient") + lost
    thick = {"linewidth": 2.4, "zorder": 4 if name == "backprop" else 3}
    axes.plot(x[shown], _positive(middle), color=style.colour(name), label=label, **thick)


def _dress(by_iteration: Axes, by_second: Axes, plan: Plan) -> None:
    """Set the titles, scales and labels of the two loss panels."""
    for axes, title, label in (
        (by_iteration, "Loss against iterations", "iteration"),
        (
            by_second,
            "Loss against seconds",
            "seconds of one compiled run (logarithmic)",
        ),
    ):
        axes.set_title(title)
        axes.set_xlabel(label)
        axes.set_yscale("log")
    by_iteration.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    by_iteration.xaxis.set_major_formatter("{x:,.0f}")
    by_iteration.set_ylabel("$f(x)$" if plan.function.minimum == 0 else "$f(x) - f^*$")
    by_second.set_xscale("log")
    by_second.sharey(by_iteration)
    by_iteration.legend()


def _draw_ways(axes: Axes, plan: Plan, descents: Mapping[str, Descent]) -> None:
    """Draw the ways of all runs over the contours of the function."""
    lower, upper = _frame(plan, descents)
    _draw_contours(axes, plan, lower, upper)
    for name, descent in descents.items():
        assert descent.points is not None
        shown = _thin(plan.iterations + 1)
        for points in descent.points[:, shown]:
            axes.plot(*points.T, color=style.colour(name), linewidth=0.6, alpha=0.3)
        middle = descent.points[_middle(descent), shown]
        thick = {"linewidth": 2.2, "zorder": 4 if name == "backprop" else 3}
        axes.plot(*middle.T, color=style.colour(name), **thick)
    axes.plot(*plan.start, "o", color=style.INK, markersize=6, zorder=6, label="start")
    least = {
        "markersize": 14,
        "markerfacecolor": style.PALETTE["memory"],
        "markeredgecolor": style.INK,
    }
    axes.plot(
        *zip(*plan.function.minima, strict=True),
        "*",
        zorder=6,
        label="minimum",
        **least,
    )
    axes.set(
        xlim=(lower[0], upper[0]),
        ylim=(lower[1], upper[1]),
        xlabel="$x_1$",
        ylabel="$x_2$",
    )
    axes.set_title(f"{plan.function.name.replace('_', '-').title()}: where the runs go")
    axes.grid(False)
    axes.legend(loc="best", facecolor="white", frameon=True, framealpha=0.8, edgecolor="none")


def _draw_contours(axes: Axes, plan: Plan, lower: np.ndarray, upper: np.ndarray) -> None:
    """Draw the function's height, evenly spaced in its logarithm."""
    x, y = np.meshgrid(np.linspace(lower[0], upper[0], 240), np.linspace(lower[1], upper[1], 240))
    heights = jax.vmap(plan.function)(jnp.asarray(np.stack([x.ravel(), y.ravel()], axis=1)))
    heights = np.asarray(heights).reshape(x.shape) - plan.function.minimum
    floor = max(float(np.quantile(heights, 0.004)), 1e-6 * float(heights.max()))
    logarithm = np.log10(np.maximum(heights, floor))
    levels = np.linspace(logarithm.min(), logarithm.max(), 15)
    axes.contourf(x, y, logarithm, levels=levels, cmap=GROUND, zorder=0)
    axes.contour(
        x,
        y,
        logarithm,
        levels=levels,
        colors="white",
        linewidths=0.6,
        linestyles="solid",
        zorder=0,
    )


def _frame(plan: Plan, descents: Mapping[str, Descent]) -> tuple[np.ndarray, np.ndarray]:
    """Return the corners of a frame that holds the start, the minimum that is found, and the ways within the domain."""
    domain = np.array([plan.function.lower, plan.function.upper])
    seen = [np.array([plan.start])]
    for descent in descents.values():
        assert descent.points is not None
        points = descent.points.reshape(-1, 2)
        seen.append(points[np.all((points >= domain[0]) & (points <= domain[1]), axis=1)])
    ways = np.concatenate(seen)
    minima = np.array(plan.function.minima)
    gaps = np.linalg.norm(minima - ways[-1], axis=1)
    ways = np.concatenate([ways, minima[[np.argmin(gaps)]]])
    lower, upper = ways.min(axis=0), ways.max(axis=0)
    margin = np.maximum(0.15 * (upper - lower), 0.04 * (domain[1] - domain[0]))
    return lower - margin, upper + margin


def _middle(descent: Descent) -> int:
    """Return the run whose final value is the median, or the lower one of the two in the middle."""
    return int(np.argsort(descent.final, kind="stable")[(len(descent.final) - 1) // 2])


def _thin(length: int) -> np.ndarray:
    """Return the indices that are drawn: all early ones, where much happens, and evenly spaced ones after."""
    later = np.linspace(0, length - 1, min(length, MOST_POINTS)).astype(int)
    return np.union1d(np.arange(min(length, 300)), later)


def _positive(values: np.ndarray) -> np.ndarray:
    """Return the values with what a logarithmic axis cannot show left out."""
    return np.where((values > 0) & np.isfinite(values), values, np.nan)
