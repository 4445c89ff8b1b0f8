"""Which slopes must multiply a site's noise: sources of the loss, and the axes along which they can be told apart.

A source is a value through which noise reaches the losses, with its exact error or, for a loss, the
error 1. What one noise changes of it is followed backwards through the *tangent* program, the
linear program from noises to the sources' tangents: each custom operation stands there as its own
JVP rule, and `stop_gradient` as a cut.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax import Array

from forwax._programs.axes import Factor, Link, Shape, back
from forwax._programs.dataflow import mapped_variables
from forwax._programs.program import Atom, Constant, Equation, Loop, Program, Traced, Variable

Tag: TypeAlias = tuple[int, int]
"""A source's number and one of its axes, or -1: whether it is reached at all."""


Links: TypeAlias = dict[Tag, Link]


@dataclasses.dataclass(frozen=True)
class Credit:
    """What a site's noise changes of one source.

    Attributes:
        source: the source's number.
        shape: its shape, of one example.
        links: for each of its axes that can be told apart, where it lies on the site's noise.
    """

    source: int
    shape: Shape
    links: tuple[tuple[int, Factor], ...]

    def common(self, other: "Credit") -> int:
        """The number of slopes that tell apart this noise and another one's together."""
        axes = {axis for axis, _ in self.links} & {axis for axis, _ in other.links}
        return math.prod(self.shape[axis] for axis in axes)

    def slopes(self, products: Array, lead: int, shape: Shape) -> Array:
        """The slopes of a site.

        Args:
            products: error times tangent, [*lead axes, *shape of the source].
            lead: the number of leading axes.
            shape: the site's noise, without the leading axes.

        Returns:
            An array of the leading axes and of axes that broadcast to `shape`.
        """
        total = products
        for axis, link in reversed(self.links):  # a noise that changes one position alone
            if link.size == 1:
                total = jnp.take(total, jnp.array([link.offset]), axis=lead + axis)
        own = {axis: link for axis, link in self.links if link.size > 1}
        total = jnp.sum(
            total, axis=tuple(lead + axis for axis in range(len(self.shape)) if axis not in own)
        )
        kept, order = sorted(own), sorted(own, key=lambda axis: own[axis].axis)
        total = jnp.transpose(total, (*range(lead), *(lead + kept.index(axis) for axis in order)))
        for place, axis in enumerate(order):
            total = _spread(total, lead + place, own[axis], shape[own[axis].axis], self.shape[axis])
        taken = {own[axis].axis for axis in order}
        return jnp.expand_dims(
            total, tuple(lead + axis for axis in range(len(shape)) if axis not in taken)
        )


def _spread(slopes: Array, axis: int, link: Factor, length: int, count: int) -> Array:
    """Slopes [count] along an axis as slopes [length], zero where a position stands for none."""
    if link.offset == 0 and link.size == count and link.inner * link.size == length:
        return jnp.repeat(slopes, link.inner, axis=axis) if link.inner > 1 else slopes
    positions = link.positions(length)
    outside = (positions < 0) | (positions >= count)
    taken = jnp.take(slopes, positions.clip(0, count - 1), axis=axis)
    if not outside.any():
        return taken
    return jnp.where(jnp.expand_dims(outside, tuple(range(1, slopes.ndim - axis))), 0, taken)


def credits_of(
    traced: Traced, noises: Sequence[Variable], sources: Sequence[Shape]
) -> list[list[Credit]]:
    """What each noise changes of each source.

    Args:
        traced: the tangent program, from whatever else it needs and the noises to the tangents of
            the sources.
        noises: the inputs that are noises.
        sources: the sources' shapes.
    """
    noisy = mapped_variables(traced.program, noises)
    follower = _Follower(traced.types, noisy)
    seeds: list[Links] = []
    for number, shape in enumerate(sources):
        axes = {(number, a): Factor(a, 1, length) for a, length in enumerate(shape) if length > 1}
        seeds.append({(number, -1): None, **axes})
    follower.run(traced.program, seeds)
    return [_credits(follower.links.get(noise, {}), sources) for noise in noises]


