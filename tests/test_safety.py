"""Slopes that explode are clipped or skipped.

What slopes tell of the noise is what is measured.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwax as fx
from cases import assert_trees_close, normal

T = fx.tangents
KEY = jax.random.key(0)
N = 48
PARAMS = {"w": normal(1, 8, 5), "b": normal(2, 8)}
RULES = {
    "one": fx.WeightPerturbation(),
    "several": fx.WeightPerturbation(T.Normal(), 4, chunk_size=3),
    "low-rank-several": fx.WeightPerturbation(T.LowRank(), 5, chunk_size=2),
    "projection": fx.WeightPerturbation(
        num_tangents=3, combine=fx.combine.Projection()
    ),
}


def linear(params, scale=1.0):
    """A loss of constant gradient."""
    x, y = normal(3, 8), normal(4, 5)
    return scale * (x @ params["w"] @ y + jnp.sum(params["b"] * x))


@functools.cache
def filled(rule, steps=20, **fields):
    """A safe rule that has seen steps of the linear loss."""
    safe = fx.Safe(rule, **fields).init()
    body = lambda safe, key: (safe.step(linear)(key, PARAMS)[2], None)
    return jax.jit(
        lambda safe: jax.lax.scan(body, safe, jax.random.split(KEY, steps))[0]
    )(safe)


def norm(tree):
    return float(jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree))))


@pytest.mark.parametrize("name", ["several", "low-rank-several", "projection"])
def test_an_explosion_is_cut_to_the_bound(name):
    rule = filled(RULES[name], clip=2.0)
    bound = float(rule.bound())
    grads = jax.jit(lambda rule: rule.step(linear)(KEY, PARAMS, 1e6)[1])(rule)
    plain = jax.jit(lambda: fx.grad(linear, RULES[name])(KEY, PARAMS))()
    assert norm(grads) <= 1.01 * bound * (N * 2) ** 0.5
    assert norm(grads) < 1e3 * norm(plain)


@pytest.mark.parametrize("name", ["several", "projection"])
def test_slopes_within_the_bound_are_left_alone(name):
    safe = fx.Safe(RULES[name], clip=1e6).init()
    value, grads, after = jax.jit(lambda safe: safe.step(linear)(KEY, PARAMS))(safe)
    expected = jax.jit(lambda: fx.value_and_grad(linear, RULES[name])(KEY, PARAMS))()
    assert_trees_close((value, grads), expected, rtol=1e-5, atol=1e-5)
    assert int(after.history.num_clipped) == 0
    assert int(after.history.num_steps) == 1


def test_a_clipped_slope_of_one_tangent_is_the_bound_exactly():
    rule = filled(fx.WeightPerturbation(), clip=1.0)
    grads = jax.jit(lambda rule: fx.grad(linear, rule)(KEY, PARAMS, 1e9))(rule)
    for leaf in jax.tree.leaves(grads):
        np.testing.assert_allclose(np.abs(leaf), rule.bound(), rtol=1e-6)


def test_the_bound_is_that_many_medians_of_what_was_used():
    rule = fx.Safe(fx.WeightPerturbation(), clip=2.0, window=5, warm_up=2).init()
    for slope in (1.0, 2.0, 3.0, 100.0, -50.0):
        rule = rule.after(jnp.array([slope]))
    # bounds: none, none, 2 · 1.5, 2 · 2, 2 · 2.5; so 3, 4 and 5 are remembered
    np.testing.assert_allclose(rule.history.sizes, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert float(rule.bound()) == 6.0
    assert int(rule.history.num_clipped) == 2
    rule = rule.after(jnp.array([0.5]))  # the oldest goes
    np.testing.assert_allclose(rule.history.sizes, [0.5, 2.0, 3.0, 4.0, 5.0])


def test_with_one_median_the_bound_never_grows():
    rule = fx.Safe(fx.WeightPerturbation(), clip=1.0, window=9, warm_up=3).init()

    def body(rule, slope):
        rule = rule.after(slope[None])
        return rule, rule.bound()

    _, bounds = jax.lax.scan(body, rule, 1.1 ** jnp.arange(100.0))
    assert np.all(np.diff(bounds[3:]) <= 0)
    assert float(bounds[-1]) > 0


@pytest.mark.parametrize(
    ("name", "bad"),
    [("one", np.inf), ("several", np.nan), ("low-rank-several", np.nan)],
)
def test_slopes_that_are_not_finite_are_skipped_and_leave_no_trace(name, bad):
    rule = filled(RULES[name])
    _, grads, after = jax.jit(lambda rule: rule.step(linear)(KEY, PARAMS, bad))(rule)
    assert norm(grads) == 0
    assert int(after.history.num_skipped) == RULES[name].num_tangents
    np.testing.assert_array_equal(after.history.sizes, rule.history.sizes)
    assert float(after.bound()) == float(rule.bound())


def test_one_bad_slope_of_several_is_skipped_alone():
    guard = fx.Safe(fx.WeightPerturbation(), clip=None).guard()
    assert guard(jnp.array([1.0, jnp.nan, -jnp.inf, -2.0])).tolist() == [
        1.0,
        0.0,
        0.0,
        -2.0,
    ]


def test_without_skipping_they_go_on():
    rule = dataclasses.replace(filled(fx.WeightPerturbation(), clip=1.0), skip=False)
    guarded = rule.guard()(jnp.array([jnp.nan, -jnp.inf]))
    assert jnp.isnan(guarded[0])
    assert guarded[1] == -rule.bound()


def test_value_and_grad_clips_and_remembers_nothing():
    rule = filled(fx.WeightPerturbation(), clip=1.0)
    both = jax.jit(
        lambda r: (
            fx.grad(linear, r)(KEY, PARAMS, 1e6),
            r.step(linear)(KEY, PARAMS, 1e6)[1],
        )
    )
    assert_trees_close(*both(rule))
    assert not rule.unbiased
    assert fx.Safe(fx.WeightPerturbation(), clip=None).unbiased


def test_each_example_has_its_own_clipped_slope():
    x, y = normal(5, 16, 8), normal(6, 16)
    loss = lambda w, x, y: (jnp.sum(jnp.tanh(x @ w)) - y) ** 2
    rule = fx.WeightPerturbation(T.LowRank(per_example=True), 2)
    safe = fx.Safe(rule, clip=1.0, warm_up=1).init()
    step = jax.jit(
        lambda safe, y: safe.step(loss, in_axes=(None, 0, 0))(KEY, PARAMS["w"], x, y)
    )
    _, _, safe = step(safe, y)
    _, grads, after = step(safe, y.at[3].set(1e8))
    assert int(after.history.num_clipped) >= 16
    assert norm(grads) <= float(safe.bound()) * 40**0.5 * 1.01


def test_a_batch_of_rules_and_keys():
    safe = fx.Safe(fx.WeightPerturbation(), clip=1.0, warm_up=1, window=7).init()
    many = jax.tree.map(lambda x: jnp.stack([x] * 3), safe)
    keys = jax.random.split(KEY, 3)
    _, grads, after = jax.jit(
        jax.vmap(lambda safe, key: safe.step(linear)(key, PARAMS))
    )(many, keys)
    assert after.history.sizes.shape == (3, 7)
    expected = jax.jit(lambda key: fx.grad(linear)(key, PARAMS))(keys[1])
    assert_trees_close(
        jax.tree.map(lambda x: x[1], grads), expected, rtol=1e-5, atol=1e-5
    )


# --- rules without slopes ---


def test_other_rules_are_clipped_by_their_norm_and_skipped_as_a_whole():
    x = normal(5, 16, 8)
    loss = lambda w, x, s: s * jnp.sum(jnp.tanh(x @ w))
    safe = fx.Safe(fx.ActivityPerturbation(), clip=1.0, warm_up=1).init()
    step = jax.jit(
        lambda safe, s: safe.step(loss, in_axes=(None, 0, None))(KEY, PARAMS["w"], x, s)
    )
    _, grads, safe = step(safe, 1.0)
    np.testing.assert_allclose(safe.bound(), norm(grads), rtol=1e-5)
    _, cut, _ = step(safe, 100.0)
    np.testing.assert_allclose(cut, grads, rtol=1e-4, atol=1e-6)
    _, none, after = step(safe, jnp.nan)
    assert norm(none) == 0
    assert int(after.history.num_skipped) == 1
    with pytest.raises(ValueError, match="expected the history of a rule with slopes"):
        after.monitor(PARAMS)


# --- what the slopes tell ---


def measured(rule, draws=4000):
    """Relative MSE, root mean square of the cosine, and |g|, over draws."""
    g = jax.grad(linear)(PARAMS)
    flat = lambda tree: jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(tree)])
    many = jax.jit(jax.vmap(lambda key: flat(fx.grad(linear, rule)(key, PARAMS))))(
        jax.random.split(KEY, draws)
    )
    g = flat(g)
    mse = jnp.mean(jnp.sum((many - g[None]) ** 2, axis=1)) / jnp.sum(g**2)
    cosine = many @ g / (jnp.linalg.norm(many, axis=1) * jnp.linalg.norm(g))
    return float(mse), float(jnp.sqrt(jnp.mean(cosine**2))), float(jnp.linalg.norm(g))


@pytest.mark.parametrize("name", ["one", "several", "low-rank-several"])
def test_the_monitor_tells_what_is_measured(name):
    found = filled(RULES[name], steps=2000, window=2000, clip=None).monitor(PARAMS)
    mse, cosine, size = measured(RULES[name])
    assert float(found.gradient_norm) == pytest.approx(
        size, rel=max(4 * float(found.error), 1e-3)
    )
    assert 0 < float(found.error) < 0.03
    assert float(found.relative_mse) == pytest.approx(mse, rel=0.08)
    assert float(found.variance) == pytest.approx(mse * size**2, rel=0.15)
    assert float(found.cosine) == pytest.approx(cosine, rel=0.05)
    assert int(found.num_steps) == 2000


def test_the_inner_product_with_the_gradient_is_the_mean_square_of_the_slopes():
    rule = fx.WeightPerturbation(T.Normal(), 4)
    _, grads, after = jax.jit(fx.Safe(rule, clip=None).step(linear))(KEY, PARAMS)
    g = jax.grad(linear)(PARAMS)
    inner = sum(
        jnp.sum(a * b)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(g), strict=True)
    )
    np.testing.assert_allclose(after.history.squares[0], inner, rtol=1e-4)


def test_clipping_normal_slopes_shortens_the_mean_by_the_share_that_is_not_clipped():
    """Stein's lemma: at one median the mean is half the gradient."""
    rule = filled(fx.WeightPerturbation(T.Normal()), steps=2000, window=2000, clip=None)
    rule = dataclasses.replace(rule, clip=1.0)
    many = jax.jit(jax.vmap(lambda key: fx.grad(linear, rule)(key, PARAMS)))(
        jax.random.split(KEY, 20_000)
    )
    g = jax.grad(linear)(PARAMS)
    inner = sum(
        jnp.vdot(a.mean(0), b)
        for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(g), strict=True)
    )
    assert float(inner) / norm(g) ** 2 == pytest.approx(0.5, abs=0.03)


