"""A learning rate from the loss's curvature, which slopes of slopes tell."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from forwax import _tree
from forwax._checks import check_count
from forwax._pushforward import is_staged
from forwax._reports.programs import REJECTIONS
from forwax._rule import check_rule
from forwax._rules import Rule, WeightPerturbation
from forwax._signature import Problem, Signature, check_key
from forwax._tree import Tree
from forwax.tangents import Rademacher
from forwax.tangents._base import typed_key

_LEAST_STEP = 2.0**-6
"""Near the fourth root of float32's rounding unit, where ε² and u/ε² are alike."""


@dataclasses.dataclass(frozen=True)
class Curvature:
    """What `measure_curvature` found; printing it says why there is no rate, if there is none.

    Attributes:
        trace: tr H of the Hessian H, the mean of vᵀHv over signs v.
        trace_error: its standard error.
        gradient_squared: |g|², the mean of <g, v>².
        decrease: by how much one step of the rule at this rate lowers the loss on average, to
            second order; None without a rate.
        learning_rate: the best rate E<g, e> / E[eᵀHe] of a step along the rule's estimates e;
            None where curvature is not positive beyond its error.
        reason: why there is no rate; None where there is one.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> saddle = lambda w: w[0] ** 2 - w[1] ** 2
        >>> print(fx.measure_curvature(saddle)(jax.random.key(0), jnp.ones(2)))
        no learning rate: the trace of the Hessian, 0 ± 0, is not positive beyond its error
    """

    trace: float
    trace_error: float
    gradient_squared: float
    decrease: float | None
    learning_rate: float | None
    reason: str | None = None

    def __str__(self) -> str:
        if self.learning_rate is None:
            return f"no learning rate: {self.reason}"
        return (
            f"learning rate {self.learning_rate:.3g}, which lowers the loss by "
            f"{self.decrease:.3g} a step; trace of the Hessian {self.trace:.3g} ± "
            f"{self.trace_error:.2g}, |g|² {self.gradient_squared:.3g}"
        )


def measure_curvature(
    loss: Callable[..., Any],
    rule: Rule = WeightPerturbation(),  # noqa: B008 (a frozen value)
    *,
    in_axes: Any = None,
    has_aux: bool = False,
    draws: int = 16,
) -> Callable[..., Curvature]:
    """Find a learning rate for plain steps along a rule's estimates, from the loss's curvature.

    One step of rate r along an estimate e changes the loss by -r <g, e> + r²/2 eᵀHe, so the best
    rate is E<g, e> / E[eᵀHe], told from the draws. For one tangent of signs that is near 1 / tr H,
    whatever the number of parameters. In each draw both numbers come from one derivative of a
    derivative along e, and tr H from one along signs v, since E[vᵀHv] = tr H (Hutchinson 1990).
    With `forwax.FiniteDifference`, or where the loss has no such derivative, they are second
    differences (f(ε) - 2 f(0) + f(-ε)) / ε².

    It holds what a slope of a slope does. The rate is that of the batch and the point that it is
    measured at; where the loss has kinks, as that of ReLU, curvature in them is not seen by
    derivatives.

    Args:
        loss: as in `forwax.value_and_grad`; its first argument is the parameters.
        rule: any rule with an estimate.
        in_axes: as in `forwax.value_and_grad`.
        has_aux: whether the loss returns `(loss, aux)`.
        draws: how many estimates and tangents are drawn; 16 tell the rate to about a third.

    Returns:
        A function `f(key, params, *args, **kwargs)` that returns a `Curvature`. Call it outside of
        `jax.jit`.

    Raises:
        TypeError: for what is no rule, or inside `jax.jit`.
        ValueError: when there are fewer than two draws.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> loss = lambda w: jnp.sum(jnp.array([1.0, 2.0, 5.0]) * w**2) / 2
        >>> found = fx.measure_curvature(loss)(jax.random.key(0), jnp.ones(3))
        >>> found.trace, round(found.learning_rate, 4)
        (8.0, 0.125)
    """
    check_rule("measure_curvature", rule)
    check_count("measure_curvature", "draws", draws)
    if draws < 2:
        raise ValueError(
            f"measure_curvature: expected at least 2 draws, got {draws}: one has no error."
        )
    signature = Signature(loss, 0, has_aux, in_axes, "measure_curvature")

    def curvature_of_loss(key: Any, /, *args: Any, **kwargs: Any) -> Curvature:
        key = typed_key(check_key(key, "measure_curvature"))
        problem = signature.bind(args, kwargs)
        if is_staged() or any(map(_tree.is_abstract, jax.tree.leaves(problem.params))):
            raise TypeError(
                "measure_curvature: expected concrete parameters, got traced ones: whether there "
                "is a rate depends on what is measured. Call it outside of jax.jit."
            )
        leaves, structure = jax.tree.flatten((args, kwargs))
        numbered = enumerate(leaves)
        arrays = {n: x for n, x in numbered if isinstance(x, jax.Array | np.ndarray)}

        # Arrays are arguments of the program: constants would be held twice.
        def problem_of(arrays: dict[int, Any]) -> Problem:
            found = [arrays.get(n, leaf) for n, leaf in enumerate(leaves)]
            return signature.bind(*jax.tree.unflatten(structure, found))

        rows = _measured(
            rule, problem, jax.random.split(key, draws), problem_of, arrays
        )
        return _summary(rows)

    return curvature_of_loss


