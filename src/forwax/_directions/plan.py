"""Directions of signs that a traced loss forms where it uses them.

In factors, or a layer at a time.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeAlias, cast

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _mesh, _tree
from forwax._directions.add import FEW
from forwax._directions.direction import Direction, Unpacked, Whole
from forwax._directions.factored import Factored, Sides
from forwax._directions.push import Push
from forwax._directions.rounding import NEAREST, Rounding
from forwax._directions.signs import Signs, draw_signs, has_rows
from forwax._directions.splits import Split, default_split, find_splits, sliced_only
from forwax._directions.steps import Steps
from forwax._programs.custom_rules import reads_its_trace
from forwax._programs.evaluate import inject
from forwax._programs.program import Traced
from forwax._programs.tracing import trace
from forwax._pushforward import along, over_tangents
from forwax._signature import Problem
from forwax._tree import Spec, Tree
from forwax.tangents import LowRank, Tangents

_MANY = 1 << 12
"""So many signs of one row are drawn in the loop; fewer would make it slower, and save little."""


Drawn: TypeAlias = Array | Signs


@dataclasses.dataclass(frozen=True, eq=False)
class WeightPlan:
    """How each parameter's tangent is made, and the program that it is pushed through.

    Attributes:
        problem: the parameters, the loss and the examples.
        traced: the loss of the whole batch, or of one example.
        splits: for each leaf of the parameters the axes of its two factors, or None for dense
            signs.
        rank: the pairs of factors of each tangent.
        per_example: whether each example has tangents of its own.
        lazy: whether all signs stay packed until they are used first, so that few leaves' are held
            at a time.
        summed: the mesh axes over which the losses are each device's part of the user's.
    """

    problem: Problem
    traced: Traced
    splits: tuple[Split | None, ...]
    rank: int = 1
    per_example: bool = False
    lazy: bool = False
    summed: _mesh.Axes = frozenset()

    @property
    def leaves(self) -> list[Array]:
        """The parameters."""
        return jax.tree.leaves(self.problem.params)

    @property
    def point(self) -> list[Array]:
        """See `Directions.point`."""
        return self.leaves

    @property
    def is_concrete(self) -> bool:
        """See `Directions.is_concrete`; the loss is traced already."""
        return False

    @property
    def num_examples(self) -> int:
        """How many examples have tangents of their own; 1 where all share them."""
        return (self.problem.num_examples or 1) if self.per_example else 1

    @property
    def most_held(self) -> int | None:
        """See `Directions.most_held`; packed or thin they are small."""
        return None

    @property
    def together(self) -> int:
        """See `Directions.together`; dense signs are added one by one, thin factors in one pass."""
        return 1 if self.lazy else max(1, FEW // (self.rank * self.num_examples))

    def specs(self) -> list[Spec]:
        """What is drawn for one tangent: for each leaf dense signs, or two factors a rank."""
        lead = (self.num_examples,) if self.per_example else ()
        specs: list[Spec] = []
        for leaf, split in zip(self.leaves, self.splits, strict=True):
            if split is None:
                shapes = [leaf.shape]
            else:
                sides = [
                    _factor_shape(leaf.shape, axes) for axes in split
                ]  # left, right
                shapes = sides * self.rank
            for shape in shapes:
                specs.append(Spec((*lead, *shape), leaf.dtype))
        return specs

    def sampler(self, key: Array) -> Callable[[Array], list[Drawn]]:
        """See `Directions.sampler`."""
        return partial(self.draw, key)

    def draw(self, key: Array, indices: Array) -> list[Drawn]:
        """The signs of the tangents of the given indices [c], with a leading axis c.

        Those that a scan slices stay packed.
        """
        specs = self.specs()
        real_specs = _tree.real_specs(specs)
        signs = draw_signs(key, real_specs, indices, self.later())
        packed = self.packed()
        drawn: list[Drawn] = []
        for i, (each, spec) in enumerate(zip(signs, specs, strict=True)):
            if packed[i] and not _tree.is_complex(spec):
                drawn.append(each)
                continue
            array = each.unpack()  # [c, *shape]; of a complex spec [c, 2, *shape]
            drawn += _tree.from_real([array], [spec], lead=1)
        return drawn

    def packed(self) -> list[bool]:
        """For each spec whether its signs stay packed until a scan or something else uses them."""
        if self.lazy:
            return [True] * len(self.specs())
        return [sliced and not self.per_example for sliced in self.sliced()]

    def later(self) -> list[bool]:
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

    def directions(self, drawn: Sequence[Drawn]) -> list[Direction]:
        """The drawn signs as one direction for each leaf."""
        scale = self.rank**-0.5  # so that E[v vᵀ] = I at every rank
        parts = iter(map(_whole, drawn))
        directions: list[Direction] = []
        for split in self.splits:
            if split is None:
                directions.append(next(parts))
                continue
            sides: list[Sides] = []
            for _ in range(self.rank):
                left = next(parts) * scale
                sides.append((left, next(parts)))
            directions.append(Factored(tuple(sides)))
        return directions

    def push(
        self, drawn: Sequence[Drawn], num_tangents: int
    ) -> tuple[Array, Tree, Array]:
        """`(value, aux, slopes)`, the slopes [k] or, with tangents for each example, [k, N]."""

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
        if self.per_example:
            # Mapped outside of the JVP: JAX sums what a custom rule gives when only its tangent is
            # mapped inside a scan.
            mapped = list(self.problem.mapped)
            axes = list(self.problem.mapped_axes)
            slope = jax.vmap(slope, (axes, 0), axis_size=self.num_examples)

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

    def assemble(self, weights: Array, drawn: Sequence[Drawn]) -> Tree:
        """Σ c v in at least float32, over tangents and examples with their own: [k] or [k, N]."""
        directions = self._late(weights, drawn)
        sums = [
            direction.sum(weights, leaf)
            for direction, leaf in zip(directions, self.leaves, strict=True)
        ]
        return self.tree_of(sums)

    def add(
        self,
        total: Tree,
        weights: Array,
        drawn: Sequence[Drawn],
        rounding: Rounding = NEAREST,
        steps: Steps | None = None,
    ) -> Tree:
        """Total + Σ c v, in place where it is donated: no summand is held; see `assemble`.

        With the steps that the directions' slopes were taken with, Σ c v / s.
        """
        directions = self._late(weights, drawn)
        totals: list[Array] = []
        for i, leaf in enumerate(jax.tree.leaves(total)):
            own = weights
            if steps is not None and steps.by_leaf:
                own = weights / steps.factor(leaf).reshape(()).astype(weights.dtype)
            elif steps is not None:
                signs = cast(Signs, directions[i])
                directions[i] = dataclasses.replace(signs, divisor=steps.factor)
            new = directions[i].add(leaf, own, rounding.of(i))
            totals.append(new)
        return self.tree_of(totals)

    def _late(self, weights: Array, drawn: Sequence[Drawn]) -> list[Direction]:
        """The directions, unpacked once the weights are known."""
        directions = self.directions(drawn)
        return [direction.after([weights]) for direction in directions]

    def tree_of(self, leaves: Iterable[Array]) -> Tree:
        """Leaves as a tree like the parameters."""
        structure = jax.tree.structure(self.problem.params)
        return structure.unflatten(leaves)

    def at(self, leaves: Sequence[Array]) -> "WeightPlan":
        """The same plan with other values of the parameters."""
        problem = dataclasses.replace(self.problem, params=self.tree_of(leaves))
        return dataclasses.replace(self, problem=problem)


def plan_low_rank(
    problem: Problem,
    rank: int = 1,
    per_example: bool = False,
    summed: _mesh.Axes = frozenset(),
) -> WeightPlan:
    """Trace the loss and find how each parameter's tangent is best split."""
    params = problem.params
    if per_example:
        traced = trace(problem.example, params, *problem.example_specs())
    else:
        traced = trace(problem.objective, params)
    splits = find_splits(
        traced.program,
        traced.types,
        traced.parameters,
        jax.tree.leaves(params),
    )
    return WeightPlan(problem, traced, splits, rank, per_example, summed=summed)


