"""Problems that people had in public with forward mode and with training by slopes.

One test for each thread, named in its docstring: what was tried there works here, or is answered.
The cases that need the command line are in `lab/test_public_cases_of_the_lab.py`.
"""

import tempfile
from pathlib import Path

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix
import orbax.checkpoint as ocp
import pytest
from jax.experimental.ode import odeint
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import forwax as fx

KEY = jax.random.key(0)
EACH = (None, 0, 0)
LIMITS = Path(__file__).parent.parent / "docs" / "limits.md"
LOW_RANK = fx.WeightPerturbation(fx.tangents.LowRank())
CHUNKS = fx.WeightPerturbation(num_tangents=4, chunk_size=2)
EVERY_DIRECTION = fx.WeightPerturbation(fx.tangents.Orthonormal(), 2, chunk_size=1)


def normal(number, *shape):
    return jax.random.normal(jax.random.key(number), shape)


def squares(w, x):
    return jnp.mean(jnp.tanh(x @ w) ** 2)


def is_finite(tree):
    return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(tree))


def close(got, expected, rtol=1e-3, atol=0.0):
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol, atol)


# Models and what their losses are called with


@pytest.mark.parametrize(
    "rule",
    [
        fx.WeightPerturbation(num_tangents=2),
        LOW_RANK,
        fx.ActivityPerturbation(),
        fx.FiniteDifference(epsilon=1e-2),
    ],
    ids=repr,
)
def test_adapters_of_a_frozen_model_that_holds_more_than_floats(rule):
    """MeZO#22, MeZO#45 (princeton-nlp), equinox#239: integers, keys and half precision beside."""
    frozen = {"w": normal(0, 6, 6).astype(jnp.bfloat16), "steps": jnp.array(3)}
    frozen |= {"rng": jax.random.key(1), "name": "base"}
    adapter = {"a": normal(1, 6, 2) / 10, "b": normal(2, 2, 6) / 10}

    def loss(frozen, adapter, x):
        w = frozen["w"].astype(jnp.float32) + adapter["a"] @ adapter["b"]
        return jnp.mean((jnp.tanh(x @ w) - x) ** 2)

    grads = fx.grad(loss, rule, argnums=1)(KEY, frozen, adapter, normal(3, 8, 6))
    assert is_finite(grads)
    assert jax.tree.structure(grads) == jax.tree.structure(adapter)


def test_attention_with_mask_and_dropout():
    """functorch#1132, pytorch#117629, pytorch#128971: a fused attention under forward mode."""
    module = eqx.nn.MultiheadAttention(2, 4, dropout_p=0.2, key=KEY)
    params, static = eqx.partition(module, eqx.is_inexact_array)
    mask = jnp.tril(jnp.ones((5, 5), bool))

    def loss(params, x, key):
        h = eqx.combine(params, static)(x, x, x, mask=mask, key=key)
        h = h[None, :, None]
        h = jax.nn.dot_product_attention(h, h, h, is_causal=True)
        return jnp.mean(jnp.tanh(h) ** 2)

    data = normal(1, 3, 5, 4), jax.random.split(KEY, 3)
    exact = fx.grad(loss, fx.Backprop(), in_axes=EACH)(KEY, params, *data)
    for rule in (fx.ActivityPerturbation(), fx.WeightPerturbation(num_tangents=4)):
        # 400 estimates; the projection of their mean has a standard error below 0.1
        estimate = fx.grad(loss, rule, in_axes=EACH)
        keys = jax.random.split(KEY, 400)
        many = jax.jit(jax.vmap(lambda k, f=estimate: f(k, params, *data)))(keys)
        mean = jax.tree.map(lambda g: jnp.mean(g, axis=0), many)
        along = [
            jnp.vdot(a, b)
            for a, b in zip(*map(jax.tree.leaves, (mean, exact)), strict=True)
        ]
        whole = [jnp.vdot(b, b) for b in jax.tree.leaves(exact)]
        assert abs(float(sum(along) / sum(whole)) - 1) < 0.35


