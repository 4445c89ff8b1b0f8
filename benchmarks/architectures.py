"""Public architectures in plain JAX, small: the loss of one example, parameters, and a batch.

Written after nanoGPT, Llama, LRU (Orvieto et al. 2023), S5 (Smith et al. 2023), MobileNetV2,
ResNet, MLP-Mixer, ViT and Equinox's RNN example. Normalisations are Flax's, of one example each:
there is no batch normalisation. Texts are the characters of this project's licence, images
scikit-learn's digits.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from forwax.lab.data import load

Params = Any
CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A loss of one example with parameters and a batch.

    Attributes:
        loss: of parameters and one example.
        params: at the start.
        data: the batch.
    """

    loss: Callable[..., Array]
    params: Params
    data: tuple[Array, ...]

    @property
    def in_axes(self) -> tuple[int | None, ...]:
        """Which arguments are mapped."""
        return (None, *[0] * len(self.data))


class Init:
    """Draws parameters one after the other."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = np.random.default_rng(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Array:
        return jnp.asarray(scale * self.generator.normal(size=shape), jnp.float32)

    def dense(self, *shape: int) -> Array:
        """Variance 1 / fan-in; the last axis is that of outputs."""
        return self.normal(*shape, scale=float(np.prod(shape[:-1])) ** -0.5)

    def linear(self, inputs: int, outputs: int) -> Params:
        return {"w": self.dense(inputs, outputs), "b": jnp.zeros(outputs)}

    def norm(self, size: int) -> Params:
        return {"scale": jnp.ones(size), "bias": jnp.zeros(size)}


def linear(p: Params, x: Array) -> Array:
    return x @ p["w"] + p["b"]


def layer_norm(p: Params, x: Array, axes: int | tuple[int, ...] = -1) -> Array:
    """As Flax computes it: the gain meets 1 / σ before it meets the data."""
    mean = jnp.mean(x, axes, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axes, keepdims=True)
    factor = lax.rsqrt(variance + 1e-6) * p["scale"]
    return (x - mean) * factor + p["bias"]


def rms_norm(scale: Array, x: Array) -> Array:
    return x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * scale


def group_norm(p: Params, x: Array) -> Array:
    """One group: over positions and channels."""
    return layer_norm(p, x, (0, 1, 2))


def cross_entropy(logits: Array, labels: Array) -> Array:
    """The mean over positions."""
    logs = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(logs, labels[..., None], -1))


def text(length: int, batch: int) -> tuple[int, Array, Array]:
    """The number of characters, and sequences of them with what comes next."""
    licence = pathlib.Path(__file__).parent.parent / "LICENSE"
    characters = np.frombuffer(licence.read_bytes(), np.uint8)
    names, codes = np.unique(characters, return_inverse=True)
    starts = np.arange(batch) * (len(codes) // batch - 1)
    rows = np.stack([codes[s : s + length + 1] for s in starts])
    tokens = jnp.asarray(rows, jnp.int32)
    return len(names), tokens[:, :-1], tokens[:, 1:]


def images(batch: int) -> tuple[Array, Array]:
    """Digits of 16×16 pixels between -1 and 1."""
    data = load("digits")
    pixels = np.kron(data.train_images[:batch, :, :, 0], np.ones((2, 2)))[..., None]
    labels = jnp.asarray(data.train_labels[:batch], jnp.int32)
    return jnp.asarray(pixels / 8 - 1, jnp.float32), labels


def attention(q: Array, k: Array, v: Array, causal: bool) -> Array:
    """[positions, heads, size]."""
    scores = jnp.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5
    if causal:
        keep = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(keep[None], scores, -1e9)
    return jnp.einsum("hts,shd->thd", jax.nn.softmax(scores), v)


def heads(x: Array, count: int) -> Array:
    return x.reshape(x.shape[0], count, -1)


# --- sequences ---


def nano_gpt(width: int = 64, layers: int = 2, length: int = 64, batch: int = 8):
    names, tokens, targets = text(length, batch)
    init = Init()
    params = {
        "tokens": init.normal(names, width, scale=0.1),
        "positions": init.normal(length, width, scale=0.1),
        "blocks": [
            {
                "first": init.norm(width),
                "qkv": init.linear(width, 3 * width),
                "out": init.linear(width, width),
                "second": init.norm(width),
                "up": init.linear(width, 4 * width),
                "down": init.linear(4 * width, width),
            }
            for _ in range(layers)
        ],
        "norm": init.norm(width),
    }

    def loss(p: Params, tokens: Array, targets: Array) -> Array:
        x = p["tokens"][tokens] + p["positions"]
        for block in p["blocks"]:
            qkv = linear(block["qkv"], layer_norm(block["first"], x))
            q, k, v = (heads(part, 4) for part in jnp.split(qkv, 3, -1))
            mixed = attention(q, k, v, causal=True).reshape(x.shape)
            x = x + linear(block["out"], mixed)
            hidden = jax.nn.gelu(linear(block["up"], layer_norm(block["second"], x)))
            x = x + linear(block["down"], hidden)
        # The head is tied to the embedding.
        return cross_entropy(layer_norm(p["norm"], x) @ p["tokens"].T, targets)

    return Architecture(loss, params, (tokens, targets))


def rotated(x: Array) -> Array:
    """Rotary positions, pairs half a head apart as in Llama."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
    angles = jnp.arange(x.shape[0])[:, None] * frequencies[None]
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def rope_transformer(
    width: int = 64, layers: int = 2, length: int = 64, batch: int = 8
):
    names, tokens, targets = text(length, batch)
    init = Init()
    params = {
        "tokens": init.normal(names, width),
        "blocks": [
            {
                "first": jnp.ones(width),
                **{name: init.dense(width, width) for name in ("q", "k", "v", "o")},
                "second": jnp.ones(width),
                "gate": init.dense(width, 3 * width),
                "up": init.dense(width, 3 * width),
                "down": init.dense(3 * width, width),
            }
            for _ in range(layers)
        ],
        "norm": jnp.ones(width),
        "head": init.dense(width, names),
    }

    def loss(p: Params, tokens: Array, targets: Array) -> Array:
        x = p["tokens"][tokens]
        for block in p["blocks"]:
            h = rms_norm(block["first"], x)
            q, k, v = (heads(h @ block[name], 4) for name in ("q", "k", "v"))
            mixed = attention(rotated(q), rotated(k), v, causal=True)
            x = x + mixed.reshape(x.shape) @ block["o"]
            h = rms_norm(block["second"], x)
            hidden = jax.nn.silu(h @ block["gate"]) * (h @ block["up"])
            x = x + hidden @ block["down"]
        return cross_entropy(rms_norm(p["norm"], x) @ p["head"], targets)

    return Architecture(loss, params, (tokens, targets))


