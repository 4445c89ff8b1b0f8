"""Slopes and replay: the two halves of `fx.update`, bit for bit, on one device and on several."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import forwax as fx
from cases import assert_trees_close, normal

pytestmark = pytest.mark.usefixtures("optimised")

T = fx.tangents
KEY = jax.random.key(0)
W = fx.WeightPerturbation
FD = fx.FiniteDifference
# Small leaves: XLA unrolls the loops over words of threefry, and nine are a vector and a rest.
PARAMS = {"w": normal(1, 2, 3, 3), "b": normal(2, 2, 1, 3), "out": normal(4, 3, 3)}
X = normal(3, 4, 3)
AXES = {"in_axes": (None, 0)}


def stack(params, x):
    """A scan over layers, and a head that meets data by itself."""
    layer = lambda h, p: (jnp.tanh(h @ p["w"] + p["b"]), None)
    h, _ = lax.scan(layer, x, {"w": params["w"], "b": params["b"]})
    return jnp.mean((h @ params["out"]) ** 2)


def one(params, x):
    """The loss of one example."""
    return stack(params, x[None])


def assert_same(got, expected):
    """In every bit."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_array_equal(one, other)


def both(loss, rule, params, *args, key=KEY, rate=0.1, **options):
    """What `update` gives in one program, and its halves in two, there with a traced rate."""
    rounding = options.pop("rounding", "nearest")
    update = fx.update(loss, rule, learning_rate=rate, rounding=rounding, **options)
    axes = {"in_axes": options.get("in_axes")}
    value, slopes = jax.jit(fx.slopes(loss, rule, **options))(key, params, *args)
    replay = jax.jit(fx.replay(loss, rule, rounding=rounding, **axes))
    moved = replay(slopes, jnp.float32(rate), params, *args)
    return jax.jit(update)(key, params, *args), (value, moved)


EXACT = {
    **{f"signs-{k}": W(num_tangents=k) for k in (1, 3, 16)},
    **{f"normal-{k}": W(T.Normal(), k) for k in (1, 3, 16)},
    **{f"sparse-{k}": W(T.Sparse(0.5), k) for k in (1, 3, 16)},
    **{f"low-rank-{k}": W(T.LowRank(), k) for k in (1, 3, 16)},
    "chunks": W(T.LowRank(2), 3, fx.combine.Shrinkage(), chunk_size=2),
    "differences-1": FD(epsilon=0.05),
    "differences-3": FD(T.LowRank(2), 3, epsilon=0.05),
    "differences-normal": FD(T.Normal(), 3, epsilon=0.05),
}


@pytest.mark.parametrize("name", EXACT)
def test_update_is_slopes_then_replay_in_every_bit(name):
    """With k = 3: 1/3 is not exact, so that what is folded into one constant shows."""
    assert_same(*both(stack, EXACT[name], PARAMS, X))


@pytest.mark.parametrize(
    "rule", [W(T.LowRank(per_example=True), 3), W(per_example=True)]
)
def test_directions_of_each_examples_own(rule):
    assert_same(*both(one, rule, PARAMS, X, **AXES))


def test_aux_and_steps_that_run_eagerly():
    loss = lambda w, x: (jnp.sum((x @ w) ** 2), {"x": x, "name": "aux"})
    key, w = jax.random.PRNGKey(0), PARAMS["w"][0]
    expected = fx.update(loss, W(num_tangents=3), learning_rate=0.1, has_aux=True)(
        key, w, X
    )
    (value, aux), slopes = fx.slopes(loss, W(num_tangents=3), has_aux=True)(key, w, X)
    assert aux["name"] == "aux"
    moved = fx.replay(loss, W(num_tangents=3))(slopes, 0.1, w, X)
    assert_same((value, moved), (expected[0][0], expected[1]))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_all_kinds_of_keys(impl):
    assert_same(
        *both(stack, W(num_tangents=3), PARAMS, X, key=jax.random.key(1, impl=impl))
    )


