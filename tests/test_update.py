"""The update that never holds a gradient: the same step, and its memory.

Compiled programs only, no timing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwax as fx
from cases import assert_trees_close, normal

T = fx.tangents
KEY = jax.random.key(0)
W = fx.WeightPerturbation
FD = fx.FiniteDifference


def stack(params, x):
    """An MLP that is a scan over its layers."""
    h, _ = jax.lax.scan(
        lambda h, layer: (jnp.tanh(h @ layer["w"] + layer["b"]), None), x, params
    )
    return jnp.mean(h**2)


def recurrent(w, x):
    """A tanh-RNN."""
    h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=32)
    return jnp.mean(h**2)


def mlp(params, x):
    """An MLP whose every layer is a parameter of its own."""
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


PARAMS = {"w": normal(1, 3, 6, 6), "b": normal(2, 3, 1, 6)}
X = normal(3, 4, 6)
RULES = {
    "one": W(),
    "normal": W(T.Normal()),
    "several": W(T.Sparse(0.5), 3, chunk_size=1),
    "low-rank": W(T.LowRank(2), 5, fx.combine.Shrinkage(), chunk_size=2),
    "safe": fx.Safe(W(num_tangents=2), clip=1.0).init(),
}


@pytest.mark.parametrize("name", RULES)
def test_it_is_the_step_of_the_gradient(name):
    rule = RULES[name]

    def both(key, params):
        value, grads = fx.value_and_grad(stack, rule)(key, params, X)
        expected = value, jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
        return fx.update(stack, rule, learning_rate=0.1)(key, params, X)[:2], expected

    assert_trees_close(*jax.jit(both)(KEY, PARAMS), rtol=1e-5, atol=1e-6)


@pytest.mark.promotes("half precision: weights meet data in float32")
def test_examples_aux_and_dtypes():
    loss = lambda w, x: (jnp.sum(jnp.tanh(x @ w)), x)
    w, axes = PARAMS["w"][0].astype(jnp.bfloat16), (None, 0)
    rule = W(T.LowRank(per_example=True), 2)

    def both(key, w):
        value, grads = fx.value_and_grad(loss, rule, has_aux=True, in_axes=axes)(
            key, w, X
        )
        got = fx.update(loss, rule, learning_rate=0.1, has_aux=True, in_axes=axes)(
            key, w, X
        )
        return got, (value, (w.astype(jnp.float32) - 0.1 * grads.astype(jnp.float32)))

    (value, new), (expected, expected_new) = jax.jit(both)(KEY, w)
    assert_trees_close(value, expected, rtol=1e-5)
    assert new.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        new.astype(jnp.float32), expected_new, rtol=0.02, atol=0.02
    )


def test_complex_parameters_traced_and_eagerly():
    z = jnp.array([1 + 2j, 3 - 1j])
    loss = lambda z: jnp.sum(jnp.abs(z) ** 2)
    expected, step = z - 0.1 * fx.grad(loss)(KEY, z), fx.update(loss, learning_rate=0.1)
    assert_trees_close(step(KEY, z)[1], expected, rtol=1e-5)
    assert_trees_close(jax.jit(step)(KEY, z)[1], expected, rtol=1e-5)


def test_an_eager_loss_may_branch_on_values():
    loss = lambda w: jnp.sum(w**2) if w[0] > 0 else jnp.sum(w)
    w = jnp.array([1.0, 2.0])
    assert_trees_close(
        fx.update(loss, learning_rate=0.1)(KEY, w)[1],
        w - 0.1 * fx.grad(loss)(KEY, w),
        rtol=1e-5,
    )


def test_a_safe_rule_remembers():
    step = jax.jit(
        lambda rule: fx.update(stack, rule, learning_rate=0.1)(KEY, PARAMS, X)
    )
    *_, rule = step(RULES["safe"])
    assert int(rule.history.num_steps) == 1


# --- finite differences ---


@pytest.mark.parametrize("mode", ["jitted", "eager"])
@pytest.mark.parametrize("name", ["one", "several", "normal", "factors", "ranks"])
def test_finite_differences_in_place_are_those_of_value_and_grad(name, mode):
    """The same directions, evaluated at points that are never formed."""
    rule = {
        "one": FD(epsilon=0.05),
        "several": FD(num_tangents=3, combine=fx.combine.Shrinkage(), epsilon=0.05),
        "normal": FD(T.Normal(), epsilon=0.05),
        "factors": FD(T.LowRank(), epsilon=0.05),
        "ranks": FD(T.LowRank(3), 2, epsilon=0.05),
    }[name]

    def both(key, params):
        value, grads = fx.value_and_grad(stack, rule)(key, params, X)
        expected = value, jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
        return fx.update(stack, rule, learning_rate=0.1)(key, params, X)[:2], expected

    run = jax.jit(both) if mode == "jitted" else both
    assert_trees_close(*run(KEY, PARAMS), rtol=1e-4, atol=1e-5)


def heads(params, x):
    """Weights that meet as weights, are transposed, gathered and only add."""
    w = params["a"] @ params["b"]
    rows = params["b"].T[jnp.array([0, 2, 2])]
    moved = jnp.tanh(x @ (w + jnp.ones((6, 6))) * params["gain"][None])
    return jnp.sum(moved**2) + jnp.sum(jnp.sin(rows @ params["a"].T)), {"moved": moved}


@pytest.mark.parametrize("rule", [FD(epsilon=0.05), FD(T.LowRank(), 2, epsilon=0.05)])
def test_finite_differences_of_examples_with_aux_and_all_kinds_of_uses(rule):
    """Products of two shifted weights are exact, second order included."""
    params = {"a": normal(1, 6, 3), "b": normal(2, 3, 6), "gain": normal(3, 6)}
    options = {"has_aux": True, "in_axes": (None, 0)}
    x = normal(4, 3, 2, 6)

    @jax.jit
    def both(key, params):
        (value, aux), grads = fx.value_and_grad(heads, rule, **options)(key, params, x)
        moved = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
        got = fx.update(heads, rule, learning_rate=0.1, **options)(key, params, x)
        return got, ((value, aux), moved)

    assert_trees_close(*both(KEY, params), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("tangents", [T.Rademacher(), T.LowRank()])
def test_finite_differences_in_place_have_the_same_factors(tangents):
    """Where parameters are so large that the step would move nothing."""
    params = {"w": normal(1, 6, 6) * 1e5, "b": normal(2, 3)}
    start = params["w"]
    loss = lambda p: jnp.sum(jnp.sin(p["w"] - start)) + jnp.sum(p["b"]) ** 2
    rule = FD(tangents, 2)

    @jax.jit
    def both(params):
        grads = fx.grad(loss, rule)(KEY, params)
        expected = jax.tree.map(lambda w, g: w - 0.05 * g, params, grads)
        return fx.update(loss, rule, learning_rate=0.05)(KEY, params)[1], expected

    got, expected = both(params)
    # Each tangent's step is told from what the ones before have left.
    assert_trees_close(got, expected, rtol=1e-4)
    assert bool(jnp.all(got["b"] != params["b"]))
    assert float(jnp.mean(got["w"] != params["w"])) > 0.2


def test_a_black_box_steps_in_place_eagerly():
    loss = lambda w: jnp.asarray(float(np.sum(np.square(w))))
    w, rule = jnp.array([1.0, 2.0]), FD(epsilon=0.5)
    expected = w - 0.1 * fx.grad(loss, rule)(KEY, w)
    assert_trees_close(fx.update(loss, rule, learning_rate=0.1)(KEY, w)[1], expected)


# --- momentum ---

MOMENTA = {
    "signs": W(),
    "several": W(T.Normal(), 3, chunk_size=2),
    "low-rank": W(T.LowRank(2), 3),
    "safe": fx.Safe(W(T.LowRank(), 2), clip=1.0, window=5, warm_up=1).init(),
    "differences": FD(T.LowRank(), 2, epsilon=0.05),
    "safe-differences": fx.Safe(
        FD(num_tangents=2, epsilon=0.05), 1.0, True, 5, 1
    ).init(),
}


@pytest.mark.parametrize("name", MOMENTA)
def test_momentum_is_the_decaying_sum_of_the_last_estimates(name):
    """In a ring of 4 that is not yet full, and then full.

    What is left out is exactly what is older.
    """
    rule, decay, window, safe = MOMENTA[name], 0.7, 4, "safe" in name

    @jax.jit
    def step(key, params, rule, momentum):
        _, grads, *_ = (
            rule.step(stack)(key, params, X)
            if safe
            else fx.value_and_grad(stack, rule)(key, params, X)
        )
        _, params, *state = fx.update(
            stack, rule, learning_rate=0.1, momentum=momentum
        )(key, params, X)
        return grads, params, *(state if safe else [rule, *state])

    params, held, last, momentum = (
        PARAMS,
        jax.device_get(PARAMS),
        [],
        fx.Momentum(decay, window).init(KEY, rule),
    )
    for key in jax.random.split(KEY, 7):
        grads, params, rule, momentum = step(key, params, rule, momentum)
        last = [*last, jax.device_get(grads)][-window:]
        total = jax.tree.map(
            lambda *each: sum(decay**s * g for s, g in enumerate(reversed(each))), *last
        )
        held = jax.tree.map(lambda w, m: w - 0.1 * m, held, total)
        assert_trees_close(params, held, rtol=1e-4, atol=1e-5)
    assert int(momentum.num_steps) == 7


def test_momentum_with_examples_needs_no_init():
    """A window as long as the run is the momentum of any optimiser."""
    loss, axes, rule = (
        (lambda w, x: jnp.sum(jnp.tanh(x @ w))),
        (None, 0),
        W(T.LowRank(per_example=True), 2),
    )
    w, total, momentum = PARAMS["w"][0], 0.0, fx.Momentum(0.5, 3)
    assert momentum.init(KEY, rule, len(X)).coefficients.shape == (3, 1, 2, 4)

    @jax.jit
    def step(key, w, momentum):
        grads = fx.grad(loss, rule, in_axes=axes)(key, w, X)
        return grads, *fx.update(
            loss, rule, learning_rate=0.1, momentum=momentum, in_axes=axes
        )(key, w, X)[1:]

    for i in range(3):
        grads, new, momentum = step(jax.random.key(i), w, momentum)
        total = 0.5 * total + grads
        assert_trees_close(new, w - 0.1 * total, rtol=1e-4, atol=1e-5)
        w = new


# --- memory ---


def temporaries(function, *args, **options) -> int:
    """Bytes."""
    return (
        jax.jit(function, **options)
        .lower(*args)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )


def temporaries_of_leaves(function, structure, *leaves) -> int:
    return temporaries(function, *structure.unflatten(leaves))


def of_update(loss, rule, params, x):
    """Bytes, with donated parameters."""
    step = lambda key, params, x: fx.update(loss, rule, learning_rate=0.1)(
        key, params, x
    )
    return temporaries(step, KEY, params, x, donate_argnums=1)


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def num_bytes(leaf):
    return leaf.size * leaf.dtype.itemsize


def inputs(width=64, depth=24, batch=8):
    params = {"w": floats(depth, width, width), "b": floats(depth, 1, width)}
    return params, floats(batch, width)


inference = functools.cache(temporaries_of_leaves)


def bound(loss, params, x):
    """What inference takes, a tenth more, and the largest parameter."""
    leaves, structure = jax.tree.flatten((params, x))
    return 1.1 * inference(loss, structure, *leaves) + max(
        map(num_bytes, jax.tree.leaves(params))
    )


FRUGAL = {
    "signs": W(),
    "several-signs": W(num_tangents=3, chunk_size=1),
    "safe": fx.Safe(W(T.LowRank())).init(),
    "several": W(T.LowRank(), 4),
    "chunks": W(T.LowRank(2), 4, chunk_size=1),
    "many": W(T.LowRank(), 12, chunk_size=2),
}


@pytest.mark.parametrize("name", FRUGAL)
def test_a_stack_takes_what_inference_takes_and_one_leaf(name):
    params, x = inputs()
    assert of_update(stack, FRUGAL[name], params, x) <= bound(stack, params, x)


@pytest.mark.parametrize("name", ["safe", "several"])
def test_a_recurrent_network_takes_what_inference_takes_and_one_leaf(name):
    w, x = floats(256, 256), floats(8, 256)
    assert of_update(recurrent, FRUGAL[name], w, x) <= 0.5 * bound(recurrent, w, x)


def test_momentum_takes_no_copy_of_the_parameters():
    """Neither in its state nor beside it."""
    params, x = inputs()
    momentum = fx.Momentum().init(KEY, W(T.LowRank()))
    assert sum(jnp.asarray(leaf).nbytes for leaf in jax.tree.leaves(momentum)) < 1000
    step = lambda key, params, momentum, x: fx.update(
        stack, W(T.LowRank()), learning_rate=0.1, momentum=momentum
    )(key, params, x)
    assert temporaries(step, KEY, params, momentum, x, donate_argnums=(1, 2)) <= bound(
        stack, params, x
    )


def test_dense_signs_are_unpacked_where_they_are_used():
    """Until then they are a 32nd of the parameters, as words and as what is cut from these."""
    params, x = [floats(128, 128)] * 12, floats(4, 128)
    words = sum(map(num_bytes, params)) / 32
    assert of_update(mlp, W(), params, x) <= bound(mlp, params, x) + 2.5 * words


def test_leaves_are_updated_one_after_the_other():
    """No summand is held; a gradient is as large as all parameters."""
    params, x, rule = (
        [floats(128, 128)] * 12,
        floats(4, 128),
        W(T.LowRank(), 4),
    )
    assert of_update(mlp, rule, params, x) < 1.5 * num_bytes(params[0])
    step = lambda key, p, x: jax.tree.map(
        lambda w, g: w - g, p, fx.grad(mlp, rule)(key, p, x)
    )
    assert temporaries(step, KEY, params, x, donate_argnums=1) > 11 * num_bytes(
        params[0]
    )


DIFFERENCES = {
    "factors": (FD(T.LowRank()), 0.01),
    "several-factors": (FD(T.LowRank(2), 4), 0.05),
    "signs": (FD(), 0.1),
    "several-signs": (FD(num_tangents=3), 0.1),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_finite_differences_shift_no_copy_of_a_stack(name):
    """Beside what inference holds at most a tenth of the parameters, a layer at a time."""
    params, x = inputs(width=128, depth=32)
    rule, most = DIFFERENCES[name]
    leaves, structure = jax.tree.flatten((params, x))
    held = of_update(stack, rule, params, x) - inference(stack, structure, *leaves)
    assert held <= most * num_bytes(params["w"])


def test_finite_differences_along_factors_hold_no_matrix():
    w, x = floats(2048, 2048), floats(8, 2048)
    held = of_update(lambda w, x: mlp([w], x), FD(T.LowRank()), w, x)
    assert held <= 0.1 * num_bytes(w)


def test_finite_differences_look_up_on_each_side():
    """Rows of a table and their tangents are not held beside both evaluations."""
    params, tokens = [floats(2048, 128), floats(128, 128)], jnp.arange(1024)
    loss = lambda params, tokens: mlp(params[1:], params[0][tokens])
    held = of_update(loss, FD(T.LowRank()), params, tokens)
    assert held <= temporaries(loss, params, tokens) + 1.25 * 1024 * 128 * 4


def test_finite_differences_of_unrolled_layers_hold_a_few():
    """Where one is used whole its shifted copy is held, as a tangent is for exact slopes."""
    params, x = [floats(256, 256)] * 12, floats(4, 256)
    assert of_update(mlp, FD(), params, x) <= 3 * num_bytes(params[0])


# --- errors ---


def test_other_rules_are_refused():
    with pytest.raises(
        TypeError,
        match=r"forwax.WeightPerturbation or forwax.FiniteDifference, .* got Activity",
    ):
        fx.update(stack, fx.ActivityPerturbation(), learning_rate=0.1)
    with pytest.raises(
        TypeError, match=r"one of tangents.Rademacher\(\), .* got Orthonormal"
    ):
        fx.update(stack, fx.Safe(W(T.Orthonormal())), learning_rate=0.1)
    with pytest.raises(
        ValueError,
        match=r"expected combine.Mean\(\) or combine.Shrinkage\(\), got Projection",
    ):
        fx.update(stack, W(combine=fx.combine.Projection()), learning_rate=0.1)
    with pytest.raises(ValueError, match="needs examples: expected in_axes"):
        fx.update(stack, W(T.LowRank(per_example=True)), learning_rate=0.1)(
            KEY, PARAMS, X
        )


def test_momenta_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"expected decay from 0 to below 1, got 1\.0"):
        fx.Momentum(1.0)
    with pytest.raises(
        ValueError, match="expected window to be a positive integer, got 0"
    ):
        fx.Momentum(window=0)
    with pytest.raises(ValueError, match="expected num_examples, got None"):
        fx.Momentum().init(KEY, W(T.LowRank(per_example=True)))
    momentum = fx.Momentum().init(KEY, W(num_tangents=2))
    with pytest.raises(
        ValueError,
        match=r"keys \[1, 2\] of threefry2x32 and slopes \[1, 2\] in each step, got .* \[1, 1\]",
    ):
        fx.update(stack, learning_rate=0.1, momentum=momentum)(KEY, PARAMS, X)


def test_sharded_parameters_are_refused():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data = jax.sharding.PartitionSpec("data")
    step = fx.update(lambda w: jnp.sum(w**2), learning_rate=0.1)
    run = jax.shard_map(
        lambda w: step(KEY, w)[1], mesh=mesh, in_specs=data, out_specs=data
    )
    with pytest.raises(ValueError, match=r"do not vary over mesh axes, got \['data'\]"):
        run(jnp.ones(4))


@pytest.mark.parametrize(("count", "width"), [(1, 512), (4, 256)])
def test_normals_are_made_once(count, width):
    """From words that are drawn before; each use does not make them anew from these."""
    layer = lambda x, w: jnp.tanh(x @ w)
    loss = lambda params, x: jnp.mean(functools.reduce(layer, params, x) ** 2)
    params, x = [floats(width, width)] * count, floats(8, width)
    held = of_update(loss, W(T.Normal()), params, x)
    assert held < 4.1 * sum(map(num_bytes, params))
