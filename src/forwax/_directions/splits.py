"""How low-rank tangents split each parameter: by what a dot or a convolution contracts, and what it does not."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax import Array

from forwax import _tree
from forwax._directions.factored import is_move
from forwax._programs.axes import Factor, back
from forwax._programs.primitives import BILINEAR
from forwax._programs.program import Atom, Constant, Equation, Loop, Program, Variable

_LOOKED_UP = "gather"


Split: TypeAlias = tuple[frozenset[int], frozenset[int]]
"""The axes of a parameter that its two factors depend on; those that are in both have a pair of factors each."""


def find_splits(
    program: Program,
    types: Sequence[Any],
    names: Sequence[Variable],
    leaves: Sequence[Array],
):
    """For each parameter, named by its variable, the axes of its two factors, or None for dense signs."""
    finder = _Finder(types)
    finder.read(program, {name: (name, ()) for name in names})
    return tuple(_split(finder.uses.get(n, []), x) for n, x in zip(names, leaves, strict=True))


def sliced_only(program: Program, name: Variable) -> bool:
    """Whether scans that run over it are all that uses a variable."""
    uses = [(e, i) for e in program.equations for i, atom in enumerate(e.inputs) if atom == name]
    return name not in program.outputs and all(
        e.loop is not None and i >= e.loop.num_consts + e.loop.num_carry for e, i in uses
    )


def default_split(shape: tuple[int, ...]) -> Split | None:
    """All axes but the last, and the last; None when a side has one entry, so that dense signs cost no more."""
    return _checked((frozenset(range(len(shape) - 1)), frozenset([len(shape) - 1])), shape)


def _checked(split: Split, shape: tuple[int, ...]) -> Split | None:
    small = min(
        math.prod(shape[axis] for axis in side)
        for side in (split[0] - split[1], split[1] - split[0])
    )
    return split if small > 1 else None


def _split(uses: Sequence[Split | None], leaf: Array) -> Split | None:
    if not uses or leaf.ndim < 2 or _tree.is_complex(leaf):
        return None
    partitions = {frozenset(use) if use is not None else None for use in uses}
    use = uses[0]
    return (
        _checked(use, leaf.shape)
        if len(partitions) == 1 and use is not None
        else default_split(leaf.shape)
    )


Origin: TypeAlias = tuple[Variable, tuple[Equation | None, ...]]
"""The parameter that a variable is made of by moves alone, and these, the last first; None for a slice of a scan."""


class _Finder:
    """Finds how each parameter meets data in dots and convolutions."""

    def __init__(self, types: Sequence[Any]) -> None:
        self.types = types
        self.uses: dict[Variable, list[Split | None]] = {}

    def read(self, program: Program, origins: dict[Variable, Origin]) -> None:
        for equation in program.equations:
            known = [
                (i, a)
                for i, a in enumerate(equation.inputs)
                if not isinstance(a, Constant) and a in origins
            ]
            if equation.loop is not None:
                self.read_loop(equation, equation.loop, origins)
                continue
            for position, atom in known:
                leaf, steps = origins[atom]
                if equation.name in BILINEAR:
                    self.uses.setdefault(leaf, []).append(
                        self.split(equation, position, leaf, steps)
                    )
                elif equation.name == _LOOKED_UP and position == 0:
                    self.uses.setdefault(leaf, []).append(default_split(self.shape(leaf)))
                elif position == 0 and is_move(equation):
                    origins[equation.outputs[0]] = (leaf, (equation, *steps))

    def read_loop(self, equation: Equation, loop: Loop, origins: dict[Variable, Origin]) -> None:
        inner: dict[Variable, Origin] = {}
        for i, (atom, v) in enumerate(zip(equation.inputs, loop.body.inputs, strict=True)):
            if isinstance(atom, Constant) or atom not in origins:
                continue
            leaf, steps = origins[atom]
            if i >= loop.num_consts + loop.num_carry:
                inner[v] = (leaf, (None, *steps))
            elif i < loop.num_consts or loop.body.outputs[i - loop.num_consts] == v:
                inner[v] = (leaf, steps)
        self.read(loop.body, inner)

    def split(
        self,
        equation: Equation,
        position: int,
        leaf: Variable,
        steps: Sequence[Equation | None],
    ):
        """The parameter's axes that are contracted here, and the others; what is neither belongs to both."""
        shape = self.shape(equation.inputs[position])
        groups = _axes_of(equation, position, len(shape))
        if groups is None:
            return None
        links = [
            [self.back(axis, shape, steps) for axis in axes if shape[axis] > 1] for axes in groups
        ]
        contracted, free = ({axis for axis in own if axis is not None} for own in links)
        if len(contracted) + len(free) < len(links[0]) + len(links[1]) or contracted & free:
            return None
        both = set(range(len(self.shape(leaf)))) - contracted - free
        return frozenset(contracted | both), frozenset(free | both)

    def back(
        self, axis: int, shape: tuple[int, ...], steps: Sequence[Equation | None]
    ) -> int | None:
        link: Factor | None = Factor(axis, 1, shape[axis])
        for step in steps:
            if link is None:
                return None
            if step is None:
                link = dataclasses.replace(link, axis=link.axis + 1)
            else:
                link = back(
                    step,
                    0,
                    0,
                    link,
                    [self.shape(a) for a in step.inputs],
                    [self.shape(step.outputs[0])],
                )
        return None if link is None or link.size == 1 else link.axis

    def shape(self, atom: Atom) -> tuple[int, ...]:
        return (
            tuple(jnp.shape(atom.value))
            if isinstance(atom, Constant)
            else tuple(self.types[atom].shape)
        )


def _axes_of(equation: Equation, position: int, rank: int) -> tuple[list[int], list[int]] | None:
    """The contracted and the free axes of an operand."""
    if equation.name == "dot_general":
        contracted, batch = equation.params["dimension_numbers"]
        free = [
            axis
            for axis in range(rank)
            if axis not in contracted[position] and axis not in batch[position]
        ]
        return list(contracted[position]), free
    if (
        position != 1
        or equation.params["feature_group_count"] != 1
        or equation.params["batch_group_count"] != 1
    ):
        return None
    out = equation.params["dimension_numbers"].rhs_spec[0]
    return [axis for axis in range(rank) if axis != out], [out]
