"""What flows where in a program: the losses that a value reaches, and what depends on given inputs."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from forwax._programs.program import Atom, Constant, Equation, Loop, Program, Variable, is_inexact

Reach: TypeAlias = list[int]
"""For each variable the set of losses that depend on it through derivatives, as a bit mask."""


def reach(program: Program, types: Sequence[Any], num_losses: int) -> Reach:
    """The losses that each variable reaches; the first outputs of the program are the losses.

    `stop_gradient` and values without derivatives (integers, booleans) cut. A variable that reaches
    no loss needs no noise, and its value counts as a constant.
    """
    masks = [0] * len(types)
    seeds = [1 << i if i < num_losses else 0 for i in range(len(program.outputs))]
    _backward(program, seeds, types, masks)
    return masks


def _backward(program: Program, seeds: Sequence[int], types: Sequence[Any], masks: Reach) -> None:
    for atom, mask in zip(program.outputs, seeds, strict=True):
        _add(atom, mask, types, masks)
    for equation in reversed(program.equations):
        if not equation_reach(equation, masks) or equation.facts.stops_derivatives:
            continue
        if equation.loop is not None:
            incoming = _through_loop(
                equation.loop, [masks[v] for v in equation.outputs], types, masks
            )
        else:
            incoming = [equation_reach(equation, masks)] * len(equation.inputs)
        for atom, mask in zip(equation.inputs, incoming, strict=True):
            _add(atom, mask, types, masks)


def equation_reach(equation: Equation, masks: Reach) -> int:
    """The losses that any output of an equation reaches."""
    mask = 0
    for variable in equation.outputs:
        mask |= masks[variable]
    return mask


def _through_loop(
    loop: Loop, seeds: Sequence[int], types: Sequence[Any], masks: Reach
) -> list[int]:
    carries = slice(loop.num_consts, loop.num_consts + loop.num_carry)
    current = list(seeds)
    while True:  # masks only grow, so this ends
        _backward(loop.body, current, types, masks)
        incoming = [masks[v] for v in loop.body.inputs]
        grown = [a | b for a, b in zip(current[: loop.num_carry], incoming[carries], strict=True)]
        if grown == current[: loop.num_carry]:
            return incoming
        current[: loop.num_carry] = grown


def _add(atom: Any, mask: int, types: Sequence[Any], masks: Reach) -> None:
    if mask and not isinstance(atom, Constant) and is_inexact(types[atom]):
        masks[atom] |= mask


def mapped_variables(program: Program, inputs: Iterable[Variable]) -> set[Variable]:
    """The variables that depend on the given inputs: those that differ between examples."""
    mapped = set(inputs)
    _spread(program, mapped)
    return mapped


def _spread(program: Program, mapped: set[Variable]) -> None:
    for equation in program.equations:
        if equation.loop is not None:
            _spread_loop(equation, equation.loop, mapped)
        elif mapped.intersection(equation.variables):
            mapped.update(equation.outputs)


def _spread_loop(equation: Equation, loop: Loop, mapped: set[Variable]) -> None:
    def depends(atom: Atom) -> bool:
        return not isinstance(atom, Constant) and atom in mapped

    body, first = loop.body, loop.num_consts
    mapped.update(v for v, atom in zip(body.inputs, equation.inputs, strict=True) if depends(atom))
    while True:  # the set only grows
        size = len(mapped)
        _spread(body, mapped)
        carries = body.inputs[first : first + loop.num_carry]
        mapped.update(v for v, out in zip(carries, body.outputs, strict=False) if depends(out))
        if len(mapped) == size:
            break
    mapped.update(v for v, out in zip(equation.outputs, body.outputs, strict=True) if depends(out))
