"""The rate that `fx.measure_curvature` finds beside the best one of a sweep, on digits.

    python benchmarks/curvature_rate.py [--keys 60] [--steps 1000]

A tanh network 64-64-10 of 4,810 parameters on 256 of scikit-learn's digits, one tangent of signs a
step. Prints the loss at the end for each constant rate, and how the measured rate, from 16 draws,
spreads over keys.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import forwax as fx
from forwax.lab import data
from timing import machine

RATES = (0.0125, 0.025, 0.05, 0.1, 0.2)
RULE = fx.WeightPerturbation()


def digits() -> tuple[Array, Array]:
    found = data.load("digits")
    x = found.train_images[:256].reshape(256, -1) / found.scale
    return jnp.asarray(x, jnp.float32), jnp.asarray(found.train_labels[:256])


def init() -> Any:
    first, second = jax.random.split(jax.random.key(0))
    return {
        "a": jax.random.normal(first, (64, 64)) / 8,
        "b": jnp.zeros(64),
        "c": jax.random.normal(second, (64, 10)) / 8,
        "d": jnp.zeros(10),
    }


def loss(p: Any, x: Array, y: Array) -> Array:
    hidden = jnp.tanh(x @ p["a"] + p["b"][None])
    logits = jax.nn.log_softmax(hidden @ p["c"] + p["d"][None])
    return -jnp.mean(jnp.take_along_axis(logits, y[:, None], axis=1))


@jax.jit
def trained(params: Any, rate: Array, keys: Array, x: Array, y: Array) -> Array:
    def step(params: Any, key: Array) -> tuple[Any, None]:
        return fx.update(loss, RULE, learning_rate=rate)(key, params, x, y)[1], None

    return loss(lax.scan(step, params, keys)[0], x, y)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", type=int, default=60)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    x, y = digits()
    params = init()
    print(machine())
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters")
    keys = jax.random.split(jax.random.key(1), options.steps)
    for rate in RATES:
        end = trained(params, jnp.float32(rate), keys, x, y)
        print(f"rate {rate:g}: loss {float(end):.3f} after {options.steps} steps")
    measure = fx.measure_curvature(loss, RULE)
    found = [
        measure(key, params, x, y).learning_rate
        for key in jax.random.split(jax.random.key(2), options.keys)
    ]
    rates = np.array([rate for rate in found if rate is not None])
    low, tenth, median, last, high = np.quantile(rates, (0, 0.1, 0.5, 0.9, 1))
    print(
        f"measured over {options.keys} keys: {len(found) - len(rates)} without a rate; {low:.3f} "
        f"to {high:.3f}, 10 to 90 %: {tenth:.3f} to {last:.3f}, median {median:.3f}"
    )


if __name__ == "__main__":
    main()
