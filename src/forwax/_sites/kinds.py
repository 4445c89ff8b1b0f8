"""Forwards through a program: what its values are made of, and which parameters get own noises."""

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
    """Assigns kinds, and rewrites the program so that noise can be put wherever parameters meet data.

    Attributes:
        types: the abstract value of each variable. It is append-only: a new variable's number is
            its length, and a variable that is not used after all leaves a gap.
        reach: the losses that each variable reaches; extended likewise.
        kinds: the kind of each variable.
    """

    def __init__(self, types: list[Any], reach: Reach) -> None:
        self.types = types
        self.reach = reach
        self.kinds: dict[Variable, Kind] = {}

    def classify(
        self,
        program: Program,
        kinds: Sequence[Kind],
        unselected: Sequence[Variable],
        num_losses: int,
    ) -> Program:
        """The rewritten program.

        Args:
            program: what to rewrite; its first outputs are the losses.
            kinds: of its inputs.
            unselected: the inputs that get weight noise. Losses of parameters alone get it too.
            num_losses: how many outputs are losses.
        """
        draft = _Draft(self)
        for variable, kind in zip(program.inputs, kinds, strict=True):
            self.define(variable, kind)
        for variable in unselected:
            if self.kinds[variable] is Kind.PARAMETER:
                draft.renamed[variable] = draft.promote(variable, None)
        draft.add_all(program.equations)

        outputs = [draft.rename(atom) for atom in program.outputs]
        for i, atom in enumerate(outputs[:num_losses]):
            outputs[i] = draft.promote_if_due(atom, Kind.MIXED, None)
        return Program(program.inputs, tuple(draft.equations), tuple(outputs))

    def kind(self, atom: Atom) -> Kind:
        """The kind of a variable or constant; arrays written into the program are data."""
        if not isinstance(atom, Constant):
            return self.kinds[atom]
        return Kind.DATA if jnp.ndim(atom.value) else Kind.CONSTANT

    def define(self, variable: Variable, kind: Kind) -> None:
        """Set a kind; what no derivative passes through is a constant or data."""
        passes_derivatives = is_inexact(self.types[variable]) and self.reach[variable]
        self.kinds[variable] = kind if passes_derivatives else _without_derivatives(kind)

    def copy(self, variable: Variable) -> Variable:
        """A new mixed variable of the same type."""
        number = new_variable(self.types, self.types[variable])
        self.reach.append(self.reach[variable])
        self.kinds[number] = Kind.MIXED
        return number


