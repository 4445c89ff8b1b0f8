"""Reverse mode through what runs forwards only: its derivatives, its noise, what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import forwax as fx
from cases import assert_trees_close, normal

KEY = jax.random.key(0)


def contact(force, stiffness):
    """Until it has converged: how far springs [4] that touch one another give way."""

    def unfinished(state):
        x, last = state
        return jnp.max(jnp.abs(x - last)) > 1e-9

    def relax(state):
        x, _ = state
        pressed = jnp.maximum(force + 0.3 * jnp.roll(x, 1), 0)
        return jnp.tanh(pressed / stiffness), x

    start = jnp.tanh(force / stiffness)
    return lax.while_loop(unfinished, relax, (start, start + 1))[0]


def unrolled(force, stiffness):
    """The same in a fixed number of steps, which reverse mode takes."""
    x = jnp.tanh(force / stiffness)
    for _ in range(60):
        pressed = jnp.maximum(force + 0.3 * jnp.roll(x, 1), 0)
        x = jnp.tanh(pressed / stiffness)
    return x


FORCE = np.array([0.4, -0.2, 0.7, 0.1])
SOLVED = fx.enable_reverse(contact)


def rollout(weights, start, solve=SOLVED):
    """A policy in front of a solver, again and again: reverse mode over an island."""

    def step(state, _):
        state = solve(jnp.tanh(weights @ state), 0.9 + jnp.sum(state**2))
        return state, jnp.sum((state - 0.3) ** 2)

    _, losses = lax.scan(step, start, None, length=6)
    return jnp.mean(losses)


WEIGHTS = np.random.default_rng(0).normal(size=(4, 4))


def differences(loss, x, size=1e-5):
    """Central differences, entry by entry."""

    def one(i):
        step = jnp.zeros(x.size).at[i].set(size).reshape(x.shape)
        return (loss(x + step) - loss(x - step)) / (2 * size)

    return jax.jit(lambda: lax.map(one, jnp.arange(x.size)))().reshape(x.shape)


def alone(force):
    return jnp.sum(SOLVED(force, 1.2) ** 3)


def chunked(force):
    return jnp.sum(fx.enable_reverse(contact, chunk_size=3)(force, jnp.sum(force)))


def mapped(forces):
    return jnp.sum(jax.vmap(SOLVED, (0, None))(forces, jnp.mean(forces) + 1) ** 2)


def checkpointed(force):
    return jax.checkpoint(lambda x: alone(jnp.sin(x)))(force)


def nested(force):
    """An island that goes through itself backwards, inside another."""

    def inner(force):
        slopes = jax.grad(lambda x: jnp.sum(SOLVED(x, 1.2)))(force)
        return lax.while_loop(lambda x: x[0] < 2, lambda x: 2 * x, jnp.abs(slopes))

    return jnp.sum(fx.enable_reverse(inner)(force) ** 2)


def branching(force):
    return lax.cond(force[0] > 0, alone, lambda x: jnp.sum(x), force)


LOSSES = {
    "alone": (alone, FORCE),
    "chunked": (chunked, FORCE),
    "vmap": (mapped, np.stack([FORCE, -FORCE, 2 * FORCE])),
    "scan": (lambda w: rollout(w, jnp.asarray(FORCE)), WEIGHTS),
    "remat": (checkpointed, FORCE),
    "nested": (nested, FORCE),
    "cond": (branching, FORCE),
}


@pytest.mark.parametrize("how", ["eager", "jit"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_central_differences(name, how):
    loss, x = LOSSES[name]
    with jax.enable_x64(True):
        transform = jax.jit if how == "jit" else lambda f: f
        value, found = transform(jax.value_and_grad(loss))(jnp.asarray(x))
        np.testing.assert_allclose(value, loss(jnp.asarray(x)), rtol=1e-12)
        np.testing.assert_allclose(found, differences(loss, x), rtol=1e-3, atol=1e-7)


def test_reverse_mode_refuses_the_function_as_it_is():
    with pytest.raises(ValueError, match="while_loop"):
        jax.grad(lambda f: jnp.sum(contact(f, 1.2)))(jnp.asarray(FORCE, jnp.float32))


def test_it_is_the_derivative_forwards_backwards_and_twice():
    x, v, u = normal(1, 4), normal(2, 4), normal(3, 4)
    function = lambda x: SOLVED(x, jnp.float32(1.2))
    _, pushed = jax.jvp(function, (x,), (v,))
    _, expected = jax.jvp(lambda x: contact(x, 1.2), (x,), (v,))
    np.testing.assert_allclose(pushed, expected, rtol=1e-5)
    _, pull = jax.vjp(function, x)
    np.testing.assert_allclose(jnp.vdot(u, pushed), jnp.vdot(pull(u)[0], v), rtol=1e-5)

    loss = lambda x, solve: jnp.sum(jnp.sin(solve(x, 1.2)) * u)
    exact = jax.hessian(loss)(x, unrolled)
    forwards = jax.jacfwd(jax.grad(loss))(x, SOLVED)
    backwards = jax.jacrev(jax.grad(loss))(x, SOLVED)
    np.testing.assert_allclose(forwards, exact, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(backwards, exact, rtol=1e-3, atol=1e-5)


def everything(params, count, key, *, is_on, kind):
    """Trees of several dtypes, integers, booleans, keys and a name."""
    x = lax.fori_loop(0, count, lambda i, x: jnp.sin(x) * 1.1, params["w"])
    noise = jax.random.normal(key, x.shape)
    z = (
        params["z"] * jnp.sum(x).astype(jnp.complex64)
        if kind == "product"
        else params["z"]
    )
    return {
        "x": jnp.where(is_on, x + noise, x),
        "z": z**2,
        "half": params["half"] * 2,
        "count": count + 1,
        "key": key,
        "is_off": ~is_on,
    }


def objective(params, count, call):
    out = call(params, count, KEY, is_on=jnp.array(True), kind="product")
    parts = [
        jnp.sum(out["x"] ** 2),
        jnp.sum(jnp.abs(out["z"]) ** 2) + jnp.sum(out["z"]).imag,
        jnp.sum(out["half"].astype(jnp.float32) ** 2),
    ]
    return sum(parts)


PARAMS = {
    "w": normal(1, 3),
    "z": normal(2, 2, dtype=jnp.complex64),
    "half": normal(3, 2, dtype=jnp.bfloat16),
}


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("how", ["eager", "jit"])
def test_arguments_of_every_kind(how, chunk_size):
    call = fx.enable_reverse(everything, chunk_size=chunk_size)
    grad = jax.grad(lambda p, count: objective(p, count, call))
    found = (jax.jit(grad) if how == "jit" else grad)(PARAMS, jnp.int32(3))
    expected = jax.grad(lambda p: objective(p, 3, everything))(PARAMS)
    assert_trees_close(found, expected, rtol=1e-5)
    assert [x.dtype for x in jax.tree.leaves(found)] == [
        x.dtype for x in jax.tree.leaves(PARAMS)
    ]
    out = call(PARAMS, 3, KEY, is_on=jnp.array(True), kind="product")
    plain = everything(PARAMS, 3, KEY, is_on=jnp.array(True), kind="product")
    assert jax.random.key_data(out.pop("key")).tolist() == [0, 0]
    del plain["key"]
    assert_trees_close(out, plain)


def test_only_what_is_differentiated_is_pushed():
    data = normal(1, 97)

    def loss(w, data):
        call = fx.enable_reverse(lambda w, d: jnp.sum(d[:, None] * w[None, :]))
        return call(w, data)

    shown = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones(3), data))
    assert "f32[3,3]" in shown  # the basis vectors
    assert "f32[97,97]" not in shown
    assert "f32[100" not in shown


def test_what_has_no_derivative():
    count = fx.enable_reverse(lambda x: jnp.sum(x > 0))
    loss = lambda x: jnp.sum(x) * count(x).astype(jnp.float32)
    assert jax.grad(loss)(jnp.array([1.0, -2.0, 3.0])).tolist() == [2, 2, 2]
    shifted = fx.enable_reverse(lambda n: n.astype(jnp.float32) + 1)
    assert jax.grad(lambda x: x * shifted(jnp.int32(2)))(1.0) == 3
    empty = fx.enable_reverse(lambda x: jnp.sum(x) + 2)
    assert jax.grad(lambda x: x + empty(jnp.zeros(0)))(1.0) == 1


def test_inside_shard_map():
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    forces = normal(1, 8, 4)

    def mean(w, forces, solve):
        return jnp.mean(jax.vmap(lambda f: solve(w * f, 1.2))(forces) ** 2)

    def of_shards(w, forces):
        found = jax.grad(mean)(lax.pcast(w, "data", to="varying"), forces, SOLVED)
        return lax.pmean(found, "data")

    sharded = jax.shard_map(
        of_shards, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
    )
    found = jax.jit(sharded)(jnp.ones(4), forces)
    expected = jax.grad(mean)(jnp.ones(4), forces, unrolled)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


# --- random directions ---

MATRIX, COTANGENT = normal(4, 5, 12), normal(5, 5)
POINT = normal(6, 12)


def curved(x):
    return jnp.tanh(MATRIX @ x)


def estimates(loss, x, count, num_tangents):
    """Gradients [count, ...] with a key each."""

    def one(key):
        return jax.grad(lambda x: loss(x, key, num_tangents))(x)

    return jax.jit(jax.vmap(one))(jax.random.split(KEY, count))


def one_call(x, key, num_tangents):
    call = fx.enable_reverse(curved, num_tangents, key=key, chunk_size=2)
    return jnp.vdot(COTANGENT, call(x))


def exact_one(x):
    return jnp.vdot(COTANGENT, curved(x))


@pytest.mark.parametrize("num_tangents", [1, 3])
def test_random_directions_have_the_law_of_signs(num_tangents):
    exact = jax.grad(exact_one)(POINT)
    found = estimates(one_call, POINT, 4000, num_tangents)
    square = np.mean(np.sum((found - exact[None]) ** 2, axis=1))
    law = 11 / num_tangents * np.sum(exact**2)
    np.testing.assert_allclose(square, law, rtol=0.1)
    assert_unbiased(found, exact)


def assert_unbiased(found, exact):
    """The mean's squared error is that of a mean of as many, at most three times."""
    error = np.mean(found, axis=0) - exact
    variance = np.sum(np.var(found, axis=0)) / len(found)
    assert np.sum(error**2) < 3 * variance


