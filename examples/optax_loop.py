"""The smallest honest training loop: optax, a plain pytree, a fresh key for every step.

A network with one hidden layer learns scikit-learn's digits by forward gradients. Every epoch goes
through all batches; the accuracy is that on 360 pictures that training never sees.

    python examples/optax_loop.py

Expected: about 94 % in about 10 s on two CPU cores.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import forwax as fx

Parameters = dict[str, Array]


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
    hidden = jax.nn.relu(x @ parameters["w1"] + parameters["b1"][None])
    return hidden @ parameters["w2"] + parameters["b2"][None]


def loss(parameters: Parameters, x: Array, y: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(
        logits(parameters, x), y
    ).mean()


@jax.jit
def accuracy(parameters: Parameters, x: Array, y: Array) -> Array:
    return jnp.mean(logits(parameters, x).argmax(axis=1) == y)


def main(epochs: int = 60, num_tangents: int = 16, batch: int = 64) -> float:
    """Train, print the loss and the test accuracy of some epochs, and return the last accuracy."""
    train_x, test_x, train_y, test_y = digits()
    steps = len(train_x) // batch
    rule = fx.WeightPerturbation(num_tangents=num_tangents)
    optimiser = optax.adam(optax.cosine_decay_schedule(0.03, epochs * steps))

    @jax.jit
    def step(
        key: Array, parameters: Parameters, state: optax.OptState, x: Array, y: Array
    ) -> tuple:
        value, grads = fx.value_and_grad(loss, rule)(key, parameters, x, y)
        updates, state = optimiser.update(grads, state, parameters)
        return value, optax.apply_updates(parameters, updates), state

    key, shuffle = jax.random.key(0), np.random.default_rng(0)
    parameters = initial_parameters(jax.random.key(1))
    state = optimiser.init(parameters)
    for epoch in range(1, epochs + 1):
        losses = []
        for rows in shuffle.permutation(len(train_x))[: steps * batch].reshape(
            steps, batch
        ):
            key, step_key = jax.random.split(key)
            value, parameters, state = step(
                step_key, parameters, state, train_x[rows], train_y[rows]
            )
            losses.append(value)
        if epoch % 10 == 0 or epoch == epochs:
            tested = float(accuracy(parameters, test_x, test_y))
            print(
                f"epoch {epoch:3}: mean loss {np.mean(losses):.3f}, test accuracy {tested:.1%}"
            )
    return tested


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Train on digits with optax and forward gradients."
    )
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--num-tangents", type=int, default=16)
    arguments = parser.parse_args()
    main(arguments.epochs, arguments.num_tangents)
