"""Find the torques behind a recorded swing: an arm that strikes a ball, in MuJoCo's MJX.

Two links fall and strike a ball on a floor; 20 torques move them. From the angles of both joints
and the ball's place every 50 ms we find the torques. MJX solves for contact forces in a
`lax.while_loop`, so that `jax.grad` refuses; slopes go through. The contacts are soft: their force
begins at zero (`solimp`), so that the loss is smooth, and its gradient is compared with central
differences, in float64.

`fx.GaussNewton` pushes all 20 directions here, which is Levenberg-Marquardt. Beside it stands Adam
on the gradient of `fx.Exact()`. `jax.jacfwd` gives the same gradient; both push 20 directions.

    pip install 'forwax[lab,mjx]'
    OPENBLAS_NUM_THREADS=1 python examples/mjx_arm.py [--picture swing.png]

Expected, in some minutes on two CPU cores, most of it compilation: the gradient is 1e-9 from
central differences and costs about 10 to 20 times the loss, by either way; and after 630 runs

    fx.GaussNewton        15 steps, loss    0.071, torques off by 0.02
    Adam on fx.Exact()    15 steps, loss  1.3e+02, torques off by 0.09

With `iterations="1"` in the scene's options MJX has no loop, and `jax.grad` traces it.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import optax
from jax import Array, lax
from mujoco import mjx

import forwax as fx

SCENE = """
<mujoco>
  <option timestep="0.01" iterations="10" ls_iterations="6"/>
  <default><geom solref=".04 1" solimp="0 .95 .02"/></default>
  <worldbody>
    <geom type="plane" size="3 3 .1"/>
    <body pos="0 0 .65">
      <joint name="a" type="hinge" axis="0 1 0" damping=".1"/>
      <geom type="capsule" fromto="0 0 0 .3 0 0" size=".03" contype="0" conaffinity="0"/>
      <body pos=".3 0 0">
        <joint name="b" type="hinge" axis="0 1 0" damping=".1"/>
        <geom type="capsule" fromto="0 0 0 .3 0 -.2" size=".03"/>
      </body>
    </body>
    <body pos=".45 0 .1"><freejoint/><geom type="sphere" size=".1" mass=".2"/></body>
  </worldbody>
  <actuator><motor joint="a" gear="5"/><motor joint="b" gear="5"/></actuator>
</mujoco>
"""
STEP = 0.01  # seconds
HOLD = 8  # steps that a torque lasts
SEEN = 5  # steps from one picture of the film to the next


class Swing:
    """The arm for some steps, from stretched out and at rest."""

    def __init__(self, num_steps: int = 80) -> None:
        self.num_steps = num_steps
        self.model = mjx.put_model(mujoco.MjModel.from_xml_string(SCENE))
        self.start = mjx.make_data(self.model)

    @property
    def truth(self) -> Array:
        """Torques [knots, 2], in parts of 5 N m."""
        at = np.arange(-(-self.num_steps // HOLD))
        return jnp.asarray(
            np.stack([0.15 * np.sin(at), 0.1 * np.cos(0.7 * at)], axis=1)
        )

    def path(self, torques: Array) -> Array:
        """Both angles, and how far along the floor the ball is [num_steps, 3]."""

        def step(data: Any, number: Array) -> tuple[Any, Array]:
            data = mjx.step(self.model, data.replace(ctrl=torques[number // HOLD]))
            return data, data.qpos[:3]

        return lax.scan(step, self.start, jnp.arange(self.num_steps))[1]

    def residuals(self, torques: Array, film: Array) -> dict[str, Array]:
        """What film and prior make of the torques; half their squares are the loss."""
        away = (self.path(torques)[SEEN - 1 :: SEEN] - film) / 0.01
        return {"away": away, "torques": torques}

    def loss(self, torques: Array, film: Array) -> Array:
        found = self.residuals(torques, film)
        return jnp.sum(found["away"] ** 2) / 2 + jnp.sum(found["torques"] ** 2) / 2


def cpu_seconds(call: Callable[[], Any], rounds: int = 5) -> float:
    """The median CPU time of all threads."""
    found = []
    for _ in range(rounds):
        begin = time.process_time()
        jax.block_until_ready(call())
        found.append(time.process_time() - begin)
    return float(np.median(found))


def central_differences(loss: Callable[[Array], Array], at: Array) -> Array:
    """The gradient by two runs for each number."""
    size = 1e-6
    basis = size * jnp.eye(at.size).reshape(-1, *at.shape)
    slopes = [(loss(at + v) - loss(at - v)) / (2 * size) for v in basis]
    return jnp.stack(slopes).reshape(at.shape)


def by_gauss_newton(swing: Swing, film: Array, steps: int) -> tuple[Array, list[float]]:
    """The torques, and the loss before each step; a step costs 2 + 2n runs."""
    torques = jnp.zeros_like(swing.truth)
    solver = fx.GaussNewton().init(torques)
    key = jax.random.key(0)  # of random directions, of which there are none
    step = jax.jit(lambda p, solver: solver.step(swing.residuals)(key, p, film))
    values = []
    for _ in range(steps):
        value, torques, solver = step(torques, solver)
        values.append(float(value))
    return torques, values


def by_adam(
    value_and_grad: Callable, swing: Swing, runs: int
) -> tuple[Array, list[float]]:
    """The same; a step costs 1 + 2n runs."""
    torques = jnp.zeros_like(swing.truth)
    steps = runs // (1 + 2 * torques.size)
    # the best rate of 0.003, 0.01, 0.03 and 0.1
    optimiser = optax.adam(optax.cosine_decay_schedule(0.01, steps))
    state = optimiser.init(torques)
    values = []
    for _ in range(steps):
        value, grads = value_and_grad(torques)
        updates, state = optimiser.update(grads, state)
        torques = optax.apply_updates(torques, updates)
        values.append(float(value))
    return torques, values


def main(
    num_steps: int = 80, steps: int = 15, picture: Path | None = None
) -> dict[str, Any]:
    """Print the refusal, the gradient's error and price, and both fits; returns the figures."""
    with jax.enable_x64(True):
        return _main(Swing(num_steps), steps, picture)


