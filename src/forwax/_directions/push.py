"""A program evaluated with some tangents in factors, which dots, convolutions and look-ups need not form."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax._directions.convolution import in_pieces
from forwax._directions.factored import Factored, is_move, look_up, moved, product
from forwax._directions.signs import Signs, after, unpacked
from forwax._programs.evaluate import bind, inject, read
from forwax._programs.order import behind
from forwax._programs.primitives import BILINEAR
from forwax._programs.program import (
    Atom,
    Constant,
    Equation,
    Loop,
    Program,
    Variable,
    variables,
)

Tangent: TypeAlias = Factored | Signs | Array


@jax.custom_jvp
def in_step(value: Array) -> Array:
    """The value itself; with a tangent it is known only when that is, so that layers are pushed one by one.

    Else a compiler may evaluate all layers before their tangents, and hold what every one of them
    made.
    """
    return value


@in_step.defjvp
def _in_step_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return behind(primals[0], tangents), tangents[0]


class Push:
    """An interpreter in which some variables have a factored tangent; all other tangents are those of `jax.jvp`.

    Attributes:
        types: the abstract value of each variable.
        time: the scalar whose tangent scales those of the parameters.
        lazy: whether signs are unpacked after the layer before the one that uses them.
    """

    def __init__(self, types: Sequence[Any], time: Array, lazy: bool) -> None:
        self.types, self.time, self.lazy = types, time, lazy

    def run(
        self,
        program: Program,
        env: dict[Variable, Any],
        tangents: Mapping[Variable, Tangent],
    ) -> list[Any]:
        """The program's outputs, from its inputs in `env` and what is drawn as tangents of some of them."""
        packed, factored = dict(tangents), {}
        last: list[Array] = []  # what layer was evaluated last
        for equation in program.equations:
            loop = equation.loop
            sliced = len(equation.inputs) if loop is None else loop.num_consts + loop.num_carry
            self.open(equation.inputs[:sliced], env, factored, packed, last)
            values = [read(atom, env) for atom in equation.inputs]
            positions = [
                i
                for i, a in enumerate(equation.inputs)
                if not isinstance(a, Constant) and a in factored
            ]
            if loop is not None and (
                positions or any(a in packed for a in variables(equation.inputs))
            ):
                outputs = self.loop(equation, loop, values, factored, packed)
            else:
                outputs = self.apply(equation, values, positions, factored)
                if equation.name in BILINEAR:
                    outputs = [in_step(outputs[0])]
                    last = outputs if self.lazy else []
            env.update(zip(equation.outputs, outputs, strict=True))
        self.open(program.outputs, env, factored, packed, last)
        return [self.formed(atom, read(atom, env), factored) for atom in program.outputs]

    def open(
        self,
        atoms: Sequence[Atom],
        env: dict[Variable, Any],
        factored: dict,
        packed: dict,
        last: Sequence[Array],
    ) -> None:
        """Unpack tangents of used atoms after what came last: factors stay such, and others enter the atom's value."""
        for atom in variables(atoms):
            if atom not in packed:
                continue
            tangent = packed.pop(atom)
            if isinstance(tangent, Factored):
                factored[atom] = Factored(
                    tuple(
                        (a, b) for a, b in (unpacked(after(pair, last)) for pair in tangent.pairs)
                    )
                )
            else:
                env[atom] = inject(env[atom], *unpacked(after([tangent], last)), self.time)

    def apply(
        self,
        equation: Equation,
        values: list[Any],
        positions: list[int],
        factored: dict,
    ) -> list[Any]:
        """One equation's outputs."""
        if len(positions) == 1 and equation.outputs:  # a callback may have none
            position = positions[0]
            tangent = factored[equation.inputs[position]]
            shape, out = (
                jnp.shape(values[position]),
                tuple(self.types[equation.outputs[0]].shape),
            )
            if position == 0 and is_move(equation):
                found = moved(equation, tangent, values, shape, out)
                if found is not None:
                    factored[equation.outputs[0]] = found
                    return bind(equation, values)
            noise = look_up(equation, tangent, values, out) if position == 0 else None
            noise = product(equation, position, tangent, values) if noise is None else noise
            if noise is not None:
                large = equation.name == "conv_general_dilated" and position == 1
                value = in_pieces(equation, values) if large else bind(equation, values)[0]
                return [inject(value, noise, self.time)]
        for position in positions:
            values[position] = self.formed(equation.inputs[position], values[position], factored)
        return bind(equation, values)

    def formed(self, atom: Atom, value: Any, factored: Mapping[Variable, Factored]) -> Any:
        """A value with its tangent, which is formed if it was factored."""
        if isinstance(atom, Constant) or atom not in factored:
            return value
        return inject(value, factored[atom].dense(jnp.shape(value)), self.time)

    def loop(
        self,
        equation: Equation,
        loop: Loop,
        values: list[Any],
        factored: dict,
        packed: dict,
    ) -> list[Any]:
        """A scan's outputs: factors of what it runs over are scanned with it, and those of constants pass through."""
        body, first, last = loop.body, loop.num_consts, loop.num_consts + loop.num_carry
        fixed: dict[Variable, Factored] = {}
        slices: dict[Variable, Slices] = {}
        for i, (atom, v) in enumerate(zip(equation.inputs, body.inputs, strict=True)):
            tangent = None if isinstance(atom, Constant) else factored.get(atom, packed.get(atom))
            if tangent is None:
                continue
            if i >= last:
                slices[v] = _slices(tangent)
            elif i < first or body.outputs[i - first] == v:
                fixed[v] = tangent
                if i >= first:
                    factored[equation.outputs[i - first]] = tangent
            else:
                values[i] = self.formed(atom, values[i], factored)
        scanned = {v: of for v, (of, _) in slices.items()}

        def step(
            carry: list[Any], xs: tuple[list[Any], dict[Variable, Any], Array]
        ) -> tuple[list[Any], list[Any]]:
            own = {
                **fixed,
                **{v: _joined(of, slices[v][1], xs[2]) for v, of in xs[1].items()},
            }
            env = dict(zip(body.inputs, [*values[:first], *carry, *xs[0]], strict=True))
            kept = {v for v in body.inputs[first:last] if v in fixed}
            outputs = self.run(
                dataclasses.replace(body, outputs=_without(body.outputs, kept)),
                env,
                own,
            )
            pairs = zip(body.outputs, outputs, strict=True)
            outputs = [env[a] if not isinstance(a, Constant) and a in kept else x for a, x in pairs]
            return outputs[: loop.num_carry], outputs[loop.num_carry :]

        starts = list(values[first:last])
        xs = list(values[last:]), scanned, jnp.arange(loop.length)
        carry, ys = lax.scan(step, starts, xs, loop.length, loop.reverse, loop.unroll)
        return [*carry, *ys]


