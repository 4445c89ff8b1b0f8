"""Which axis of an operand follows an axis of the result, for any equation."""

from collections.abc import Sequence

from forwax._programs.axis_rules import Crossing
from forwax._programs.links import Factor, Link, Shape
from forwax._programs.program import Equation


def back(
    equation: Equation,
    position: int,
    output: int,
    link: Factor,
    shapes: Sequence[Shape],
    outs: Sequence[Shape],
) -> Link:
    """The link of one operand from the link of one result.

    Args:
        equation: an operation that is linear in this operand.
        position: which operand.
        output: which result.
        link: how the result is tied to the followed axis.
        shapes: the operands' shapes.
        outs: the results' shapes.

    Returns:
        The operand's link.
    """
    if link.size == 1:  # one position, whatever is done
        return link
    crossing = Crossing(equation.params, position, output, shapes, outs)
    return equation.facts.credit(crossing, link)
