"""Forwards through a program: what its values are made of, and which parameters get own noises."""

import dataclasses
import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from forwax import _mesh
from forwax._programs.custom_rules import check_inside, custom_vjp_error
from forwax._programs.dataflow import Reach, equation_reach, fixed_point
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

    CONSTANT: literals, parameters behind a `stop_gradient`, and arrays that are no data, such as
    frozen weights and masks; see `forwax._sites.find`. DATA: the other arrays that the loss is
    given. MIXED: data and parameters. PARAMETER: parameters and constants alone.
    """

    CONSTANT = 0
    DATA = 1
    MIXED = 2
    PARAMETER = 3


Unselected: TypeAlias = Mapping[Variable, _mesh.Axes | None]
"""The inputs that get weight noise: None, or where each example has its own, these mesh axes."""


class Classifier:
    """Assigns kinds, and rewrites a program: noise gets a place wherever parameters meet data.

    Attributes:
        types: the abstract value of each variable. It is append-only: a new variable's number is
            the list's length, and a variable that is not used after all leaves a gap.
        reach: the losses that each variable reaches; extended likewise.
        closed: what arrays written into the program are: constants or data.
        pushes: whether tangents are pushed, which some custom rules refuse.
        kinds: the kind of each variable.
        own_copies: the parameters' copies on which each example has a noise of its own.
    """

    def __init__(
        self, types: list[Any], reach: Reach, closed: Kind, pushes: bool
    ) -> None:
        self.types = types
        self.reach = reach
        self.pushes = pushes
        self.closed = closed
        self.kinds: dict[Variable, Kind] = {}
        self.own_copies: list[Variable] = []

    def classify(
        self,
        program: Program,
        kinds: Sequence[Kind],
        unselected: Unselected,
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
        for variable, over in unselected.items():
            if self.is_parameter(variable):
                draft.renamed[variable] = draft.promote(variable, None, over)
        draft.add_all(program.equations)

        # A loss of parameters alone, such as weight decay, meets data nowhere else.
        outputs = [draft.rename(atom) for atom in program.outputs]
        for i, atom in enumerate(outputs[:num_losses]):
            outputs[i] = draft.promote_if_due(atom, Kind.MIXED, None)
        return Program(
            program.inputs,
            tuple(draft.equations),
            tuple(outputs),
        )

    def kind(self, atom: Atom) -> Kind:
        """The kind of a variable or constant."""
        if not isinstance(atom, Constant):
            return self.kinds[atom]
        if jnp.ndim(atom.value) > 0:
            return self.closed
        return Kind.CONSTANT

    def kinds_of(self, atoms: Iterable[Atom]) -> list[Kind]:
        """The kinds of several variables and constants."""
        return [self.kind(atom) for atom in atoms]

    def is_parameter(self, atom: Atom) -> bool:
        """Whether an atom is a parameter, or made of parameters and constants alone."""
        return self.kind(atom) is Kind.PARAMETER

    def define(self, variable: Variable, kind: Kind) -> None:
        """Set a kind; what no derivative passes through is a constant or data."""
        # Kinds of one variable differ only between rounds of a fixed point, and only grow there.
        has_derivative = is_inexact(self.types[variable])
        if not has_derivative or not self.reach[variable]:
            kind = _without_derivative(kind)
        self.kinds[variable] = kind

    def copy(self, variable: Variable, over: _mesh.Axes | None) -> Variable:
        """A new mixed variable of the same type, which varies over further mesh axes."""
        aval = self.types[variable]
        if over:
            over = over | _mesh.type_axes(aval)
            aval = jax.typeof(_mesh.like(tuple(aval.shape), aval.dtype, over))
        copy = new_variable(self.types, aval)
        self.reach.append(self.reach[variable])
        self.kinds[copy] = Kind.MIXED
        if over is not None:
            self.own_copies.append(copy)
        return copy


class _Draft:
    """One program, or the body of one loop, while it is rewritten.

    Attributes:
        classifier: shared by all drafts, for variables are unique over nested bodies.
        invariant: the body's inputs that are the same in every step.
        hoisted: those of them that need a noise of their own, with new inputs that bring it.
        renamed: what has taken the place of inputs with weight noise.
        equations: the rewritten program so far.
    """

    def __init__(
        self,
        classifier: Classifier,
        invariant: Sequence[Variable] = (),
    ) -> None:
        self.classifier = classifier
        self.invariant = set(invariant)
        self.hoisted: dict[Variable, Variable] = {}
        self.renamed: dict[Variable, Variable] = {}
        self.equations: list[Equation] = []

    def rename(self, atom: Atom) -> Atom:
        if isinstance(atom, Constant):
            return atom
        return self.renamed.get(atom, atom)

    def promote(
        self, variable: Atom, origin: Any, over: _mesh.Axes | None = None
    ) -> Variable:
        """Give a parameter a noise of its own at this use.

        What is the same in every step of a loop gets it outside: one noise for all steps. Unless
        `over` is None each example has its own, and examples lie along these mesh axes.
        """
        assert not isinstance(variable, Constant)
        if variable in self.hoisted:
            return self.hoisted[variable]
        copy = self.classifier.copy(variable, over)
        if variable in self.invariant:
            self.hoisted[variable] = copy
        else:
            params = {"over": over} if over else {}
            identity = Equation(None, (variable,), (copy,), params, origin=origin)
            self.equations.append(identity)
        return copy

    def promote_if_due(self, atom: Atom, due: Kind, origin: Any) -> Atom:
        """A parameter with a noise of its own where a mixed value is due; others as they are."""
        if due is Kind.MIXED and self.classifier.is_parameter(atom):
            return self.promote(atom, origin)
        return atom

    def promote_all(self, atoms: Sequence[Atom], origin: Any) -> tuple[Atom, ...]:
        """An equation's inputs, each parameter with one noise however often it is read."""
        copies: dict[Atom, Atom] = {}
        for variable in variables(atoms):
            if variable in copies:
                continue
            if self.classifier.is_parameter(variable):
                copies[variable] = self.promote(variable, origin)
        return tuple(copies.get(atom, atom) for atom in atoms)

    def add_all(self, equations: Sequence[Equation]) -> None:
        for equation in equations:
            inputs = tuple(map(self.rename, equation.inputs))
            self.add(dataclasses.replace(equation, inputs=inputs))

    def add(self, equation: Equation) -> None:
        """Classify an equation; where a parameter may not enter as it is, promote it."""
        kinds = set(self.classifier.kinds_of(equation.inputs))
        is_live = equation_reach(equation, self.classifier.reach) != 0
        if equation.facts.stops_derivatives:
            kinds = set(map(_without_derivative, kinds))
        elif is_live and self.classifier.pushes:
            self.check_custom_rules(equation, kinds)

        if is_live and Kind.PARAMETER in kinds:
            if equation.loop is not None and _have_data(kinds):
                self.add_loop(equation, equation.loop)
                return
            # The copy is an operation's input like data: the identity in front is the site.
            if not _may_enter(equation, kinds):
                inputs = self.promote_all(equation.inputs, equation.origin)
                equation = dataclasses.replace(equation, inputs=inputs)
                kinds = kinds - {Kind.PARAMETER} | {Kind.MIXED}
        # A loop in which no parameter meets data is one operation like any other.
        operation = dataclasses.replace(equation, loop=None)
        kind = _join(*kinds)
        self.append(operation, [kind] * len(operation.outputs))

    def check_custom_rules(self, equation: Equation, kinds: set[Kind]) -> None:
        """Raise where noise would have to pass a custom rule that forward mode cannot use."""
        facts = equation.facts
        if facts.lacks_jvp:
            if _join(*kinds) is Kind.MIXED:
                raise custom_vjp_error(equation.origin)
            return
        # The equations of a loop's body come here one by one.
        if equation.loop is not None or facts.has_own_jvp or equation.origin is None:
            return
        depends: list[bool] = []
        for kind in self.classifier.kinds_of(equation.inputs):
            depends.append(kind in (Kind.MIXED, Kind.PARAMETER))
        check_inside(equation.origin, depends)

    def append(self, equation: Equation, kinds: Sequence[Kind]) -> None:
        for variable, kind in zip(equation.outputs, kinds, strict=True):
            self.classifier.define(variable, kind)
        self.equations.append(equation)

    def add_loop(self, equation: Equation, loop: Loop) -> None:
        """Add a scan in which parameters meet data; the kinds of its carries are a fixed point."""
        drafts: list[_Draft] = []

        def step(kinds: list[Kind]) -> list[Kind]:
            draft = self.body_draft(loop, kinds)
            drafts.append(draft)
            returned = self.classifier.kinds_of(loop.body.outputs)
            carry, stacked = loop.split_outputs(returned)
            return [*_as_carried(loop, carry), *stacked]

        given = self.classifier.kinds_of(equation.inputs)
        consts, carry, xs = loop.split(given)
        carry = _as_carried(loop, carry)
        inputs, outputs = fixed_point(
            loop,
            [*consts, *carry, *xs],
            step,
            _join,
        )
        _, carry, _ = loop.split(inputs)
        _, stacked = loop.split_outputs(outputs)
        # The last draft is that of the fixed point; earlier ones leave gaps in `types` alone.
        self.append_loop(equation, loop, drafts[-1], carry, stacked)

    def body_draft(self, loop: Loop, kinds: Sequence[Kind]) -> "_Draft":
        """The body rewritten for inputs of these kinds."""
        body = loop.body
        for variable, kind in zip(body.inputs, kinds, strict=True):
            self.classifier.define(variable, kind)
        invariant, carry, _ = loop.split(body.inputs)
        for variable, is_unchanged in zip(carry, loop.unchanged, strict=True):
            if is_unchanged:
                invariant.append(variable)
        draft = _Draft(self.classifier, invariant)
        draft.add_all(body.equations)
        return draft

    def append_loop(
        self,
        equation: Equation,
        loop: Loop,
        draft: "_Draft",
        carry_kinds: Sequence[Kind],
        stacked_kinds: Sequence[Kind],
    ) -> None:
        """Append a loop with its rewritten body; carries that become mixed are so at the start."""
        origin = equation.origin
        after, stacked = loop.split_outputs(loop.body.outputs)
        for i, kind in enumerate(carry_kinds):
            after[i] = draft.promote_if_due(after[i], kind, origin)
        consts, before, xs = loop.split(equation.inputs)
        for i, kind in enumerate(carry_kinds):
            before[i] = self.promote_if_due(before[i], kind, origin)
        # Hoisted inputs are new constants of the loop, and constants come first.
        outer = dict(zip(loop.body.inputs, equation.inputs, strict=True))
        hoisted = [self.promote(outer[v], origin) for v in draft.hoisted]

        body = Program(
            (*draft.hoisted.values(), *loop.body.inputs),
            tuple(draft.equations),
            (*after, *stacked),
        )
        rewritten = dataclasses.replace(
            equation,
            inputs=(*hoisted, *consts, *before, *xs),
            loop=loop.with_body(body, len(hoisted)),
        )
        self.append(rewritten, [*carry_kinds, *stacked_kinds])