# --- errors ---


def test_errors():
    with pytest.raises(
        ValueError,
        match=r"expected clip of at least 1, or None to clip nothing, got 0\.5",
    ):
        fx.Safe(fx.WeightPerturbation(), clip=0.5)
    with pytest.raises(
        ValueError, match="expected window to be a positive integer, got 0"
    ):
        fx.Safe(fx.WeightPerturbation(), window=0)
    with pytest.raises(
        ValueError, match="expected warm_up to be a positive integer, got 0"
    ):
        fx.Safe(fx.WeightPerturbation(), warm_up=0)
    with pytest.raises(ValueError, match="expected the history of a rule with slopes"):
        fx.Safe(fx.WeightPerturbation()).monitor(3)


def test_a_guard_is_not_guarded():
    with pytest.raises(TypeError, match="got Safe, which guards slopes already"):
        fx.Safe(fx.Safe(fx.WeightPerturbation()))


def test_it_has_the_rules_own_properties():
    """In what a diagnosis and an explanation say of it, too."""
    assert fx.Safe(fx.Backprop()).reverse_mode
    assert not fx.Safe(fx.WeightPerturbation()).reverse_mode
    w, x = PARAMS["w"], normal(5, 3, 8)
    loss = lambda w, x: jnp.sum(jnp.tanh(x @ w) ** 2)
    safe = fx.Safe(fx.ActivityPerturbation(memory="shared", exact_outputs=False))
    (found,) = fx.explain(loss, safe, in_axes=(None, 0))(w, x).rows
    assert found.credit == "one slope for all examples"
    rules = [fx.Safe(fx.ActivityPerturbation()), fx.Safe(fx.Backprop())]
    noisy, exact = fx.diagnose(loss, rules, in_axes=(None, 0), draws=1, rounds=1)(
        KEY, w, x
    ).rules
    assert noisy.predicted_mse is None
    assert exact.reverse_mode


