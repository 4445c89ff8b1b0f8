"""Low-rank weight tangents.

Factors give the slopes and sums of the directions that they stand for, unformed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import forwax as fx
from forwax._directions.convolution import in_pieces, one_feature
from forwax._directions.plan import plan_low_rank
from forwax._directions.signs import Signs
from forwax._programs.tracing import trace
from forwax._signature import Signature
from helpers import KEY, dense
from sites.programs import PROGRAMS, normal, squares

# of each parameter in the order of its name: the axes of both factors; None for dense signs
SPLITS = {
    "batched_dot": [({0, 1}, {2}), ({0, 1}, {0, 2})],
    "casts_to_integers": [({0}, {1}), ({0}, {1})],
    "complex_activities": [None, ({0, 2}, {1, 2})],
    "conditional_inside_a_scan": [None, ({0}, {1})],
    "convolutions": [None, ({0, 1, 2}, {3}), ({0, 1, 2}, {3}), ({0}, {1})],
    "dense_from_either_side": [None, ({1}, {0}), ({0}, {1})],
    "embedding": [None, ({0}, {1}), ({0}, {1})],
    "fori_with_indexed_weights": [({0}, {1}), ({0, 1}, {0, 2})],
    "gated_recurrent": [None, ({0}, {1}), ({0}, {1}), ({0}, {1})],
    "local_losses": [({0, 1}, {0, 2}), ({0}, {1}), ({0}, {1})],
    "parameters_in_carries": [None, ({0}, {1})],
    "rows_that_are_not_there": [({0}, {1}), ({0}, {1})],
    "scan_over_layers": [None, ({0}, {1}), ({0, 1}, {0, 2})],
    "tied": [({0}, {1})],
    "weight_decay": [({0}, {1}), ({0}, {1})],
}


def planned(name, rank, k, *, per_example=False):
    program = PROGRAMS[name]
    problem = Signature(program.loss, 0, False, program.in_axes).bind(program.args, {})
    plan = plan_low_rank(problem, rank, per_example)
    return problem, plan, fx.tangents.Normal().sample(KEY, plan.specs(), k)


@pytest.mark.parametrize("name", SPLITS)
def test_a_slope_is_that_of_the_direction_in_full(name):
    """Law 6, along real factors, so that no two of them agree by accident."""
    problem, plan, drawn = planned(name, rank=2, k=2)
    assert [
        None if split is None else tuple(map(set, split)) for split in plan.splits
    ] == SPLITS[name]

    @jax.jit
    def both(drawn):
        full = dense(plan, drawn)
        exact = jax.vmap(
            lambda v: jax.jvp(
                lambda p: problem.objective(p)[0], (problem.params,), (v,)
            )[1]
        )(full)
        value, _, slopes = plan.push(drawn, 2)
        sums = jax.tree.map(lambda x: jnp.tensordot(slopes, jnp.conj(x), axes=1), full)
        return (
            value,
            problem.objective(problem.params)[0],
            slopes,
            exact,
            plan.assemble(slopes, drawn),
            sums,
        )

    value, expected, slopes, exact, grads, sums = both(drawn)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(
        slopes, exact, rtol=1e-4, atol=1e-5 * float(jnp.abs(exact).max())
    )
    for got, true in zip(*map(jax.tree.leaves, (grads, sums)), strict=True):
        np.testing.assert_allclose(
            got, true, rtol=1e-4, atol=1e-5 * float(jnp.abs(true).max())
        )


@pytest.mark.parametrize(
    "name", ["dense_from_either_side", "convolutions", "scan_over_layers"]
)
def test_each_example_with_its_own_factors(name):
    problem, plan, drawn = planned(name, rank=1, k=2, per_example=True)

    def one(own, mapped):
        full = jax.tree.map(lambda x: x[0], dense(plan, [x[None] for x in own]))
        loss = lambda p: sum(map(jnp.sum, problem.example(p, *mapped)[0]))
        slope = jax.jvp(loss, (problem.params,), (full,))[1]
        return slope, jax.tree.map(lambda x: slope * x, full)

    @jax.jit
    def both(drawn):
        slopes = plan.push(drawn, 2)[2]
        every = jax.vmap(jax.vmap(one, (0, list(problem.mapped_axes))), (0, None))
        exact, parts = every(list(drawn), list(problem.mapped))
        return (
            slopes,
            exact,
            plan.assemble(slopes, drawn),
            jax.tree.map(lambda x: jnp.sum(x, (0, 1)), parts),
        )

    slopes, exact, grads, expected = both(drawn)
    assert slopes.shape == (2, problem.num_examples)
    np.testing.assert_allclose(
        slopes, exact, rtol=1e-4, atol=1e-5 * float(jnp.abs(exact).max())
    )
    for got, true in zip(*map(jax.tree.leaves, (grads, expected)), strict=True):
        np.testing.assert_allclose(
            got, true, rtol=1e-3, atol=1e-4 * float(jnp.abs(true).max())
        )


CONVOLUTIONS = {
    "plain": ((2, 6, 7, 3), ("NHWC", "HWIO", "NHWC"), {"padding": "VALID"}, True),
    "padded, strides": (
        (2, 6, 7, 9),
        ("NHWC", "HWIO", "NHWC"),
        {"padding": [(1, 2), (0, 1)], "strides": (2, 1)},
        True,
    ),
    "cropped": (
        (2, 8, 7, 9),
        ("NHWC", "HWIO", "NHWC"),
        {"padding": [(-1, 0), (1, -1)]},
        True,
    ),
    "channels first": (
        (2, 9, 6, 7),
        ("NCHW", "OIHW", "NCHW"),
        {"padding": "SAME"},
        True,
    ),
    "other result": (
        (2, 9, 6, 7),
        ("NCHW", "HWIO", "NHWC"),
        {"padding": "SAME", "dilation": (2, 1)},
        True,
    ),
    "transposed": (
        (2, 4, 4, 40),
        ("NHWC", "HWIO", "NHWC"),
        {"padding": [(1, 1), (2, 1)], "spread": (2, 1)},
        True,
    ),
    "patches": (
        (2, 6, 6, 2),
        ("NHWC", "HWIO", "NHWC"),
        {"padding": "VALID", "strides": (3, 3)},
        False,
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_with_one_feature(name):
    """Sums of shifted dots equal the compiler's own convolution.

    Or they are left to it where they would need memory.
    """
    shape, layout, options, done = CONVOLUTIONS[name]
    features = shape[layout[0].index("C")]
    sizes = {"H": 3, "W": 2, "I": features, "O": 1}
    x, kernel = (
        jnp.asarray(normal(0, *shape)),
        jnp.asarray(normal(1, *(sizes[axis] for axis in layout[1]))),
    )

    def convolve(x, kernel):
        return lax.conv_general_dilated(
            x,
            kernel,
            options.get("strides", (1, 1)),
            options["padding"],
            lhs_dilation=options.get("spread"),
            rhs_dilation=options.get("dilation"),
            dimension_numbers=layout,
        )

    params = jax.make_jaxpr(convolve)(x, kernel).eqns[0].params
    found = one_feature(x, kernel, 40, params)
    assert (found is not None) == done
    if done:
        expected = convolve(x, kernel)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layout",
    [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NHWC"), ("HWNC", "HWIO", "HNWC")],
)
def test_a_large_convolution_piece_by_piece(layout, monkeypatch):
    sizes = {"N": 6, "H": 5, "W": 4, "C": 3, "I": 3, "O": 2}
    x, kernel = (
        jnp.asarray(normal(i, *(sizes[axis] for axis in each)))
        for i, each in enumerate(layout[:2])
    )
    convolve = lambda x, kernel: lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=layout
    )
    equation = trace(convolve, x, kernel).program.equations[-1]
    expected = convolve(x, kernel)
    monkeypatch.setattr(
        "forwax._directions.convolution._PATCHES", 3000
    )  # fits two examples
    pieces = jax.jit(lambda x, kernel: in_pieces(equation, [x, kernel]))
    assert (
        f"tensor<{'x'.join(str(2 if a == 'N' else sizes[a]) for a in layout[0])}xf32>"
        in pieces.lower(x, kernel).as_text()
    )
    np.testing.assert_allclose(pieces(x, kernel), expected, rtol=1e-5, atol=1e-5)


def mlp(params, x):
    for w in params[:-1]:
        x = jnp.tanh(x @ w)
    return squares(x @ params[-1])


def cost(rule):
    spec = jax.ShapeDtypeStruct
    params = [spec((64, 64), jnp.float32)] * 4
    compiled = (
        jax.jit(fx.grad(mlp, rule))
        .lower(KEY, params, spec((256, 64), jnp.float32))
        .compile()
    )
    return compiled.cost_analysis()[
        "flops"
    ], compiled.memory_analysis().temp_size_in_bytes


def test_it_saves_arithmetic_and_memory():
    """One tangent: 1 + (L - 1)/L forwards instead of 3; eight: 1 + 8 (L - 1)/L instead of 17.

    Less than held ones.
    """
    thin, dense = (
        cost(fx.WeightPerturbation(t))
        for t in (fx.tangents.LowRank(), fx.tangents.Rademacher())
    )
    assert thin[0] < 0.7 * dense[0]
    thin, dense = (
        cost(fx.WeightPerturbation(t, 8))
        for t in (fx.tangents.LowRank(), fx.tangents.Rademacher())
    )
    assert thin[0] < 0.55 * dense[0]
    assert thin[1] < 0.8 * dense[1]
    held = cost(fx.WeightPerturbation(fx.tangents.Normal(), 8))
    assert thin[1] < 0.7 * held[1]


def test_signs_are_unpacked_once(monkeypatch):
    """Not anew for every entry of the products and the gradients that they enter."""

    def unpacked():
        params, x = [jnp.zeros((64, 64))] * 4, jnp.zeros((256, 64))
        step = jax.jit(fx.grad(mlp, fx.WeightPerturbation(fx.tangents.LowRank())))
        return step.lower(KEY, params, x).compile().as_text().count(" shift-left(")

    once = unpacked()
    monkeypatch.setattr("forwax._directions.signs.settled", lambda signs: signs)
    assert once <= unpacked() - 4  # at least one fewer for each layer


def nested(params, x):
    """Scans within scans.

    One parameter's signs fill whole words in each slice, one's do not, one has one layer.
    """

    def block(h, layers):
        h, _ = lax.scan(
            lambda h, layer: (jnp.tanh(h @ layer["w"] + layer["b"]), None), h, layers
        )
        return h, None

    h, _ = lax.scan(block, x, params["blocks"])
    h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["one"])
    return squares(h @ params["last"][0]) + squares(params["last"])


@pytest.mark.parametrize("rank", [1, 2])
def test_packed_signs_are_the_signs(rank):
    """What a scan slices before it is unpacked gives what signs that are unpacked at once give."""
    blocks = {
        "w": jnp.asarray(normal(0, 2, 3, 32, 32)),
        "b": jnp.asarray(normal(1, 2, 3, 1, 32)),
    }
    params = {
        "blocks": blocks,
        "one": jnp.asarray(normal(2, 1, 32, 32)),
        "last": jnp.asarray(normal(3, 2, 32, 5)),
    }
    problem = Signature(nested, 0, False, None).bind(
        (params, jnp.asarray(normal(4, 2, 32)) / 32), {}
    )
    plan = plan_low_rank(problem, rank)

    @jax.jit
    def found(key):
        drawn = plan.draw(key, jnp.arange(2))
        assert sum(isinstance(x, Signs) for x in drawn) == 1 + 4 * rank
        signs = fx.tangents.Rademacher().sample(key, plan.specs(), 2)
        return [
            (plan.push(x, 2), plan.assemble(jnp.ones(2), x)) for x in (drawn, signs)
        ]

    got, expected = found(KEY)
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


def test_a_scan_over_no_layers():
    params = {
        "none": jnp.ones((0, 3, 3)),
        "no words": jnp.ones((0, 32, 32)),
        "w": jnp.ones((3, 3)),
    }

    def deep(h, layers):
        return lax.scan(lambda h, w: (h @ w, None), h, layers)[0]

    def loss(p, x):
        return squares(deep(x, p["none"]) @ p["w"]) + squares(
            deep(jnp.ones((2, 32)), p["no words"])
        )

    grads = jax.jit(fx.grad(loss, fx.WeightPerturbation(fx.tangents.LowRank())))(
        KEY, params, jnp.ones((2, 3))
    )
    assert grads["none"].shape == (0, 3, 3)
    assert bool(jnp.any(grads["w"]))


def test_chunks_give_the_same_estimate():
    program = PROGRAMS["attention"]
    whole, cut = (
        jax.jit(
            fx.grad(
                program.loss,
                fx.WeightPerturbation(fx.tangents.LowRank(), 5, chunk_size=size),
                in_axes=(None, 0),
            )
        )
        for size in (None, 2)
    )
    for got, true in zip(
        *(jax.tree.leaves(f(KEY, *program.args)) for f in (cut, whole)), strict=True
    ):
        np.testing.assert_allclose(got, true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_squared_error_is_its_law(rank):
    """For a gradient in one matrix: mn - 1 at rank 1, mn + 1 - 2/r at rank r."""
    g, draws = jnp.asarray(normal(0, 4, 5)), 8192
    rule = fx.WeightPerturbation(fx.tangents.LowRank(rank))
    loss = lambda w, x: jnp.sum(x @ w * g)
    grads = jax.jit(
        jax.vmap(lambda key: fx.grad(loss, rule)(key, jnp.zeros((4, 5)), jnp.eye(4)))
    )(jax.random.split(KEY, draws))
    errors = jnp.sum((grads - g[None]) ** 2, axis=(1, 2)) / jnp.sum(g**2)
    assert float(errors.mean()) == pytest.approx(
        rule.relative_mse(20), abs=5 * float(errors.std()) / draws**0.5
    )


def test_examples_of_their_own_disagree_less():
    """(pq - 1) mean|G_i|²/N against (pq - 1)|mean G|².

    For a layer whose examples pull in all directions.
    """
    x, params = jnp.asarray(normal(0, 32, 4)), jnp.asarray(normal(1, 4, 3))
    loss = lambda w, x: squares(x @ w)
    each = jax.vmap(jax.grad(loss), (None, 0))(params, x)
    rule = fx.WeightPerturbation(fx.tangents.LowRank(per_example=True))
    grad = jax.jit(
        jax.vmap(lambda key: fx.grad(loss, rule, in_axes=(None, 0))(key, params, x))
    )
    errors = jnp.sum(
        (grad(jax.random.split(KEY, 4096)) - each.mean(0)[None]) ** 2, axis=(1, 2)
    )
    law = 11 * jnp.mean(jnp.sum(each**2, axis=(1, 2))) / 32
    assert float(errors.mean()) == pytest.approx(float(law), rel=0.1)


def test_low_precision_keeps_its_dtypes():
    params = [jnp.asarray(normal(i, 4, 4), jnp.bfloat16) for i in range(2)]
    step = jax.jit(
        fx.value_and_grad(mlp, fx.WeightPerturbation(fx.tangents.LowRank(2), 3))
    )
    value, grads = step(KEY, params, jnp.ones((2, 4), jnp.bfloat16))
    assert {value.dtype, *(g.dtype for g in grads)} == {jnp.dtype(jnp.bfloat16)}


def test_combinations_that_need_the_directions_form_them():
    params = [jnp.asarray(normal(i, 3, 3)) for i in range(2)]
    rule = fx.WeightPerturbation(fx.tangents.LowRank(), 4, fx.combine.Projection())
    grads = jax.jit(fx.grad(mlp, rule))(KEY, params, jnp.ones((2, 3)))
    assert all(np.all(np.isfinite(g)) for g in grads)


def test_own_factors_need_examples():
    rule = fx.WeightPerturbation(fx.tangents.LowRank(per_example=True))
    with pytest.raises(
        ValueError,
        match=r"per_example=True\) needs examples: expected in_axes, got None",
    ):
        fx.grad(mlp, rule)(KEY, [jnp.eye(3)], jnp.ones((2, 3)))
    with pytest.raises(
        ValueError, match="expected rank to be a positive integer, got 0"
    ):
        fx.tangents.LowRank(0)


def test_the_loss_is_traced_once():
    calls = []

    def counted(params, x):
        calls.append(1)
        return mlp(params, x)

    step = jax.jit(fx.grad(counted, fx.WeightPerturbation(fx.tangents.LowRank(), 3)))
    step(KEY, [jnp.eye(3)] * 2, jnp.ones((2, 3)))
    step(jax.random.key(1), [jnp.eye(3)] * 2, jnp.ones((2, 3)))
    assert len(calls) == 1
