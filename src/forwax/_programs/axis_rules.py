"""Backwards through one linear operation: what an operand's axes change of a followed axis.

The answer must hold for the values of every coordinate, so each rule names an operation whose
coordinates it knows; what has no rule joins all coordinates, which is always true.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from forwax._programs.links import Link, Shape, through_reshape


def _may_be_anything(position: int) -> np.ndarray:
    return np.ones((), bool)


@dataclasses.dataclass(frozen=True)
class Crossing:
    """A way through an operation, which is linear in the operand on it.

    Attributes:
        params: the operation's parameters.
        position: which operand.
        output: which result.
        shapes: the operands' shapes.
        outs: the results' shapes.
        nonzero: takes the position of another operand to where it may differ from 0: a mask whose
            axes have the operand's lengths, or 1 where the same holds all along, or none at all.
        choice: the same for an operand that chooses: where it may choose this one.
    """

    params: dict[str, Any]
    position: int
    output: int
    shapes: Sequence[Shape]
    outs: Sequence[Shape]
    nonzero: Callable[[int], np.ndarray] = _may_be_anything
    choice: Callable[[int], np.ndarray] = _may_be_anything

    @property
    def shape(self) -> Shape:
        """The operand's shape."""
        return self.shapes[self.position]

    @property
    def out(self) -> Shape:
        """The result's shape."""
        return self.outs[self.output]


AxisRule: TypeAlias = Callable[[Crossing, Link], Link]
"""Takes a crossing and the result's link, which is on an axis, to the operand's link."""

MaskRule: TypeAlias = Callable[[Crossing], np.ndarray]
"""Where a result may depend on the operand, as `Crossing.nonzero` says it."""


def join_all(at: Crossing, link: Link) -> Link:
    """What holds for every operation: each coordinate may change all that the result does."""
    return link.joined()


def elementwise(at: Crossing, link: Link) -> Link:
    """Each position stays; an axis of size 1 may be broadcast."""
    if len(at.shape) != len(at.out) or at.shape[_axis(link)] != link.length:
        return link.joined()
    return link


def by_factor(at: Crossing) -> np.ndarray:
    """A product with another operand, entry by entry."""
    return at.nonzero(1 - at.position)


def by_choice(at: Crossing) -> np.ndarray:
    """One of several operands, as the first one says."""
    return at.choice(0)


def one_to_one(at: Crossing, link: Link) -> Link:
    """Several operands, each of which is one result."""
    if at.position != at.output or at.shape != at.out:
        return link.joined()
    return link


def transpose(at: Crossing, link: Link) -> Link:
    """Axes in another order."""
    permutation = at.params["permutation"]
    return link.on(permutation[_axis(link)])


def reshape(at: Crossing, link: Link) -> Link:
    """Entries in the same flat order, unless `dimensions` transposes first."""
    if at.params.get("dimensions") is not None:
        return link.joined()
    return through_reshape(link, at.shape, at.out)


def broadcast_in_dim(at: Crossing, link: Link) -> Link:
    """New axes, and others repeated."""
    targets = at.params["broadcast_dimensions"]
    if link.axis not in targets:
        return link.joined()
    axis = targets.index(link.axis)
    if at.shape[axis] != link.length:
        return link.joined()
    return link.on(axis)


def reduce(at: Crossing, link: Link) -> Link:
    """Sums along axes, which go."""
    kept = _axes_without(at.params["axes"], at.shape)
    return link.on(kept[_axis(link)])


def squeeze(at: Crossing, link: Link) -> Link:
    """Axes of size 1 go."""
    kept = _axes_without(at.params["dimensions"], at.shape)
    return link.on(kept[_axis(link)])


def rev(at: Crossing, link: Link) -> Link:
    """Some axes backwards."""
    if link.axis not in at.params["dimensions"]:
        return link
    return link.with_windows(link.first[::-1], link.last[::-1])


def slice_(at: Crossing, link: Link) -> Link:
    """A window of the operand, or each n-th position of one."""
    axis = _axis(link)
    strides = at.params["strides"]
    stride = 1 if strides is None else strides[axis]
    start = at.params["start_indices"][axis]
    return _placed(link, start, stride, at.shape[axis])


def split(at: Crossing, link: Link) -> Link:
    """Several results, windows one after another."""
    axis = _axis(link)
    if axis != at.params["axis"]:
        return link
    sizes = at.params["sizes"]
    start = sum(sizes[: at.output])
    return _placed(link, start, 1, at.shape[axis])


def _placed(
    link: Link,
    start: int,
    stride: int,
    length: int,
) -> Link:
    """The operand's link if the result's positions are its own from `start` on."""
    of_result = np.arange(link.length)
    return link.pulled(start + stride * of_result, of_result, length)