@pytest.mark.promotes("half precision: weights meet data in float32")
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_half_precision(rounding):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    got = both(stack, W(T.LowRank(), 9), params, X, rounding=rounding)
    assert_same(*got)
    assert not np.array_equal(got[0][1]["w"], params["w"])


def test_complex_and_wide_parameters():
    size = lambda z: jnp.sum(jnp.abs(z) ** 2).astype(jnp.float32)
    loss = lambda z: size(z["a"]) + size(z["b"])
    with jax.enable_x64(True):
        params = {
            "a": jnp.array([1 + 2j, 3 - 1j], jnp.complex64),
            "b": jnp.array([1.0, 2.0], jnp.float64),
        }
        for rule in (W(num_tangents=3), W(T.Normal(), 3), FD(num_tangents=3)):
            assert_same(*both(loss, rule, params))


@pytest.mark.parametrize(
    "rule", [W(num_tangents=3), W(T.Normal(), 3), W(T.LowRank(), 3)]
)
def test_a_run_in_one_scan_is_replayed_step_by_step(rule):
    """With a rate that falls, from a list of slopes and rates."""
    keys, rates = jax.random.split(KEY, 6), 0.1 * 0.9 ** jnp.arange(6.0)

    def step(params, step):
        key, rate = step
        _, slopes = fx.slopes(stack, rule)(key, params, X)
        update = fx.update(stack, rule, learning_rate=rate)
        return update(key, params, X)[1], slopes

    end, slopes = jax.jit(lambda p: lax.scan(step, p, (keys, rates)))(PARAMS)
    replay, params = jax.jit(fx.replay(stack, rule)), PARAMS
    each = [jax.tree.map(lambda x, i=i: x[i], slopes) for i in range(6)]
    for now, rate in zip(each, rates, strict=True):
        params = replay(now, rate, params, X)
    assert_same(params, end)
    one = lambda params, step: (replay(*step, params, X), None)
    assert_same(jax.jit(lambda p: lax.scan(one, p, (slopes, rates)))(PARAMS)[0], end)


# --- what follows from a few numbers ---


def test_a_shape_may_stand_for_what_is_not_needed():
    spec = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    loss = lambda params, x, scale: (stack(params, x) * scale, x)
    rule = W(T.LowRank(), 3)
    taken = jax.jit(fx.slopes(loss, rule, has_aux=True))
    _, slopes = taken(KEY, PARAMS, X, scale=2.0)
    replay = fx.replay(loss, rule)
    expected = replay(slopes, 0.1, PARAMS, X, scale=2.0)
    assert_same(replay(slopes, 0.1, PARAMS, spec(X), scale=2.0), expected)
    own = W(T.LowRank(per_example=True), 3)
    _, slopes = jax.jit(fx.slopes(one, own, **AXES))(KEY, PARAMS, X)
    replay = fx.replay(one, own, **AXES)
    got = replay(slopes, 0.1, PARAMS, spec(X))
    assert_same(got, replay(slopes, 0.1, PARAMS, X))


@pytest.mark.parametrize(
    "rule",
    [W(num_tangents=3), W(T.LowRank(2), 2), FD(T.LowRank(), 2, epsilon=0.05)],
)
def test_the_estimate_is_a_replay_on_zeros(rule):
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)

    @jax.jit
    def estimates(key):
        _, slopes = fx.slopes(stack, rule)(key, PARAMS, X)
        replayed = fx.replay(stack, rule)(slopes, -1.0, zeros, X)
        return replayed, fx.grad(stack, rule)(key, PARAMS, X)

    assert_trees_close(*estimates(KEY), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "rule", [W(num_tangents=3), W(T.Normal(), 3), W(T.LowRank(), 5, chunk_size=2)]
)
def test_the_mean_of_each_examples_slopes_is_the_slope(rule):
    @jax.jit
    def taken(key):
        whole = fx.slopes(one, rule, **AXES)(key, PARAMS, X)
        return whole, fx.slopes(one, rule, per_example=True, **AXES)(key, PARAMS, X)

    (value, whole), (same, each) = taken(KEY)
    assert each.weights.shape == (1, rule.num_tangents, 4)
    assert float(jnp.std(each.weights, axis=2).min()) > 0.01
    assert_trees_close(each.mean(), whole, rtol=1e-5)
    assert_trees_close(value, same, rtol=1e-6)