def _without_derivative(kind: Kind) -> Kind:
    """What a value counts as when no derivative passes through it."""
    if kind is Kind.PARAMETER:
        return Kind.CONSTANT
    if kind is Kind.MIXED:
        return Kind.DATA
    return kind


def _as_carried(loop: Loop, kinds: Sequence[Kind]) -> list[Kind]:
    """What values of these kinds count as in a loop's carries.

    A carry is a parameter only if the loop returns it as it is: of another one, each step has its
    own noise. The kinds of such carries only grow, from constant over data to mixed.
    """
    carried: list[Kind] = []
    for kind, is_unchanged in zip(kinds, loop.unchanged, strict=True):
        if kind is Kind.PARAMETER and not is_unchanged:
            kind = Kind.MIXED
        carried.append(kind)
    return carried


def _have_data(kinds: Iterable[Kind]) -> bool:
    return any(kind in (Kind.DATA, Kind.MIXED) for kind in kinds)


def _join(*kinds: Kind) -> Kind:
    """What a value is made of, from what it is computed from."""
    if Kind.PARAMETER in kinds and _have_data(kinds):
        return Kind.MIXED
    return max(kinds, default=Kind.CONSTANT)


def _may_enter(equation: Equation, kinds: set[Kind]) -> bool:
    """Whether a parameter may enter as it is: where reverse mode can take an error to it."""
    if equation.irreversible:
        return False
    if not _have_data(kinds):
        return True
    # With programs inside, an operation is no site: its errors would be backprop's.
    return equation.facts.one_site or not equation.has_inner_programs
