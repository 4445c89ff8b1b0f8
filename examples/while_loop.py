"""Fit a simulation that ends in a `while_loop`, which reverse mode rejects.

A ball is thrown, dragged along by a wind, and flies until it hits the ground: a `lax.while_loop`.
From where and when 24 throws landed we find the drag, the gravity and the wind. `jax.grad` refuses;
what pushes forwards goes through: `jax.jacfwd`, `fx.Exact()`, Levenberg-Marquardt of optimistix.

Three constants and residuals at hand are a case for Levenberg-Marquardt, and no rule of forwax is
better here. `fx.GaussNewton` pushes all directions where there are as few as three, and is the same
method then; see examples/tomography.py for where it is not. A gradient along one random direction
with Adam throws away that the loss is a sum of squares, and pays for it a hundredfold.

    pip install 'forwax[lab,simulation]'
    python examples/while_loop.py

Expected, in about 10 s on two CPU cores, most of it compilation:

                            steps   runs   largest error
    optimistix' LM              7     49           5e-08
    fx.GaussNewton             11     88           5e-08
    Adam, one direction      2000   6000           3e-06
    GaussNewton, as many runs   6     48           4e-03
    Adam, as many runs         16     48           9e-01
"""

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import optimistix
from jax import Array, lax

import forwax as fx

World = dict[str, Array]
STEP = 0.02  # seconds of a step of the simulation
TRUTH = {"drag": 0.3, "gravity": 9.81, "wind": -4.0}  # 1/s, m/s², m/s
GUESS = {"drag": 0.1, "gravity": 7.0, "wind": 0.0}


def to_parameters(world: dict[str, float]) -> World:
    """What is trained: logarithms of what must stay positive, and all of about the same size."""
    return {
        "drag": jnp.log(world["drag"]),
        "gravity": jnp.log(world["gravity"]),
        "wind": jnp.asarray(world["wind"] / 10),
    }


def to_world(parameters: World) -> World:
    """The inverse of `to_parameters`."""
    return {
        "drag": jnp.exp(parameters["drag"]),
        "gravity": jnp.exp(parameters["gravity"]),
        "wind": 10 * parameters["wind"],
    }


def land(parameters: World, velocity: Array) -> Array:
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


def residuals(parameters: World, velocities: Array, landings: Array) -> Array:
    return land_all(parameters, velocities) - landings


def loss(parameters: World, velocities: Array, landings: Array) -> Array:
    return jnp.mean(residuals(parameters, velocities, landings) ** 2)


def refusal(*args) -> str:
    """The first sentence of what `jax.grad` has to say."""
    try:
        jax.grad(loss)(*args)
    except ValueError as error:
        return str(error).split(". ")[0]
    raise AssertionError("jax.grad was expected to refuse a while_loop")


class Fit(NamedTuple):
    """What a method found, after how many steps, and runs of the simulation.

    A pass with k directions counts as 1 + 2k runs, and one that judges a step as another.
    """

    parameters: World
    steps: int
    runs: int


def optimistix_lm(guess: World, *data: Array) -> Fit:
    """Until steps and residuals change by less than a millionth."""
    solver = optimistix.LevenbergMarquardt(rtol=1e-6, atol=1e-6)
    found = optimistix.least_squares(
        lambda parameters, data: residuals(parameters, *data), solver, guess, args=data
    )
    steps = int(found.stats["num_steps"])
    return Fit(found.value, steps, steps * (1 + 2 * 3))


def gauss_newton(guess: World, *data: Array, most_steps: int = 50) -> Fit:
    """Until nothing is to be gained beyond rounding."""
    solver = fx.GaussNewton().init(guess)
    step = jax.jit(lambda key, p, solver: solver.step(residuals)(key, p, *data))
    parameters, steps = guess, 0
    while steps < most_steps and (steps == 0 or jnp.isfinite(solver.ratio)):
        key = jax.random.fold_in(jax.random.key(0), steps)
        _, parameters, solver = step(key, parameters, solver)
        steps += 1
    return Fit(parameters, steps, steps * (2 + 2 * 3))


def adam(guess: World, *data: Array, steps: int) -> Fit:
    """One random direction a step, and a learning rate that falls."""
    optimiser = optax.adam(optax.cosine_decay_schedule(0.1, steps))

    def step(carry: tuple, key: Array) -> tuple[tuple, None]:
        parameters, state = carry
        grads = fx.grad(loss, fx.WeightPerturbation())(key, parameters, *data)
        updates, state = optimiser.update(grads, state)
        return (optax.apply_updates(parameters, updates), state), None

    keys = jax.random.split(jax.random.key(0), steps)
    train = jax.jit(lambda carry: lax.scan(step, carry, keys))
    (parameters, _), _ = train((guess, optimiser.init(guess)))
    return Fit(parameters, steps, steps * (1 + 2))


def main(steps: int = 2000, count: int = 24) -> dict[str, Fit]:
    """Print the refusal, the gradient by two ways, and the fits, which it returns."""
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

    rows: dict[str, Fit] = {}
    print(f"{'':28}steps   runs   largest error   CPU s with compilation")

    def compare(name: str, method: Callable[..., Fit], *args, **kwargs) -> None:
        begin = time.process_time()
        fit = jax.block_until_ready(method(guess, *data, *args, **kwargs))
        seconds = time.process_time() - begin
        world = to_world(fit.parameters)
        worst = max(abs(float(world[k]) / truth - 1) for k, truth in TRUTH.items())
        cells = f"{fit.steps:5} {fit.runs:6} {worst:15.0e} {seconds:24.1f}"
        print(f"{name:28}{cells}")
        rows[name] = fit

    compare("optimistix' LM", optimistix_lm)
    compare("fx.GaussNewton", gauss_newton)
    compare("Adam, one direction", adam, steps=steps)
    budget = rows["optimistix' LM"].runs
    compare("GaussNewton, as many runs", gauss_newton, most_steps=budget // (2 + 2 * 3))
    compare("Adam, as many runs", adam, steps=budget // (1 + 2))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Fit a simulation that ends in a while_loop."
    )
    parser.add_argument("--steps", type=int, default=2000, help="steps of Adam")
    main(parser.parse_args().steps)
