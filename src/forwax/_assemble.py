"""From slopes and tangents to an estimate, leaf by leaf, also inside `jax.shard_map`.

Inside `shard_map` a replicated parameter sees every device's loss: as `jax.grad` does, the slope is
summed over the mesh axes on which the loss varies and the parameter does not. A key that varies
over an axis gives each device along it an estimate of its own, and nothing is summed there.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _mesh, _tree
from forwax._tree import Tree
from forwax.combine import Combine
from forwax.tangents import Tangents


@dataclasses.dataclass(frozen=True)
class Weighing:
    """How the slopes of one call become the weights of its directions' sum Σ_j a_j v_j.

    Attributes:
        tangents: the distribution, which says what can be done shard by shard.
        combine: how slopes become coefficients.
        params: the parameters, for structure, dtypes and mesh axes.
        key_axes: the mesh axes over which the key varies.
    """

    tangents: Tangents
    combine: Combine
    params: Tree
    key_axes: _mesh.Axes

    def start(self) -> Tree:
        """The empty sum: zeros in at least float32."""

        def zero(leaf: Array) -> Array:
            dtype = _tree.accumulation_dtype(leaf.dtype)
            zeros = jnp.zeros(leaf.shape, dtype)
            return _mesh.vary(zeros, self._axes(leaf))

        return jax.tree.map(zero, self.params)

    def weights(self, slopes: Array, tangents: Tree) -> Tree:
        """For each leaf the weights [c] of its tangents [c, *shape], from the slopes [c].

        Leaves that vary over the same mesh axes share theirs.
        """
        loss_axes = _mesh.axes(slopes)
        self._check(loss_axes)
        coefficients: dict[_mesh.Axes, Array] = {}

        def of_leaf(leaf: Array) -> Array:
            over = self._axes(leaf)
            if over not in coefficients:
                # as in `jax.grad`: a replicated leaf sees every device's loss
                summed = _mesh.total(slopes, loss_axes - over)
                coefficients[over] = self.combine.coefficients(summed, tangents)
            return coefficients[over]

        return jax.tree.map(of_leaf, self.params)

    def scale(self, num_tangents: int) -> float:
        """What a coordinatewise combination multiplies the sum with."""
        law = self._mean_law(num_tangents)
        return self.combine.finish(1.0, num_tangents, law)

    def finish(self, total: Tree, num_tangents: int) -> Tree:
        """The estimate in the parameters' dtypes."""
        law = self._mean_law(num_tangents)
        estimate = self.combine.finish(total, num_tangents, law)
        return self.cast(estimate)

    def cast(self, estimate: Tree) -> Tree:
        """An estimate in the parameters' dtypes."""
        own = lambda x, leaf: x.astype(leaf.dtype)  # noqa: E731
        return jax.tree.map(own, estimate, self.params)

    def _mean_law(self, num_tangents: int) -> float:
        """The relative MSE of the plain mean."""
        n = _tree.num_coordinates(self.params)
        return self.tangents.relative_mse(n, num_tangents) if n else 0.0

    def _axes(self, leaf: Array) -> _mesh.Axes:
        return _mesh.axes(leaf) | self.key_axes

    def _check(self, loss_axes: _mesh.Axes) -> None:
        leaves = jax.tree.leaves(self.params)
        leaf_axes = {self._axes(leaf) for leaf in leaves}
        # the loss is then summed over axes along which each device has a part of the leaf
        sharded = any(over - loss_axes for over in leaf_axes)
        if (sharded or len(leaf_axes) > 1) and not self.combine.coordinatewise:
            self._refuse("combine", self.combine, "combine.Mean()")
        if sharded and not self.tangents.coordinatewise:
            self._refuse("tangents", self.tangents, "tangents.Rademacher()")

    def _refuse(
        self,
        field: str,
        value: object,
        instead: str,
    ) -> None:
        raise ValueError(
            f"{field}={type(value).__name__} needs all coordinates of a direction in one place, "
            "but inside shard_map the parameters are sharded over mesh axes that the loss sums "
            f"over. Use {instead}, which works shard by shard."
        )