def steps(x, key, num_tangents, own_keys):
    """Three Jacobians, one behind the other."""

    def step(x, key):
        square = lambda x: jnp.tanh(MATRIX[:, :5] @ x + 0.1)
        call = fx.enable_reverse(square, num_tangents, key=key)
        return call(x), None

    keys = jax.random.split(key, 3)
    keys = keys if own_keys else keys[jnp.zeros(3, jnp.int32)]
    return jnp.vdot(COTANGENT, lax.scan(step, x, keys)[0])


def test_calls_with_keys_of_their_own_are_unbiased_and_with_one_key_are_not():
    x = POINT[:5]
    square = lambda x, _: jnp.tanh(MATRIX[:, :5] @ x + 0.1)
    exact = jax.grad(
        lambda x: jnp.vdot(COTANGENT, functools.reduce(square, range(3), x))
    )(x)
    own = estimates(functools.partial(steps, own_keys=True), x, 4000, 2)
    assert_unbiased(own, exact)
    same = estimates(functools.partial(steps, own_keys=False), x, 4000, 2)
    with pytest.raises(AssertionError):
        assert_unbiased(same, exact)


def test_from_n_on_nothing_is_random():
    found = jax.grad(one_call)(POINT, KEY, 12)
    np.testing.assert_allclose(found, jax.grad(exact_one)(POINT), rtol=1e-5, atol=1e-6)


