"""Relative mean squared error of weight and activity noise on four networks.

`python benchmarks/variance.py`.

At the initial parameters, on one batch of scikit-learn's digits (enlarged to 16×16), with one
tangent of signs: the law of weight noise, n - 1, beside what activity noise measures with one slope
for the batch, one per example, and one per example, patch and group where the network has local
losses.
"""

import argparse
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import forwax as fx
from forwax.lab.data import load
from forwax.models import MLP, ConvNet, LocalMixer, VisionTransformer, local_losses
from timing import machine

SHAPE, CLASSES, EACH = (16, 16, 1), 10, (None, 0, 0)


def networks(key):
    """Models of comparable size; the mixer twice, for it has local losses too."""
    mixer = LocalMixer(
        SHAPE, CLASSES, blocks=2, patches=4, channels=64, groups=8, key=key
    )
    return {
        "MLP 256-128-128-10": (MLP(256, (128, 128), CLASSES, key=key), cross_entropy),
        "CNN, 4 convolutions of 16": (
            ConvNet(SHAPE, CLASSES, channels=16, dense=64, key=key),
            cross_entropy,
        ),
        "ViT, 2 blocks, 16 tokens of 32": (
            VisionTransformer(
                SHAPE, CLASSES, blocks=2, patches=4, channels=32, key=key
            ),
            cross_entropy,
        ),
        "Mixer, 2 blocks, 16 tokens of 64": (
            mixer,
            functools.partial(local_losses, losses="global"),
        ),
        "the same, greedy local losses": (mixer, local_losses),
    }


def cross_entropy(model, x, y):
    logits = model(x)
    return jax.nn.logsumexp(logits) - logits[y]


def batch(size):
    data = load("digits")
    images = np.kron(data.train_images[:size, :, :, 0], np.ones((2, 2)))[..., None]
    return jnp.asarray(images / 8 - 1, jnp.float32), jnp.asarray(
        data.train_labels[:size], jnp.int32
    )


def measure(rule, loss, model, x, y, draws):
    """E|ĝ - g|² / |g|² of all parameters and the first layer's weights, with standard errors."""
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def whole(params, x, y):
        return loss(eqx.combine(params, static), x, y)

    exact = jax.jit(fx.grad(whole, fx.Backprop(), in_axes=EACH))(
        jax.random.key(0), params, x, y
    )
    estimate = fx.grad(whole, rule, in_axes=EACH)

    @jax.jit
    def errors(key):
        grads = estimate(key, params, x, y)
        return jnp.stack(
            [
                jnp.sum((a - b) ** 2)
                for a, b in zip(*map(jax.tree.leaves, (grads, exact)), strict=True)
            ]
        )

    norms = np.array([float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(exact)])
    found = np.array(
        [errors(key) for key in jax.random.split(jax.random.key(1), draws)]
    )
    both = np.stack([found.sum(1) / norms.sum(), found[:, 0] / norms[0]])
    return both.mean(1), both.std(1) / draws**0.5, norms


def main(draws: int, size: int) -> None:
    print(f"{machine()}; {draws} draws, {size} examples\n")
    print(
        "| network | parameters n | weight noise | activity noise, one slope | a slope per example "
        "|",
        end="",
    )
    print(" first layer: weight noise | one slope | a slope per example |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    x, y = batch(size)
    for name, (model, loss) in networks(jax.random.key(0)).items():
        sizes = [
            leaf.size
            for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
        ]
        shared, _, _ = measure(
            fx.ActivityPerturbation(memory="shared"), loss, model, x, y, draws
        )
        own, error, norms = measure(fx.ActivityPerturbation(), loss, model, x, y, draws)
        whole = fx.WeightPerturbation().relative_mse(sum(sizes))
        first = sizes[0] * norms.sum() / norms[0] - 1  # the law of one leaf
        print(
            f"| {name} | {sum(sizes):,} | {whole:,.0f} | {shared[0]:,.0f} | {own[0]:,.1f} ± "
            f"{error[0]:.1f} |",
            end="",
        )
        print(
            f" {first:,.0f} | {shared[1]:,.0f} | {own[1]:,.1f} ± {error[1]:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--examples", type=int, default=64)
    arguments = parser.parse_args()
    main(arguments.draws, arguments.examples)
