"""Backwards through one linear operation: which axis of an operand follows an axis of the result?

The answer must hold for the values of every coordinate, so each rule names an operation whose
coordinates it knows; what has no rule joins all coordinates, which is always true.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from forwax._programs.links import (
    Factor,
    Link,
    Shape,
    factor,
    moved,
    shifted,
    through_reshape,
)


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
    """What holds for every operation: each coordinate may change all of the result."""
    return None


def elementwise(at: Crossing, link: Factor) -> Link:
    """Each position stays; an axis of size 1 may be broadcast."""
    axis = link.axis
    if len(at.shape) != len(at.out):
        return None
    if at.shape[axis] != at.out[axis]:
        return None
    return link


def one_to_one(at: Crossing, link: Factor) -> Link:
    """Several operands, each of which is one result."""
    if at.position != at.output:
        return None
    if at.shape != at.out:
        return None
    return link


def transpose(at: Crossing, link: Factor) -> Link:
    """Axes in another order."""
    permutation = at.params["permutation"]
    return moved(link, permutation[link.axis])


def reshape(at: Crossing, link: Factor) -> Link:
    """Entries in the same flat order, unless `dimensions` transposes first."""
    if at.params.get("dimensions") is not None:
        return None
    return through_reshape(link, at.shape, at.out)


def broadcast_in_dim(at: Crossing, link: Factor) -> Link:
    """New axes, and others repeated."""
    targets = at.params["broadcast_dimensions"]
    if link.axis not in targets:
        return None
    axis = targets.index(link.axis)
    if at.shape[axis] != at.out[link.axis]:
        return None
    return moved(link, axis)


def reduce(at: Crossing, link: Factor) -> Link:
    """Sums along axes, which go."""
    kept = _axes_without(at.params["axes"], at.shape)
    return moved(link, kept[link.axis])


def squeeze(at: Crossing, link: Factor) -> Link:
    """Axes of size 1 go."""
    kept = _axes_without(at.params["dimensions"], at.shape)
    return moved(link, kept[link.axis])


def rev(at: Crossing, link: Factor) -> Link:
    """Some axes backwards."""
    if link.axis in at.params["dimensions"]:
        return None
    return link


def slice_(at: Crossing, link: Factor) -> Link:
    """A window of the operand."""
    axis = link.axis
    strides = at.params["strides"]
    if strides is not None and strides[axis] != 1:
        return None
    start = at.params["start_indices"][axis]
    return shifted(link, start, at.shape[axis], at.out[axis])


def split(at: Crossing, link: Factor) -> Link:
    """Several results, windows one after another."""
    axis = link.axis
    if axis != at.params["axis"]:
        return link
    sizes = at.params["sizes"]
    start = sum(sizes[: at.output])
    return shifted(link, start, at.shape[axis], at.out[axis])


def concatenate(at: Crossing, link: Factor) -> Link:
    """Several operands, windows of the result one after another."""
    axis = link.axis
    if axis != at.params["dimension"]:
        return link
    before = at.shapes[: at.position]
    start = sum(shape[axis] for shape in before)
    return shifted(link, -start, at.shape[axis], at.out[axis])


def stack(at: Crossing, link: Factor) -> Link:
    """Several operands along a new axis."""
    new_axis = at.params["axis"]
    if link.axis == new_axis:  # the operand as a whole is one position
        group = (at.position // link.inner) % link.size
        return Factor(0, 1, 1, link.offset + group)
    if link.axis > new_axis:
        return moved(link, link.axis - 1)
    return link


def unstack(at: Crossing, link: Factor) -> Link:
    """Several results without an axis of the operand."""
    if link.axis >= at.params["axis"]:
        return moved(link, link.axis + 1)
    return link


def tile(at: Crossing, link: Factor) -> Link:
    """The operand several times along some axes."""
    if at.params["reps"][link.axis] != 1:
        return None
    return link


def pad(at: Crossing, link: Factor) -> Link:
    """The operand as a window of the result; the padding value, if it moves, joins all."""
    axis = link.axis
    low, _, interior = at.params["padding_config"][axis]
    if at.position != 0:
        return None
    if interior:  # holes, which change how far apart groups are
        return None
    return shifted(link, -low, at.shape[axis], at.out[axis])


def dot_general(at: Crossing, link: Factor) -> Link:
    """The result's axes are: batch, the left operand's own, the right operand's own."""
    contracted, batch = at.params["dimension_numbers"]
    shared = batch[at.position]
    if link.axis < len(shared):
        return moved(link, shared[link.axis])
    free = [
        _axes_without((*contracted[side], *batch[side]), at.shapes[side])
        for side in (0, 1)
    ]
    own = free[at.position]
    first = len(shared)
    if at.position == 1:
        first += len(free[0])
    index = link.axis - first
    if not 0 <= index < len(own):  # an axis of the other operand
        return None
    return moved(link, own[index])


