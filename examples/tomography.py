"""Find what lies in the ground from travel times: 1,024 unknowns behind a `while_loop`.

Waves leave 6 sources at one side of a square and reach 24 receivers around it. The first arrivals
solve the eikonal equation |grad T| = slowness, here by upwind updates until nothing changes any
more: a `lax.while_loop`, which `jax.grad` refuses. From the 144 travel times we find the slowness
of 32 x 32 cells.

`fx.GaussNewton` pushes 64 random directions through the solver in each step. That is enough,
because 144 times fix far fewer than 1,024 numbers; there is no learning rate. Beside it: Adam on
forward gradients, the same class along all 1,024 directions, which is Levenberg-Marquardt, and an
ensemble Kalman inversion, which takes no derivative.

    python examples/tomography.py [--picture tomography.png]

Expected: each method's CPU seconds and solver runs until the loss is a thousandth of the first one,
and for --picture the slowness that each found; about a minute on two CPU cores. Where the equation
can be rewritten with a checkpointed loop, L-BFGS on reverse-mode gradients is as good: see "Fit a
simulation" in the docs.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import forwax as fx

SOURCES, RECEIVERS = 6, 24
FAR = 1e3  # longer than any path
ACCURACY = 0.005  # of a travel time; a path across takes about 1
SMOOTH = 0.15  # correlation length of the slowness, in sides of the square
STRENGTH = (
    0.5  # standard deviation of the logarithm of the slowness, before seeing any data
)


def travel_times(slowness: Array, source: Array) -> Array:
    """First arrivals from a source (row, column) at all cells [p, p]; the square has side 1."""
    side = slowness.shape[0]
    step = slowness / side

    def update(state: tuple[Array, Array]) -> tuple[Array, Array]:
        now, _ = state
        wide = jnp.pad(now, 1, constant_values=FAR)
        a = jnp.minimum(wide[:-2, 1:-1], wide[2:, 1:-1])
        b = jnp.minimum(wide[1:-1, :-2], wide[1:-1, 2:])
        # Godunov's upwind solution: from both sides where it can be, else from the earlier one
        gap = 2 * step**2 - (a - b) ** 2
        is_both = jnp.abs(a - b) < step
        both = (a + b + jnp.sqrt(jnp.where(is_both, gap, 1.0))) / 2
        new = jnp.where(is_both, both, jnp.minimum(a, b) + step)
        new = jnp.minimum(now, new)
        return new, jnp.any(new < now)

    begin = jnp.full((side, side), FAR).at[source[0], source[1]].set(0.0)
    times, _ = lax.while_loop(lambda s: s[1], update, (begin, jnp.bool(True)))
    return times


@dataclasses.dataclass(frozen=True)
class Survey:
    """A square of side x side cells, what lies in it, and who hears whom."""

    side: int = 32

    @property
    def sources(self) -> np.ndarray:
        rows = np.linspace(1, self.side - 2, SOURCES).round().astype(int)
        return np.stack([rows, np.zeros(SOURCES, int)], axis=1)

    @property
    def receivers(self) -> np.ndarray:
        """Eight each at the far side, above and below."""
        last = self.side - 1
        along = np.linspace(1, last, RECEIVERS // 3).round().astype(int)
        rows = np.concatenate([along, 0 * along, 0 * along + last])
        columns = np.concatenate([0 * along + last, along, along])
        return np.stack([rows, columns], axis=1)

    @property
    def truth(self) -> Array:
        """Two bodies in even ground, one slow and one fast."""
        at = (np.arange(self.side) + 0.5) / self.side
        x, y = np.meshgrid(at, at, indexing="ij")
        slow = np.exp(-((x - 0.35) ** 2 + (y - 0.4) ** 2) / 0.06)
        fast = np.exp(-((x - 0.7) ** 2 + (y - 0.65) ** 2) / 0.06)
        return jnp.asarray(np.exp(0.6 * slow - 0.5 * fast), jnp.float32)

    def slowness(self, white: Array) -> Array:
        """From independent standard normal numbers [p, p] to a smooth positive field."""
        at = np.arange(self.side) / self.side
        rows = np.exp(-(((at[:, None] - at) / SMOOTH) ** 2))
        rows /= np.sqrt((rows**2).sum(axis=1, keepdims=True))
        smooth = jnp.asarray(rows, white.dtype)
        return jnp.exp(STRENGTH * smooth @ white @ smooth.T)

    def observe(self, slowness: Array) -> Array:
        """All travel times [sources, receivers]."""
        rows, columns = self.receivers.T
        fields = jax.vmap(travel_times, (None, 0))(slowness, jnp.asarray(self.sources))
        return fields[:, rows, columns]

    def residuals(self, white: Array, observed: Array) -> tuple[Array, Array]:
        """What data and prior make of the parameters; half their squares are the loss."""
        misfit = (self.observe(self.slowness(white)) - observed) / ACCURACY
        return misfit, white

    def loss(self, white: Array, observed: Array) -> Array:
        misfit, prior = self.residuals(white, observed)
        return (jnp.sum(misfit**2) + jnp.sum(prior**2)) / 2


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to fit: both functions are compiled once, for all runs.

    Attributes:
        init: from a key to where a run begins.
        step: from (key, state, observed) to the loss before the step, the parameters that have it,
            and the next state.
        solves: what a step costs, in runs of the solver: a pass with k directions counts as 1 + 2k.
    """

    init: Callable[[Array], Any]
    step: Callable[[Array, Any, Array], tuple[Array, Array, Any]]
    solves: int


