"""Learned feedback: laws in linear networks, maps that are shared, chains, and the correction."""

import dataclasses
import functools
import math

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import forwax as fx
from forwax._signature import Signature
from forwax._sites.feedback.find_routes import find_routes
from sites.programs import PROGRAMS, normal

KEY = jax.random.key(0)
EACH = (None, 0)
PARAMS = {
    "w": normal(0, 3, 4),
    "b": normal(1, 4),
    "v": normal(2, 4, 5),
    "u": normal(3, 5, 4),
    "o": normal(4, 4, 2),
}
X = normal(5, 8, 3)


def network(activation):
    def loss(p, x):
        h = activation(x @ p["w"] + p["b"])
        h = activation(activation(h @ p["v"]) @ p["u"])
        return jnp.sum(jnp.sin(h @ p["o"]))

    return loss


LINEAR = network(lambda x: x)
MLP = network(jnp.tanh)


def plan_of(loss, args, in_axes=None, chain="none", **options):
    problem = Signature(loss, 0, False, in_axes).bind(args, {})
    return find_routes(problem, "LearnedFeedback", chain, **options)


def train(rule, loss, args, steps, in_axes=None, **options):
    """The rule after some steps at the same parameters."""

    @jax.jit
    def run(rule):
        def learn(rule, key):
            return rule.step(loss, in_axes=in_axes, **options)(key, *args)[-1], None

        return jax.lax.scan(learn, rule, jax.random.split(KEY, steps))[0]

    return run(rule.init(loss, in_axes=in_axes, **options)(*args))


def assert_close(got, expected, rtol=1e-4):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.max(jnp.abs(b)))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale + 1e-6)


def exact(loss, args, **options):
    return fx.grad(loss, fx.Backprop(), **options)(KEY, *args)


def test_in_a_linear_network_maps_become_the_jacobians_and_the_estimate_the_gradient():
    args = (PARAMS, X)
    rule = train(fx.LearnedFeedback(), LINEAR, args, 600, in_axes=EACH)
    last = PARAMS["o"].T @ PARAMS["u"].T
    assert_close(rule.maps.direct, (last @ PARAMS["v"].T, last))
    got = fx.grad(LINEAR, rule, in_axes=EACH)(KEY, *args)
    assert_close(got, exact(LINEAR, args, in_axes=EACH))


def test_with_the_jacobian_as_map_units_that_are_all_on_give_the_exact_gradient():
    positive = {k: np.abs(v) for k, v in PARAMS.items()}
    loss, x = network(jax.nn.relu), np.abs(X)
    last = positive["o"].T @ positive["u"].T
    rule = fx.LearnedFeedback().init(loss, in_axes=EACH)(positive, x)
    maps = dataclasses.replace(rule.maps, direct=(last @ positive["v"].T, last))
    rule = dataclasses.replace(rule, maps=maps)
    got = fx.grad(loss, rule, in_axes=EACH)(KEY, positive, x)
    assert_close(got, exact(loss, (positive, x), in_axes=EACH), rtol=1e-5)


def pinned(p, x, values):
    """The network, its two inner products' values given: other weights change errors alone."""
    h = jnp.tanh(x @ p["w"] + p["b"])
    for name, value in zip("vu", values, strict=True):
        z = h @ p[name]
        h = jnp.tanh(z + jax.lax.stop_gradient(value - z))
    return jnp.sum(jnp.sin(h @ p["o"]))