def test_forwards_random_directions_are_the_transpose():
    function = fx.enable_reverse(curved, 4, key=KEY)
    v = normal(7, 12)
    _, pushed = jax.jvp(function, (POINT,), (v,))
    (pulled,) = jax.vjp(function, POINT)[1](COTANGENT)
    np.testing.assert_allclose(
        jnp.vdot(COTANGENT, pushed), jnp.vdot(pulled, v), rtol=1e-4
    )


def test_second_derivatives_of_random_directions_are_unbiased():
    x, v = POINT[:4], normal(8, 4)

    def product(x, key, num_tangents, of=None):
        square = lambda x: jnp.sin(MATRIX[:, :4] @ x)
        call = of or fx.enable_reverse(square, num_tangents, key=key)
        loss = lambda x: jnp.vdot(COTANGENT, call(x))
        return jnp.vdot(jax.grad(loss)(x), v)

    exact = jax.grad(
        lambda x: product(x, KEY, 2, of=lambda x: jnp.sin(MATRIX[:, :4] @ x))
    )(x)
    assert_unbiased(estimates(product, x, 4000, 2), exact)


# --- what it refuses ---


def closing_over(w):
    return jnp.sum(fx.enable_reverse(lambda x: x * w)(jnp.ones(3)))


def closing_over_in_a_scan(w):
    call = fx.enable_reverse(lambda x: x * w)
    return jnp.sum(lax.scan(lambda x, _: (call(x), None), w, None, length=2)[0])


@pytest.mark.parametrize("loss", [closing_over, closing_over_in_a_scan])
@pytest.mark.parametrize(
    "transform",
    [
        jax.grad,
        lambda f: jax.jit(jax.grad(f)),
        lambda f: jax.grad(jax.jit(f)),
        lambda f: jax.grad(jax.checkpoint(f)),
        lambda f: lambda w: jax.vmap(jax.grad(f))(w[None]),
        lambda f: lambda w: jax.jvp(f, (w,), (w,)),
    ],
)
def test_what_is_closed_over_and_differentiated_is_named(loss, transform):
    text = r"closes over float32\[3\], which would get no gradient. Pass this as an arg"
    with pytest.raises(TypeError, match=text):
        transform(loss)(jnp.ones(3))


