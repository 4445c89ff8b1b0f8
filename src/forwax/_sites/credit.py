"""Which slopes must multiply a site's noise: sources of the loss, and the axes told apart.

A source is a value through which noise reaches the losses, with its exact error or, for a loss, the
error 1. What one noise changes of it is followed backwards through the *tangent* program, the
linear program from noises to the sources' tangents: each custom operation stands there as its own
JVP rule, and `stop_gradient` as a cut.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax import Array

from forwax._programs.axes import back
from forwax._programs.dataflow import fixed_point, mapped_variables
from forwax._programs.links import Factor, Link, Shape
from forwax._programs.program import (
    Atom,
    Constant,
    Equation,
    Loop,
    Program,
    Traced,
    Variable,
)

Tag: TypeAlias = tuple[int, int]
"""A source's number and one of its axes, or -1: whether it is reached at all."""


Links: TypeAlias = Mapping[Tag, Link]
"""How a value is tied to each axis of each source that it reaches."""


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
        own_axes = {axis for axis, _ in self.links}
        other_axes = {axis for axis, _ in other.links}
        lengths = [self.shape[axis] for axis in own_axes & other_axes]
        return math.prod(lengths)

    def slopes(self, products: Array, lead: int, shape: Shape) -> Array:
        """The slopes of a site.

        Args:
            products: error times tangent, [*lead axes, *shape of the source].
            lead: the number of leading axes.
            shape: the site's noise, without the leading axes.

        Returns:
            An array of the leading axes and of axes that broadcast to `shape`.
        """
        sums = self._at_positions(products, lead)  # [*lead, *source's axes]
        apart = {axis: link for axis, link in self.links if link.size > 1}
        joined = set(range(len(self.shape)))
        joined.difference_update(apart)
        sums = jnp.sum(
            sums,
            axis=tuple(lead + axis for axis in sorted(joined)),
        )  # [*lead, *axes told apart]

        # The axes that are left stand in the source's order; the noise may have another.
        by_source = sorted(apart)
        by_noise = sorted(apart, key=lambda axis: apart[axis].axis)
        order = list(range(lead))
        for axis in by_noise:
            place = by_source.index(axis)
            order.append(lead + place)
        slopes = jnp.transpose(sums, order)

        for place, axis in enumerate(by_noise):
            link = apart[axis]
            slopes = _spread(
                slopes,
                lead + place,
                link,
                length=shape[link.axis],
                count=self.shape[axis],
            )
        missing = set(range(len(shape)))
        missing.difference_update(link.axis for link in apart.values())
        return jnp.expand_dims(
            slopes,
            tuple(lead + axis for axis in sorted(missing)),
        )

    def _at_positions(self, products: Array, lead: int) -> Array:
        """The products where alone a noise changes them: one position of some axes."""
        for axis, link in reversed(self.links):
            if link.size == 1:
                position = jnp.array([link.offset])
                products = jnp.take(products, position, axis=lead + axis)
        return products


def _spread(
    slopes: Array,
    axis: int,
    link: Factor,
    length: int,
    count: int,
) -> Array:
    """Slopes [count] along an axis as slopes [length], zero where a position stands for none."""
    covers_all = link.offset == 0 and link.size == count
    if covers_all and link.inner * link.size == length:
        if link.inner == 1:
            return slopes
        return jnp.repeat(slopes, link.inner, axis=axis)

    positions = link.positions(length)
    # A slice or a pad may have cut off positions of the source: their slopes are 0.
    is_outside = (positions < 0) | (positions >= count)
    spread = jnp.take(
        slopes,
        positions.clip(0, count - 1),
        axis=axis,
    )
    if not is_outside.any():
        return spread
    axes_behind = range(1, slopes.ndim - axis)
    mask = jnp.expand_dims(is_outside, tuple(axes_behind))
    return jnp.where(mask, 0, spread)


def credits_of(
    traced: Traced,
    noises: Sequence[Variable],
    sources: Sequence[Shape],
    *,
    any_way: bool = False,
) -> list[list[Credit]]:
    """What each noise changes of each source.

    Args:
        traced: the tangent program, from whatever else it needs and the noises to the tangents of
            the sources.
        noises: the inputs that are noises.
        sources: the sources' shapes.
        any_way: whether an axis counts as told apart if it is on any one way, whatever comes by
            others: what the axes have in common, no bound on what the noise changes.
    """
    noisy = mapped_variables(traced.program, noises)
    follower = _Follower(traced.types, noisy, _any_of if any_way else _meet)
    seeds: list[Links] = []
    for number, shape in enumerate(sources):
        links: dict[Tag, Link] = {(number, -1): None}
        for axis, length in enumerate(shape):
            if length > 1:  # one position alone tells nothing apart
                links[number, axis] = Factor(axis, 1, length)
        seeds.append(links)
    follower.follow(traced.program, seeds)
    return [_credits(follower.links_of(noise), sources) for noise in noises]


