"""Backwards through one linear operation: which axis of an operand follows an axis of the result?

The answer must hold for the values of every coordinate, so each rule names an operation whose
coordinates it knows; what has no rule joins all coordinates, which is always true.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from forwax._programs.links import Factor, Link, Shape, factor, moved, shifted, through_reshape


@dataclasses.dataclass(frozen=True)
class Crossing:
    """A way through an operation, which is linear in the operand on it.

    Attributes:
        params: the operation's parameters.
        position: which operand.
        output: which result.
        shapes: the operands' shapes.
        outs: the results' shapes.
    """

    params: dict[str, Any]
    position: int
    output: int
    shapes: Sequence[Shape]
    outs: Sequence[Shape]

    @property
    def shape(self) -> Shape:
        """The operand's shape."""
        return self.shapes[self.position]

    @property
    def out(self) -> Shape:
        """The result's shape."""
        return self.outs[self.output]


AxisRule: TypeAlias = Callable[[Crossing, Factor], Link]
"""Takes a crossing and the result's link to the operand's link."""


def join_all(at: Crossing, link: Factor) -> Link:
    """What holds for every operation: each coordinate of the operand may change all of the result."""
    return None


def elementwise(at: Crossing, link: Factor) -> Link:
    """Each position stays; an axis of size 1 may be broadcast."""
    if len(at.shape) != len(at.out):
        return None
    return link if at.shape[link.axis] == at.out[link.axis] else None


def one_to_one(at: Crossing, link: Factor) -> Link:
    """Several operands, each of which is one result."""
    return link if at.position == at.output and at.shape == at.out else None


def transpose(at: Crossing, link: Factor) -> Link:
    """Axes in another order."""
    return moved(link, at.params["permutation"][link.axis])


def reshape(at: Crossing, link: Factor) -> Link:
    """Entries in the same flat order, unless `dimensions` transposes first."""
    if at.params.get("dimensions") is not None:
        return None
    return through_reshape(link, at.shape, at.out)


def broadcast_in_dim(at: Crossing, link: Factor) -> Link:
    """New axes, and others repeated."""
    sources = {out: axis for axis, out in enumerate(at.params["broadcast_dimensions"])}
    axis = sources.get(link.axis)
    if axis is None or at.shape[axis] != at.out[link.axis]:
        return None
    return moved(link, axis)


def reduce(at: Crossing, link: Factor) -> Link:
    """Sums along axes, which go."""
    return moved(link, _without(at.shape, at.params["axes"])[link.axis])


def squeeze(at: Crossing, link: Factor) -> Link:
    """Axes of size 1 go."""
    return moved(link, _without(at.shape, at.params["dimensions"])[link.axis])


def _without(shape: Shape, removed: Sequence[int]) -> list[int]:
    return [axis for axis in range(len(shape)) if axis not in removed]


def rev(at: Crossing, link: Factor) -> Link:
    """Some axes backwards."""
    return None if link.axis in at.params["dimensions"] else link


def slice_(at: Crossing, link: Factor) -> Link:
    """A window of the operand."""
    axis, strides = link.axis, at.params["strides"]
    if strides is not None and strides[axis] != 1:
        return None
    return shifted(link, at.params["start_indices"][axis], at.shape[axis], at.out[axis])


def split(at: Crossing, link: Factor) -> Link:
    """Several results, windows one after another."""
    axis = link.axis
    if axis != at.params["axis"]:
        return link
    start = sum(at.params["sizes"][: at.output])
    return shifted(link, start, at.shape[axis], at.out[axis])


def concatenate(at: Crossing, link: Factor) -> Link:
    """Several operands, windows of the result one after another."""
    axis = link.axis
    if axis != at.params["dimension"]:
        return link
    start = sum(shape[axis] for shape in at.shapes[: at.position])
    return shifted(link, -start, at.shape[axis], at.out[axis])


