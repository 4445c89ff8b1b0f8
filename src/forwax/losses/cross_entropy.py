"""The softmax cross-entropy, of class numbers or of distributions."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from forwax._tree import promoted


def softmax_cross_entropy(logits: Any, labels: Any) -> Array:
    """The cross-entropy -Σ_k y_k log softmax(z)_k of each row of logits z.

    Args:
        logits: [..., K], floating.
        labels: class numbers [...], integers in [0, K), or y [..., K], floating: one-hot, smoothed
            or any weights. A class number outside [0, K) gives loss 0. A class of weight 0 may have
            the logit -inf.

    Returns:
        The losses [...], in at least float32.

    Raises:
        TypeError: when the labels are neither integers nor floating.
        ValueError: when the shapes do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from forwax.losses import softmax_cross_entropy
        >>> logits = jnp.array([[0.0, 0.0], [3.0, 0.0]])
        >>> [f"{x:.3f}" for x in softmax_cross_entropy(logits, jnp.array([1, 0]))]
        ['0.693', '0.049']
    """
    logits = at_least_float32(logits)
    targets = as_targets("softmax_cross_entropy", labels, logits.shape)
    weights = targets.astype(logits.dtype)
    return -jnp.sum(weights * log_probabilities(logits, targets), axis=-1)


def log_probabilities(logits: Array, targets: Array) -> Array:
    """The logarithms of softmax(logits), finite for a class of weight 0, so that 0 log 0 = 0."""
    logs = jax.nn.log_softmax(logits)
    # 0 · -inf would be NaN.
    least = jnp.finfo(logs.dtype).min
    return jnp.where(targets == 0, jnp.maximum(logs, least), logs)


def as_targets(name: str, labels: Any, shape: tuple[int, ...]) -> Array:
    """Labels as rows of weights of the shape of the logits; `name` stands in errors."""
    labels = jnp.asarray(labels)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        _check_shape(name, "class numbers", labels.shape, shape[:-1])
        # A class number outside [0, K) gives a row of zeros, and loss 0.
        return jax.nn.one_hot(labels, shape[-1])
    if not jnp.issubdtype(labels.dtype, jnp.floating):
        raise TypeError(
            f"{name}: expected labels to be class numbers (integers) or one-hot (floating), got "
            f"{labels.dtype}."
        )
    _check_shape(name, "one-hot labels", labels.shape, shape)
    return labels


def at_least_float32(x: Any) -> Array:
    """An array in its own precision or, if that is less, in float32."""
    x = jnp.asarray(x)
    return x.astype(promoted(x.dtype, jnp.float32))


def _check_shape(
    name: str,
    kind: str,
    got: tuple[int, ...],
    expected: tuple[int, ...],
) -> None:
    if got != expected:
        raise ValueError(
            f"{name}: expected {kind} of shape {expected}, got {got}. Class numbers are integers "
            "[...], one-hot labels are floating [..., K]."
        )
