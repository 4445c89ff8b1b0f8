"""Backwards through a program: which losses can each variable still change?"""

from collections.abc import Sequence
from typing import Any, TypeAlias

from forwax.sites.program import Constant, Equation, Loop, Program, is_inexact

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
        if not equation_reach(equation, masks) or equation.name == "stop_gradient":
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
