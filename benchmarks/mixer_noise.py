"""What each change gains in noise: the first layer of LocalMixer M/1/16 by LG-FG-A.

    python benchmarks/mixer_noise.py [--draws 60] [--batch 64] [--steps 400]

Prints a markdown table of relative mean squared errors E|ĝ - g|² / |g|² of the mean gradient of the
first layer's weights on one batch of MNIST, before and after some training, and the squared cosine
of feedback alignment's error, which is a guess that guided noise could start from. Takes about two
minutes on one core.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import forwax as fx
from forwax.lab.data import load
from forwax.models import LocalMixer, ren2023
from timing import machine

Gradient = Callable[..., tuple[Any, Any]]


def batches(size: int, count: int) -> list[tuple[Array, Array]]:
    """The first batches of MNIST, pixels between -1 and 1."""
    data = load("mnist")
    images, labels = (
        data.train_images[: size * count],
        data.train_labels[: size * count],
    )
    x = jnp.asarray(images, jnp.float32).reshape(count, size, 28, 28, 1) / 127.5 - 1
    return list(
        zip(x, jnp.asarray(labels, jnp.int32).reshape(count, size), strict=True)
    )


def trained(model: LocalMixer, data: list[tuple[Array, Array]]) -> LocalMixer:
    """The model after one step of LG-FG-A on each batch."""
    value_and_grad = ren2023.supervised(
        ren2023.method("LG-FG-A", model, jax.random.key(0))
    )

    @jax.jit
    def step(
        key: Array, model: LocalMixer, momentum: LocalMixer, x: Array, labels: Array
    ):
        _, grads = value_and_grad(key, model, x, labels)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
        return jax.tree.map(lambda p, m: p - 0.05 * m, model, momentum), momentum

    momentum = jax.tree.map(jnp.zeros_like, model)
    for i, (x, labels) in enumerate(data):
        model, momentum = step(jax.random.key(i), model, momentum, x, labels)
    return model


def first_layer(grads: LocalMixer) -> Array:
    """The weights of the largest leaf: the first dense layer."""
    return max(jax.tree.leaves(grads), key=lambda leaf: leaf.size)


def relative_mse(
    gradient: Gradient, model: LocalMixer, x: Array, labels: Array, draws: int
) -> tuple[float, float]:
    """The relative mean squared error and its standard error."""
    key = jax.random.key(1)
    true = first_layer(
        ren2023.supervised(ren2023.method("LG-BP", model, key))(key, model, x, labels)[
            1
        ]
    )
    error = jax.jit(
        lambda key: jnp.sum(
            (first_layer(gradient(key, model, x, labels)[1]) - true) ** 2
        )
    )
    found = np.array(
        [float(error(each)) for each in jax.random.split(key, draws)]
    ) / float(jnp.sum(true**2))
    return float(found.mean()), float(found.std(ddof=1) / draws**0.5)


def squared_cosine(model: LocalMixer, x: Array, labels: Array) -> float:
    """The mean over examples of cos² between the first layer's errors by LG-FA and by LG-BP."""
    key = jax.random.key(2)
    both = [
        ren2023.supervised(ren2023.method(name, model, key))
        for name in ("LG-BP", "LG-FA")
    ]

    def of_one(example: tuple[Array, Array]) -> Array:
        a, b = (
            first_layer(f(key, model, example[0][None], example[1][None])[1])
            for f in both
        )
        return jnp.sum(a * b) ** 2 / (jnp.sum(a**2) * jnp.sum(b**2))

    return float(jnp.mean(jax.jit(lambda x, y: jax.lax.map(of_one, (x, y)))(x, labels)))


SIGNS = fx.tangents.Rademacher()


def kinds(model: LocalMixer) -> dict[str, Gradient]:
    """Gradients by LG-FG-A with each kind and number of noises."""

    def build(
        num_tangents: int = 1, tangents: Any = SIGNS, parts: bool = True
    ) -> Gradient:
        method = ren2023.method(
            "LG-FG-A",
            model,
            jax.random.key(0),
            tangents=tangents,
            num_tangents=num_tangents,
        )
        return ren2023.supervised(dataclasses.replace(method, parts=parts))

    return {
        "one slope for each example, signs": build(parts=False),
        "a slope for each group, normals": build(tangents=fx.tangents.Normal()),
        "a slope for each group, signs": build(),
        "four signs": build(4),
        "eight signs": build(8),
        "eight, orthonormal over all of an example": build(
            8, fx.tangents.Orthonormal()
        ),
        "eight orthogonal signs": build(8, fx.tangents.Hadamard()),
        "sixteen signs": build(16),
        "sixteen orthogonal signs": build(16, fx.tangents.Hadamard()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    (x, labels), *rest = batches(options.batch, options.steps + 1)
    start = LocalMixer.named("M/1/16", key=jax.random.key(0))
    models = {
        "at the start": start,
        f"after {options.steps} steps": trained(start, rest),
    }
    print(
        f"M/1/16 on MNIST, batch {options.batch}, {options.draws} draws; {machine()}.\n"
    )
    print(f"| first layer, relative MSE | {' | '.join(models)} |")
    print("|---|" + "---:|" * len(models))
    for name in kinds(start):
        cells = [
            relative_mse(kinds(model)[name], model, x, labels, options.draws)
            for model in models.values()
        ]
        print(
            f"| {name} | "
            + " | ".join(f"{mean:.2f} ± {error:.2f}" for mean, error in cells)
            + " |",
            flush=True,
        )
    cosines = [squared_cosine(model, x, labels) for model in models.values()]
    print(
        "| cos² of feedback alignment's error | "
        + " | ".join(f"{cosine:.3f}" for cosine in cosines)
        + " |"
    )


if __name__ == "__main__":
    main()
