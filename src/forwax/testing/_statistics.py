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
    statistic: Callable[[Array], Array],
    jit: bool = True,
) -> Callable[[Array, int], Moments]:
    """How to draw a statistic [s]: a function of a key and the number of draws.

    Each draw has a key derived from that key. Compiled once for any number of draws, which is
    rounded up to whole chunks.
    """

    @jax.jit
    def mean_and_variance(key: Array, index: np.uint32) -> tuple[Array, Array]:
        keys = jax.random.split(jax.random.fold_in(key, index), _CHUNK)
        rows = jax.vmap(statistic)(keys)  # [_CHUNK, s]
        mean = jnp.mean(rows, 0)
        variance = jnp.mean((rows - mean[None]) ** 2, 0)
        return mean, variance

    def one_by_one(key: Array, num_draws: int) -> Moments:
        keys = jax.random.split(key, num_draws)
        rows = [np.asarray(statistic(each), np.float64) for each in keys]
        return Moments(np.mean(rows, 0), np.std(rows, 0), num_draws)

    def in_chunks(key: Array, num_draws: int) -> Moments:
        num_chunks = -(-num_draws // _CHUNK)
        parts = []
        for index in range(num_chunks):
            part = mean_and_variance(key, np.uint32(index))
            parts.append(part)
        # Joined in float64: in float32 the mean over millions of draws would round.
        joined = np.asarray(jax.device_get(parts), np.float64)  # [chunks, 2, s]
        means = joined[:, 0]
        variances = joined[:, 1]
        # The variance of all draws: within the chunks plus between their means.
        deviation = np.sqrt(variances.mean(0) + means.var(0))
        return Moments(means.mean(0), deviation, num_chunks * _CHUNK)

    return in_chunks if jit else one_by_one


def thresholds(
    false_alarm: float, power: float, num_checks: int
) -> tuple[float, float]:
    """Standard errors at which a check fails, and those at which it does so with some power.

    The first keeps the chance of any false alarm among `num_checks` two-sided checks below
    `false_alarm` (Bonferroni).
    """
    each = false_alarm / (2 * num_checks)
    fail = NormalDist().inv_cdf(1 - each)
    detect = fail + NormalDist().inv_cdf(power)
    return fail, detect


def rounding(dtypes: list[np.dtype]) -> float:
    """A relative tolerance for what rounding alone can do in the coarsest of the dtypes."""
    coarsest = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
    # 100 roundings of bfloat16 are 78 %, which any estimate would pass.
    return min(0.02, 100 * coarsest)