@pytest.mark.parametrize(
    "rule",
    [fx.WeightPerturbation(), LOW_RANK, fx.ActivityPerturbation()],
    ids=repr,
)
def test_flags_texts_and_none_among_the_arguments(rule):
    """jax#4416, jax#3045, numpyro#1078: what is no array stays what it is."""

    def loss(p, x, train, mode, extra):
        assert (train, mode, extra) == (True, "tanh", None)
        return jnp.mean(jnp.tanh(x @ p) ** 2)

    x = normal(0, 4, 3)
    assert is_finite(fx.grad(loss, rule)(KEY, jnp.ones((3, 2)), x, True, "tanh", None))
    axes = (None, 0, None, None, None)
    each = fx.grad(lambda p, x, *rest: loss(p[:, None], x, *rest), rule, in_axes=axes)
    assert is_finite(each(KEY, jnp.ones(3), x, True, "tanh", None))


@pytest.mark.parametrize("rule", [fx.ActivityPerturbation(), LOW_RANK], ids=repr)
def test_the_batch_as_a_keyword(rule):
    """As in the examples of optax and flax, which pass it so."""

    def loss(p, *, batch, train=True):
        assert train is False
        return jnp.mean((jnp.tanh(batch["x"] @ p["w"]) @ p["o"]) ** 2)

    p = {"w": normal(0, 3, 4), "o": normal(1, 4, 1)}
    grads = fx.grad(loss, rule)(KEY, p, batch={"x": normal(2, 6, 3)}, train=False)
    assert is_finite(grads)


def test_feedback_alignment_of_a_convolutional_network():
    """feedback-alignment-pytorch#2 (L0SG): it trains, and its errors are not backprop's."""
    keys = jax.random.split(KEY, 3)
    layers = [eqx.nn.Conv2d(1, 4, 3, key=keys[0])]
    layers += [eqx.nn.Conv2d(4, 4, 3, stride=2, key=keys[1])]
    layers += [eqx.nn.Linear(16, 2, key=keys[2])]
    params, static = eqx.partition(layers, eqx.is_inexact_array)
    y = jax.random.randint(KEY, (32,), 0, 2)
    x = normal(1, 32, 1, 8, 8) + 0.5 * y[:, None, None, None].astype(jnp.float32)

    def loss(params, x, y):
        first, second, last = eqx.combine(params, static)
        h = jnp.tanh(second(jnp.tanh(first(x))))
        return -jax.nn.log_softmax(last(h.reshape(-1)))[y]

    rule = fx.FeedbackAlignment(fx.random_feedback(KEY, params))
    estimate = fx.value_and_grad(loss, rule, in_axes=EACH)

    def step(p, _):
        value, grads = estimate(KEY, p, x, y)
        return jax.tree.map(lambda a, b: a - 0.1 * b, p, grads), value

    trained, values = jax.jit(lambda p: jax.lax.scan(step, p, length=150))(params)
    assert float(values[-1]) < 0.6 * float(values[0])
    ours = estimate(KEY, trained, x, y)[1][0].weight
    exact = fx.grad(loss, fx.Backprop(), in_axes=EACH)(KEY, trained, x, y)[0].weight
    assert float(jnp.max(jnp.abs(ours - exact))) > 0.1 * float(jnp.max(jnp.abs(exact)))


# Transformations around an estimate


@pytest.mark.parametrize(
    "rule",
    [
        fx.WeightPerturbation(num_tangents=3, chunk_size=2),
        fx.WeightPerturbation(fx.tangents.LowRank(), 2),
        fx.ActivityPerturbation(),
    ],
    ids=repr,
)
def test_an_ensemble_by_vmap_over_models_and_keys(rule):
    """sparsejac#14, functorch#882: together as each alone."""
    x, models, keys = normal(0, 5, 3), normal(1, 4, 3, 2), jax.random.split(KEY, 4)
    estimate = fx.grad(squares, rule)
    together = jax.jit(jax.vmap(estimate, (0, 0, None)))(keys, models, x)
    alone = jax.jit(estimate)
    for key, model, got in zip(keys, models, together, strict=True):
        close(got, alone(key, model, x), atol=1e-5)


