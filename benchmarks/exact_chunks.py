"""What `fx.Exact` costs over its loss in chunks of several sizes, on four simulations.

    OPENBLAS_NUM_THREADS=1 python benchmarks/exact_chunks.py [--simulations contact arm]

The contact policy, the tomography (256 cells) and the throws are those of examples/; the arm is two
links that strike a ball on a floor in MuJoCo's MJX, 80 steps, 20 torques, and needs `pip install
mujoco==3.17.0 mujoco-mjx==3.17.0`. Prints a table of CPU time over that of the loss, medians of
rounds in turn. Run it once with OPENBLAS_NUM_THREADS=1 and once without.
"""

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import forwax as fx
from timing import machine

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
import contact_policy
import tomography
import while_loop

ALL = 0
"""A size that stands for all basis vectors at once."""
ARM = """
<mujoco>
  <option timestep="0.01" iterations="10" ls_iterations="6"/>
  <worldbody>
    <geom type="plane" size="3 3 .1"/>
    <body pos="0 0 .6">
      <joint name="a" type="hinge" axis="0 1 0" damping=".1"/>
      <geom type="capsule" fromto="0 0 0 .3 0 0" size=".03" contype="0" conaffinity="0"/>
      <body pos=".3 0 0">
        <joint name="b" type="hinge" axis="0 1 0" damping=".1"/>
        <geom type="capsule" fromto="0 0 0 .3 0 -.2" size=".03"/>
      </body>
    </body>
    <body pos=".65 0 .1"><freejoint/><geom type="sphere" size=".1" mass=".2"/></body>
  </worldbody>
  <actuator><motor joint="a" gear="5"/><motor joint="b" gear="5"/></actuator>
</mujoco>
"""

Simulation = tuple[Callable[[Any], Array], Any]


def contact() -> Simulation:
    games = contact_policy.draw_games(jax.random.key(1), 32)
    policy = contact_policy.initial_policy(jax.random.key(2))
    step = contact_policy.forwards_only
    return lambda policy: contact_policy.loss(policy, *games, step, 80), policy


def travel_times() -> Simulation:
    survey = tomography.Survey(16)
    observed = survey.observe(survey.truth)
    white = 0.1 * jax.random.normal(jax.random.key(0), (16, 16))
    return lambda white: survey.loss(white, observed), white


def throws() -> Simulation:
    velocities = while_loop.throws(24)
    truth = while_loop.to_parameters(while_loop.TRUTH)
    landings = while_loop.land_all(truth, velocities)
    guess = while_loop.to_parameters(while_loop.GUESS)
    return lambda p: while_loop.loss(p, velocities, landings), guess


def arm() -> Simulation:
    import mujoco
    from mujoco import mjx

    model = mujoco.MjModel.from_xml_string(ARM)
    on_device = mjx.put_model(model)
    start = mjx.make_data(on_device)

    def loss(torques: Array) -> Array:
        def step(data: Any, number: Array) -> tuple[Any, None]:
            now = data.replace(ctrl=torques.reshape(10, 2)[number // 8])
            return mjx.step(on_device, now), None

        data, _ = lax.scan(step, start, jnp.arange(80))
        return (data.qpos[2] - 1.5) ** 2 + 1e-3 * jnp.sum(torques**2)

    return loss, 0.3 * jax.random.normal(jax.random.key(0), (20,))


SIMULATIONS = {
    "contact": contact,
    "tomography": travel_times,
    "throws": throws,
    "arm": arm,
}


def cpu_seconds(call: Callable[[], Any], repeats: int) -> float:
    """CPU seconds of all threads, for each of some calls."""
    start = time.process_time()
    for _ in range(repeats):
        jax.block_until_ready(call())
    return (time.process_time() - start) / repeats


def row(name: str, sizes: list[int], rounds: int) -> str:
    """Medians of CPU time over that of the loss."""
    loss, params = SIMULATIONS[name]()
    n = sum(x.size for x in jax.tree.leaves(params))
    fitting = [size for size in sizes if size < n]
    calls = {"loss": functools.partial(jax.jit(loss), params)}
    for size in fitting:
        gradient = jax.jit(fx.grad(loss, fx.Exact(chunk_size=size or None)))
        calls[str(size)] = functools.partial(gradient, jax.random.key(0), params)
    for call in calls.values():
        jax.block_until_ready(call())  # which compiles
    seconds = {each: [] for each in calls}
    for _ in range(rounds):
        for each, call in calls.items():
            seconds[each].append(cpu_seconds(call, 10 if each == "loss" else 1))
    medians = {each: float(np.median(found)) for each, found in seconds.items()}
    cells = [
        f"{medians[str(size)] / medians['loss']:.1f}" if size in fitting else ""
        for size in sizes
    ]
    alone = f"{1000 * medians['loss']:.2g} ms"
    return f"| {name}, n = {n} | {alone} | {' | '.join(cells)} |"


def main(simulations: list[str], sizes: list[int], rounds: int) -> None:
    print(f"{machine()}; {os.cpu_count()} cores")
    print(f"OPENBLAS_NUM_THREADS={os.environ.get('OPENBLAS_NUM_THREADS', 'not set')}")
    names = [str(size or "all") for size in sizes]
    print(f"| simulation | loss | {' | '.join(names)} |")
    print("|---|---:|" + "---:|" * len(names))
    for name in simulations:
        print(row(name, sizes, rounds), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--simulations", nargs="+", choices=list(SIMULATIONS), default=list(SIMULATIONS)
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=int,
        default=[7, 16, 32, 56, 64, ALL],
        help="0 for all",
    )
    parser.add_argument("--rounds", type=int, default=5)
    main(**vars(parser.parse_args()))