class _Draft:
    """One program, or the body of one loop, while it is rewritten.

    Attributes:
        at: the classifier; it is shared, for variables are unique over all nested bodies.
        invariant: the body's inputs that are the same in every step.
        hoisted: those of them that need a noise of their own, with new inputs that bring it.
        renamed: what has taken the place of inputs with weight noise.
        equations: the rewritten program so far.
    """

    def __init__(self, classifier: Classifier, invariant: Sequence[Variable] = ()) -> None:
        self.at = classifier
        self.invariant = set(invariant)
        self.hoisted: dict[Variable, Variable] = {}
        self.renamed: dict[Variable, Variable] = {}
        self.equations: list[Equation] = []

    def rename(self, atom: Atom) -> Atom:
        return atom if isinstance(atom, Constant) else self.renamed.get(atom, atom)

    def promote(self, variable: Atom, origin: Any) -> Variable:
        """Give a parameter a noise of its own at this use.

        What is the same in every step of a loop gets it outside: one noise for all steps.
        """
        assert not isinstance(variable, Constant)
        if variable not in self.invariant:
            copy = self.at.copy(variable)
            self.equations.append(Equation(None, (variable,), (copy,), origin=origin))
            return copy
        if variable not in self.hoisted:
            self.hoisted[variable] = self.at.copy(variable)
        return self.hoisted[variable]

    def promote_if_due(self, atom: Atom, kind: Kind, origin: Any) -> Atom:
        """A parameter with a noise of its own where a mixed value is due; others as they are."""
        if kind is Kind.MIXED and self.at.kind(atom) is Kind.PARAMETER:
            return self.promote(atom, origin)
        return atom

    def promote_all(self, atoms: Sequence[Atom], origin: Any) -> tuple[Atom, ...]:
        """An equation's inputs, each parameter with one noise however often it is read."""
        parameters = [v for v in variables(atoms) if self.at.kinds[v] is Kind.PARAMETER]
        copies: dict[Atom, Atom] = {v: self.promote(v, origin) for v in dict.fromkeys(parameters)}
        return tuple(copies.get(atom, atom) for atom in atoms)

    def add_all(self, equations: Sequence[Equation]) -> None:
        for equation in equations:
            inputs = tuple(map(self.rename, equation.inputs))
            self.add(dataclasses.replace(equation, inputs=inputs))

    def add(self, equation: Equation) -> None:
        """Classify an equation; where a parameter may not enter as it is, promote it."""
        kinds = {self.at.kind(atom) for atom in equation.inputs}
        is_live = equation_reach(equation, self.at.reach) != 0
        if equation.name == "stop_gradient":
            kinds = set(map(_without_derivatives, kinds))
        elif is_live:
            self.check_custom_rules(equation, kinds)

        takes_parameter = is_live and Kind.PARAMETER in kinds
        if takes_parameter and equation.loop is not None and _have_data(kinds):
            self.add_loop(equation, equation.loop)
            return
        if takes_parameter and not _may_enter(equation, kinds):
            inputs = self.promote_all(equation.inputs, equation.origin)
            equation = dataclasses.replace(equation, inputs=inputs)
            kinds = kinds - {Kind.PARAMETER} | {Kind.MIXED}
        # A loop in which no parameter meets data is one operation like any other.
        equation = dataclasses.replace(equation, loop=None)
        self.append(equation, [_join(kinds)] * len(equation.outputs))

    def check_custom_rules(self, equation: Equation, kinds: set[Kind]) -> None:
        """Raise where the noise of a site would have to pass a rule that forward mode lacks."""
        if equation.name.startswith("custom_vjp_call"):
            if Kind.MIXED in kinds or {Kind.PARAMETER, Kind.DATA} <= kinds:
                raise custom_vjp_error(equation.origin)
            return
        # The body of a loop comes here by itself; the user's own derivative covers what it hides.
        if equation.loop is not None or equation.name == "custom_jvp_call":
            return
        if equation.origin is None:
            return
        varies = [self.at.kind(a) in (Kind.MIXED, Kind.PARAMETER) for a in equation.inputs]
        check_inside(equation.origin, varies)

    def append(self, equation: Equation, kinds: Sequence[Kind]) -> None:
        for variable, kind in zip(equation.outputs, kinds, strict=True):
            self.at.define(variable, kind)
        self.equations.append(equation)

    def add_loop(self, equation: Equation, loop: Loop) -> None:
        """Add a scan in which parameters meet data; its carries' kinds are the least fixed point."""
        given = [self.at.kind(atom) for atom in equation.inputs]
        consts, carry, xs = loop.split(given)
        # A carry stays a parameter only if the loop returns it as it is: of another one each step
        # would have its own noise. Such carries grow from constant over data to mixed, so this ends.
        carry = [
            kind if same else _as_carried(kind)
            for kind, same in zip(carry, loop.unchanged, strict=True)
        ]
        while True:
            body = self.body_draft(loop, [*consts, *carry, *xs])
            returned = [self.at.kind(atom) for atom in loop.body.outputs]
            after, stacked = loop.split_outputs(returned)
            grown = [
                kind if same else _join({kind, _as_carried(new)})
                for kind, new, same in zip(carry, after, loop.unchanged, strict=True)
            ]
            if grown == carry:
                break
            carry = grown
        self.append_loop(equation, loop, body, carry, stacked)

    def body_draft(self, loop: Loop, kinds: Sequence[Kind]) -> "_Draft":
        """The body rewritten for inputs of these kinds."""
        for variable, kind in zip(loop.body.inputs, kinds, strict=True):
            self.at.define(variable, kind)
        consts, carry, _ = loop.split(loop.body.inputs)
        unchanged = [v for v, same in zip(carry, loop.unchanged, strict=True) if same]
        draft = _Draft(self.at, [*consts, *unchanged])
        draft.add_all(loop.body.equations)
        return draft

    def append_loop(
        self,
        equation: Equation,
        loop: Loop,
        body: "_Draft",
        carry_kinds: Sequence[Kind],
        stacked_kinds: Sequence[Kind],
    ) -> None:
        """Append a loop with its rewritten body; carries that become mixed are so from the start."""
        origin = equation.origin
        after, stacked = loop.split_outputs(loop.body.outputs)
        after = [
            body.promote_if_due(atom, kind, origin)
            for atom, kind in zip(after, carry_kinds, strict=True)
        ]
        consts, before, xs = loop.split(equation.inputs)
        before = [
            self.promote_if_due(atom, kind, origin)
            for atom, kind in zip(before, carry_kinds, strict=True)
        ]
        outer = dict(zip(loop.body.inputs, equation.inputs, strict=True))
        hoisted = [self.promote(outer[v], origin) for v in body.hoisted]

        body_inputs = (*body.hoisted.values(), *loop.body.inputs)
        rewritten = Program(body_inputs, tuple(body.equations), (*after, *stacked))
        new_equation = dataclasses.replace(
            equation,
            inputs=(*hoisted, *consts, *before, *xs),
            loop=loop.with_body(rewritten, len(hoisted)),
        )
        self.append(new_equation, [*carry_kinds, *stacked_kinds])


def _without_derivatives(kind: Kind) -> Kind:
    """What a value counts as when no derivative passes through it."""
    return {Kind.PARAMETER: Kind.CONSTANT, Kind.MIXED: Kind.DATA}.get(kind, kind)


def _as_carried(kind: Kind) -> Kind:
    """What a carry counts as that the steps of a loop change."""
    return Kind.MIXED if kind is Kind.PARAMETER else kind


def _have_data(kinds: set[Kind]) -> bool:
    return not kinds.isdisjoint({Kind.DATA, Kind.MIXED})


def _join(kinds: set[Kind]) -> Kind:
    """What a value is made of, from what it is computed from."""
    if Kind.PARAMETER in kinds and _have_data(kinds):
        return Kind.MIXED
    return max(kinds, default=Kind.CONSTANT)


def _may_enter(equation: Equation, kinds: set[Kind]) -> bool:
    """Whether a parameter may enter as it is: reverse mode crosses its chain, or the site, alone."""
    if equation.contains("while"):
        return False
    if not _have_data(kinds):
        return True
    # An operation with programs inside is no site: the error would be backprop's inside it.
    known = equation.name == "custom_jvp_call" or equation.name.startswith("scatter")
    return known or not list(jex.jaxprs_in_params(equation.params))