@pytest.mark.parametrize(
    "rule",
    [fx.WeightPerturbation(), CHUNKS, LOW_RANK, fx.ActivityPerturbation()],
    ids=repr,
)
def test_the_gradient_of_one_step_by_an_estimate(rule):
    """jax#650, functorch#724: meta-learning, against central differences."""
    x, w, along = normal(0, 5, 3), 0.4 * jnp.ones((3, 2)), normal(1, 3, 2)

    @jax.jit
    def outer(w):
        return jnp.sum((w - 0.1 * fx.grad(squares, rule)(KEY, w, x)) ** 2)

    ahead, behind = outer(w + 1e-2 * along), outer(w - 1e-2 * along)
    difference = float(ahead - behind) / 2e-2
    got = float(jnp.vdot(jax.grad(outer)(w), along))
    assert got == pytest.approx(difference, rel=0.03, abs=1e-3)


@pytest.mark.promotes("optax's Adam mixes dtypes")
def test_donated_parameters_and_optimiser_in_a_loop():
    """Buffers given away to a jitted step, as training loops with optax do."""
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    rule = fx.WeightPerturbation(num_tangents=8)

    def loss(p, x):
        return jnp.mean((x @ p["w"] - 1) ** 2)

    def step(key, params, state, x):
        value, grads = fx.value_and_grad(loss, rule)(key, params, x)
        updates, state = optimiser.update(grads, state, params)
        return value, optax.apply_updates(params, updates), state

    params, x = {"w": jnp.zeros((3, 1))}, normal(0, 16, 3)
    state = optimiser.init(params)
    donated = jax.jit(step, donate_argnums=(1, 2))
    values = []
    for i in range(60):
        value, params, state = donated(jax.random.fold_in(KEY, i), params, state, x)
        values.append(float(value))
    assert np.isfinite(values).all()
    assert values[-1] <= values[0] + 0.05


def test_no_tracer_is_kept_alive():
    """jax#5636, jax#23065, dm-haiku#99, numpyro#1329: leak checks on, with aux that is no array."""

    def loss(p, x):
        return squares(p, x), {"y": x @ p, "name": "run"}

    rules = [fx.WeightPerturbation(), CHUNKS, LOW_RANK, fx.ActivityPerturbation()]
    with jax.checking_leaks():
        for rule in [*rules, fx.FiniteDifference()]:
            estimate = fx.value_and_grad(loss, rule, has_aux=True)
            jax.jit(lambda *args, f=estimate: f(*args)[1]).lower(
                KEY, jnp.ones((3, 2)), jnp.ones((4, 3))
            )


@pytest.mark.parametrize(
    "rule",
    [
        fx.WeightPerturbation(),
        fx.WeightPerturbation(num_tangents=4),
        fx.WeightPerturbation(fx.tangents.LowRank(), 4),
        fx.Exact(),
    ],
    ids=repr,
)
def test_a_callback_in_the_loss_is_called_once_a_step(rule):
    """jax#16637, jax#5883: and not once for each tangent."""
    calls = []

    def loss(w):
        jax.debug.callback(lambda v: calls.append(float(v)), jnp.sum(w))
        return jnp.sum(w**2)

    jax.block_until_ready(jax.jit(fx.value_and_grad(loss, rule))(KEY, jnp.ones((2, 2))))
    jax.effects_barrier()
    assert len(calls) == 1


# Programs that have a derivative of their own, or none


@pytest.mark.promotes("a user's power of an integer")
def test_a_custom_jvp_with_an_integer_argument():
    """jax#16000, jax#4433: tangents of integers are float0."""

    @jax.custom_jvp
    def power(x, n):
        return x**n

    @power.defjvp
    def _(primals, tangents):
        (x, n), (t, _) = primals, tangents
        return power(x, n), n * x ** (n - 1) * t

    def loss(w, x, n):
        return jnp.sum(power(jnp.tanh(x @ w), n) * jnp.arange(4.0)[None])

    args = 0.3 * jnp.ones((3, 4)), normal(0, 2, 3), jnp.int32(3)
    close(jax.jit(fx.grad(loss, fx.Exact()))(KEY, *args), jax.grad(loss)(*args), 1e-4)
    basis = fx.WeightPerturbation(fx.tangents.Orthonormal(), 12)
    for rule in (basis, LOW_RANK, fx.ActivityPerturbation()):
        assert is_finite(jax.jit(fx.grad(loss, rule))(KEY, *args))


