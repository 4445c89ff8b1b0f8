"""A training step of LocalMixer by each method of Ren et al. 2023, over LG-BP's.

    python benchmarks/local_mixer.py [--size M/1/16] [--batch 128] [--rounds 60]

Prints a markdown table: the gradient with one step of momentum, compiled, all methods interleaved
in one run. Takes about a minute on two cores.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from forwax.models import LocalMixer, ren2023
from forwax.models.local_mixer import SIZES
from timing import interleaved, machine, ratios


def step(method: ren2023.Method):
    value_and_grad = ren2023.supervised(method)

    @jax.jit
    def one(
        key: Array, model: LocalMixer, momentum: LocalMixer, x: Array, labels: Array
    ):
        value, grads = value_and_grad(key, model, x, labels)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
        return value, jax.tree.map(lambda p, m: p - 0.05 * m, model, momentum), momentum

    return one


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="M/1/16", choices=tuple(SIZES))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    key = jax.random.key(0)
    model = eqx.filter_jit(lambda: LocalMixer.named(options.size, key=key))()
    size = SIZES[options.size]
    x = jax.random.normal(key, (options.batch, *size.in_shape))
    labels = jax.random.randint(key, (options.batch,), 0, size.out_size)
    methods = {name: ren2023.method(name, model, key) for name in ren2023.NAMES}
    for k in (4, 8, 16):
        methods[f"LG-FG-A, {k} noises"] = ren2023.method(
            "LG-FG-A", model, key, num_tangents=k
        )
    steps = {name: step(method) for name, method in methods.items()}
    momentum = jax.tree.map(jnp.zeros_like, model)
    calls = {
        name: (lambda f=f: f(key, model, momentum, x, labels))
        for name, f in steps.items()
    }
    seconds = interleaved(calls, options.rounds)
    over = ratios(seconds, "LG-BP")
    print(
        f"{options.size}, batch {options.batch}; medians of {options.rounds} interleaved rounds; "
        f"{machine()}.\n"
    )
    print("| method | step over LG-BP's | ms |")
    print("|---|---:|---:|")
    for name in steps:
        print(f"| {name} | {over[name]:.2f} | {np.median(seconds[name]) * 1e3:.2f} |")


if __name__ == "__main__":
    main()
