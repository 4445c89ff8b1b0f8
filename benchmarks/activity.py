"""Activity perturbation against backprop: time of a step, memory over depth, and time to compile.

    python benchmarks/activity.py [--rounds 60] [--batches 64 256 1024] [--depths 4 8 16 32]
    [--layers 24]

Prints three markdown tables. Times are medians over that of `jax.value_and_grad`, all interleaved
in one run; memory is what the compiled program needs beside its arguments and results
(`memory_analysis().temp_size_in_bytes`).
"""

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import forwax as fx
from forwax.models import ConvNet
from step_time import WIDTHS, mlp
from timing import interleaved, machine, ratios

MEMORIES = ("keep", "replay", "shared")
BACKPROP = "jax.value_and_grad"
WIDTH, BATCH = 128, 1024


def perceptron(params: Any, x: Array, y: Array) -> Array:
    """The loss of one example."""
    *hidden, (w, b) = params
    for weight, bias in hidden:
        x = jax.nn.relu(x @ weight + bias)
    return -jax.nn.log_softmax(x @ w + b)[y]


def convolutional(structure: Any, arrays: Any, x: Array, y: Array) -> Array:
    """The loss of one image."""
    return -jax.nn.log_softmax(eqx.combine(arrays, structure)(x))[y]


def gradients(
    loss: Callable[..., Array], num_data: int
) -> dict[str, Callable[..., Any]]:
    """Functions of a key, the parameters and data."""
    axes = (None, *[0] * num_data)
    batch = jax.value_and_grad(lambda *args: jnp.mean(jax.vmap(loss, axes)(*args)))
    rules = {
        f"`{memory}`": fx.ActivityPerturbation(memory=memory) for memory in MEMORIES
    }
    return {BACKPROP: lambda key, *args: batch(*args)} | {
        name: fx.value_and_grad(loss, rule, in_axes=axes)
        for name, rule in rules.items()
    }


def step_times(
    loss: Callable[..., Array], params: Any, data: Sequence[Array], rounds: int
) -> dict[str, float]:
    """Ratios to backprop, and its milliseconds."""
    compiled = {name: jax.jit(f) for name, f in gradients(loss, len(data)).items()}
    calls = {
        name: functools.partial(f, jax.random.key(1), params, *data)
        for name, f in compiled.items()
    }
    seconds = interleaved(calls, rounds)
    return {
        **ratios(seconds, BACKPROP),
        "ms": float(np.median(seconds[BACKPROP])) * 1e3,
    }


def time_table(batches: Sequence[int], images: int, rounds: int) -> None:
    key = jax.random.key(0)
    columns = {}
    for batch in batches:
        x, y = (
            jax.random.normal(key, (batch, WIDTHS[0])),
            jax.random.randint(key, (batch,), 0, WIDTHS[-1]),
        )
        columns[f"MLP, batch {batch}"] = step_times(
            perceptron, mlp(key), (x, y), rounds
        )
    arrays, structure = eqx.partition(
        ConvNet((28, 28, 1), 10, channels=16, dense=256, key=key), eqx.is_inexact_array
    )
    x, y = (
        jax.random.normal(key, (images, 28, 28, 1)),
        jax.random.randint(key, (images,), 0, 10),
    )
    loss = functools.partial(convolutional, structure)
    columns[f"ConvNet, batch {images}"] = step_times(loss, arrays, (x, y), rounds)
    rows = {
        name: [f"{c[name]:.2f}" for c in columns.values()]
        for name in gradients(perceptron, 2)
    }
    rows[f"*{BACKPROP} itself*"] = [f"{c['ms']:.1f} ms" for c in columns.values()]
    table(
        f"Time of a step, over that of {BACKPROP}; median of {rounds} interleaved rounds.",
        columns,
        rows,
    )


def by_loop(params: Any, x: Array) -> Array:
    for weight, bias in params:
        x = jnp.tanh(x @ weight + bias)
    return jnp.sum(jnp.sin(x @ params[0][0]))


def by_scan(params: Any, x: Array) -> Array:
    last, _ = lax.scan(
        lambda h, layer: (jnp.tanh(h @ layer[0] + layer[1]), None), x, params
    )
    return jnp.sum(jnp.sin(last @ params[0][0]))