def test_through_an_ode_solver_forwards():
    """diffrax#612, diffrax#537: `ForwardMode` with several tangents in chunks."""

    def loss(rates, adjoint):
        term = diffrax.ODETerm(lambda t, y, args: -args * y)
        start = jnp.array([1.0, 2.0])
        found = diffrax.diffeqsolve(
            term, diffrax.Tsit5(), 0.0, 1.0, 0.1, start, args=rates, adjoint=adjoint
        )
        return jnp.sum(found.ys[-1])

    rates = jnp.array([2.3, 0.7])
    exact = -jnp.array([1.0, 2.0]) * jnp.exp(-rates)
    forward = diffrax.ForwardMode()
    for rule in (fx.Exact(), EVERY_DIRECTION):
        got = jax.jit(fx.grad(lambda a: loss(a, forward), rule))(KEY, rates)
        close(got, exact)


def test_through_a_root_find_forwards():
    """optimistix#50, optimistix#112, jaxopt#474: by the implicit function theorem."""

    def loss(a):
        found = optimistix.root_find(
            lambda y, a: y**3 + a[0] * y - a[1],
            optimistix.Newton(1e-6, 1e-6),
            jnp.float32(1.0),
            args=a,
            max_steps=50,
        )
        return found.value**2

    a = jnp.array([1.0, 3.0])
    y = jnp.sqrt(loss(a))
    exact = jnp.stack([-y, jnp.float32(1)]) / (3 * y**2 + 1) * 2 * y
    for rule in (fx.Exact(), EVERY_DIRECTION):
        close(jax.jit(fx.grad(loss, rule))(KEY, a), exact)


@pytest.mark.promotes("odeint mixes dtypes")
def test_a_solver_that_has_reverse_mode_alone_is_named():
    """jax#3558, jax#2718: `odeint` with its parameter closed over."""

    def loss(k):
        times = jnp.array([0.0, 1.0])
        return odeint(lambda y, t: -k * y, jnp.float32(1.0), times)[-1]

    with pytest.raises(Exception, match=r"(?s)odeint.*FiniteDifference"):
        fx.grad(loss, fx.Exact())(KEY, jnp.float32(2.0))
    difference = fx.grad(loss, fx.FiniteDifference(epsilon=1e-2))
    assert float(difference(KEY, jnp.float32(2.0))) == pytest.approx(
        -np.exp(-2), abs=2e-3
    )


