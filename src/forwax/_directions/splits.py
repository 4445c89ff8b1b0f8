"""How low-rank tangents split each parameter: by what a dot or convolution contracts, or not."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax import Array

from forwax import _tree
from forwax._directions.operations import is_move
from forwax._programs.axes import Factor, back
from forwax._programs.program import Atom, Constant, Equation, Loop, Program, Variable

Split: TypeAlias = tuple[frozenset[int], frozenset[int]]
"""The axes of a parameter that its two factors depend on; those in both have a pair of factors each."""


def find_splits(
    program: Program,
    types: Sequence[Any],
    parameters: Sequence[Variable],
    leaves: Sequence[Array],
) -> tuple[Split | None, ...]:
    """For each parameter the axes of its two factors, or None for dense signs."""
    finder = _Finder(types)
    finder.read(program, {parameter: Origin(parameter) for parameter in parameters})
    pairs = zip(parameters, leaves, strict=True)
    return tuple(_split(finder.uses.get(parameter, []), leaf) for parameter, leaf in pairs)


def sliced_only(program: Program, variable: Variable) -> bool:
    """Whether scans that run over it are all that uses a variable."""
    if variable in program.outputs:
        return False
    for equation in program.equations:
        others = equation.inputs
        if equation.loop is not None:
            consts, carries, _ = equation.loop.split(equation.inputs)
            others = (*consts, *carries)
        if variable in others:
            return False
    return True


def default_split(shape: tuple[int, ...]) -> Split | None:
    """All axes but the last, and the last; None where dense signs cost no more."""
    last = len(shape) - 1
    return _checked((frozenset(range(last)), frozenset([last])), shape)


def _checked(split: Split, shape: tuple[int, ...]) -> Split | None:
    """The split, or None when a side has one entry."""
    left, right = split
    left_size = math.prod(shape[axis] for axis in left - right)
    right_size = math.prod(shape[axis] for axis in right - left)
    return split if min(left_size, right_size) > 1 else None


def _split(uses: Sequence[Split | None], leaf: Array) -> Split | None:
    if not uses or leaf.ndim < 2 or _tree.is_complex(leaf):
        return None
    first = uses[0]
    # which of both sides is contracted does not matter
    partitions = {None if use is None else frozenset(use) for use in uses}
    if first is None or len(partitions) > 1:
        return default_split(leaf.shape)
    return _checked(first, leaf.shape)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a variable comes from that is made of a parameter by moves alone.

    Attributes:
        parameter: the parameter.
        steps: the moves, the last first; None for a slice of a scan.
    """

    parameter: Variable
    steps: tuple[Equation | None, ...] = ()

    def behind(self, step: Equation | None) -> "Origin":
        """That of what a further move makes of the variable."""
        return Origin(self.parameter, (step, *self.steps))


class _Finder:
    """Finds how each parameter meets data in dots and convolutions."""

    def __init__(self, types: Sequence[Any]) -> None:
        self.types = types
        self.uses: dict[Variable, list[Split | None]] = {}

    def read(self, program: Program, origins: dict[Variable, Origin]) -> None:
        for equation in program.equations:
            if equation.loop is not None:
                self.read_loop(equation, equation.loop, origins)
                continue
            for position, atom in enumerate(equation.inputs):
                origin = _origin(atom, origins)
                if origin is None:
                    continue
                if equation.facts.bilinear:
                    self.use(origin, self.split(equation, position, origin))
                elif equation.facts.looks_up and position == 0:
                    self.use(origin, default_split(self.shape(origin.parameter)))
                elif position == 0 and is_move(equation):
                    origins[equation.outputs[0]] = origin.behind(equation)

    def use(self, origin: Origin, split: Split | None) -> None:
        self.uses.setdefault(origin.parameter, []).append(split)

    def read_loop(self, equation: Equation, loop: Loop, origins: Mapping[Variable, Origin]) -> None:
        pairs = [
            (variable, _origin(atom, origins))
            for variable, atom in zip(loop.body.inputs, equation.inputs, strict=True)
        ]
        consts, carries, scanned = loop.split(pairs)
        # a carry is a parameter only if every step hands it on as it is
        same = [pair for pair, unchanged in zip(carries, loop.unchanged, strict=True) if unchanged]
        inner = {v: origin for v, origin in [*consts, *same] if origin is not None}
        for variable, origin in scanned:
            if origin is not None:
                inner[variable] = origin.behind(None)
        self.read(loop.body, inner)

    def split(self, equation: Equation, position: int, origin: Origin) -> Split | None:
        """The parameter's axes that are contracted here, and the others; the rest are in both."""
        shape = self.shape(equation.inputs[position])
        groups = _axes_of(equation, position, len(shape))
        if groups is None:
            return None
        sides: list[set[int]] = []
        for axes in groups:
            long = [axis for axis in axes if shape[axis] > 1]
            own = [self.back(axis, shape, origin.steps) for axis in long]
            known = {axis for axis in own if axis is not None}
            if len(known) < len(own):  # some are no axis of the parameter, or the same one
                return None
            sides.append(known)
        contracted, free = sides
        if contracted & free:
            return None
        both = set(range(len(self.shape(origin.parameter)))) - contracted - free
        return frozenset(contracted | both), frozenset(free | both)

    def back(
        self, axis: int, shape: tuple[int, ...], steps: Sequence[Equation | None]
    ) -> int | None:
        """The parameter's axis that an axis of the moved variable is."""
        link: Factor | None = Factor(axis, 1, shape[axis])
        for step in steps:
            if step is None:  # a scan sliced the first axis off
                link = dataclasses.replace(link, axis=link.axis + 1)
            else:
                shapes = [self.shape(atom) for atom in step.inputs]
                link = back(step, 0, 0, link, shapes, [self.shape(step.outputs[0])])
            if link is None:
                return None
        return None if link.size == 1 else link.axis

    def shape(self, atom: Atom) -> tuple[int, ...]:
        if isinstance(atom, Constant):
            return tuple(jnp.shape(atom.value))
        return tuple(self.types[atom].shape)


def _origin(atom: Atom, origins: Mapping[Variable, Origin]) -> Origin | None:
    return None if isinstance(atom, Constant) else origins.get(atom)


def _axes_of(equation: Equation, position: int, rank: int) -> tuple[list[int], list[int]] | None:
    """The contracted and the free axes of an operand."""
    params = equation.params
    if equation.facts.is_dot:
        contracted, batch = params["dimension_numbers"]
        own = list(contracted[position])
        mixed = batch[position]
        return own, [axis for axis in range(rank) if axis not in own and axis not in mixed]
    is_grouped = params["feature_group_count"] != 1 or params["batch_group_count"] != 1
    if position != 1 or is_grouped:
        return None
    features = params["dimension_numbers"].rhs_spec[0]
    return [axis for axis in range(rank) if axis != features], [features]
