"""Every example runs with tiny settings, and the README prints what it says.

The fits find the truth.
"""

import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwax as fx
from cases import assert_trees_close
from helpers import module_at, needs_extra

pytestmark = pytest.mark.promotes("Optax mixes integers and floats")
EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = {
    "contact_policy": {"steps": 3, "count": 4, "num_steps": 12, "rounds": 1},
    "elastic": {},  # in test_elastic.py
    "equinox_digits": {"epochs": 1, "batch": 512},
    "flower_app": {"rounds": 6},
    "mjx_arm": {"num_steps": 24, "steps": 3},
    "optax_loop": {"epochs": 2, "num_tangents": 4},
    "private_digits": {"seeds": 1, "steps": 60, "secret": 0},
    "spiking": {"steps": 100, "batch": 32},
    "tomography": {"side": 12, "seconds": 3.0},
    "while_loop": {"steps": 1000, "count": 6},
}


def test_every_example_is_tested():
    assert sorted(TINY) == sorted(path.stem for path in EXAMPLES.glob("*.py"))


ROOT = EXAMPLES.parent
PASTED = [ROOT / "README.md", ROOT / "docs" / "index.md"]


@pytest.mark.parametrize("path", PASTED, ids=[path.name for path in PASTED])
def test_pages_that_run_as_they_are_pasted(path, capsys):
    """All blocks of a page in turn; what a line prints is what stands behind it."""
    page = path.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    promised = re.findall(r"^print\(.*\)  # (\[.*)$", page, flags=re.MULTILINE)
    assert blocks
    assert promised
    names = {"__name__": "__main__"}
    for block in blocks:
        exec(block, names)
    printed = capsys.readouterr().out.replace("-0.", "0.").split()
    for line in promised:
        assert " ".join(line.split()) in " ".join(printed)


def test_while_loop(capsys):
    pytest.importorskip("optimistix")
    example = module_at(EXAMPLES / "while_loop.py")
    found = example.main(**TINY["while_loop"])
    said = capsys.readouterr().out
    by_jacfwd, by_exact = [
        line.split(":")[1].strip() for line in said.splitlines()[1:3]
    ]
    assert by_jacfwd == by_exact
    fits = list(found.values())
    for fit, accuracy in zip(fits, (1e-4, 1e-4, 0.02), strict=False):
        world = jax.tree.map(float, example.to_world(fit.parameters))
        assert world == pytest.approx(example.TRUTH, rel=accuracy)
    first, *others = fits
    assert all(fit.runs <= first.runs for fit in others[2:])
    for name in found:
        assert f"{name:28}" in said


def test_tomography(capsys, tmp_path):
    example = module_at(EXAMPLES / "tomography.py")
    path = tmp_path / "ground.png"
    found = example.main(**TINY["tomography"], picture=path)
    said = capsys.readouterr().out
    assert "jax.grad refuses: Reverse-mode differentiation does not work" in said
    first, *_ = found.values()
    assert first.reached
    assert first.steps < 30
    assert path.stat().st_size > 10_000
    for name in found:
        assert f"{name:30}" in said


def test_arrivals_are_distances_in_even_ground():
    example = module_at(EXAMPLES / "tomography.py")
    times = example.travel_times(jnp.ones((40, 40)), jnp.array([0, 0]))
    at = np.arange(40) / 40
    exact = np.hypot(at[:, None], at)
    # first order: late by a cell at most
    assert np.all(times >= exact - 1e-5)
    assert np.max(times - exact) < 1.5 / 40


def test_contact_policy(capsys, tmp_path):
    example = module_at(EXAMPLES / "contact_policy.py")
    picture = tmp_path / "paths.png"
    losses = example.main(**TINY["contact_policy"], picture=str(picture))
    said = capsys.readouterr().out
    assert said.startswith("jax.grad: Reverse-mode differentiation does not work")
    for name, found in losses.items():
        assert name in said
        assert found[0] == pytest.approx(losses["enable_reverse"][0], rel=1e-4)
    assert picture.stat().st_size > 1000


def test_contact_policy_has_the_gradient_of_the_fixed_loop():
    example = module_at(EXAMPLES / "contact_policy.py")
    games = example.draw_games(jax.random.key(1), 8)
    policy = example.initial_policy(jax.random.key(2))
    ways = example.gradients(games, 30)
    value, exact = ways["enable_reverse"](jax.random.key(0), policy)
    fixed_value, fixed = ways["40 sweeps"](jax.random.key(0), policy)
    assert float(value) == pytest.approx(float(fixed_value), rel=1e-5)
    assert_trees_close(exact, fixed, rtol=2e-3, atol=2e-4)


