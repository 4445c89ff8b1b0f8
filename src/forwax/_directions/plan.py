"""Slopes along weight tangents of signs that are formed where they are used: in factors, or a layer at a time."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax import _tree
from forwax._directions.add import add_outer, add_signs, outer, whole
from forwax._directions.factored import Factored, Pair
from forwax._directions.push import Push
from forwax._directions.signs import Signs, after, draw_signs, has_rows, unpacked
from forwax._directions.splits import Split, find_splits, sliced_only
from forwax._programs.custom_rules import reads_its_trace
from forwax._programs.program import Traced
from forwax._programs.tracing import trace
from forwax._signature import Problem
from forwax._tree import Spec, Tree

_MANY = 1 << 12
"""So many signs of one row are drawn in the loop; fewer would make it slower, and save little."""


Drawn: TypeAlias = Array | Signs


Tangent: TypeAlias = Factored | Drawn


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
    """

    problem: Problem
    traced: Traced
    splits: tuple[Split | None, ...]
    rank: int = 1
    per_example: bool = False
    lazy: bool = False

    @property
    def leaves(self) -> list[Array]:
        """The parameters."""
        return jax.tree.leaves(self.problem.params)

    @property
    def num_examples(self) -> int:
        """How many examples have tangents of their own; 1 where all share them."""
        return (self.problem.num_examples or 1) if self.per_example else 1

    def specs(self) -> list[Spec]:
        """What must be drawn for one tangent: for each leaf dense signs, or two factors for each rank."""
        lead = (self.num_examples,) if self.per_example else ()
        specs = []
        for leaf, split in zip(self.leaves, self.splits, strict=True):
            shapes = (
                [leaf.shape]
                if split is None
                else [_factor_shape(leaf.shape, axes) for axes in split] * self.rank
            )
            specs += [Spec((*lead, *shape), leaf.dtype) for shape in shapes]
        return specs

    def draw(self, key: Array, indices: Array) -> list[Drawn]:
        """The signs of the tangents of the given indices [c], with a leading axis c: packed for what a scan slices."""
        specs = self.specs()
        signs = draw_signs(key, _tree.real_specs(specs), indices, self.later())
        return [
            each
            if packed and not _tree.is_complex(spec)
            else _tree.from_real([each.unpack()], [spec], lead=1)[0]
            for each, spec, packed in zip(signs, specs, self.packed(), strict=True)
        ]

    def packed(self) -> list[bool]:
        """For each spec whether its signs stay packed until a scan slices them, or something else uses them."""
        return [self.lazy or (not self.per_example and sliced) for sliced in self.sliced()]

    def later(self) -> list[bool]:
        """For each spec whether its words are drawn in the scan that runs over it, where they are many."""
        pairs = zip(self.specs(), self.sliced(), strict=True)
        return [self.lazy and sliced and has_rows(spec, _MANY) for spec, sliced in pairs]

    def sliced(self) -> list[bool]:
        """For each spec whether scans slice its parameter, and nothing else uses it."""
        pairs = zip(
            self.traced.program.inputs[len(self.traced.closed) :],
            self.splits,
            strict=False,
        )
        return [
            sliced_only(self.traced.program, name)
            for name, split in pairs
            for _ in range(1 if split is None else 2 * self.rank)
        ]

    def tangents(self, drawn: Sequence[Drawn]) -> list[Tangent]:
        """The drawn signs as one tangent for each leaf."""
        remaining, found = iter(drawn), []
        for split in self.splits:
            if split is None:
                found.append(next(remaining))
            else:
                pairs = [
                    (next(remaining) * self.rank**-0.5, next(remaining)) for _ in range(self.rank)
                ]
                found.append(Factored(tuple(pairs)))  # type: ignore[arg-type]
        return found

    def push(self, drawn: Sequence[Drawn], num_tangents: int) -> tuple[Array, Tree, Array]:
        """`(value, aux, slopes)`, the slopes [k] or, with tangents for each example, [k, examples]."""
        mapped, axes = (
            (self.problem.mapped, self.problem.mapped_axes) if self.per_example else ((), ())
        )

        def slope(mapped: Sequence[Array], drawn: Sequence[Drawn]) -> tuple[Array, Array, Tree]:
            time = jnp.zeros((), jnp.float32)
            return jax.jvp(
                lambda t: self._evaluate(mapped, drawn, t),
                (time,),
                (time + 1,),
                has_aux=True,
            )

        def slopes(drawn: Sequence[Drawn]) -> tuple[Array, Array, Tree]:
            if not self.per_example:
                return slope((), drawn)
            # mapped outside of the JVP: JAX sums what a custom rule gives when only its tangent is
            # mapped inside a scan
            return jax.vmap(slope, (list(axes), 0), axis_size=self.num_examples)(
                list(mapped), drawn
            )

        if num_tangents == 1:
            values, found, aux = slopes(jax.tree.map(lambda x: x[0], list(drawn)))
            found = found[None]
        else:
            values, found, aux = jax.vmap(slopes, out_axes=(None, 0, None), axis_size=num_tangents)(
                list(drawn)
            )
        return (
            jnp.mean(values),
            aux,
            found.astype(_tree.accumulation_dtype(found.dtype)),
        )

    def _evaluate(
        self, mapped: Sequence[Array], drawn: Sequence[Drawn], time: Array
    ) -> tuple[Array, Tree]:
        program = self.traced.program
        env = dict(
            zip(
                program.inputs,
                [*self.traced.closed, *self.leaves, *mapped],
                strict=True,
            )
        )
        tangents = dict(
            zip(
                program.inputs[len(self.traced.closed) :],
                self.tangents(drawn),
                strict=False,
            )
        )
        outputs = Push(self.traced.types, time, self.lazy).run(program, env, tangents)
        losses, aux = jax.tree.unflatten(self.traced.out_tree, outputs)
        parts = [jnp.sum(x) for x in jax.tree.leaves(losses)]
        return sum(parts[1:], start=parts[0]), aux

    def assemble(self, coefficients: Array, drawn: Sequence[Drawn]) -> Tree:
        """Σ c v in at least float32, over tangents and, where each has its own, examples: `coefficients` [k(, N)]."""

        def grad(leaf: Array, tangent: Tangent) -> Array:
            if not isinstance(tangent, Signs):
                return outer(coefficients, _pairs(tangent), leaf)
            start = jnp.zeros(leaf.shape, _tree.accumulation_dtype(leaf.dtype))
            if not tangent.drawn_by_rows:
                return add_signs(start, coefficients, tangent)
            return lax.map(
                lambda i: add_signs(start[0], coefficients, tangent.row(i)),
                jnp.arange(len(leaf)),
            )

        tangents = self.tangents(after(drawn, [coefficients]))
        return self.tree_of(map(grad, self.leaves, tangents))

    def add(self, params: Tree, coefficients: Array, drawn: Sequence[Drawn]) -> Tree:
        """Parameters + Σ c v, in place where they are donated: no summand is held; see `assemble`."""

        def new(leaf: Array, tangent: Tangent) -> Array:
            if not isinstance(tangent, Signs):
                return add_outer(leaf, coefficients, _pairs(tangent))
            wide = _tree.accumulation_dtype(leaf.dtype)
            add = lambda part, signs: add_signs(part.astype(wide), coefficients, signs).astype(
                part.dtype
            )  # noqa: E731
            if not tangent.drawn_by_rows:
                return add(leaf, tangent)
            return lax.fori_loop(
                0,
                len(leaf),
                lambda i, leaf: leaf.at[i].set(add(leaf[i], tangent.row(i))),
                leaf,
            )

        tangents = self.tangents(after(drawn, [coefficients]))
        return self.tree_of(map(new, jax.tree.leaves(params), tangents))

    def tree_of(self, leaves: Iterable[Array]) -> Tree:
        """Leaves as a tree like the parameters."""
        return jax.tree.unflatten(jax.tree.structure(self.problem.params), list(leaves))

    def at(self, leaves: Sequence[Array]) -> "WeightPlan":
        """The same plan with other values of the parameters."""
        return dataclasses.replace(
            self, problem=dataclasses.replace(self.problem, params=self.tree_of(leaves))
        )