@pytest.mark.parametrize("chain", ["none", "all"])
def test_no_weight_but_the_last_enters_the_reverse_pass(chain):
    """With other weights behind the forward pass the errors stay as they are; backprop's do not."""
    each = (None, 0, None)
    values = (normal(6, 5), normal(7, 4))
    rule = arbitrary(
        fx.LearnedFeedback(chain=chain).init(pinned, in_axes=each)(PARAMS, X, values)
    )
    others = PARAMS | {"v": normal(8, 4, 5), "u": normal(9, 5, 4)}

    def errors(rule, params):
        grads = fx.grad(pinned, rule, in_axes=each)(KEY, params, X, values)
        return {name: grads[name] for name in ("w", "b", "v", "u")}

    assert_close(errors(rule, others), errors(rule, PARAMS), rtol=1e-5)
    with pytest.raises(AssertionError):
        assert_close(
            errors(fx.Backprop(), others), errors(fx.Backprop(), PARAMS), rtol=1e-2
        )


CHAINS_ALL = [
    "convolutions",
    "layer_norm",
    "embedding",
    "tied",
    "gated_recurrent",
    "readout_and_loss_in_a_scan",
    "scan_over_layers",
    "nested_scans",
    "attention",
    "local_losses",
    "residual_with_shared_gain",
]


@pytest.mark.parametrize("name", CHAINS_ALL)
def test_mirrors_throughout_become_backprop(name):
    program = PROGRAMS[name]
    args = (program.params, *program.data)
    rule = fx.LearnedFeedback(chain="all")
    rule = train(rule, program.loss, args, 800, **program.options)
    assert rule.maps.mirrors
    assert not rule.maps.direct
    got = fx.grad(program.loss, rule, **program.options)(KEY, *args)
    assert_close(got, exact(program.loss, args, **program.options))


def test_a_mirror_learns_as_fast_as_its_law_says():
    """By 1 - 2η + η²(1 + (D - 1)/N) for signs; 4,000 draws tell 0.1 from 0.5 by far."""
    start = fx.LearnedFeedback(chain="all").init(MLP, in_axes=EACH)(PARAMS, X)
    weights = PARAMS["v"], PARAMS["u"]
    assert [m.shape for m in start.maps.mirrors] == [w.shape for w in weights]

    @jax.jit
    @jax.vmap
    def left(key):
        mirrors = start.step(MLP, in_axes=EACH)(key, PARAMS, X)[-1].maps.mirrors
        return [
            jnp.sum((w - m) ** 2) / jnp.sum(w**2)
            for w, m in zip(weights, mirrors, strict=True)
        ]

    num_samples = len(X)
    keys = jax.random.split(KEY, 4_000)
    for weight, shares in zip(weights, left(keys), strict=True):
        num_terms = len(weight)
        rate = 0.5 / (1 + num_terms / num_samples)
        law = 1 - 2 * rate + rate**2 * (1 + (num_terms - 1) / num_samples)
        error = jnp.std(shares) / math.sqrt(len(keys))
        assert abs(jnp.mean(shares) - law) < 4 * error
        assert error < 0.005


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_correction_makes_the_estimate_unbiased_whatever_the_maps(name):
    """Exactly: the mean over all coordinates of the noise is the gradient."""
    program = PROGRAMS[name]
    args = (program.params, *program.data)
    rule = fx.LearnedFeedback(correction=True)
    rule = arbitrary(rule.init(program.loss, **program.options)(*args))
    problem = Signature(
        program.loss, **{"argnums": 0, "has_aux": False} | program.options
    )
    rule = rule.basis(problem.bind(args, {}))
    got = jax.jit(fx.grad(program.loss, rule, **program.options))(KEY, *args)
    reference = fx.Exact() if name in ("while_loop", "spectral_norm") else fx.Backprop()
    truth = fx.grad(program.loss, reference, **program.options)(KEY, *args)
    assert_close(got, truth, rtol=1e-3)


def test_draws_of_the_corrected_estimate_have_the_gradient_as_their_mean():
    rule = fx.LearnedFeedback(correction=True, num_tangents=2)
    rule = arbitrary(rule.init(MLP, in_axes=EACH)(PARAMS, X))
    fx.testing.assert_unbiased(rule, MLP, (PARAMS, X), in_axes=EACH, tolerance=0.05)