def test_mjx_arm(capsys, tmp_path):
    needs_extra("mjx", "mujoco.mjx")
    with jax.numpy_rank_promotion("allow"):
        example = module_at(EXAMPLES / "mjx_arm.py")
        picture = tmp_path / "swing.png"
        found = example.main(**TINY["mjx_arm"], picture=picture)
    said = capsys.readouterr().out
    assert "jax.grad: Reverse-mode differentiation does not work" in said
    assert found["errors"]["central differences"] < 2e-3
    assert found["errors"]["jax.jacfwd"] < 1e-6
    assert found["ends"]["fx.GaussNewton"] < 0.1 * found["first"]
    for name in found["ends"]:
        assert name in said
    assert picture.stat().st_size > 1000


def renyi_epsilon(example, noise, steps):
    """A bound on epsilon by integer orders (Mironov et al. 2019, arXiv 1908.10530, 3.3)."""
    q, delta = example.RATE, example.DELTA
    bounds = []
    for order in range(2, int(30 * noise)):  # beyond it numbers overflow
        moment = sum(
            math.comb(order, j)
            * (1 - q) ** (order - j)
            * q**j
            * math.exp((j * j - j) / (2 * noise**2))
            for j in range(order + 1)
        )
        bounds.append((steps * math.log(moment) - math.log(delta)) / (order - 1))
    return min(bounds)


def test_private_digits(capsys):
    needs_extra("privacy", "dp_accounting")
    example = module_at(EXAMPLES / "private_digits.py")
    tiny = TINY["private_digits"]
    found = example.main(**tiny)
    said = capsys.readouterr().out
    for name, way in example.WAYS.items():
        (accuracy,), epsilon = found[name]
        assert 0.3 < accuracy <= 1
        if way.noise_multiplier:
            bound = renyi_epsilon(example, way.noise_multiplier, tiny["steps"])
            assert 0.5 * bound < epsilon < bound
        else:
            assert epsilon == math.inf
        shown = f"({accuracy:.1%}), epsilon {epsilon:.2f} at delta 0.0001, 0 left out"
        assert f"{name:21}: test accuracy {accuracy:.1%} {shown}" in said


def test_private_digits_takes_each_picture_with_one_probability():
    example = module_at(EXAMPLES / "private_digits.py")
    draws, count, size = 2000, 64, 10
    keys = jax.random.split(jax.random.key(3), draws)
    draw = jax.jit(jax.vmap(lambda key: example.sample(key, count, size)))
    rows, is_in, left_out = jax.tree.map(np.asarray, draw(keys))
    full = jax.vmap(lambda key: example.sample(key, count, count))(keys)
    taken = np.zeros((draws, count))
    for number, (own, mask) in enumerate(zip(full[0], full[1], strict=True)):
        taken[number, np.asarray(own)[np.asarray(mask)]] += 1
    assert taken.max() == 1
    # binomial: the mean of 2,000 draws is 1/8 within five deviations, for each picture
    deviation = (example.RATE * (1 - example.RATE) / draws) ** 0.5
    assert np.abs(taken.mean(axis=0) - example.RATE).max() < 5 * deviation
    sizes = taken.sum(axis=1)
    expected = count * example.RATE * (1 - example.RATE)
    assert sizes.var() == pytest.approx(expected, rel=0.2)
    np.testing.assert_array_equal(left_out, np.maximum(sizes - size, 0))
    assert left_out.max() > 0
    np.testing.assert_array_equal(is_in.sum(axis=1), np.minimum(sizes, size))
    assert rows.shape == (draws, size)


def test_private_digits_has_room_for_all_but_one_of_1e15_runs():
    example = module_at(EXAMPLES / "private_digits.py")
    count, steps = 1437, 400
    size = example.room(count, steps)

    def chance(size):
        ways = sum(
            math.comb(count, i) * 7 ** (count - i) for i in range(size + 1, count)
        )
        return steps * (ways + 1) / 8**count

    assert chance(size) < example.NO_ROOM <= chance(size - 1)


