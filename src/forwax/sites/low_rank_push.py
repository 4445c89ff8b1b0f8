"""A program evaluated with some tangents in factors, which dots, convolutions and look-ups need not form."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import primitives

from forwax.sites.convolution import in_pieces
from forwax.sites.factored import Factored, is_move, look_up, moved, product
from forwax.sites.program import Atom, Constant, Equation, Loop, Program, Variable, bind
from forwax.sites.run import inject


class Push:
    """An interpreter in which some variables have a factored tangent; all other tangents are those of `jax.jvp`."""

    def __init__(self, types: Sequence[Any], time: Array) -> None:
        self.types, self.time = types, time

    def run(self, program: Program, env: dict[Variable, Any], factored: dict[Variable, Factored]) -> list[Any]:
        """The program's outputs, from its inputs in `env` and the factored tangents of some of them."""
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
        """One equation's outputs."""
        if len(positions) == 1:
            position = positions[0]
            tangent = factored[equation.inputs[position]]
            shape, out = jnp.shape(values[position]), tuple(self.types[equation.outputs[0]].shape)
            if position == 0 and is_move(equation):
                found = moved(equation, tangent, values, shape, out)
                if found is not None:
                    factored[equation.outputs[0]] = found
                    return bind(equation, values)
            noise = look_up(equation, tangent, values, out) if position == 0 else None
            noise = product(equation, position, tangent, values) if noise is None else noise
            if noise is not None:
                large = equation.primitive is primitives.conv_general_dilated_p and position == 1
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

    def loop(self, equation: Equation, loop: Loop, values: list[Any], factored: dict) -> list[Any]:
        """A scan's outputs: factors of what it runs over are scanned with it, and those of constants pass through."""
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
