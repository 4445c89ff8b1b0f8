"""Do directions have E[v vᵀ] = I? That is all an unbiased estimate asks of them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from forwax import _tree
from forwax._tree import Tree
from forwax.tangents import Tangents
from forwax.testing import _statistics

_PILOT = 2048


def assert_isotropic(
    tangents: Tangents,
    like: Tree,
    num_tangents: int = 1,
    *,
    key: Array | None = None,
    tolerance: float = 0.01,
    power: float = 0.99,
    false_alarm: float = 1e-6,
    max_draws: int = 4_000_000,
) -> int:
    """Assert that the mean of v vᵀ over a call's k directions is the identity in expectation.

    Checks every entry of the n × n matrix and, with enough draws to find a deviation of `tolerance`
    with probability `power`, the mean squared length E|v|² / n = 1, over all coordinates and over
    each leaf.

    Args:
        tangents: the distribution under test.
        like: a pytree of arrays; keep n small, since n² entries are averaged.
        num_tangents: the number k of directions of a call.
        key: PRNG key; `jax.random.key(0)` by default.
        tolerance: the relative deviation of the squared length to be found.
        power: the probability with which it is found.
        false_alarm: the probability that isotropic directions fail any check.
        max_draws: the most draws.

    Returns:
        The number of draws made.

    Raises:
        AssertionError: when the directions are not isotropic, or do not have the shapes and dtypes
            of `like`.
        ValueError: when `max_draws` are too few for the wanted power.

    Example:
        >>> import jax.numpy as jnp, forwax as fx
        >>> fx.testing.assert_isotropic(fx.tangents.Rademacher(), jnp.zeros(4))
        2048
    """
    key = jax.random.key(0) if key is None else key
    drawn_form = jax.eval_shape(
        lambda key: tangents.sample(key, like, num_tangents), key
    )
    _check_form(drawn_form, like, num_tangents)
    specs = _tree.real_specs(like)
    n = _tree.count(specs)

    def statistic(key: Array) -> Array:
        """The mean squared length, that of each leaf, and the n × n second moments."""
        sample = tangents.sample(key, like, num_tangents)
        rows = jax.vmap(lambda v: _tree.join_flat(_tree.to_real(v)))(sample)  # [k, n]
        second = (
            jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST) / num_tangents
        )
        diagonal = jnp.diagonal(second)
        lengths = [jnp.mean(diagonal)]
        start = 0
        for spec in specs:
            end = start + math.prod(spec.shape)
            lengths.append(jnp.mean(diagonal[start:end]))
            start = end
        return jnp.concatenate([jnp.stack(lengths), second.ravel()])

    num_lengths = 1 + len(specs)
    fail, detect = _statistics.thresholds(false_alarm, power, num_lengths + n * n)
    draw = _statistics.sampler(statistic)
    pilot = draw(jax.random.fold_in(key, 1), _PILOT)
    # The standard error falls with the root of the draws.
    wanted = (detect * pilot.deviation[:num_lengths].max() / tolerance) ** 2
    num_draws = max(_PILOT, math.ceil(wanted))
    if num_draws > max_draws:
        raise ValueError(
            f"assert_isotropic: to find a deviation of {tolerance:.2%}, {num_draws} draws are "
            f"needed, more than max_draws={max_draws}. Raise max_draws or tolerance."
        )
    # Draws of their own: the pilot's chose how many there are.
    drawn = draw(jax.random.fold_in(key, 2), num_draws)
    expected = np.concatenate([np.ones(num_lengths), np.eye(n).ravel()])
    rounding = _statistics.rounding([leaf.dtype for leaf in jax.tree.leaves(like)])
    _compare(drawn, expected, fail, rounding)
    return drawn.num_draws


def _check_form(sample: Tree, like: Tree, num_tangents: int) -> None:
    expected = jax.tree.map(lambda x: (str(x.dtype), (num_tangents, *x.shape)), like)
    got = jax.tree.map(lambda x: (str(x.dtype), x.shape), sample)
    if expected != got:
        raise AssertionError(
            "the directions do not have the form of the parameters: "
            f"expected {expected}, got {got}."
        )


def _compare(
    drawn: _statistics.Moments,
    expected: np.ndarray,
    fail: float,
    rounding: float,
) -> None:
    excess = np.abs(drawn.mean - expected) - fail * drawn.error - rounding
    # Not a number is the worst of all, though it compares as no excess.
    worst = int(np.argmax(np.where(np.isnan(excess), np.inf, excess)))
    if not excess[worst] <= 0:
        raise AssertionError(
            f"E[v vᵀ] is not the identity: expected {expected[worst]:g}, got "
            f"{drawn.mean[worst]:.5f} ± {drawn.error[worst]:.5f} over {drawn.num_draws} draws."
        )
