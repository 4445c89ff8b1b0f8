"""Directions of signs that a traced loss forms where it uses them.

In factors, or a layer at a time.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, cast

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _mesh, _tree
from forwax._directions.direction import Direction
from forwax._directions.drawing import Drawing, Drawn
from forwax._directions.push import Push
from forwax._directions.signs import has_rows
from forwax._directions.splits import Split, default_split, find_splits, sliced_only
from forwax._directions.steps import Steps
from forwax._programs.custom_rules import reads_its_trace
from forwax._programs.evaluate import inject
from forwax._programs.program import Traced
from forwax._programs.tracing import trace
from forwax._pushforward import along, over_tangents
from forwax._signature import Problem
from forwax._tree import Tree
from forwax.tangents import LowRank, Tangents

_MANY = 1 << 12
"""So many signs of one row are drawn in the loop; fewer would make it slower, and save little."""


@dataclasses.dataclass(frozen=True, eq=False)
class WeightPlan(Drawing):
    """How each parameter's tangent is made, and the program that it is pushed through.

    Attributes:
        problem: the loss and the examples.
        traced: the loss of the whole batch, or of one example.
        by_example: whether each example has slopes of its own, so that it is that of one.
        summed: the mesh axes over which the losses are each device's part of the user's.
    """

    problem: Problem = dataclasses.field(kw_only=True)
    traced: Traced = dataclasses.field(kw_only=True)
    by_example: bool = False
    summed: _mesh.Axes = frozenset()

    in_loop: ClassVar[bool] = False

    @property
    def point(self) -> list[Array]:
        """See `Directions.point`."""
        return self.leaves

    @property
    def most_held(self) -> int | None:
        """See `Directions.most_held`; packed or thin they are small."""
        return None

    @property
    def is_concrete(self) -> bool:
        """See `Directions.is_concrete`; the loss is traced already."""
        return False

    def later(self) -> Sequence[bool]:
        """For each spec whether its words, if many, are drawn in the scan that runs over it."""
        specs = self.specs()
        if not self.lazy:
            return [False] * len(specs)
        pairs = zip(specs, self.sliced(), strict=True)
        return [sliced and has_rows(spec, _MANY) for spec, sliced in pairs]

    def sliced(self) -> list[bool]:
        """For each spec whether scans slice its parameter, and nothing else uses it."""
        program = self.traced.program
        parameters = self.traced.parameters
        sliced: list[bool] = []
        for variable, split in zip(parameters, self.splits, strict=True):
            num_specs = 1 if split is None else 2 * self.rank
            is_sliced = sliced_only(program, variable)
            sliced += [is_sliced] * num_specs
        return sliced

    def push(
        self, drawn: Sequence[Drawn], num_tangents: int
    ) -> tuple[Array, Tree, Array]:
        """`(value, aux, slopes)`, the slopes [k] or, for each example, [k, N]."""

        def slope(
            mapped: Sequence[Array], drawn: Sequence[Drawn]
        ) -> tuple[Array, Array, Tree]:
            directions = self.directions(drawn)

            def run(time: Array) -> tuple[Array, Tree]:
                enter = lambda value, noise, _: inject(value, noise, time)  # noqa: E731
                push = Push(self.traced.types, enter, lazy=self.lazy)
                return self._evaluate(push, mapped, directions)

            return along(run)

        mapped: list[Array] = []
        if self.by_example:
            # Mapped outside of the JVP: JAX sums what a custom rule gives when only its tangent is
            # mapped inside a scan.
            mapped = list(self.problem.mapped)
            axes = list(self.problem.mapped_axes)
            own = None if self.examples is None else 0
            size = self.problem.num_examples
            slope = jax.vmap(slope, (axes, own), axis_size=size)

        def of_tangent(drawn: Sequence[Drawn]) -> tuple[Array, tuple[Array, Tree]]:
            values, slopes, aux = slope(mapped, drawn)
            return slopes, (values, aux)

        slopes, shared = over_tangents(
            of_tangent,
            list(drawn),
            num_tangents,
            check=self.traced.program.contains(lambda facts: facts.lacks_jvp),
        )  # [k] or [k, N]
        values, aux = shared
        dtype = _tree.accumulation_dtype(slopes.dtype)
        value = _mesh.total(jnp.mean(values), self.summed)
        return value, aux, slopes.astype(dtype)

    def evaluate(
        self, drawn: Sequence[Drawn], sign: Array, steps: Steps
    ) -> tuple[Array, Tree]:
        """`(value, aux)` on one side of the point along one direction, which is not formed.

        No parameter is shifted as a whole: a layer is as it is used, and a product by a thin one.
        """
        directions = self.directions(drawn)
        if steps.by_leaf:
            directions = [
                direction.scaled(steps.of(leaf).astype(leaf.dtype))
                for direction, leaf in zip(directions, self.leaves, strict=True)
            ]

        def enter(value: Array, noise: Array, known: Sequence[Array]) -> Array:
            if not steps.by_leaf:
                return steps.shifted(value, noise, sign, known)
            return value + sign.astype(noise.dtype) * noise

        push = Push(
            self.traced.types,
            enter,
            lazy=self.lazy,
            first=[
                sign
            ],  # else a loop over signs would unpack the first layer's before it
            is_linear=False,
        )
        return self._evaluate(push, [], directions)

    def _evaluate(
        self,
        push: Push,
        mapped: Sequence[Array],
        directions: Sequence[Direction],
    ) -> tuple[Array, Tree]:
        """The sum of the losses, and aux."""
        traced = self.traced
        program = traced.program
        arguments = traced.arguments(self.leaves, mapped)
        env = dict(zip(program.inputs, arguments, strict=True))
        named = dict(zip(traced.parameters, directions, strict=True))
        outputs = push.run(program, env, named)
        losses, aux = jax.tree.unflatten(traced.out_tree, outputs)
        parts = [jnp.sum(x) for x in jax.tree.leaves(losses)]
        total = sum(parts[1:], start=parts[0])
        return total, aux

    def at(self, leaves: Sequence[Array]) -> "WeightPlan":
        """The same plan with other values of the parameters."""
        return dataclasses.replace(self, params=self.tree_of(leaves))

    def again(self) -> Drawing:
        """How they are drawn once more, without the loss."""
        return Drawing(
            self.params,
            self.splits,
            self.rank,
            self.examples,
            self.lazy,
            tuple(self.later()),
        )

    def by_examples(self, problem: Problem) -> "WeightPlan":
        """The same directions for all, along which each example has slopes of its own."""
        traced = trace(problem.example, self.params, *problem.example_specs())
        return dataclasses.replace(self, traced=traced, by_example=True)


def plan_low_rank(
    problem: Problem,
    rank: int = 1,
    per_example: bool = False,
    summed: _mesh.Axes = frozenset(),
) -> WeightPlan:
    """Trace the loss and find how each parameter's tangent is best split."""
    params = problem.params
    examples = None
    if per_example:
        traced = trace(problem.example, params, *problem.example_specs())
        examples = problem.num_examples or 1
    else:
        traced = trace(problem.objective, params)
    splits = find_splits(
        traced.program,
        traced.types,
        traced.parameters,
        jax.tree.leaves(params),
    )
    return WeightPlan(
        params,
        splits,
        rank,
        examples,
        problem=problem,
        traced=traced,
        by_example=per_example,
        summed=summed,
    )


