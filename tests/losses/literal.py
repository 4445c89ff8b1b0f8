"""The fused losses by their literal definition.

Replicated features with `stop_gradient` on what belongs to others.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def replicated(x):
    """The features [N, P, G, G·C] that each patch and group sees, of x [N, P, G, C].

    Constants but for its own.
    """
    patches, groups, channels = x.shape[1:]
    own = jnp.eye(patches)[:, None, :, None] * jnp.eye(groups)[None, :, None, :]
    mask = own[None, :, :, :, :, None].astype(x.dtype)
    everything = x[:, None, None]
    seen = mask * everything + (1 - mask) * lax.stop_gradient(everything)
    return seen.mean(3).reshape(-1, patches, groups, groups * channels)


def linear(x, w, b):
    return replicated(x) @ w + b[None, None, None]


def cross_entropy(x, w, b, targets):
    return -jnp.sum(targets[:, None, None] * jax.nn.log_softmax(linear(x, w, b)), -1)


def unit(z):
    return z / jnp.linalg.norm(z, axis=-1, keepdims=True)


def nt_xent(x, y, w, b, temperature):
    n = len(x)
    queries = unit(jnp.concatenate([linear(x, w, b), linear(y, w, b)]))
    keys = lax.stop_gradient(queries[:, 0, 0])
    logits = queries @ keys.T / temperature
    itself = jnp.eye(2 * n, dtype=bool)[:, None, None]
    positive = jnp.roll(jnp.eye(2 * n, dtype=bool), n, 1)[:, None, None]
    chosen = jnp.sum(jnp.where(positive, logits, 0), -1)
    return jax.nn.logsumexp(jnp.where(itself, -jnp.inf, logits), -1) - chosen


def numpy_nt_xent(x, y, temperature):
    """The plain NT-Xent in float64, a loop over queries."""
    z = np.concatenate([x, y]).astype(np.float64)
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    n, losses = len(x), []
    for i, query in enumerate(z):
        s = z @ query / temperature
        losses.append(np.log(np.exp(np.delete(s, i)).sum()) - s[(i + n) % (2 * n)])
    return losses