@pytest.mark.parametrize("mode", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("num_tangents", [1, 4])
def test_a_simulator_behind_a_callback(mode, num_tangents):
    """jax#15425, jax#13587, jax#16650, DESC#1028: no derivative, and no vmap unless asked."""

    def simulate(w):
        return np.float32(np.sum((np.asarray(w) - 1) ** 2))

    def loss(w):
        return jax.pure_callback(simulate, jax.ShapeDtypeStruct((), jnp.float32), w)

    rule = fx.FiniteDifference(num_tangents=num_tangents, epsilon=1e-2)
    assert is_finite(mode(fx.grad(loss, rule))(KEY, jnp.zeros(4)))
    with pytest.raises(Exception, match="FiniteDifference"):
        mode(fx.grad(loss))(KEY, jnp.zeros(4))


def test_a_while_loop_inside_shard_map():
    """jax#27664: a loop that reverse mode refuses, over four devices."""
    mesh = jax.make_mesh((4,), ("batch",))
    x = jnp.linspace(0.5, 1.5, 8)
    spread = jax.device_put(x, NamedSharding(mesh, P("batch")))

    def after(w, x, loop):
        out = loop(lambda h: jnp.tanh(w * h + x), jnp.zeros_like(x))
        return jnp.mean((out - 0.5) ** 2)

    def until(f, h):
        start = h, 0
        return jax.lax.while_loop(
            lambda c: c[1] < 5, lambda c: (f(c[0]), c[1] + 1), start
        )[0]

    def loss(w, x):
        return jax.lax.pmean(after(w, x, until), "batch")

    rule = fx.WeightPerturbation(num_tangents=2)
    estimate = jax.shard_map(
        lambda *args: fx.grad(loss, rule)(*args),
        mesh=mesh,
        in_specs=(P(), P(), P("batch")),
        out_specs=P(),
    )

    def five(f, h):
        return jax.lax.fori_loop(0, 5, lambda i, h: f(h), h)

    exact = jax.grad(lambda w: after(w, x, five))
    # signs in one dimension: the estimate is exact
    close(jax.jit(estimate)(KEY, jnp.float32(0.3), spread), exact(jnp.float32(0.3)))


def test_an_older_loop_by_pmap():
    """jax#32701, nequix#38: a named axis, and the same key on every device."""

    def loss(w, x, y):
        return jnp.mean((x @ w - y) ** 2)

    x, rule = normal(0, 4, 8, 3), fx.WeightPerturbation(num_tangents=2)
    y = jnp.sum(x, axis=-1)

    def on_each(key, w, x, y):
        def over_all(w, x, y):
            return jax.lax.pmean(loss(w, x, y), "i")

        return fx.grad(over_all, rule)(key, w, x, y)

    step = jax.pmap(
        on_each, axis_name="i", in_axes=(None, None, 0, 0), devices=jax.devices()[:4]
    )
    got = step(KEY, jnp.zeros(3), x, y)
    alone = fx.grad(loss, rule)(KEY, jnp.zeros(3), x.reshape(32, 3), y.reshape(32))
    for device in got:
        close(device, alone, atol=1e-6)


# Numbers


def test_exact_keeps_an_infinite_slope_in_its_own_coordinate():
    """jax-fenics-adjoint#2, jax#3058: 0 times infinity spread NaN over all others."""
    grads = fx.grad(lambda p: jnp.sqrt(p["a"]) + 3 * p["b"] ** 2, fx.Exact())(
        KEY, {"a": jnp.float32(0), "b": jnp.float32(1)}
    )
    assert float(grads["b"]) == pytest.approx(6.0)
    assert not np.isfinite(grads["a"])


def test_a_nan_that_forward_mode_alone_has_is_on_the_page_of_limits():
    """exojax#598, DESC#1489, torax#2331: the square root of a masked zero."""
    starts = jnp.array([0.5, 1.0, 2.0])

    def chords(r):
        inside = jnp.where(r > starts, r**2 - starts**2, 0.0)
        return jnp.sum(jnp.sqrt(inside))

    def mended(r):
        is_inside = r > starts
        inside = jnp.where(is_inside, r**2 - starts**2, 1.0)
        return jnp.sum(jnp.where(is_inside, jnp.sqrt(inside), 0.0))

    r = jnp.float32(1.5)
    assert np.isnan(fx.grad(chords)(KEY, r))
    # the page's way out
    close(fx.grad(mended)(KEY, r), jax.grad(mended)(r))
    text = LIMITS.read_text(encoding="utf-8")
    assert "NaN" in text
    assert "jnp.where" in text


def test_equal_singular_values():
    """jax#8732, jax#2311, jax#1383: the derivative is NaN; `Safe` skips, differences work."""

    def loss(a):
        u, s, v = jnp.linalg.svd(a, full_matrices=False)
        return jnp.linalg.norm((u * s[None]) @ v)

    a = jnp.diag(jnp.array([1.0, 1.0, 2.0, 3.0]))
    safe = fx.Safe(fx.WeightPerturbation(), clip=1.0).init()
    _, grads, safe = safe.step(loss)(KEY, a)
    assert is_finite(grads)
    assert int(safe.monitor(a).num_skipped) == 1
    estimate = fx.grad(loss, fx.FiniteDifference(epsilon=1e-2))
    # an entry's error has a standard deviation of at most 1 / sqrt(2000), 0.022
    mean = jnp.mean(
        jax.vmap(estimate, (0, None))(jax.random.split(KEY, 2000), a), axis=0
    )
    close(mean, a / jnp.linalg.norm(a), rtol=0, atol=0.12)


def test_a_step_that_half_precision_rounds_away():
    """MeZO#42, MeZO#6 (princeton-nlp), DESC#1028: weights of 100 and a small epsilon."""

    def loss(w):
        return jnp.sum(w.astype(jnp.float32) ** 2)

    w = jnp.full(4, 100, jnp.bfloat16)
    with pytest.raises(ValueError, match="epsilon"):
        fx.grad(loss, fx.FiniteDifference(epsilon=1e-3))(KEY, w)
    got = fx.grad(loss, fx.FiniteDifference(epsilon=0.0625))(KEY, w)
    assert float(jnp.sum(jnp.abs(got.astype(jnp.float32)))) > 0


def test_a_decaying_step_in_half_precision():
    """optax#357, optax#1753, MeZO#6: a traced gain c / (k + 1)^0.101 is checked, or enlarged."""

    def loss(w):
        return jnp.sum((w.astype(jnp.float32) - 3) ** 2)

    w = jnp.ones(3, jnp.bfloat16)  # an odd number of signs: no slope is zero
    for i in range(3):
        epsilon = 1e-3 / (jnp.float32(i) + 1) ** 0.101
        got = fx.grad(loss, fx.FiniteDifference(epsilon=epsilon))(jax.random.key(i), w)
        assert float(jnp.sum(jnp.abs(got.astype(jnp.float32)))) > 0


def test_gradients_in_float32_of_weights_in_bfloat16():
    """jax#30337: for an optimiser that keeps its own masters."""
    scale = jnp.array([1e-3, 1.0, 3.001, 1e3])

    def loss(w):
        return jnp.sum(w.astype(jnp.float32) * scale)

    w = jnp.ones(4, jnp.bfloat16)
    got = fx.grad(loss, fx.Exact(), gradient_dtype=jnp.float32)(KEY, w)
    assert got.dtype == jnp.float32
    close(got, scale, rtol=1e-6)


def test_nothing_divides_zero_by_zero_where_the_gradient_is_zero():
    """mujoco#1349, mujoco#1377: with `jax_debug_nans`, at a minimum."""
    x, p = normal(0, 6, 3), {"w": normal(1, 3, 4), "o": normal(2, 4, 1)}

    def loss(p, x):
        return 0.0 * jnp.mean((jnp.tanh(x @ p["w"]) @ p["o"]) ** 2)

    zero = jax.tree.map(jnp.zeros_like, p)
    combine = fx.combine
    rules = [
        fx.WeightPerturbation(num_tangents=3, combine=combine.Projection()),
        fx.WeightPerturbation(combine=combine.ControlVariate(zero)),
        fx.WeightPerturbation(fx.tangents.Guided(zero), 2),
        fx.ActivityPerturbation(num_tangents=2, combine=combine.Shrinkage()),
    ]
    with jax.debug_nans(True):
        for rule in rules:
            assert is_finite(jax.jit(fx.grad(loss, rule))(KEY, p, x))
        fx.Safe(fx.WeightPerturbation(), clip=1.0).init()


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"]
)
def test_under_strict_promotion_of_ranks_and_dtypes(dtype):
    """flax#1534, equinox#308, jax#7208, jax#7368: a code base that forbids implicit promotion."""
    tangents = fx.tangents
    x = normal(0, 6, 3).astype(dtype)
    p = {
        "w": jnp.ones((3, 4), dtype),
        "b": jnp.zeros(4, dtype),
        "o": jnp.ones((4, 1), dtype),
    }

    def loss(p, x):
        return jnp.mean((jnp.tanh(x @ p["w"] + p["b"][None]) @ p["o"]) ** 2)

    rules = [
        CHUNKS,
        LOW_RANK,
        fx.ActivityPerturbation(),
        fx.Exact(),
        fx.FiniteDifference(),
    ]
    kinds = [tangents.Orthonormal(), tangents.Hadamard(), tangents.Sparse(0.5)]
    rules += [
        fx.WeightPerturbation(kind, 2) for kind in [*kinds, tangents.Coordinate()]
    ]
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        for rule in rules:
            jax.eval_shape(fx.grad(loss, rule), KEY, p, x)


