"""Activity perturbation beyond its mean.

Credit, places of noise, what crosses what, laws, and errors.
"""

import dataclasses
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import forwax as fx
from forwax._signature import Signature
from helpers import noise_of
from sites.programs import PROGRAMS, normal

KEY = jax.random.key(0)
PARAMS = {
    "w": normal(0, 3, 4),
    "b": normal(1, 4),
    "v": normal(2, 4, 4),
    "o": normal(3, 4, 2),
}


def mlp(p, x):
    h = jnp.tanh(x @ p["w"] + p["b"])
    return jnp.sum(jnp.sin(jnp.tanh(h @ p["v"]) @ p["o"]))


def rows(loss, *args, rule=None, **options):
    return fx.explain(loss, rule or fx.ActivityPerturbation(), **options)(*args).rows


@pytest.mark.parametrize("memory", ["keep", "replay"])
def test_it_is_the_rule_written_by_hand(memory):
    """With the same noise.

    A slope per example times its noise, through the last step of each layer alone.
    """
    x, k = normal(4, 5, 3), 3
    rule = fx.ActivityPerturbation(num_tangents=k, memory=memory)
    value, grads = jax.jit(fx.value_and_grad(mlp, rule, in_axes=(None, 0)))(
        KEY, PARAMS, x
    )
    if memory == "keep":
        noise = fx.tangents.Rademacher().sample(KEY, jnp.zeros((2, 5, 4)), k)
        u, t = noise[:, 0], noise[:, 1]
    else:
        sites = rule.sites(Signature(mlp, 0, False, (None, 0)).bind((PARAMS, x), {}))
        u, t = noise_of(rule, sites, KEY)

    def tapped(noise, x):
        first = x @ PARAMS["w"] + PARAMS["b"] + noise[0]
        second = jnp.tanh(first) @ PARAMS["v"] + noise[1]
        return jnp.sum(jnp.sin(jnp.tanh(second) @ PARAMS["o"])), (first, second)

    @jax.jit
    def slope_of(noise, x):
        zeros = [jnp.zeros(4)] * 2
        _, slope, (first, second) = jax.jvp(
            lambda e: tapped(e, x), (zeros,), (noise,), has_aux=True
        )
        return slope, jnp.tanh(first), jnp.tanh(second)

    u, t = np.asarray(u), np.asarray(t)
    expected = jax.tree.map(np.zeros_like, {**PARAMS})
    for i in range(5):
        for j in range(k):
            slope, first, out = map(np.asarray, slope_of([u[j, i], t[j, i]], x[i]))
            expected["w"] += np.outer(x[i], slope * u[j, i]) / (5 * k)
            expected["b"] += slope * u[j, i] / (5 * k)
            expected["v"] += np.outer(first, slope * t[j, i]) / (5 * k)
        expected["o"] += np.outer(out, np.cos(out @ PARAMS["o"])) / 5
    assert float(value) == pytest.approx(
        float(jax.jit(jax.vmap(mlp, (None, 0)))(PARAMS, x).mean()), rel=1e-5
    )
    for name in PARAMS:
        np.testing.assert_allclose(grads[name], expected[name], rtol=1e-4, atol=1e-5)


def test_the_squared_error_of_a_layer_is_its_law():
    """(q - 1)·mean|G_i|²/N for a layer of fan-out q, on the batch mean.

    Here all of an example's noise is q wide.
    """
    x, out, k = jnp.asarray(normal(4, 6, 3)), normal(5, 4), 4096

    def loss(p, x):
        return jnp.sum(jnp.tanh(x @ p["w"]) @ p["o"])

    params = {"w": jnp.asarray(PARAMS["w"]), "o": jnp.asarray(out)}
    each = jax.vmap(jax.grad(loss), (None, 0))(params, x)["w"]
    grad = jax.jit(
        jax.vmap(
            lambda key: fx.grad(loss, fx.ActivityPerturbation(), in_axes=(None, 0))(
                key, params, x
            )["w"]
        )
    )
    errors = jnp.sum(
        (grad(jax.random.split(KEY, k)) - each.mean(0)[None]) ** 2, axis=(1, 2)
    )
    law = 3 * jnp.sum(each**2) / 6 / 6
    assert float(errors.mean()) == pytest.approx(
        float(law), rel=5 * float(errors.std()) / k**0.5 / float(law)
    )