def arbitrary(rule):
    """The rule with random maps and mirrors."""
    learnt = (rule.maps.direct, rule.maps.mirrors)
    leaves, structure = jax.tree.flatten(learnt)
    keys = jax.random.split(jax.random.key(1), len(leaves) + 1)[1:]
    pairs = zip(keys, leaves, strict=True)
    drawn = [jax.random.normal(k, m.shape, m.dtype) for k, m in pairs]
    direct, mirrors = structure.unflatten(drawn)
    maps = dataclasses.replace(rule.maps, direct=direct, mirrors=mirrors)
    return dataclasses.replace(rule, maps=maps)


def test_a_correction_that_learns_from_its_own_noise_is_biased():
    """The biased twin: the same rule without the correction fails the same check."""
    rule = arbitrary(fx.LearnedFeedback().init(MLP, in_axes=EACH)(PARAMS, X))

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True, eq=False)
    class Claims(fx.LearnedFeedback):
        unbiased = True

    fields = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)}
    with pytest.raises(AssertionError):
        fx.testing.assert_unbiased(Claims(**fields), MLP, (PARAMS, X), in_axes=EACH)


def test_the_corrections_second_moment_is_that_of_what_the_maps_fail_to_foresee():
    """E|error - δ|² = (n - 1) |δ - ê|² for signs, n the coordinates of an example's noise."""
    x = X[:1]
    rule = arbitrary(
        fx.LearnedFeedback(correction=True).init(MLP, in_axes=EACH)(PARAMS, x)
    )
    truth = exact(MLP, (PARAMS, x), in_axes=EACH)["w"]

    @jax.jit
    def estimates(keys):
        grad = fx.grad(MLP, rule, in_axes=EACH)
        return jax.vmap(lambda key: grad(key, PARAMS, x)["w"])(keys)

    found = estimates(jax.random.split(KEY, 4096))
    plain = dataclasses.replace(rule, correction=False)
    foreseen = fx.grad(MLP, plain, in_axes=EACH)(KEY, PARAMS, x)["w"]
    # w's own error is linear in that of the 4 coordinates of its layer's output, of 9 in all.
    h = np.tanh(x @ PARAMS["w"] + PARAMS["b"])
    through = (1 - h**2)[0]
    # δ - ê at the first inlet
    delta = np.asarray((truth - foreseen)[0] / x[0, 0]) / through
    second = _residual_at_second(rule, x)
    total = np.sum(delta**2) + np.sum(second**2)
    # For signs E[(r·u)² u_i²] - r_i² = |r|² - r_i².
    law = float(np.sum(through**2 * (total - delta**2)) * np.sum(x**2))
    got = float(jnp.mean(jnp.sum((found - truth[None]) ** 2, (1, 2))))
    assert got == pytest.approx(law, rel=0.1)  # 4,096 draws: 4 standard errors


def _residual_at_second(rule, x):
    h = np.tanh(x @ PARAMS["w"] + PARAMS["b"])
    g = np.tanh(h @ PARAMS["v"])
    last = np.tanh(g @ PARAMS["u"])
    error = np.cos(last @ PARAMS["o"])
    before = (error @ PARAMS["o"].T) * (1 - last**2)
    return (before @ PARAMS["u"].T - error @ rule.maps.direct[1])[0]


def causal(p, tokens):
    h = p["embedding"][tokens]
    for layer in p["layers"]:
        h = h + attend(layer, h)
        h = h + jax.nn.relu(h @ layer["f1"]) @ layer["f2"]
    return jnp.sum(jax.nn.log_softmax(h @ p["head"])[:, 0])


def attend(layer, h):
    q, k, v = (h @ layer[name] for name in "qkv")
    scores = jnp.where(jnp.tri(len(h), dtype=bool), q @ k.T, -jnp.inf)
    return jax.nn.softmax(scores) @ v @ layer["o"]