def conv_general_dilated(at: Crossing, link: Factor) -> Link:
    """From the result to the image: examples, groups of features, and space if the kernel is 1."""
    params = at.params
    numbers = params["dimension_numbers"]
    if at.position != 0:
        return None
    if params["batch_group_count"] != 1:
        return None
    # examples, features, and then space
    dimension = numbers.out_spec.index(link.axis)
    axis = numbers.lhs_spec[dimension]
    if dimension == 1:
        return _feature_groups(at, link, axis)
    if dimension > 1 and not _is_pointwise(at, dimension):
        return None
    return moved(link, axis)


def _is_pointwise(at: Crossing, dimension: int) -> bool:
    """Whether a convolution reads at each position of a spatial dimension that one alone."""
    params = at.params
    kernel_axis = params["dimension_numbers"].rhs_spec[dimension]
    if at.shapes[1][kernel_axis] != 1:
        return False
    i = dimension - 2
    if tuple(params["padding"][i]) != (0, 0):
        return False
    return params["window_strides"][i] == 1 and params["lhs_dilation"][i] == 1


def _feature_groups(at: Crossing, link: Factor, axis: int) -> Link:
    """From the result's features to the image's: groups of them do not mix."""
    groups = at.params["feature_group_count"]
    out_width = at.out[link.axis] // groups
    in_width = at.shape[axis] // groups
    if groups == 1:  # each result hears all features
        return None
    if link.inner % out_width:
        return None
    inner = link.inner // out_width * in_width
    return factor(axis, inner, link.size, link.offset, at.shape[axis])


def along(name: str) -> AxisRule:
    """The rule of operations along one axis, the parameter of this name, which they join."""

    def rule(at: Crossing, link: Factor) -> Link:
        if link.axis == at.params[name]:
            return None
        if at.shape != at.out:
            return None
        return link

    return rule


_OF_SIZE_1 = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")


def window(at: Crossing, link: Factor) -> Link:
    """Sums over windows, which join positions along the axes on which they are larger than 1."""
    axis = link.axis
    for name in _OF_SIZE_1:
        sizes = at.params.get(name)
        if sizes is not None and sizes[axis] != 1:
            return None
    padding = at.params["padding"]
    if tuple(padding[axis]) != (0, 0):
        return None
    return link


def fft(at: Crossing, link: Factor) -> Link:
    """The last axes are joined."""
    num_joined = len(at.params["fft_lengths"])
    if link.axis >= len(at.out) - num_joined:
        return None
    return link


def dynamic_slice(at: Crossing, link: Factor) -> Link:
    """A window at an unknown place, whole along the other axes."""
    if at.position != 0:
        return None
    return _if_whole(at, link)


def dynamic_update_slice(at: Crossing, link: Factor) -> Link:
    """The operand, and what replaces a window of it at an unknown place."""
    if at.position > 1:
        return None
    # Along an axis that is replaced as a whole the place can only be 0.
    return _if_whole(at, link)


def _if_whole(at: Crossing, link: Factor) -> Link:
    axis = link.axis
    if at.shape[axis] != at.out[axis]:
        return None
    return link


def gather(at: Crossing, link: Factor) -> Link:
    """Windows at unknown places: axes that they cover wholly, and batching axes."""
    numbers = at.params["dimension_numbers"]
    operand = at.shapes[0]
    batching = getattr(numbers, "operand_batching_dims", ())
    if link.axis in numbers.offset_dims:
        hidden = (*numbers.collapsed_slice_dims, *batching)
        kept = _axes_without(hidden, operand)
        axis = kept[numbers.offset_dims.index(link.axis)]
        if at.params["slice_sizes"][axis] != operand[axis]:
            return None
        return moved(link, axis)
    # the indices' own axes, their last one left out
    columns = _axes_without(numbers.offset_dims, at.out)
    column = columns.index(link.axis)
    shared = tuple(getattr(numbers, "start_indices_batching_dims", ()))
    if column not in shared:
        return None
    return moved(link, batching[shared.index(column)])


def scatter_add(at: Crossing, link: Factor) -> Link:
    """The operand, and what is added to windows at unknown places."""
    if at.position == 0:
        return link
    if at.position != 2:
        return None
    numbers = at.params["dimension_numbers"]
    operand = at.shapes[0]
    updates = at.shape
    batching = getattr(numbers, "operand_batching_dims", ())
    if link.axis in batching:
        columns = _axes_without(numbers.update_window_dims, updates)
        shared = numbers.scatter_indices_batching_dims
        column = shared[batching.index(link.axis)]
        return moved(link, columns[column])
    # Along the other axes the indices say where an update goes.
    hidden = (*numbers.inserted_window_dims, *batching)
    windows = _axes_without(hidden, operand)
    if link.axis not in windows:
        return None
    axis = numbers.update_window_dims[windows.index(link.axis)]
    if updates[axis] != operand[link.axis]:
        return None
    return moved(link, axis)


def _axes_without(hidden: Sequence[int], shape: Shape) -> list[int]:
    axes = range(len(shape))
    return [axis for axis in axes if axis not in hidden]