def test_an_example_hears_nothing_of_the_others():
    x, more = normal(4, 2, 3), normal(5, 3)
    rule, options = fx.ActivityPerturbation(), {"in_axes": (None, 0)}
    first = jax.jit(
        fx.grad(lambda p, x: jnp.where(x[0] == 7, mlp(p, x), 0), rule, **options)
    )(KEY, PARAMS, np.stack([x[0], more]))
    assert not any(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(first))


def test_a_site_hears_only_of_the_losses_that_it_reaches():
    program = PROGRAMS["local_losses"]
    louder = lambda p, x: fx.LocalLosses(
        {**program.loss(p, x).tree, "b": 1e3 * program.loss(p, x).tree["b"]}
    )
    quiet, loud = (
        jax.jit(fx.grad(f, fx.ActivityPerturbation(), in_axes=(None, 0)))(
            KEY, *program.args
        )
        for f in (program.loss, louder)
    )
    np.testing.assert_allclose(quiet["w"], loud["w"], rtol=1e-5)
    assert float(jnp.abs(loud["v"]).max()) > 100 * float(jnp.abs(quiet["v"]).max())


def test_one_slope_for_the_batch_is_noisier():
    x = jnp.asarray(normal(4, 32, 3))

    def error(rule):
        grad = jax.vmap(
            lambda key: fx.grad(mlp, rule, in_axes=(None, 0))(key, PARAMS, x)["w"]
        )
        return float(
            jnp.sum(jnp.var(jax.jit(grad)(jax.random.split(KEY, 256)), axis=0))
        )

    assert error(fx.ActivityPerturbation(memory="shared")) > 5 * error(
        fx.ActivityPerturbation()
    )


# of five examples of 4 + 4 noisy coordinates, and 2 in the output: 1 + M for each parameter
SHRUNK = {
    "keep": ({}, {"w": 8, "v": 8, "o": 1}),  # the last is exact
    "replay": ({"memory": "replay"}, {"w": 8, "v": 8, "o": 1}),
    "shared": ({"memory": "shared"}, {"w": 40, "v": 40, "o": 1}),
    "weight noise": (
        {"where": "v"},
        {"w": 12 + 4 + 5 * 4 + 8, "v": 12 + 4 + 4 + 8, "o": 12 + 4 + 5 * 4 + 4},
    ),
    "jointly drawn": (
        {
            "tangents": fx.tangents.Orthonormal(),
            "num_tangents": 10,
            "exact_outputs": False,
        },
        {
            "w": 1,
            "v": 1,
            "o": 1,
        },  # ten directions, of which the last site's slopes hear nine coordinates
    ),
}


@pytest.mark.parametrize("name", SHRUNK)
def test_shrinkage_scales_every_slope(name):
    options, expected = SHRUNK[name]
    rule = fx.ActivityPerturbation(**options)
    rules = rule, dataclasses.replace(rule, combine=fx.combine.Shrinkage())
    x = normal(4, 5, 3)
    mean, shrunk = jax.jit(
        lambda: [
            fx.grad(mlp, rule, in_axes=(None, 0))(KEY, PARAMS, x) for rule in rules
        ]
    )()
    for parameter, factor in expected.items():
        np.testing.assert_allclose(
            shrunk[parameter], mean[parameter] / factor, rtol=1e-4, atol=1e-6
        )


def test_no_error_crosses_two_sites():
    """Reverse mode refuses each deeper layer's way back; the rule never asks."""

    @jax.custom_jvp
    def one_way(x):
        return x

    @one_way.defjvp
    def rule(primals, tangents):
        again = lambda state: (state[0] + 1, 1.0 * state[1])
        return one_way(*primals), jax.lax.while_loop(
            lambda state: state[0] < 1, again, (0, tangents[0])
        )[1]

    def loss(p, x):
        h = one_way(jnp.tanh(x @ p["w"] + p["b"]))
        return jnp.sum(jnp.sin(one_way(jnp.tanh(h @ p["v"])) @ p["o"]))

    x = normal(4, 2, 3)
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        fx.grad(loss, fx.Backprop(), in_axes=(None, 0))(KEY, PARAMS, x)
    got = fx.grad(loss, fx.ActivityPerturbation(), in_axes=(None, 0))(KEY, PARAMS, x)
    plain = fx.grad(mlp, fx.ActivityPerturbation(), in_axes=(None, 0))(KEY, PARAMS, x)
    for name in PARAMS:
        np.testing.assert_allclose(got[name], plain[name], rtol=1e-5, atol=1e-6)


