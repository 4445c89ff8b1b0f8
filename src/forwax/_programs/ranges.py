"""What is known of a program's values before anything is computed: constants, and zeros by masks.

Asked for one value at a time, so that a program costs nothing that no question is about.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from forwax import _tree
from forwax._programs.bounds import Known, any_entry, anything, of_array
from forwax._programs.dataflow import mapped_variables
from forwax._programs.evaluate import bind
from forwax._programs.links import Shape
from forwax._programs.program import (
    Atom,
    Constant,
    Equation,
    Loop,
    Program,
    Traced,
    Variable,
)
from forwax._programs.range_rules import Operation, unchanged
from forwax._programs.tracing import called

_DEEPEST = 100
"""A question goes back through so many operations at most; what lies behind may be anything."""

_LARGEST = 1 << 24
"""Arrays with more entries are not looked at."""

_REAL = (jnp.bool_, jnp.integer, jnp.floating)


class Ranges:
    """What is known of each value of a program; parameters and data may be anything.

    Attributes:
        types: the abstract value of each variable.
        makers: the operation that gives each variable.
        sources: for the input of a loop's body the loop's operation, and which input it is.
        closed: the values of inputs that are known.
        found: what was asked for before.
        varying: what depends on values that are not known.
    """

    def __init__(self, traced: Traced) -> None:
        self.types = traced.types
        self.makers: dict[Variable, Equation] = {}
        self.sources: dict[Variable, tuple[Equation, Loop, int]] = {}
        self.closed: dict[Variable, Any] = {}
        self.found: dict[Variable, Known] = {}
        self.read(traced.program)
        # behind the closed-over arrays come parameters and data
        closed = traced.program.inputs[: len(traced.closed)]
        for variable, value in zip(closed, traced.closed, strict=True):
            if not _tree.is_abstract(value):
                self.closed[variable] = value
        unknown = [v for v in traced.program.inputs if v not in self.closed]
        self.varying = mapped_variables(traced.program, unknown)

    def read(self, program: Program) -> None:
        """Note who makes what."""
        for equation in program.equations:
            self.makers.update(dict.fromkeys(equation.outputs, equation))
            if equation.loop is not None:
                for i, variable in enumerate(equation.loop.body.inputs):
                    self.sources[variable] = (equation, equation.loop, i)
                self.read(equation.loop.body)

    def nonzero(self, atom: Atom) -> np.ndarray:
        """Where an array may differ from 0; axes have its lengths, or 1 if it is so all along."""
        known = self.of(atom)
        return ~known.bounds.is_zero[known.kinds]

    def choice(
        self,
        atom: Atom,
        case: int,
    ) -> np.ndarray:
        """Where an array may be this whole number, in the same form."""
        known = self.of(atom)
        bounds = known.bounds
        is_possible = (bounds.low <= case) & (bounds.high >= case)
        return is_possible[known.kinds]

    def of(
        self,
        atom: Atom,
        depth: int = 0,
    ) -> Known:
        """The range of an atom."""
        if isinstance(atom, Constant):
            return self.of_value(atom.value)
        if atom in self.found:
            return self.found[atom]
        shape = self.shape(atom)
        if depth > _DEEPEST or math.prod(shape) > _LARGEST:
            return anything(shape)
        if atom in self.closed:
            known = self.of_value(self.closed[atom])
        elif atom in self.sources:
            known = self.of_input(*self.sources[atom], depth)
        elif atom in self.makers:
            known = self.of_result(self.makers[atom], atom, depth)
        else:
            known = anything(shape)
        self.found[atom] = known
        return known

    def of_value(self, value: Any) -> Known:
        """The range of an array that is there."""
        shape = tuple(jnp.shape(value))
        dtype = getattr(value, "dtype", None) or jnp.result_type(value)
        is_real = any(jnp.issubdtype(dtype, kind) for kind in _REAL)
        is_here = getattr(value, "is_fully_addressable", True)
        if not (is_real and is_here) or math.prod(shape) > _LARGEST:
            return anything(shape)
        array = np.asarray(value)
        if 0 in shape or np.isnan(array.astype(np.float64)).any():
            return anything(shape)
        return of_array(array)

    def of_input(
        self,
        equation: Equation,
        loop: Loop,
        i: int,
        depth: int,
    ) -> Known:
        """The range of an input of a loop's body, in all steps."""
        outside = equation.inputs[i]
        carry = i - loop.num_consts
        if carry < 0:
            return self.of(outside, depth + 1)
        if carry < loop.num_carry:
            if loop.unchanged[carry]:
                return self.of(outside, depth + 1)
            return anything(self.shape(outside))
        known = self.of(outside, depth + 1)
        if loop.length == 0:
            return anything(self.shape(outside)[1:])
        return any_entry(known, self.shape(outside)[1:])

    def of_result(
        self,
        equation: Equation,
        out: Variable,
        depth: int,
    ) -> Known:
        """The range of one of the results of an operation."""
        shape = self.shape(out)
        if len(equation.outputs) > 1 or equation.loop is not None:
            return anything(shape)
        if equation.facts.has_own_jvp:
            return self.of_inner(equation, depth)
        rule = equation.facts.range
        if rule is None and not self.varying.isdisjoint(equation.variables):
            return anything(shape)
        operands = [self.of(atom, depth + 1) for atom in equation.inputs]
        values = [x.value for x in operands if x.value is not None]
        if rule is not unchanged and len(values) == len(operands):
            return self.computed(equation, values, shape)
        if rule is None:
            return anything(shape)
        shapes = list(map(self.shape, equation.inputs))
        dtype = self.types[out].dtype
        at = Operation(equation.params, operands, shapes, shape, dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            return rule(at)

    def computed(
        self, equation: Equation, values: Sequence[np.ndarray], shape: Shape
    ) -> Known:
        """The range of what an operation makes of known values."""
        if equation.has_inner_programs:
            return anything(shape)
        try:
            with jax.ensure_compile_time_eval():
                (value,) = bind(equation, [jnp.asarray(x) for x in values])
        except Exception:  # some need what is around them, such as the axes of a mesh
            return anything(shape)
        return self.of_value(value)

    def of_inner(
        self,
        equation: Equation,
        depth: int,
    ) -> Known:
        """The range of what a function with a derivative of its own gives, by its own program."""
        program = called(equation, self.types)
        self.read(program)
        return self.of(program.outputs[0], depth + 1)

    def shape(self, atom: Atom) -> Shape:
        """The shape of an atom."""
        if isinstance(atom, Constant):
            return tuple(jnp.shape(atom.value))
        return tuple(self.types[atom].shape)
