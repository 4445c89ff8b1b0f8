"""Differentially private training: each picture's few slopes are clipped, summed and noised.

A network with one hidden layer learns scikit-learn's digits. A step draws directions that all
pictures share and takes each picture's slopes along them in one pass, no gradient of any picture.
`fx.privacy.clip_and_noise` makes a private sum of them, `fx.replay` the step.

Batches are Poisson samples, as the accounting of epsilon assumes: each picture is in a step with
probability 1/8, whatever the others do. Shapes are static, so a sample lies in a batch of fixed
size with a mask. The sum is divided by the *expected* size, as the real one would tell of the data.
The batch has room for all but one of 1e15 runs; what does not fit is dropped and counted, and the
chance of it is paid for in delta.

Public: the keys of directions, the noised slopes, all parameters that follow from them, and how
many pictures there are. Not public: the keys of samples and noise, here from `os.urandom`, and the
loss's value, which is computed from data without noise; it is thrown away here. Not private either
is the choice of learning rate, clip and number of directions, which were found on these data. The
noise is float32 of a generator that is not made for cryptography: attacks on its bits are possible
(Mironov 2012), and nothing here defends against them. So this shows a method, and is no product.

    pip install 'forwax[lab,privacy]'
    python examples/private_digits.py [--secret 0]

With `--secret` a run can be repeated, and its noise can be subtracted. Epsilon is that of one run;
who publishes several pays for each. Expected, in about 20 s on two CPU cores, with a delta of 1e-4:

    no noise, no clipping    92 %
    clipped                  92 %
    noise 1                  92 %    epsilon 16.8
    noise 4                  90 %    epsilon 2.3
    noise 8                  87 %    epsilon 1.0
"""

import argparse
import functools
import math
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from scipy.stats import binom
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import forwax as fx

Parameters = dict[str, Array]
RATE = 1 / 8  # of sampling
DELTA = 1e-4
NO_ROOM = 1e-15  # the chance that any sample of a run is larger than its batch


class Way(NamedTuple):
    """How a run is made private.

    The rate is the best of seven to nine, on 360 training pictures that were held out for it.
    """

    learning_rate: float
    clip: float = 10.0
    noise_multiplier: float = 0.0


WAYS = {
    "no noise, no clipping": Way(0.07, clip=1e30),  # which clips nothing
    "clipped": Way(0.2),
    "noise 1": Way(0.2, noise_multiplier=1.0),
    "noise 4": Way(0.1, noise_multiplier=4.0),
    "noise 8": Way(0.07, noise_multiplier=8.0),
}


