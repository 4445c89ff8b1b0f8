"""Slopes along low-rank weight tangents that are never formed: how they split a parameter, and how they are pushed."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax import _tree
from forwax._signature import Problem
from forwax._tree import Spec, Tree
from forwax.sites.axes import Factor, back
from forwax.sites.factored import Factored, look_up, moved, product
from forwax.sites.program import Atom, Constant, Equation, Loop, Program, Traced, Variable, bind, trace
from forwax.sites.run import inject

_MATRIX = ("dot_general", "conv_general_dilated")
_LOOKED_UP = "gather"
Split: TypeAlias = tuple[frozenset[int], frozenset[int]]
"""The axes of a parameter that its two factors depend on; those that are in both have a pair of factors each."""
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
        outputs = _Push(self.traced.types, time).run(program, env, factored)
        losses, aux = jax.tree.unflatten(self.traced.out_tree, outputs)
        parts = [jnp.sum(x) for x in jax.tree.leaves(losses)]
        return sum(parts[1:], start=parts[0]), aux

    def assemble(self, coefficients: Array, drawn: Sequence[Array], rank: int) -> Tree:
        """Σ c v in at least float32, over tangents and, where each has its own, examples: `coefficients` [k(, N)]."""
        lead = coefficients.ndim
        grads = []
        for leaf, tangent in zip(self.leaves, self.tangents(drawn, rank), strict=True):
            if isinstance(tangent, Factored):
                parts = [_outer(coefficients, left, right, leaf, lead) for left, right in tangent.pairs]
                total = sum(parts[1:], start=parts[0])
            else:
                total = _outer(coefficients, jnp.conj(tangent), jnp.ones(tangent.ndim * (1,)), leaf, lead)
            grads.append(total)
        return jax.tree.unflatten(jax.tree.structure(self.problem.params), grads)

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
    found = _Finder(traced.types)
    names = traced.program.inputs[start : start + len(leaves)]
    found.read(traced.program, {name: (name, ()) for name in names})
    splits = tuple(_split(found.uses.get(n, []), x) for n, x in zip(names, leaves, strict=True))
    return LowRankPlan(problem, traced, splits, per_example)


def default_split(shape: tuple[int, ...]) -> Split | None:
    """All axes but the last, and the last; None when a side has one entry, so that dense signs cost no more."""
    return _checked((frozenset(range(len(shape) - 1)), frozenset([len(shape) - 1])), shape)


def _checked(split: Split, shape: tuple[int, ...]) -> Split | None:
    small = min(math.prod(shape[axis] for axis in side) for side in (split[0] - split[1], split[1] - split[0]))
    return split if small > 1 else None


def _split(uses: Sequence[Split | None], leaf: Array) -> Split | None:
    if not uses or leaf.ndim < 2 or _tree.is_complex(leaf):
        return None
    partitions = {frozenset(use) if use is not None else None for use in uses}
    use = uses[0]
    return _checked(use, leaf.shape) if len(partitions) == 1 and use is not None else default_split(leaf.shape)


def _factor_shape(shape: tuple[int, ...], axes: frozenset[int]) -> tuple[int, ...]:
    return tuple(n if axis in axes else 1 for axis, n in enumerate(shape))


def _outer(coefficients: Array, left: Array, right: Array, leaf: Array, lead: int) -> Array:
    """Σ c left · right over the leading axes, as one dot where there are many terms."""
    wide = _tree.accumulation_dtype(leaf.dtype)
    scale = coefficients.reshape(*coefficients.shape, *[1] * leaf.ndim).astype(jnp.finfo(wide).dtype)
    if math.prod(coefficients.shape) == 1 or math.prod(right.shape[lead:]) == 1:
        return jnp.sum((scale * left.astype(wide)) * right.astype(wide), axis=tuple(range(lead)))
    names = "abcdefghijklmnopqrstuvwxyz"
    out, first = names[: leaf.ndim], names[leaf.ndim : leaf.ndim + lead]

    def named(x: Array) -> tuple[Array, str]:
        kept = [axis for axis in range(leaf.ndim) if x.shape[lead + axis] > 1]
        return x.reshape(*x.shape[:lead], *(x.shape[lead + axis] for axis in kept)), first + "".join(
            out[axis] for axis in kept
        )

    (a, left_names), (b, right_names) = named(scale * left.astype(wide)), named(right.astype(wide))
    kept = "".join(name for name in out if name in left_names + right_names)
    return jnp.einsum(f"{left_names},{right_names}->{kept}", a, b).reshape(leaf.shape)


Origin: TypeAlias = tuple[Variable, tuple[Equation | None, ...]]
"""The parameter that a variable is made of by moves alone, and these, the last first; None for a slice of a scan."""


class _Finder:
    """Finds how each parameter meets data in dots and convolutions."""

    def __init__(self, types: Sequence[Any]) -> None:
        self.types = types
        self.uses: dict[Variable, list[Split | None]] = {}

    def read(self, program: Program, origins: dict[Variable, Origin]) -> None:
        for equation in program.equations:
            known = [(i, a) for i, a in enumerate(equation.inputs) if not isinstance(a, Constant) and a in origins]
            if equation.loop is not None:
                self.read_loop(equation, equation.loop, origins)
                continue
            for position, atom in known:
                leaf, steps = origins[atom]
                if equation.name in _MATRIX:
                    self.uses.setdefault(leaf, []).append(self.split(equation, position, leaf, steps))
                elif equation.name == _LOOKED_UP and position == 0:
                    self.uses.setdefault(leaf, []).append(default_split(self.shape(leaf)))
                elif position == 0 and _is_move(equation):
                    origins[equation.outputs[0]] = (leaf, (equation, *steps))

    def read_loop(self, equation: Equation, loop: Loop, origins: dict[Variable, Origin]) -> None:
        inner: dict[Variable, Origin] = {}
        for i, (atom, v) in enumerate(zip(equation.inputs, loop.body.inputs, strict=True)):
            if isinstance(atom, Constant) or atom not in origins:
                continue
            leaf, steps = origins[atom]
            if i >= loop.num_consts + loop.num_carry:
                inner[v] = (leaf, (None, *steps))
            elif i < loop.num_consts or loop.body.outputs[i - loop.num_consts] == v:
                inner[v] = (leaf, steps)
        self.read(loop.body, inner)

    def split(self, equation: Equation, position: int, leaf: Variable, steps: Sequence[Equation | None]):
        """The parameter's axes that are contracted here, and the others; what is neither belongs to both."""
        shape = self.shape(equation.inputs[position])
        groups = _axes_of(equation, position, len(shape))
        if groups is None:
            return None
        links = [[self.back(axis, shape, steps) for axis in axes if shape[axis] > 1] for axes in groups]
        contracted, free = ({axis for axis in own if axis is not None} for own in links)
        if len(contracted) + len(free) < len(links[0]) + len(links[1]) or contracted & free:
            return None
        both = set(range(len(self.shape(leaf)))) - contracted - free
        return frozenset(contracted | both), frozenset(free | both)

    def back(self, axis: int, shape: tuple[int, ...], steps: Sequence[Equation | None]) -> int | None:
        link: Factor | None = Factor(axis, 1, shape[axis])
        for step in steps:
            if link is None:
                return None
            if step is None:
                link = dataclasses.replace(link, axis=link.axis + 1)
            else:
                link = back(step, 0, 0, link, [self.shape(a) for a in step.inputs], [self.shape(step.outputs[0])])
        return None if link is None or link.size == 1 else link.axis

    def shape(self, atom: Atom) -> tuple[int, ...]:
        return tuple(jnp.shape(atom.value)) if isinstance(atom, Constant) else tuple(self.types[atom].shape)