def layer(seed):
    shapes = {
        "q": (4, 4),
        "k": (4, 4),
        "v": (4, 4),
        "o": (4, 4),
        "f1": (4, 6),
        "f2": (6, 4),
    }
    return {n: normal(seed + i, *s) / 2 for i, (n, s) in enumerate(shapes.items())}


TRANSFORMER = {
    "embedding": normal(30, 7, 4),
    "layers": [layer(10), layer(20)],
    "head": normal(31, 4, 7),
}
TOKENS = np.random.default_rng(0).integers(0, 7, (3, 5))


def test_positions_share_maps_and_products_with_common_data_have_one():
    plan = plan_of(causal, (TRANSFORMER, TOKENS), EACH)
    assert [len(i.products) for i in plan.inlets] == [3, 1, 1, 1] * 2
    assert all(i.common == ((0, (0,)),) for i in plan.inlets)
    # e is the last hidden state [5, 4], not the logits [5, 7].
    assert [o.shape for o in plan.outlets] == [(5, 4)]
    rule = fx.LearnedFeedback(chain="none").init(causal, in_axes=EACH)
    shapes = [m.shape for m in rule(TRANSFORMER, TOKENS).maps.direct]
    assert shapes == [(4, 4), (4, 4), (4, 4), (4, 6)] * 2


def test_keys_and_values_are_chained_and_queries_are_not():
    plan = plan_of(causal, (TRANSFORMER, TOKENS), EACH, "positions")
    assert [len(i.products) for i in plan.inlets] == [1, 1, 1, 1] * 2
    weights = [m.variable for m in plan.mirrors]
    parameters = jax.tree_util.tree_leaves_with_path(TRANSFORMER)
    names = [
        jax.tree_util.keystr(path[-1:])
        for v, (path, _) in zip(plan.sites.traced.parameters, parameters, strict=True)
        if v in weights
    ]
    assert names == ["['k']", "['v']"] * 2


def test_the_recurrent_weight_of_a_loop_over_time_is_chained_and_layers_are_not():
    program = PROGRAMS["gated_recurrent"]
    args = (program.params, *program.data)
    plan = plan_of(program.loss, args, program.in_axes, "positions")
    assert [m.varies for m in plan.mirrors] == [(False,)]
    program = PROGRAMS["scan_over_layers"]
    args = (program.params, *program.data)
    plan = plan_of(program.loss, args, program.in_axes, "positions")
    assert not plan.mirrors


def normed(params, tokens, *, is_penalised=False):
    """A transformer with gains, whose last product takes the normed residual stream."""

    def norm(h, gain):
        centred = h - jnp.mean(h, axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-3)
        return centred * scale * gain[None]

    h = params["embedding"][tokens]
    x = norm(h, params["gain"])
    scores = jnp.where(jnp.tri(len(h)) > 0, x @ params["q"] @ (x @ params["k"]).T, -9.0)
    h = h + jax.nn.softmax(scores) @ (x @ params["v"]) @ params["o"]
    last = norm(h, params["last"])
    loss = -jnp.mean(jax.nn.log_softmax(last @ params["head"])[:, 0])
    return loss + jnp.sum(last**2) if is_penalised else loss


NORMED = TRANSFORMER["layers"][0] | {
    "embedding": TRANSFORMER["embedding"],
    "head": TRANSFORMER["head"],
    "gain": 1 + normal(40, 4) / 5,
    "last": 1 + normal(41, 4) / 5,
}


def test_the_error_is_taken_in_front_of_the_last_norm():
    """What ends in the residual stream then needs no map: with maps of zeros it is exact."""
    rule = fx.LearnedFeedback().init(normed, in_axes=EACH)(NORMED, TOKENS)
    got = fx.grad(normed, rule, in_axes=EACH)(KEY, NORMED, TOKENS)
    expected = exact(normed, (NORMED, TOKENS), in_axes=EACH)
    for name in ("o", "last", "head"):
        assert_close(got[name], expected[name], rtol=1e-5)
    assert float(jnp.max(jnp.abs(got["q"]))) == 0