def gauss_newton(survey: Survey, num_tangents: int, damping: float = 1.0) -> Method:
    solver = fx.GaussNewton(num_tangents, damping=damping)

    def init(key: Array) -> Any:
        white = jnp.zeros((survey.side, survey.side))
        return white, solver.init(white)

    def step(key: Array, state: Any, observed: Array) -> tuple[Array, Array, Any]:
        white, solver = state
        value, new, solver = solver.step(survey.residuals)(key, white, observed)
        return value, white, (new, solver)

    # one more run judges the step
    return Method(init, jax.jit(step), 2 + 2 * num_tangents)


def adam(survey: Survey, num_tangents: int, learning_rate: float) -> Method:
    optimizer = optax.adam(learning_rate)
    rule = fx.WeightPerturbation(num_tangents=num_tangents)
    value_and_grad = fx.value_and_grad(survey.loss, rule)

    def init(key: Array) -> Any:
        white = jnp.zeros((survey.side, survey.side))
        return white, optimizer.init(white)

    def step(key: Array, state: Any, observed: Array) -> tuple[Array, Array, Any]:
        white, moments = state
        value, gradient = value_and_grad(key, white, observed)
        updates, moments = optimizer.update(gradient, moments)
        return value, white, (optax.apply_updates(white, updates), moments)

    return Method(init, jax.jit(step), 1 + 2 * num_tangents)


def kalman(survey: Survey, members: int) -> Method:
    """Ensemble Kalman inversion with perturbed observations: Iglesias, Law, Stuart 2013."""
    scale = np.sqrt(members - 1)

    def init(key: Array) -> Array:
        return jax.random.normal(key, (members, survey.side, survey.side))

    def step(key: Array, ensemble: Array, observed: Array) -> tuple[Array, Array, Any]:
        mean = jnp.mean(ensemble, axis=0)
        times = jax.vmap(lambda w: survey.observe(survey.slowness(w)))(ensemble)
        left = ((observed[None] - times) / ACCURACY).reshape(members, -1)
        noisy = left + jax.random.normal(key, left.shape)
        x = (ensemble - mean[None]).reshape(
            members, -1
        ) / scale  # [members, parameters]
        y = (jnp.mean(left, axis=0)[None] - left) / scale  # [members, data]
        gain = x.T @ jnp.linalg.solve(y.T @ y + jnp.eye(y.shape[1]), y.T).T
        moved = ensemble + (noisy @ gain.T).reshape(ensemble.shape)
        return survey.loss(mean, observed), mean, moved

    return Method(init, jax.jit(step), members)