def linear_recurrence(decay: Array, inputs: Array) -> Array:
    """h_t = decay · h_{t-1} + input_t for complex [positions, states]."""

    def join(first: Any, second: Any) -> Any:
        return second[0] * first[0], second[0] * first[1] + second[1]

    decays = jnp.broadcast_to(decay, inputs.shape)
    return lax.associative_scan(join, (decays, inputs))[1]


def as_complex(p: Params) -> Array:
    return lax.complex(p["re"], p["im"])


def lru(
    width: int = 32, states: int = 32, layers: int = 2, length: int = 64, batch: int = 8
):
    names, tokens, targets = text(length, batch)
    init = Init()
    radius = init.generator.uniform(0.8, 0.99, states)
    angle = init.generator.uniform(0.01, 3.0, states)

    def pair(*shape: int) -> Params:
        return {"re": init.dense(*shape), "im": init.dense(*shape)}

    params = {
        "tokens": init.normal(names, width),
        "blocks": [
            {
                "norm": init.norm(width),
                "nu": jnp.asarray(np.log(-np.log(radius)), jnp.float32),
                "theta": jnp.asarray(np.log(angle), jnp.float32),
                "gamma": jnp.asarray(0.5 * np.log(1 - radius**2), jnp.float32),
                "in": pair(width, states),
                "out": pair(states, width),
                "skip": init.normal(width),
                "glu": init.linear(width, 2 * width),
            }
            for _ in range(layers)
        ],
        "head": init.linear(width, names),
    }

    def loss(p: Params, tokens: Array, targets: Array) -> Array:
        x = p["tokens"][tokens]
        for block in p["blocks"]:
            h = layer_norm(block["norm"], x)
            nu, theta = -jnp.exp(block["nu"]), jnp.exp(block["theta"])
            decay = jnp.exp(lax.complex(nu, theta))
            driven = h.astype(jnp.complex64) @ as_complex(block["in"])
            driven = driven * jnp.exp(block["gamma"]).astype(jnp.complex64)
            state = linear_recurrence(decay, driven)
            y = jnp.real(state @ as_complex(block["out"])) + h * block["skip"]
            a, b = jnp.split(linear(block["glu"], jax.nn.gelu(y)), 2, -1)
            x = x + a * jax.nn.sigmoid(b)
        return cross_entropy(linear(p["head"], x), targets)

    return Architecture(loss, params, (tokens, targets))


