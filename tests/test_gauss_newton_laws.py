"""The laws of `GaussNewton`, on every program of residuals that is listed, in float64.

In real coordinates of parameters and residuals, against matrices that NumPy solves.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import forwax as fx
from cases import RESIDUALS
from forwax.tangents import Orthonormal, Rademacher

KEY = jax.random.key(0)
PLAIN = fx.GaussNewton(damping=0.0, adapt=False)
EVERY = pytest.mark.parametrize("case", RESIDUALS, ids=lambda case: case.name)
SQUARES = pytest.mark.parametrize(
    "case",
    [case for case in RESIDUALS if case.loss is None],
    ids=lambda case: case.name,
)


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def as_real(tree):
    """Real coordinates [n], and what leads back."""
    split = jax.tree.map(
        lambda x: (x.real, x.imag) if jnp.iscomplexobj(x) else jnp.asarray(x), tree
    )
    flat, unravel = ravel_pytree(split)

    def back(flat):
        join = lambda like, x: jax.lax.complex(*x) if jnp.iscomplexobj(like) else x
        return jax.tree.map(join, tree, unravel(flat))

    return flat, back


class Matrices:
    """A case at its parameters: residuals r [m], Jacobian J [m, n], and the loss's g and H."""

    def __init__(self, case):
        params, *self.args = case.of(jnp.float64)
        self.case = case
        self.params = params
        self.flat, self.back = as_real(params)
        self.r, of_r = as_real(case.residuals(params, *self.args))
        self.m, self.n = len(self.r), len(self.flat)

        def residuals(flat):
            return as_real(case.residuals(self.back(flat), *self.args))[0]

        def loss(r):
            return jnp.vdot(r, r) / 2 if case.loss is None else case.loss(of_r(r))

        self.jacobian = np.asarray(jax.jacfwd(residuals)(self.flat))
        self.gradient = self.jacobian.T @ np.asarray(jax.grad(loss)(self.r))
        hessian = np.asarray(jax.hessian(loss)(self.r))
        self.curvature = self.jacobian.T @ hessian @ self.jacobian

    def step(self, solver, residuals=None, loss=None):
        """The loss, and how the real coordinates change."""
        residuals = residuals or self.case.residuals
        step = solver.step(residuals, loss or self.case.loss)
        run = jax.jit(lambda *args: step(KEY, *args)[:2])
        value, params = run(self.params, *self.args)
        return value, np.asarray(as_real(params)[0] - self.flat)


@EVERY
@pytest.mark.parametrize(("damping", "chunk_size"), [(0.0, None), (0.3, 2)])
def test_along_all_directions_it_is_the_damped_step(case, damping, chunk_size):
    """Without damping that of least norm, where the residuals do not fix all parameters."""
    at = Matrices(case)
    solver = dataclasses.replace(PLAIN, damping=damping, chunk_size=chunk_size)
    value, found = at.step(solver)
    relative = damping * np.trace(at.curvature) / at.n
    matrix = at.curvature + relative * np.eye(at.n)
    expected = -np.linalg.pinv(matrix, rcond=1e-10, hermitian=True) @ at.gradient
    np.testing.assert_allclose(value, case.value(at.params, *at.args), rtol=1e-12)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


@SQUARES
@pytest.mark.parametrize("tangents", [Rademacher(), Orthonormal()], ids=["signs", "qr"])
def test_what_is_linear_is_solved_in_one_step_along_as_many_as_its_rank(case, tangents):
    """Every program is linear to first order, and has its rank."""
    at = Matrices(case)
    rank = int(np.linalg.matrix_rank(at.jacobian, tol=1e-8))

    def linear(params, *args):
        moved = as_real(params)[0] - at.flat
        return at.r + jnp.asarray(at.jacobian) @ moved

    solver = dataclasses.replace(PLAIN, num_tangents=rank, tangents=tangents)
    _, found = at.step(solver, linear)
    left = at.r + at.jacobian @ found
    best = at.r - at.jacobian @ np.linalg.pinv(at.jacobian, rcond=1e-10) @ at.r
    scale = np.linalg.norm(at.r)
    np.testing.assert_allclose(left, best, rtol=1e-6, atol=1e-6 * scale)


@EVERY
def test_a_step_does_not_know_the_scale_of_the_loss_or_of_its_directions(case):
    at = Matrices(case)

    @dataclasses.dataclass(frozen=True)
    class Longer(Rademacher):
        def draw_one(self, key, specs):
            return [32 * x for x in super().draw_one(key, specs)]

        planned = None

    solver = fx.GaussNewton(num_tangents=min(2, at.n), adapt=False)
    _, found = at.step(solver)
    assert np.linalg.norm(found) > 0
    once = dataclasses.replace(case, residuals=lambda r: r)
    _, of_scaled = at.step(solver, loss=lambda r: 1024 * once.value(r))
    np.testing.assert_allclose(of_scaled, found, rtol=1e-7, atol=1e-10)
    _, along_longer = at.step(dataclasses.replace(solver, tangents=Longer()))
    np.testing.assert_allclose(along_longer, found, rtol=1e-7, atol=1e-10)


@EVERY
@pytest.mark.parametrize("damping", [1.0, 0.0])
def test_with_adapt_the_loss_never_rises(case, damping):
    at = Matrices(case)

    @jax.jit
    def run(params, solver):
        def step(state, key):
            params, solver = state
            step = solver.step(case.residuals, case.loss)
            value, params, solver = step(key, params, *at.args)
            return (params, solver), value

        state, values = jax.lax.scan(step, (params, solver), jax.random.split(KEY, 12))
        return state[0], values

    params = jax.tree.map(jnp.asarray, at.params)
    solver = fx.GaussNewton(num_tangents=2, damping=damping)
    last, values = run(params, solver.init(params))
    values = np.append(values, case.value(last, *at.args))
    assert np.all(np.diff(values) <= 1e-12 * values[:-1])
    assert values[-1] < values[0]


@EVERY
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["32", "64"])
def test_the_form_stays(case, dtype):
    """Eager as under jit; dtypes, shapes and the solver's structure, from step to step."""
    params, *args = case.of(dtype)
    solver = fx.GaussNewton(num_tangents=2)

    def shapes(tree):
        leaves, structure = jax.tree.flatten(tree)
        return structure, [(jnp.shape(x), x.dtype) for x in leaves]

    eager = solver.step(case.residuals, case.loss)(KEY, params, *args)
    jitted = jax.jit(solver.step(case.residuals, case.loss))(KEY, params, *args)
    assert shapes(eager) == shapes(jitted)
    value, new, after = eager
    assert shapes(new) == shapes(jax.tree.map(jnp.asarray, params))
    assert shapes(after) == shapes(solver.init(params))
    assert value.dtype == dtype
    for one, other in zip(*map(jax.tree.leaves, (eager, jitted)), strict=True):
        np.testing.assert_allclose(
            one, other, rtol=2e-2 if dtype == jnp.float32 else 1e-6, atol=1e-4
        )
