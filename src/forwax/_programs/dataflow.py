"""What flows where in a program: the losses that a value reaches, and what depends on inputs."""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

from forwax._programs.program import Atom, Constant, Equation, Loop, Program, Variable, is_inexact

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
    known = list(seeds)
    carries_here, carries_there = loop.carries_of_outputs, loop.carries_of_inputs
    if not backward:
        carries_here, carries_there = carries_there, carries_here
    while True:
        found = list(transfer(known))
        grown = list(known)
        grown[carries_here] = map(join, known[carries_here], found[carries_there])
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
    seeds = [1 << i if i < num_losses else 0 for i in range(len(program.outputs))]
    _reach_back(program, seeds, types, masks)
    return masks


def equation_reach(equation: Equation, masks: Reach) -> int:
    """The losses that any output of an equation reaches."""
    mask = 0
    for variable in equation.outputs:
        mask |= masks[variable]
    return mask


def _reach_back(program: Program, seeds: Sequence[int], types: Sequence[Any], masks: Reach) -> None:
    """Add to the masks what a program's variables reach, from what its outputs reach."""
    _add(program.outputs, seeds, types, masks)
    for equation in reversed(program.equations):
        mask = equation_reach(equation, masks)
        if not mask or equation.facts.stops_derivatives:
            continue
        if equation.loop is None:
            incoming = [mask] * len(equation.inputs)
        else:
            incoming = _reach_through(equation, equation.loop, types, masks)
        _add(equation.inputs, incoming, types, masks)


def _reach_through(equation: Equation, loop: Loop, types: Sequence[Any], masks: Reach) -> list[int]:
    """What the inputs of a loop reach, from what its outputs do."""

    def back(seeds: list[int]) -> list[int]:
        _reach_back(loop.body, seeds, types, masks)
        return [masks[v] for v in loop.body.inputs]

    seeds = [masks[v] for v in equation.outputs]
    _, incoming = fixed_point(loop, seeds, back, operator.or_, backward=True)
    return incoming


def _add(
    atoms: Sequence[Atom], incoming: Sequence[int], types: Sequence[Any], masks: Reach
) -> None:
    for atom, mask in zip(atoms, incoming, strict=True):
        if mask and not isinstance(atom, Constant) and is_inexact(types[atom]):
            masks[atom] |= mask


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
    def depends(atoms: Sequence[Atom]) -> list[bool]:
        return [not isinstance(atom, Constant) and atom in mapped for atom in atoms]

    def add(variables: Sequence[Variable], flags: Sequence[bool]) -> None:
        mapped.update(v for v, flag in zip(variables, flags, strict=True) if flag)

    def step(flags: list[bool]) -> list[bool]:
        add(loop.body.inputs, flags)
        _depend(loop.body, mapped)
        return depends(loop.body.outputs)

    _, flags = fixed_point(loop, depends(equation.inputs), step, operator.or_)
    add(equation.outputs, flags)
