"""The fused losses against their literal definition: time, and temporaries of the compiled program.

    python benchmarks/fused_losses.py [--rounds 30]

Prints a markdown table for the last block of M/8/16 and L/8/64: the Jacobian-vector product and the gradient with
respect to features and head. Literal and fused are interleaved in one run. Takes about a minute on two cores.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax.losses import spatial_average_group_linear_cross_entropy
from timing import interleaved, machine, ratios

SHAPES = {"M/8/16, N=100": (100, 64, 16, 32), "L/8/64, N=16": (16, 64, 64, 32)}
CLASSES = 10


def literal(x: Array, w: Array, b: Array, labels: Array) -> Array:
    """Features of every patch and group for every patch and group, constants but for its own."""
    n, patches, groups, channels = x.shape
    mean = jnp.mean(x, axis=1)[:, None, None]
    moved = (x - lax.stop_gradient(x)) / patches  # zero, with the derivative of one patch's share of the mean
    own = jnp.eye(groups)[None, None, :, :, None] * moved[:, :, :, None, :]
    seen = (lax.stop_gradient(mean) + own).reshape(n, patches, groups, groups * channels)
    log_probabilities = jax.nn.log_softmax(seen @ w + b)
    return -jnp.take_along_axis(log_probabilities, labels[:, None, None, None], axis=-1)[..., 0]


def arguments(shape: tuple[int, ...]) -> tuple[tuple[Array, ...], Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], shape)
    w = jax.random.normal(keys[1], (shape[2] * shape[3], CLASSES)) / 10
    return (x, w, jnp.zeros(CLASSES)), jax.random.randint(keys[2], shape[:1], 0, CLASSES)


def modes(loss: Callable[..., Array]) -> dict[str, Callable[..., Any]]:
    """What is compiled, as functions of the differentiated arguments, their tangents and the labels."""
    return {
        "JVP": lambda args, dargs, labels: jax.jvp(lambda *args: loss(*args, labels), args, dargs),
        "gradient": lambda args, _, labels: jax.grad(lambda args: jnp.sum(loss(*args, labels)))(args),
    }


def measure(shape: tuple[int, ...], mode: str, rounds: int) -> list[str]:
    args, labels = arguments(shape)
    inputs = (args, jax.tree.map(jnp.ones_like, args), labels)
    losses = {"literal": literal, "fused": spatial_average_group_linear_cross_entropy}
    compiled = {name: jax.jit(modes(loss)[mode]).lower(*inputs).compile() for name, loss in losses.items()}
    memory = {name: f.memory_analysis().temp_size_in_bytes / 2**20 for name, f in compiled.items()}
    seconds = interleaved({name: (lambda f=f: f(*inputs)) for name, f in compiled.items()}, rounds)
    ratio = ratios(seconds, "fused")["literal"]
    fused = sorted(seconds["fused"])[rounds // 2] * 1e3
    return [f"{ratio:.1f}", f"{fused:.2f} ms", f"{memory['literal']:.1f} MiB", f"{memory['fused']:.2f} MiB"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    print(f"Medians of {rounds} interleaved rounds; {machine()}.\n")
    print("| loss | mode | literal / fused time | fused | literal temporaries | fused temporaries |")
    print("|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        for mode in ("JVP", "gradient"):
            print(f"| {name} | {mode} | " + " | ".join(measure(shape, mode, rounds)) + " |")


if __name__ == "__main__":
    main()
