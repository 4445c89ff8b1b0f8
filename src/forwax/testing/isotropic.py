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
    """Assert that the mean over a call's k directions of v vᵀ is the identity in expectation.

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
    _check_form(
        jax.eval_shape(lambda key: tangents.sample(key, like, num_tangents), key),
        like,
        num_tangents,
    )
    specs = _tree.real_specs(like)
    sizes, n = [math.prod(spec.shape) for spec in specs], _tree.count(specs)

    def statistic(key: Array) -> Array:
        sample = tangents.sample(key, like, num_tangents)
        rows = jax.vmap(lambda v: _tree.join_flat(_tree.to_real(v)))(sample)
        second = jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST) / num_tangents
        ends = np.cumsum(sizes)
        diagonal = jnp.diagonal(second)
        lengths = [
            jnp.mean(diagonal[end - size : end]) for size, end in zip(sizes, ends, strict=True)
        ]
        return jnp.concatenate([jnp.stack([jnp.mean(diagonal), *lengths]), second.ravel()])

    checks = 1 + len(sizes)
    fail, detect = _statistics.thresholds(false_alarm, power, checks + n * n)
    draw = _statistics.sampler(statistic)
    pilot = draw(jax.random.fold_in(key, 1), _PILOT)
    num_draws = max(_PILOT, math.ceil((detect * pilot.deviation[:checks].max() / tolerance) ** 2))
    if num_draws > max_draws:
        raise ValueError(
            f"assert_isotropic: to find a deviation of {tolerance:.2%}, {num_draws} draws are "
            f"needed, more than "
            f"max_draws={max_draws}. Raise max_draws or tolerance."
        )
    drawn = draw(jax.random.fold_in(key, 2), num_draws)
    _compare(drawn, np.concatenate([np.ones(checks), np.eye(n).ravel()]), fail, _rounding(like))
    return drawn.num_draws


def _rounding(like: Tree) -> float:
    return _statistics.rounding([leaf.dtype for leaf in jax.tree.leaves(like)])


def _check_form(sample: Tree, like: Tree, num_tangents: int) -> None:
    expected = jax.tree.map(lambda x: (str(x.dtype), (num_tangents, *x.shape)), like)
    got = jax.tree.map(lambda x: (str(x.dtype), x.shape), sample)
    if expected != got:
        raise AssertionError(
            f"the directions do not have the form of the parameters: expected {expected}, got "
            f"{got}."
        )


def _compare(
    drawn: _statistics.Moments, expected: np.ndarray, fail: float, rounding: float
) -> None:
    excess = np.abs(drawn.mean - expected) - fail * drawn.error - rounding
    worst = int(np.argmax(np.where(np.isnan(excess), np.inf, excess)))
    if not excess[worst] <= 0:
        raise AssertionError(
            f"E[v vᵀ] is not the identity: expected {expected[worst]:g}, got "
            f"{drawn.mean[worst]:.5f} ± "
            f"{drawn.error[worst]:.5f} over {drawn.num_draws} draws."
        )
