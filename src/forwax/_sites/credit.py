"""Which slopes must multiply a site's noise: sources of the loss, and the axes told apart.

A source is a value through which noise reaches the losses, with its exact error or, for a loss, the
error 1. What one noise changes of it is followed backwards through the *tangent* program, the
linear program from noises to the sources' tangents: each custom operation stands there as its own
JVP rule, and `stop_gradient` as a cut.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from forwax._programs.axes import all_back, met, tied
from forwax._programs.axis_rules import Crossing, after
from forwax._programs.dataflow import fixed_point, mapped_variables
from forwax._programs.links import LONGEST, Link, Shape, along
from forwax._programs.program import (
    Atom,
    Constant,
    Equation,
    Loop,
    Program,
    Traced,
    Variable,
)
from forwax._programs.ranges import Ranges
from forwax._sites.window_sums import heard

Tag: TypeAlias = tuple[int, int]
"""A source's number and one of its axes, or -1: whether it is reached at all."""


Links: TypeAlias = Mapping[Tag, tuple[Link, ...]]
"""How a value is tied to each axis of each source that it reaches; not at all without a link."""


@dataclasses.dataclass(frozen=True)
class Credit:
    """What a site's noise changes of one source.

    Attributes:
        source: the source's number.
        shape: its shape, of one example.
        links: for each of its axes that can be told apart, what the site's noise changes there.
    """

    source: int
    shape: Shape
    links: tuple[tuple[int, Link], ...]

    def overlap(self, other: "Credit") -> float:
        """The share of pairs of coordinates, one of each noise, that one slope hears together."""
        others = dict(other.links)
        share = 1.0
        for axis, link in self.links:
            if axis in others:
                share *= link.overlap(others[axis])
        return share

    def slopes(
        self, products: Array, lead: int, shape: Shape, decay: Array | None = None
    ) -> Array:
        """The slopes of a site.

        Args:
            products: error times tangent, [*lead axes, *shape of the source].
            lead: the number of leading axes.
            shape: the site's noise, without the leading axes.
            decay: by what the slope at each further position is multiplied; None for 1.

        Returns:
            An array of the leading axes and of axes that broadcast to `shape`.
        """
        sums = self._at_positions(products, lead)  # [*lead, *source's axes]
        apart = {axis: link for axis, link in self.links if link.axis is not None}
        joined = set(range(len(self.shape)))
        joined.difference_update(apart)
        sums = jnp.sum(
            sums,
            axis=tuple(lead + axis for axis in sorted(joined)),
        )  # [*lead, *axes told apart]

        # The axes that are left stand in the source's order; the noise may have another.
        by_source = sorted(apart)
        by_noise = sorted(apart, key=lambda axis: _axis(apart[axis]))
        order = list(range(lead))
        for axis in by_noise:
            place = by_source.index(axis)
            order.append(lead + place)
        slopes = jnp.transpose(sums, order)

        for place, axis in enumerate(by_noise):
            slopes = heard(slopes, lead + place, apart[axis], decay)
        missing = set(range(len(shape)))
        missing.difference_update(_axis(link) for link in apart.values())
        return jnp.expand_dims(
            slopes,
            tuple(lead + axis for axis in sorted(missing)),
        )

    def _at_positions(self, products: Array, lead: int) -> Array:
        """The products where alone a noise changes them, whatever its coordinate."""
        for axis, link in self.links:
            if link.axis is None:
                first = int(link.first[0].clip(0, link.size))
                stop = int(link.last[0].clip(first - 1, link.size - 1)) + 1
                products = lax.slice_in_dim(products, first, stop, axis=lead + axis)
        return products


def _axis(link: Link) -> int:
    assert link.axis is not None
    return link.axis


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
    follower = _Follower(traced, noisy, any_way)
    seeds: list[Links] = []
    for number, shape in enumerate(sources):
        links: dict[Tag, tuple[Link, ...]] = {(number, -1): ()}
        for axis, length in enumerate(shape):
            if 1 < length <= LONGEST:  # one position alone tells nothing apart
                links[number, axis] = (along(axis, length),)
        seeds.append(links)
    follower.follow(traced.program, seeds)
    return [_credits(follower.links_of(noise), sources) for noise in noises]


def _credits(links: Links, sources: Sequence[Shape]) -> list[Credit]:
    credit: list[Credit] = []
    for number, shape in enumerate(sources):
        is_reached = (number, -1) in links
        if not is_reached:
            continue
        found = [
            (link.width / link.size, axis, link)
            for axis in range(len(shape))
            for link in links.get((number, axis), ())
        ]
        # Two axes of a source cannot both be told apart along one axis of the noise; and of two
        # axes of the noise along which one of the source can be, the finer is taken.
        apart: dict[int, Link] = {}
        for _, axis, link in sorted(found, key=lambda entry: entry[:2]):
            noise_axes = {other.axis for other in apart.values()} - {None}
            if axis not in apart and link.axis not in noise_axes:
                apart[axis] = link
        credit.append(Credit(number, shape, tuple(sorted(apart.items()))))
    return credit