def test_slopes_are_scaled_and_put_side_by_side():
    rule = W(num_tangents=3)
    replay = jax.jit(lambda slopes: fx.replay(stack, rule)(slopes, -1.0, zeros, X))
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    taken = jax.jit(fx.slopes(stack, rule))
    _, first = taken(KEY, PARAMS, X)
    _, second = taken(jax.random.key(1), PARAMS, X)
    total = replay(first.scaled(2.0).concatenate(second, second))
    expected = jax.tree.map(lambda a, b: 2 * a + 2 * b, replay(first), replay(second))
    assert_trees_close(total, expected, rtol=1e-5, atol=1e-6)
    taken = jax.jit(fx.slopes(one, rule, per_example=True, **AXES))
    _, each = taken(KEY, PARAMS, X)
    masked = each.scaled(jnp.array([1, 0, 0, 0]))
    assert np.array_equal(masked.weights[..., 0], each.weights[..., 0])
    assert not masked.weights[..., 1:].any()


# --- momentum and safety ---


@pytest.mark.parametrize("rule", [W(num_tangents=3), W(T.LowRank(), 3, chunk_size=2)])
def test_safety_and_momentum_between_both_halves(rule):
    safe = fx.Safe(rule, clip=1.0, warm_up=1).init()
    momentum = fx.Momentum(0.7, 3).init(KEY, safe)

    @jax.jit
    def whole(key, params, safe, momentum):
        update = fx.update(stack, safe, learning_rate=0.1, momentum=momentum)
        return update(key, params, X)[1:]

    slopes = jax.jit(fx.slopes(stack, safe))
    guarded = jax.jit(lambda safe, slopes: safe.guard_slopes(slopes, PARAMS))
    added = jax.jit(lambda momentum, slopes: momentum.add(slopes))
    replay = jax.jit(fx.replay(stack, safe))
    state = parts = (PARAMS, safe, momentum)
    for key in jax.random.split(KEY, 5):
        state = whole(key, *state)
        params, safe, momentum = parts
        used, safe = guarded(safe, slopes(key, params, X)[1])
        momentum = added(momentum, used)
        parts = (replay(momentum.slopes(), 0.1, params, X), safe, momentum)
        assert_same(parts, state)
    assert int(safe.history.num_clipped) > 0


def test_safe_remembers_in_units_of_slopes():
    """Gathered weights are divided by k and by the number of keys."""
    rule = W(num_tangents=2, combine=fx.combine.Shrinkage())
    _, first = jax.jit(fx.slopes(stack, rule))(KEY, PARAMS, X)
    world = first.concatenate(first).scaled(0.5)
    n = sum(x.size for x in jax.tree.leaves(PARAMS))
    law = rule.tangents.relative_mse(n, 2)
    found = world.weights * 4 * (1 + law)
    safe = fx.Safe(rule, clip=1.0, warm_up=1).after(found / 10)
    got, after = safe.guard_slopes(world, PARAMS)
    expected = safe.after(found)
    assert_trees_close(after.history, expected.history, rtol=1e-5)
    assert_trees_close(got.weights * 4 * (1 + law), safe.guard()(found), rtol=1e-5)


def test_momentum_of_several_keys():
    rule, total = W(num_tangents=3), 0.0
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    momentum = fx.Momentum(0.5, 3).init(KEY, rule, num_keys=2)
    assert momentum.keys.shape == (3, 2, 2)
    taken = jax.jit(fx.slopes(stack, rule))
    estimate = jax.jit(lambda s: fx.replay(stack, rule)(s, -1.0, zeros, X)["out"])
    for i in range(4):
        steps = [taken(jax.random.key(2 * i + j), PARAMS, X)[1] for j in (0, 1)]
        slopes = steps[0].concatenate(steps[1])
        momentum = momentum.add(slopes)
        w = estimate(slopes)
        total = 0.5 * total + w if i else 0.0  # the first one leaves the window
    got = estimate(momentum.slopes())
    np.testing.assert_allclose(got, total, rtol=1e-4, atol=1e-5)