def _main(swing: Swing, steps: int, picture: Path | None) -> dict[str, Any]:
    film = jax.jit(swing.path)(swing.truth)[SEEN - 1 :: SEEN]
    start = jnp.zeros_like(swing.truth)
    n = start.size
    try:
        jax.eval_shape(jax.grad(swing.loss), start, film)
    except ValueError as error:
        print("jax.grad:", str(error).split(". ")[0])

    loss = jax.jit(lambda p: swing.loss(p, film))
    exact = fx.value_and_grad(lambda p: swing.loss(p, film), fx.Exact())
    value_and_grad = jax.jit(lambda p: exact(jax.random.key(0), p))
    by_jacfwd = jax.jit(jax.jacfwd(lambda p: swing.loss(p, film)))
    value, gradient = value_and_grad(start)

    def error(other: Array) -> float:
        return float(jnp.linalg.norm(gradient - other) / jnp.linalg.norm(other))

    errors = {
        "central differences": error(central_differences(loss, start)),
        "jax.jacfwd": error(by_jacfwd(start)),
    }
    for name, found in errors.items():
        print(f"fx.Exact(), {n} torques: {found:.0e} from {name}")
    alone = cpu_seconds(lambda: loss(start))
    gradients = {"fx.Exact()": value_and_grad, "jax.jacfwd": by_jacfwd}
    for name, call in gradients.items():
        ratio = cpu_seconds(lambda call=call: call(start)) / alone
        print(f"{name} costs {ratio:.0f} times the loss in CPU time")

    runs = steps * (2 + 2 * n)
    fits = {
        "fx.GaussNewton": by_gauss_newton(swing, film, steps),
        "Adam on fx.Exact()": by_adam(value_and_grad, swing, runs),
    }
    print(f"the first loss is {float(value):.0f}; after {runs} runs of the simulation:")
    ends = {}
    for name, (torques, values) in fits.items():
        ends[name] = float(loss(torques))
        off = float(jnp.sqrt(jnp.mean((torques - swing.truth) ** 2)))
        print(
            f"{name:20} {len(values):3} steps, loss {ends[name]:8.2g}, torques off by {off:.1g}"
        )
    if picture:
        draw(swing, {name: torques for name, (torques, _) in fits.items()}, picture)
    return {"first": float(value), "errors": errors, "ends": ends}


def draw(swing: Swing, found: dict[str, Array], path: Path) -> None:
    """Angles and ball over time, and the torques."""
    from matplotlib.figure import Figure

    shown = {"recorded": swing.truth, "no torques": 0 * swing.truth, **found}
    figure = Figure(figsize=(10, 3), layout="constrained")
    panels = figure.subplots(1, 4)
    titles = ("upper joint, rad", "lower joint, rad", "ball, m", "upper torque, 5 N m")
    simulate = jax.jit(swing.path)
    for number, (name, torques) in enumerate(shown.items()):
        style = {"color": f"C{number}", "lw": 3 if name == "recorded" else 1.2}
        lines = simulate(torques)
        for axes, line in zip(panels, lines.T, strict=False):
            axes.plot(STEP * np.arange(len(line)), line, label=name, **style)
        at = STEP * HOLD * np.arange(len(torques))
        panels[3].step(at, torques[:, 0], where="post", **style)
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("s")
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=15, help="of Gauss-Newton")
    parser.add_argument("--picture", type=Path, help="where a picture goes")
    main(**vars(parser.parse_args()))