def contracted_on(jaxpr, shape):
    """The axes on which the dots of a jaxpr contract operands of one shape."""
    found = set()
    for equation in jaxpr.eqns:
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found |= contracted_on(getattr(inner, "jaxpr", inner), shape)
        if equation.primitive.name == "dot_general":
            axes = equation.params["dimension_numbers"][0]
            found |= {
                a
                for v, own in zip(equation.invars, axes, strict=True)
                if v.aval.shape == shape
                for a in own
            }
    return found


@pytest.mark.parametrize(
    "rule",
    [
        fx.ActivityPerturbation(),
        fx.ActivityPerturbation(memory="replay"),
        fx.Backprop(),
    ],
)
def test_no_dot_takes_an_error_back_through_weights(rule):
    """Forwards weights are contracted on their first axis; on the second only an error is."""
    params = {
        "w": normal(0, 3, 4),
        "b": normal(1, 4),
        "v": normal(2, 4, 5),
        "o": normal(3, 5, 2),
    }
    grad = fx.grad(mlp, rule, in_axes=(None, 0))
    jaxpr = jax.make_jaxpr(grad)(KEY, params, normal(4, 7, 3))
    backwards = isinstance(rule, fx.Backprop)
    for shape in [(4, 5), (5, 2)]:
        assert contracted_on(jaxpr.jaxpr, shape) == ({0, 1} if backwards else {0})


def test_the_loss_is_traced_once():
    calls = []

    def counted(p, x):
        calls.append(1)
        return mlp(p, x)

    grad = jax.jit(
        fx.grad(counted, fx.ActivityPerturbation(num_tangents=2), in_axes=(None, 0))
    )
    grad(KEY, PARAMS, normal(4, 5, 3))
    grad(jax.random.key(1), PARAMS, normal(5, 5, 3))
    assert len(calls) == 1


