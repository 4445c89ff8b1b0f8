"""The fused losses against their literal definition: time, and temporaries of the compiled program.

    python benchmarks/fused_losses.py [--rounds 7]

Prints a markdown table for the last block of M/8/16 and L/8/64: the Jacobian-vector product and the
gradient with respect to features and head, and the product where features alone move, as when a
site upstream is perturbed. Literal and fused are interleaved in one run. Takes about three minutes
on two cores.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax.losses import (
    spatial_average_group_linear,
    spatial_average_group_linear_cross_entropy,
    spatial_average_group_linear_nt_xent,
)
from timing import interleaved, machine, ratios

SHAPES = {"M/8/16, N=100": (100, 64, 16, 32), "L/8/64, N=16": (16, 64, 64, 32)}
CLASSES, PROJECTION = 10, 128


def literal_linear(x: Array, w: Array, b: Array) -> Array:
    """A head for every patch and group on all their features, constants but for its own."""
    n, patches, groups, channels = x.shape
    mean = jnp.mean(x, axis=1)[:, None, None]
    moved = (
        x - lax.stop_gradient(x)
    ) / patches  # zero, with the derivative of one patch's share of the mean
    own = jnp.eye(groups)[None, None, :, :, None] * moved[:, :, :, None, :]
    seen = (lax.stop_gradient(mean) + own).reshape(
        n, patches, groups, groups * channels
    )
    return seen @ w + b


def literal_cross_entropy(x: Array, w: Array, b: Array, labels: Array) -> Array:
    log_probabilities = jax.nn.log_softmax(literal_linear(x, w, b))
    return -jnp.take_along_axis(
        log_probabilities, labels[:, None, None, None], axis=-1
    )[..., 0]


def literal_nt_xent(x: Array, y: Array, w: Array, b: Array) -> Array:
    projected = literal_linear(jnp.concatenate([x, y]), w, b)
    queries = projected / jnp.linalg.norm(projected, axis=-1, keepdims=True)
    keys = lax.stop_gradient(queries[:, 0, 0])
    logits, itself = (
        queries @ keys.T / 0.5,
        jnp.eye(len(keys), dtype=bool)[:, None, None],
    )
    other = jnp.roll(itself, len(x), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1, where=~itself) - jnp.sum(
        logits, axis=-1, where=other
    )


LOSSES = {
    "linear": (literal_linear, spatial_average_group_linear),
    "cross-entropy": (
        literal_cross_entropy,
        spatial_average_group_linear_cross_entropy,
    ),
    "NT-Xent": (literal_nt_xent, spatial_average_group_linear_nt_xent),
}


def arguments(
    loss: str, shape: tuple[int, ...]
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """What is differentiated, features (perhaps in two views) and head; and what is not."""
    keys = jax.random.split(jax.random.key(0), 4)
    n, *rest = shape
    views, size = (2, PROJECTION) if loss == "NT-Xent" else (1, CLASSES)
    features = [jax.random.normal(key, (n // views, *rest)) for key in keys[:views]]
    w = jax.random.normal(keys[2], (shape[2] * shape[3], size)) / 10
    labels = (
        (jax.random.randint(keys[3], (n,), 0, CLASSES),)
        if loss == "cross-entropy"
        else ()
    )
    return (*features, w, jnp.zeros(size)), labels


def modes(loss: Callable[..., Array]) -> dict[str, Callable[..., Any]]:
    """What is compiled: functions of the arguments, their tangents and the labels."""

    def jvp(args: Any, dargs: Any, labels: Any) -> Any:
        return jax.jvp(lambda *args: loss(*args, *labels), args, dargs)

    def of_features(args: Any, dargs: Any, labels: Any) -> Any:
        head = args[-2:]
        return jax.jvp(
            lambda *features: loss(*features, *head, *labels), args[:-2], dargs[:-2]
        )

    def gradient(args: Any, _: Any, labels: Any) -> Any:
        return jax.grad(lambda args: jnp.sum(loss(*args, *labels)))(args)

    return {"JVP": jvp, "JVP of features": of_features, "gradient": gradient}


def measure(loss: str, shape: tuple[int, ...], mode: str, rounds: int) -> list[str]:
    args, labels = arguments(loss, shape)
    inputs = (args, jax.tree.map(jnp.ones_like, args), labels)
    pair = dict(zip(("literal", "fused"), LOSSES[loss], strict=True))
    compiled = {
        name: jax.jit(modes(fun)[mode]).lower(*inputs).compile()
        for name, fun in pair.items()
    }
    memory = {
        name: f.memory_analysis().temp_size_in_bytes / 2**20
        for name, f in compiled.items()
    }
    seconds = interleaved(
        {name: (lambda f=f: f(*inputs)) for name, f in compiled.items()}, rounds
    )
    ratio = ratios(seconds, "fused")["literal"]
    fused = sorted(seconds["fused"])[rounds // 2] * 1e3
    return [
        f"{ratio:.1f}",
        f"{fused:.2f} ms",
        f"{memory['literal']:.1f} MiB",
        f"{memory['fused']:.2f} MiB",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print(f"Medians of {rounds} interleaved rounds; {machine()}.\n")
    print(
        "| loss | block | mode | literal / fused time | fused | literal temporaries | fused "
        "temporaries |"
    )
    print("|---|---|---|---|---|---|---|")
    for loss in LOSSES:
        for block, shape in SHAPES.items():
            for mode in modes(LOSSES[loss][1]):
                print(
                    f"| {loss} | {block} | {mode} | "
                    + " | ".join(measure(loss, shape, mode, rounds))
                    + " |"
                )


if __name__ == "__main__":
    main()
