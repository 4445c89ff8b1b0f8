"""Gauss-Newton along random directions beside forward gradients with Adam, and backprop.

    python benchmarks/reach.py [--tasks tomography digits minibatches] [--seeds 3] [--seconds 60]

Tomography is the problem of examples/tomography.py: CPU seconds and solver runs until the loss is
a thousandth of the first one. Digits is an MLP 64-32-10 on 1,437 of scikit-learn's images, all of
them in each step or minibatches of 64; each seed holds out 360 others at random, and starts from
other weights. Each method has four rates or dampings tried on the first seed; the best runs all
seeds. Prints tables.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import forwax as fx
from forwax.lab import data
from timing import machine

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
import tomography
from tomography import Outcome, Survey

ADAM_RATES = (0.003, 0.01, 0.03, 0.1)


# Tomography


def tomography_rows(seeds: int, most_seconds: float) -> list[str]:
    """CPU seconds and solver runs of each method, the best setting's over all seeds."""
    survey = Survey()
    dampings = (0.1, 0.3, 1.0, 3.0)
    candidates = {
        f"Gauss-Newton, {k} directions": [
            (f"damping {d:g}", tomography.gauss_newton(survey, k, d)) for d in dampings
        ]
        for k in (16, 64, 160)
    } | {
        "Adam, 16 directions": [
            (f"rate {rate:g}", tomography.adam(survey, 16, rate)) for rate in ADAM_RATES
        ],
        "ensemble Kalman inversion, 64": [("", tomography.kalman(survey, 64))],
    }
    rows = ["| method | setting | steps | solver runs | CPU s |"]
    rows.append("| --- | --- | ---: | ---: | ---: |")
    for name, settings in candidates.items():
        tried = [
            tomography.run(method, survey, 0, most_seconds) for _, method in settings
        ]
        best = min(range(len(tried)), key=lambda i: _rank(tried[i]))
        setting, method = settings[best]
        found = [tomography.run(method, survey, s, most_seconds) for s in range(seeds)]
        steps = np.array([each.steps for each in found])
        seconds = np.array([each.seconds for each in found])
        cells = [name, setting, spread(steps), spread(steps * method.solves)]
        if all(each.reached for each in found):
            cells.append(spread(seconds))
        else:
            last = spread(np.array([each.share for each in found]))
            cells.append(f"not within {most_seconds:g}; {last} of the first loss")
        rows.append(f"| {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    return rows


def _rank(outcome: Outcome) -> tuple[bool, float]:
    """Solver runs, which repeat, before the seconds of a machine with other work."""
    return (not outcome.reached, outcome.steps if outcome.reached else outcome.share)


def spread(values: np.ndarray) -> str:
    """The mean, and the range in parentheses."""
    low, high = values.min(), values.max()
    text = f"{values.mean():,.3g}" if values.mean() < 100 else f"{values.mean():,.0f}"
    return text if low == high else f"{text} ({low:,.3g} to {high:,.3g})"


# Digits


class Digits(NamedTuple):
    """Images in [0, 1] [N, 64] and labels."""

    x: Array
    y: Array
    held_x: Array
    held_y: Array


def digits(seed: int) -> Digits:
    found = data.load("digits")
    images = np.concatenate([found.train_images, found.test_images])
    labels = np.concatenate([found.train_labels, found.test_labels])
    order = np.random.default_rng(seed).permutation(len(labels))
    x = jnp.asarray(images[order].reshape(len(order), -1) / found.scale, jnp.float32)
    y = jnp.asarray(labels[order])
    return Digits(x[360:], y[360:], x[:360], y[:360])


def init(key: Array) -> Any:
    first, second = jax.random.split(key)
    return {
        "a": jax.random.normal(first, (64, 32)) * np.sqrt(2 / 64),
        "b": jnp.zeros(32),
        "c": jax.random.normal(second, (32, 10)) * np.sqrt(1 / 32),
        "d": jnp.zeros(10),
    }


def logits(p: Any, x: Array) -> Array:
    return jax.nn.tanh(x @ p["a"] + p["b"][None]) @ p["c"] + p["d"][None]


def cross_entropy(z: Array, y: Array) -> Array:
    found = jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], axis=1)
    return -jnp.mean(found)


class Way(NamedTuple):
    """A way to train: what it keeps at the start, and a step at a number between 0 and 1.

    `step` takes (key, params, kept, x, y, done) to (params, kept).
    """

    begin: Callable[[Any], Any]
    step: Callable[..., tuple[Any, Any]]