def s5(
    width: int = 32, states: int = 16, layers: int = 2, side: int = 16, batch: int = 16
):
    """Digits read pixel by pixel, in rows of two; the mean over positions is classified."""
    x, labels = images(batch)
    length = side * side // 2
    init = Init()

    def pair(*shape: int) -> Params:
        return {"re": init.dense(*shape), "im": init.dense(*shape)}

    params = {
        "encoder": init.linear(2, width),
        "blocks": [
            {
                "norm": init.norm(width),
                "lambda": {
                    "re": -0.5 * jnp.ones(states),
                    "im": jnp.pi * jnp.arange(states, dtype=jnp.float32),
                },
                "step": jnp.asarray(
                    init.generator.uniform(np.log(1e-3), np.log(0.1), states),
                    jnp.float32,
                ),
                "b": pair(width, states),
                "c": pair(states, width),
                "d": init.normal(width),
                "gate": init.linear(width, width),
            }
            for _ in range(layers)
        ],
        "head": init.linear(width, CLASSES),
    }

    def loss(p: Params, x: Array, label: Array) -> Array:
        x = linear(p["encoder"], x.reshape(length, 2))
        for block in p["blocks"]:
            h = layer_norm(block["norm"], x)
            rate = as_complex(block["lambda"])
            decay = jnp.exp(rate * jnp.exp(block["step"]).astype(jnp.complex64))
            b = as_complex(block["b"]) * ((decay - 1) / rate)
            state = linear_recurrence(decay, h.astype(jnp.complex64) @ b)
            y = 2 * jnp.real(state @ as_complex(block["c"])) + h * block["d"]
            y = jax.nn.gelu(y)
            x = x + y * jax.nn.sigmoid(linear(block["gate"], y))
        return cross_entropy(linear(p["head"], jnp.mean(x, 0)), label)

    return Architecture(loss, params, (x, labels))


def gru(hidden: int = 16, length: int = 16, batch: int = 32):
    """Equinox's RNN example: which way a spiral turns, from the last state of a GRU."""
    init = Init()
    t = np.linspace(0, 2 * np.pi, length)
    offset = init.generator.uniform(0, 2 * np.pi, (batch, 1))
    x = np.stack([np.sin(t + offset) / (1 + t), np.cos(t + offset) / (1 + t)], -1)
    labels = np.arange(batch) % 2
    x[labels == 0, :, 0] *= -1
    bound = hidden**-0.5

    def uniform(*shape: int) -> Array:
        return jnp.asarray(init.generator.uniform(-bound, bound, shape), jnp.float32)

    params = {
        "input": uniform(3 * hidden, 2),
        "state": uniform(3 * hidden, hidden),
        "bias": uniform(3 * hidden),
        "new": uniform(hidden),
        "out": uniform(hidden),
        "last": jnp.zeros(1),
    }

    def loss(p: Params, x: Array, label: Array) -> Array:
        def step(state: Array, x: Array) -> tuple[Array, None]:
            ir, iz, inew = jnp.split(p["input"] @ x + p["bias"], 3)
            hr, hz, hnew = jnp.split(p["state"] @ state, 3)
            reset, update = jax.nn.sigmoid(ir + hr), jax.nn.sigmoid(iz + hz)
            new = jnp.tanh(inew + reset * (hnew + p["new"]))
            return new + update * (state - new), None

        state, _ = lax.scan(step, jnp.zeros(hidden), x)
        logit = jnp.sum(p["out"] @ state + p["last"])
        return jax.nn.softplus(jnp.where(label == 1, -logit, logit))

    return Architecture(
        loss, params, (jnp.asarray(x, jnp.float32), jnp.asarray(labels, jnp.int32))
    )


# --- images ---


def conv(w: Array, x: Array, stride: int = 1, groups: int = 1) -> Array:
    return lax.conv_general_dilated(
        x[None],
        w,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )[0]


def mobile_net(channels: int = 16, expand: int = 4, blocks: int = 3, batch: int = 16):
    """Inverted residuals: widen, a convolution for each channel, narrow."""
    x, labels = images(batch)
    init = Init()
    wide = expand * channels
    params = {
        "stem": init.dense(3, 3, 1, channels),
        "blocks": [
            {
                "up": init.dense(1, 1, channels, wide),
                "first": init.norm(wide),
                "each": init.normal(3, 3, 1, wide, scale=1 / 3),
                "second": init.norm(wide),
                "down": init.dense(1, 1, wide, channels),
                "third": init.norm(channels),
            }
            for _ in range(blocks)
        ],
        "head": init.linear(channels, CLASSES),
    }

    def loss(p: Params, x: Array, label: Array) -> Array:
        x = jax.nn.relu6(conv(p["stem"], x, 2))
        for block in p["blocks"]:
            h = jax.nn.relu6(group_norm(block["first"], conv(block["up"], x)))
            h = conv(block["each"], h, groups=wide)
            h = jax.nn.relu6(group_norm(block["second"], h))
            x = x + group_norm(block["third"], conv(block["down"], h))
        return cross_entropy(linear(p["head"], jnp.mean(x, (0, 1))), label)

    return Architecture(loss, params, (x, labels))


