"""How many entries of which parameters a value is made of, behind all chains."""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

from forwax._programs.program import Equation, Loop, Program, Traced, Variable
from forwax._sites.kinds import Kind
from forwax._sites.products import Kinds

Counts: TypeAlias = dict[Variable, int]
"""For each parameter how many of its entries may enter."""


def parameter_counts(
    traced: Traced, program: Program, kinds: Kinds
) -> dict[Variable, Counts]:
    """The counts of all that is made of parameters alone, in a program and its loops' bodies."""
    counts: dict[Variable, Counts] = {}
    for v in traced.parameters:
        counts[v] = {v: math.prod(traced.types[v].shape)}
    _count(program, kinds, traced.types, counts)
    return counts


def _count(
    program: Program,
    kinds: Kinds,
    types: Sequence[Any],
    counts: dict[Variable, Counts],
) -> None:
    for equation in program.equations:
        if equation.loop is not None:
            _count_loop(equation, equation.loop, kinds, types, counts)
            continue
        entering = together([counts.get(v, {}) for v in equation.variables])
        facts = equation.facts
        for v in equation.outputs:
            if kinds[v] is not Kind.PARAMETER:
                continue
            counts[v] = entering
            if facts.looks_up or facts.move_of_factors is not None:  # a part of them
                size = math.prod(types[v].shape)
                counts[v] = {w: min(n, size) for w, n in entering.items()}


def _count_loop(
    equation: Equation,
    loop: Loop,
    kinds: Kinds,
    types: Sequence[Any],
    counts: dict[Variable, Counts],
) -> None:
    pairs = list(zip(loop.body.inputs, equation.inputs, strict=True))
    consts, carry, xs = loop.split(pairs)
    for inner, outer in [*consts, *carry]:
        if kinds[inner] is Kind.PARAMETER:
            counts[inner] = counts.get(outer, {})  # type: ignore[arg-type]
    for inner, outer in xs:
        whole: Counts = counts.get(outer, {})  # type: ignore[arg-type]
        counts[inner] = {w: n // loop.length for w, n in whole.items()}
    _count(loop.body, kinds, types, counts)
    for outer, inner in zip(equation.outputs, loop.body.outputs, strict=True):
        if kinds[outer] is Kind.PARAMETER:
            counts[outer] = counts.get(inner, {})  # type: ignore[arg-type]


def together(many: Sequence[Counts]) -> Counts:
    """The counts of several values at once: a parameter that enters twice counts once."""
    total: Counts = {}
    for counts in many:
        for v, n in counts.items():
            total[v] = max(n, total.get(v, 0))
    return total
