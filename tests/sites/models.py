"""A Vision Transformer, an MLP-Mixer and a transformer that scans over its layers."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from sites.interop import Model, wave
from sites.programs import normal

Params = dict


def dense(seed: int, fan_in: int, fan_out: int) -> Params:
    return {
        "w": normal(seed, fan_in, fan_out) / np.float32(fan_in) ** 0.5,
        "b": 0.1 * normal(seed + 1, fan_out),
    }


def norm(width: int) -> Params:
    return {"gain": 1 + 0.1 * normal(99, width), "bias": 0.1 * normal(98, width)}


def apply(p: Params, x: Array) -> Array:
    return x @ p["w"] + p["b"]


def layer_norm(p: Params, x: Array) -> Array:
    centred = x - jnp.mean(x, -1, keepdims=True)
    return (
        centred * lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-6) * p["gain"]
        + p["bias"]
    )


def mlp(p: Params, x: Array) -> Array:
    return apply(p["down"], jax.nn.gelu(apply(p["up"], x)))


def mlp_params(seed: int, width: int, hidden: int) -> Params:
    return {"up": dense(seed, width, hidden), "down": dense(seed + 2, hidden, width)}


def patches(image: Array, size: int) -> Array:
    """[height, width, channels] to [patches, size² channels]."""
    height, width, channels = image.shape
    grid = image.reshape(height // size, size, width // size, size, channels)
    return jnp.moveaxis(grid, 2, 1).reshape(-1, size * size * channels)


def attention(p: Params, x: Array, heads: int, mask: Array | None = None) -> Array:
    q, k, v = (
        y.reshape(x.shape[0], heads, -1)
        for y in jnp.split(apply(p["qkv"], x), 3, axis=-1)
    )
    scores = jnp.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    weights = jax.nn.softmax(scores if mask is None else jnp.where(mask, scores, -1e9))
    return apply(
        p["out"], jnp.einsum("hqk,khd->qhd", weights, v).reshape(x.shape[0], -1)
    )


def block_params(seed: int, width: int) -> Params:
    return {
        "norm1": norm(width),
        "attention": {
            "qkv": dense(seed, width, 3 * width),
            "out": dense(seed + 2, width, width),
        },
        "norm2": norm(width),
        "mlp": mlp_params(seed + 4, width, width),
    }


def block(p: Params, x: Array, heads: int, mask: Array | None = None) -> Array:
    x = x + attention(p["attention"], layer_norm(p["norm1"], x), heads, mask)
    return x + mlp(p["mlp"], layer_norm(p["norm2"], x))


def vision_transformer() -> Model:
    """A class token, learnt positions, one pre-norm block of two heads, and an MLP head."""
    width = 4
    params = {
        "embed": dense(0, 4, width),
        "token": normal(2, 1, width),
        "position": 0.1 * normal(3, 3, width),
        "blocks": [block_params(10, width)],
        "norm": norm(width),
        "head": {"hidden": dense(30, width, 3), "out": dense(32, 3, 2)},
    }

    def loss(p: Params, image: Array) -> Array:
        x = (
            jnp.concatenate([p["token"], apply(p["embed"], patches(image, 2))])
            + p["position"]
        )
        for one in p["blocks"]:
            x = block(one, x, heads=2)
        return wave(
            apply(
                p["head"]["out"],
                jnp.tanh(apply(p["head"]["hidden"], layer_norm(p["norm"], x)[0])),
            )
        )

    return Model(loss, params, (normal(40, 2, 4, 2, 1),))


def mlp_mixer() -> Model:
    """Mixing over the patches and over the channels, and a head on the mean patch."""
    width, count = 3, 2
    params = {
        "embed": dense(0, 4, width),
        "blocks": [
            {
                "norm1": norm(width),
                "tokens": mlp_params(5, count, 3),
                "norm2": norm(width),
                "mlp": mlp_params(9, 3, 3),
            }
        ],
        "norm": norm(width),
        "head": dense(20, width, 2),
    }

    def loss(p: Params, image: Array) -> Array:
        x = apply(p["embed"], patches(image, 2))
        for one in p["blocks"]:
            x = x + mlp(one["tokens"], layer_norm(one["norm1"], x).T).T
            x = x + mlp(one["mlp"], layer_norm(one["norm2"], x))
        return wave(apply(p["head"], jnp.mean(layer_norm(p["norm"], x), axis=0)))

    return Model(loss, params, (normal(30, 2, 4, 2, 1),))


def scanned_transformer() -> Model:
    """A causal language model.

    Stacked layers under `scan` and `checkpoint`, one table for input and output.
    """
    width, layers, length = 2, 2, 3
    stacked = jax.tree.map(
        lambda *leaves: np.stack(leaves),
        *(block_params(20 * i, width) for i in range(layers)),
    )
    params = {
        "table": normal(60, 4, width),
        "position": 0.1 * normal(61, length, width),
        "layers": stacked,
    }

    def loss(p: Params, tokens: Array) -> Array:
        mask = jnp.tri(length, dtype=bool)

        @jax.checkpoint
        def layer(x: Array, p: Params) -> tuple[Array, None]:
            return block(p, x, heads=1, mask=mask), None

        x, _ = lax.scan(layer, p["table"][tokens[:-1]] + p["position"], p["layers"])
        logits = jax.nn.log_softmax(x @ p["table"].T)
        return -jnp.sum(jnp.take_along_axis(logits, tokens[1:, None], axis=-1))

    return Model(loss, params, (np.array([[0, 3, 1, 2], [2, 2, 0, 1]]),))
