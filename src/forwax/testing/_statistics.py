"""Means, standard errors and thresholds for tests with fixed keys and a stated power."""

import dataclasses
import math
from collections.abc import Callable
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_CHUNK = 2048


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of a vector statistic over draws, accumulated in float64."""

    mean: np.ndarray
    deviation: np.ndarray
    num_draws: int

    @property
    def error(self) -> np.ndarray:
        """The standard error of the mean."""
        return self.deviation / math.sqrt(self.num_draws)


def sampler(
    statistic: Callable[[Array], Array], jit: bool = True
) -> Callable[[Array, int], Moments]:
    """How to draw a statistic [s] under keys derived from a key: a function of the key and the number of draws.

    Compiled once for any number of draws, which is rounded up to whole chunks.
    """

    @jax.jit
    def sums(key: Array, index: np.uint32) -> tuple[Array, Array]:
        rows = jax.vmap(statistic)(jax.random.split(jax.random.fold_in(key, index), _CHUNK))
        mean = jnp.mean(rows, 0)
        return mean, jnp.mean((rows - mean[None]) ** 2, 0)

    def one_by_one(key: Array, num_draws: int) -> Moments:
        rows = [np.asarray(statistic(k), np.float64) for k in jax.random.split(key, num_draws)]
        return Moments(np.mean(rows, 0), np.std(rows, 0), num_draws)

    def in_chunks(key: Array, num_draws: int) -> Moments:
        num_chunks = -(-num_draws // _CHUNK)
        parts = [sums(key, np.uint32(index)) for index in range(num_chunks)]
        means, variances = (
            np.asarray(jax.device_get(part), np.float64) for part in zip(*parts, strict=True)
        )
        # The variance of all draws: within the chunks plus between their means.
        return Moments(
            means.mean(0), np.sqrt(variances.mean(0) + means.var(0)), num_chunks * _CHUNK
        )

    return in_chunks if jit else one_by_one


def thresholds(false_alarm: float, power: float, num_checks: int) -> tuple[float, float]:
    """Standard errors at which a check fails, and those at which it has failed with probability `power`.

    The first keeps the chance of any false alarm among `num_checks` two-sided checks below
    `false_alarm` (Bonferroni).
    """
    fail = NormalDist().inv_cdf(1 - false_alarm / (2 * num_checks))
    return fail, fail + NormalDist().inv_cdf(power)


def rounding(dtypes: list[np.dtype]) -> float:
    """A relative tolerance for what rounding alone can do in the coarsest of the dtypes."""
    return min(0.02, 100 * max(float(jnp.finfo(dtype).eps) for dtype in dtypes))
