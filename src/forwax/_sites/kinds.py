"""Forwards through a program: what each variable is made of, and where a parameter must get a noise of its own."""

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

import jax.extend.core as jex
import jax.numpy as jnp

from forwax._programs.custom_rules import check_inside, custom_vjp_error
from forwax._programs.dataflow import Reach, equation_reach
from forwax._programs.program import (
    Atom,
    Constant,
    Equation,
    Loop,
    Program,
    Variable,
    is_inexact,
    variables,
)
from forwax._programs.tracing import new_variable


class Kind(enum.IntEnum):
    """What a value is made of.

    CONSTANT: literals and parameters behind a `stop_gradient`. DATA: the loss's other arguments and
    arrays that it closes over. MIXED: data and parameters. PARAMETER: parameters and constants
    alone.
    """

    CONSTANT = 0
    DATA = 1
    MIXED = 2
    PARAMETER = 3


class Classifier:
    """Assigns kinds, and rewrites the program so that every parameter's way to data is one that noise can be put on.

    Attributes:
        types: the abstract value of each variable; new variables are appended.
        reach: the losses that each variable reaches; extended likewise.
        kinds: the kind of each variable.
    """

    def __init__(self, types: list[Any], reach: Reach) -> None:
        self.types, self.reach = types, reach
        self.kinds: dict[Variable, Kind] = {}

    def classify(
        self,
        program: Program,
        kinds: Sequence[Kind],
        unselected: Sequence[Variable],
        num_losses: int,
    ):
        """The rewritten program; `unselected` inputs get weight noise, and so do losses of parameters alone."""
        level = _Level(self)
        for variable, kind in zip(program.inputs, kinds, strict=True):
            self.define(variable, kind)
        for variable in unselected:
            if self.kinds[variable] is Kind.PARAMETER:
                level.renamed[variable] = level.promote(variable, None)
        level.run(program)
        outputs = [level.rename(atom) for atom in program.outputs]
        promoted = [
            level.promote(atom, None)
            if i < num_losses and self.kind(atom) is Kind.PARAMETER
            else atom
            for i, atom in enumerate(outputs)
        ]
        return Program(program.inputs, tuple(level.equations), tuple(promoted))

    def kind(self, atom: Atom) -> Kind:
        """The kind of a variable or constant; arrays written into the program are data."""
        if isinstance(atom, Constant):
            return Kind.DATA if jnp.ndim(atom.value) else Kind.CONSTANT
        return self.kinds[atom]

    def define(self, variable: Variable, kind: Kind) -> None:
        """Set a kind; what no derivative passes through is a constant or data."""
        if not is_inexact(self.types[variable]) or not self.reach[variable]:
            kind = {Kind.PARAMETER: Kind.CONSTANT, Kind.MIXED: Kind.DATA}.get(kind, kind)
        self.kinds[variable] = kind

    def copy(self, variable: Variable) -> Variable:
        """A new mixed variable of the same type."""
        number = new_variable(self.types, self.types[variable])
        self.reach.append(self.reach[variable])
        self.kinds[number] = Kind.MIXED
        return number