def test_it_stays_behind_the_norm_where_something_else_reads_the_normed_value():
    """An error taken in front of it would not be all that the last product's data have."""
    penalised = functools.partial(normed, is_penalised=True)
    (outlet,) = plan_of(penalised, (NORMED, TOKENS), EACH).outlets
    (before,) = plan_of(normed, (NORMED, TOKENS), EACH).outlets
    assert outlet.shape == before.shape == (5, 4)
    assert outlet.variable > before.variable


@pytest.mark.parametrize(
    "repeated",
    [
        lambda h: h[:, None],
        lambda h: jnp.broadcast_to(h[:, None], (4, 4)).astype(jnp.float32),
    ],
)
def test_a_layer_that_is_written_as_a_product_entry_by_entry_is_no_gain(repeated):
    """Its weight would enter the reverse pass: (h[:, None] * w).sum(0) is h @ w."""

    def written(params, x):
        h = jnp.tanh(x @ params["first"])
        last = jnp.sum(repeated(h) * params["second"], axis=0)
        return jnp.sum(jnp.sin(last @ params["head"]))

    params = {
        "first": normal(50, 3, 4),
        "second": normal(51, 4, 4),
        "head": normal(52, 4, 9),
    }
    for chain in ("none", "positions"):
        plan = plan_of(written, (params, X), EACH, chain)
        assert not plan.mirrors
        assert len(plan.inlets) == 1
    rule = fx.LearnedFeedback().init(written, in_axes=EACH)(params, X)
    grads = fx.grad(written, rule, in_axes=EACH)(KEY, params, X)
    assert float(jnp.max(jnp.abs(grads["first"]))) == 0  # its map is zero


MIXER = {
    "first": normal(60, 3, 4),
    "tokens": normal(61, 6, 6) / 2,
    "channels": normal(62, 4, 4),
    "head": normal(63, 4, 2),
}
PATCHES = normal(64, 8, 6, 3)


def pooled(params, patches, *, activation=lambda x: x, mixes=True):
    """A linear mixer of tokens and channels, its positions averaged in front of the head."""
    h = activation(patches @ params["first"])
    if mixes:
        h = activation(params["tokens"] @ h)
    h = activation(h @ params["channels"])
    return jnp.sum(jnp.sin(jnp.mean(h, axis=0) @ params["head"]))


def test_the_error_is_taken_in_front_of_a_mean_over_positions():
    """All positions then teach one small map, which becomes the Jacobian of each."""
    loss = functools.partial(pooled, mixes=False)
    plan = plan_of(loss, (MIXER, PATCHES), EACH, by_position=True)
    assert [o.shape for o in plan.outlets] == [(6, 4)]
    assert plan.inlets[0].own_axes == [0]
    # as published, direct feedback sends the error of the logits
    published = fx.FDFA().init(loss, in_axes=EACH)(MIXER, PATCHES)
    assert [m.shape for m in published.maps] == [(2, 24)]

    args = (MIXER, PATCHES)
    rule = train(fx.LearnedFeedback(), loss, args, 200, in_axes=EACH)
    assert_close(rule.maps.direct, (MIXER["channels"].T,))
    got = fx.grad(loss, rule, in_axes=EACH)(KEY, *args)
    assert_close(got, exact(loss, args, in_axes=EACH))


def test_it_stays_behind_the_mean_where_maps_get_larger():
    """Ten coordinates for two: without positions in common the map would be five times as large."""

    def flat(params, x):
        parts = jnp.tanh(x @ params["first"]).reshape(5, 2)
        return jnp.sum(jnp.sin(jnp.mean(parts, axis=0) @ params["head"]))

    params = {"in": normal(65, 3, 3), "first": normal(66, 3, 10)}
    params |= {"head": normal(67, 2, 2)}
    loss = lambda p, x: flat(p, jnp.tanh(x @ p["in"]))
    (outlet,) = plan_of(loss, (params, X), EACH, by_position=True).outlets
    assert outlet.shape == (2,)


