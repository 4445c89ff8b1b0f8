"""The scales with which sites that share slopes disturb one another least.

The noise's second moment is Σ_st Q_st σ_t² / σ_s², with Q_st the part of the noise at t that s
hears. It is convex in log σ, and least where row and column of each site have one sum: a balanced
matrix (Osborne 1960).
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax import _mesh, _tree
from forwax._programs.evaluate import Values
from forwax._pushforward import is_staged
from forwax._sites.model import Pass, Sites
from forwax._sites.passes import keep
from forwax._sites.scales import scaled

_MOST = 1e4

Errors: TypeAlias = Callable[[Pass, Sequence[Array]], Values]
"""From a forward pass and the noises that its slopes shall multiply to the sites' errors."""


def moments(
    sites: Sites,
    draw: Callable[[Array], list[Array]],
    errors: Errors,
    keys: Array,
) -> tuple[Array, Array]:
    """For each noisy site the second moments [num sites] of what it adds to, and of its noise.

    Row s is E|what site s adds to the estimate|², column s is E|what the noise of site s adds at
    all sites|². Slopes multiply a second noise, independent of the one that made them, so that no
    product of two sites' terms is left on average.

    Args:
        sites: the problem's sites.
        draw: takes a key to one noise [1, ...] for each noisy site.
        errors: the sites' errors.
        keys: PRNG keys; the result is the mean over them.
    """
    count = len(sites.noisy)
    variables = [site.variable for site in sites.noisy]

    def second_moment(records: Values, at: Values) -> Array:
        grads = keep.assemble(sites, records, at)
        square = _tree.inner(grads, grads)
        return _mesh.total(square, _mesh.axes(square))

    def of_site(index: Array) -> tuple[Array, Array]:
        is_site = jnp.arange(count) == index % count
        first, second = jax.random.split(keys[index // count])
        noise, other = draw(first), draw(second)
        out = keep.push(sites, noise, 1)
        alone: list[Array] = []
        for u, is_one in zip(noise, is_site, strict=True):
            alone.append(scaled(u, is_one))
        from_site = keep.push(sites, alone, 1)
        at_site: Values = {}
        for v, x in errors(out, other).items():
            at_site[v] = scaled(x, is_site[variables.index(v)])
        row = second_moment(out.records, at_site)
        return row, second_moment(out.records, errors(from_site, other))

    def of_draws(found: Array) -> Array:
        """The mean over draws, [num sites]."""
        return jnp.mean(found.reshape(-1, count), 0)

    if count == 0:
        return jnp.zeros(0), jnp.zeros(0)
    indices = jnp.arange(keys.shape[0] * count)
    if is_staged():
        found = lax.map(of_site, indices)
    else:  # XLA on CPU runs convolutions inside a loop many times slower
        step = jax.jit(of_site)
        rows, columns = zip(*map(step, indices), strict=True)
        found = (jnp.stack(rows), jnp.stack(columns))
    of_rows, of_columns = found
    return of_draws(of_rows), of_draws(of_columns)


def balanced(scales: Array, rows: Array, columns: Array) -> Array:
    """σ_s² √(row / column), of geometric mean 1; sites without a moment keep to the mean.

    With common slopes rows are |J_s|² Σ|δ|², columns |δ_s|² Σ|J|²: one step gives |J_s| / |δ_s|.
    """
    ratio = rows / columns
    is_known = (rows > 0) & (columns > 0) & jnp.isfinite(ratio)
    # The step is a root of σ², and logs are those of σ: a quarter.
    logs = jnp.log(scales) + jnp.log(jnp.where(is_known, ratio, 1)) / 4
    num_known = jnp.sum(is_known.astype(logs.dtype))
    mean = jnp.sum(jnp.where(is_known, logs, 0)) / jnp.maximum(num_known, 1)
    logs = jnp.where(is_known, logs - mean, 0)
    return jnp.clip(jnp.exp(logs), 1 / _MOST, _MOST)