def test_a_norm_that_overflows_is_skipped():
    safe = fx.Safe(fx.Exact())
    assert fx.grad(lambda w: 1e30 * jnp.sum(w), safe)(KEY, jnp.ones(3)).tolist() == [
        0,
        0,
        0,
    ]


def test_without_skipping_an_infinite_estimate_is_not_a_number():
    safe = dataclasses.replace(
        filled(fx.WeightPerturbation(), clip=1.0), rule=fx.Exact(), skip=False
    )
    assert jnp.isnan(
        fx.grad(lambda w: jnp.inf * jnp.sum(w), safe)(KEY, jnp.ones(3))
    ).all()


def test_num_steps_counts_beyond_the_window():
    found = filled(fx.WeightPerturbation(), steps=9, window=5).monitor(PARAMS)
    assert int(found.num_steps) == 9


def test_growth_compares_the_younger_half_with_the_older():
    safe = fx.Safe(fx.WeightPerturbation(), clip=None, window=4).init()
    seen = []
    for slope in (9.0, 1.0, 1.0, 3.0, 3.0, 0.0, 0.0, 0.0, 0.0):
        safe = safe.after(jnp.array([slope]))
        seen.append(float(safe.monitor(3).growth))
    # the first has no half; from the fifth on the oldest is forgotten
    expected = [1, 1 / 9, (2 / 82) ** 0.5, (10 / 82) ** 0.5, 3]
    np.testing.assert_allclose(seen[:5], expected, rtol=1e-6)
    assert seen[-2:] == [0, 1]  # nothing after something, nothing after nothing


