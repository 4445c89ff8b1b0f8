"""Directions that are arrays, along which `jax.jvp` pushes the loss itself."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _mesh, _tree
from forwax._directions.add import FEW, sum_where_moved
from forwax._directions.direction import Unpacked
from forwax._directions.rounding import NEAREST, Rounding
from forwax._directions.steps import Steps
from forwax._programs.still import with_still_entries
from forwax._pushforward import Objective, is_concrete, over_tangents
from forwax._signature import Problem
from forwax._tree import Tree, added


def basis_vectors(params: Tree) -> Callable[[Array], Tree]:
    """Takes indices [c] to the basis vectors of all real coordinates, as directions [c, *shape]."""
    specs = _tree.real_specs(params)
    axes = jax.tree.unflatten(jax.tree.structure(params), _mesh.tree_axes(params))

    def draw(indices: Array) -> Tree:
        row = lambda index: _tree.basis(index, specs)  # noqa: E731
        rows = jax.vmap(row)(indices)  # [c, *shape] of each real leaf
        directions = _tree.from_real(rows, params, lead=1)
        return jax.tree.map(_mesh.vary, directions, axes)

    return draw


@dataclasses.dataclass(frozen=True, eq=False)
class InFull:
    """Directions that are trees like the parameters, with a leading axis: drawn and added.

    Attributes:
        point: the parameters.
        source: takes a key to a function from indices [c] to directions [c, *shape].
        has_zeros: whether most entries of a direction are 0: these have no part in its slope or in
            the sum, though a derivative or another slope is not finite.
        examples: how many examples have directions of their own; None where all share them.
    """

    point: Tree
    source: Callable[[Array], Callable[[Array], Tree]]
    has_zeros: bool = False
    examples: int | None = None

    @property
    def num_examples(self) -> int:
        """See `Directions.num_examples`."""
        return self.examples or 1

    @property
    def together(self) -> int:
        """See `Directions.together`; each is as large as the parameters."""
        return 1

    def sampler(self, key: Array) -> Callable[[Array], Tree]:
        """See `Directions.sampler`."""
        return self.source(key)

    def tree_of(self, leaves: Sequence[Array]) -> Tree:
        """Leaves as a tree like the parameters."""
        return _tree.with_leaves(self.point, leaves)

    def assemble(self, weights: Any, drawn: Tree) -> Tree:
        """Σ c v in at least float32: weights [k], the same or one array for each leaf."""

        def of_leaf(
            leaf: Array,
            v: Array,
            c: Array,
        ) -> Array:
            if self.has_zeros:
                return sum_where_moved(c, v)
            return Unpacked(v).sum(c, leaf)

        by_leaf = self._by_leaf(weights)
        return jax.tree.map(of_leaf, self.point, drawn, by_leaf)

    def add(
        self,
        total: Tree,
        weights: Any,
        drawn: Tree,
        rounding: Rounding = NEAREST,
        steps: Steps | None = None,
    ) -> Tree:
        """Total + Σ c v, in place where it is donated; see `assemble` and `WeightPlan.add`."""
        if steps is not None:
            drawn = jax.tree.map(steps.divided, total, drawn)

        def of_leaf(leaf: Array, v: Array, c: Array, own: Rounding) -> Array:
            if not self.has_zeros:
                return Unpacked(v).add(leaf, c, own)
            change = sum_where_moved(c, v)
            return own.cast(leaf.astype(change.dtype) + change, leaf.dtype)

        by_leaf = self._by_leaf(weights)
        parts = zip(*map(jax.tree.leaves, (total, drawn, by_leaf)), strict=True)
        leaves = [
            of_leaf(leaf, v, c, rounding.of(i)) for i, (leaf, v, c) in enumerate(parts)
        ]
        return _tree.with_leaves(total, leaves)

    def _by_leaf(self, weights: Any) -> Tree:
        if isinstance(weights, Array):  # one for all leaves
            return jax.tree.map(lambda _: weights, self.point)
        return weights


@dataclasses.dataclass(frozen=True, eq=False)
class Formed(InFull):
    """Directions in full of any loss.

    Attributes:
        objective: takes the parameters to `(value, aux)`, a real scalar and a tree of arrays.
    """

    objective: Objective = dataclasses.field(kw_only=True)

    @property
    def most_held(self) -> int:
        """See `Directions.most_held`."""
        return FEW

    @property
    def is_concrete(self) -> bool:
        """See `Directions.is_concrete`."""
        return is_concrete(self.point)

    def at(self, point: Tree) -> "Formed":
        """The same loss at another point."""
        return dataclasses.replace(self, point=point)

    def push(self, drawn: Tree, num_tangents: int) -> tuple[Array, Tree, Array]:
        """`(value, aux, slopes [k])`, the slopes in at least float32."""
        if not self.has_zeros:
            return self._push(self.objective, drawn, num_tangents)
        if self.is_concrete:
            # Such a loss may branch on values, so that it is traced only where it must be.
            out = self._push(self.objective, drawn, num_tangents)
            if jnp.all(jnp.isfinite(out[-1])):
                return out
        still = with_still_entries(self.objective, self.point)
        return self._push(still, drawn, num_tangents)

    def _push(
        self, objective: Objective, drawn: Tree, num_tangents: int
    ) -> tuple[Array, Tree, Array]:
        def slope(direction: Tree) -> tuple[Array, tuple[Array, Tree]]:
            value, slope, aux = jax.jvp(
                objective,
                (self.point,),
                (direction,),
                has_aux=True,
            )
            # the primal stays unbatched: it is evaluated once for all directions
            return slope, (value, aux)

        slopes, shared = over_tangents(slope, drawn, num_tangents, check=True)
        value, aux = shared
        dtype = _tree.accumulation_dtype(slopes.dtype)
        return value, aux, slopes.astype(dtype)

    def evaluate(
        self, direction: Tree, sign: Array, steps: Steps
    ) -> tuple[Array, Tree]:
        """`(value, aux)` on one side of the point along one direction."""
        shifted = lambda x, v: steps.shifted(x, v, sign)  # noqa: E731
        return self.objective(jax.tree.map(shifted, self.point, direction))

    def by_examples(self, problem: Problem) -> "FormedByExample":
        """The same directions for all, along which each example has slopes of its own."""
        return FormedByExample(
            self.point,
            self.source,
            self.has_zeros,
            objective=self.objective,
            problem=problem,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class FormedByExample(Formed):
    """Directions in full along which each example of `in_axes` has slopes of its own.

    They are shared, [c, *shape], or each example's own, [c, examples, *shape].

    Attributes:
        problem: the loss of one example, and the examples.
        summed: the mesh axes over which the losses are each device's part of the user's.
    """

    problem: Problem = dataclasses.field(kw_only=True)
    summed: _mesh.Axes = frozenset()

    def push(self, drawn: Tree, num_tangents: int) -> tuple[Array, Tree, Array]:
        """`(value, aux, slopes [k, examples])`, the slopes in at least float32."""

        def slope(mapped: list[Array], direction: Tree) -> tuple[Array, Array, Tree]:
            def loss(params: Tree) -> tuple[Array, Tree]:
                parts, aux = self.problem.example(params, *mapped)
                return added([jnp.sum(part) for part in parts]), aux

            return jax.jvp(loss, (self.point,), (direction,), has_aux=True)

        mapped = list(self.problem.mapped)
        own = None if self.examples is None else 0
        axes = (list(self.problem.mapped_axes), own)
        each = jax.vmap(slope, axes, axis_size=self.problem.num_examples)

        def of_tangent(direction: Tree) -> tuple[Array, tuple[Array, Tree]]:
            values, slopes, aux = each(mapped, direction)
            return slopes, (values, aux)

        slopes, shared = over_tangents(of_tangent, drawn, num_tangents)
        values, aux = shared
        dtype = _tree.accumulation_dtype(slopes.dtype)
        value = _mesh.total(jnp.mean(values), self.summed)
        return value, aux, slopes.astype(dtype)