def res_net(channels: int = 16, blocks: int = 2, batch: int = 16):
    x, labels = images(batch)
    init = Init()
    params = {
        "stem": init.dense(3, 3, 1, channels),
        "blocks": [
            {
                "a": init.dense(3, 3, channels, channels),
                "first": init.norm(channels),
                "b": init.dense(3, 3, channels, channels),
                "second": init.norm(channels),
            }
            for _ in range(blocks)
        ],
        "head": init.linear(channels, CLASSES),
    }

    def loss(p: Params, x: Array, label: Array) -> Array:
        x = jax.nn.relu(conv(p["stem"], x, 2))
        for block in p["blocks"]:
            h = jax.nn.relu(group_norm(block["first"], conv(block["a"], x)))
            h = group_norm(block["second"], conv(block["b"], h))
            x = jax.nn.relu(x + h)
        return cross_entropy(linear(p["head"], jnp.mean(x, (0, 1))), label)

    return Architecture(loss, params, (x, labels))


def patches(x: Array, size: int = 4) -> Array:
    rows = x.shape[0] // size
    x = x.reshape(rows, size, rows, size, -1).transpose(0, 2, 1, 3, 4)
    return x.reshape(rows * rows, -1)


def mixer(width: int = 32, blocks: int = 2, batch: int = 16):
    x, labels = images(batch)
    init = Init()
    params = {
        "patches": init.linear(16, width),
        "blocks": [
            {
                "first": init.norm(width),
                "tokens": [init.linear(16, 32), init.linear(32, 16)],
                "second": init.norm(width),
                "channels": [
                    init.linear(width, 4 * width),
                    init.linear(4 * width, width),
                ],
            }
            for _ in range(blocks)
        ],
        "norm": init.norm(width),
        "head": init.linear(width, CLASSES),
    }

    def mlp(p: Params, x: Array) -> Array:
        return linear(p[1], jax.nn.gelu(linear(p[0], x)))

    def loss(p: Params, x: Array, label: Array) -> Array:
        x = linear(p["patches"], patches(x))
        for block in p["blocks"]:
            x = x + mlp(block["tokens"], layer_norm(block["first"], x).T).T
            x = x + mlp(block["channels"], layer_norm(block["second"], x))
        pooled = jnp.mean(layer_norm(p["norm"], x), 0)
        return cross_entropy(linear(p["head"], pooled), label)

    return Architecture(loss, params, (x, labels))


def vit(width: int = 32, blocks: int = 2, batch: int = 16):
    x, labels = images(batch)
    init = Init()
    params = {
        "patches": init.linear(16, width),
        "class": init.normal(1, width, scale=0.1),
        "positions": init.normal(17, width, scale=0.1),
        "blocks": [
            {
                "first": init.norm(width),
                "qkv": init.linear(width, 3 * width),
                "out": init.linear(width, width),
                "second": init.norm(width),
                "up": init.linear(width, 4 * width),
                "down": init.linear(4 * width, width),
            }
            for _ in range(blocks)
        ],
        "norm": init.norm(width),
        "head": init.linear(width, CLASSES),
    }

    def loss(p: Params, x: Array, label: Array) -> Array:
        x = linear(p["patches"], patches(x))
        x = jnp.concatenate([p["class"], x]) + p["positions"]
        for block in p["blocks"]:
            qkv = linear(block["qkv"], layer_norm(block["first"], x))
            q, k, v = (heads(part, 4) for part in jnp.split(qkv, 3, -1))
            mixed = attention(q, k, v, causal=False).reshape(x.shape)
            x = x + linear(block["out"], mixed)
            hidden = jax.nn.gelu(linear(block["up"], layer_norm(block["second"], x)))
            x = x + linear(block["down"], hidden)
        return cross_entropy(linear(p["head"], layer_norm(p["norm"], x)[0]), label)

    return Architecture(loss, params, (x, labels))


ARCHITECTURES: dict[str, Callable[[], Architecture]] = {
    "nanoGPT": nano_gpt,
    "RoPE transformer": rope_transformer,
    "linear recurrent unit": lru,
    "S5": s5,
    "GRU of Equinox's example": gru,
    "MobileNet": mobile_net,
    "ResNet": res_net,
    "MLP-Mixer": mixer,
    "ViT": vit,
}