def concatenate(at: Crossing, link: Link) -> Link:
    """Several operands, windows of the result one after another."""
    axis = _axis(link)
    if axis != at.params["dimension"]:
        return link
    before = at.shapes[: at.position]
    return _window_of(link, sum(shape[axis] for shape in before), 1, at.shape[axis])


def _window_of(
    link: Link,
    start: int,
    stride: int,
    length: int,
) -> Link:
    """The operand's link if its positions are the result's from `start` on."""
    of_operand = np.arange(length)
    of_result = start + stride * of_operand
    inside = (of_result >= 0) & (of_result < link.length)
    return link.pulled(of_operand[inside], of_result[inside], length)


def stack(at: Crossing, link: Link) -> Link:
    """Several operands along a new axis."""
    new_axis = at.params["axis"]
    axis = _axis(link)
    if axis == new_axis:  # the operand as a whole is one position
        own = slice(at.position, at.position + 1)
        return link.with_windows(link.first[own], link.last[own]).joined()
    return link.on(axis - 1 if axis > new_axis else axis)


def unstack(at: Crossing, link: Link) -> Link:
    """Several results without an axis of the operand."""
    axis = _axis(link)
    return link.on(axis + 1 if axis >= at.params["axis"] else axis)


def tile(at: Crossing, link: Link) -> Link:
    """The operand several times along some axes."""
    of_result = np.arange(link.length)
    length = at.shape[_axis(link)]
    return link.pulled(of_result % length, of_result, length)


def pad(at: Crossing, link: Link) -> Link:
    """The operand as a window of the result; the padding value, if it moves, joins all."""
    if at.position != 0:
        return link.joined()
    axis = _axis(link)
    low, _, interior = at.params["padding_config"][axis]
    return _window_of(link, low, 1 + interior, at.shape[axis])


def cumulative(at: Crossing, link: Link) -> Link:
    """Sums of all positions up to each; backwards if `reverse`, of all from there on."""
    if link.axis != at.params["axis"]:
        return link
    return after(link, is_reverse=at.params["reverse"])


def after(link: Link, is_reverse: bool = False) -> Link:
    """The link of what changes its own place of the result and all behind it, or before it."""
    way = slice(None) if is_reverse else slice(None, None, -1)
    first = np.minimum.accumulate(link.first[way])[way]
    last = np.maximum.accumulate(link.last[way])[way]
    return link.with_windows(first, last)


def dot_general(at: Crossing, link: Link) -> Link:
    """The result's axes are: batch, the left operand's own, the right operand's own."""
    contracted, batch = at.params["dimension_numbers"]
    axis = _axis(link)
    shared = batch[at.position]
    if axis < len(shared):
        return link.on(shared[axis])
    free = [
        _axes_without((*contracted[side], *batch[side]), at.shapes[side])
        for side in (0, 1)
    ]
    # the result's axes, on each operand
    places = [(side, own) for side in (0, 1) for own in free[side]]
    side, own = places[axis - len(shared)]
    if side == at.position:
        return link.on(own)
    # An axis of the other operand, whose zeros say which of the contracted positions enter it.
    mask = at.nonzero(side)
    links = [link.joined()]
    for theirs, ours in zip(contracted[side], contracted[at.position], strict=True):
        pair = pair_of(mask, own, theirs)
        if pair is not None:
            links.append(link.through(pair, ours))
    return min(links, key=lambda link: link.width)


def pair_of(
    mask: np.ndarray,
    axis: int,
    other: int,
) -> np.ndarray | None:
    """Which positions of two axes a mask lets meet; None if that says nothing of the other."""
    if mask.ndim == 0 or mask.shape[other] == 1:
        return None
    rest = tuple(i for i in range(mask.ndim) if i not in (axis, other))
    pair = np.any(mask, rest)
    return pair if axis < other else pair.T


def conv_general_dilated(at: Crossing, link: Link) -> Link:
    """From the result to the image: examples, groups of features, and windows of space."""
    params = at.params
    numbers = params["dimension_numbers"]
    if at.position != 0 or params["batch_group_count"] != 1:
        return link.joined()
    # examples, features, and then space
    dimension = numbers.out_spec.index(link.axis)
    axis = numbers.lhs_spec[dimension]
    if dimension == 0:
        return link.on(axis)
    if dimension == 1:
        return _feature_groups(at, link).on(axis)
    kernel_axis = numbers.rhs_spec[dimension]
    taps = np.arange(at.shapes[1][kernel_axis])
    used = at.nonzero(1)
    if used.ndim and used.shape[kernel_axis] > 1:  # a masked kernel
        rest = tuple(i for i in range(used.ndim) if i != kernel_axis)
        taps = np.flatnonzero(used.any(rest))
    i = dimension - 2
    pulled = _windows(
        link,
        taps * params["rhs_dilation"][i] - params["padding"][i][0],
        stride=params["window_strides"][i],
        dilation=params["lhs_dilation"][i],
        length=at.shape[axis],
    )
    return pulled.on(axis)