@pytest.mark.parametrize("chain", ["positions", "all"])
def test_a_product_along_positions_has_a_mirror(chain):
    """Its data have no position in common with the outlets: a direct map would join them all."""
    args = (MIXER, PATCHES)
    rule = train(fx.LearnedFeedback(chain=chain), pooled, args, 300, in_axes=EACH)
    shapes = [mirror.shape for mirror in rule.maps.mirrors]
    assert shapes[0] == (6, 6)
    assert len(shapes) == (1 if chain == "positions" else 2)
    got = fx.grad(pooled, rule, in_axes=EACH)(KEY, *args)
    assert_close(got, exact(pooled, args, in_axes=EACH))


def test_explain_says_where_the_error_is_taken():
    rule = fx.LearnedFeedback()
    rows = fx.explain(normed, rule, in_axes=EACH)(NORMED, TOKENS).rows
    assert rows[-1].credit == (
        "exact error, sent from what its data are made of: 20 coordinates"
    )
    assert rows[-2].credit == "exact error of what follows; its data's too"
    assert rows[1].credit.endswith("by a mirror of the weight")
    penalised = functools.partial(normed, is_penalised=True)
    rows = fx.explain(penalised, rule, in_axes=EACH)(NORMED, TOKENS).rows
    assert rows[-1].credit == "exact error, sent from its data: 20 coordinates"


def test_gains_have_mirrors_of_their_size_so_that_chains_end_nowhere():
    """The error of keys and values goes on to the embedding: chained with all, it is exact."""
    plan = plan_of(normed, (NORMED, TOKENS), EACH, "positions")
    rule = fx.LearnedFeedback().init(normed, in_axes=EACH)(NORMED, TOKENS)
    assert [m.shape for m in rule.maps.mirrors] == [(4,), (4, 4), (4, 4)]
    # the data of the queries, which keys and values share, and of the output's product
    assert [len(i.products) for i in plan.inlets] == [1, 1]
    alone = fx.LearnedFeedback(chain="none").init(normed, in_axes=EACH)(NORMED, TOKENS)
    assert not alone.maps.mirrors
    assert len(alone.maps.direct) == 3
    rule = train(fx.LearnedFeedback(chain="all"), normed, (NORMED, TOKENS), 800, EACH)
    got = fx.grad(normed, rule, in_axes=EACH)(KEY, NORMED, TOKENS)
    assert_close(got, exact(normed, (NORMED, TOKENS), in_axes=EACH))


def test_a_gain_has_no_positions_of_its_own():
    def loss(p, x):
        h = jnp.tanh(jnp.tanh(x @ p["w"]) * p["gain"][None])
        return jnp.sum(h @ p["o"])

    params = {"w": normal(0, 3, 4), "gain": normal(1, 4), "o": normal(2, 4, 4)}
    plan = plan_of(loss, (params, normal(3, 2, 5, 3)), EACH)
    (inlet,) = plan.inlets
    assert inlet.common == ((0, (0,)),)


def test_local_losses_hear_only_what_they_reach():
    program = PROGRAMS["local_losses"]
    args = (program.params, *program.data)
    plan = plan_of(program.loss, args, program.in_axes)
    (inlet,) = plan.inlets
    assert inlet.heard == (1,)


