"""Backwards through one linear operation: which axis of an operand follows an axis of the result?

The answer must hold for the values of every coordinate, so each rule below names an operation whose
coordinates it knows; what has no rule joins all coordinates, which is always true.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from forwax._programs.program import Equation

Shape: TypeAlias = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Factor:
    """Position x along an axis of a value changes nothing but position offset + (x // inner) % size of a followed axis.

    Attributes:
        axis: the value's axis.
        inner: how many neighbouring positions belong together.
        size: after how many such groups the pattern repeats.
        offset: where the first group lies.
    """

    axis: int
    inner: int = 1
    size: int = 1
    offset: int = 0

    def positions(self, length: int) -> np.ndarray:
        """The position on the followed axis for each position on an axis of this length."""
        return self.offset + (np.arange(length) // self.inner) % self.size


Link: TypeAlias = Factor | None
"""How a value is tied to a followed axis; None when its coordinates may change all positions."""


def back(
    equation: Equation,
    position: int,
    output: int,
    link: Factor,
    shapes: Sequence[Shape],
    outs: Sequence[Shape],
):
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
    name, shape, out = equation.name, shapes[position], outs[output]
    if link.size == 1:  # one position, whatever is done
        return link
    if name in _ELEMENTWISE:  # an axis of size 1 may be broadcast
        return link if len(shape) == len(out) and shape[link.axis] == out[link.axis] else None
    if name in _PASSING:
        return link if position == output and shape == out else None
    rule = _RULES.get(name)
    return None if rule is None else rule(equation.params, position, output, link, shapes, outs)


def factor(axis: int, inner: int, size: int, offset: int, length: int) -> Factor:
    """A link with no more groups than the axis has; with one group it holds whatever the axis."""
    size = min(size, -(-length // inner))
    return Factor(0, 1, 1, offset) if size == 1 else Factor(axis, inner, size, offset)


def through_reshape(link: Factor, shape: Shape, out: Shape) -> Link:
    """The link of a value that was reshaped from `shape` to `out`: the flat position stays."""
    stride = link.inner * math.prod(out[link.axis + 1 :])
    if out[link.axis] % (link.inner * link.size) == 0:
        period = stride * link.size
    elif math.prod(out[: link.axis]) == 1 and link.inner * link.size >= out[link.axis]:
        period = None  # the flat position by itself
    else:
        return None
    below = 1
    for axis in reversed(range(len(shape))):
        reach = below * shape[axis]
        if below <= stride < reach:
            outermost = math.prod(shape[:axis]) == 1
            whole = outermost or (period is not None and reach % period == 0)
            fits = stride % below == 0 and whole
            return (
                factor(axis, stride // below, link.size, link.offset, shape[axis]) if fits else None
            )
        below = reach
    return None


def _moved(link: Factor, axis: int | None) -> Link:
    return None if axis is None else dataclasses.replace(link, axis=axis)


def _shifted(link: Factor, start: int, length: int, out: int) -> Link:
    """The operand's link when its position `start` becomes the result's position 0."""
    if start == 0 and length == out:
        return link
    if start % link.inner or link.inner * link.size < out:
        return None
    return factor(
        link.axis,
        link.inner,
        -(-length // link.inner),
        link.offset - start // link.inner,
        length,
    )


def _transpose(
    params: Any, position: int, output: int, link: Factor, shapes: Any, outs: Any
) -> Link:
    return _moved(link, params["permutation"][link.axis])


def _reshape(params: Any, position: int, output: int, link: Factor, shapes: Any, outs: Any) -> Link:
    return through_reshape(link, shapes[0], outs[0]) if params.get("dimensions") is None else None


def _broadcast(
    params: Any, position: int, output: int, link: Factor, shapes: Any, outs: Any
) -> Link:
    sources = {out: axis for axis, out in enumerate(params["broadcast_dimensions"])}
    axis = sources.get(link.axis)
    return (
        _moved(link, axis) if axis is not None and shapes[0][axis] == outs[0][link.axis] else None
    )


def _reduce(params: Any, position: int, output: int, link: Factor, shapes: Any, outs: Any) -> Link:
    kept = [axis for axis in range(len(shapes[0])) if axis not in params["axes"]]
    return _moved(link, kept[link.axis])


def _squeeze(params: Any, position: int, output: int, link: Factor, shapes: Any, outs: Any) -> Link:
    kept = [axis for axis in range(len(shapes[0])) if axis not in params["dimensions"]]
    return _moved(link, kept[link.axis])


def _rev(params: Any, position: int, output: int, link: Factor, shapes: Any, outs: Any) -> Link:
    return None if link.axis in params["dimensions"] else link


def _slice(params: Any, position: int, output: int, link: Factor, shapes: Any, outs: Any) -> Link:
    a = link.axis
    if params["strides"] is not None and params["strides"][a] != 1:
        return None
    return _shifted(link, params["start_indices"][a], shapes[0][a], outs[0][a])


def _split(params: Any, position: int, output: int, link: Factor, shapes: Any, outs: Any) -> Link:
    if link.axis != params["axis"]:
        return link
    return _shifted(
        link,
        sum(params["sizes"][:output]),
        shapes[0][link.axis],
        outs[output][link.axis],
    )


def _concatenate(
    params: Any, position: int, output: int, link: Factor, shapes: Any, outs: Any
) -> Link:
    a = link.axis
    if a != params["dimension"]:
        return link
    start = sum(shape[a] for shape in shapes[:position])
    return _shifted(link, -start, shapes[position][a], outs[0][a])


def _stack(params: Any, position: int, output: int, link: Factor, shapes: Any, outs: Any) -> Link:
    if link.axis == params["axis"]:
        return Factor(0, 1, 1, link.offset + (position // link.inner) % link.size)
    return _moved(link, link.axis - (link.axis > params["axis"]))


def _unstack(params: Any, position: int, output: int, link: Factor, shapes: Any, outs: Any) -> Link:
    return _moved(link, link.axis + (link.axis >= params["axis"]))


def _tile(params: Any, position: int, output: int, link: Factor, shapes: Any, outs: Any) -> Link:
    return link if params["reps"][link.axis] == 1 else None


def _pad(params: Any, position: int, output: int, link: Factor, shapes: Any, outs: Any) -> Link:
    low, _, interior = params["padding_config"][link.axis]
    if position or interior:
        return None
    return _shifted(link, -low, shapes[0][link.axis], outs[0][link.axis])


def _dot_general(
    params: Any, position: int, output: int, link: Factor, shapes: Any, outs: Any
) -> Link:
    contracted, batch = params["dimension_numbers"]
    own = batch[position]
    free = [
        [a for a in range(len(shape)) if a not in c and a not in b]
        for shape, c, b in zip(shapes, contracted, batch, strict=True)
    ]
    if link.axis < len(own):
        return _moved(link, own[link.axis])
    start = len(own) + (len(free[0]) if position else 0)
    index = link.axis - start
    return _moved(link, free[position][index]) if 0 <= index < len(free[position]) else None


def _convolution(
    params: Any, position: int, output: int, link: Factor, shapes: Any, outs: Any
) -> Link:
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    if position or params["batch_group_count"] != 1:
        return None
    where = numbers.out_spec.index(link.axis)
    axis = numbers.lhs_spec[where]
    if where == 0:
        return _moved(link, axis)
    if where == 1:
        wide, narrow = outs[0][link.axis] // groups, shapes[0][axis] // groups
        whole = groups > 1 and link.inner % wide == 0
        inner = link.inner // wide * narrow
        return factor(axis, inner, link.size, link.offset, shapes[0][axis]) if whole else None
    i = where - 2
    kernel = shapes[1][numbers.rhs_spec[where]]
    plain = (
        kernel == 1 and params["window_strides"][i] == 1 and tuple(params["padding"][i]) == (0, 0)
    )
    return _moved(link, axis) if plain and params["lhs_dilation"][i] == 1 else None


def _along(name: str) -> Callable[..., Link]:
    """Operations along one axis, which they join."""

    def rule(params: Any, position: int, output: int, link: Factor, shapes: Any, outs: Any) -> Link:
        return None if link.axis == params[name] or shapes[position] != outs[output] else link

    return rule


def _window(params: Any, position: int, output: int, link: Factor, shapes: Any, outs: Any) -> Link:
    a = link.axis
    ones = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    plain = all(params.get(name) is None or params[name][a] == 1 for name in ones)
    return link if plain and tuple(params["padding"][a]) == (0, 0) else None


def _fft(params: Any, position: int, output: int, link: Factor, shapes: Any, outs: Any) -> Link:
    return link if link.axis < len(outs[0]) - len(params["fft_lengths"]) else None


def _dynamic_slice(
    params: Any, position: int, output: int, link: Factor, shapes: Any, outs: Any
) -> Link:
    return link if position == 0 and shapes[0][link.axis] == outs[0][link.axis] else None


def _dynamic_update(
    params: Any, position: int, output: int, link: Factor, shapes: Any, outs: Any
) -> Link:
    return (
        link if position in (0, 1) and shapes[position][link.axis] == outs[0][link.axis] else None
    )


def _gather(params: Any, position: int, output: int, link: Factor, shapes: Any, outs: Any) -> Link:
    numbers, operand = params["dimension_numbers"], shapes[0]
    batching = getattr(numbers, "operand_batching_dims", ())
    if link.axis in numbers.offset_dims:
        hidden = (*numbers.collapsed_slice_dims, *batching)
        kept = [axis for axis in range(len(operand)) if axis not in hidden]
        axis = kept[numbers.offset_dims.index(link.axis)]
        return _moved(link, axis) if params["slice_sizes"][axis] == operand[axis] else None
    rest = [axis for axis in range(len(outs[0])) if axis not in numbers.offset_dims]
    column = rest.index(link.axis)  # the indices' own axes, their last one left out
    columns = tuple(getattr(numbers, "start_indices_batching_dims", ()))
    return _moved(link, batching[columns.index(column)]) if column in columns else None


def _scatter_add(
    params: Any, position: int, output: int, link: Factor, shapes: Any, outs: Any
) -> Link:
    if position != 2:
        return link if position == 0 else None
    numbers, operand, updates = params["dimension_numbers"], shapes[0], shapes[2]
    batching = getattr(numbers, "operand_batching_dims", ())
    if link.axis in batching:
        column = numbers.scatter_indices_batching_dims[batching.index(link.axis)]
        return _moved(
            link,
            [a for a in range(len(updates)) if a not in numbers.update_window_dims][column],
        )
    windows = [
        a
        for a in range(len(operand))
        if a not in numbers.inserted_window_dims and a not in batching
    ]
    if link.axis not in windows:
        return None
    axis = numbers.update_window_dims[windows.index(link.axis)]
    return _moved(link, axis) if updates[axis] == operand[link.axis] else None


_ELEMENTWISE = {
    "mul",
    "div",
    "neg",
    "add",
    "sub",
    "add_any",
    "convert_element_type",
    "copy",
    "real",
    "imag",
    "conj",
}
_ELEMENTWISE |= {
    "complex",
    "reduce_precision",
    "select_n",
    "name",
    "copy_p",
    "pvary",
    "pcast",
    "sharding_constraint",
}


_PASSING = {"optimization_barrier", "device_put"}


_RULES: dict[str, Callable[..., Link]] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "reduce_sum": _reduce,
    "squeeze": _squeeze,
    "rev": _rev,
    "slice": _slice,
    "split": _split,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "tile": _tile,
    "pad": _pad,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "cumsum": _along("axis"),
    "sort": _along("dimension"),
    "reduce_window_sum": _window,
    "select_and_gather_add": _window,
    "fft": _fft,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update,
    "gather": _gather,
    "scatter-add": _scatter_add,
}