def plan_signs(problem: Problem) -> WeightPlan | None:
    """Dense signs for all parameters, as `tangents.Rademacher` draws them, unpacked where used.

    None where the traced loss has no derivative of its own, so that `jax.jvp` of the loss itself is
    needed.
    """
    params = problem.params
    traced = trace(problem.objective, params)
    if reads_its_trace(traced):
        return None
    dense = dense_splits(params)
    return WeightPlan(params, dense, lazy=True, problem=problem, traced=traced)


def dense_splits(params: Tree) -> tuple[Split | None, ...]:
    """Those of signs: none."""
    return (None,) * len(jax.tree.leaves(params))


def default_splits(params: Tree) -> tuple[Split | None, ...]:
    """Those with which `tangents.LowRank` draws directions in full."""
    leaves = jax.tree.leaves(params)
    return tuple(default_split(leaf.shape) for leaf in leaves)


def plan_in_place(problem: Problem, tangents: Tangents) -> WeightPlan | None:
    """Signs or factors in the order in which the tangents draw them in full.

    None where they are drawn in full alone.
    """
    params = problem.params
    if drawn_in_full(params, tangents):
        return None
    if tangents.planned == "signs":
        return plan_signs(problem)
    rank = cast(LowRank, tangents).rank
    traced = trace(problem.objective, params)
    splits = default_splits(params)
    return WeightPlan(params, splits, rank, problem=problem, traced=traced)


def drawn_in_full(params: Tree, tangents: Tangents) -> bool:
    """Whether finite differences hold directions as a whole."""
    leaves = jax.tree.leaves(params)
    return tangents.planned is None or any(map(_tree.is_complex, leaves))
