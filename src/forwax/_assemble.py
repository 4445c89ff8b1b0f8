"""From slopes and tangents to an estimate, leaf by leaf, also inside `jax.shard_map`.

Inside `shard_map` a replicated parameter sees every device's loss: as `jax.grad` does, the slope is
summed over the mesh axes on which the loss varies and the parameter does not. A key that varies
over an axis gives each device along it an estimate of its own, and nothing is summed there.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import Precision

from forwax import _mesh, _tree
from forwax._tree import Tree
from forwax.combine import Combine
from forwax.tangents import Tangents


@dataclasses.dataclass(frozen=True)
class Assembly:
    """The running sum Σ_j a_j v_j of one call.

    Attributes:
        tangents: the distribution, which says what can be done shard by shard.
        combine: how slopes become coefficients.
        params: the parameters, for structure, dtypes and mesh axes.
        key_axes: the mesh axes over which the key varies.
        guard: what is done to the slopes first, or None.
    """

    tangents: Tangents
    combine: Combine
    params: Tree
    key_axes: _mesh.Axes
    guard: Callable[[Array], Array] | None = None

    def start(self) -> Tree:
        """The empty sum: zeros in at least float32."""

        def zero(leaf: Array) -> Array:
            return _mesh.vary(
                jnp.zeros(leaf.shape, _tree.accumulation_dtype(leaf.dtype)),
                self._axes(leaf),
            )

        return jax.tree.map(zero, self.params)

    def add(self, total: Tree, slopes: Array, tangents: Tree) -> Tree:
        """Add the tangents [c, *shape] of a chunk, weighed by its slopes [c]."""
        self._check(_mesh.axes(slopes))
        coefficients: dict[_mesh.Axes, Array] = {}

        def add_leaf(total: Array, tangent: Array, leaf: Array) -> Array:
            over = self._axes(leaf)
            if over not in coefficients:
                summed = _mesh.total(slopes, _mesh.axes(slopes) - over)
                summed = summed if self.guard is None else self.guard(summed)
                coefficients[over] = self.combine.coefficients(summed, tangents)
            return total + weighted_sum(coefficients[over], tangent)

        return jax.tree.map(add_leaf, total, tangents, self.params)

    def finish(self, total: Tree, num_tangents: int) -> Tree:
        """The estimate in the parameters' dtypes."""
        mean_law = self.tangents.relative_mse(_tree.num_coordinates(self.params), num_tangents)
        estimate = self.combine.finish(total, num_tangents, mean_law)
        return jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), estimate, self.params)

    def _axes(self, leaf: Array) -> _mesh.Axes:
        return _mesh.axes(leaf) | self.key_axes

    def _check(self, loss_axes: _mesh.Axes) -> None:
        leaf_axes = set(map(self._axes, jax.tree.leaves(self.params)))
        sharded = any(over - loss_axes for over in leaf_axes)
        if len(leaf_axes) > 1 and not self.combine.coordinatewise:
            self._refuse("combine", self.combine, "combine.Mean()")
        if sharded and not self.combine.coordinatewise:
            self._refuse("combine", self.combine, "combine.Mean()")
        if sharded and not self.tangents.coordinatewise:
            self._refuse("tangents", self.tangents, "tangents.Rademacher()")

    def _refuse(self, field: str, value: object, instead: str) -> None:
        raise ValueError(
            f"{field}={type(value).__name__} needs all coordinates of a direction in one place, "
            f"but inside shard_map "
            f"the parameters are sharded over mesh axes that the loss sums over. Use {instead}, "
            f"which works shard by "
            "shard."
        )


def weighted_sum(coefficients: Array, tangents: Array) -> Array:
    """Σ_j a_j conj(v_j) for one leaf [c, *shape], accumulated in at least float32.

    The conjugate makes complex estimates agree with the convention of `jax.grad`.
    """
    wide = jnp.conj(tangents).astype(_tree.accumulation_dtype(tangents.dtype))
    if tangents.shape[0] == 1:
        return coefficients[0].astype(wide.dtype) * wide[0]
    return jnp.tensordot(coefficients.astype(wide.dtype), wide, axes=1, precision=Precision.HIGHEST)
