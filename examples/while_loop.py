"""Fit a simulation that ends in a `while_loop`, which reverse mode rejects.

A ball is thrown, dragged along by a wind, and flies until it hits the ground: a `lax.while_loop`.
From where and when 24 throws landed we find the drag, the gravity and the wind. `jax.grad` refuses;
a forward gradient goes through.

With three parameters `jax.jacfwd` is the equal of any rule here, since three slopes are the whole
gradient; the script shows that `fx.Exact()` gives the same numbers. Random tangents pay when the
parameters are many and a pass is dear.

    python examples/while_loop.py

Expected: all three within 1 % of the truth, in about 10 s on two CPU cores, most of it compilation.
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

import forwax as fx

STEP = 0.02  # seconds of a step of the simulation
TRUTH = {"drag": 0.3, "gravity": 9.81, "wind": -4.0}  # 1/s, m/s², m/s
GUESS = {"drag": 0.1, "gravity": 7.0, "wind": 0.0}


def to_parameters(world: dict[str, float]) -> dict[str, Array]:
    """What is trained: logarithms of what must stay positive, and all of about the same size."""
    return {
        "drag": jnp.log(world["drag"]),
        "gravity": jnp.log(world["gravity"]),
        "wind": jnp.asarray(world["wind"] / 10),
    }


def to_world(parameters: dict[str, Array]) -> dict[str, Array]:
    """The inverse of `to_parameters`."""
    return {
        "drag": jnp.exp(parameters["drag"]),
        "gravity": jnp.exp(parameters["gravity"]),
        "wind": 10 * parameters["wind"],
    }


def land(parameters: dict[str, Array], velocity: Array) -> Array:
    """Fly from the origin to the ground; where [m] and when [s] the ball lands, shape [2]."""
    world = to_world(parameters)
    wind = jnp.stack([world["wind"], jnp.zeros(())])
    pull = jnp.stack([jnp.zeros(()), -world["gravity"]])

    def flying(state: tuple[Array, Array, Array]) -> Array:
        position, _, time = state
        return (position[1] > 0) | (time == 0)

    def fly(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        position, velocity, time = state
        acceleration = pull - world["drag"] * (velocity - wind)
        return position + STEP * velocity, velocity + STEP * acceleration, time + STEP

    position, velocity, time = lax.while_loop(
        flying, fly, (jnp.zeros(2), velocity, jnp.zeros(()))
    )
    overshoot = (
        position[1] / velocity[1]
    )  # back to the ground, so that the answer does not jump with the number of steps
    return jnp.stack([position[0] - overshoot * velocity[0], time - overshoot])


def throws(count: int) -> Array:
    """Velocities [count, 2]: all angles, with and against the wind, two speeds in turn."""
    angle = jnp.linspace(0.4, 2.7, count)
    speed = jnp.where(jnp.arange(count) % 2 == 0, 15.0, 25.0)
    return jnp.stack([speed * jnp.cos(angle), speed * jnp.sin(angle)], axis=1)


land_all = jax.vmap(land, in_axes=(None, 0))


def loss(parameters: dict[str, Array], velocities: Array, landings: Array) -> Array:
    return jnp.mean((land_all(parameters, velocities) - landings) ** 2)


def refusal(*args) -> str:
    """The first sentence of what `jax.grad` has to say."""
    try:
        jax.grad(loss)(*args)
    except ValueError as error:
        return str(error).split(". ")[0]
    raise AssertionError("jax.grad was expected to refuse a while_loop")


def fit(
    rule: fx.Rule, parameters: dict[str, Array], *data: Array, steps: int
) -> tuple[dict[str, Array], Array]:
    """Train with Adam and a falling learning rate; returns the parameters and the last loss."""
    optimiser = optax.adam(optax.cosine_decay_schedule(0.1, steps))

    def step(carry: tuple, key: Array) -> tuple[tuple, Array]:
        parameters, state = carry
        value, grads = fx.value_and_grad(loss, rule)(key, parameters, *data)
        updates, state = optimiser.update(grads, state)
        return (optax.apply_updates(parameters, updates), state), value

    keys = jax.random.split(jax.random.key(0), steps)
    train = jax.jit(lambda carry: lax.scan(step, carry, keys))
    (parameters, _), values = train((parameters, optimiser.init(parameters)))
    return parameters, values[-1]


def main(steps: int = 2000, count: int = 24) -> dict[str, float]:
    """Print the refusal, the exact gradient by two ways, and the fit; returns what was fitted."""
    guess = to_parameters(GUESS)
    data = throws(count), land_all(to_parameters(TRUTH), throws(count))

    print("jax.grad:   ", refusal(guess, *data))
    by_jacfwd = jax.jacfwd(loss)(guess, *data)
    by_exact = fx.grad(loss, fx.Exact())(jax.random.key(0), guess, *data)
    for name, gradient in {"jax.jacfwd: ": by_jacfwd, "fx.Exact(): ": by_exact}.items():
        print(
            name,
            ", ".join(f"{leaf} {float(value):.3f}" for leaf, value in gradient.items()),
        )

    found, value = fit(fx.WeightPerturbation(), guess, *data, steps=steps)
    world = {name: float(value) for name, value in to_world(found).items()}
    print(f"{steps} steps, one random tangent each: loss {float(value):.1e}")
    for name, truth in TRUTH.items():
        print(
            f"  {name:8} guess {GUESS[name]:6.3f}   found {world[name]:6.3f}   truth {truth:6.3f}"
        )
    return world


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Fit a simulation that ends in a while_loop."
    )
    parser.add_argument(
        "--steps", type=int, default=2000, help="steps of the optimiser"
    )
    main(parser.parse_args().steps)