def _axes_of(equation: Equation, position: int, rank: int) -> tuple[list[int], list[int]] | None:
    """The contracted and the free axes of an operand."""
    if equation.name == "dot_general":
        contracted, batch = equation.params["dimension_numbers"]
        free = [axis for axis in range(rank) if axis not in contracted[position] and axis not in batch[position]]
        return list(contracted[position]), free
    if position != 1 or equation.params["feature_group_count"] != 1 or equation.params["batch_group_count"] != 1:
        return None
    out = equation.params["dimension_numbers"].rhs_spec[0]
    return [axis for axis in range(rank) if axis != out], [out]


_MOVES = {"copy", "name", "reduce_precision", "sharding_constraint", "convert_element_type", "transpose", "squeeze"}
_MOVES |= {"reshape", "broadcast_in_dim", "slice", "dynamic_slice"}


def _is_move(equation: Equation) -> bool:
    return equation.name in _MOVES


class _Push:
    """An interpreter in which some variables have a factored tangent; all other tangents are those of `jax.jvp`."""

    def __init__(self, types: Sequence[Any], time: Array) -> None:
        self.types, self.time = types, time

    def run(self, program: Program, env: dict[Variable, Any], factored: dict[Variable, Factored]) -> list[Any]:
        for equation in program.equations:
            values = [_read(atom, env) for atom in equation.inputs]
            positions = [i for i, a in enumerate(equation.inputs) if not isinstance(a, Constant) and a in factored]
            if equation.loop is not None and positions:
                outputs = self.loop(equation, equation.loop, values, factored)
            else:
                outputs = self.apply(equation, values, positions, factored)
            env.update(zip(equation.outputs, outputs, strict=True))
        return [self.formed(atom, _read(atom, env), factored) for atom in program.outputs]

    def apply(self, equation: Equation, values: list[Any], positions: list[int], factored: dict) -> list[Any]:
        if len(positions) == 1:
            position = positions[0]
            tangent = factored[equation.inputs[position]]
            shape, out = jnp.shape(values[position]), tuple(self.types[equation.outputs[0]].shape)
            if position == 0 and _is_move(equation):
                found = moved(equation, tangent, values, shape, out)
                if found is not None:
                    factored[equation.outputs[0]] = found
                    return bind(equation, values)
            noise = look_up(equation, tangent, values, out) if position == 0 else None
            noise = product(equation, position, tangent, values) if noise is None else noise
            if noise is not None:
                return [inject(bind(equation, values)[0], noise, self.time)]
        for position in positions:
            values[position] = self.formed(equation.inputs[position], values[position], factored)
        return bind(equation, values)

    def formed(self, atom: Atom, value: Any, factored: Mapping[Variable, Factored]) -> Any:
        """A value with its tangent, which is formed if it was factored."""
        if isinstance(atom, Constant) or atom not in factored:
            return value
        return inject(value, factored[atom].dense(jnp.shape(value)), self.time)

    def loop(self, equation: Equation, loop: Loop, values: list[Any], factored: dict) -> list[Any]:
        body, first, last = loop.body, loop.num_consts, loop.num_consts + loop.num_carry
        fixed: dict[Variable, Factored] = {}
        slices: dict[Variable, list[list[Array | None]]] = {}
        for i, (atom, v) in enumerate(zip(equation.inputs, body.inputs, strict=True)):
            if isinstance(atom, Constant) or atom not in factored:
                continue
            if i >= last:
                slices[v] = [[x if x.shape[0] > 1 else None for x in pair] for pair in factored[atom].pairs]
                fixed[v] = Factored(tuple((a[0], b[0]) for a, b in factored[atom].pairs))
            elif i < first or body.outputs[i - first] == v:
                fixed[v] = factored[atom]
                if i >= first:
                    factored[equation.outputs[i - first]] = factored[atom]
            else:
                values[i] = self.formed(atom, values[i], factored)

        def step(carry: list[Any], xs: tuple[list[Any], dict[Variable, Any]]) -> tuple[list[Any], list[Any]]:
            own = dict(fixed)
            for v, pairs in xs[1].items():
                old = fixed[v].pairs
                own[v] = Factored(
                    tuple(
                        tuple(x if y is None else y for x, y in zip(a, b, strict=True))  # type: ignore[misc]
                        for a, b in zip(old, pairs, strict=True)
                    )
                )
            env = dict(zip(body.inputs, [*values[:first], *carry, *xs[0]], strict=True))
            kept = {v for v in body.inputs[first:last] if v in own}
            outputs = self.run(dataclasses.replace(body, outputs=_without(body.outputs, kept)), env, own)
            pairs = zip(body.outputs, outputs, strict=True)
            outputs = [env[a] if not isinstance(a, Constant) and a in kept else x for a, x in pairs]
            return outputs[: loop.num_carry], outputs[loop.num_carry :]

        starts = list(values[first:last])
        carry, ys = lax.scan(step, starts, (list(values[last:]), slices), loop.length, loop.reverse, loop.unroll)
        return [*carry, *ys]


def _without(outputs: Sequence[Atom], kept: set[Variable]) -> tuple[Atom, ...]:
    """The outputs, with a constant in place of carries that the loop returns as they are."""
    return tuple(Constant(0.0) if a in kept else a for a in outputs)


def _read(atom: Atom, env: Mapping[Variable, Any]) -> Any:
    return atom.value if isinstance(atom, Constant) else env[atom]
