"""The tasks of the feedback benchmark: what is trained, on what, and how it is scored."""

import functools
import hashlib
import math
import sys
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from forwax.lab import data

IN_AXES = (None, 0, 0)
Loss = Callable[[Any, Array, Array], Array]
Batch = tuple[Array, Array]


class Task(NamedTuple):
    """A model, its data and its optimiser.

    Attributes:
        init: parameters from a key; those of the last layer have "head" in their path, those of the
            first one "first".
        loss: of one example.
        frozen_loss: its gradient is that of the baseline with frozen inner layers.
        batch: draws examples from a key.
        score: the parameters' score on test data.
        scored: what the score is.
        direction: the optimiser without its rate.
        steps: how many.
        corpus: what identifies the data.
    """

    init: Callable[[Array], Any]
    loss: Loss
    frozen_loss: Loss
    batch: Callable[[Array], Batch]
    score: Callable[[Any], Array]
    scored: str
    direction: optax.GradientTransformation
    steps: int
    corpus: str


def cross_entropy(logits: Array, labels: Array) -> Array:
    """The mean over all but the classes."""
    found = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
    return -jnp.mean(found)


def of_parts(loss: Loss, *parts: str) -> Loss:
    """The loss in which only parameters with one of the words in their path are trained."""

    def partial(params: Any, x: Array, y: Array) -> Array:
        def kept(path: Any, leaf: Array) -> Array:
            name = jax.tree_util.keystr(path)
            is_trained = any(part in name for part in parts)
            return leaf if is_trained else lax.stop_gradient(leaf)

        return loss(jax.tree_util.tree_map_with_path(kept, params), x, y)

    return partial


# Images