def test_a_step_of_private_digits_is_the_samples_sum_by_the_expected_size():
    """No padded row counts, and the divisor does not follow from the sample."""
    example = module_at(EXAMPLES / "private_digits.py")
    x = jax.random.uniform(jax.random.key(1), (40, 64))
    y = jnp.arange(40) % 10
    public, secret = jax.random.key(2), jax.random.key(4)
    way = example.Way(0.1, clip=1e30)
    got, _ = example.train(public, secret, way, x, y, steps=1, num_tangents=2)
    start = example.initial_parameters(jax.random.fold_in(public, 1))
    for_sample, _ = jax.random.split(jax.random.fold_in(secret, 0))
    rows, is_in, _ = example.sample(for_sample, 40, 40)
    rows = rows[is_in]
    assert len(rows) != 5

    def summed(params, x, y):
        each = jax.vmap(example.loss, in_axes=(None, 0, 0))(params, x, y)
        return jnp.sum(each) / 5

    rule = fx.WeightPerturbation(num_tangents=2)
    step = fx.update(summed, rule, learning_rate=0.1)
    directions = jax.random.fold_in(public, 0)
    _, expected = step(directions, start, x[rows], y[rows])
    assert_trees_close(got, expected, rtol=1e-4, atol=1e-6)


def test_the_noise_of_private_digits_is_the_multiplier_times_the_clip():
    """Two steps' noise on a parameter over 300 secrets; slopes are clipped to next to nothing."""
    example = module_at(EXAMPLES / "private_digits.py")
    x, y = jnp.ones((40, 64)), jnp.arange(40) % 10
    public, secrets = jax.random.key(2), jax.random.split(jax.random.key(5), 300)
    way = example.Way(0.1, clip=1e-4, noise_multiplier=1e4)

    def moved(secret):
        parameters, _ = example.train(
            public, secret, way, x, y, steps=2, num_tangents=2
        )
        return parameters["b2"][0]

    found = jax.vmap(moved)(secrets)
    # each step: the rate times the sum of k noises along signs, divided by k and the expected size
    expected = 2 * 0.1**2 * 2 / (2 * 5) ** 2
    assert float(jnp.mean(found**2)) == pytest.approx(expected, rel=0.3)


def test_flower_app():
    """In a process of its own, as Flower's clients import it by name; it compares all bits."""
    needs_extra("federated", "ray")
    rounds = TINY["flower_app"]["rounds"]
    command = [sys.executable, EXAMPLES / "flower_app.py", "--rounds", f"{rounds}"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # Ray's sockets lie there, and their paths must be short
        own = {"RAY_TMPDIR": folder, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
        environment = {**os.environ, **own}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300
        )
    said = done.stdout
    assert done.returncode == 0, done.stderr
    assert "os.fork() was called" not in done.stderr
    ends = dict(re.findall(r"^(.+?) +ends with (\w{16})$", said, flags=re.MULTILINE))
    names = [*(f"client {slot}" for slot in range(10)), "server", "ledger"]
    assert list(ends) == [*names, "one process"]
    assert len(set(ends.values())) == 1
    first, last = re.search(
        r"accuracy ([\d.]+)% at first, ([\d.]+)% after", said
    ).groups()
    assert first != last
    # the late client has come to the second half at most, and has the others' bits
    assert int(re.search(r"client 9: .* in (\d+) rounds", said)[1]) in range(1, 4)
    found = re.findall(r"^.*: ([\d,]+) up, ([\d,]+) down$", said, flags=re.MULTILINE)
    own, fedavg = [[int(word.replace(",", "")) for word in line] for line in found]
    # 8 slopes up and 10 times as many down, with headers; 2,410 parameters each way
    assert 4 * 8 < own[0] < 250
    assert 4 * 80 < own[1] < 700
    assert all(4 * 2410 < each < 10_500 for each in fedavg)


def test_spiking(capsys):
    reached = module_at(EXAMPLES / "spiking.py").main(**TINY["spiking"])
    assert 0.5 < reached <= 1
    assert f"{reached:.0%}" in capsys.readouterr().out


def test_optax_loop(capsys):
    accuracy = module_at(EXAMPLES / "optax_loop.py").main(**TINY["optax_loop"])
    assert 0.2 < accuracy <= 1
    assert f"test accuracy {accuracy:.1%}" in capsys.readouterr().out


def test_equinox_digits(capsys, monkeypatch):
    example = module_at(EXAMPLES / "equinox_digits.py")
    rules = {name: example.RULES[name] for name in ("backprop", "projection on 32")}
    monkeypatch.setattr(example, "RULES", rules)
    accuracies = example.main(**TINY["equinox_digits"])
    said = capsys.readouterr().out
    for name in rules:
        assert 0 <= accuracies[name] <= 1
        assert f"{name:16}: mean loss" in said
        assert f"test accuracy {accuracies[name]:.1%}" in said