def stack(at: Crossing, link: Factor) -> Link:
    """Several operands along a new axis: the operand as a whole is one position of it."""
    if link.axis != at.params["axis"]:
        return moved(link, link.axis - (link.axis > at.params["axis"]))
    group = (at.position // link.inner) % link.size
    return Factor(0, 1, 1, link.offset + group)


def unstack(at: Crossing, link: Factor) -> Link:
    """Several results without an axis of the operand."""
    return moved(link, link.axis + (link.axis >= at.params["axis"]))


def tile(at: Crossing, link: Factor) -> Link:
    """The operand several times along some axes."""
    return link if at.params["reps"][link.axis] == 1 else None


def pad(at: Crossing, link: Factor) -> Link:
    """The operand as a window of the result, but for holes; the padding value joins all."""
    low, _, interior = at.params["padding_config"][link.axis]
    if at.position or interior:
        return None
    return shifted(link, -low, at.shape[link.axis], at.out[link.axis])


def dot_general(at: Crossing, link: Factor) -> Link:
    """The result's axes are: batch, the left operand's own, the right operand's own."""
    contracted, batch = at.params["dimension_numbers"]
    own_batch = batch[at.position]
    if link.axis < len(own_batch):
        return moved(link, own_batch[link.axis])
    free = [
        _without(shape, (*joined, *shared))
        for shape, joined, shared in zip(at.shapes, contracted, batch, strict=True)
    ]
    start = len(own_batch) + (len(free[0]) if at.position else 0)
    index, own_free = link.axis - start, free[at.position]
    return moved(link, own_free[index]) if 0 <= index < len(own_free) else None


def conv_general_dilated(at: Crossing, link: Factor) -> Link:
    """From the result to the image: examples, groups of features, and space if the kernel is 1."""
    params, numbers = at.params, at.params["dimension_numbers"]
    if at.position or params["batch_group_count"] != 1:
        return None
    dimension = numbers.out_spec.index(link.axis)
    axis = numbers.lhs_spec[dimension]
    if dimension == 0:  # examples
        return moved(link, axis)
    if dimension == 1:  # features
        return _feature_groups(at, link, axis)
    i = dimension - 2
    kernel = at.shapes[1][numbers.rhs_spec[dimension]]
    is_pointwise = kernel == 1 and params["window_strides"][i] == 1
    is_whole = tuple(params["padding"][i]) == (0, 0) and params["lhs_dilation"][i] == 1
    return moved(link, axis) if is_pointwise and is_whole else None


def _feature_groups(at: Crossing, link: Factor, axis: int) -> Link:
    groups = at.params["feature_group_count"]
    # features of one group in the result and in the image
    out_width = at.out[link.axis] // groups
    in_width = at.shape[axis] // groups
    if groups == 1 or link.inner % out_width:
        return None
    inner = link.inner // out_width * in_width
    return factor(axis, inner, link.size, link.offset, at.shape[axis])


def along(name: str) -> AxisRule:
    """The rule of operations along one axis, the parameter of this name, which they join."""

    def rule(at: Crossing, link: Factor) -> Link:
        return None if link.axis == at.params[name] or at.shape != at.out else link

    return rule


_OF_SIZE_1 = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")


def window(at: Crossing, link: Factor) -> Link:
    """Sums over windows, which join positions along the axes on which they are larger than 1."""
    axis, params = link.axis, at.params
    is_point = all(params.get(name) is None or params[name][axis] == 1 for name in _OF_SIZE_1)
    return link if is_point and tuple(params["padding"][axis]) == (0, 0) else None


def fft(at: Crossing, link: Factor) -> Link:
    """The last axes are joined."""
    num_kept = len(at.out) - len(at.params["fft_lengths"])
    return link if link.axis < num_kept else None


def dynamic_slice(at: Crossing, link: Factor) -> Link:
    """A window at an unknown place, whole along the other axes."""
    is_whole = at.position == 0 and at.shape[link.axis] == at.out[link.axis]
    return link if is_whole else None


def dynamic_update_slice(at: Crossing, link: Factor) -> Link:
    """The operand, and what replaces a window of it at an unknown place."""
    is_whole = at.position in (0, 1) and at.shape[link.axis] == at.out[link.axis]
    return link if is_whole else None


def gather(at: Crossing, link: Factor) -> Link:
    """Windows at unknown places: axes that they cover wholly, and batching axes."""
    numbers, operand = at.params["dimension_numbers"], at.shapes[0]
    batching = getattr(numbers, "operand_batching_dims", ())
    if link.axis in numbers.offset_dims:
        kept = _without(operand, (*numbers.collapsed_slice_dims, *batching))
        axis = kept[numbers.offset_dims.index(link.axis)]
        is_whole = at.params["slice_sizes"][axis] == operand[axis]
        return moved(link, axis) if is_whole else None
    # the indices' own axes, their last one left out
    column = _without(at.out, numbers.offset_dims).index(link.axis)
    columns = tuple(getattr(numbers, "start_indices_batching_dims", ()))
    return moved(link, batching[columns.index(column)]) if column in columns else None


def scatter_add(at: Crossing, link: Factor) -> Link:
    """The operand, and what is added to windows at unknown places."""
    if at.position != 2:
        return link if at.position == 0 else None
    numbers, operand, updates = at.params["dimension_numbers"], at.shapes[0], at.shapes[2]
    batching = getattr(numbers, "operand_batching_dims", ())
    if link.axis in batching:
        column = numbers.scatter_indices_batching_dims[batching.index(link.axis)]
        return moved(link, _without(updates, numbers.update_window_dims)[column])
    windows = _without(operand, (*numbers.inserted_window_dims, *batching))
    if link.axis not in windows:
        return None
    axis = numbers.update_window_dims[windows.index(link.axis)]
    return moved(link, axis) if updates[axis] == operand[link.axis] else None