Slices: TypeAlias = tuple[list[Any], list[Any]]
"""Of a tangent that a scan runs over, its one array or those of its pairs in order: what is sliced, and what is not.

Signs that have rows are not sliced: a step takes its own row of them.
"""


def _slices(tangent: Tangent) -> Slices:
    parts = (
        [x for pair in tangent.pairs for x in pair] if isinstance(tangent, Factored) else [tangent]
    )
    parts = [x if isinstance(x, Signs) and x.has_rows else unpacked([x])[0] for x in parts]
    sliced = [None if isinstance(x, Signs) or x.shape[0] == 1 else x for x in parts]
    return sliced, [x if row is None else None for x, row in zip(parts, sliced, strict=True)]


def _joined(sliced: list[Any], rest: list[Any], index: Array) -> Tangent:
    def part(own: Any, of: Any) -> Any:
        if own is not None:
            return own
        return of.row(index) if isinstance(of, Signs) else of[0]

    parts = [part(own, of) for own, of in zip(sliced, rest, strict=True)]
    return (
        parts[0] if len(parts) == 1 else Factored(tuple(zip(parts[::2], parts[1::2], strict=True)))
    )


def _without(outputs: Sequence[Atom], kept: set[Variable]) -> tuple[Atom, ...]:
    """The outputs, with a constant in place of carries that the loop returns as they are."""
    return tuple(Constant(0.0) if a in kept else a for a in outputs)
