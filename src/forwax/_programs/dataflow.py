"""What flows where in a program: the losses that a value reaches, and what depends on inputs."""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

from forwax._programs.program import (
    Atom,
    Constant,
    Equation,
    Loop,
    Program,
    Variable,
    is_inexact,
)

Fact = TypeVar("Fact")


def fixed_point(
    loop: Loop,
    seeds: Sequence[Fact],
    transfer: Callable[[list[Fact]], Iterable[Fact]],
    join: Callable[[Fact, Fact], Fact],
    *,
    backward: bool = False,
) -> tuple[list[Fact], list[Fact]]:
    """What holds on both sides of a loop's body in every step.

    Args:
        loop: the loop.
        seeds: what holds before the first step, for each input of the body; backward, for each
            output behind the last step.
        transfer: one step: takes what holds on the seeds' side to what holds on the other.
        join: what holds of a carry if either does. It may only grow, in finitely many ways, so
            that this ends.
        backward: whether facts go from outputs to inputs.

    Returns:
        What holds on the seeds' side, and on the other.
    """
    here = loop.carries_of_inputs
    there = loop.carries_of_outputs
    if backward:
        here, there = there, here
    known = list(seeds)
    while True:
        found = list(transfer(known))
        # What one step hands on, the next one is given.
        grown = list(known)
        grown[here] = map(join, known[here], found[there])
        if grown == known:
            return known, found
        known = grown


Reach: TypeAlias = list[int]
"""For each variable the set of losses that depend on it through derivatives, as a bit mask."""


def reach(program: Program, types: Sequence[Any], num_losses: int) -> Reach:
    """The losses that each variable reaches; the first outputs of the program are the losses.

    `stop_gradient` and values without derivatives (integers, booleans) cut. A variable that reaches
    no loss needs no noise, and its value counts as a constant.
    """
    masks = [0] * len(types)
    seeds = [0] * len(program.outputs)
    for i in range(num_losses):
        seeds[i] = 1 << i
    _ReachOf(types, masks).run(program, seeds)
    return masks


def equation_reach(equation: Equation, masks: Reach) -> int:
    """The losses that any output of an equation reaches."""
    mask = 0
    for variable in equation.outputs:
        mask |= masks[variable]
    return mask


@dataclasses.dataclass(frozen=True, eq=False)
class _ReachOf:
    """A walk backwards that adds to masks.

    Attributes:
        types: the abstract value of each variable.
        masks: what each variable reaches, as far as is known. They only grow.
    """

    types: Sequence[Any]
    masks: Reach

    def run(self, program: Program, seeds: Sequence[int]) -> list[int]:
        """What a program's inputs reach, from what its outputs do."""
        self.add(program.outputs, seeds)
        for equation in reversed(program.equations):
            mask = equation_reach(equation, self.masks)
            if not mask or equation.facts.stops_derivatives:
                continue
            if equation.loop is None:
                incoming = [mask] * len(equation.inputs)
            else:
                incoming = self.through(equation, equation.loop)
            self.add(equation.inputs, incoming)
        return [self.masks[v] for v in program.inputs]

    def through(self, equation: Equation, loop: Loop) -> list[int]:
        """What a loop's inputs reach, from what its outputs do."""
        seeds = [self.masks[v] for v in equation.outputs]
        step = functools.partial(self.run, loop.body)
        _, incoming = fixed_point(loop, seeds, step, operator.or_, backward=True)
        return incoming

    def add(self, atoms: Sequence[Atom], incoming: Sequence[int]) -> None:
        """Add one use of some values."""
        for atom, mask in zip(atoms, incoming, strict=True):
            if isinstance(atom, Constant):
                continue
            if mask and is_inexact(self.types[atom]):
                self.masks[atom] |= mask


def mapped_variables(program: Program, inputs: Iterable[Variable]) -> set[Variable]:
    """The variables that depend on the given inputs: those that differ between examples."""
    mapped = set(inputs)
    _depend(program, mapped)
    return mapped


def _depend(program: Program, mapped: set[Variable]) -> None:
    """Add the variables of a program that depend on those which are there."""
    for equation in program.equations:
        if equation.loop is not None:
            _depend_through(equation, equation.loop, mapped)
        elif mapped.intersection(equation.variables):
            mapped.update(equation.outputs)


def _depend_through(equation: Equation, loop: Loop, mapped: set[Variable]) -> None:
    def flags(atoms: Sequence[Atom]) -> list[bool]:
        return [not isinstance(atom, Constant) and atom in mapped for atom in atoms]

    def add(variables: Sequence[Variable], depends: Sequence[bool]) -> None:
        mapped.update(itertools.compress(variables, depends))

    def step(depends: list[bool]) -> list[bool]:
        add(loop.body.inputs, depends)
        _depend(loop.body, mapped)
        return flags(loop.body.outputs)

    seeds = flags(equation.inputs)
    _, depends = fixed_point(loop, seeds, step, operator.or_)
    add(equation.outputs, depends)
