"""Weights that meet an array before they meet data: the site is the product with data."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwax as fx
from forwax._signature import Signature
from forwax._sites.outputs import check_tail
from forwax._sites.passes import keep
from helpers import basis_of, estimates, norm, problem_of
from sites.interop import Model, check_factors
from sites.merged import MERGED, SQUARE, TWO, WIDE, WORDS, X
from sites.merged import keep as kept
from sites.programs import normal, squares

KEY = jax.random.key(0)
EACH = (None, 0, 0)
FORWARD_ONLY = ("merged_in_branches_and_by_a_while",)  # reverse mode rejects it
RULES = {
    "keep": fx.ActivityPerturbation(),
    "no exact outputs": fx.ActivityPerturbation(exact_outputs=False),
    "replay": fx.ActivityPerturbation(memory="replay"),
    "shared": fx.ActivityPerturbation(memory="shared"),
}
SOME = ["low_rank", "bayes", "bayes_used_twice", "merged_inside_a_recurrence"]
CASES = [("keep", name) for name in MERGED]
CASES += [(rule, name) for rule in RULES if rule != "keep" for name in SOME]


def assert_near(grads, truth, tolerance=1e-5):
    for name, true in truth.items():
        assert norm(grads[name] - true) <= tolerance * norm(truth), name


@pytest.mark.parametrize(("rule", "name"), CASES)
def test_the_mean_over_all_noise_is_the_gradient(rule, name):
    program = MERGED[name]
    reference = fx.Exact() if name in FORWARD_ONLY else fx.Backprop()
    listed = basis_of(program, RULES[rule])
    (value, grads), (true_value, truth) = estimates(program, listed, reference)
    assert value == pytest.approx(true_value, rel=1e-5)
    assert_near(grads, truth)


@pytest.mark.parametrize("name", [name for name in MERGED if name not in FORWARD_ONLY])
def test_feedback_of_the_parameters_themselves_is_backprop(name):
    program = MERGED[name]
    rule = fx.FeedbackAlignment(program.params)
    (_, grads), (_, truth) = estimates(program, rule, fx.Backprop())
    assert_near(grads, truth)


@pytest.mark.parametrize(
    "name", ["low_rank", "masks", "tied_and_merged", "frozen_layers_in_a_scan"]
)
def test_factors_give_the_slope_and_the_estimate_of_the_direction_in_full(name):
    program = MERGED[name]
    check_factors(Model(program.loss, program.params, program.data, program.in_axes))


def test_factors_pass_a_product_of_weights_and_a_frozen_one():
    """A tangent costs a plain pass less than dense signs do."""
    width, batch, rank = 64, 512, 4

    def loss(p, frozen, x):
        return jnp.mean(jnp.tanh(x @ (frozen - p["a"] @ p["b"])) ** 2)

    def flops(tangents):
        rule = fx.WeightPerturbation(tangents, num_tangents=8)
        spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
        params = {"a": spec(width, rank), "b": spec(rank, width)}
        step = jax.jit(fx.value_and_grad(loss, rule, in_axes=(None, None, 0)))
        lowered = step.lower(KEY, params, spec(width, width), spec(batch, width))
        return lowered.compile().cost_analysis()["flops"]

    assert flops(fx.tangents.LowRank()) < 0.6 * flops(fx.tangents.Rademacher())


OWN, EXACT = "one slope per example", "exact error"
READOUT = ("dot_general", (2,), 8, EXACT)
FIRST = ("dot_general", (4,), 12, OWN)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "low_rank",
            [("dot_general", (4,), 14, OWN), ("dot_general", (4,), 8, OWN), READOUT],
        ),
        ("masks", [FIRST, ("dot_general", (4,), 16, OWN), READOUT]),
        ("mapped_mask", [FIRST, ("mul + dot_general", (4,), 16, OWN), READOUT]),
        ("drop_connect", [FIRST, ("select_n + dot_general", (4,), 16, OWN), READOUT]),
        ("bayes", [FIRST, ("mul + add + dot_general + add", (4,), 36, OWN), READOUT]),
        (
            "bayes_at_the_end",
            [FIRST, ("mul + add + dot_general", (4,), 32, EXACT)],
        ),
        ("bayes_used_twice", [("mul + add", (4, 4), 32, OWN), FIRST, READOUT]),
        (
            "experts",
            [FIRST, ("dynamic_slice + squeeze + dot_general", (4,), 48, OWN), READOUT],
        ),
        (
            "batch_norm_in_evaluation",
            [("dot_general + sub + mul + add", (4,), 20, OWN), READOUT],
        ),
        ("weight_norm", [("dot_general", (4,), 16, OWN), READOUT]),
        (
            "frozen_layers_in_a_scan",
            [FIRST, ("dot_general", (3, 4), 16, OWN), READOUT],
        ),
        (
            "merged_before_a_recurrence",
            [
                ("select_n", (4, 4), 16, OWN),
                ("dot_general", (2, 4), 12, OWN),
                READOUT,
            ],
        ),
    ],
)
def test_the_site_is_the_product_and_counts_are_those_of_parameters(name, expected):
    program = MERGED[name]
    table = fx.explain(program.loss, **program.options)(*program.args)
    rows = [(r.operation, r.shape, r.weight_noise, r.credit) for r in table.rows]
    assert rows == expected, str(table)


def test_low_rank_weights_merged_and_beside_have_the_same_sites_at_the_products():
    """Beside, the narrow value in the middle is one more."""
    merged, beside = MERGED["low_rank"], MERGED["low_rank_beside"]
    rows = fx.explain(merged.loss, **merged.options)(*merged.args).rows
    more = fx.explain(beside.loss, **beside.options)(*beside.args).rows
    products = [more[i] for i in (1, 3, 4)]
    assert [(r.shape, r.credit) for r in rows] == [
        (r.shape, r.credit) for r in products
    ]

    # The same noise there has the same slopes, told apart in the same way.
    noise = [jnp.asarray(normal(i, 1, X.shape[0], 4)) for i in range(2)]

    def slopes(program, places):
        sites = fx.ActivityPerturbation().sites(problem_of(program))
        whole = [jnp.zeros((1, *spec.shape)) for spec in sites.specs()]
        for place, u in zip(places, noise, strict=True):
            whole[place] = u
        return keep.push(sites, whole).slopes

    got, expected = slopes(merged, [0, 1]), slopes(beside, [1, 3])
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-4)


def test_replay_is_flat_in_depth_but_for_the_merged_weights():
    """24 layers with merged low-rank weights, of which backprop holds 3.5 MiB."""
    width, batch, rank = 64, 512, 4

    def temporaries(depth, rule):
        def loss(params, frozen, x, y):
            h = x
            for (a, b), w in zip(params, frozen, strict=True):
                h = jnp.tanh(h @ (w + a @ b))
            return jnp.mean((h - y) ** 2)

        spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
        params = [(spec(width, rank), spec(rank, width))] * depth
        frozen, x = [spec(width, width)] * depth, spec(batch, width)
        step = fx.value_and_grad(loss, rule, in_axes=(None, None, 0, 0))
        lowered = jax.jit(step).lower(KEY, params, frozen, x, x)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    replay = fx.ActivityPerturbation(memory="replay")
    shallow, deep = temporaries(8, replay), temporaries(24, replay)
    assert deep <= 1.5 * 2**20 < 3.2 * 2**20 < temporaries(24, fx.Backprop())
    assert deep - shallow <= 16 * 4 * width * width + 4 * width * batch


def test_what_a_loss_closes_over_without_examples():
    """With data among the arguments it is a constant to a parameter, without it is the data."""
    x, y = normal(1, 5, 3), normal(2, 5, 4)

    def of(mask, frozen):
        def loss(p, x, y):
            h = jnp.tanh(x @ jnp.where(mask, p["w"], 0))
            return squares(h @ (frozen * p["v"]) - y)

        return loss

    def operations(loss, *args):
        return [row.operation for row in fx.explain(loss)(TWO, *args).rows]

    products = ["dot_general", "dot_general"]
    arrays = of(jnp.asarray(WIDE > 0), jnp.asarray(SQUARE))
    assert operations(arrays, jnp.asarray(x), jnp.asarray(y)) == products
    assert operations(arrays, x, y) == products
    # A trace copies arrays of NumPy: with one as an argument any may be it, and counts as data.
    of_numpy = of(WIDE > 0, SQUARE)
    assert operations(of_numpy, jnp.asarray(x), jnp.asarray(y)) == products
    assert operations(of_numpy, x, y) == ["select_n", "mul"]
    for given in ((), (KEY,), (0.5,)):
        closed = lambda p, *_: arrays(p, jnp.asarray(x), jnp.asarray(y))
        assert operations(closed, *given) == ["select_n", "mul"], given


def test_two_products_in_a_tail_are_an_error():
    program = MERGED["bayes_at_the_end"]
    sites = fx.ActivityPerturbation().sites(problem_of(program))
    first, last = sites.places
    equations = sites.level.program.equations
    check_tail(sites.tail, sites.products)
    wrong = dataclasses.replace(
        sites.tail, starts=(first.variable,), equations=equations
    )
    with pytest.raises(AssertionError, match=r"crosses dot_general.*would be backprop"):
        check_tail(wrong, sites.products)
    # The weight itself may be a start: its own product is the one that its error crosses.
    product = last.region.equations[-1]
    (weight,) = sites.products.weights(product)
    whole = dataclasses.replace(sites.tail, starts=(weight,), equations=equations)
    check_tail(whole, sites.products)


def test_a_merged_weight_of_its_own_site_has_its_exact_error_at_the_end():
    """With more positions than inputs, noise stays at the weight, and no product follows."""

    def loss(p, x, words):
        h = jnp.tanh(x @ p["w"])  # [6, 4]
        return squares(h @ jnp.where(kept(words, 4, 4), p["v"], 0))

    params = {name: TWO[name] for name in "wv"}
    data = (normal(1, 2, 6, 3), WORDS)
    table = fx.explain(loss, in_axes=EACH)(params, *data)
    assert {r.shape: r.credit.split(",")[0] for r in table.rows} == {
        (4, 4): EXACT,
        (6, 4): "one slope per example and position of axis 0",
    }
    problem = Signature(loss, 0, False, EACH).bind((params, *data), {})
    rule = fx.ActivityPerturbation().basis(problem)
    grads = jax.jit(fx.grad(loss, rule, in_axes=EACH))(KEY, params, *data)
    assert_near(
        grads, jax.jit(fx.grad(loss, fx.Backprop(), in_axes=EACH))(KEY, params, *data)
    )


def test_errors_cross_a_merged_weight_through_what_was_done_to_its_feedback():
    program = MERGED["drop_connect"]
    feedback = {"w": None, "v": normal(9, 4, 4), "o": None}
    rule = fx.FeedbackAlignment(feedback)
    ((_, grads),) = estimates(program, rule)

    def one(x, words):
        p, mask = program.params, kept(words, 4, 4)
        h, to_w = jax.vjp(lambda w: jnp.tanh(x @ w), p["w"])
        behind = lambda z: squares(jnp.tanh(z) @ p["o"])
        error = jax.grad(behind)(h @ jnp.where(mask, p["v"] / 0.5, 0))
        return to_w(jnp.where(mask, feedback["v"] / 0.5, 0) @ error)[0]

    expected = jnp.mean(jax.vmap(one)(*map(jnp.asarray, program.data)), axis=0)
    np.testing.assert_allclose(grads["w"], expected, rtol=1e-4, atol=1e-6)