def _credits(links: Links, sources: Sequence[Shape]) -> list[Credit]:
    found = []
    for number, shape in enumerate(sources):
        if (number, -1) not in links:
            continue
        taken: set[int] = set()
        own = []
        for axis in range(len(shape)):
            link = links.get((number, axis))
            if link is not None and (link.size == 1 or link.axis not in taken):
                taken.update([link.axis] if link.size > 1 else [])
                own.append((axis, link))
        found.append(Credit(number, shape, tuple(own)))
    return found


class _Follower:
    """A walk backwards through a linear program; links only grow coarser, so that loops come to an end."""

    def __init__(self, types: Sequence[Any], noisy: set[Variable]) -> None:
        self.types, self.noisy = types, noisy
        self.links: dict[Variable, Links] = {}

    def run(self, program: Program, seeds: Sequence[Links]) -> None:
        for atom, links in zip(program.outputs, seeds, strict=True):
            self.meet(atom, links)
        for equation in reversed(program.equations):
            outputs = [self.links.get(v, {}) for v in equation.outputs]
            if any(outputs):
                self.cross(equation, outputs)

    def meet(self, atom: Atom, links: Mapping[Tag, Link]) -> None:
        """Add one use of a value: what differs between two uses cannot be told apart."""
        if isinstance(atom, Constant) or atom not in self.noisy:
            return
        own = self.links.setdefault(atom, {})
        for tag, link in links.items():
            own[tag] = link if tag not in own or own[tag] == link else None

    def cross(self, equation: Equation, outputs: Sequence[Links]) -> None:
        if equation.loop is not None:
            self.cross_loop(equation, equation.loop, outputs)
            return
        shapes, outs = (
            [self.shape(a) for a in equation.inputs],
            [self.shape(v) for v in equation.outputs],
        )
        for position, atom in enumerate(equation.inputs):
            if isinstance(atom, Constant) or atom not in self.noisy:
                continue
            for output, links in enumerate(outputs):
                self.meet(
                    atom,
                    {
                        t: self.back(equation, position, output, x, shapes, outs)
                        for t, x in links.items()
                    },
                )

    def back(
        self, equation: Equation, position: int, output: int, link: Link, shapes: Any, outs: Any
    ) -> Link:
        return None if link is None else back(equation, position, output, link, shapes, outs)

    def cross_loop(self, equation: Equation, loop: Loop, outputs: Sequence[Links]) -> None:
        body, first, last = loop.body, loop.num_consts, loop.num_consts + loop.num_carry
        stacked = [
            {tag: _inside(link) for tag, link in links.items()}
            for links in outputs[loop.num_carry :]
        ]
        seeds = [*outputs[: loop.num_carry], *stacked]
        while True:
            before = {v: dict(self.links.get(v, {})) for v in body.inputs}
            self.run(body, seeds)
            carried = [self.links.get(v, {}) for v in body.inputs[first:last]]
            seeds = [*carried, *stacked]
            if before == {v: self.links.get(v, {}) for v in body.inputs}:
                break
        for position, (atom, inner) in enumerate(zip(equation.inputs, body.inputs, strict=True)):
            links = self.links.get(inner, {})
            self.meet(
                atom, {t: _outside(x) for t, x in links.items()} if position >= last else links
            )

    def shape(self, atom: Atom) -> Shape:
        return (
            tuple(jnp.shape(atom.value))
            if isinstance(atom, Constant)
            else tuple(self.types[atom].shape)
        )


def _inside(link: Link) -> Link:
    """The link of one step's value from that of all steps' values, stacked on a leading axis."""
    if link is None or link.size == 1:
        return link
    return None if link.axis == 0 else dataclasses.replace(link, axis=link.axis - 1)


def _outside(link: Link) -> Link:
    return link if link is None or link.size == 1 else dataclasses.replace(link, axis=link.axis + 1)
