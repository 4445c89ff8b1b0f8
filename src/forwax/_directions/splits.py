"""How low-rank tangents split each parameter: by what a dot or convolution contracts, or not."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax import Array

from forwax import _tree
from forwax._directions.operations import is_move
from forwax._programs.axes import back
from forwax._programs.axis_rules import Crossing
from forwax._programs.links import along
from forwax._programs.program import Atom, Constant, Equation, Loop, Program, Variable

Split: TypeAlias = tuple[frozenset[int], frozenset[int]]
"""The axes of a parameter that its two factors depend on.

Each position along those in both has a pair of factors of its own.
"""


def find_splits(
    program: Program,
    types: Sequence[Any],
    parameters: Sequence[Variable],
    leaves: Sequence[Array],
) -> tuple[Split | None, ...]:
    """For each parameter the axes of its two factors, or None for dense signs."""
    finder = _Finder(types)
    origins = {parameter: Origin(parameter) for parameter in parameters}
    finder.read(program, origins)
    splits: list[Split | None] = []
    for parameter, leaf in zip(parameters, leaves, strict=True):
        uses = finder.uses.get(parameter, [])
        splits.append(_split(uses, leaf))
    return tuple(splits)


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
    others = frozenset(range(last))
    return _checked((others, frozenset([last])), shape)


def _checked(split: Split, shape: tuple[int, ...]) -> Split | None:
    """The split, or None when a side has one entry."""
    left, right = split
    for side in (left - right, right - left):
        size = math.prod(shape[axis] for axis in side)
        if size <= 1:
            return None
    return split


def _split(uses: Sequence[Split | None], leaf: Array) -> Split | None:
    is_matrix = leaf.ndim > 1 and not _tree.is_complex(leaf)
    if not uses or not is_matrix:
        return None
    first = uses[0]
    # as sets, for which of both sides is contracted does not matter
    partitions = [None if use is None else frozenset(use) for use in uses]
    is_one = len(set(partitions)) == 1
    if first is None or not is_one:
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
                    split = self.split(equation, position, origin)
                    self.use(origin, split)
                elif position != 0:
                    continue
                elif equation.facts.looks_up:
                    shape = self.shape(origin.parameter)
                    self.use(origin, default_split(shape))
                elif is_move(equation):
                    result = equation.outputs[0]
                    origins[result] = origin.behind(equation)

    def use(self, origin: Origin, split: Split | None) -> None:
        uses = self.uses.setdefault(origin.parameter, [])
        uses.append(split)

    def read_loop(
        self,
        equation: Equation,
        loop: Loop,
        origins: Mapping[Variable, Origin],
    ) -> None:
        found = [_origin(atom, origins) for atom in equation.inputs]
        pairs = list(zip(loop.body.inputs, found, strict=True))
        consts, carries, scanned = loop.split(pairs)
        inner: dict[Variable, Origin] = {}
        for variable, origin in consts:
            if origin is not None:
                inner[variable] = origin
        for i, (variable, origin) in enumerate(carries):
            # a carry is a parameter only if every step hands it on as it is
            if origin is not None and loop.unchanged[i]:
                inner[variable] = origin
        for variable, origin in scanned:
            if origin is not None:
                inner[variable] = origin.behind(None)
        self.read(loop.body, inner)

    def split(
        self,
        equation: Equation,
        position: int,
        origin: Origin,
    ) -> Split | None:
        """The parameter's axes that are contracted here, and the others; the rest are in both."""
        shape = self.shape(equation.inputs[position])
        groups = _axes_of(equation, position, len(shape))
        if groups is None:
            return None
        sides: list[set[int]] = []
        for axes in groups:
            side: set[int] = set()
            for axis in axes:
                if shape[axis] == 1:  # which axis it is does not matter
                    continue
                own = self.back(axis, shape, origin.steps)
                # a part of an axis, or two parts of the same one
                if own is None or own in side:
                    return None
                side.add(own)
            sides.append(side)
        contracted, free = sides
        if contracted & free:
            return None
        rank = len(self.shape(origin.parameter))
        both = set(range(rank)) - contracted - free
        return frozenset(contracted | both), frozenset(free | both)

    def back(
        self,
        axis: int,
        shape: tuple[int, ...],
        steps: Sequence[Equation | None],
    ) -> int | None:
        """The parameter's axis that an axis of the moved variable is."""
        link = along(axis, shape[axis])
        for step in steps:
            if link.axis is None or not link.is_exact:
                return None
            if step is None:  # a scan sliced the first axis off
                link = link.on(link.axis + 1)
            else:
                shapes = [self.shape(atom) for atom in step.inputs]
                out = self.shape(step.outputs[0])
                at = Crossing(step.params, 0, 0, shapes, [out])
                link = back(step, at, link)
        return link.axis if link.is_exact else None

    def shape(self, atom: Atom) -> tuple[int, ...]:
        if isinstance(atom, Constant):
            return tuple(jnp.shape(atom.value))
        return tuple(self.types[atom].shape)


def _origin(atom: Atom, origins: Mapping[Variable, Origin]) -> Origin | None:
    return None if isinstance(atom, Constant) else origins.get(atom)


def _axes_of(
    equation: Equation,
    position: int,
    rank: int,
) -> tuple[list[int], list[int]] | None:
    """The contracted and the free axes of an operand."""
    params = equation.params
    if equation.facts.is_dot:
        contracted, batch = params["dimension_numbers"]
        own = list(contracted[position])
        bound = {*own, *batch[position]}
        free = [axis for axis in range(rank) if axis not in bound]
        return own, free
    is_kernel = position == 1
    num_groups = params["feature_group_count"] * params["batch_group_count"]
    if not is_kernel or num_groups != 1:
        return None
    features = params["dimension_numbers"].rhs_spec[0]
    others = [axis for axis in range(rank) if axis != features]
    return others, [features]