def gauss_newton(whole: bool, setting: float) -> Way:
    """The whole set with an adaptive damping, minibatches with a falling step size."""
    solver = fx.GaussNewton(damping=setting, adapt=whole)

    def step(
        key: Array, params: Any, kept: Any, x: Array, y: Array, done: Array
    ) -> tuple[Any, Any]:
        if not whole:
            size = 0.25 * (1 + jnp.cos(jnp.pi * done))
            kept = fx.GaussNewton(damping=setting, adapt=False, step_size=size)
        of_logits = functools.partial(cross_entropy, y=y)
        _, params, kept = kept.step(logits, of_logits)(key, params, x)
        return params, kept if whole else ()

    return Way(lambda params: solver.init(params) if whole else (), step)


def adam(rule: fx.Rule, rate: float) -> Way:
    optimizer = optax.scale_by_adam()
    gradient = fx.grad(lambda p, x, y: cross_entropy(logits(p, x), y), rule)

    def step(
        key: Array, params: Any, kept: Any, x: Array, y: Array, done: Array
    ) -> tuple[Any, Any]:
        updates, kept = optimizer.update(gradient(key, params, x, y), kept)
        now = rate * (1 + jnp.cos(jnp.pi * done)) / 2
        return jax.tree.map(lambda p, u: p - now * u, params, updates), kept

    return Way(optimizer.init, step)


def trained(way: Way, steps: int, whole: bool) -> Callable[[int], np.ndarray]:
    """From a seed to held-out loss and accuracy in %, and CPU seconds without compilation."""

    @jax.jit
    def program(seed: Array, found: Digits) -> tuple[Array, Array]:
        key, begin = jax.random.split(jax.random.key(seed))
        params = init(begin)

        def body(carry: Any, number: Array) -> tuple[Any, None]:
            params, kept = carry
            drawn, noise = jax.random.split(jax.random.fold_in(key, number))
            x, y = found.x, found.y
            if not whole:
                rows = jax.random.choice(drawn, len(y), (64,), replace=False)
                x, y = x[rows], y[rows]
            return way.step(noise, params, kept, x, y, number / steps), None

        (params, _), _ = lax.scan(body, (params, way.begin(params)), jnp.arange(steps))
        z = logits(params, found.held_x)
        is_right = jnp.argmax(z, axis=1) == found.held_y
        return cross_entropy(z, found.held_y), 100 * jnp.mean(is_right)

    def run(seed: int) -> np.ndarray:
        arguments = jnp.int32(seed), digits(seed)
        compiled = program.lower(*arguments).compile()
        begin = time.process_time()
        loss, accuracy = jax.block_until_ready(compiled(*arguments))
        return np.array([loss, accuracy, time.process_time() - begin])

    return run


def digits_rows(seeds: int, whole: bool) -> list[str]:
    steps = 60 if whole else 600
    many = fx.WeightPerturbation(num_tangents=64)
    rates = (0.01, 0.03, 0.1, 0.3) if whole else (0.003, 0.01, 0.03, 0.1)
    ways = {
        "Gauss-Newton, 64 directions": (
            (0.1, 0.3, 1.0, 3.0),
            lambda s: gauss_newton(whole, s),
        ),
        "Adam, forward gradient, 64 tangents": (rates, lambda s: adam(many, s)),
        "Adam, backprop": (rates, lambda s: adam(fx.Backprop(), s)),
    }
    rows = ["| method | damping or rate | held-out loss | accuracy, % | CPU s |"]
    rows.append("| --- | ---: | ---: | ---: | ---: |")
    for name, (settings, build) in ways.items():
        runs = [trained(build(s), steps, whole) for s in settings]
        best = int(np.nanargmin([run(0)[0] for run in runs]))
        each = np.array([runs[best](seed) for seed in range(seeds)]).T
        cells = [name, f"{settings[best]:g}", *(spread(values) for values in each)]
        rows.append(f"| {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    return rows


def main(given: Sequence[str] | None = None) -> None:
    names = ("tomography", "digits", "minibatches")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="*", choices=names, default=names)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60, help="CPU time of a run")
    options = parser.parse_args(given)
    print(machine())
    for name in options.tasks:
        print(f"\n{name}")
        if name == "tomography":
            rows = tomography_rows(options.seeds, options.seconds)
        else:
            rows = digits_rows(options.seeds, whole=name == "digits")
        print("\n" + "\n".join(rows))


if __name__ == "__main__":
    main()