# --- several devices ---

MESH = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
ROWS = normal(5, 8, 3)


def sharded(function, *, check_vma=True):
    specs = (P(), P(), P("d"))
    return jax.jit(
        jax.shard_map(
            function, mesh=MESH, in_specs=specs, out_specs=P(), check_vma=check_vma
        )
    )


DEVICES = {
    "signs": (W(num_tangents=3), True),
    "low-rank": (W(T.LowRank(), 3, chunk_size=2), True),
    "unchecked": (W(T.LowRank(), 3), False),
    "differences": (FD(num_tangents=2, epsilon=0.05), True),
}


@pytest.mark.parametrize("name", DEVICES)
def test_gathered_slopes_are_those_of_all_devices(name):
    """Each with a key and rows of its own; keys that travel, and keys that are derived."""
    rule, check_vma = DEVICES[name]

    def step(key, params, x):
        own = jax.random.fold_in(key, lax.axis_index("d"))
        value, mine = fx.slopes(stack, rule)(own, params, x)
        world, again = mine.gather("d"), mine.gather("d", key=key)
        wrong = mine.gather("d", key=jax.random.key(9))
        moved = fx.replay(stack, rule)(world, 0.1, params, x)
        return lax.pmean(value, "d"), world, again, wrong.weights, moved

    got = sharded(step, check_vma=check_vma)(KEY, PARAMS, ROWS)
    value, world, again, wrong, moved = got
    assert_same(again, world)
    assert np.isnan(wrong).all()
    taken = jax.jit(fx.slopes(stack, rule))
    steps = [
        taken(jax.random.fold_in(KEY, i), PARAMS, x)
        for i, x in enumerate(ROWS.reshape(4, 2, 3))
    ]
    expected = steps[0][1].concatenate(*(slopes for _, slopes in steps[1:]))
    assert_trees_close(world, expected.scaled(0.25), rtol=1e-3, atol=1e-4)
    assert_trees_close(value, np.mean([x for x, _ in steps]), rtol=1e-5)
    alone = jax.jit(fx.replay(stack, rule))(
        jax.device_get(world), 0.1, PARAMS, ROWS[:2]
    )
    assert_same(moved, alone)


@pytest.mark.parametrize("check_vma", [True, False])
def test_one_key_and_the_loss_of_all_devices(check_vma):
    mean = lambda params, x: lax.pmean(stack(params, x), "d")
    rule = W(T.LowRank(), 3)

    def step(key, params, x):
        value, slopes = fx.slopes(mean, rule)(key, params, x)
        updated = fx.update(mean, rule, learning_rate=0.1)(key, params, x)
        return (value, fx.replay(mean, rule)(slopes, 0.1, params, x)), updated

    got, updated = sharded(step, check_vma=check_vma)(KEY, PARAMS, ROWS)
    assert_same(got, updated)
    alone = jax.jit(fx.update(stack, rule, learning_rate=0.1))(KEY, PARAMS, ROWS)
    assert_trees_close(got, alone, rtol=1e-4, atol=1e-5)


def test_each_examples_slopes_on_several_devices():
    rule = W(num_tangents=2)

    def step(key, params, x):
        _, each = fx.slopes(one, rule, per_example=True, **AXES)(key, params, x)
        return each.gather("d").mean()

    got = sharded(step)(KEY, PARAMS, ROWS)
    _, whole = jax.jit(fx.slopes(one, rule, **AXES))(KEY, PARAMS, ROWS)
    assert got.weights.shape == (4, 2)
    np.testing.assert_allclose(got.weights.sum(0), whole.weights[0], rtol=1e-4)
    mean = lambda params, x: lax.pmean(one(params, x), "d")

    def summed(key, params, x):
        return fx.slopes(mean, rule, per_example=True, **AXES)(key, params, x)[1]

    with pytest.raises(
        ValueError, match=r"got one that sums over devices: .* over \['d'\]"
    ):
        sharded(summed)(KEY, PARAMS, ROWS)


