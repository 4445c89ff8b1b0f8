"""Programs in which a weight meets an array before it meets data. Each is a loss of one example."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sites.programs import N, Program, normal, squares

WIDE, SQUARE, STACKED = normal(10, 3, 4), normal(11, 4, 4), normal(14, 3, 4, 4)
VARIANCE = np.abs(normal(13, 4)) + np.float32(0.1)
WORDS = np.arange(2 * N, dtype=np.uint32).reshape(N, 2)  # one key an example
X = normal(5, N, 3)

MERGED: dict[str, Program] = {}


def merged(params, *data):
    """Register a loss under its function's name."""

    def register(loss):
        in_axes = (None, *[0] * len(data))
        MERGED[loss.__name__] = Program(loss, params, data, in_axes)
        return loss

    return register


def keep(words, *shape):
    return jax.random.bernoulli(jax.random.wrap_key_data(words), 0.5, shape)


LOW_RANK = {
    "a": normal(0, 3, 2),
    "b": normal(1, 2, 4),
    "c": normal(2, 4, 1),
    "d": normal(3, 1, 4),
    "o": normal(4, 4, 2),
}


@merged(LOW_RANK, X)
def low_rank(p, x):
    h = jnp.tanh(x @ (WIDE + p["a"] @ p["b"]))
    h = jnp.tanh(h @ (SQUARE + p["c"] @ p["d"]))
    return squares(h @ p["o"])


@merged(LOW_RANK, X)
def low_rank_beside(p, x):
    h = jnp.tanh(x @ WIDE + (x @ p["a"]) @ p["b"])
    h = jnp.tanh(h @ SQUARE + (h @ p["c"]) @ p["d"])
    return squares(h @ p["o"])


TWO = {"w": normal(0, 3, 4), "v": normal(1, 4, 4), "o": normal(4, 4, 2)}


@merged(TWO, X)
def masks(p, x):
    h = jnp.tanh(x @ jnp.where(WIDE > 0, p["w"], 0))
    return squares(jnp.tanh(h @ (p["v"] * np.sign(SQUARE))) @ p["o"])


@merged(TWO, X, np.sign(normal(6, N, 4, 4)).astype(np.int32))
def mapped_mask(p, x, mask):
    h = jnp.tanh(x @ p["w"])
    return squares(jnp.tanh((mask.astype(jnp.float32) * p["v"]) @ h) @ p["o"])


@merged(TWO, X, WORDS)
def drop_connect(p, x, words):
    h = jnp.tanh(x @ p["w"])
    kept = jnp.where(keep(words, 4, 4), p["v"] / 0.5, 0)
    return squares(jnp.tanh(h @ kept) @ p["o"])


BAYES = {
    "w": normal(0, 3, 4),
    "mean": normal(1, 4, 4),
    "spread": normal(2, 4, 4) - 1,
    "o": normal(3, 4, 2),
}


def drawn(p, words):
    eps = jax.random.normal(jax.random.wrap_key_data(words), (4, 4))
    return p["mean"] + jnp.exp(p["spread"]) * eps


@merged(BAYES, X, WORDS)
def bayes(p, x, words):
    h = jnp.tanh(x @ p["w"])
    return squares(jnp.tanh(h @ drawn(p, words) + p["w"][0]) @ p["o"])


@merged({name: BAYES[name] for name in ("w", "mean", "spread")}, X, WORDS)
def bayes_at_the_end(p, x, words):
    return squares(jnp.tanh(x @ p["w"]) @ drawn(p, words))


@merged(BAYES, X, WORDS)
def bayes_used_twice(p, x, words):
    w = drawn(p, words)
    return squares(jnp.tanh(jnp.tanh(jnp.tanh(x @ p["w"]) @ w) @ w.T) @ p["o"])


