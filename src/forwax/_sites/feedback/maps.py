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
    return [(sum(_heard_sizes(routes, i)), _size(i)) for i in routes.inlets]


def zeros(routes: Routes) -> tuple[Array, ...]:
    """A map of zeros for each inlet, in at least float32."""
    found: list[Array] = []
    for inlet, shape in zip(routes.inlets, map_shapes(routes), strict=True):
        dtype = _tree.accumulation_dtype(jnp.finfo(inlet.dtype).dtype)
        found.append(jnp.zeros(shape, dtype))
    return tuple(found)


def _size(inlet: Inlet) -> int:
    return _tree.num_coordinates(inlet.spec) // num_positions(inlet)


def num_positions(inlet: Inlet) -> int:
    """The number of positions that share an inlet's map."""
    return math.prod(inlet.shape[axis] for axis, _ in inlet.common)


def _heard_sizes(routes: Routes, inlet: Inlet) -> list[int]:
    """For each outlet that an inlet hears the coordinates without the common axes."""
    positions = num_positions(inlet)
    outlets = [routes.outlets[number] for number in inlet.heard]
    return [_tree.num_coordinates(outlet) // positions for outlet in outlets]


def sent(routes: Routes, maps: Sequence[Array], errors: Sequence[Array]) -> list[Array]:
    """Each inlet's error, the outlets' errors times its map.

    Args:
        routes: the ways of the errors.
        maps: one an inlet.
        errors: the exact error of each outlet, as `jax.grad` writes it.
    """
    return [
        _sent_to(routes, inlet, through, errors)
        for inlet, through in zip(routes.inlets, maps, strict=True)
    ]


def _sent_to(
    routes: Routes, inlet: Inlet, through: Array, errors: Sequence[Array]
) -> Array:
    lead = 0 if routes.sites.num_examples is None else 1
    if not inlet.heard:
        examples = (routes.sites.num_examples,) if lead and inlet.mapped else ()
        zeros = jnp.zeros((*examples, *inlet.shape), inlet.dtype)
        return _mesh.vary(zeros, inlet.axes)
    # [*examples, common positions, e]
    parts = [
        _positions_first(errors[number].conj(), lead, axes)
        for number, axes in _heard_axes(inlet)
    ]
    flat = jnp.concatenate(parts, axis=-1)
    error = flat @ through.astype(flat.dtype)
    if lead and not inlet.mapped:
        # One value for all examples has the sum of their errors.
        error = jnp.sum(error, axis=0)
        lead = 0
    own = [axis for axis, _ in inlet.common]
    value = _positions_back(error, lead, own, inlet)
    return value.conj().astype(inlet.dtype)


def _heard_axes(inlet: Inlet) -> list[tuple[int, list[int]]]:
    """The outlets that an inlet hears, each with its side of the common axes."""
    return [
        (number, [axes[place] for _, axes in inlet.common])
        for place, number in enumerate(inlet.heard)
    ]


def _positions_first(x: Array, lead: int, common: Sequence[int]) -> Array:
    """Values [*lead, *shape] as real coordinates [*lead, common positions, all others]."""
    front = [*range(lead), *(lead + axis for axis in common)]
    rest = [axis for axis in range(x.ndim) if axis not in front]
    moved = jnp.transpose(x, [*front, *rest])
    num_positions = math.prod(moved.shape[lead : len(front)])
    flat = moved.reshape(*x.shape[:lead], num_positions, -1)
    if not _tree.is_complex(x):
        return flat
    return jnp.concatenate([flat.real, flat.imag], axis=-1)


def _positions_back(
    y: Array, lead: int, common: Sequence[int], like: Inlet | Outlet
) -> Array:
    """The inverse of `_positions_first` for a value of the form of an inlet."""
    if _tree.is_complex(like):
        y = lax.complex(*jnp.split(y, 2, axis=-1))
    rest = [axis for axis in range(len(like.shape)) if axis not in common]
    order = [*common, *rest]
    moved = y.reshape(*y.shape[:lead], *(like.shape[axis] for axis in order))
    back = [lead + order.index(axis) for axis in range(len(like.shape))]
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
    lead = 1 if routes.sites.num_examples is None else 2
    left = _tree.added([_behind(c, lead) for c in slopes])  # [k, *examples]
    num_examples = routes.sites.num_examples or 1
    left = left / num_examples  # the objective is their mean
    shared = jnp.zeros(left.shape[:1], left.dtype)  # [k]
    for inlet, error, u in zip(routes.inlets, errors, noise, strict=True):
        # Gradients of complex values are conjugate: Re(error · u) is the change of the loss.
        product = jnp.real(error[None] * u).astype(left.dtype)
        if inlet.mapped or lead == 1:
            left = left - _behind(product, lead)
        else:
            shared = shared + _behind(product, 1)
    # What all examples share moves the sum of their losses.
    total = left - shared if lead == 1 else jnp.sum(left, axis=1) - shared
    found: list[Array] = []
    for inlet, error, u in zip(routes.inlets, errors, noise, strict=True):
        rest = left if inlet.mapped and lead == 2 else total
        if inlet.mapped and lead == 2:
            # One example's noise cannot tell what the noise that all share did to its loss.
            rest = rest - shared[..., None] / num_examples
        weights = rest.reshape(*rest.shape, *[1] * (u.ndim - rest.ndim))
        correction = jnp.mean(weights.astype(u.real.dtype) * u.conj(), axis=0)
        found.append(error + correction.astype(error.dtype))
    return found


def _behind(x: Array, lead: int) -> Array:
    """Sums over all axes but the leading ones, in at least float32."""
    wide = x.astype(_tree.accumulation_dtype(x.dtype))
    return jnp.sum(wide, axis=tuple(range(lead, x.ndim)))


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
    lead = 1 if routes.sites.num_examples is None else 2
    left = list(tangents)
    for inlet, through, u in zip(routes.inlets, maps, noise, strict=True):
        flat = _noise_by_position(routes, inlet, u)
        foreseen = flat @ through.T.astype(flat.dtype)
        start = 0
        sizes = _heard_sizes(routes, inlet)
        for (number, axes), size in zip(_heard_axes(inlet), sizes, strict=True):
            part = foreseen[..., start : start + size]
            outlet = routes.outlets[number]
            left[number] = left[number] - _positions_back(part, lead, axes, outlet)
            start += size
    return left


def _noise_by_position(routes: Routes, inlet: Inlet, noise: Array) -> Array:
    """Noise as [k, *examples, common positions, h]; one example where all share it."""
    if routes.sites.num_examples is not None and not inlet.mapped:
        noise = noise[:, None]
    lead = 1 if routes.sites.num_examples is None else 2
    own = [axis for axis, _ in inlet.common]
    return _positions_first(noise, lead, own)


def products(
    routes: Routes, noise: Sequence[Array], tangents: Sequence[Array], over: _mesh.Axes
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
    lead = 1 if routes.sites.num_examples is None else 2
    for inlet, u in zip(routes.inlets, noise, strict=True):
        flat = _noise_by_position(routes, inlet, u)
        parts = [
            _positions_first(tangents[number], lead, axes)
            for number, axes in _heard_axes(inlet)
        ]
        if not parts:
            found.append(jnp.zeros((0, flat.shape[-1])))
            continue
        heard = jnp.concatenate(parts, axis=-1)
        if lead == 2 and not inlet.mapped:  # all examples have one noise
            heard = jnp.mean(heard, axis=1, keepdims=True)
        dtype = _tree.accumulation_dtype(_tree.promoted(heard.dtype, flat.dtype))
        heard = heard.astype(dtype).reshape(-1, heard.shape[-1])
        flat = flat.astype(dtype).reshape(-1, flat.shape[-1])
        found.append(_mesh.mean(heard.T @ flat / len(flat), over))
    return found


def rates(routes: Routes, num_tangents: int, num_devices: int) -> list[float]:
    """The rate 0.1 / (1 + D/N) of each map.

    N is the number of samples in the mean: examples, common positions and noises. D is the number
    of noise coordinates that one outlet's tangent is foreseen from. Least mean squares with rate η
    converge for η (1 + D/N) < 2.
    """
    coordinates = [0] * len(routes.outlets)
    for inlet in routes.inlets:
        for number in inlet.heard:
            coordinates[number] += _size(inlet)
    found: list[float] = []
    for inlet in routes.inlets:
        samples = num_tangents * num_positions(inlet)
        if inlet.mapped:
            samples *= (routes.sites.num_examples or 1) * num_devices
        most = max((coordinates[number] for number in inlet.heard), default=0)
        found.append(0.1 / (1 + most / samples))
    return found