def test_maps_learn_in_each_nth_step_and_the_others_push_no_tangent():
    args = (PARAMS, X)
    rule = fx.LearnedFeedback(every=3).init(MLP, in_axes=EACH)(*args)
    step = jax.jit(lambda rule, key: rule.step(MLP, in_axes=EACH)(key, *args)[-1])
    changed = []
    for key in jax.random.split(KEY, 7):
        after = step(rule, key)
        changed.append(bool(jnp.any(after.maps.direct[0] != rule.maps.direct[0])))
        rule = after
    assert changed == [True, False, False] * 2 + [True]

    def flops(f, *args):
        return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]

    # The maps learn in one branch; the other hands them on and computes nothing.
    once = dataclasses.replace(rule, every=1)
    grad = lambda rule, key, *args: fx.value_and_grad(MLP, rule, in_axes=EACH)(
        key, *args
    )
    whole = lambda rule, key, *args: rule.step(MLP, in_axes=EACH)(key, *args)
    given, learning = flops(grad, rule, KEY, *args), flops(whole, once, KEY, *args)
    jaxpr = jax.make_jaxpr(whole)(rule, KEY, *args)
    (index,) = [i for i, e in enumerate(jaxpr.eqns) if e.primitive.name == "cond"]
    branches = jaxpr.eqns[index].params["branches"]
    resting, pushing = sorted(branches, key=lambda b: len(b.jaxpr.eqns))
    assert not resting.jaxpr.eqns
    assert flops(jax.extend.core.jaxpr_as_fun(pushing), *_zeros(pushing)) > 0
    assert learning > 1.3 * given


def _zeros(branch):
    return [
        KEY
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
        else jnp.zeros(a.shape, a.dtype)
        for a in branch.in_avals
    ]


def test_more_noise_and_given_rates():
    args = (PARAMS, X)
    few = train(fx.LearnedFeedback(rate=0.02), MLP, args, 5, in_axes=EACH)
    # The rate is taken as it is: after one step the maps are η mean(ė ⊗ u).
    one = fx.LearnedFeedback(rate=0.02).init(MLP, in_axes=EACH)(*args)
    two = dataclasses.replace(one, rate=0.04)
    maps = [r.step(MLP, in_axes=EACH)(KEY, *args)[-1].maps.direct for r in (one, two)]
    assert_close(maps[1], jax.tree.map(lambda m: 2 * m, maps[0]))
    assert int(few.maps.num_steps) == 5


def test_half_precision_keeps_maps_in_float32():
    half = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.bfloat16))
    args = (half(PARAMS), half(X))
    rule = fx.LearnedFeedback().init(MLP, in_axes=EACH)(*args)
    value, grads, rule = rule.step(MLP, in_axes=EACH)(KEY, *args)
    assert value.dtype == jnp.bfloat16
    assert {m.dtype for m in rule.maps.direct} == {jnp.dtype("float32")}
    assert {g.dtype for g in grads.values()} == {jnp.dtype("bfloat16")}


def test_safe_guards_it_and_hands_out_what_it_learnt():
    args = (PARAMS, X)
    safe = fx.Safe(fx.LearnedFeedback().init(MLP, in_axes=EACH)(*args)).init()
    step = jax.jit(lambda safe, key, p: safe.step(MLP, in_axes=EACH)(key, p, X))
    for key in jax.random.split(KEY, 3):
        _, grads, safe = step(safe, key, PARAMS)
    assert int(safe.rule.maps.num_steps) == 3
    broken = PARAMS | {"w": PARAMS["w"] * np.nan}
    _, grads, after = step(safe, KEY, broken)
    assert all(bool(jnp.all(g == 0)) for g in jax.tree.leaves(grads))
    assert_close(after.rule.maps, safe.rule.maps, rtol=0)
    assert int(after.history.num_skipped) == 1


