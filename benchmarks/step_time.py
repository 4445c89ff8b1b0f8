"""One gradient of the MLP 784-1024-1024-10: forward pass, backprop, three ways of drawing.

    python benchmarks/step_time.py [--rounds 100]

Prints a markdown table: median time over that of `jax.value_and_grad`, all interleaved in one run.
Takes about two minutes on two cores.
"""

import argparse
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import forwax as fx
from timing import interleaved, machine, ratios

WIDTHS = (784, 1024, 1024, 10)
BATCHES = (64, 256, 1024)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StockRademacher(fx.tangents.IndependentTangents):
    """Signs by `jax.random.rademacher`, one draw a leaf: what forwax does without."""

    def draw_one(
        self, key: Array, specs: Sequence[jax.ShapeDtypeStruct]
    ) -> list[Array]:
        keys = jax.random.split(key, len(specs))
        return [
            jax.random.rademacher(k, spec.shape, spec.dtype)
            for k, spec in zip(keys, specs, strict=True)
        ]

    def relative_mse(self, n: int, num_tangents: int) -> float:
        return (n - 1) / num_tangents


def mlp(key: Array) -> list[tuple[Array, Array]]:
    keys = jax.random.split(key, len(WIDTHS) - 1)
    return [
        (
            jax.random.normal(k, (fan_in, fan_out)) * np.sqrt(2 / fan_in),
            jnp.zeros(fan_out),
        )
        for k, fan_in, fan_out in zip(keys, WIDTHS[:-1], WIDTHS[1:], strict=True)
    ]


def loss(params: list[tuple[Array, Array]], x: Array, y: Array) -> Array:
    *hidden, (w, b) = params
    for weight, bias in hidden:
        x = jax.nn.relu(x @ weight + bias)
    log_probabilities = jax.nn.log_softmax(x @ w + b)
    return -jnp.mean(jnp.take_along_axis(log_probabilities, y[:, None], axis=1))


def rules() -> dict[str, fx.Rule]:
    return {
        "backprop": fx.Backprop(),
        "packed signs": fx.WeightPerturbation(),
        "jax.random.rademacher": fx.WeightPerturbation(StockRademacher()),
        "jax.random.normal": fx.WeightPerturbation(fx.tangents.Normal()),
    }


def measure(batch: int, rounds: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Ratios to backprop and raw seconds at one batch size."""
    key = jax.random.key(0)
    params, x = mlp(key), jax.random.normal(key, (batch, WIDTHS[0]))
    y = jax.random.randint(key, (batch,), 0, WIDTHS[-1])
    compiled = {
        name: jax.jit(fx.value_and_grad(loss, rule)) for name, rule in rules().items()
    }
    forward = jax.jit(loss)
    functions = {"forward pass": lambda: forward(params, x, y)}
    functions |= {
        name: (lambda f=f: f(key, params, x, y)) for name, f in compiled.items()
    }
    functions["jax.value_and_grad"] = (lambda f: lambda: f(params, x, y))(
        jax.jit(jax.value_and_grad(loss))
    )
    seconds = interleaved(functions, rounds)
    return ratios(seconds, "jax.value_and_grad"), seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds
    columns = {batch: measure(batch, rounds) for batch in BATCHES}
    print(
        f"Median of {rounds} interleaved rounds over that of jax.value_and_grad; {machine()}.\n"
    )
    print("| gradient | " + " | ".join(f"batch {batch}" for batch in BATCHES) + " |")
    print("|---|" + "---|" * len(BATCHES))
    for name in columns[BATCHES[0]][0]:
        print(
            f"| {name} | "
            + " | ".join(f"{columns[batch][0][name]:.2f}" for batch in BATCHES)
            + " |"
        )
    times = [
        f"{np.median(columns[batch][1]['jax.value_and_grad']) * 1e3:.1f} ms"
        for batch in BATCHES
    ]
    print("| *jax.value_and_grad itself* | " + " | ".join(times) + " |")


if __name__ == "__main__":
    main()