def test_a_few_coordinates_at_a_time_by_evaluations_alone():
    """qiskit#6116: sparse directions, several samples."""
    rule = fx.FiniteDifference(fx.tangents.Sparse(0.25), num_tangents=4, epsilon=0.05)
    goal = jnp.arange(8.0)
    estimate = fx.grad(lambda w: jnp.sum((w - goal) ** 2), rule)
    keys = jax.random.split(KEY, 4000)
    mean = jnp.mean(jax.vmap(estimate, (0, None))(keys, jnp.zeros(8)), axis=0)
    # an entry's standard error is about |g| sqrt(3 / 16000) = 0.33
    close(mean, -2 * goal, rtol=0, atol=1.2)


# Memory, rates, states


@pytest.mark.usefixtures("optimised")
def test_exact_does_not_hold_all_tangents_at_once():
    """jax#719, DESC#826, functorch#680: `jacfwd` runs out of memory."""

    def loss(w, x):
        def layer(h, _):
            return jnp.tanh(h @ w), None

        return jnp.mean(jax.lax.scan(layer, x, length=4)[0] ** 2)

    shapes = jnp.zeros((48, 48)), jnp.zeros((64, 48))

    def temporaries(f, *args):
        compiled = jax.jit(f).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours = temporaries(fx.grad(loss, fx.Exact()), KEY, *shapes)
    assert ours < temporaries(jax.jacfwd(loss), *shapes) / 4