def methods(survey: Survey) -> dict[str, Method]:
    """What is compared; Adam's rate is the best of those that the benchmark tried."""
    return {
        "Gauss-Newton, 64 directions": gauss_newton(survey, 64),
        "Gauss-Newton, all directions": gauss_newton(survey, survey.side**2),
        "Adam, 16 directions": adam(survey, 16, 0.01),
        "ensemble Kalman inversion, 64": kalman(survey, 64),
    }


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A run until its loss was a thousandth of the first, or its time was up.

    Attributes:
        reached: whether it was.
        share: the last loss over the first.
        steps: how many were made before it.
        seconds: of CPU time, without compilation.
        white: the parameters.
    """

    reached: bool
    share: float
    steps: int
    seconds: float
    white: Array


def run(method: Method, survey: Survey, seed: int, most_seconds: float) -> Outcome:
    """One run, after a step that compiles."""
    observed = survey.observe(survey.truth)
    first = float(survey.loss(jnp.zeros((survey.side, survey.side)), observed))
    key = jax.random.key(seed)
    start = method.init(key)
    jax.block_until_ready(method.step(key, start, observed))
    begin = time.process_time()
    state = start
    steps = 0
    while True:
        value, white, state = method.step(
            jax.random.fold_in(key, steps), state, observed
        )
        share = float(value) / first
        seconds = time.process_time() - begin
        if share <= 1e-3 or seconds > most_seconds:
            return Outcome(share <= 1e-3, share, steps, seconds, white)
        steps += 1


def main(
    side: int = 32, seconds: float = 20.0, picture: Path | None = None
) -> dict[str, Outcome]:
    """Run all methods once, with at most so many CPU seconds each."""
    survey = Survey(side)
    observed = survey.observe(survey.truth)
    start = jnp.zeros((side, side))
    try:
        jax.grad(survey.loss)(start, observed)
    except ValueError as error:
        print(f"jax.grad refuses: {str(error)[:120]} ...")
    print(f"{start.size:,} unknowns, {observed.size} travel times")
    outcomes = {}
    for name, method in methods(survey).items():
        found = run(method, survey, 0, seconds)
        outcomes[name] = found
        end = "a thousandth" if found.reached else f"{found.share:.2g}"
        print(
            f"{name:30} {end} of the first loss: {found.steps} steps, "
            f"{found.steps * method.solves:,} solver runs, {found.seconds:.2f} CPU s"
        )
    if picture:
        draw(survey, outcomes, picture)
    return outcomes


def draw(survey: Survey, outcomes: dict[str, Outcome], path: Path) -> None:
    """The ground, and what each run made of it."""
    from matplotlib.figure import Figure

    shown = {"the truth": survey.truth}
    shown |= {name: survey.slowness(out.white) for name, out in outcomes.items()}
    figure = Figure(figsize=(3 * len(shown), 3.2), layout="constrained")
    panels = figure.subplots(1, len(shown))
    for axes, (name, field) in zip(panels, shown.items(), strict=True):
        drawn = axes.imshow(field, cmap="RdBu_r", norm="log", vmin=0.5, vmax=2.0)
        for places, mark in ((survey.sources, "*"), (survey.receivers, "v")):
            axes.plot(places[:, 1], places[:, 0], "k" + mark, markersize=4)
        axes.set_title(name.replace(", ", ",\n"), fontsize=9)
        axes.set_axis_off()
    figure.colorbar(drawn, ax=panels, label="slowness", ticks=[0.5, 1, 2])
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=32, help="cells along a side")
    parser.add_argument("--seconds", type=float, default=20.0, help="CPU time of a run")
    parser.add_argument("--picture", type=Path, help="where a picture goes")
    main(**vars(parser.parse_args()))