def temporaries(
    loss: Callable[..., Array], gradient: Callable[..., Any], depth: int
) -> float:
    """In units of one layer's activities of the whole batch."""
    layer = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((WIDTH, WIDTH), (WIDTH,))
    ]
    stacked = tuple(jax.ShapeDtypeStruct((depth, *x.shape), x.dtype) for x in layer)
    params = [tuple(layer)] * depth if loss is by_loop else stacked
    x = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)
    analysis = (
        jax.jit(gradient)
        .lower(jax.random.key(0), params, x)
        .compile()
        .memory_analysis()
    )
    return analysis.temp_size_in_bytes / (4 * WIDTH * BATCH)


def memory_table(depths: Sequence[int]) -> None:
    rows = {}
    for kind, loss in (("Python loop", by_loop), ("scan", by_scan)):
        for name, gradient in gradients(loss, 1).items():
            if name != "`shared`":
                rows[f"{kind}, {name}"] = [
                    f"{temporaries(loss, gradient, depth):.1f}" for depth in depths
                ]
    title = (
        f"Temporaries of a deep MLP {WIDTH} wide at batch {BATCH}, in units of one "
        f"layer's "
        f"activities."
    )
    table(title, [f"depth {depth}" for depth in depths], rows)


def normalised(x: Array, gain: Array) -> Array:
    centred = x - jnp.mean(x, -1, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5) * gain


def transformer(params: Any, tokens: Array) -> Array:
    """The loss of one sequence under a causal language model, its layers a Python loop."""
    h = params["table"][tokens]
    length, width = h.shape
    mask = jnp.tril(jnp.ones((length, length), bool))
    for layer in params["layers"]:
        z = normalised(h, layer["gains"][0][None])
        q, k, v = ((z @ w).reshape(length, 4, width // 4) for w in layer["qkv"])
        scores = jnp.where(
            mask, jnp.einsum("thd,shd->hts", q, k) / (width // 4) ** 0.5, -1e9
        )
        h = (
            h
            + jnp.einsum("hts,shd->thd", jax.nn.softmax(scores), v).reshape(
                length, width
            )
            @ layer["out"]
        )
        z = normalised(h, layer["gains"][1][None])
        h = h + jax.nn.gelu(z @ layer["up"]) @ layer["down"]
    logits = jax.nn.log_softmax(normalised(h, params["gain"][None]) @ params["table"].T)
    return -jnp.mean(jnp.take_along_axis(logits[:-1], tokens[1:, None], axis=1))


def transformer_params(layers: int, width: int = 64, vocabulary: int = 256) -> Any:
    spec = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    layer = {
        "gains": spec((2, width)),
        "qkv": spec((3, width, width)),
        "out": spec((width, width)),
    }
    layer |= {"up": spec((width, 4 * width)), "down": spec((4 * width, width))}
    return {
        "table": spec((vocabulary, width)),
        "gain": spec((width,)),
        "layers": [layer] * layers,
    }


def compile_table(layers: int) -> None:
    tokens = jax.ShapeDtypeStruct((8, 32), jnp.int32)
    seconds = {}
    for name, gradient in gradients(transformer, 1).items():
        start = time.perf_counter()
        lowered = jax.jit(gradient).lower(
            jax.random.key(0), transformer_params(layers), tokens
        )
        traced = time.perf_counter()
        lowered.compile()
        seconds[name] = (traced - start, time.perf_counter() - traced)
    total = sum(seconds[BACKPROP])
    rows = {
        n: [f"{a:.1f} s", f"{b:.1f} s", f"{(a + b) / total:.2f}"]
        for n, (a, b) in seconds.items()
    }
    table(
        f"A {layers}-layer transformer as a Python loop.",
        ["trace", "compile", f"both, over {BACKPROP}"],
        rows,
    )


def table(title: str, columns: Any, rows: dict[str, list[str]]) -> None:
    print(
        f"{title}\n\n| gradient | "
        + " | ".join(columns)
        + " |\n|---|"
        + "---|" * len(columns)
    )
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batches", type=int, nargs="*", default=[64, 256, 1024])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--depths", type=int, nargs="*", default=[4, 8, 16, 32])
    parser.add_argument("--layers", type=int, default=24)
    options = parser.parse_args()
    print(f"{machine()}.\n")
    time_table(options.batches, options.images, options.rounds)
    memory_table(options.depths)
    compile_table(options.layers)


if __name__ == "__main__":
    main()
