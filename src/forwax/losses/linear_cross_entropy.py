"""The softmax cross-entropy of a linear head, a few positions at a time."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax._tree import promoted

_NOBODY = -1
"""A class number that counts nothing."""

CLASSES_AT_A_TIME = 1024
"""How many rows of a packed head are unpacked at a time."""


def linear_cross_entropy(
    hidden: Any,
    weights: Any,
    labels: Any,
    *,
    chunk_size: int = 64,
    mask: Any = None,
) -> Array:
    """The cross-entropy of logits hidden @ weights.T, of which one chunk is held at a time.

    It is `softmax_cross_entropy(hidden @ weights.T, labels)`, -log softmax(z)_y with z = W h, for
    heads of many words: a `lax.scan` over positions holds logits [chunk_size, K] in place of [...,
    K], in forward mode as many for each tangent. In reverse mode each chunk's logits are computed
    again (Chen et al. 2016, arXiv 1604.06174).

    Args:
        hidden: [..., d], floating.
        weights: [K, d], floating; one row for each class. Or such a matrix as `forwax.lm.Packed`,
            which is not differentiated: a pytree of arrays with classes in front, whose method
            `dense` gives the rows in a dtype. Some classes are unpacked at a time, and a chunk's
            logits are held for these alone.
        labels: class numbers [...], integers in [0, K); one outside gives loss 0.
        chunk_size: how many positions are evaluated at a time.
        mask: booleans [...]; where False the loss is 0. None takes all positions. For the mean over
            those that count, divide the sum by `mask.sum()`.

    Returns:
        The losses [...], in at least float32.

    Raises:
        TypeError: when labels are no integers, or a mask no booleans.
        ValueError: when the shapes do not fit, or the size of a chunk is not a positive integer.

    Example:
        >>> import jax.numpy as jnp
        >>> from forwax.losses import linear_cross_entropy
        >>> hidden, weights = jnp.ones((2, 3)), jnp.zeros((4, 3))
        >>> [f"{x:.3f}" for x in linear_cross_entropy(hidden, weights, jnp.array([0, 3]))]
        ['1.386', '1.386']
    """
    hidden = jnp.asarray(hidden)
    packed = hasattr(weights, "dense")
    weights = weights if packed else jnp.asarray(weights)
    labels = jnp.asarray(labels)
    _check(hidden, weights, labels, chunk_size)
    lead = hidden.shape[:-1]
    if mask is not None:
        labels = jnp.where(_checked_mask(mask, lead), labels, _NOBODY)
    num_rows = math.prod(lead)
    num_chunks = max(1, -(-num_rows // chunk_size))
    padding = num_chunks * chunk_size - num_rows
    if num_chunks == 1:  # nothing to cut, and nothing to fill
        chunk_size = num_rows
        padding = 0
    rows = hidden.reshape(num_rows, hidden.shape[-1])
    rows = jnp.pad(rows, ((0, padding), (0, 0)))
    numbers = jnp.pad(
        labels.reshape(num_rows),
        (0, padding),
        constant_values=_NOBODY,
    )
    dtypes = () if packed else (weights.dtype,)
    dtype = promoted(hidden.dtype, jnp.float32, *dtypes)

    @jax.checkpoint
    def chunk(rows: Array, numbers: Array) -> Array:
        if packed:
            return _losses_of_packed(rows.astype(dtype), weights, numbers)
        # [chunk, d] by [K, d], added up in at least float32
        logits = jnp.einsum("nd,kd->nk", rows, weights, preferred_element_type=dtype)
        return _losses(logits, numbers)

    if num_chunks == 1:
        losses = chunk(rows, numbers)
    else:
        cut = (
            rows.reshape(num_chunks, chunk_size, rows.shape[-1]),
            numbers.reshape(num_chunks, chunk_size),
        )
        _, losses = lax.scan(lambda _, own: (None, chunk(*own)), None, cut)
    return losses.reshape(-1)[:num_rows].reshape(lead)


@jax.custom_jvp
def _losses(logits: Array, numbers: Array) -> Array:
    """The losses [n] of logits [n, K] and class numbers [n]."""
    is_own = _is_own(logits, numbers)
    own = jnp.sum(jnp.where(is_own, logits, 0), axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - own
    return jnp.where(_counts(logits, numbers), losses, 0)


@_losses.defjvp
def _losses_jvp(
    primals: tuple[Array, Array],
    tangents: tuple[Array, Array],
) -> tuple[Array, Array]:
    """One sum over the logits' tangents, (softmax(z) - y) · ż: nothing else of their size."""
    logits, numbers = primals
    moved, _ = tangents
    errors = jax.nn.softmax(logits, axis=-1)
    errors = errors - _is_own(logits, numbers).astype(errors.dtype)
    counts = _counts(logits, numbers)[:, None]
    slopes = jnp.sum(jnp.where(counts, errors, 0) * moved, axis=-1)
    return _losses(logits, numbers), slopes