@functools.cache
def images(whole: bool) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Training and test set, pixels uint8 [N, 28, 28, 1] and labels.

    All of MNIST, or its test file alone, shuffled once: 8,000 to train on and 2,000 to test.
    """
    found = data.load("mnist")
    x, y = jnp.asarray(found.test_images), jnp.asarray(found.test_labels)
    if whole:
        train = jnp.asarray(found.train_images), jnp.asarray(found.train_labels)
        return train, (x, y)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    return (x[:8000], y[:8000]), (x[8000:], y[8000:])


def dense(key: Array, inputs: int, outputs: int) -> dict[str, Array]:
    scale = np.sqrt(2 / inputs)
    w = jax.random.normal(key, (inputs, outputs)) * scale
    return {"w": w, "b": jnp.zeros(outputs)}


def mlp_init(key: Array) -> Any:
    widths = (784, 512, 512, 512, 10)
    names = ("first", "second", "third", "head")
    pairs = zip(jax.random.split(key, 4), names, widths[:-1], widths[1:], strict=True)
    return {name: dense(k, a, b) for k, name, a, b in pairs}


def mlp_logits(params: Any, x: Array) -> Array:
    h = x.reshape(-1)
    for name in ("first", "second", "third"):
        h = jax.nn.relu(h @ params[name]["w"] + params[name]["b"])
    return h @ params["head"]["w"] + params["head"]["b"]


def cnn_init(key: Array) -> Any:
    keys = jax.random.split(key, 5)
    params: dict[str, Any] = {}
    channels = (1, 8, 16, 16)
    for k, name, a, b in zip(
        keys, ("first", "second", "third"), channels[:-1], channels[1:], strict=False
    ):
        w = jax.random.normal(k, (3, 3, a, b)) * np.sqrt(2 / (9 * a))
        params[name] = {"w": w, "b": jnp.zeros(b)}
    return params | {"dense": dense(keys[3], 144, 64), "head": dense(keys[4], 64, 10)}


def cnn_logits(params: Any, x: Array) -> Array:
    h = x[None]
    for name in ("first", "second", "third"):
        h = lax.conv_general_dilated(
            h,
            params[name]["w"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        h = jax.nn.relu(h + params[name]["b"])
        h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    h = jax.nn.relu(h.reshape(-1) @ params["dense"]["w"] + params["dense"]["b"])
    return h @ params["head"]["w"] + params["head"]["b"]


def image_task(
    init: Callable[[Array], Any],
    logits: Callable[[Any, Array], Array],
    batch_size: int,
    direction: optax.GradientTransformation,
    steps: int,
    whole: bool = False,
) -> Task:
    """Digits; the same for all models, but for the size of the set."""
    (train, labels), (test, test_labels) = images(whole)

    def scaled(pixels: Array) -> Array:
        return pixels.astype(jnp.float32) / 255

    def loss(params: Any, x: Array, y: Array) -> Array:
        return cross_entropy(logits(params, x), y)

    def batch(key: Array) -> Batch:
        chosen = jax.random.randint(key, (batch_size,), 0, len(train))
        return scaled(train[chosen]), labels[chosen]

    def score(params: Any) -> Array:
        found = jax.vmap(logits, (None, 0))(params, scaled(test))
        return 100 * jnp.mean(jnp.argmax(found, axis=1) != test_labels)

    return Task(
        init,
        loss,
        of_parts(loss, "first", "head"),
        batch,
        score,
        "test error, %",
        direction,
        steps,
        "MNIST" if whole else "MNIST's test file, 8,000 to train on and 2,000 to test",
    )


# Transformers: a causal language model of characters, and a classifier of images

WIDTH, HEADS, LENGTH, SEQUENCES = 64, 4, 64, 8
PATCH = 7


@functools.cache
def corpus() -> tuple[np.ndarray, np.ndarray, int, str]:
    """Characters of Python's help topics: each tenth block of 2,000 is held out.

    They come with the interpreter, so that figures do not move with this project's own pages.
    """
    text = "".join(topics[name] for name in sorted(topics))
    letters, numbers = np.unique(list(text), return_inverse=True)
    blocks = np.array_split(numbers.astype(np.int32), len(text) // 2000)
    train = np.concatenate([b for i, b in enumerate(blocks) if i % 10 != 5])
    test = np.concatenate([b for i, b in enumerate(blocks) if i % 10 == 5])
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    name = f"{len(text):,} characters of Python {version}'s help topics, {digest}"
    return train, test, len(letters), name


def transformer_init(key: Array, layers: int, outputs: int) -> Any:
    """All but what makes the stream; projections back into it shrink with the depth."""

    def weight(i: int, shape: tuple[int, int], scale: float = 1.0) -> Array:
        return (
            jax.random.normal(jax.random.fold_in(key, i), shape)
            * scale
            / np.sqrt(shape[0])
        )

    norm = {"gain": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)}
    shrunk = 1 / math.sqrt(2 * layers)
    blocks = [
        {name: weight(10 * i + j, (WIDTH, WIDTH)) for j, name in enumerate("qkv")}
        | {
            "o": weight(10 * i + 3, (WIDTH, WIDTH), shrunk),
            "f1": weight(10 * i + 4, (WIDTH, 4 * WIDTH)),
            "f2": weight(10 * i + 5, (4 * WIDTH, WIDTH), shrunk),
            "norm1": norm,
            "norm2": norm,
        }
        for i in range(1, layers + 1)
    ]
    head = {"w": weight(1, (WIDTH, outputs)), "norm": norm}
    return {"layers": blocks, "head": head}


def language_init(key: Array, letters: int, layers: int) -> Any:
    """Embeddings of half a unit."""
    first = jax.random.normal(jax.random.fold_in(key, 0), (letters, WIDTH)) / 2
    return {"first": first} | transformer_init(key, layers, letters)


def vit_init(key: Array) -> Any:
    """Two layers; patches of 7 x 7 pixels."""
    first = dense(jax.random.fold_in(key, 0), PATCH**2, WIDTH)
    return {"first": first} | transformer_init(key, 2, 10)


def positions(length: int) -> np.ndarray:
    """Half the sines and cosines of Vaswani et al. 2017, [length, WIDTH]."""
    rates = 10_000.0 ** (-np.arange(WIDTH // 2) * 2 / WIDTH)
    angles = np.arange(length)[:, None] * rates
    both = np.concatenate([np.sin(angles), np.cos(angles)], axis=1) / 2
    return both.astype(np.float32)


def normalised(x: Array, norm: dict[str, Array]) -> Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    size = lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-5)
    return centred * size * norm["gain"][None] + norm["bias"][None]


Cut = Callable[[Array], Array]
"""Done to the data of what goes into the stream."""


def stream(params: Any, h: Array, hidden: np.ndarray, cut: Cut = lambda x: x) -> Array:
    """The normalised stream [positions, WIDTH] behind all layers.

    `hidden` says which later ones [positions, positions] each position does not see.
    """
    for layer in params["layers"]:
        x = normalised(h, layer["norm1"])
        q, k, v = ((x @ layer[n]).reshape(len(h), HEADS, -1) for n in "qkv")
        scores = jnp.einsum("thd,shd->hts", q, k) / math.sqrt(WIDTH // HEADS)
        weights = jax.nn.softmax(jnp.where(hidden[None], -jnp.inf, scores))
        mixed = jnp.einsum("hts,shd->thd", weights, v).reshape(h.shape)
        h = h + cut(mixed) @ layer["o"]
        x = normalised(h, layer["norm2"])
        h = h + cut(jax.nn.relu(x @ layer["f1"])) @ layer["f2"]
    return normalised(h, params["head"]["norm"])


def language_logits(params: Any, letters: Array, cut: Cut = lambda x: x) -> Array:
    """Logits [LENGTH, letters]."""
    future = np.triu(np.ones((LENGTH, LENGTH), bool), 1)
    h = params["first"][letters] + positions(LENGTH)
    return stream(params, h, future, cut) @ params["head"]["w"]


def vit_logits(params: Any, image: Array) -> Array:
    """Logits [10] from the mean over all patches."""
    side = image.shape[0] // PATCH
    tiles = image.reshape(side, PATCH, side, PATCH).swapaxes(1, 2)
    patches = tiles.reshape(side**2, PATCH**2)
    first = params["first"]
    h = patches @ first["w"] + first["b"][None] + positions(side**2)
    nothing = np.zeros((side**2, side**2), bool)
    return jnp.mean(stream(params, h, nothing), axis=0) @ params["head"]["w"]


def language_loss(params: Any, x: Array, y: Array) -> Array:
    return cross_entropy(language_logits(params, x), y)


def stream_loss(params: Any, x: Array, y: Array) -> Array:
    """Errors return through the residual stream alone; q, k, v and f1 stay as they are."""
    return cross_entropy(language_logits(params, x, lax.stop_gradient), y)


def language_task(layers: int, steps: int) -> Task:
    found, held_out, num_letters, name = corpus()
    train, test = jnp.asarray(found), jnp.asarray(held_out)

    def drawn(key: Array, text: Array) -> Batch:
        starts = jax.random.randint(key, (SEQUENCES,), 0, len(text) - LENGTH - 1)
        rows = text[starts[:, None] + np.arange(LENGTH + 1)[None]]
        return rows[:, :-1], rows[:, 1:]

    def score(params: Any) -> Array:
        def one(key: Array) -> Array:
            return jnp.mean(jax.vmap(language_loss, IN_AXES)(params, *drawn(key, test)))

        return jnp.mean(lax.map(one, jax.random.split(jax.random.key(99), 40)))

    return Task(
        lambda key: language_init(key, num_letters, layers),
        language_loss,
        stream_loss,
        lambda key: drawn(key, train),
        score,
        "test loss",
        optax.scale_by_adam(),
        steps,
        name,
    )


TASKS: dict[str, Callable[[], Task]] = {
    "mlp": lambda: image_task(mlp_init, mlp_logits, 128, optax.trace(0.9), 2000),
    "cnn": lambda: image_task(cnn_init, cnn_logits, 32, optax.scale_by_adam(), 1000),
    "vit": lambda: image_task(
        vit_init, vit_logits, 64, optax.scale_by_adam(), 2000, whole=True
    ),
    "lm": lambda: language_task(2, 500),
    "lm-2000": lambda: language_task(2, 2000),
    "lm-6": lambda: language_task(6, 500),
}
ABOUT = {
    "mlp": "MLP 784-512-512-512-10, batch 128, 2,000 steps, momentum 0.9",
    "cnn": "CNN of three convolutions, batch 32, 1,000 Adam steps",
    "vit": "ViT of two layers, width 64, all of MNIST, batch 64, 2,000 Adam steps",
    "lm": "language model, 2 layers, 500 Adam steps",
    "lm-2000": "language model, 2 layers, 2,000 Adam steps",
    "lm-6": "language model, 6 layers, 500 Adam steps",
}
