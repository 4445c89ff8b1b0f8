"""The noise of all noisy sites at once: one direction of the whole batch, or one of each example."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _mesh, _tree
from forwax._tree import Spec
from forwax.sites.sites import Sites
from forwax.tangents import Tangents
from forwax.tangents._base import sampler, typed_key


def draw_noise(
    sites: Sites, tangents: Tangents, key: Array, num_tangents: int, *, own_slopes: bool = True
) -> list[Array]:
    """The noise [k, *spec] of all noisy sites.

    Args:
        sites: a program with its sites.
        tangents: the distribution.
        key: a PRNG key.
        num_tangents: the number k of directions.
        own_slopes: whether each example has slopes of its own.
    """
    axes = [site.axes for site in sites.noisy]
    if sites.num_examples is None or not _by_example(sites, tangents, own_slopes):
        return _draw(tangents, key, sites.specs(), axes, num_tangents)
    specs = [Spec(site.shape, site.dtype) for site in sites.noisy]
    keys = jax.random.split(typed_key(key), sites.num_examples)
    return jax.vmap(lambda key: _draw(tangents, key, specs, axes, num_tangents), out_axes=1)(keys)


def num_coordinates(sites: Sites, tangents: Tangents, *, own_slopes: bool = True) -> int:
    """The number n of real coordinates of one direction that `draw_noise` draws."""
    if _by_example(sites, tangents, own_slopes):
        return sum(site.size for site in sites.noisy)
    return _tree.num_coordinates(sites.specs())


def _by_example(sites: Sites, tangents: Tangents, own_slopes: bool) -> bool:
    """Whether each example draws a direction of its own.

    Where coordinates depend on one another, a slope must hear a whole direction for the tangents'
    law to hold.
    """
    own = own_slopes and all(site.mapped for site in sites.noisy)
    return own and sites.num_examples is not None and not tangents.coordinatewise


def _draw(
    tangents: Tangents,
    key: Array,
    specs: Sequence[Spec],
    axes: Sequence[_mesh.Axes],
    num_tangents: int,
) -> list[Array]:
    """Noise [k, *spec] for each spec, in one draw; those of one shape are stacked, which compiles faster."""
    if not specs:
        return []
    members: dict[Any, list[int]] = {}
    for i, (spec, over) in enumerate(zip(specs, axes, strict=True)):
        members.setdefault((spec.shape, spec.dtype, over), []).append(i)
    stacked = [
        _mesh.like((len(part), *shape), dtype, over)
        for (shape, dtype, over), part in members.items()
    ]
    drawn = sampler(tangents, key, stacked, num_tangents, hold=True)(jnp.arange(num_tangents))
    noise = {
        i: x[:, j]
        for x, part in zip(drawn, members.values(), strict=True)
        for j, i in enumerate(part)
    }
    return [noise[i] for i in range(len(specs))]
