"""Slopes along low-rank weight tangents that are never formed: how they split a parameter, and how they are pushed."""

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _tree
from forwax._signature import Problem
from forwax._tree import Spec, Tree
from forwax.sites.factored import Factored
from forwax.sites.low_rank_push import Push
from forwax.sites.outer import add_outer, outer, whole
from forwax.sites.program import Traced, trace
from forwax.sites.signs import Signs, after, draw_signs, unpacked
from forwax.sites.splits import Split, find_splits, sliced_only

Drawn: TypeAlias = Array | Signs
Tangent: TypeAlias = Factored | Drawn


@dataclasses.dataclass(frozen=True, eq=False)
class LowRankPlan:
    """How each parameter's tangent is made, and the program that it is pushed through.

    Attributes:
        problem: the parameters, the loss and the examples.
        traced: the loss of the whole batch, or of one example.
        splits: for each leaf of the parameters the axes of its two factors, or None for dense signs.
        per_example: whether each example has tangents of its own.
        lazy: whether all signs stay packed until they are used first, so that few leaves' are held at a time.
    """

    problem: Problem
    traced: Traced
    splits: tuple[Split | None, ...]
    per_example: bool
    lazy: bool = False

    @property
    def leaves(self) -> list[Array]:
        """The parameters."""
        return jax.tree.leaves(self.problem.params)

    def specs(self, rank: int) -> list[Spec]:
        """What must be drawn for one tangent: for each leaf dense signs, or two factors for each rank."""
        lead = (self.problem.num_examples,) if self.per_example else ()
        specs = []
        for leaf, split in zip(self.leaves, self.splits, strict=True):
            shapes = [leaf.shape] if split is None else [_factor_shape(leaf.shape, axes) for axes in split] * rank
            specs += [Spec((*lead, *shape), leaf.dtype) for shape in shapes]
        return specs

    def draw(self, key: Array, indices: Array, rank: int) -> list[Drawn]:
        """The signs of the tangents of the given indices [c], with a leading axis c: packed for what a scan slices."""
        specs = self.specs(rank)
        signs = draw_signs(key, _tree.real_specs(specs), indices)
        return [
            each if packed and not _tree.is_complex(spec) else _tree.from_real([each.unpack()], [spec], lead=1)[0]
            for each, spec, packed in zip(signs, specs, self.packed(rank), strict=True)
        ]

    def packed(self, rank: int) -> list[bool]:
        """For each spec whether its signs stay packed until a scan slices them, or something else uses them."""
        start = len(self.traced.closed)
        pairs = zip(self.traced.program.inputs[start:], self.splits, strict=False)
        return [
            self.lazy or (not self.per_example and sliced_only(self.traced.program, name))
            for name, split in pairs
            for _ in range(1 if split is None else 2 * rank)
        ]

    def tangents(self, drawn: Sequence[Drawn], rank: int) -> list[Tangent]:
        """The drawn signs as one tangent for each leaf."""
        remaining, found = iter(drawn), []
        for split in self.splits:
            if split is None:
                found.append(next(remaining))
            else:
                pairs = [(next(remaining) * rank**-0.5, next(remaining)) for _ in range(rank)]
                found.append(Factored(tuple(pairs)))  # type: ignore[arg-type]
        return found

    def push(self, drawn: Sequence[Drawn], num_tangents: int, rank: int) -> tuple[Array, Tree, Array]:
        """`(value, aux, slopes)`, the slopes [k] or, with tangents for each example, [k, examples]."""
        mapped, axes = (self.problem.mapped, self.problem.mapped_axes) if self.per_example else ((), ())

        def slope(mapped: Sequence[Array], drawn: Sequence[Drawn]) -> tuple[Array, Array, Tree]:
            time = jnp.zeros((), jnp.float32)
            return jax.jvp(lambda t: self._evaluate(mapped, drawn, rank, t), (time,), (time + 1,), has_aux=True)

        def slopes(drawn: Sequence[Drawn]) -> tuple[Array, Array, Tree]:
            if not self.per_example:
                return slope((), drawn)
            # mapped outside of the JVP: JAX sums what a custom rule gives when only its tangent is mapped inside a scan
            return jax.vmap(slope, (list(axes), 0), axis_size=self.problem.num_examples)(list(mapped), drawn)

        if num_tangents == 1:
            values, found, aux = slopes(jax.tree.map(lambda x: x[0], list(drawn)))
            found = found[None]
        else:
            values, found, aux = jax.vmap(slopes, out_axes=(None, 0, None))(list(drawn))
        return jnp.mean(values), aux, found.astype(_tree.accumulation_dtype(found.dtype))

    def _evaluate(self, mapped: Sequence[Array], drawn: Sequence[Drawn], rank: int, time: Array) -> tuple[Array, Tree]:
        program = self.traced.program
        env = dict(zip(program.inputs, [*self.traced.closed, *self.leaves, *mapped], strict=True))
        tangents = dict(zip(program.inputs[len(self.traced.closed) :], self.tangents(drawn, rank), strict=False))
        outputs = Push(self.traced.types, time, self.lazy).run(program, env, tangents)
        losses, aux = jax.tree.unflatten(self.traced.out_tree, outputs)
        parts = [jnp.sum(x) for x in jax.tree.leaves(losses)]
        return sum(parts[1:], start=parts[0]), aux

    def assemble(self, coefficients: Array, drawn: Sequence[Drawn], rank: int) -> Tree:
        """Σ c v in at least float32, over tangents and, where each has its own, examples: `coefficients` [k(, N)]."""
        ready = unpacked(after(drawn, [coefficients]))
        tangents = zip(self.leaves, self.tangents(ready, rank), strict=True)
        grads = [outer(coefficients, _pairs(tangent), leaf) for leaf, tangent in tangents]
        return jax.tree.unflatten(jax.tree.structure(self.problem.params), grads)

    def add(self, params: Tree, coefficients: Array, drawn: Sequence[Drawn], rank: int) -> Tree:
        """Parameters + Σ c v, in place where they are donated: no summand is held; see `assemble`."""
        leaves, structure = jax.tree.flatten(params)
        ready = unpacked(after(drawn, [coefficients]))
        tangents = zip(leaves, self.tangents(ready, rank), strict=True)
        return structure.unflatten([add_outer(leaf, coefficients, _pairs(tangent)) for leaf, tangent in tangents])

    def at(self, leaves: Sequence[Array]) -> "LowRankPlan":
        """The same plan with other values of the parameters."""
        params = jax.tree.unflatten(jax.tree.structure(self.problem.params), list(leaves))
        return dataclasses.replace(self, problem=dataclasses.replace(self.problem, params=params))


def plan_low_rank(problem: Problem, per_example: bool) -> LowRankPlan:
    """Trace the loss and find how each parameter's tangent is best split."""
    leaves = jax.tree.leaves(problem.params)
    if per_example:
        traced = trace(problem.example, problem.params, *problem.example_specs())
    else:
        traced = trace(problem.objective, problem.params)
    start = len(traced.closed)
    names = traced.program.inputs[start : start + len(leaves)]
    return LowRankPlan(problem, traced, find_splits(traced.program, traced.types, names, leaves), per_example)


def plan_signs(problem: Problem) -> LowRankPlan:
    """Dense signs for all parameters, those of `tangents.Rademacher`, but each unpacked where it is used."""
    traced = trace(problem.objective, problem.params)
    return LowRankPlan(problem, traced, (None,) * len(jax.tree.leaves(problem.params)), False, lazy=True)


def _factor_shape(shape: tuple[int, ...], axes: frozenset[int]) -> tuple[int, ...]:
    return tuple(n if axis in axes else 1 for axis, n in enumerate(shape))


def _pairs(tangent: Tangent) -> Sequence[tuple[Array, Array]]:
    return tangent.pairs if isinstance(tangent, Factored) else whole(tangent)  # type: ignore[arg-type]
