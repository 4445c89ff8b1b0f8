"""A program evaluated with some tangents in factors, which many operations need not form."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from forwax._directions.convolution import in_pieces
from forwax._directions.direction import Direction, RowOf
from forwax._directions.factored import Factored
from forwax._directions.operations import added, is_move, moved, of_both, product
from forwax._programs.evaluate import bind, read
from forwax._programs.order import behind
from forwax._programs.program import (
    Atom,
    Constant,
    Equation,
    Loop,
    Program,
    Variable,
    variables,
)


@jax.custom_jvp
def in_step(value: Array) -> Array:
    """The value itself; with a tangent it is known only when that is.

    So layers are pushed one by one. Else a compiler may evaluate all layers before their tangents,
    and hold what every one of them made.
    """
    return value


@in_step.defjvp
def _in_step_jvp(
    primals: tuple[Array],
    tangents: tuple[Array],
) -> tuple[Array, Array]:
    value = behind(primals[0], tangents)
    return value, tangents[0]


Enter: TypeAlias = Callable[[Array, Array, Sequence[Array]], Array]


class Push:
    """An interpreter in which some variables have a factored tangent.

    All other tangents are those of `jax.jvp`, which differentiates `run`, or have been added to
    their values, where losses are evaluated a step away.

    Attributes:
        types: the abstract value of each variable.
        enter: takes a value, its tangent and what layer came last to the value with the tangent, or
            a step away.
        lazy: whether signs are unpacked after the layer before the one that uses them.
        first: what the first layer's signs wait for.
        is_linear: whether what two tangents make together counts nothing, as in a derivative.
    """

    def __init__(
        self,
        types: Sequence[Any],
        enter: Enter,
        *,
        lazy: bool,
        first: Sequence[Array] = (),
        is_linear: bool = True,
    ) -> None:
        self.types = types
        self.enter = enter
        self.lazy = lazy
        self.first = list(first)
        self.is_linear = is_linear

    def run(
        self,
        program: Program,
        env: dict[Variable, Any],
        directions: Mapping[Variable, Direction],
    ) -> list[Any]:
        """The program's outputs.

        Args:
            program: what is evaluated.
            env: the values of its inputs; those of all variables are added.
            directions: what is drawn as tangents of some inputs.
        """
        return _Evaluation(self, env, dict(directions)).outputs(program)


class _Evaluation:
    """One evaluation of a program.

    Attributes:
        push: the interpreter.
        env: the values of variables, with the tangents that `jax.jvp` follows.
        packed: directions of inputs that nothing has used yet.
        factored: the tangents of variables that are kept in factors.
        last: what layer was evaluated last.
        given: the program's inputs.
    """

    def __init__(
        self,
        push: Push,
        env: dict[Variable, Any],
        packed: dict[Variable, Direction],
    ) -> None:
        self.push = push
        self.env = env
        self.packed = packed
        self.factored: dict[Variable, Factored] = {}
        self.last: list[Array] = push.first
        self.given: frozenset[Variable] = frozenset()

    def outputs(self, program: Program) -> list[Any]:
        self.given = frozenset(program.inputs)
        for equation in program.equations:
            outputs = self.apply(equation)
            pairs = zip(equation.outputs, outputs, strict=True)
            self.env.update(pairs)
        self.open(program.outputs)
        return [self.formed(atom, self.value(atom)) for atom in program.outputs]

    def apply(self, equation: Equation) -> list[Any]:
        """One equation's outputs."""
        loop = equation.loop
        if loop is None:
            self.open(equation.inputs)
            outputs = self.operation(equation, self.read(equation))
            if equation.facts.bilinear:
                outputs = [in_step(outputs[0])]
                # what lazy signs wait for
                self.last = outputs if self.push.lazy else []
            return outputs
        # What a scan runs over stays packed: each step opens its own.
        consts, carries, _ = loop.split(equation.inputs)
        self.open([*consts, *carries])
        values = self.read(equation)
        tangents = [self.tangent(atom) for atom in equation.inputs]
        if all(tangent is None for tangent in tangents):
            return bind(equation, values)
        return self.loop(equation, loop, values, tangents)

    def value(self, atom: Atom) -> Any:
        return read(atom, self.env)

    def read(self, equation: Equation) -> list[Any]:
        return [self.value(atom) for atom in equation.inputs]

    def tangent(self, atom: Atom) -> Direction | None:
        """The tangent of an atom, so far as `jax.jvp` does not follow it."""
        if isinstance(atom, Constant):
            return None
        return self.factored.get(atom, self.packed.get(atom))

    def open(self, atoms: Sequence[Atom]) -> None:
        """Unpack the directions of atoms, after what came last, since they are used now.

        Factors stay such; others enter the value.
        """
        for variable in variables(atoms):
            if variable not in self.packed:
                continue
            packed = self.packed.pop(variable)
            direction = packed.after(self.last).unpacked()
            value = self.env[variable]
            if isinstance(direction, Factored):
                self.factored[variable] = direction
            else:
                tangent = direction.dense(jnp.shape(value))
                self.env[variable] = self.enter(value, tangent)

    def operation(self, equation: Equation, values: list[Any]) -> list[Any]:
        """The outputs of what is no loop."""
        thin = [i for i, atom in enumerate(equation.inputs) if self.is_factored(atom)]
        if len(thin) == 2 and not self.push.is_linear:
            first = thin.pop(0)
            values[first] = self.formed(equation.inputs[first], values[first])
        if len(thin) == 1 and equation.outputs:  # a callback may have none
            outputs = self.through(equation, thin[0], values)
            if outputs is not None:
                return outputs
        elif len(thin) == 2 and equation.facts.is_dot:
            tangents = [self.factored[v] for v in equation.variables]
            new = of_both(equation, tangents, values)
            if new is not None:
                self.factored[equation.outputs[0]] = new
                return bind(equation, values)
        for position in thin:
            atom = equation.inputs[position]
            values[position] = self.formed(atom, values[position])
        return bind(equation, values)

    def through(
        self,
        equation: Equation,
        position: int,
        values: list[Any],
    ) -> list[Any] | None:
        """The outputs of an operation that need not form its one tangent in factors."""
        tangent = self.tangent(equation.inputs[position])
        assert isinstance(tangent, Factored)
        result = equation.outputs[0]
        out = tuple(self.push.types[result].shape)
        if not self.push.is_linear:
            # What is looked up is made on each side: XLA would make it before their loop.
            values = [behind(x, self.last) if _is_index(x) else x for x in values]
        new = None
        if position == 0 and is_move(equation):
            shape = jnp.shape(values[0])
            new = moved(equation, tangent, values, shape, out)
        elif equation.facts.additive and self.is_given(equation.inputs[1 - position]):
            new = added(equation, position, tangent)
        if new is not None:
            self.factored[result] = new
            return bind(equation, values)
        noise = product(equation, position, tangent, values, out)
        if noise is None:
            return None
        # with tangents in factors the convolution itself is what takes long
        whole = not equation.facts.is_convolution
        value = bind(equation, values)[0] if whole else in_pieces(equation, values)
        return [self.enter(value, noise)]

    def enter(self, value: Any, noise: Array) -> Any:
        """A value with its tangent, or a step away."""
        return self.push.enter(value, noise, self.last)

    def is_given(self, atom: Atom) -> bool:
        """Whether a value is an input, as a frozen weight, and not one that has been computed."""
        return isinstance(atom, Constant) or atom in self.given

    def is_factored(self, atom: Atom) -> bool:
        return not isinstance(atom, Constant) and atom in self.factored

    def formed(self, atom: Atom, value: Any) -> Any:
        """A value with its tangent, which is formed if it was factored."""
        if isinstance(atom, Constant) or atom not in self.factored:
            return value
        tangent = self.factored[atom].dense(jnp.shape(value))
        return self.enter(value, tangent)

    def loop(
        self,
        equation: Equation,
        loop: Loop,
        values: list[Any],
        tangents: list[Direction | None],
    ) -> list[Any]:
        """A scan's outputs: its directions are scanned with it, those of constants pass through."""
        body = loop.body
        consts, starts, xs = loop.split(values)
        _, carried, _ = loop.split(equation.inputs)
        pairs = list(zip(body.inputs, tangents, strict=True))
        of_consts, of_carries, of_scanned = loop.split(pairs)
        # directions that are the same in all steps, by the body's variables
        fixed: dict[Variable, Direction] = {}
        for v, tangent in of_consts:
            if tangent is not None:
                fixed[v] = tangent
        handed_on: set[Variable] = set()
        for i, (v, tangent) in enumerate(of_carries):
            is_same = loop.unchanged[i]
            if not is_same or not isinstance(tangent, Factored):
                starts[i] = self.formed(carried[i], starts[i])
                continue
            fixed[v] = tangent
            handed_on.add(v)
            result = equation.outputs[i]
            self.factored[result] = tangent
        # what each step slices, and how it makes its direction of it
        slices: dict[Variable, Any] = {}
        row_of: dict[Variable, RowOf] = {}
        for v, tangent in of_scanned:
            if tangent is not None:
                slices[v], row_of[v] = tangent.rows()
        inner = _without(body, handed_on)

        def step(carry: list[Any], own: tuple[list[Any], Any, Array]) -> Any:
            xs, parts, index = own
            inputs = [*consts, *carry, *xs]
            env = dict(zip(body.inputs, inputs, strict=True))
            directions = dict(fixed)
            for v, part in parts.items():
                directions[v] = row_of[v](part, index)
            outputs = self.push.run(inner, env, directions)
            for i, atom in enumerate(body.outputs):
                if atom in handed_on:
                    outputs[i] = read(atom, env)
            return loop.split_outputs(outputs)

        indices = jnp.arange(loop.length)
        carry, ys = loop.scan(step, starts, (xs, slices, indices))
        return [*carry, *ys]


def _is_index(value: Any) -> bool:
    """Whether it is an array of integers: beside a parameter, where to look it up."""
    return isinstance(value, Array) and jnp.issubdtype(value.dtype, jnp.integer)


def _without(body: Program, handed_on: set[Variable]) -> Program:
    """The body without the outputs that it hands on: nobody needs to form their tangents."""
    nothing = Constant(0.0)
    outputs = [nothing if atom in handed_on else atom for atom in body.outputs]
    return dataclasses.replace(body, outputs=tuple(outputs))
