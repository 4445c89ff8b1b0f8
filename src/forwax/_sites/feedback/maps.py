"""Maps from the outlets' exact errors to the inlets' errors, and how noise teaches them.

A map is [e, h]: the real coordinates of all errors that an inlet hears by those of its value, both
without the axes that they have in common. One map serves all examples and all common positions.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from forwax import _mesh, _tree
from forwax._sites.feedback.inlets import Inlet, Outlet, Routes


def map_shapes(routes: Routes) -> list[tuple[int, int]]:
    """The shape [e, h] of each inlet's map."""
    shapes: list[tuple[int, int]] = []
    for inlet in routes.inlets:
        num_errors = sum(routes.heard_sizes(inlet))
        shapes.append((num_errors, inlet.size))
    return shapes


def zeros(routes: Routes) -> tuple[Array, ...]:
    """A map of zeros for each inlet, in at least float32."""
    found: list[Array] = []
    for inlet, shape in zip(routes.inlets, map_shapes(routes), strict=True):
        dtype = _tree.accumulation_dtype(jnp.finfo(inlet.dtype).dtype)
        found.append(jnp.zeros(shape, dtype))
    return tuple(found)


def sent(
    routes: Routes,
    maps: Sequence[Array],
    errors: Sequence[Array],
) -> list[Array]:
    """Each inlet's error, the outlets' errors times its map.

    Args:
        routes: the ways of the errors.
        maps: one an inlet.
        errors: the exact error of each outlet, as `jax.grad` writes it.
    """
    found: list[Array] = []
    for inlet, through in zip(routes.inlets, maps, strict=True):
        if inlet.heard:
            error = _sent_to(routes, inlet, through, errors)
        else:
            error = _nothing(routes, inlet)
        found.append(error)
    return found


def _sent_to(
    routes: Routes,
    inlet: Inlet,
    through: Array,
    errors: Sequence[Array],
) -> Array:
    lead = routes.num_lead
    # Gradients of complex values are conjugate to the directions that maps take to one another.
    heard = [errors[number].conj() for number in inlet.heard]
    flat = _heard_by_position(inlet, heard, lead)  # [*examples, positions, e]
    error = flat @ through.astype(flat.dtype)
    if lead and not inlet.mapped:
        # One value for all examples has the sum of their errors.
        error = jnp.sum(error, axis=0)
        lead = 0
    value = _positions_back(error, lead, inlet.own_axes, inlet)
    return value.conj().astype(inlet.dtype)


def _nothing(routes: Routes, inlet: Inlet) -> Array:
    """The error of an inlet that hears of no outlet."""
    shape = inlet.shape
    if inlet.mapped and routes.sites.num_examples is not None:
        shape = (routes.sites.num_examples, *shape)
    zeros = jnp.zeros(shape, inlet.dtype)
    return _mesh.vary(zeros, inlet.axes)


def _heard_by_position(
    inlet: Inlet,
    heard: Sequence[Array],
    lead: int,
) -> Array:
    """The outlets' values that an inlet hears, side by side, [*lead, positions, e]."""
    parts: list[Array] = []
    for value, axes in zip(heard, inlet.heard_axes, strict=True):
        part = _positions_first(value, lead, axes)
        parts.append(part)
    return jnp.concatenate(parts, axis=-1)


def _positions_first(
    x: Array,
    lead: int,
    common: Sequence[int],
) -> Array:
    """Values [*lead, *shape] as real coordinates [*lead, common positions, all others]."""
    front = list(range(lead))
    front += [lead + axis for axis in common]
    rest = [axis for axis in range(x.ndim) if axis not in front]
    moved = jnp.transpose(x, [*front, *rest])
    positions = moved.shape[lead : len(front)]
    flat = moved.reshape(*x.shape[:lead], math.prod(positions), -1)
    if not _tree.is_complex(x):
        return flat
    return jnp.concatenate([flat.real, flat.imag], axis=-1)


def _positions_back(
    y: Array,
    lead: int,
    common: Sequence[int],
    like: Inlet | Outlet,
) -> Array:
    """The inverse of `_positions_first` for a value of the form of an inlet or outlet."""
    if _tree.is_complex(like):
        real, imaginary = jnp.split(y, 2, axis=-1)
        y = lax.complex(real, imaginary)
    axes = range(len(like.shape))
    order = [*common, *(axis for axis in axes if axis not in common)]
    lengths = [like.shape[axis] for axis in order]
    moved = y.reshape(*y.shape[:lead], *lengths)
    # where each axis of the value stands now
    back = [lead + order.index(axis) for axis in axes]
    return jnp.transpose(moved, [*range(lead), *back])


