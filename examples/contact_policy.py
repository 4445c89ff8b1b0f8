"""Train a policy backwards through a contact solver that runs forwards only.

A puck slides on a tilted tray with eight sides, pushed by a network of 320 weights to a goal of its
own, most often at the rim. In each of 80 steps the impulses of all contacts are found by projected
Gauss-Seidel, which iterates until it has converged: a `lax.while_loop`, which `jax.grad` refuses.
`fx.enable_reverse` lets it through: four numbers go into the solver, of position and of velocity,
so that four slopes are its derivative, and the rest of the program goes backwards as ever.

Beside it stand the usual way out, a loop of 40 sweeps whether they are needed or not, and forward
gradients of the whole with 16 random tangents. Costs are those of a gradient over those of the
loss, in turn with each other, at the first policy and at the one that was trained.

    python examples/contact_policy.py --picture paths.png

Expected, in under a minute on two CPU cores; costs differ by a fifth from run to run:

                     cost / loss   trained   temporaries   below 0.2   0.05   at the end
    enable_reverse           2.5       2.1       0.9 MiB           4     18        0.018
    40 sweeps                6.5      13.7       3.9 MiB           4     18        0.018
    fx, 16 tangents          8.3       7.6       0.9 MiB           9      -        0.101
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import forwax as fx

STEP = 0.05  # seconds of a step of the simulation
SIZE = 0.1  # the puck's radius; that of the tray is 1
SIDES = 8
TILT = np.array([0.0, -0.5], np.float32)  # its pull, m/s²
SWEEPS = 40  # of the loop that is fixed
ANGLES = 2 * np.pi * np.arange(SIDES) / SIDES
NORMALS = -np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1).astype(np.float32)


class Puck(NamedTuple):
    """Position [2] in metres and velocity [2] in metres a second."""

    position: Array
    velocity: Array


def sweep(velocity: Array, impulses: Array, gaps: Array) -> tuple[Array, Array]:
    """One sweep of projected Gauss-Seidel: no side pulls, and none is left closing."""
    found = []
    for i, normal in enumerate(NORMALS):
        closing = jnp.sum(normal * velocity) + gaps[i] / STEP
        found.append(jnp.maximum(0, impulses[i] - closing))
        velocity = velocity + (found[i] - impulses[i]) * normal
    return velocity, jnp.stack(found)


def gaps_of(position: Array) -> Array:
    return jnp.sum(NORMALS * position[None], axis=1) + 1 - SIZE


def until_converged(puck: Puck) -> Array:
    """The velocity behind all contacts, to six digits."""

    def unfinished(state: tuple) -> Array:
        return state[2] > 1e-6

    def again(state: tuple) -> tuple:
        velocity, impulses, _ = state
        velocity, new = sweep(velocity, impulses, gaps)
        return velocity, new, jnp.max(jnp.abs(new - impulses))

    gaps = gaps_of(puck.position)
    start = puck.velocity, jnp.zeros(SIDES), jnp.inf
    return lax.while_loop(unfinished, again, start)[0]


def fixed(puck: Puck) -> Array:
    """The same in a fixed number of sweeps, which reverse mode takes."""
    gaps = gaps_of(puck.position)

    def again(state: tuple, _: None) -> tuple:
        return sweep(*state, gaps), None

    start = puck.velocity, jnp.zeros(SIDES)
    return lax.scan(again, start, None, length=SWEEPS)[0][0]


def simulate(solve: Callable[..., Array], puck: Puck, force: Array) -> Puck:
    """One step of a puck of one kilogram under a force [2]."""
    velocity = puck.velocity + STEP * (force + TILT - 0.5 * puck.velocity)
    velocity = solve(Puck(puck.position, velocity))
    return Puck(puck.position + STEP * velocity, velocity)


Simulation = Callable[[Puck, Array], Puck]
forwards_only = functools.partial(simulate, until_converged)
both_ways = functools.partial(simulate, fx.enable_reverse(until_converged))
by_fixed_sweeps = functools.partial(simulate, fixed)


def initial_policy(key: Array) -> dict[str, Array]:
    """7 inputs, 32 hidden neurons, 2 forces: 320 weights."""
    first, second = jax.random.split(key)
    return {
        "first": jax.random.normal(first, (7, 32)) * 7**-0.5,
        "bias": jnp.zeros(32),
        "second": jax.random.normal(second, (32, 2)) * 0.1,
    }


def push(policy: dict[str, Array], puck: Puck, goal: Array, now: Array) -> Array:
    """The force [2] of a policy at a time from 0 to 1."""
    seen = [puck.position, puck.velocity, goal - puck.position, now[None]]
    hidden = jnp.tanh(jnp.concatenate(seen) @ policy["first"] + policy["bias"])
    return 2 * jnp.tanh(hidden @ policy["second"])


def path(
    policy: dict[str, Array],
    start: Puck,
    goal: Array,
    step: Simulation,
    num_steps: int,
) -> Puck:
    """Positions and velocities [num_steps, 2] of one puck."""

    def advance(puck: Puck, now: Array) -> tuple[Puck, Puck]:
        puck = step(puck, push(policy, puck, goal, now))
        return puck, puck

    return lax.scan(advance, start, jnp.linspace(0.0, 1.0, num_steps))[1]


def loss(
    policy: dict[str, Array],
    starts: Puck,
    goals: Array,
    step: Simulation,
    num_steps: int,
) -> Array:
    """How far from their goals pucks are in the last fifth of their way, and how fast."""
    walk = jax.vmap(path, (None, 0, 0, None, None))
    paths = walk(policy, starts, goals, step, num_steps)
    last = num_steps // 5
    away = paths.position[:, -last:] - goals[:, None]
    speed = paths.velocity[:, -last:]
    return jnp.mean(jnp.sum(away**2 + 0.1 * speed**2, axis=-1))


def draw_games(key: Array, count: int) -> tuple[Puck, Array]:
    """Pucks [count] in the lower left, at any speed, and goals [count, 2] at the upper right."""
    at, speed, to = jax.random.split(key, 3)

    def on_tray(key: Array, least: float, most: float, nearest: float) -> Array:
        angle, radius = jax.random.uniform(key, (2, count))
        angle = jnp.radians(least + (most - least) * angle)
        where = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
        return where * (nearest + (0.85 - nearest) * radius[:, None])

    position = on_tray(at, 150, 280, 0.3)
    velocity = 0.3 * jax.random.normal(speed, (count, 2))
    return Puck(position, velocity), on_tray(to, -20, 110, 0.7)


def gradients(games: tuple[Puck, Array], num_steps: int) -> dict[str, Callable]:
    """Ways from a key and a policy to the loss and its gradient."""

    def reverse(step: Simulation) -> Callable:
        def whole(key: Array, policy: dict[str, Array]) -> Array:
            return loss(policy, *games, step, num_steps)

        return jax.jit(jax.value_and_grad(whole, argnums=1))

    rule = fx.WeightPerturbation(num_tangents=16)
    forward = fx.value_and_grad(
        lambda policy: loss(policy, *games, forwards_only, num_steps), rule
    )
    return {
        "enable_reverse": reverse(both_ways),
        f"{SWEEPS} sweeps": reverse(by_fixed_sweeps),
        "fx, 16 tangents": jax.jit(forward),
    }


def train(
    gradient: Callable, policy: dict[str, Array], steps: int
) -> tuple[dict[str, Array], list[float]]:
    """Adam; the policy and the loss before each step."""
    optimiser = optax.adam(0.03)
    state = optimiser.init(policy)
    losses = []
    for i in range(steps):
        value, grads = gradient(jax.random.key(i), policy)
        updates, state = optimiser.update(grads, state)
        policy = optax.apply_updates(policy, updates)
        losses.append(float(value))
    return policy, losses


def costs(
    functions: dict[str, Callable], policy: dict[str, Array], rounds: int
) -> dict[str, float]:
    """Seconds of each function: medians of runs in turn, so that a busy moment hits all."""
    key = jax.random.key(0)
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(key, policy))
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(found)) for name, found in seconds.items()}


def first_below(losses: list[float], bound: float) -> str:
    """After how many steps the loss was below a bound."""
    below = np.flatnonzero(np.array(losses) < bound)
    return str(below[0]) if len(below) else "-"


def draw_paths(
    policies: dict[str, dict[str, Array]], games: tuple[Puck, Array], num_steps: int
):
    """The tray with the paths of all pucks to their goals, one panel for each policy."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(policies), figsize=(8, 4))
    corners = ANGLES + np.pi / SIDES
    rim = np.stack([np.cos(corners), np.sin(corners)]) / np.cos(np.pi / SIDES)
    for panel, (name, policy) in zip(panels, policies.items(), strict=True):
        walk = jax.vmap(path, (None, 0, 0, None, None))
        positions = walk(policy, *games, forwards_only, num_steps).position
        panel.fill(*rim, facecolor="#f4f1ea", edgecolor="#444444")
        panel.plot(*np.moveaxis(positions, -1, 0).swapaxes(1, 2), lw=0.6, c="#4477aa")
        panel.plot(*games[0].position.T, ".", color="#4477aa", label="starts")
        panel.plot(*games[1].T, "x", color="#cc3311", label="goals")
        panel.set(title=name, aspect="equal", xticks=[], yticks=[])
        panel.set_frame_on(False)
    marks, names = panels[0].get_legend_handles_labels()
    figure.legend(marks, names, frameon=False, loc="lower center", ncols=2)
    return figure