def test_the_suggested_rate_where_backprops_explodes():
    """fwdgrad#10 (orobix), MeZO#31 (princeton-nlp)."""
    x = normal(0, 64, 20)
    y = jnp.sum(jnp.sin(x), axis=1)
    start, rule = (
        {"w": normal(1, 20, 32) / 4, "o": jnp.zeros(32)},
        fx.WeightPerturbation(),
    )

    def loss(p):
        return jnp.mean((jnp.tanh(x @ p["w"]) @ p["o"] - y) ** 2)

    @jax.jit
    def run(rate):
        def step(p, key):
            value, grads = fx.value_and_grad(loss, rule)(key, p)
            return jax.tree.map(lambda a, b: a - rate * b, p, grads), value

        return jax.lax.scan(step, start, jax.random.split(KEY, 2000))[1]

    suggested = run(fx.suggest_learning_rate(rule, 20 * 32 + 32, 0.05))
    assert float(jnp.mean(suggested[-100:])) < 0.8 * float(suggested[0])
    assert not float(run(0.05)[-1]) < float(suggested[0])


def test_slopes_that_are_clipped_at_a_median_and_counted():
    """fwdgrad#8, fwdgrad#10 (orobix): heavy tails, without a step that ruins the weights."""

    def loss(w, x):
        return jnp.mean((x @ w) ** 4)

    safe = fx.Safe(
        fx.WeightPerturbation(fx.tangents.Normal(), num_tangents=4), clip=1.0
    ).init()
    w, x = jnp.ones(5), 3 * normal(0, 16, 5)
    step = jax.jit(lambda key, safe, w: safe.step(loss)(key, w, x))
    for i in range(60):
        value, grads, safe = step(jax.random.fold_in(KEY, i), safe, w)
        w = w - 1e-4 * grads
    assert is_finite(value)
    assert int(safe.monitor(w).num_clipped) > 0


def test_checkpoints_of_states_that_hold_keys():
    """orbax#620, orbax#1105, orbax#2540: `Momentum` has typed keys, `Safe` slopes."""

    def loss(p, x):
        return jnp.mean((x @ p["w"]) ** 2)

    params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
    momentum = fx.Momentum(decay=0.9, window=4).init(KEY, LOW_RANK)
    safe = fx.Safe(fx.WeightPerturbation(), clip=1.0).init()
    update = fx.update(loss, LOW_RANK, learning_rate=0.1, momentum=momentum)
    _, params, momentum = update(KEY, params, x)
    _, _, safe = safe.step(loss)(KEY, params, x)
    state = {"params": params, "momentum": momentum, "safe": safe}
    with (
        tempfile.TemporaryDirectory() as folder,
        ocp.StandardCheckpointer() as checkpoints,
    ):
        checkpoints.save(Path(folder) / "state", state)
        checkpoints.wait_until_finished()
        back = checkpoints.restore(Path(folder) / "state", state)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True):
        is_key = jnp.issubdtype(jnp.result_type(a), jax.dtypes.prng_key)
        a, b = (jax.random.key_data(v) if is_key else v for v in (a, b))
        np.testing.assert_array_equal(a, b)