def _measured(
    rule: Rule,
    problem: Problem,
    keys: Array,
    problem_of: Callable[[dict[int, Any]], Problem],
    arrays: dict[int, Any],
) -> np.ndarray:
    """For each key what `_draw` finds: [draws, 5], by the first way that runs.

    Slopes of slopes, then second differences; jitted, then as a loss runs that branches.
    """
    first: Exception | None = None
    for way in _ways(rule, problem):

        def draw(key: Array, arrays: Any, along: Any = way) -> Array:
            return _draw(rule, problem_of(arrays), along, key)

        for run in (jax.jit(draw), draw):
            try:
                rows = [run(key, arrays) for key in keys]
            except REJECTIONS as error:
                first = first or error
            else:
                return np.asarray(rows, np.float64)
    assert first is not None
    raise first


Way = Callable[[Problem, Tree], tuple[Array, Array]]
"""From a problem and a direction to the first and the second derivative along it."""


def _ways(rule: Rule, problem: Problem) -> list[Way]:
    params = problem.params
    steps_of = getattr(rule.inner, "steps", None)
    steps = None if steps_of is None else steps_of(params)
    step = _LEAST_STEP
    if steps is not None:
        # One step for all: with factors it would be the curvature of another loss.
        longest = [jnp.max(steps.of(leaf)) for leaf in jax.tree.leaves(params)]
        step = float(max(longest, default=step))
        if rule.inner.epsilon is None:  # type: ignore[attr-defined]
            step = max(step, _LEAST_STEP)

    def by_differences(problem: Problem, direction: Tree) -> tuple[Array, Array]:
        return _differences(problem, direction, step)

    if steps is not None:
        return [by_differences]
    return [_slopes_of_slopes, by_differences]


def _draw(
    rule: Rule,
    problem: Problem,
    along: Way,
    key: Array,
) -> Array:
    """For e = l u the length l, <g, u> and uᵀHu; <g, v> and vᵀHv of signs v: [5]."""
    own, signs = jax.random.split(key)
    params = problem.params
    *_, grads = rule.estimate(own, problem)
    estimate = _tree.conjugate(grads)
    # As long as signs are: steps of differences are in units of a direction's entries.
    n = max(_tree.num_coordinates(params), 1)
    length = jnp.sqrt(_tree.inner(estimate, estimate) / n)
    scale = jnp.where(length > 0, length, 1)
    unit = jax.tree.map(lambda x: x / scale.astype(x.dtype), estimate)
    slope, second = along(problem, unit)
    tangent = Rademacher().sample(signs, params)
    tangent = jax.tree.map(lambda x: x[0], tangent)
    found = (length, slope, second, *along(problem, tangent))
    return jnp.stack([x.astype(jnp.float32) for x in found])


def _slopes_of_slopes(problem: Problem, direction: Tree) -> tuple[Array, Array]:
    """The first and the second derivative along a direction."""

    def slope(params: Tree) -> Array:
        value = lambda params: problem.objective(params)[0]  # noqa: E731
        return jax.jvp(value, (params,), (direction,))[1]

    return jax.jvp(slope, (problem.params,), (direction,))


def _differences(problem: Problem, direction: Tree, step: float) -> tuple[Array, Array]:
    """The same by three evaluations."""

    def at(time: float) -> Array:
        def moved(x: Array, v: Array) -> Array:
            return x + jnp.asarray(time, x.dtype) * v

        value, _ = problem.objective(jax.tree.map(moved, problem.params, direction))
        return value.astype(_tree.accumulation_dtype(value.dtype))

    above = at(step)
    middle = at(0.0)
    below = at(-step)
    second = (above - middle) - (middle - below)
    return (above - below) / (2 * step), second / step**2


def _summary(rows: np.ndarray) -> Curvature:
    """From [draws, 5] of `_measured`."""
    is_finite = bool(np.isfinite(rows).all())
    rows = np.where(is_finite, rows, np.nan)
    lengths, own_slopes, curvatures, slopes, traces = rows.T
    trace = float(traces.mean())
    error = _error(traces)
    gain = float(np.mean(lengths * own_slopes))
    square = float(np.mean(lengths**2))
    curvature = _weighted(curvatures, lengths**2)
    reason = None
    if not is_finite:
        reason = "not all slopes and curvatures are finite"
    elif not trace > 2 * error:
        reason = (
            f"the trace of the Hessian, {trace:.3g} ± {error:.2g}, is not positive beyond its "
            "error"
        )
    elif not curvature > _error(curvatures):
        reason = (
            f"the curvature along the rule's estimates, {curvature:.3g} ± "
            f"{_error(curvatures):.2g}, is not positive beyond its error"
        )
    elif not gain > 0:
        reason = (
            f"the rule's estimates do not point uphill: their mean slope is {gain:.3g}"
        )
    rate = gain / (square * curvature) if reason is None else None
    return Curvature(
        trace=trace,
        trace_error=error,
        gradient_squared=float(np.mean(slopes**2)),
        decrease=None if rate is None else rate * gain / 2,
        learning_rate=rate,
        reason=reason,
    )


def _weighted(values: np.ndarray, weights: np.ndarray) -> float:
    """The weighted mean, so far as it is told from the plain one beyond its error.

    Weights c² of single slopes leave a third of the draws; where they have nothing to do with the
    values, as along most directions of many parameters, the plain mean has all of them. The
    difference is shrunk as by James and Stein (1961): with many draws nothing of it is lost.
    """
    mean = float(values.mean())
    total = float(weights.sum())
    count = len(values)
    if not total > 0:
        return mean
    excess = (weights / total - 1 / count) * (values - mean)
    difference = float(excess.sum())
    variance = float(np.sum(excess**2)) * count / (count - 1)
    if not difference**2 > variance:
        return mean
    return mean + difference * (1 - variance / difference**2)


def _error(values: np.ndarray) -> float:
    """The standard error of a mean."""
    return float(values.std(ddof=1)) / math.sqrt(len(values))