class _Level:
    """One program, or the body of one loop, on its way to being rewritten."""

    def __init__(self, classifier: Classifier, invariant: Sequence[Variable] = ()) -> None:
        self.at = classifier
        self.invariant = set(invariant)
        self.hoisted: dict[Variable, Variable] = {}
        self.renamed: dict[Variable, Variable] = {}
        self.equations: list[Equation] = []

    def rename(self, atom: Atom) -> Atom:
        return atom if isinstance(atom, Constant) else self.renamed.get(atom, atom)

    def promote(self, variable: Atom, origin: Any) -> Variable:
        """Give a parameter a noise of its own at this use: outside the loop if it is the same in every step."""
        assert not isinstance(variable, Constant)
        if variable in self.invariant:
            if variable not in self.hoisted:
                self.hoisted[variable] = self.at.copy(variable)
            return self.hoisted[variable]
        copy = self.at.copy(variable)
        self.equations.append(Equation(None, (variable,), (copy,), origin=origin))
        return copy

    def promote_all(self, atoms: Sequence[Atom], origin: Any) -> tuple[Atom, ...]:
        copies = {v: self.promote(v, origin) for v in dict.fromkeys(self.parameters(atoms))}
        return tuple(
            atom if isinstance(atom, Constant) else copies.get(atom, atom) for atom in atoms
        )

    def parameters(self, atoms: Sequence[Atom]) -> list[Variable]:
        return [v for v in variables(atoms) if self.at.kinds[v] is Kind.PARAMETER]

    def run(self, program: Program) -> None:
        for equation in program.equations:
            self.add(dataclasses.replace(equation, inputs=tuple(map(self.rename, equation.inputs))))

    def add(self, equation: Equation) -> None:
        kinds = {self.at.kind(atom) for atom in equation.inputs}
        live = equation_reach(equation, self.at.reach)
        if equation.name == "stop_gradient":
            kinds = {
                {Kind.PARAMETER: Kind.CONSTANT, Kind.MIXED: Kind.DATA}.get(kind, kind)
                for kind in kinds
            }
        elif live and equation.name.startswith("custom_vjp_call"):
            _check_custom_vjp(equation, kinds)
        elif (
            live
            and equation.loop is None
            and equation.name != "custom_jvp_call"
            and equation.origin is not None
        ):
            check_inside(
                equation.origin,
                [self.at.kind(a) in (Kind.MIXED, Kind.PARAMETER) for a in equation.inputs],
            )
        if live and Kind.PARAMETER in kinds:
            if equation.loop is not None and kinds - {Kind.CONSTANT, Kind.PARAMETER}:
                self.add_loop(equation)
                return
            if not _differentiable(equation, kinds):
                equation = dataclasses.replace(
                    equation, inputs=self.promote_all(equation.inputs, equation.origin)
                )
                kinds = kinds - {Kind.PARAMETER} | {Kind.MIXED}
        self.append(
            dataclasses.replace(equation, loop=None),
            [_join(kinds)] * len(equation.outputs),
        )

    def append(self, equation: Equation, kinds: Sequence[Kind]) -> None:
        for variable, kind in zip(equation.outputs, kinds, strict=True):
            self.at.define(variable, kind)
        self.equations.append(equation)

    def add_loop(self, equation: Equation) -> None:
        """A scan in which parameters meet data: the kinds of its carries are the least fixed point."""
        loop = equation.loop
        assert loop is not None
        body, first = loop.body, loop.num_consts
        kept = [body.outputs[i] == body.inputs[first + i] for i in range(loop.num_carry)]
        kinds = [self.at.kind(atom) for atom in equation.inputs]
        for i in range(loop.num_carry):
            if kinds[first + i] is Kind.PARAMETER and not kept[i]:
                kinds[first + i] = Kind.MIXED
        while True:
            level = self._body(body, loop, kinds, kept)
            outs = [self.at.kind(atom) for atom in body.outputs]
            grown = [
                kind if same else _join({kind, Kind.MIXED if out is Kind.PARAMETER else out})
                for kind, out, same in zip(
                    kinds[first : first + loop.num_carry], outs, kept, strict=False
                )
            ]
            if grown == kinds[first : first + loop.num_carry]:
                break
            kinds[first : first + loop.num_carry] = grown
        self._finish_loop(equation, loop, level, kinds, outs)

    def _body(
        self, body: Program, loop: Loop, kinds: Sequence[Kind], kept: Sequence[bool]
    ) -> "_Level":
        for variable, kind in zip(body.inputs, kinds, strict=True):
            self.at.define(variable, kind)
        carries = body.inputs[loop.num_consts : loop.num_consts + loop.num_carry]
        same = [v for v, keep in zip(carries, kept, strict=True) if keep]
        level = _Level(self.at, [*body.inputs[: loop.num_consts], *same])
        level.run(body)
        return level

    def _finish_loop(
        self,
        equation: Equation,
        loop: Loop,
        level: "_Level",
        kinds: Sequence[Kind],
        outs: list,
    ) -> None:
        body, first, last = loop.body, loop.num_consts, loop.num_consts + loop.num_carry
        outputs = list(body.outputs)
        outs[: loop.num_carry] = kinds[first:last]
        for i in range(loop.num_carry):
            if kinds[first + i] is Kind.MIXED and self.at.kind(outputs[i]) is Kind.PARAMETER:
                outputs[i] = level.promote(outputs[i], equation.origin)
        inputs = list(equation.inputs)
        for i in range(first, last):
            if kinds[i] is Kind.MIXED and self.at.kind(inputs[i]) is Kind.PARAMETER:
                inputs[i] = self.promote(inputs[i], equation.origin)
        outer = dict(zip(body.inputs, equation.inputs, strict=True))
        extra = [self.promote(outer[v], equation.origin) for v in level.hoisted]
        rewritten = Program(
            (*level.hoisted.values(), *body.inputs),
            tuple(level.equations),
            tuple(outputs),
        )
        new_loop = dataclasses.replace(loop, body=rewritten, num_consts=first + len(extra))
        self.append(dataclasses.replace(equation, inputs=(*extra, *inputs), loop=new_loop), outs)


def _join(kinds: set[Kind]) -> Kind:
    if Kind.PARAMETER in kinds and kinds & {Kind.DATA, Kind.MIXED}:
        return Kind.MIXED
    return max(kinds, default=Kind.CONSTANT)


def _differentiable(equation: Equation, kinds: set[Kind]) -> bool:
    """Whether a parameter may enter here as it is: in an operation, or in a chain that reverse mode can cross."""
    if equation.contains("while"):
        return False
    if not kinds & {Kind.DATA, Kind.MIXED}:
        return True
    known = equation.name == "custom_jvp_call" or equation.name.startswith("scatter")
    return known or not list(jex.jaxprs_in_params(equation.params))


def _check_custom_vjp(equation: Equation, kinds: set[Kind]) -> None:
    if Kind.MIXED in kinds or {Kind.PARAMETER, Kind.DATA} <= kinds:
        raise custom_vjp_error(equation.origin)
