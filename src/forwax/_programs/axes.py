"""What an operand may change of a followed axis, from what the result does, for any equation."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from forwax._programs.axis_rules import Crossing, pair_of
from forwax._programs.links import Link
from forwax._programs.program import Equation


def back(equation: Equation, at: Crossing, link: Link) -> Link:
    """The link of one operand from the link of one result.

    Args:
        equation: an operation that is linear in this operand.
        at: which operand, and which result.
        link: how the result is tied to the followed axis.

    Returns:
        The operand's link.
    """
    if link.axis is None or link.axis < 0:  # no axis of the result, whatever is done
        return link
    return equation.facts.credit(at, link)


def all_back(
    equation: Equation, at: Crossing, links: Sequence[Link]
) -> tuple[Link, ...]:
    """The links of one operand from all that hold of one result: one at most for each axis.

    Where the operation lets only some entries pass, others may hold behind it: if the entry (t, s)
    passes for s <= t alone and changes position t, it changes no position before s.
    """
    found = list(links)
    mask_of = equation.facts.passes
    if mask_of is not None:
        mask = mask_of(at)
        for link in links:
            found += _along_others(link, mask)
    return tied(back(equation, at, link) for link in found)


def _along_others(link: Link, mask: np.ndarray) -> list[Link]:
    """What a mask of a value's entries says of its other axes."""
    if link.axis is None or link.axis < 0:
        return []
    links: list[Link] = []
    for axis in range(mask.ndim):
        if axis != link.axis:
            pair = pair_of(mask, link.axis, axis)
            if pair is not None:
                links.append(link.through(pair, axis))
    return links


def tied(links: Iterable[Link]) -> tuple[Link, ...]:
    """Links that hold together, without those that say nothing, one for each axis."""
    by_axis: dict[int | None, Link] = {}
    for link in links:
        if not link.is_open:
            other = by_axis.get(link.axis)
            by_axis[link.axis] = link if other is None else other.both(link)
    # In one order, so that equal ones compare equal.
    return tuple(by_axis[axis] for axis in sorted(by_axis, key=str))


def met(
    links: Sequence[Link],
    others: Sequence[Link],
    meet: Callable[[Link, Link], Link | None] = Link.either,
) -> tuple[Link, ...]:
    """What holds of a value with two uses."""
    if links is others:
        return tuple(links)
    pairs = (meet(link, other) for link in links for other in others)
    return tied(link for link in pairs if link is not None)
