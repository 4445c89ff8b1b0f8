"""How k slopes and tangents become one estimate.

Every combination is linear in the tangents: ĝ = offset + Σ_j a_j v_j with coefficients a_j that it
computes from the slopes c_j = <g, v_j>. Inner products, slopes and sums are taken in at least
float32 over one flat vector of all differentiated leaves.
"""

# pyright: strict, reportUnknownMemberType=false

import abc
import dataclasses
from typing import ClassVar, cast

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _tree
from forwax._tree import Tree


class Combine(abc.ABC):
    """How the slopes of k tangents weigh them in the estimate."""

    joint: ClassVar[bool] = False
    """Whether the coefficients of one tangent depend on the others, so that all k must be held."""

    coordinatewise: ClassVar[bool] = False
    """Whether coefficients depend on slopes alone: each shard of a parameter can apply its own."""

    unbiased: ClassVar[bool] = True
    """Whether the estimate is unbiased when the tangents are."""

    @abc.abstractmethod
    def coefficients(self, slopes: Array, tangents: Tree) -> Array:
        """The coefficients a_j [c] of Σ_j a_j v_j: slopes are [c], tangents a tree [c, *shape]."""

    @abc.abstractmethod
    def finish(
        self,
        total: Tree,
        num_tangents: int,
        relative_mse: float,
    ) -> Tree:
        """The estimate from the sum over all tangents; `relative_mse` is the law of the mean."""

    @abc.abstractmethod
    def relative_mse(self, mean: float, n: int, num_tangents: int) -> float:
        """The relative MSE of this combination, given that of the plain mean."""

    def learning_rate_scale(self, mean: float) -> float:
        """E<ĝ, g> / E|ĝ|², the scale of the estimate that brings it closest to the gradient."""
        return 1 / (1 + mean)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean(Combine):
    """ĝ = mean_j c_j v_j: unbiased.

    Its relative MSE is the tangents' own law, see `forwax.tangents`.

    Example:
        >>> import forwax as fx
        >>> fx.WeightPerturbation(num_tangents=8, combine=fx.combine.Mean()).relative_mse(n=81)
        10.0
    """

    coordinatewise: ClassVar[bool] = True

    def coefficients(self, slopes: Array, tangents: Tree) -> Array:
        """The slopes themselves."""
        return slopes

    def finish(
        self,
        total: Tree,
        num_tangents: int,
        relative_mse: float,
    ) -> Tree:
        """The sum divided by k."""
        return _divided(total, num_tangents)

    def relative_mse(self, mean: float, n: int, num_tangents: int) -> float:
        """That of the tangents."""
        return mean


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shrinkage(Combine):
    """ĝ = mean_j c_j v_j / (1 + M), with M the relative MSE of the mean: the scale of least error.

    Relative MSE M / (1 + M); biased towards zero by the factor 1 / (1 + M).

    Example:
        >>> import forwax as fx
        >>> fx.WeightPerturbation(num_tangents=8, combine=fx.combine.Shrinkage()).relative_mse(n=25)
        0.75
    """

    coordinatewise: ClassVar[bool] = True
    unbiased: ClassVar[bool] = False

    def coefficients(self, slopes: Array, tangents: Tree) -> Array:
        """The slopes themselves."""
        return slopes

    def finish(
        self,
        total: Tree,
        num_tangents: int,
        relative_mse: float,
    ) -> Tree:
        """The mean times 1 / (1 + M)."""
        return _divided(total, num_tangents * (1 + relative_mse))

    def relative_mse(self, mean: float, n: int, num_tangents: int) -> float:
        """M / (1 + M)."""
        return mean / (1 + mean)

    def learning_rate_scale(self, mean: float) -> float:
        """1: the estimate is scaled already."""
        return 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projection(Combine):
    """ĝ = V (VᵀV)⁻¹ Vᵀ g, the gradient projected on the span of the tangents.

    This is FROG of Flügel et al. 2024. Relative MSE 1 - k/n for tangents in general position; the
    mean is (k/n) g, and the estimate is never longer than g, so that backprop's learning rate
    serves as it is. Holds all k tangents.

    The k × k Gram matrix of the tangents, scaled to unit length, is factored by Cholesky after 8 k
    ε is added to its diagonal, with ε the rounding unit of its dtype. The guard changes an estimate
    from well separated tangents by a relative 8 k ε, and keeps dependent ones (duplicates, k > n,
    zeros) finite and the estimate in their span.

    Example:
        >>> import forwax as fx
        >>> rule = fx.WeightPerturbation(num_tangents=25, combine=fx.combine.Projection())
        >>> rule.relative_mse(n=100)
        0.75
    """

    joint: ClassVar[bool] = True
    unbiased: ClassVar[bool] = False

    def coefficients(self, slopes: Array, tangents: Tree) -> Array:
        """(VᵀV)⁻¹ c by a guarded Cholesky factorisation."""
        gram = _tree.gram(tangents, tangents)
        squares = cast(Array, jnp.diagonal(gram))
        length = jnp.sqrt(squares)
        # A tangent of zeros has no direction: its row and column of the system become the unit's.
        unit = jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0)
        rounding = cast(float, jnp.finfo(gram.dtype).eps)
        guard = 8 * gram.shape[0] * rounding
        # At unit length one guard suits tangents of any scale.
        cosines = gram * unit[:, None] * unit[None, :]
        system = cosines + jnp.diag(jnp.where(length > 0, guard, 1))
        factor = jax.scipy.linalg.cho_factor(system, lower=True)
        per_length = unit * slopes.astype(gram.dtype)
        is_finite = jnp.isfinite(per_length)
        identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
        known = jnp.where(is_finite, per_length, 0)
        both = jnp.concatenate([known[:, None], identity], axis=1)
        solved = jax.scipy.linalg.cho_solve(factor, both)
        inverse = solved[:, 1:]
        # A slope that is not finite spoils the tangents that it is mixed with, and no others.
        is_spoilt = ~is_finite[None, :] & (inverse != 0)
        spoilt = jnp.where(is_spoilt, inverse * per_length[None, :], 0)
        return unit * (solved[:, 0] + jnp.sum(spoilt, axis=1))

    def finish(
        self,
        total: Tree,
        num_tangents: int,
        relative_mse: float,
    ) -> Tree:
        """The sum itself."""
        return total

    def relative_mse(self, mean: float, n: int, num_tangents: int) -> float:
        """1 - k/n, and 0 from k = n on."""
        return max(0.0, 1 - num_tangents / n)

    def learning_rate_scale(self, mean: float) -> float:
        """1: a projection is never longer than the gradient."""
        return 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ControlVariate(Combine):
    """ĝ = h + mean_j (c_j - <h, v_j>) v_j: only what the guess h misses is estimated.

    Unbiased for any h that does not depend on the tangents; relative MSE M |g - h|² / |g|², where M
    is the law of the mean, so that it helps exactly when |g - h| < |g|.

    Attributes:
        guess: a pytree like the parameters, in the convention of `jax.grad`.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> rule = fx.WeightPerturbation(combine=fx.combine.ControlVariate(jnp.array([2.0, 4.0])))
        >>> grad = fx.grad(lambda x: jnp.sum(x**2), rule)
        >>> grad(jax.random.key(0), jnp.array([1.0, 2.0])).tolist()
        [2.0, 4.0]
    """

    guess: Tree

    def coefficients(self, slopes: Array, tangents: Tree) -> Array:
        """c_j - <h, v_j>."""
        guess = _tree.conjugate(jax.tree.map(_tree.as_array, self.guess))
        _tree.check_guess(
            "combine.ControlVariate",
            got=[x.shape for x in jax.tree.leaves(guess)],
            expected=[x.shape[1:] for x in jax.tree.leaves(tangents)],
        )

        def known_slope(tangent: Tree) -> Array:
            return _tree.inner(guess, tangent)

        # [c]: what the guess explains of each slope
        known = jax.vmap(known_slope)(tangents)
        return slopes - known.astype(slopes.dtype)

    def finish(
        self,
        total: Tree,
        num_tangents: int,
        relative_mse: float,
    ) -> Tree:
        """The guess plus the mean."""
        pairs = zip(jax.tree.leaves(self.guess), jax.tree.leaves(total), strict=True)
        wide = [(_tree.as_array(guess).astype(x.dtype), x) for guess, x in pairs]
        leaves = [guess + x / num_tangents for guess, x in wide]
        return _tree.with_leaves(total, leaves)

    def relative_mse(self, mean: float, n: int, num_tangents: int) -> float:
        """That of the mean, which is the law for a guess of zero."""
        return mean


def _divided(total: Tree, divisor: float) -> Tree:
    leaves = [x / divisor for x in jax.tree.leaves(total)]
    return _tree.with_leaves(total, leaves)