def digits() -> list[np.ndarray]:
    """Training images, test images [., 64] in [0, 1], training labels, test labels."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    return train_test_split(
        images, labels, test_size=360, stratify=labels, random_state=0
    )


def initial_parameters(key: Array, hidden: int = 32) -> Parameters:
    first, second = jax.random.split(key)
    return {
        "w1": jax.random.normal(first, (64, hidden)) * np.sqrt(2 / 64),
        "b1": jnp.zeros(hidden),
        "w2": jax.random.normal(second, (hidden, 10)) * np.sqrt(2 / hidden),
        "b2": jnp.zeros(10),
    }


def logits(parameters: Parameters, x: Array) -> Array:
    """Those of one picture [64]."""
    hidden = jax.nn.relu(x @ parameters["w1"] + parameters["b1"])
    return hidden @ parameters["w2"] + parameters["b2"]


def loss(parameters: Parameters, x: Array, y: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits(parameters, x), y)


@jax.jit
def accuracy(parameters: Parameters, x: Array, y: Array) -> Array:
    found = jax.vmap(logits, in_axes=(None, 0))(parameters, x)
    return jnp.mean(found.argmax(axis=1) == y)


def room(count: int, steps: int) -> int:
    """The size of a batch that all samples of a run fit in, but for a chance of `NO_ROOM`."""
    # The chance of more than 0, 1, ... `count` pictures, at any of the steps.
    chances = steps * binom.sf(np.arange(count + 1), count, RATE)
    return int(np.argmax(chances < NO_ROOM))


def sample(key: Array, count: int, size: int) -> tuple[Array, Array, Array]:
    """A Poisson sample: rows [size], which of them count [size], and how many are left out."""
    is_in = jax.random.bernoulli(key, RATE, (count,))
    rows = jnp.nonzero(is_in, size=size, fill_value=0)[0]
    drawn = jnp.sum(is_in)
    return rows, jnp.arange(size) < drawn, jnp.maximum(drawn - size, 0)


@functools.partial(jax.jit, static_argnames=("steps", "num_tangents"))
def train(
    public: Array,
    secret: Array,
    way: Way,
    x: Array,
    y: Array,
    *,
    steps: int,
    num_tangents: int,
) -> tuple[Parameters, Array]:
    """The parameters after all steps, and how many pictures found no room."""
    rule = fx.WeightPerturbation(num_tangents=num_tangents)
    axes = (None, 0, 0)
    take = fx.slopes(loss, rule, in_axes=axes, per_example=True)
    replay = fx.replay(loss, rule, in_axes=axes)
    size = room(len(x), steps)
    expected = round(RATE * len(x))

    def step(parameters: Parameters, number: Array) -> tuple[Parameters, Array]:
        directions = jax.random.fold_in(public, number)
        for_sample, for_noise = jax.random.split(jax.random.fold_in(secret, number))
        rows, is_in, left_out = sample(for_sample, len(x), size)
        _, each = take(directions, parameters, x[rows], y[rows])
        private = fx.privacy.clip_and_noise(
            each.scaled(is_in),
            way.clip,
            way.noise_multiplier,
            for_noise,
            batch_size=expected,
        )
        moved = replay(private, way.learning_rate, parameters, x[rows], y[rows])
        return moved, left_out

    start = initial_parameters(jax.random.fold_in(public, steps))
    parameters, left_out = lax.scan(step, start, jnp.arange(steps))
    return parameters, jnp.sum(left_out)


def epsilon(noise_multiplier: float, steps: int) -> float:
    """Epsilon at `DELTA`, for one picture more or less."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    if noise_multiplier == 0:
        return math.inf
    step = PoissonSampledDpEvent(RATE, GaussianDpEvent(noise_multiplier))
    accountant = PLDAccountant()
    accountant.compose(step, steps)
    found = float(accountant.get_epsilon(0.9 * DELTA))
    # Where a run is another one with a chance of p, delta grows by (1 + e^epsilon) p.
    spilled = (1 + math.exp(found)) * NO_ROOM
    return found if spilled <= 0.1 * DELTA else math.inf


def secret_key(secret: int | None, seed: int) -> Array:
    """A key that nobody knows; for a number one that everybody may find."""
    if secret is None:
        words = np.frombuffer(os.urandom(8), np.uint32)
        return jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")
    return jax.random.fold_in(jax.random.key(2**31 + secret), seed)


def main(
    seeds: int = 3, steps: int = 400, num_tangents: int = 8, secret: int | None = None
) -> dict[str, tuple[list[float], float]]:
    """Train in every way, print and return the test accuracies and epsilon."""
    train_x, test_x, train_y, test_y = map(jnp.asarray, digits())
    found = {}
    for name, way in WAYS.items():
        accuracies: list[float] = []
        left_out = 0
        for seed in range(seeds):
            # Each run has a secret of its own: the same noise in two could be subtracted.
            parameters, missed = train(
                jax.random.key(seed),
                secret_key(secret, seed),
                way,
                train_x,
                train_y,
                steps=steps,
                num_tangents=num_tangents,
            )
            accuracies.append(float(accuracy(parameters, test_x, test_y)))
            left_out += int(missed)
        spent = epsilon(way.noise_multiplier, steps)
        found[name] = accuracies, spent
        shown = ", ".join(f"{x:.1%}" for x in accuracies)
        print(
            f"{name:21}: test accuracy {np.mean(accuracies):.1%} ({shown}), "
            f"epsilon {spent:.2f} at delta {DELTA:g}, {left_out} left out"
        )
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--secret", type=int, help="for a run that can be repeated")
    main(**vars(parser.parse_args()))