def test_inside_shard_map_slopes_are_summed_first_and_sharded_parameters_refused():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    safe = filled(fx.WeightPerturbation(), clip=1.0)
    x = normal(7, 4, 8)

    def loss(params, x):
        return jnp.sum(jnp.tanh(x @ params["w"])) + jnp.sum(params["b"])

    part = lambda w, b, x: safe.step(lambda p, x: loss(p, x), in_axes=None)(
        KEY, {"w": w, "b": b}, x
    )[1:]
    run = lambda spec: jax.shard_map(
        part, mesh=mesh, in_specs=(spec, whole, data), out_specs=whole
    )
    grads, after = jax.jit(run(whole))(PARAMS["w"], PARAMS["b"], x)
    both = lambda p, x: loss(p, x[:2]) + loss(p, x[2:])
    expected, same = jax.jit(lambda: safe.step(both)(KEY, PARAMS, x)[1:])()
    assert_trees_close(grads, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(after.history.sizes, same.history.sizes, rtol=1e-4)
    with pytest.raises(ValueError, match=r"inside shard_map they vary over \['data'\]"):
        jax.shard_map(
            lambda b: safe.step(lambda b: jnp.sum(b**2))(KEY, b)[0],
            mesh=mesh,
            in_specs=data,
            out_specs=data,
        )(PARAMS["b"])


def test_zero_slopes_do_not_stop_the_training():
    """Steps without a gradient leave no median behind that would cut every later slope to zero."""
    safe = fx.Safe(fx.WeightPerturbation()).init()
    step = jax.jit(
        lambda safe, key, on: safe.step(lambda w: on * jnp.sum(w**2))(key, jnp.ones(21))
    )
    for i in range(24):
        _, grads, safe = step(safe, jax.random.key(i), jnp.float32(i >= 14))
        assert bool(jnp.any(grads != 0)) == (i >= 14)
    assert 0 < float(safe.bound()) < float("inf")


def test_the_next_rule_has_the_same_types_in_double_precision():
    with jax.enable_x64(True):
        safe = fx.Safe(fx.WeightPerturbation()).init()
        *_, after = jax.jit(
            lambda safe: safe.step(lambda w: jnp.sum(w**2))(
                jax.random.key(0), jnp.ones(3)
            )
        )(safe)
        assert [x.dtype for x in jax.tree.leaves(after.history)] == [
            x.dtype for x in jax.tree.leaves(safe.history)
        ]