class _Follower:
    """A walk backwards through a linear program.

    Attributes:
        types: of its variables.
        noisy: those that depend on a noise.
        any_way: see `credits_of`.
        ranges: what is known of the others.
        depth: how many loops are around what is read.
        links: how each of them is tied to the sources, by all uses so far. Tags are added and
            links become coarser, but none becomes finer, so that loops come to an end; on any way
            what is kept once stays.
    """

    def __init__(self, traced: Traced, noisy: set[Variable], any_way: bool) -> None:
        self.types = traced.types
        self.noisy = noisy
        self.any_way = any_way
        self.ranges = Ranges(traced)
        self.depth = 0
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

    def meet(self, one: Links, other: Links) -> Links:
        """The links of a value of two uses: what either of them changes."""
        both = dict(one)
        meet = _on_any_way if self.any_way else met
        for tag, links in other.items():
            both[tag] = meet(both[tag], links) if tag in both else links
        return both

    def cross(self, equation: Equation, outputs: Sequence[Links]) -> None:
        """From the links of an operation's results to those of its operands."""
        inputs = equation.inputs
        shapes = list(map(self.shape, inputs))
        outs = list(map(self.shape, equation.outputs))
        for position, atom in enumerate(inputs):
            if isinstance(atom, Constant) or atom not in self.noisy:
                continue

            def chosen(i: int, case: int = position - 1) -> np.ndarray:
                return self.ranges.choice(inputs[i], case)

            for output, links in enumerate(outputs):
                at = Crossing(
                    equation.params,
                    position,
                    output,
                    shapes,
                    outs,
                    nonzero=lambda i: self.ranges.nonzero(inputs[i]),
                    choice=chosen,
                )
                back = {tag: all_back(equation, at, own) for tag, own in links.items()}
                self.add_use(atom, back)

    def cross_loop(
        self, equation: Equation, loop: Loop, outputs: Sequence[Links]
    ) -> None:
        """From the links of a loop's outputs to those of its inputs: a fixed point."""
        self.depth += 1
        steps = -self.depth
        last_carry, stacked = loop.split_outputs(outputs)
        stacked = [_each(_inside(steps), links) for links in stacked]

        def step_back(seeds: list[Links]) -> list[Links]:
            self.follow(loop.body, seeds)
            return [self.links_of(v) for v in loop.body.inputs]

        def handed_on(known: Links, found: Links) -> Links:
            """What a step hands on reaches what all later steps reach."""
            later = _each(_step_before(loop, steps), found)
            return _widened(known, self.meet(known, later))

        _, links = fixed_point(
            loop,
            [*last_carry, *stacked],
            step_back,
            handed_on,
            backward=True,
        )
        consts, carry, xs = loop.split(links)
        consts = [_each(_of_all_steps(steps), links) for links in consts]
        carry = [_each(_first_step(loop, steps), links) for links in carry]
        # Slices have no axis of steps: all of them together have it first.
        xs = [_each(_outside(steps), links) for links in xs]
        self.depth -= 1
        input_links = [*consts, *carry, *xs]
        for atom, links in zip(equation.inputs, input_links, strict=True):
            self.add_use(atom, links)

    def shape(self, atom: Atom) -> Shape:
        if isinstance(atom, Constant):
            return tuple(jnp.shape(atom.value))
        return tuple(self.types[atom].shape)


Change: TypeAlias = Callable[[Link], Link]
"""What becomes of a link where a value enters or leaves a loop."""


def _on_any_way(links: Sequence[Link], others: Sequence[Link]) -> tuple[Link, ...]:
    """The links of a value of two uses: an axis that is kept on one way counts as kept."""
    kept = [link for link in (*links, *others) if link.is_kept]
    if kept:
        return tied(kept)
    return met(links, others)


def _each(change: Change, links: Links) -> Links:
    return {tag: tied(map(change, own)) for tag, own in links.items()}


def _inside(steps: int) -> Change:
    """The link of one step's value from that of all steps' values, stacked on axis 0."""

    def change(link: Link) -> Link:
        if link.axis is None or link.axis < 0:
            return link
        return link.on(link.axis - 1 if link.axis else steps)

    return change


def _outside(steps: int) -> Change:
    """The link of all steps' values from that of one step's."""

    def change(link: Link) -> Link:
        if link.axis == steps:
            return link.on(0)
        if link.axis is None or link.axis < 0:
            return link
        return link.on(link.axis + 1)

    return change


def _of_all_steps(steps: int) -> Change:
    """The link of a value that every step reads."""
    return lambda link: link.joined() if link.axis == steps else link


def _first_step(loop: Loop, steps: int) -> Change:
    """The link of a value that the first step reads."""
    first = slice(-1, None) if loop.reverse else slice(0, 1)

    def change(link: Link) -> Link:
        if link.axis != steps:
            return link
        return link.with_windows(link.first[first], link.last[first]).joined()

    return change


def _step_before(loop: Loop, steps: int) -> Change:
    """The link of what the steps hand on, from that of what they are given."""

    def change(link: Link) -> Link:
        if link.axis != steps:
            return link
        # Whatever a step is given it may hand on: so all behind it counts.
        behind = after(link, is_reverse=loop.reverse)
        if loop.reverse:
            first = np.append(link.size, behind.first[:-1])
            last = np.append(-1, behind.last[:-1])
        else:
            first = np.append(behind.first[1:], link.size)
            last = np.append(behind.last[1:], -1)
        return link.with_windows(first, last)

    return change


def _widened(known: Links, grown: Links) -> Links:
    """The grown links, in which windows that grew again reach the end, so that loops end soon."""
    widened: dict[Tag, tuple[Link, ...]] = {}
    for tag, links in grown.items():
        before = {link.axis: link for link in known.get(tag, ())}
        changed: list[Link] = []
        for link in links:
            old = before.get(link.axis)
            if tag in known and old is not None:
                first = np.where(link.first < old.first, 0, link.first)
                last = np.where(link.last > old.last, link.size - 1, link.last)
                link = link.with_windows(first, last)
            changed.append(link)
        widened[tag] = tied(changed)
    return widened