def test_a_key_of_each_devices_own_is_told_the_way():
    def step(key, params, x):
        own = jax.random.fold_in(key, lax.axis_index("d"))
        return fx.update(stack, learning_rate=0.1)(own, params, x)

    says = (
        r"do not vary over mesh axes, got \['d'\].*slopes.*Slopes.gather.*forwax.replay"
    )
    with pytest.raises(ValueError, match=says):
        sharded(step)(KEY, PARAMS, ROWS)

    def ungathered(key, params, x):
        own = jax.random.fold_in(key, lax.axis_index("d"))
        _, mine = fx.slopes(stack)(own, params, x)
        return fx.replay(stack)(mine, 0.1, params, x)

    with pytest.raises(
        ValueError, match=r"replay: expected parameters, a key and slopes"
    ):
        sharded(ungathered)(KEY, PARAMS, ROWS)
    spread = lambda key, x, _: fx.slopes(lambda w: jnp.sum(w**2))(key, x)[0]
    with pytest.raises(
        ValueError, match=r"slopes: expected parameters, .* got \['d'\]"
    ):
        jax.shard_map(spread, mesh=MESH, in_specs=(P(), P("d"), P()), out_specs=P())(
            KEY, X, X
        )


def test_what_crosses_the_network_are_a_few_numbers():
    """4(k + 1) bytes a device with derived keys, and the 4 devices' in what each receives."""
    rule = W(T.LowRank(), 8)

    def step(key, params, x, sent):
        own = jax.random.fold_in(key, lax.axis_index("d"))
        value, mine = fx.slopes(stack, rule)(own, params, x)
        world = mine.gather("d", key=None if sent else key)
        return lax.pmean(value, "d"), fx.replay(stack, rule)(world, 0.1, params, x)

    def received(sent):
        run = sharded(lambda *args: step(*args, sent))
        text = run.lower(KEY, PARAMS, ROWS).compile().as_text()
        found = re.findall(r"= \(?\w+?(\d+)\[([\d,]*)\]\S* (all-\w+)\(", text)
        assert found
        return sum(
            int(bits) // 8 * int(np.prod([int(n) for n in shape.split(",") if n]))
            for bits, shape, _ in found
        )

    assert received(sent=False) == 4 * 8 * 4 + 4  # the mean of the values is one number
    assert received(sent=True) == 4 * (8 + 2) * 4 + 4


# --- errors ---


def test_rules_that_cannot_be_replayed_are_refused():
    for function in (fx.slopes, fx.replay):
        name = function.__name__
        says = f"{name}: expected forwax.WeightPerturbation or .* from a key alone, got Activity"
        with pytest.raises(TypeError, match=says):
            function(stack, fx.ActivityPerturbation())
        with pytest.raises(
            TypeError, match=rf"{name}: expected tangents .* got Sphere"
        ):
            function(stack, fx.Safe(W(T.Sphere())))
        with pytest.raises(
            ValueError, match=rf"{name}: expected combine.Mean\(\) .* got Proj"
        ):
            function(stack, W(combine=fx.combine.Projection()))
        with pytest.raises(TypeError, match=f"{name}: expected a function as the loss"):
            function(3)
    with pytest.raises(
        ValueError, match='replay: expected rounding to be "nearest" or'
    ):
        fx.replay(stack, rounding="up")


def test_examples_that_have_no_slopes_of_their_own_are_refused():
    with pytest.raises(
        ValueError, match="per_example=True needs examples: expected in_axes"
    ):
        fx.slopes(one, per_example=True)
    with pytest.raises(
        ValueError, match="the same directions, expected a rule without"
    ):
        fx.slopes(one, W(T.LowRank(per_example=True)), per_example=True, **AXES)
    with pytest.raises(
        TypeError, match=r"expected forwax.WeightPerturbation, got FiniteDiff"
    ):
        fx.slopes(one, FD(), per_example=True, **AXES)(KEY, PARAMS, X)