def _losses_of_packed(rows: Array, weights: Any, numbers: Array) -> Array:
    """The losses [n] of rows [n, d] and a packed matrix [K, d], some classes after the others."""
    num_classes = weights.shape[0]
    size = min(CLASSES_AT_A_TIME, num_classes)
    numbers = numbers.astype(jnp.int32)

    # Reverse mode would keep what is unpacked; so it unpacks it again.
    @jax.checkpoint
    def block(first: Array) -> tuple[Array, Array]:
        # The last block begins earlier, with classes that have had their turn.
        start = jnp.minimum(first, num_classes - size)
        take = lax.dynamic_slice_in_dim
        part = jax.tree.map(lambda x: take(x, start, size), weights)
        classes = start + jnp.arange(size)
        logits = rows @ part.dense(rows.dtype).T
        is_new = (classes >= first)[None]
        logits = jnp.where(is_new, logits, -jnp.inf)
        is_own = is_new & (classes[None] == numbers[:, None])
        own = jnp.sum(jnp.where(is_own, logits, 0), axis=-1)
        return jax.nn.logsumexp(logits, axis=-1), own

    # [blocks, n]
    sums, own = lax.map(block, jnp.arange(0, num_classes, size))
    losses = jax.nn.logsumexp(sums, axis=0) - jnp.sum(own, axis=0)
    counts = (numbers >= 0) & (numbers < num_classes)
    return jnp.where(counts, losses, 0)


def _is_own(logits: Array, numbers: Array) -> Array:
    """Whether a class is a row's own [n, K]."""
    classes = jnp.arange(logits.shape[-1], dtype=numbers.dtype)
    return classes[None] == numbers[:, None]


def _counts(logits: Array, numbers: Array) -> Array:
    """Whether a row has a class at all [n]."""
    return (numbers >= 0) & (numbers < logits.shape[-1])


def _check(hidden: Array, weights: Any, labels: Array, chunk_size: int) -> None:
    name = "linear_cross_entropy"
    size: Any = chunk_size
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(
            f"{name}: expected chunk_size to be a positive integer, got {chunk_size!r}."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"{name}: expected labels to be class numbers, integers, got {labels.dtype}. For "
            "distributions, which are as large as logits, use softmax_cross_entropy."
        )
    fits = hidden.ndim > 0 and len(weights.shape) == 2
    if not fits or weights.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{name}: expected hidden [..., d] and weights [K, d], one row for each class, got "
            f"{hidden.shape} and {weights.shape}."
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{name}: expected labels of shape {hidden.shape[:-1]}, one for each row of hidden, "
            f"got {labels.shape}."
        )


def _checked_mask(mask: Any, shape: tuple[int, ...]) -> Array:
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(
            f"linear_cross_entropy: expected a mask of booleans, got {mask.dtype}. Weigh the "
            "losses that it returns."
        )
    if mask.shape != shape:
        raise ValueError(
            f"linear_cross_entropy: expected a mask of shape {shape}, one entry for each row of "
            f"hidden, got {mask.shape}."
        )
    return mask
