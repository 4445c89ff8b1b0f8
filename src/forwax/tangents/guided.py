"""Directions led by a guess of the gradient: exact along the guess, orthonormal around it.

The unbiased form of guess directions (Fournier et al. 2023, "Can Forward Gradient Match
Backpropagation?").
"""

# pyright: strict, reportUnknownMemberType=false

import dataclasses
import math
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _tree
from forwax._tree import Spec, Tree
from forwax.tangents._base import Tangents
from forwax.tangents.coordinate import check_at_most


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Guided(Tangents):
    """√k·ĥ along the unit guess ĥ first, then orthonormal directions around it.

    They are √(k(n-1)/(k-1))·q_j, with k - 1 orthonormal q_j in the complement of ĥ. The mean over
    the k tangents has relative MSE ((n-1)/(k-1) - 1)(1 - cos²(g, h)): nothing is lost along the
    guess. A guess of zero, or one that is not finite, is replaced by a random direction.

    Attributes:
        guess: a pytree like the parameters, in the convention of `jax.grad`: a past estimate, a
            running mean, the gradient of a cheaper loss. It must not depend on this call's noise.

    Raises:
        ValueError: when k < 2 (the guess alone is a biased estimate) or k > n, or when the guess
            does not have the parameters' shapes.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> guess = jnp.array([0.0, 3.0, 0.0])
        >>> v = fx.tangents.Guided(guess).sample(jax.random.key(0), jnp.zeros(3), num_tangents=2)
        >>> bool(jnp.allclose(jnp.abs(v[0]), jnp.array([0.0, 2**0.5, 0.0]), atol=1e-5))
        True
    """

    guess: Tree

    def check(self, n: int, num_tangents: int) -> None:
        """Raise a ValueError when k < 2 or k > n."""
        if num_tangents < 2 and n > 1:
            raise ValueError(
                "tangents.Guided needs num_tangents >= 2: the first direction is the guess, which "
                f"alone gives a biased estimate; got num_tangents={num_tangents}."
            )
        check_at_most(num_tangents, n, "Guided(guess)")

    def draw(
        self,
        key: Array,
        specs: Sequence[Spec],
        num_tangents: int,
    ) -> list[Array]:
        """Draw all directions of one call."""
        n = _tree.count(specs)
        guide = self._guide(specs)
        # A frame [n, k] whose first column is the guess: Q keeps it, up to its sign.
        normal = jax.random.normal(key, (n, num_tangents), guide.dtype)
        norm = cast(Array, jnp.linalg.norm(guide))
        is_usable = jnp.isfinite(norm) & (norm > 0)
        first = jnp.where(
            is_usable, guide / jnp.where(is_usable, norm, 1), normal[:, 0]
        )
        frame = jnp.linalg.qr(normal.at[:, 0].set(first))[0]
        directions = frame.T
        scales = self._scales(n, num_tangents, frame.dtype)
        return _tree.split_flat(directions * scales[:, None], specs)

    def _guide(self, specs: Sequence[Spec]) -> Array:
        """The guess as one direction [n]."""
        guess = jax.tree.map(_tree.as_array, self.guess)
        leaves = _tree.to_real(_tree.conjugate(guess))
        _tree.check_guess(
            "tangents.Guided",
            got=[leaf.shape for leaf in leaves],
            expected=[spec.shape for spec in specs],
        )
        return _tree.join_flat(leaves).astype(_tree.common_dtype(specs))

    def _scales(self, n: int, k: int, dtype: jnp.dtype) -> Array:
        """Factors [k] with which the mean of v vᵀ is I: the guess counts once in k directions."""
        # On average the k - 1 others span a share (k - 1)/(n - 1) of what they stand for.
        around = math.sqrt(k * (n - 1) / (k - 1)) if k > 1 else 0.0
        return jnp.full((k,), around, dtype).at[0].set(math.sqrt(k))

    def relative_mse(self, n: int, num_tangents: int) -> float:
        """(n-1)/(k-1) - 1: the law for a guess orthogonal to the gradient, a bound for others."""
        return (n - 1) / (num_tangents - 1) - 1 if num_tangents > 1 else float(n > 1)