def plan_signs(problem: Problem) -> WeightPlan | None:
    """Dense signs for all parameters, as `tangents.Rademacher` draws them, unpacked where used.

    None where the traced loss has no derivative of its own, so that `jax.jvp` of the loss itself is
    needed.
    """
    traced = trace(problem.objective, problem.params)
    if reads_its_trace(traced):
        return None
    dense = (None,) * traced.num_parameters
    return WeightPlan(problem, traced, dense, lazy=True)


def plan_in_place(problem: Problem, tangents: Tangents) -> WeightPlan | None:
    """Signs or factors in the order in which the tangents draw them in full.

    None where they are drawn in full alone.
    """
    leaves = jax.tree.leaves(problem.params)
    if tangents.planned is None or any(map(_tree.is_complex, leaves)):
        return None
    if tangents.planned == "signs":
        return plan_signs(problem)
    rank = cast(LowRank, tangents).rank
    traced = trace(problem.objective, problem.params)
    splits = tuple(default_split(leaf.shape) for leaf in leaves)
    return WeightPlan(problem, traced, splits, rank)


def _factor_shape(shape: tuple[int, ...], axes: frozenset[int]) -> tuple[int, ...]:
    sizes = [n if axis in axes else 1 for axis, n in enumerate(shape)]
    return tuple(sizes)


def _whole(drawn: Drawn) -> Whole:
    return drawn if isinstance(drawn, Signs) else Unpacked(jnp.asarray(drawn))