def plan_low_rank(problem: Problem, rank: int = 1, per_example: bool = False) -> WeightPlan:
    """Trace the loss and find how each parameter's tangent is best split."""
    leaves = jax.tree.leaves(problem.params)
    if per_example:
        traced = trace(problem.example, problem.params, *problem.example_specs())
    else:
        traced = trace(problem.objective, problem.params)
    start = len(traced.closed)
    names = traced.program.inputs[start : start + len(leaves)]
    splits = find_splits(traced.program, traced.types, names, leaves)
    return WeightPlan(problem, traced, splits, rank, per_example)


def plan_signs(problem: Problem) -> WeightPlan | None:
    """Dense signs for all parameters, those of `tangents.Rademacher`, but each unpacked where it is used.

    None where the traced loss has no derivative of its own, so that `jax.jvp` of the loss itself is
    needed.
    """
    traced = trace(problem.objective, problem.params)
    if reads_its_trace(traced):
        return None
    return WeightPlan(problem, traced, (None,) * len(jax.tree.leaves(problem.params)), lazy=True)


def _factor_shape(shape: tuple[int, ...], axes: frozenset[int]) -> tuple[int, ...]:
    return tuple(n if axis in axes else 1 for axis, n in enumerate(shape))


def _pairs(tangent: Factored | Array) -> Sequence[Pair]:
    if not isinstance(tangent, Factored):
        return whole(tangent)
    sides = iter(unpacked([side for pair in tangent.pairs for side in pair]))
    return list(zip(sides, sides, strict=True))