def main(
    steps: int = 60,
    count: int = 32,
    num_steps: int = 80,
    rounds: int = 20,
    picture: str | None = None,
) -> dict[str, list[float]]:
    """Print the refusal and the comparison; the losses of each way."""
    games = draw_games(jax.random.key(1), count)
    policy = initial_policy(jax.random.key(2))

    def plain(key: Array, policy: dict[str, Array]) -> Array:
        return loss(policy, *games, forwards_only, num_steps)

    try:
        jax.grad(plain, argnums=1)(jax.random.key(0), policy)
    except ValueError as error:
        print("jax.grad:", str(error).split(". ")[0])

    ways = gradients(games, num_steps)
    losses, trained = {}, {}
    for name, gradient in ways.items():
        trained[name], losses[name] = train(gradient, policy, steps)
    functions = {"loss": jax.jit(plain), **ways}
    costs(functions, policy, 1)  # which compiles
    before = costs(functions, policy, rounds)
    after = costs(functions, trained["enable_reverse"], rounds)
    print(f"{'':17}cost / loss   trained   temporaries   below 0.2   0.05   at the end")
    for name, gradient in ways.items():
        lowered = gradient.lower(jax.random.key(0), policy)
        held = lowered.compile().memory_analysis().temp_size_in_bytes
        print(
            f"{name:17}{before[name] / before['loss']:11.1f}"
            f"{after[name] / after['loss']:10.1f}{held / 2**20:10.1f} MiB"
            f"{first_below(losses[name], 0.2):>12}{first_below(losses[name], 0.05):>7}"
            f"{losses[name][-1]:13.3f}"
        )
    if picture is not None:
        policies = {"before": policy, "after": trained["enable_reverse"]}
        draw_paths(policies, games, num_steps).savefig(picture, dpi=150)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--picture", help="a file to draw the pucks' paths to")
    main(**vars(parser.parse_args()))
