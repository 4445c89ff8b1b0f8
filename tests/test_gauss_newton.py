"""Gauss-Newton in a random subspace: its laws, its damping, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwax as fx
from forwax.tangents import Normal, Orthonormal, Rademacher

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(30, 6)), jnp.float32)
Y = jnp.asarray(np.tanh(np.asarray(X) @ np.linspace(-1, 1, 6)), jnp.float32)
START = {"w": jnp.linspace(0.5, -0.3, 6), "b": jnp.float32(0.2)}
LABELS = jnp.asarray(RNG.integers(0, 3, 30))
LOGITS = jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32)


def residuals(params, x, y):
    return jnp.tanh(x @ params["w"] + params["b"]) - y


def logits(w, x):
    return jnp.tanh(x @ w)


def cross_entropy(logits):
    return -jnp.mean(
        jnp.take_along_axis(jax.nn.log_softmax(logits), LABELS[:, None], 1)
    )


def half_square(r):
    return 0.5 * float(np.sum(np.abs(np.asarray(r)) ** 2))


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def jacobian(function, params, *args):
    """[m, n] in the order of `flat`."""
    columns = jax.tree.leaves(jax.jacfwd(function)(params, *args))
    m = np.size(function(params, *args))
    return np.concatenate([np.reshape(c, (m, -1)) for c in columns], axis=1)


def one_step(solver, function, params, *args, loss=None, key=KEY):
    return solver.step(function, loss)(key, params, *args)


UNDAMPED = fx.GaussNewton(damping=0.0, adapt=False)


@pytest.mark.parametrize("chunk_size", [None, 2, 7])
def test_with_as_many_tangents_as_parameters_it_is_gauss_newton(chunk_size):
    solver = dataclasses.replace(UNDAMPED, chunk_size=chunk_size)
    value, params, _ = one_step(solver, residuals, START, X, Y)
    r = np.asarray(residuals(START, X, Y))
    step, *_ = np.linalg.lstsq(jacobian(residuals, START, X, Y), r)
    np.testing.assert_allclose(value, half_square(r), rtol=1e-6)
    np.testing.assert_allclose(flat(params), flat(START) - step, rtol=2e-4, atol=2e-5)


def test_for_cross_entropy_it_is_the_generalised_gauss_newton_step():
    _, w, _ = one_step(
        dataclasses.replace(UNDAMPED, damping=0.1),
        logits,
        LOGITS,
        X,
        loss=cross_entropy,
    )
    j = jacobian(logits, LOGITS, X)
    at = logits(LOGITS, X)

    def of_flat(z):
        return cross_entropy(z.reshape(at.shape))

    hessian = np.asarray(jax.hessian(of_flat)(at.ravel()))
    gradient = j.T @ np.asarray(jax.grad(of_flat)(at.ravel()))
    matrix = j.T @ hessian @ j
    n = len(matrix)
    damped = matrix + 0.1 * np.trace(matrix) / n * np.eye(n)
    expected = np.ravel(LOGITS) - np.linalg.solve(damped, gradient)
    np.testing.assert_allclose(np.ravel(w), expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("tangents", [Rademacher(), Normal(), Orthonormal()])
def test_a_linear_residual_of_rank_up_to_k_is_solved_in_one_step(tangents):
    """Rank 5 in 60 parameters, by 8 directions."""
    left, right = RNG.normal(size=(12, 5)), RNG.normal(size=(5, 60))
    matrix = jnp.asarray(left @ right, jnp.float32)
    target = matrix @ jnp.linspace(-1, 1, 60)
    solver = dataclasses.replace(UNDAMPED, num_tangents=8, tangents=tangents)
    step = solver.step(lambda w: matrix @ w - target)
    first, w, _ = step(KEY, jnp.zeros(60))
    assert half_square(matrix @ w - target) < 1e-7 * first
    # with fewer directions than the rank it is not
    few = dataclasses.replace(solver, num_tangents=4)
    _, w, _ = few.step(lambda w: matrix @ w - target)(KEY, jnp.zeros(60))
    assert half_square(matrix @ w - target) > 1e-5 * first


def test_it_does_not_change_with_the_scale_of_residuals_or_parameters_directions():
    solver = fx.GaussNewton(num_tangents=4, adapt=False)
    _, params, _ = one_step(solver, residuals, START, X, Y)

    def scaled(p, x, y):
        return 1024 * residuals(p, x, y)

    _, same, _ = one_step(solver, scaled, START, X, Y)
    np.testing.assert_allclose(flat(same), flat(params), rtol=1e-5, atol=1e-6)

    @dataclasses.dataclass(frozen=True)
    class Longer(Rademacher):
        def draw_one(self, key, specs):
            return [32 * x for x in super().draw_one(key, specs)]

        planned = None

    longer = dataclasses.replace(solver, tangents=Longer())
    _, same, _ = one_step(longer, residuals, START, X, Y)
    np.testing.assert_allclose(flat(same), flat(params), rtol=1e-4, atol=1e-5)


def run(solver, function, params, *args, steps=40, loss=None):
    def step(state, key):
        params, solver = state
        value, params, solver = solver.step(function, loss)(key, params, *args)
        return (params, solver), (value, solver.damping)

    state = (params, solver.init(params))
    keys = jax.random.split(KEY, steps)
    return jax.jit(lambda state: jax.lax.scan(step, state, keys))(state)


@pytest.mark.parametrize("damping", [1.0, 0.0])
def test_with_adapt_the_loss_never_rises_and_refused_steps_are_counted(damping):
    """From far off, where undamped steps overshoot."""

    def steep(w):
        return jnp.sinh(3 * w) - jnp.array([0.5, -0.2, 0.1])

    far = jnp.array([1.0, -2.0, 0.01])
    solver = fx.GaussNewton(num_tangents=2, damping=damping)
    (w, last), (values, _) = run(solver, steep, far, steps=60)
    assert np.all(np.diff(values) <= 0)
    assert half_square(steep(w)) < 1e-6 * float(values[0])
    # The value of a step is the loss before it: after a refused one it stands still.
    stood_still = int(np.sum(np.diff(values) == 0))
    assert int(last.num_refused) >= 1
    assert int(last.num_refused) <= stood_still + 1


def test_a_refused_step_leaves_the_parameters_and_raises_the_damping():
    def wall(w):  # the undamped step from 2 leads to where the root is not finite
        return jnp.stack([jnp.sqrt(w[0]) + 3.0, w[1]])

    w = jnp.array([0.01, 0.0])
    solver = fx.GaussNewton(num_tangents=2, damping=0.0)
    value, kept, after = one_step(solver, wall, w)
    assert np.array_equal(kept, w)
    assert int(after.num_refused) == 1
    assert float(after.damping) > 0
    assert np.isfinite(value)


@pytest.mark.parametrize("adapt", [True, False])
def test_a_step_to_parameters_that_are_not_finite_is_refused(adapt):
    """The loss alone does not show it: it is less at infinity."""

    def saturated(w):
        return jnp.tanh(w) - 2.0

    w = jnp.array([1.0, 0.5])
    endless = fx.GaussNewton(num_tangents=2, damping=0.0, adapt=adapt, step_size=3e38)
    _, kept, after = jax.jit(endless.step(saturated))(KEY, w)
    assert np.array_equal(kept, w)
    assert int(after.num_refused) == 1


@pytest.mark.parametrize("adapt", [True, False])
def test_under_jit_a_start_that_is_not_finite_is_left_as_it_is_and_seen(adapt):
    solver = fx.GaussNewton(num_tangents=2, adapt=adapt)
    step = jax.jit(lambda key, w: solver.step(lambda w: jnp.log(w))(key, w))
    w = jnp.array([-1.0, 2.0])
    value, kept, after = step(KEY, w)
    assert np.isnan(value)
    assert np.array_equal(kept, w)
    assert int(after.num_refused) == 1


def test_parameters_in_half_precision():
    matrix = jnp.asarray(RNG.normal(size=(30, 6)), jnp.bfloat16)
    target = matrix @ jnp.ones(6, jnp.bfloat16)
    w = jnp.zeros(6, jnp.bfloat16)
    (w, solver), _ = run(fx.GaussNewton(4), lambda w: matrix @ w - target, w, steps=20)
    assert w.dtype == jnp.bfloat16
    assert solver.damping.dtype == jnp.float32
    np.testing.assert_allclose(w.astype(jnp.float32), np.ones(6), atol=0.02)


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
def test_dtypes_and_complex_residuals(dtype):
    with jax.enable_x64(dtype == "float64"):
        matrix = RNG.normal(size=(9, 4))
        if dtype == "complex64":
            matrix = matrix + 1j * RNG.normal(size=(9, 4))
        matrix = jnp.asarray(matrix, dtype)
        target = matrix @ jnp.ones(4, dtype)
        step = UNDAMPED.step(lambda w: {"r": matrix @ w - target})
        _, w, solver = step(KEY, jnp.zeros(4, dtype))
        assert w.dtype == jnp.dtype(dtype)
        np.testing.assert_allclose(w, np.ones(4), rtol=1e-4, atol=1e-4)
        real = jnp.float64 if dtype == "float64" else jnp.float32
        assert solver.damping.dtype == real


def test_problems_under_vmap_are_those_one_by_one():
    xs, ys = jnp.stack([X, -X + 1]), jnp.stack([Y, Y * 0.5])
    solver = fx.GaussNewton(num_tangents=3).init(START)
    step = jax.jit(lambda key, x, y: solver.step(residuals)(key, START, x, y))
    keys = jax.random.split(KEY, 2)
    value, params, after = jax.vmap(step)(keys, xs, ys)
    for i in range(2):
        one = step(keys[i], xs[i], ys[i])
        np.testing.assert_allclose(value[i], one[0], rtol=1e-5)
        for a, b in zip(
            jax.tree.leaves((params, after)), jax.tree.leaves(one[1:]), strict=True
        ):
            np.testing.assert_allclose(a[i], b, rtol=1e-3, atol=1e-5)


def test_aux_keywords_and_donated_arguments():
    def with_aux(params, x, *, y):
        r = residuals(params, x, y)
        return r, {"largest": jnp.max(jnp.abs(r))}

    solver = fx.GaussNewton(num_tangents=3)

    def step(key, params, solver):
        return solver.step(with_aux, has_aux=True)(key, params, X, y=Y)

    params = jax.tree.map(jnp.copy, START)
    (value, aux), new, _ = jax.jit(step, donate_argnums=(1, 2))(
        KEY, params, solver.init(params)
    )
    r = residuals(START, X, Y)
    np.testing.assert_allclose(value, half_square(r), rtol=1e-6)
    np.testing.assert_allclose(aux["largest"], np.max(np.abs(r)), rtol=1e-6)
    assert half_square(residuals(new, X, Y)) <= float(value)


def test_minibatches_take_a_traced_step_size_that_falls():
    def step(state, t):
        w, solver = state
        rate = 0.25 * (1 + jnp.cos(jnp.pi * t.astype(jnp.float32) / 200))
        key, at = jax.random.split(jax.random.fold_in(KEY, t))
        chosen = jax.random.randint(at, (10,), 0, 30)
        now = dataclasses.replace(solver, step_size=rate)
        value, w, solver = now.step(residuals)(key, w, X[chosen], Y[chosen])
        return (w, solver), value

    solver = fx.GaussNewton(num_tangents=4, adapt=False).init(START)
    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(200)))(
        (START, solver)
    )
    first = half_square(residuals(START, X, Y))
    assert half_square(residuals(state[0], X, Y)) < 1e-3 * first


def test_chunks_bound_the_memory_and_change_nothing():
    n, m, k = 20_000, 40, 32
    features = jnp.asarray(RNG.normal(size=(m, 100)), jnp.float32)

    def wide(w):
        return features @ jnp.tanh(w.reshape(100, -1)).sum(1) - 1.0

    w = jnp.asarray(RNG.normal(size=n), jnp.float32)

    def compiled(chunk_size):
        solver = fx.GaussNewton(num_tangents=k, chunk_size=chunk_size)
        step = jax.jit(lambda key, w: solver.step(wide)(key, w)[:2])
        return step.lower(KEY, w).compile()

    whole, chunked = compiled(None), compiled(2)
    np.testing.assert_allclose(whole(KEY, w)[0], chunked(KEY, w)[0], rtol=1e-5)
    np.testing.assert_allclose(
        whole(KEY, w)[1], chunked(KEY, w)[1], rtol=2e-3, atol=1e-4
    )
    held = whole.memory_analysis().temp_size_in_bytes
    formed_anew = chunked.memory_analysis().temp_size_in_bytes
    assert held > k * n * 4  # V [k, n]
    # [chunk, n] for values, tangents and both sides of the matrix G
    assert formed_anew < 12 * 2 * n * 4 < k * n * 4


BAD = {
    "integers": (
        fx.GaussNewton(),
        residuals,
        {"w": jnp.arange(6), "b": 0.0},
        "Newton.step",
    ),
    "a scalar": (
        fx.GaussNewton(),
        lambda p, x, y: jnp.sum(x @ p["w"]),
        START,
        "got a scalar",
    ),
    "nothing": (
        fx.GaussNewton(),
        lambda p, x, y: x[:0, 0],
        START,
        "at least one number among",
    ),
    "labels": (fx.GaussNewton(), lambda p, x, y: LABELS, START, "floating or complex"),
    "not finite": (
        fx.GaussNewton(),
        lambda p, x, y: jnp.log(-jnp.abs(p["w"])),
        START,
        "finite loss, got a loss of nan",
    ),
    "NaN slopes": (
        fx.GaussNewton(),
        lambda p, x, y: jnp.sqrt(0 * p["w"]),
        START,
        "its derivatives along the directions are not",
    ),
    "no aux": (
        fx.GaussNewton(),
        residuals,
        START,
        "expected residuals to return a pair",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_programs_are_refused_in_words(name):
    solver, function, params, text = BAD[name]
    step = solver.step(function, has_aux=name == "no aux")
    with pytest.raises((TypeError, ValueError), match=text):
        step(KEY, params, X, Y)


def test_bad_fields_and_losses_are_refused_in_words():
    with pytest.raises(ValueError, match="num_tangents to be a positive integer"):
        fx.GaussNewton(num_tangents=0)
    with pytest.raises(ValueError, match="expected damping of at least 0, got -1"):
        fx.GaussNewton(damping=-1)
    with pytest.raises(ValueError, match="expected a positive step_size, got 0"):
        fx.GaussNewton(step_size=0)
    step = fx.GaussNewton().step(residuals, lambda r: r)
    with pytest.raises(TypeError, match="take the residuals to a real scalar"):
        step(KEY, START, X, Y)
    step = fx.GaussNewton().step(residuals, jnp.sum)
    with pytest.raises(ValueError, match="no curvature in the residuals"):
        step(KEY, START, X, Y)
    with pytest.raises(TypeError, match="expected a function as residuals, got int"):
        fx.GaussNewton().step(3)
