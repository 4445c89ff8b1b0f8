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


def moments(statistic: Callable[[Array], Array], key: Array, num_draws: int, jit: bool) -> Moments:
    """Draw a statistic [s] under keys split from `key`; `num_draws` is rounded up to whole chunks."""
    if not jit:
        rows = [np.asarray(statistic(k), np.float64) for k in jax.random.split(key, num_draws)]
        return Moments(np.mean(rows, 0), np.std(rows, 0), num_draws)
    num_chunks = -(-num_draws // _CHUNK)

    @jax.jit
    def sums(chunk_key: Array) -> tuple[Array, Array]:
        rows = jax.vmap(statistic)(jax.random.split(chunk_key, _CHUNK))
        mean = jnp.mean(rows, 0)
        return mean, jnp.mean((rows - mean[None]) ** 2, 0)

    parts = [sums(k) for k in jax.random.split(key, num_chunks)]
    means, variances = (np.asarray(jax.device_get(part), np.float64) for part in zip(*parts, strict=True))
    # The variance of all draws: within the chunks plus between their means.
    return Moments(means.mean(0), np.sqrt(variances.mean(0) + means.var(0)), num_chunks * _CHUNK)


def thresholds(false_alarm: float, power: float, num_checks: int) -> tuple[float, float]:
    """Standard errors at which a check fails, and those at which it has failed with probability `power`.

    The first keeps the chance of any false alarm among `num_checks` two-sided checks below `false_alarm` (Bonferroni).
    """
    fail = NormalDist().inv_cdf(1 - false_alarm / (2 * num_checks))
    return fail, fail + NormalDist().inv_cdf(power)


def rounding(dtypes: list[np.dtype]) -> float:
    """A relative tolerance for what rounding alone can do in the coarsest of the dtypes."""
    return min(0.02, 100 * max(float(jnp.finfo(dtype).eps) for dtype in dtypes))