def test_what_is_closed_over_and_not_differentiated_is_data():
    def loss(x, data):
        inside = jnp.sin(data)
        return jnp.sum(fx.enable_reverse(lambda x: x * inside * data)(x))

    x, data = jnp.ones((2, 3)), normal(1, 2, 3)
    found = jax.jit(jax.vmap(jax.grad(loss)))(x, data)
    np.testing.assert_allclose(found, np.sin(data) * data, rtol=1e-6)
    stopped = lambda w: closing_over(lax.stop_gradient(w)) + jnp.sum(w)
    assert jax.grad(stopped)(jnp.ones(3)).tolist() == [1, 1, 1]


BAD = {
    "no function": ((3,), {}, "expected a function, got int"),
    "no count": ((jnp.sin, 0), {"key": KEY}, "num_tangents to be a positive integer"),
    "no size": ((jnp.sin,), {"chunk_size": 0}, "chunk_size to be a positive integer"),
    "no tangents": ((jnp.sin,), {"key": KEY}, "expected num_tangents with a key"),
    "no key": ((jnp.sin, 2), {}, "expected a key with num_tangents=2, got None"),
    "a seed": ((jnp.sin, 2), {"key": 3}, "key must be a PRNG key, got int. Call ena"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_words(name):
    args, kwargs, text = BAD[name]
    with pytest.raises((TypeError, ValueError), match=text):
        fx.enable_reverse(*args, **kwargs)


# --- libraries that differentiate by themselves ---


def throw(velocity):
    """Where and when [2] a ball lands that is thrown from the ground."""

    def flying(state):
        return (state[0][1] > 0) | (state[2] == 0)

    def fly(state):
        position, speed, time = state
        pull = jnp.array([0.0, -9.81]) - 0.1 * speed
        return position + 0.02 * speed, speed + 0.02 * pull, time + 0.02

    start = jnp.zeros(2), velocity, jnp.zeros(())
    position, speed, time = lax.while_loop(flying, fly, start)
    overshoot = position[1] / speed[1]
    return jnp.stack([position[0] - overshoot * speed[0], time - overshoot])


TRUE_THROW = jnp.array([6.0, 9.0])
LANDED = throw(TRUE_THROW)
GUESS = jnp.array([4.0, 7.0])


def miss(velocity):
    landed = fx.enable_reverse(throw)(velocity)
    return jnp.sum((landed - LANDED) ** 2)


@pytest.mark.promotes("optax mixes integers and floats")
def test_optax_lbfgs():
    """Its line search differentiates the loss itself."""
    optax = pytest.importorskip("optax")
    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(miss)

    def step(carry, _):
        w, state = carry
        value, grad = value_and_grad(w, state=state)
        updates, state = solver.update(
            grad, state, w, value=value, grad=grad, value_fn=miss
        )
        return (optax.apply_updates(w, updates), state), value

    @jax.jit
    def run(w):
        return lax.scan(step, (w, solver.init(w)), None, length=15)[0][0]

    np.testing.assert_allclose(run(GUESS), TRUE_THROW, rtol=1e-3)


@pytest.mark.promotes("optimistix mixes integers and floats")
def test_optimistix_bfgs():
    optimistix = pytest.importorskip("optimistix")
    solver = optimistix.BFGS(rtol=1e-6, atol=1e-6)
    found = optimistix.minimise(lambda w, _: miss(w), solver, GUESS, max_steps=100)
    np.testing.assert_allclose(found.value, TRUE_THROW, rtol=1e-3)


@pytest.mark.promotes("blackjax mixes integers and floats")
def test_blackjax_nuts():
    """The posterior of a throw, with noise of 0.1 on where and when it landed."""
    blackjax = pytest.importorskip("blackjax")
    log_density = lambda w: -miss(w) / (2 * 0.1**2)
    nuts = blackjax.nuts(log_density, step_size=0.05, inverse_mass_matrix=jnp.ones(2))

    @jax.jit
    def run(start):
        def step(state, key):
            state, _ = nuts.step(key, state)
            return state, state.position

        keys = jax.random.split(KEY, 400)
        return lax.scan(step, nuts.init(start), keys)[1]

    drawn = np.asarray(run(TRUE_THROW))[100:]
    spread = np.std(drawn, axis=0)
    slopes = np.asarray(jax.jacfwd(throw)(TRUE_THROW))
    # Of a throw that is nearly linear within its noise.
    expected = 0.1 * np.sqrt(np.diag(np.linalg.inv(slopes.T @ slopes)))
    np.testing.assert_allclose(np.mean(drawn, axis=0), TRUE_THROW, atol=0.1)
    np.testing.assert_allclose(spread, expected, rtol=0.35)
