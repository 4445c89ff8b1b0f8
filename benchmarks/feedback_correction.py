"""What learnt maps take off the noise of an unbiased estimate: learned feedback's correction.

    python benchmarks/feedback_correction.py [--steps 500] [--seeds 3] [--draws 100]

The MLP of benchmarks/feedback.py learns by learned feedback at the rate found there. Then, on one
batch, the relative mean squared error |ĝ - g|² / |g|² of estimates with `correction=True`: with
maps of zeros, which is noise on activities alone, and with the maps as learnt. Prints a table.
"""

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import forwax as fx
from feedback_rules import start
from feedback_tasks import IN_AXES, TASKS
from timing import machine

RATE = 0.03
METHOD = "learned feedback, 1"


def errors(seed: int, steps: int, draws: int) -> tuple[float, float]:
    """Without maps, and with them."""
    task = TASKS["mlp"]()
    first, params = start(task, METHOD, seed)
    key = jax.random.key(seed + 100)

    @jax.jit
    def train(rule: Any, params: Any) -> Any:
        def step(carry: Any, number: Array) -> tuple[Any, None]:
            rule, params, momentum = carry
            drawn, noise = jax.random.split(jax.random.fold_in(key, number))
            batch = task.batch(drawn)
            _, grads, rule = rule.step(task.loss, in_axes=IN_AXES)(
                noise, params, *batch
            )
            updates, momentum = task.direction.update(grads, momentum)
            params = jax.tree.map(lambda p, u: p - RATE * u, params, updates)
            return (rule, params, momentum), None

        begin = rule, params, task.direction.init(params)
        (rule, params, _), _ = lax.scan(step, begin, jnp.arange(steps))
        return rule, params

    learnt, params = train(first, params)
    batch = task.batch(jax.random.fold_in(key, steps))

    @jax.jit
    def relative_mse(rule: Any, params: Any) -> Array:
        exact = fx.grad(task.loss, fx.Backprop(), in_axes=IN_AXES)(key, params, *batch)

        def one(drawn: Array) -> Array:
            found = fx.grad(task.loss, rule, in_axes=IN_AXES)(drawn, params, *batch)
            return squares(jax.tree.map(jnp.subtract, found, exact))

        keys = jax.random.split(jax.random.fold_in(key, steps + 1), draws)
        return jnp.mean(lax.map(one, keys)) / squares(exact)

    corrected = dataclasses.replace(learnt, correction=True)
    without = dataclasses.replace(
        corrected, maps=jax.tree.map(jnp.zeros_like, learnt.maps)
    )
    return float(relative_mse(without, params)), float(relative_mse(corrected, params))


def squares(tree: Any) -> Array:
    return sum((jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)), jnp.float32(0))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=100)
    options = parser.parse_args()
    print(machine())
    print(f"relative MSE after {options.steps} steps, {options.draws} draws\n")
    print(
        "| seed | maps of zeros | maps as learnt | ratio |\n| --- | ---: | ---: | ---: |"
    )
    found = []
    for seed in range(options.seeds):
        without, learnt = errors(seed, options.steps, options.draws)
        found.append((without, learnt))
        print(
            f"| {seed} | {without:.0f} | {learnt:.0f} | {learnt / without:.2f} |",
            flush=True,
        )
    without, learnt = np.mean(found, axis=0)
    print(f"| mean | {without:.0f} | {learnt:.0f} | {learnt / without:.2f} |")


if __name__ == "__main__":
    main()
