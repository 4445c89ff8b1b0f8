"""From slopes and noises to errors: what a site's noise is multiplied by, and their sums."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _mesh, _tree
from forwax._programs.order import behind
from forwax._sites.credit import Credit
from forwax._sites.kinds import Kind
from forwax._sites.model import Site, Sites
from forwax._tree import Tree

_UNROLLED = 16


def behind_slopes(sites: Sites, slopes: Sequence[Array]) -> Sites:
    """The same sites, whose data wait for the slopes.

    Of equal data XLA would merge both evaluations and keep all values of the first.
    """
    total = jnp.zeros(())
    for x in slopes:
        of_all = _mesh.total(x, _mesh.axes(x))
        total += jnp.sum(of_all)
    mapped = tuple(behind(x, [total]) for x in sites.problem.mapped)
    # Frozen weights and masks would be copied; what is made of them alone may be kept.
    closed: list[Array] = []
    inputs = sites.level.program.inputs
    for x, variable in zip(sites.traced.closed, inputs, strict=False):
        if sites.kinds[variable] is Kind.CONSTANT:
            closed.append(x)
        else:
            closed.append(behind(x, [total]))
    problem = dataclasses.replace(sites.problem, mapped=mapped)
    traced = dataclasses.replace(sites.traced, closed=closed)
    return dataclasses.replace(sites, problem=problem, traced=traced)


def credited(site: Site, slopes: Sequence[Array], sites: Sites) -> Array:
    """The slopes of the losses that a site reaches.

    They are [k, examples] for an example's own noise, else [k].
    """
    num_examples = sites.num_examples
    reached = [x for i, x in enumerate(slopes) if site.reach >> i & 1]
    total = sum(reached[1:], start=reached[0])
    # One noise for all devices hears of all their losses.
    others = _mesh.axes(total) - site.axes
    total = _mesh.total(total, others)
    if num_examples is None:
        return total
    if site.mapped:
        return total / num_examples
    return jnp.mean(total, axis=1)


def told_apart(
    site: Site,
    site_credits: Sequence[Credit],
    products: Sequence[Array],
    sites: Sites,
    decay: Array | None,
) -> Array:
    """The slopes of a site's sources, summed over the axes along which its noise spreads."""
    lead = 1 if sites.num_examples is None or not site.mapped else 2
    total = jnp.zeros((1,) * (lead + len(site.shape)))
    for credit in site_credits:
        product = products[credit.source]
        if product.ndim - len(credit.shape) > lead:  # one noise for all examples
            product = jnp.sum(product, axis=1)
        total += credit.slopes(product, lead, site.shape, decay)
    # One noise for all devices hears of all their losses.
    others = _mesh.axes(total) - site.axes
    return _mesh.total(total, others)


def weighted(slopes: Array, noise: Array) -> Array:
    """Σ_j c_j conj(u_j), with a slope for each example where slopes are [k, examples]."""
    conjugate = jnp.conj(noise) if _tree.is_complex(noise) else noise
    wide = conjugate.astype(_tree.accumulation_dtype(noise.dtype))
    missing = noise.ndim - slopes.ndim
    shape = slopes.shape + (1,) * missing
    slopes = slopes.astype(wide.dtype)
    slopes = slopes.reshape(shape)
    num_tangents = noise.shape[0]
    if num_tangents > _UNROLLED:
        return jnp.sum(slopes * wide, axis=0)
    # Term by term: a sum over the leading axis of a product runs many times slower on CPU.
    total = slopes[0] * wide[0]
    for j in range(1, num_tangents):
        total = total + slopes[j] * wide[j]
    return total


def plus(total: Tree, weights: Array, gradients: Tree) -> Tree:
    """The total and the weighted sum of gradients [k, ...]."""

    def add(x: Array, gradients: Array) -> Array:
        return x + weighted(weights, jnp.conj(gradients)).astype(x.dtype)

    return jax.tree.map(add, total, gradients)