def _windows(
    link: Link, offsets: np.ndarray, stride: int, dilation: int, length: int
) -> Link:
    """The link of an operand of which each result reads positions at some offsets.

    Result y reads the operand's position (y * stride + offset) / dilation where that is whole.
    """
    of_result = np.arange(link.length)[:, None]
    of_dilated = of_result * stride + offsets
    of_operand = of_dilated // dilation
    inside = (of_dilated % dilation == 0) & (of_operand >= 0) & (of_operand < length)
    of_result = np.broadcast_to(of_result, inside.shape)
    return link.pulled(of_operand[inside], of_result[inside], length)


def _feature_groups(at: Crossing, link: Link) -> Link:
    """From the result's features to the image's: groups of them do not mix."""
    groups = at.params["feature_group_count"]
    width = at.shape[at.params["dimension_numbers"].lhs_spec[1]] // groups
    first = link.first.reshape(groups, -1).min(1)
    last = link.last.reshape(groups, -1).max(1)
    return link.with_windows(np.repeat(first, width), np.repeat(last, width))


def along(name: str) -> AxisRule:
    """The rule of operations along one axis, the parameter of this name, which they join."""

    def rule(at: Crossing, link: Link) -> Link:
        if link.axis == at.params[name] or at.shape != at.out:
            return link.joined()
        return link

    return rule


def window(at: Crossing, link: Link) -> Link:
    """Sums over windows."""
    axis = _axis(link)

    def param(name: str) -> int:
        sizes = at.params.get(name)
        return 1 if sizes is None else sizes[axis]

    taps = np.arange(param("window_dimensions")) * param("window_dilation")
    return _windows(
        link,
        taps - at.params["padding"][axis][0],
        stride=param("window_strides"),
        dilation=param("base_dilation"),
        length=at.shape[axis],
    )


def fft(at: Crossing, link: Link) -> Link:
    """The last axes are joined."""
    num_joined = len(at.params["fft_lengths"])
    if _axis(link) >= len(at.out) - num_joined:
        return link.joined()
    return link


def dynamic_slice(at: Crossing, link: Link) -> Link:
    """A window at an unknown place, whole along the other axes."""
    return _if_whole(at, link) if at.position == 0 else link.joined()


def dynamic_update_slice(at: Crossing, link: Link) -> Link:
    """The operand, and what replaces a window of it at an unknown place."""
    # Along an axis that is replaced as a whole the place can only be 0.
    return _if_whole(at, link) if at.position <= 1 else link.joined()


def _if_whole(at: Crossing, link: Link) -> Link:
    if at.shape[_axis(link)] != link.length:
        return link.joined()
    return link


def gather(at: Crossing, link: Link) -> Link:
    """Windows at unknown places: axes that they cover wholly, and batching axes."""
    numbers = at.params["dimension_numbers"]
    operand = at.shapes[0]
    batching = getattr(numbers, "operand_batching_dims", ())
    if link.axis in numbers.offset_dims:
        hidden = (*numbers.collapsed_slice_dims, *batching)
        kept = _axes_without(hidden, operand)
        axis = kept[numbers.offset_dims.index(link.axis)]
        if at.params["slice_sizes"][axis] != operand[axis]:
            return link.joined()
        return link.on(axis)
    # the indices' own axes, their last one left out
    columns = _axes_without(numbers.offset_dims, at.out)
    column = columns.index(_axis(link))
    shared = tuple(getattr(numbers, "start_indices_batching_dims", ()))
    if column not in shared:
        return link.joined()
    return link.on(batching[shared.index(column)])


def scatter_add(at: Crossing, link: Link) -> Link:
    """The operand, and what is added to windows at unknown places."""
    if at.position == 0:
        return link
    if at.position != 2:
        return link.joined()
    numbers = at.params["dimension_numbers"]
    operand = at.shapes[0]
    updates = at.shape
    axis = _axis(link)
    batching = getattr(numbers, "operand_batching_dims", ())
    if axis in batching:
        columns = _axes_without(numbers.update_window_dims, updates)
        shared = numbers.scatter_indices_batching_dims
        column = shared[batching.index(axis)]
        return link.on(columns[column])
    # Along the other axes the indices say where an update goes.
    hidden = (*numbers.inserted_window_dims, *batching)
    windows = _axes_without(hidden, operand)
    if axis not in windows:
        return link.joined()
    own = numbers.update_window_dims[windows.index(axis)]
    if updates[own] != operand[axis]:
        return link.joined()
    return link.on(own)


def _axis(link: Link) -> int:
    """The axis of a link that is on one."""
    assert link.axis is not None
    return link.axis


def _axes_without(hidden: Sequence[int], shape: Shape) -> list[int]:
    axes = range(len(shape))
    return [axis for axis in axes if axis not in hidden]