def test_rules_are_arguments_of_jitted_functions():
    """Given as an argument and captured as a constant, in one program."""
    x = normal(4, 5, 3)
    rule = fx.ActivityPerturbation(num_tangents=2, where="w", memory="shared")

    def both(given, key):
        return [
            fx.grad(mlp, each, in_axes=(None, 0))(key, PARAMS, x)
            for each in (given, rule)
        ]

    for got, expected in zip(
        *map(jax.tree.leaves, jax.jit(both)(rule, KEY)), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_aux_keywords_and_argnums():
    def loss(scale, p, x, *, shift):
        return scale * mlp(p, x) + shift, {"x": x, "name": "aux"}

    f = fx.value_and_grad(
        loss,
        fx.ActivityPerturbation(),
        argnums=(1,),
        has_aux=True,
        in_axes=(None, None, 1),
    )
    (value, aux), (grads,) = f(KEY, 2.0, PARAMS, normal(4, 5, 3).T, shift=1.0)
    plain, expected = fx.value_and_grad(
        mlp, fx.ActivityPerturbation(), in_axes=(None, 0)
    )(KEY, PARAMS, normal(4, 5, 3))
    assert (aux["x"].shape, aux["name"]) == ((5, 3), "aux")
    assert float(value) == pytest.approx(2 * float(plain) + 1, rel=1e-5)
    np.testing.assert_allclose(grads["w"], 2 * expected["w"], rtol=1e-4, atol=1e-6)


def test_low_precision_keeps_its_dtypes():
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
    x = jnp.asarray(normal(4, 5, 3), jnp.bfloat16)
    rule = fx.ActivityPerturbation(num_tangents=2)
    value, grads = jax.jit(fx.value_and_grad(mlp, rule, in_axes=(None, 0)))(
        KEY, half, x
    )
    assert {value.dtype, *(g.dtype for g in grads.values())} == {
        jnp.dtype(jnp.bfloat16)
    }


def test_the_table_of_sites():
    first, second, last = rows(mlp, PARAMS, normal(4, 5, 3), in_axes=(None, 0))
    assert (first.operation, first.shape, first.weight_noise, first.activity_noise) == (
        "dot_general + add",
        (4,),
        16,
        4,
    )
    assert (first.credit, second.credit, last.credit) == (
        "one slope per example",
    ) * 2 + ("exact error",)
    assert "test_activity.py" in first.where
    text = str(fx.explain(mlp, in_axes=(None, 0))(PARAMS, normal(4, 5, 3)))
    assert text.splitlines()[2].startswith(
        "dot_general + add  b, w        4      16            4               one slope per example"
    )


def test_the_table_says_what_would_help():
    assert (
        rows(mlp, PARAMS, normal(4, 3))[0].credit
        == "one slope for the batch: pass in_axes"
    )
    program = PROGRAMS["conditional"]
    text = [
        row.operation
        for row in rows(program.loss, *program.args, in_axes=program.in_axes)
    ]
    assert text.count("weight noise (cond)") == 2
    assert (
        rows(mlp, PARAMS, normal(4, 3), rule=fx.ActivityPerturbation(where="v"))[
            0
        ].operation
        == "weight noise"
    )
    program = PROGRAMS["local_losses"]
    found = rows(program.loss, *program.args, in_axes=program.in_axes)
    assert found[0].credit == "one slope per example, 1 of 2 losses"


def test_where_noise_enters():
    names = {
        name: [r.operation for r in rows(p.loss, *p.args, in_axes=p.in_axes)]
        for name, p in PROGRAMS.items()
    }
    assert names["recurrent"][1] == "dot_general + dot_general + add + add"
    assert names["embedding"][0] == "gather + add"
    assert names["jit_and_remat"][0] == "dot_general + add"
    assert names["layer_norm"][:2] == ["dot_general", "mul + add"]
    assert names["noise_points"][0].startswith("dot_general + add + ")
    assert names["noise_points"][0].endswith(" + name")
    assert all("weight noise" not in op for op in names["fori_with_indexed_weights"])


def test_a_noise_point_moves_nothing_that_leads_past_it():
    def loss(p, x):
        h = x @ p["w"] + p["b"]
        return jnp.sum(jnp.tanh(fx.noise_point(jnp.tanh(h)) + h) @ p["o"])

    assert rows(loss, PARAMS, normal(4, 3))[0].operation == "dot_general + add"


def test_a_loss_without_data_is_refused():
    with pytest.raises(
        ValueError, match=r"depends on the parameters alone.*forwax.WeightPerturbation"
    ):
        fx.grad(lambda p: jnp.sum(p**2), fx.ActivityPerturbation())(KEY, jnp.ones(3))


def test_a_custom_vjp_is_refused_by_name():
    @jax.custom_vjp
    def doubled(x):
        return 2 * x

    doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))
    data_only = fx.grad(lambda p, x: mlp(p, doubled(x)), fx.ActivityPerturbation())(
        KEY, PARAMS, normal(4, 3)
    )
    assert bool(jnp.any(data_only["w"]))
    with pytest.raises(
        TypeError,
        match=r"custom_vjp function .*doubled at .*test_activity.py:\d+.*FiniteDifference",
    ):
        fx.grad(lambda p, x: doubled(mlp(p, x)), fx.ActivityPerturbation())(
            KEY, PARAMS, normal(4, 3)
        )


def test_a_custom_vjp_inside_a_branch_or_a_loop_is_refused_by_name_under_jit():
    @jax.custom_vjp
    def doubled(x):
        return 2 * x

    doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))
    branch = lambda of: (
        lambda p, x: mlp(p, jax.lax.cond(x[0] > 0, lambda: x + of(p, x), lambda: x))
    )
    loop = lambda p, x: mlp(
        p,
        jax.lax.while_loop(lambda h: h[0] < 1, lambda h: doubled(h) + p["w"][:, 0], x),
    )
    for loss in (branch(lambda p, x: doubled(p["w"][:, 0])), loop):
        for rule in (fx.ActivityPerturbation(), fx.WeightPerturbation(num_tangents=2)):
            with pytest.raises(
                TypeError,
                match=r"custom_vjp function .*doubled at .*test_activity.py:\d+",
            ):
                jax.jit(fx.grad(loss, rule))(KEY, PARAMS, normal(4, 3))
    on_data = branch(lambda p, x: doubled(x) * p["w"][:, 0])
    assert bool(
        jnp.any(
            jax.jit(fx.grad(on_data, fx.ActivityPerturbation()))(
                KEY, PARAMS, normal(4, 3)
            )["w"]
        )
    )


