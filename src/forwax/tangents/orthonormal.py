"""Directions that are orthogonal to each other: none repeats what another has measured."""

# pyright: strict, reportUnknownMemberType=false

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _tree
from forwax._tree import Spec
from forwax.tangents._base import Tangents
from forwax.tangents.coordinate import check_at_most


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Orthonormal(Tangents):
    """k orthonormal directions, uniform among all such frames, each scaled by √n.

    Relative MSE of the mean over k tangents: n/k - 1; exact at k = n. Holds all k directions and an
    n × k factorisation, 4nk² flops.

    Raises:
        ValueError: when k > n.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> v = fx.tangents.Orthonormal().sample(jax.random.key(0), jnp.zeros(4), num_tangents=2)
        >>> bool(jnp.allclose(v @ v.T, 4 * jnp.eye(2), atol=1e-5))
        True
    """

    def check(self, n: int, num_tangents: int) -> None:
        """Raise a ValueError when k > n."""
        check_at_most(num_tangents, n, "Orthonormal()")

    def draw(
        self,
        key: Array,
        specs: Sequence[Spec],
        num_tangents: int,
    ) -> list[Array]:
        """Draw all directions of one call."""
        n = _tree.count(specs)
        normal = jax.random.normal(key, (n, num_tangents), _tree.common_dtype(specs))
        # Q of normals is uniform among frames [n, k].
        frame = jnp.linalg.qr(normal)[0]
        return _tree.split_flat(math.sqrt(n) * frame.T, specs)

    def relative_mse(self, n: int, num_tangents: int) -> float:
        """n/k - 1."""
        return n / num_tangents - 1
