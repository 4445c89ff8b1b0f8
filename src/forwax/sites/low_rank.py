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
from forwax.sites.program import Traced, Variable, trace
from forwax.sites.run import inject
from forwax.sites.splits import Split, find_splits

Tangent: TypeAlias = Factored | Array


@dataclasses.dataclass(frozen=True, eq=False)
class LowRankPlan:
    """How each parameter's tangent is made, and the program that it is pushed through.

    Attributes:
        problem: the parameters, the loss and the examples.
        traced: the loss of the whole batch, or of one example.
        splits: for each leaf of the parameters the axes of its two factors, or None for dense signs.
        per_example: whether each example has tangents of its own.
    """

    problem: Problem
    traced: Traced
    splits: tuple[Split | None, ...]
    per_example: bool

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

    def tangents(self, drawn: Sequence[Array], rank: int) -> list[Tangent]:
        """The drawn signs as one tangent for each leaf."""
        remaining, found = iter(drawn), []
        for split in self.splits:
            if split is None:
                found.append(next(remaining))
            else:
                pairs = [(next(remaining) * rank**-0.5, next(remaining)) for _ in range(rank)]
                found.append(Factored(tuple(pairs)))
        return found

    def settled(self, drawn: Sequence[Array]) -> list[Array]:
        """The drawn signs, made once: they are their own inverses, and no compiler repeats a division for each use.

        Without it the bits of a factor's sign are unpacked anew for every entry of the products that it enters.
        """
        return [x if jnp.iscomplexobj(x) else 1 / x for x in drawn]

    def push(self, drawn: Sequence[Array], num_tangents: int, rank: int) -> tuple[Array, Tree, Array]:
        """`(value, aux, slopes)`, the slopes [k] or, with tangents for each example, [k, examples]."""
        mapped, axes = (self.problem.mapped, self.problem.mapped_axes) if self.per_example else ((), ())

        def slope(mapped: Sequence[Array], drawn: Sequence[Array]) -> tuple[Array, Array, Tree]:
            time = jnp.zeros((), jnp.float32)
            return jax.jvp(lambda t: self._evaluate(mapped, drawn, rank, t), (time,), (time + 1,), has_aux=True)

        def slopes(drawn: Sequence[Array]) -> tuple[Array, Array, Tree]:
            if not self.per_example:
                return slope((), drawn)
            # mapped outside of the JVP: JAX sums what a custom rule gives when only its tangent is mapped inside a scan
            return jax.vmap(slope, (list(axes), 0), axis_size=self.problem.num_examples)(list(mapped), drawn)

        if num_tangents == 1:
            values, found, aux = slopes([x[0] for x in drawn])
            found = found[None]
        else:
            values, found, aux = jax.vmap(slopes, out_axes=(None, 0, None))(list(drawn))
        return jnp.mean(values), aux, found.astype(_tree.accumulation_dtype(found.dtype))

    def _evaluate(self, mapped: Sequence[Array], drawn: Sequence[Array], rank: int, time: Array) -> tuple[Array, Tree]:
        program = self.traced.program
        env = dict(zip(program.inputs, [*self.traced.closed, *self.leaves, *mapped], strict=True))
        factored: dict[Variable, Factored] = {}
        names = program.inputs[len(self.traced.closed) :]
        for name, tangent in zip(names, self.tangents(drawn, rank), strict=False):
            if isinstance(tangent, Factored):
                factored[name] = tangent
            else:
                env[name] = inject(env[name], tangent, time)
        outputs = Push(self.traced.types, time).run(program, env, factored)
        losses, aux = jax.tree.unflatten(self.traced.out_tree, outputs)
        parts = [jnp.sum(x) for x in jax.tree.leaves(losses)]
        return sum(parts[1:], start=parts[0]), aux

    def assemble(self, coefficients: Array, drawn: Sequence[Array], rank: int) -> Tree:
        """Σ c v in at least float32, over tangents and, where each has its own, examples: `coefficients` [k(, N)]."""
        tangents = zip(self.leaves, self.tangents(drawn, rank), strict=True)
        grads = [outer(coefficients, _pairs(tangent), leaf) for leaf, tangent in tangents]
        return jax.tree.unflatten(jax.tree.structure(self.problem.params), grads)

    def add(self, params: Tree, coefficients: Array, drawn: Sequence[Array], rank: int) -> Tree:
        """Parameters + Σ c v, in place where they are donated: no summand is held; see `assemble`."""
        leaves, structure = jax.tree.flatten(params)
        tangents = zip(leaves, self.tangents(drawn, rank), strict=True)
        return structure.unflatten([add_outer(leaf, coefficients, _pairs(tangent)) for leaf, tangent in tangents])

    def at(self, leaves: Sequence[Array]) -> "LowRankPlan":
        """The same plan with other values of the parameters."""
        params = jax.tree.unflatten(jax.tree.structure(self.problem.params), list(leaves))
        return dataclasses.replace(self, problem=dataclasses.replace(self.problem, params=params))

    def dense(self, drawn: Sequence[Array], rank: int) -> Tree:
        """The tangents themselves [k, ...], as a tree of the parameters' structure."""

        def one(drawn: Sequence[Array]) -> list[Array]:
            pairs = zip(self.leaves, self.tangents(drawn, rank), strict=True)
            return [t.dense(leaf.shape) if isinstance(t, Factored) else t for leaf, t in pairs]

        return jax.tree.unflatten(jax.tree.structure(self.problem.params), jax.vmap(one)(list(drawn)))


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


def _factor_shape(shape: tuple[int, ...], axes: frozenset[int]) -> tuple[int, ...]:
    return tuple(n if axis in axes else 1 for axis, n in enumerate(shape))


def _pairs(tangent: Tangent) -> Sequence[tuple[Array, Array]]:
    return tangent.pairs if isinstance(tangent, Factored) else whole(tangent)