def test_what_does_not_fit_is_refused():
    args = (PARAMS, X)
    text = r"expected direct maps and mirrors of shapes .*\(2, 4\), \(2, 5\).*got None"
    with pytest.raises(ValueError, match=text):
        fx.grad(MLP, fx.LearnedFeedback(), in_axes=EACH)(KEY, *args)
    with pytest.raises(ValueError, match="'none', 'positions' or 'all', got 'some'"):
        fx.LearnedFeedback(chain="some")
    with pytest.raises(ValueError, match="expected rate between 0 and 2"):
        fx.LearnedFeedback(rate=2.5)
    for field in ("every", "num_tangents"):
        with pytest.raises(ValueError, match=f"{field} to be a positive integer"):
            fx.LearnedFeedback(**{field: 0})
    inside = lambda p, x: jnp.sum(
        jax.lax.scan(lambda h, x: (jnp.tanh(x * p + jnp.maximum(h, p)), None), 0.0, x)[
            0
        ]
    )
    with pytest.raises(ValueError, match="found no output site after the max"):
        fx.LearnedFeedback().init(inside, in_axes=EACH)(jnp.asarray(0.5), X)


def test_its_law_is_unknown():
    rule = fx.LearnedFeedback()
    assert (rule.unbiased, rule.learning_rate_scale(3)) == (False, 1.0)
    assert math.isnan(rule.relative_mse(3))
    assert fx.LearnedFeedback(correction=True).unbiased


def test_it_works_under_vmap_and_over_devices_with_the_same_maps_everywhere():
    """Over devices that hold parts of the examples, maps learn from all of them."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    rule = arbitrary(fx.LearnedFeedback().init(MLP, in_axes=EACH)(PARAMS, X))

    def step(rule, key, p, x):
        return rule.step(MLP, in_axes=EACH)(key, p, x)

    spread = jax.shard_map(
        lambda *args: step(*args)[1:],
        mesh=mesh,
        in_specs=(P(), P(), P(), P("d")),
        out_specs=(P(), P()),
    )
    _, after = jax.jit(spread)(rule, KEY, PARAMS, X)
    *_, alone = step(rule, KEY, PARAMS, X)
    assert jax.tree.structure(after) == jax.tree.structure(rule)
    # Another noise, but as many samples: maps have moved, on all devices alike.
    for a, b, c in zip(
        after.maps.direct, alone.maps.direct, rule.maps.direct, strict=True
    ):
        assert a.shape == b.shape
        assert float(jnp.linalg.norm(a - c)) > 0.1 * float(jnp.linalg.norm(b - c))
    # With given maps no noise enters: the sum over devices of means is 4 means of all.
    given = jax.shard_map(
        lambda r, k, p, x: fx.grad(MLP, r, in_axes=EACH)(k, p, x),
        mesh=mesh,
        in_specs=(P(), P(), P(), P("d")),
        out_specs=P(),
    )
    got = jax.jit(given)(rule, KEY, PARAMS, X)
    expected = fx.grad(MLP, rule, in_axes=EACH)(KEY, PARAMS, X)
    assert_close(got, jax.tree.map(lambda g: 4 * g, expected))

    many = jax.vmap(lambda key: rule.step(MLP, in_axes=EACH)(key, PARAMS, X)[1])
    keys = jax.random.split(KEY, 3)
    one = rule.step(MLP, in_axes=EACH)(keys[1], PARAMS, X)[1]
    assert_close(jax.tree.map(lambda g: g[1], many(keys)), one)


def test_rows_of_a_parameter_that_are_looked_up_by_a_computed_index():
    """The last weight is two rows of a matrix: their index is of no data and no parameter."""

    def labelled(params, tokens):
        h = params["embedding"][tokens]
        for each in params["layers"]:
            h = h + attend(each, h)
        rows = params["head"].T[jnp.array([-1, 2])]
        return jnp.sum(jax.nn.log_softmax(h[-1] @ rows.T)[0])

    args = (TRANSFORMER, TOKENS)
    rule = fx.LearnedFeedback(chain="all").init(labelled, in_axes=EACH)(*args)
    _, grads, rule = rule.step(labelled, in_axes=EACH)(KEY, *args)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(grads))
    assert all(float(jnp.max(jnp.abs(m))) > 0 for m in rule.maps.mirrors)
    assert len(rule.maps.mirrors) >= 8