def test_slopes_that_do_not_fit_are_refused():
    rule = W(num_tangents=2)
    _, slopes = jax.jit(fx.slopes(stack, rule))(KEY, PARAMS, X)
    with pytest.raises(
        ValueError, match=r"along 1 tangents, weights \[s, 1\], got \[1, 2\]"
    ):
        fx.replay(stack)(slopes, 0.1, PARAMS, X)
    others = {**PARAMS, "b": jnp.zeros(3)}
    with pytest.raises(
        ValueError, match=r"got others: \"\['b'\]: .*\" and \"\['b'\]: "
    ):
        fx.replay(stack, rule)(slopes, 0.1, others, X)
    with pytest.raises(ValueError, match="got others: 3 and 2 leaves"):
        fx.replay(stack, rule)(slopes, 0.1, {"b": PARAMS["b"], "out": PARAMS["out"]}, X)
    with pytest.raises(TypeError, match=r"replay: expected forwax.Slopes, got tuple"):
        fx.replay(stack, rule)((KEY, 1.0), 0.1, PARAMS, X)
    with pytest.raises(TypeError, match="expected learning_rate to be a number"):
        fx.replay(stack, rule)(slopes, "fast", PARAMS, X)
    with pytest.raises(
        ValueError, match="expected learning_rate of at least 0, got nan"
    ):
        fx.replay(stack, rule)(slopes, float("nan"), PARAMS, X)
    typed = dataclasses.replace(slopes, keys=jax.random.split(KEY, 1))
    with pytest.raises(
        ValueError, match=r"expected the data of keys, uint32\[s, words\]"
    ):
        fx.replay(stack, rule)(typed, 0.1, PARAMS, X)
    each = dataclasses.replace(slopes, weights=slopes.weights[..., None])
    with pytest.raises(
        ValueError, match=r"a slope for each example. Take slopes.mean\(\)"
    ):
        fx.replay(stack, rule)(each, 0.1, PARAMS, X)
    own = W(T.LowRank(per_example=True), 2)
    with pytest.raises(ValueError, match=r"expected weights \[s, 2, N\], got \[1, 2\]"):
        fx.replay(one, own, **AXES)(slopes, 0.1, PARAMS, X)
    with pytest.raises(
        ValueError, match=r"expected a slope for each example, .* got \[1, 2\]"
    ):
        slopes.mean()


def test_slopes_of_unlike_kinds_do_not_stand_side_by_side():
    taken = jax.jit(fx.slopes(stack))
    _, slopes = taken(KEY, PARAMS, X)
    for other in (
        taken(jax.random.key(0, impl="rbg"), PARAMS, X)[1],
        jax.jit(fx.slopes(stack, W(num_tangents=2)))(KEY, PARAMS, X)[1],
    ):
        with pytest.raises(
            ValueError, match="expected slopes of one generator and one shape"
        ):
            slopes.concatenate(other)
    other = dataclasses.replace(slopes, form=("w: float32[2]",))
    with pytest.raises(
        ValueError, match="expected slopes of the same parameters, got 2 kinds"
    ):
        slopes.concatenate(other)
    momentum = fx.Momentum(window=2).add(slopes)
    with pytest.raises(
        ValueError, match=r"expected keys \[1, 2\] of threefry2x32 .* \[2, 2\]"
    ):
        momentum.add(slopes.concatenate(slopes))
    with pytest.raises(
        ValueError, match=r"Momentum.slopes: expected at least one step"
    ):
        fx.Momentum().slopes()
    with pytest.raises(
        TypeError, match=r"Safe.guard_slopes: expected a rule inside .* Activity"
    ):
        fx.Safe(fx.ActivityPerturbation()).guard_slopes(slopes, PARAMS)


def test_devices_with_several_keys_send_them():
    def step(key, params, x):
        _, slopes = fx.slopes(stack)(key, params, x)
        return slopes.concatenate(slopes).gather("d", key=key).weights

    with pytest.raises(ValueError, match=r"expected one key on each device, .* got 2"):
        sharded(step)(KEY, PARAMS, ROWS)