def test_a_selection_of_nothing_is_refused():
    for where in ("kernal", lambda path: False):
        with pytest.raises(
            ValueError,
            match=r"expected where to select a parameter, got .*\['b'\], \['o'\], \['v'\]",
        ):
            fx.grad(mlp, fx.ActivityPerturbation(where=where))(
                KEY, PARAMS, normal(4, 3)
            )


def test_fields_are_checked():
    with pytest.raises(ValueError, match="expected memory to be one of"):
        fx.ActivityPerturbation(memory="less")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"expected combine to be Mean\(\) or Shrinkage\(\)"
    ):
        fx.ActivityPerturbation(combine=fx.combine.Projection())
    with pytest.raises(ValueError, match="positive integer"):
        fx.ActivityPerturbation(num_tangents=0)


@pytest.mark.parametrize(
    "tangents", [fx.tangents.Normal(), fx.tangents.Sphere(), fx.tangents.Orthonormal()]
)
def test_any_tangents_serve(tangents):
    rule = fx.ActivityPerturbation(tangents=tangents, num_tangents=2)
    assert bool(
        jnp.any(
            jax.jit(fx.grad(mlp, rule, in_axes=(None, 0)))(
                KEY, PARAMS, normal(4, 2, 3)
            )["w"]
        )
    )


def shifted(p, x):
    """The noise is the parameter's own, so that its law is that of the estimate."""
    return jnp.tanh(jnp.sum(jnp.sin(p["b"] + x) * x[::-1]))


@pytest.mark.parametrize(
    "tangents",
    [
        fx.tangents.Sphere(),
        fx.tangents.Coordinate(),
        fx.tangents.Coordinate(replace=False),
        fx.tangents.Orthonormal(),
    ],
)
def test_each_example_draws_a_direction_of_its_own(tangents):
    examples, n, k, draws = 4, 6, 2, 4000
    rule = fx.ActivityPerturbation(
        tangents=tangents, num_tangents=k, exact_outputs=False
    )
    params, x = {"b": jnp.zeros(n)}, normal(4, examples, n)
    estimate = jax.jit(
        jax.vmap(fx.grad(shifted, rule, in_axes=(None, 0)), (0, None, None))
    )
    true = jax.vmap(jax.grad(shifted), (None, 0))(params, x)["b"]
    errors = estimate(jax.random.split(KEY, draws), params, x)["b"] - true.mean(
        0, keepdims=True
    )
    errors = jnp.sum(errors**2, axis=1)
    law = tangents.relative_mse(n, k) * float(jnp.sum(true**2)) / examples**2
    assert abs(float(errors.mean()) - law) <= 4 * float(errors.std()) / draws**0.5


def test_as_many_orthonormal_directions_as_noise_of_an_example_are_exact():
    rule = fx.ActivityPerturbation(tangents=fx.tangents.Orthonormal(), num_tangents=8)
    x = normal(4, 5, 3)
    got = jax.jit(fx.grad(mlp, rule, in_axes=(None, 0)))(KEY, PARAMS, x)
    noisy = [
        row
        for row in rows(mlp, PARAMS, x, rule=rule, in_axes=(None, 0))
        if row.credit != "exact error"
    ]
    assert sum(row.activity_noise for row in noisy) == rule.num_tangents
    for name, true in jax.jit(fx.grad(mlp, fx.Backprop(), in_axes=(None, 0)))(
        KEY, PARAMS, x
    ).items():
        assert jnp.allclose(got[name], true, atol=1e-4), name


def test_losses_that_are_not_finite_propagate():
    for memory in ("keep", "replay", "shared"):
        rule = fx.ActivityPerturbation(memory=memory)
        loss = lambda p, x: mlp(p, x) * jnp.log(x[0] * 0 - 1)
        value, grads = jax.jit(fx.value_and_grad(loss, rule, in_axes=(None, 0)))(
            KEY, PARAMS, normal(4, 2, 3)
        )
        assert math.isnan(value)
        assert all(bool(jnp.all(jnp.isnan(grads[name]))) for name in "wbv")


def test_it_is_unbiased_by_draws_too():
    x = normal(4, 3, 3)
    shown = fx.testing.assert_unbiased(
        fx.ActivityPerturbation(num_tangents=4),
        mlp,
        [PARAMS, x],
        in_axes=(None, 0),
        reference=fx.Backprop(),
        tolerance=0.05,
    )
    assert shown.basis_sum
