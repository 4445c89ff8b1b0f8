"""Contrastive losses between two views: InfoNCE and NT-Xent, with negatives from all devices.

van den Oord, Li, Vinyals, "Representation Learning with Contrastive Predictive Coding", arXiv
1807.03748; Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual
Representations", arXiv 2002.05709.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax.losses.cross_entropy import at_least_float32

# The least squared length that is scaled to 1: a row of zeros stays one, with a finite derivative.
_SHORTEST = 1e-12


def info_nce(
    queries: Any,
    keys: Any,
    temperature: Any = 0.5,
    *,
    axis_name: Any = None,
    stop_gradient: bool = True,
) -> Array:
    """Tell each query's own key from all others: -log exp(s_ii/τ) / Σ_j exp(s_ij/τ).

    Here s is the cosine similarity.

    Args:
        queries: [N, K], floating.
        keys: [N, K]; key i belongs to query i, and the others are its negatives.
        temperature: τ.
        axis_name: the mesh axis, or axes, of `jax.shard_map` over which examples are spread: keys
            of all devices are negatives then.
        stop_gradient: whether the keys are constants.

    Returns:
        The losses [N], in at least float32; inside `shard_map` those of this device's queries.

    Raises:
        ValueError: when the shapes do not fit.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from forwax.losses import info_nce
        >>> [f"{x:.3f}" for x in jax.jit(info_nce)(jnp.eye(2), jnp.eye(2))]
        ['0.127', '0.127']
    """
    queries, keys = _pair("info_nce", queries, keys)
    queries = normalized(queries)
    keys = keys_of(keys, stop_gradient)
    positive = jnp.sum(queries * keys, axis=-1) / temperature
    all_keys = (
        keys if axis_name is None else lax.all_gather(keys, axis_name, tiled=True)
    )
    # [N, all devices' N]
    similarities = queries @ all_keys.T / temperature
    return jax.nn.logsumexp(similarities, axis=-1) - positive


def nt_xent(
    x: Any,
    y: Any,
    temperature: Any = 0.5,
    *,
    axis_name: Any = None,
    stop_gradient: bool = True,
) -> Array:
    """Tell an example's other view from all views of all others.

    This is the normalised, temperature-scaled cross-entropy.

    Every view of every example is a query once; the same example's other view is its positive, all
    views but itself are the choice: -log exp(s_qp/τ) / Σ_{j≠q} exp(s_qj/τ), s the cosine
    similarity.

    Args:
        x: one view of each example [N, K], floating.
        y: the other view [N, K].
        temperature: τ.
        axis_name: the mesh axis, or axes, of `jax.shard_map` over which examples are spread: views
            on all devices are negatives then.
        stop_gradient: whether views are constants where they are keys, not queries. Ren et al. 2023
            (arXiv 2210.03310) found that forward gradients do not train without.

    Returns:
        The losses [2N], of x and then of y, in at least float32.

    Raises:
        ValueError: when the shapes do not fit.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from forwax.losses import nt_xent
        >>> [f"{x:.3f}" for x in jax.jit(nt_xent)(jnp.eye(2), jnp.eye(2))]
        ['0.240', '0.240', '0.240', '0.240']
    """
    x, y = _pair("nt_xent", x, y)
    views = jnp.concatenate([x, y])
    return nt_xent_of(views, keys_of(views, stop_gradient), temperature, axis_name)


def nt_xent_of_view(
    query: Any,
    index: Any,
    views: Any,
    temperature: Any = 0.5,
) -> Array:
    """The NT-Xent loss of one view, for a loss of one example under `in_axes` or `jax.vmap`.

    Args:
        query: one view's vector [K], floating.
        index: its row among the views, an integer.
        views: all vectors [2N, K], first those of one view of each example, then those of the
            other; constants here.
        temperature: τ.

    Returns:
        The loss [], in at least float32.

    Raises:
        ValueError: when the shapes do not fit.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from forwax.losses import nt_xent_of_view
        >>> views = jnp.concatenate([jnp.eye(2), jnp.eye(2)])
        >>> f"{jax.jit(nt_xent_of_view)(views[3], 3, views):.3f}"
        '0.240'
    """
    query = at_least_float32(query)
    keys = keys_of(at_least_float32(views))
    if keys.ndim != 2 or len(keys) % 2 or query.shape != keys.shape[1:]:
        raise ValueError(
            f"nt_xent_of_view: expected a query [K] and views [2N, K], got shapes {query.shape} "
            f"and {keys.shape}."
        )
    num_views = len(keys)
    rows = jnp.arange(num_views)
    similarities = keys @ normalized(query) / temperature
    # The other view of the same example is half of all rows away.
    is_other_view = rows == (index + num_views // 2) % num_views
    positive = jnp.sum(jnp.where(is_other_view, similarities, 0))
    return jax.nn.logsumexp(jnp.where(rows == index, -jnp.inf, similarities)) - positive


def keys_of(views: Array, stop_gradient: bool = True) -> Array:
    """What queries are compared with: unit rows, as constants by default."""
    keys = normalized(views)
    return lax.stop_gradient(keys) if stop_gradient else keys


def nt_xent_of(
    views: Array,
    keys: Array,
    temperature: Any,
    axis_name: Any,
) -> Array:
    """The losses [2N] of views [2N, K], of x and then of y, against this device's keys [2N, K]."""
    queries = normalized(views)
    n = len(views) // 2
    positive = jnp.sum(queries * jnp.roll(keys, n, axis=0), axis=-1) / temperature
    # [2, N, K]: both views of this device's examples, and then of all devices'
    pairs = keys.reshape(2, n, -1)
    first: Any = 0
    if axis_name is not None:
        pairs = lax.all_gather(pairs, axis_name, axis=1, tiled=True)
        first = n * lax.axis_index(axis_name)
    total = pairs.shape[1]
    own_row = first + jnp.concatenate([jnp.arange(n), total + jnp.arange(n)])
    is_itself = own_row[:, None] == jnp.arange(2 * total)[None, :]
    similarities = queries @ pairs.reshape(2 * total, -1).T / temperature
    logits = jnp.where(is_itself, -jnp.inf, similarities)
    return jax.nn.logsumexp(logits, axis=-1) - positive


def normalized(x: Array) -> Array:
    """Rows of length one; those shorter than 1e-6 stay shorter."""
    squares = jnp.sum(x**2, axis=-1, keepdims=True)
    return x * lax.rsqrt(jnp.maximum(squares, _SHORTEST))


def _pair(name: str, x: Any, y: Any) -> tuple[Array, Array]:
    x = at_least_float32(x)
    y = at_least_float32(y)
    if x.shape != y.shape or x.ndim != 2:
        raise ValueError(
            f"{name}: expected two arrays of one shape [N, K], got shapes {x.shape} and {y.shape}."
        )
    return x, y
