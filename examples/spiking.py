"""Train a spiking network whose spikes have a surrogate gradient, without transporting a weight.

Two layers of leaky integrate-and-fire neurons hear 30 spike trains over 40 steps; each class fires
in an order of its own. A spike has no derivative, so that it is a `jax.custom_vjp` with a surrogate
behind it, as in spyx or snnTorch. Rules that push tangents cannot use such a rule;
`fx.FeedbackAlignment` goes forward as the network is and back by the surrogate, and where backprop
would cross a layer by its weights it crosses by fixed random matrices.

    python examples/spiking.py

Expected: 83 % of new trains told right (25 % is chance), in about 20 s on two CPU cores. Backprop
by the same surrogate reaches 92 % in as many steps, and the readout alone, above layers that stay
as they were drawn, 44 %.
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

import forwax as fx

INPUTS, HIDDEN, CLASSES, STEPS = 30, 64, 4, 40
DECAY = 0.9


@jax.custom_vjp
def spike(potential: Array) -> Array:
    """1 where the potential is above the threshold, else 0."""
    return (potential > 0).astype(potential.dtype)


def surrogate(potential: Array, error: Array) -> tuple[Array]:
    """The derivative of a fast sigmoid in place of the step's, which is 0 almost everywhere."""
    return (error / (1 + 5 * jnp.abs(potential)) ** 2,)


spike.defvjp(lambda potential: (spike(potential), potential), surrogate)


def fire(potential: Array, current: Array) -> tuple[Array, Array]:
    """A step of leaky neurons: the potential that is left, and the spikes."""
    potential = DECAY * potential + current
    spikes = spike(potential - 1)
    return potential - spikes, spikes


def loss(params: dict[str, Array], trains: Array, label: Array) -> tuple[Array, Array]:
    """Cross-entropy of one example and its scores, from spike trains [steps, inputs]."""

    def step(potentials: tuple[Array, Array], train: Array) -> tuple[tuple, Array]:
        first, second = potentials
        first, spikes = fire(first, train @ params["first"])
        second, spikes = fire(second, spikes @ params["second"])
        return (first, second), spikes

    silent = jnp.zeros(HIDDEN)
    _, spikes = lax.scan(step, (silent, silent), trains)
    scores = jnp.mean(spikes, axis=0) @ params["readout"]
    return -jax.nn.log_softmax(scores)[label], scores


def draw(key: Array, count: int) -> tuple[Array, Array]:
    """Trains [count, steps, inputs] of 0 and 1, and their labels."""
    label_key, train_key = jax.random.split(key)
    labels = jax.random.randint(label_key, (count,), 0, CLASSES)
    # Each class has an order in which the inputs are busy.
    orders = jnp.stack(
        [jax.random.permutation(jax.random.key(i), INPUTS) for i in range(CLASSES)]
    )
    busy_at = orders[labels] * (STEPS / INPUTS)  # [count, inputs]
    distance = jnp.arange(STEPS)[None, :, None] - busy_at[:, None, :]
    rates = 0.1 + 0.2 * jnp.exp(-((distance / 4) ** 2))
    trains = jax.random.bernoulli(train_key, rates)
    return trains.astype(jnp.float32), labels


def main(steps: int = 300, batch: int = 64) -> float:
    """Train, print the accuracy before and after, and return the last."""

    def normal(seed: int, *shape: int) -> Array:
        return jax.random.normal(jax.random.key(seed), shape)

    params = {
        "first": normal(0, INPUTS, HIDDEN) * INPUTS**-0.5,
        "second": normal(1, HIDDEN, HIDDEN) * 2 * HIDDEN**-0.5,
        "readout": normal(2, HIDDEN, CLASSES) * HIDDEN**-0.5,
    }
    rule = fx.FeedbackAlignment(fx.random_feedback(jax.random.key(3), params))
    value_and_grad = fx.value_and_grad(loss, rule, has_aux=True, in_axes=(None, 0, 0))
    optimizer = optax.adam(0.01)

    @jax.jit
    def step(params, state, key):
        (value, _), grads = value_and_grad(key, params, *draw(key, batch))
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    @jax.jit
    def accuracy(params):
        trains, labels = draw(jax.random.key(4), 512)
        _, scores = jax.vmap(loss, (None, 0, 0))(params, trains, labels)
        return jnp.mean(jnp.argmax(scores, axis=1) == labels)

    print(f"before: {float(accuracy(params)):.0%} told right")
    state = optimizer.init(params)
    for i in range(steps):
        params, state, _ = step(params, state, jax.random.fold_in(jax.random.key(5), i))
    reached = float(accuracy(params))
    print(f"after {steps} steps: {reached:.0%}")
    return reached


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    main(**vars(parser.parse_args()))
