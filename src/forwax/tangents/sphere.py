"""Directions uniform on the sphere of radius √n."""

# pyright: strict, reportUnknownMemberType=false

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _tree
from forwax._tree import Spec
from forwax.tangents._base import IndependentTangents
from forwax.tangents.normal import normal_leaves


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sphere(IndependentTangents):
    """v = √n · w / |w| with normal w: uniform on the sphere of radius √n over all leaves together.

    Relative MSE of the mean over k tangents: (n - 1) / k, as for signs, and the same for every
    gradient's direction.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> v = fx.tangents.Sphere().sample(jax.random.key(0), jnp.zeros(25))
        >>> bool(jnp.isclose(jnp.linalg.norm(v), 5.0))
        True
    """

    def draw_one(self, key: Array, specs: Sequence[Spec]) -> list[Array]:
        """Draw one direction of norm √n."""
        wide_specs = [
            Spec(spec.shape, _tree.accumulation_dtype(spec.dtype)) for spec in specs
        ]
        leaves = normal_leaves(key, wide_specs)
        square = _tree.inner(leaves, leaves)
        scale = jnp.sqrt(_tree.count(specs) / square)
        return [
            (leaf * scale).astype(
                spec.dtype
            )  # its length is known before it is rounded
            for leaf, spec in zip(leaves, specs, strict=True)
        ]

    def relative_mse(self, n: int, num_tangents: int) -> float:
        """(n - 1) / k."""
        return (n - 1) / num_tangents