@merged({"w": TWO["w"], "e": STACKED, "o": TWO["o"]}, X, np.array([2, 1]))
def experts(p, x, i):
    return squares(jnp.tanh(p["e"][i] @ jnp.tanh(x @ p["w"])) @ p["o"])


@merged(
    {"u": normal(0, 3, 4), "v": normal(1, 3, 4)}, np.array([2, 1]), np.array([0, 1])
)
def factorisation(p, i, j):
    return squares(p["u"][i] @ p["v"][j])


@merged({"w": TWO["w"], "scale": normal(1, 4), "bias": normal(2, 4), "o": TWO["o"]}, X)
def batch_norm_in_evaluation(p, x):
    h = (x @ p["w"] - SQUARE[0]) * (p["scale"] * lax.rsqrt(VARIANCE)) + p["bias"]
    return squares(jnp.tanh(h) @ p["o"])


@merged({"v": TWO["w"], "g": normal(1, 4), "o": TWO["o"]}, X)
def weight_norm(p, x):
    w = p["g"][None] * p["v"] / jnp.linalg.norm(p["v"], axis=0, keepdims=True)
    return squares(jnp.tanh(x @ w) @ p["o"])


@merged(
    {
        "w": TWO["w"],
        "a": normal(1, 3, 4, 2),
        "b": normal(2, 3, 2, 4),
        "o": TWO["o"],
    },
    X,
)
def frozen_layers_in_a_scan(p, x):
    def layer(h, slices):
        frozen, a, b = slices
        return jnp.tanh(h @ (frozen + a @ b)), None

    h, _ = lax.scan(layer, jnp.tanh(x @ p["w"]), (STACKED, p["a"], p["b"]))
    return squares(h @ p["o"])


@merged(
    {
        "a": normal(0, 3, 2),
        "b": normal(1, 2, 4),
        "r": normal(2, 4, 4),
        "start": normal(3, 4),
        "o": TWO["o"],
    },
    normal(5, N, 2, 3),
    WORDS,
)
def merged_inside_a_recurrence(p, xs, words):
    kept = keep(words, 4, 4)

    def step(h, x):
        recurrent = jnp.where(kept, p["r"], 0)
        h = jnp.tanh(x @ (WIDE + p["a"] @ p["b"]) + h @ recurrent)
        return h, h

    return squares(lax.scan(step, p["start"], xs)[1] @ p["o"])


@merged({"w": TWO["w"], "r": TWO["v"], "o": TWO["o"]}, normal(5, N, 2, 3), WORDS)
def merged_before_a_recurrence(p, xs, words):
    kept = jnp.where(keep(words, 4, 4), p["r"], 0)
    step = lambda h, x: (jnp.tanh(x @ p["w"] + h @ kept), None)
    return squares(lax.scan(step, jnp.ones(4), xs)[0] @ p["o"])


@merged(TWO, X)
def half_stopped(p, x):
    w = lax.stop_gradient(p["w"]) * WIDE * p["w"]
    return squares(jnp.tanh(x @ w) @ (p["o"] * lax.stop_gradient(p["o"])))


@merged({"a": normal(0, 4, 2), "b": normal(1, 2, 4), "w": TWO["w"]}, X)
def tied_and_merged(p, x):
    w = SQUARE + p["a"] @ p["b"]
    return squares(jnp.tanh(jnp.tanh(jnp.tanh(x @ p["w"]) @ w) @ w.T) @ w)


@merged({"w": TWO["w"], "v": TWO["v"]}, X, np.array([0, 1]))
def merged_in_branches_and_by_a_while(p, x, which):
    branches = [lambda h: h @ (SQUARE * p["v"]), lambda h: h @ (SQUARE + p["v"])]
    h = lax.switch(which, branches, jnp.tanh(x @ p["w"]))
    again = lambda s: (s[0] + 1, s[1] * 0.5 + SQUARE)
    w = lax.while_loop(lambda s: s[0] < 2, again, (0, p["v"]))[1]
    return squares(jnp.tanh(h) @ w)