def _credits(links: Links, sources: Sequence[Shape]) -> list[Credit]:
    credit: list[Credit] = []
    for number, shape in enumerate(sources):
        is_reached = (number, -1) in links
        if not is_reached:
            continue
        noise_axes: set[int] = set()
        apart: list[tuple[int, Factor]] = []
        for axis in range(len(shape)):
            link = links.get((number, axis))
            if link is None:
                continue
            if link.size > 1:
                # Two axes of a source cannot both be told apart along one axis of the noise.
                if link.axis in noise_axes:
                    continue
                noise_axes.add(link.axis)
            apart.append((axis, link))
        credit.append(Credit(number, shape, tuple(apart)))
    return credit


class _Follower:
    """A walk backwards through a linear program.

    Attributes:
        types: of its variables.
        noisy: those that depend on a noise.
        meet: the links of a value of two uses. It may only grow coarser, or only finer, so that
            loops come to an end.
        links: how each of them is tied to the sources, by all uses so far.
    """

    def __init__(
        self,
        types: Sequence[Any],
        noisy: set[Variable],
        meet: Callable[[Links, Links], Links],
    ) -> None:
        self.types = types
        self.noisy = noisy
        self.meet = meet
        self.links: dict[Variable, Links] = {}

    def links_of(self, variable: Variable) -> Links:
        return self.links.get(variable, {})

    def follow(self, program: Program, seeds: Sequence[Links]) -> None:
        for atom, links in zip(program.outputs, seeds, strict=True):
            self.add_use(atom, links)
        for equation in reversed(program.equations):
            # Whatever reads them came before, in this order: these links are complete.
            outputs = [self.links_of(v) for v in equation.outputs]
            if not any(outputs):
                continue
            if equation.loop is not None:
                self.cross_loop(equation, equation.loop, outputs)
            else:
                self.cross(equation, outputs)

    def add_use(self, atom: Atom, links: Links) -> None:
        if isinstance(atom, Constant) or atom not in self.noisy:
            return
        self.links[atom] = self.meet(self.links_of(atom), links)

    def cross(self, equation: Equation, outputs: Sequence[Links]) -> None:
        """From the links of an operation's results to those of its operands."""
        shapes = list(map(self.shape, equation.inputs))
        outs = list(map(self.shape, equation.outputs))
        for position, atom in enumerate(equation.inputs):
            if isinstance(atom, Constant) or atom not in self.noisy:
                continue
            for output, links in enumerate(outputs):
                operand_links: dict[Tag, Link] = {}
                for tag, link in links.items():
                    if link is not None:
                        link = back(
                            equation,
                            position,
                            output,
                            link,
                            shapes,
                            outs,
                        )
                    operand_links[tag] = link
                self.add_use(atom, operand_links)

    def cross_loop(
        self, equation: Equation, loop: Loop, outputs: Sequence[Links]
    ) -> None:
        """From the links of a loop's outputs to those of its inputs: a fixed point."""
        after, stacked = loop.split_outputs(outputs)
        stacked = [_each(_inside, links) for links in stacked]

        def step_back(seeds: list[Links]) -> list[Links]:
            self.follow(loop.body, seeds)
            return [self.links_of(v) for v in loop.body.inputs]

        _, links = fixed_point(
            loop,
            [*after, *stacked],
            step_back,
            self.meet,
            backward=True,
        )
        consts, carry, xs = loop.split(links)
        # Slices have no axis of steps: all of them together have it first.
        xs = [_each(_outside, links) for links in xs]
        input_links = [*consts, *carry, *xs]
        for atom, links in zip(equation.inputs, input_links, strict=True):
            self.add_use(atom, links)

    def shape(self, atom: Atom) -> Shape:
        if isinstance(atom, Constant):
            return tuple(jnp.shape(atom.value))
        return tuple(self.types[atom].shape)


def _meet(one: Links, other: Links) -> Links:
    """The links of a value of two uses: what differs between them cannot be told apart."""
    met = dict(one)
    for tag, link in other.items():
        if tag in met and met[tag] != link:
            met[tag] = None
        else:
            met[tag] = link
    return met


def _any_of(one: Links, other: Links) -> Links:
    """The links of a value of two uses: the first that is there."""
    found = dict(one)
    for tag, link in other.items():
        if found.get(tag) is None:
            found[tag] = link
    return found


def _each(change: Callable[[Factor], Link], links: Links) -> Links:
    """Links whose axes are counted anew; one position, or all, is tied to no axis."""
    changed = dict(links)
    for tag, link in links.items():
        if link is not None and link.size > 1:
            changed[tag] = change(link)
    return changed


def _inside(link: Factor) -> Link:
    """The link of one step's value from that of all steps' values, stacked on axis 0."""
    if link.axis == 0:
        return None
    return dataclasses.replace(link, axis=link.axis - 1)


def _outside(link: Factor) -> Link:
    """The link of all steps' values from that of one step's."""
    return dataclasses.replace(link, axis=link.axis + 1)