def corrected(
    routes: Routes,
    errors: Sequence[Array],
    noise: Sequence[Array],
    slopes: Sequence[Array],
) -> list[Array]:
    """Errors whose mean over the noise is exact, whatever the maps foresee: ê + (c - ĉ) u.

    Args:
        routes: the ways of the errors.
        errors: what the maps foresee at each inlet, ê.
        noise: what entered there, u, [k, *examples, *shape].
        slopes: the tangents of the losses along it, [k, *examples, *shape].
    """
    if not routes.inlets:
        return []
    lead = 1 + routes.num_lead
    num_examples = routes.sites.num_examples or 1
    of_losses = [_sum_behind(c, lead) for c in slopes]
    left = _tree.added(of_losses) / num_examples  # the objective is the examples' mean
    shared = jnp.zeros(left.shape[:1], left.dtype)  # [k]
    for inlet, error, u in zip(routes.inlets, errors, noise, strict=True):
        # Re(error · u) is the change of the loss, for gradients of complex values too.
        foreseen = jnp.real(error[None] * u).astype(left.dtype)
        if _is_own(routes, inlet):
            left = left - _sum_behind(foreseen, lead)
        else:
            shared = shared + _sum_behind(foreseen, 1)

    # What all examples share moves the sum of their losses, and each loss by a part of it.
    total = _sum_behind(left, 1) - shared
    if routes.num_lead:
        left = left - shared[:, None] / num_examples
    found: list[Array] = []
    for inlet, error, u in zip(routes.inlets, errors, noise, strict=True):
        weights = left if _is_own(routes, inlet) else total
        missing = [1] * (u.ndim - weights.ndim)
        weights = weights.reshape(*weights.shape, *missing).astype(u.real.dtype)
        correction = jnp.mean(weights * u.conj(), axis=0)
        found.append(error + correction.astype(error.dtype))
    return found


def _is_own(routes: Routes, inlet: Inlet) -> bool:
    """Whether each example has a value of its own, and a noise."""
    return inlet.mapped and routes.num_lead > 0


def _sum_behind(x: Array, lead: int) -> Array:
    """Sums over all axes but the leading ones, in at least float32."""
    wide = x.astype(_tree.accumulation_dtype(x.dtype))
    axes = range(lead, x.ndim)
    return jnp.sum(wide, axis=tuple(axes))


def residuals(
    routes: Routes,
    maps: Sequence[Array],
    noise: Sequence[Array],
    tangents: Sequence[Array],
) -> list[Array]:
    """What the maps did not foresee of the outlets' tangents.

    R = ė - Σ u Mᵀ over the inlets that hear the outlet.

    Args:
        routes: the ways of the errors.
        maps: one an inlet.
        noise: what entered at each inlet, [k, *examples, *shape].
        tangents: the outlets' tangents ė, [k, *examples, *shape].
    """
    lead = 1 + routes.num_lead
    left = list(tangents)
    for inlet, through, u in zip(routes.inlets, maps, noise, strict=True):
        flat = _noise_by_position(routes, inlet, u)
        foreseen = flat @ through.T.astype(flat.dtype)  # [k, *examples, positions, e]
        start = 0
        sizes = routes.heard_sizes(inlet)
        for number, axes, size in zip(
            inlet.heard, inlet.heard_axes, sizes, strict=True
        ):
            part = foreseen[..., start : start + size]
            outlet = routes.outlets[number]
            left[number] = left[number] - _positions_back(part, lead, axes, outlet)
            start += size
    return left


def _noise_by_position(
    routes: Routes,
    inlet: Inlet,
    noise: Array,
) -> Array:
    """Noise as [k, *examples, common positions, h]; one example where all share it."""
    if routes.num_lead and not inlet.mapped:
        noise = noise[:, None]
    lead = 1 + routes.num_lead
    return _positions_first(noise, lead, inlet.own_axes)


def products(
    routes: Routes,
    noise: Sequence[Array],
    tangents: Sequence[Array],
    over: _mesh.Axes,
) -> list[Array]:
    """For each inlet the mean of tangents ⊗ noise, [e, h].

    The mean is over noises, examples and common positions, and over the given mesh axes.

    Args:
        routes: the ways of the errors.
        noise: what entered at each inlet, [k, *examples, *shape].
        tangents: of each outlet, [k, *examples, *shape].
        over: the mesh axes that the examples are split over.
    """
    found: list[Array] = []
    for inlet, u in zip(routes.inlets, noise, strict=True):
        if inlet.heard:
            mean = _mean_product(routes, inlet, u, tangents)
            found.append(_mesh.mean(mean, over))
        else:
            found.append(jnp.zeros((0, inlet.size)))
    return found


def _mean_product(
    routes: Routes,
    inlet: Inlet,
    noise: Array,
    tangents: Sequence[Array],
) -> Array:
    lead = 1 + routes.num_lead
    flat = _noise_by_position(routes, inlet, noise)
    heard = [tangents[number] for number in inlet.heard]
    moved = _heard_by_position(inlet, heard, lead)
    if routes.num_lead and not inlet.mapped:  # all examples have one noise
        moved = jnp.mean(moved, axis=1, keepdims=True)
    dtype = _tree.accumulation_dtype(_tree.promoted(moved.dtype, flat.dtype))
    moved = moved.astype(dtype).reshape(-1, moved.shape[-1])
    flat = flat.astype(dtype).reshape(-1, flat.shape[-1])
    return moved.T @ flat / len(flat)


def rates(
    routes: Routes,
    num_tangents: int,
    num_devices: int,
) -> list[float]:
    """The rate 0.1 / (1 + D/N) of each map.

    N is the number of samples in the mean: examples, common positions and noises. D is the number
    of noise coordinates that one outlet's tangent is foreseen from. Least mean squares with rate η
    converge for η (1 + D/N) < 2.
    """
    coordinates = [0] * len(routes.outlets)
    for inlet in routes.inlets:
        for number in inlet.heard:
            coordinates[number] += inlet.size

    found: list[float] = []
    for inlet in routes.inlets:
        num_samples = num_tangents * inlet.num_positions
        if _is_own(routes, inlet):
            num_samples *= (routes.sites.num_examples or 1) * num_devices
        most = max((coordinates[number] for number in inlet.heard), default=0)
        found.append(0.1 / (1 + most / num_samples))
    return found
