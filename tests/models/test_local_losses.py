"""Local losses.

What they are worth, what they train, and that forward gradients of them are unbiased.
"""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import forwax as fx
from forwax._signature import Signature
from forwax.losses import nt_xent, softmax_cross_entropy
from forwax.models import LocalMixer, contrastive_losses, local, local_losses, ren2023
from forwax.models.layers import standardize

KEY = jax.random.key(0)
TINY = {"blocks": 2, "patches": 2, "channels": 8, "groups": 2}
IN_AXES = (None, 0, 0)
WHERE = ("global", "local", "greedy")


@functools.cache
def mixer(**options):
    return eqx.filter_jit(
        lambda: LocalMixer((4, 4, 1), 3, **TINY, **options, key=KEY)
    )()


def batch():
    return jnp.asarray(
        np.random.default_rng(0).normal(size=(2, 4, 4, 1)), jnp.float32
    ), jnp.array([0, 2])


def supervised(losses, parts):
    return lambda model, x, y: local_losses(model, x, y, losses, parts=parts)


def contrastive(losses, parts):
    return lambda model, x, y: contrastive_losses(
        model, x, x[::-1] + 1, y, losses, parts=parts
    )


def assert_same(got, expected, tolerance=5e-5):
    got, expected = jax.tree.map(np.asarray, (got, expected))
    scale = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(expected)))
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    )
    for (path, mine), true in pairs:
        assert np.linalg.norm((mine - true).ravel()) <= tolerance * scale, (
            jax.tree_util.keystr(path)
        )


SUPERVISED = ["FG-A", "L-FG-A", "LG-FG-A", "FG-W", "L-FG-W", "LG-FG-W"]
CONTRASTIVE = ["FG-W", "L-FG-A", "LG-FG-A"]
OBJECTIVES = [(name, supervised) for name in SUPERVISED] + [
    (name, contrastive) for name in CONTRASTIVE
]


@pytest.mark.parametrize(("name", "objective"), OBJECTIVES)
def test_the_mean_forward_gradient_is_the_gradient_of_backprop(name, objective):
    model, args = mixer(projection=5 if objective is contrastive else None), batch()
    in_axes = IN_AXES if objective is supervised else None
    method = ren2023.method(name, model, KEY)
    exact = ren2023.method(name.replace("FG-A", "BP").replace("FG-W", "BP"), model, KEY)
    assert (method.losses, method.parts, exact.parts) == (exact.losses, True, False)
    loss = objective(method.losses, method.parts)
    rule = method.rule.basis(
        Signature(loss, 0, False, in_axes).bind((model, *args), {})
    )
    whole = fx.value_and_grad(
        objective(exact.losses, exact.parts), exact.rule, in_axes=in_axes
    )
    value, grads = jax.jit(fx.value_and_grad(loss, rule, in_axes=in_axes))(
        KEY, model, *args
    )
    true_value, truth = jax.jit(whole)(KEY, model, *args)
    assert float(value) == pytest.approx(float(true_value), rel=1e-5)
    assert_same(grads, truth)


def written_by_hand(model, x, label, key):
    """One estimate of LG-FG-A for one block and one patch, as the paper's algorithm reads.

    First and second layer.
    """
    block, head = model.blocks[0], model.heads[0]
    groups = len(block.groups.weight)
    first = lambda dense: standardize(
        dense(standardize(x.reshape(1, -1), (1,), 0.01)), (1,), 0.01
    )
    inside = lambda h: standardize(h.reshape(1, groups, -1), (2,), 0.01)
    second = lambda layer, h: standardize(layer(inside(h)), (2,), 0.01)
    z, u = (
        first(block.dense),
        jax.random.rademacher(key, (2, x.size), jnp.float32)[
            :, : model.readout.weight.shape[0]
        ],
    )
    noise = u[0][None], u[1].reshape(1, groups, -1)

    def features(first_noise, second_noise):
        return jax.nn.relu(
            second(block.groups, jax.nn.relu(z + first_noise)) + second_noise
        )

    h, moved = jax.jvp(features, jax.tree.map(jnp.zeros_like, noise), noise)
    error = jax.nn.softmax(head(h.ravel())) - jax.nn.one_hot(label, 3)
    slopes = jnp.sum(
        (moved.ravel() * (head.weight @ error)).reshape(groups, -1),
        axis=1,
        keepdims=True,
    )[None]
    live = (jax.nn.relu(z) > 0).astype(z.dtype)
    deltas = (
        (slopes * noise[0].reshape(noise[1].shape)).reshape(z.shape) * live,
        slopes * noise[1] * (h > 0).astype(h.dtype),
    )
    (by_dense,) = jax.vjp(first, block.dense)[1](deltas[0])
    (by_groups,) = jax.vjp(lambda layer: second(layer, jax.nn.relu(z)), block.groups)[
        1
    ](deltas[1])
    return by_dense.weight, by_groups.weight


def test_the_variance_is_that_of_the_algorithm_written_by_hand():
    x, label = (
        jnp.asarray(np.random.default_rng(1).normal(size=(6, 6, 1)), jnp.float32),
        jnp.array(1),
    )
    model = LocalMixer(
        (6, 6, 1), 3, blocks=1, patches=1, channels=24, groups=4, key=KEY
    )
    method = ren2023.method("LG-FG-A", model, KEY)
    true = fx.grad(supervised("greedy", False), fx.Backprop())(
        KEY, model, x, label
    ).blocks[0]

    def ours(key):
        grads = fx.grad(supervised("greedy", True), method.rule)(
            key, model, x, label
        ).blocks[0]
        return grads.dense.weight, grads.groups.weight

    @jax.jit
    def squared_errors(key):
        both = lambda key: (ours(key), written_by_hand(model, x, label, key))
        error = lambda pair: [
            jnp.sum((a - b) ** 2) for a, b in zip(pair, layers, strict=True)
        ]
        layers = (true.dense.weight, true.groups.weight)
        return jax.tree.map(
            jnp.mean,
            jax.vmap(lambda key: [error(pair) for pair in both(key)])(
                jax.random.split(key, 4000)
            ),
        )

    mine, hand = squared_errors(jax.random.key(7))
    np.testing.assert_allclose(mine, hand, rtol=0.08)


def test_heads_get_no_noise():
    model, (x, y) = mixer(), batch()
    names = ["LG-BP", "LG-FG-A", "LG-FG-W"]

    def grads(name):
        method = ren2023.method(name, model, KEY)
        loss = supervised(method.losses, method.parts)
        found = fx.grad(loss, method.rule, in_axes=IN_AXES)(KEY, model, x, y)
        return found.heads, found.readout

    exact, *noisy = jax.jit(lambda: [grads(name) for name in names])()
    for mine in noisy:
        assert_same(mine, exact, 1e-6)


class Headed(eqx.Module):
    """A block with parameters named as a model's own heads and readout."""

    heads: jax.Array
    readout: jax.Array

    def __call__(self, x):
        return jnp.tanh((x @ self.heads) * self.readout)


def test_weight_noise_is_for_all_but_the_models_own_heads():
    blocks = [Headed(jnp.eye(4), jnp.ones(4)) for _ in range(2)]
    model = local(blocks, jnp.ones(4), 3, key=KEY)
    method = ren2023.method("LG-FG-W", model, KEY)
    loss = supervised(method.losses, method.parts)
    rows = fx.explain(loss, method.rule, in_axes=IN_AXES)(
        model, jnp.ones((2, 4)), jnp.array([0, 1])
    ).rows
    noisy = [(row.operation, row.shape) for row in rows if row.credit != "exact error"]
    assert noisy == [("weight noise", (4, 4)), ("weight noise", (4,))] * 2


def test_feedback_alignment_sees_the_heads():
    model, (x, y) = mixer(), batch()
    scaled = eqx.tree_at(
        lambda model: [head.weight for head in model.heads],
        model,
        replace_fn=lambda w: -2 * w,
    )
    plain = ren2023.method("LG-FA", model, KEY)
    rules = fx.Backprop(), fx.FeedbackAlignment(scaled)
    methods = [dataclasses.replace(plain, rule=rule) for rule in rules]
    exact, aligned = jax.jit(
        lambda: [ren2023.supervised(each)(KEY, model, x, y)[1] for each in methods]
    )()
    assert_same((aligned.heads, aligned.readout), (exact.heads, exact.readout), 1e-6)
    assert_same(aligned.blocks, jax.tree.map(lambda g: -2 * g, exact.blocks))


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("FA", supervised),
        ("DFA", supervised),
        ("DFA", contrastive),
        ("L-LF", supervised),
        ("L-LF", contrastive),
    ],
)
def test_feedback_rules_train_what_stands_last_exactly(name, objective):
    model, (x, y) = mixer(projection=5 if objective is contrastive else None), batch()
    method = ren2023.method(name, model, jax.random.key(1))
    backprop = dataclasses.replace(method, rule=fx.Backprop())
    if objective is supervised:
        both = lambda: [
            ren2023.supervised(each)(KEY, model, x, y)[:2]
            for each in (method, backprop)
        ]
    else:
        both = lambda: [
            ren2023.contrastive(each)(KEY, model, x, x[::-1] + 1, y)[:2]
            for each in (method, backprop)
        ]
    (value, grads), (expected, exact) = jax.jit(both)()
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert_same((grads.readout, grads.heads), (exact.readout, exact.heads), 1e-5)
    assert np.any(grads.blocks[0].dense.weight)
    assert not np.allclose(grads.blocks[0].dense.weight, exact.blocks[0].dense.weight)


def test_the_parts_add_up_to_the_losses():
    model, (x, y) = mixer(), batch()
    trees = jax.jit(
        lambda: [
            local_losses(model, x[0], y[0], "local", parts=parts).tree
            for parts in (True, False)
        ]
    )()
    parts, whole = trees
    assert [part.shape for part in parts["blocks"]] == [(4, 2), (4, 2)]
    for part, loss in zip(parts["blocks"], whole["blocks"], strict=True):
        np.testing.assert_allclose(part, jnp.full((4, 2), loss / 8), rtol=1e-5)
    np.testing.assert_allclose(
        parts["readout"], jnp.full((4, 2), whole["readout"] / 8), rtol=1e-5
    )


def test_where_the_losses_sit():
    model, (x, y) = mixer(), batch()
    logits = model(x[0])

    def tree(losses):
        return local_losses(model, x[0], y[0], losses).tree

    def readout(model, where):
        return jnp.sum(local_losses(model, x[0], y[0], where).tree["readout"])

    to_global, to_local, to_greedy = jax.jit(
        lambda: [jax.grad(readout)(model, w) for w in WHERE]
    )()
    assert_same(
        to_local, to_global
    )  # the paper's L-BP sends the final loss through the blocks too
    assert not np.any(to_greedy.blocks[-1].dense.weight)
    assert set(tree("global")) == {"readout"}
    assert set(tree("greedy")) == {"readout", "blocks"}
    assert float(tree("global")["readout"]) == pytest.approx(
        float(softmax_cross_entropy(logits, y[0])), rel=1e-5
    )
    with pytest.raises(
        ValueError,
        match='expected losses to be "global", "local" or "greedy", got \'all\'',
    ):
        tree("all")


def test_the_contrastive_losses_are_nt_xent_of_the_projections():
    model, (x, y) = mixer(projection=5), batch()

    @jax.jit
    def both():
        found = [
            contrastive_losses(model, x, x + 1, y, where).tree["blocks"]
            for where in ("greedy", "global")
        ]
        features = [jax.vmap(model.features)(view)[-1] for view in (x, x + 1)]
        projected = [model.heads[-1](h.mean(1).reshape(2, -1)) for h in features]
        return *found, nt_xent(*projected)

    greedy, whole, expected = both()
    assert [loss.shape for loss in greedy] == [(4, 4, 2)] * 2
    np.testing.assert_allclose(greedy[-1].sum((1, 2)) * 4, expected, rtol=1e-4)
    np.testing.assert_allclose(whole[0] * 4, expected, rtol=1e-4)


def mlp(key):
    layers = [eqx.nn.Linear(6, 6, key=k) for k in jax.random.split(key)]
    return (
        [eqx.nn.Sequential([layer, eqx.nn.Lambda(jax.nn.relu)]) for layer in layers],
        jnp.ones(6),
        {"groups": 3},
    )


def cnn(key):
    first, second = jax.random.split(key)
    convs = [eqx.nn.Conv2d(1, 4, 3, key=first), eqx.nn.Conv2d(4, 6, 3, key=second)]
    blocks = [eqx.nn.Sequential([conv, eqx.nn.Lambda(jnp.tanh)]) for conv in convs]
    return (
        blocks,
        jnp.linspace(-1, 1, 25).reshape(1, 5, 5),
        {"groups": (1, 3), "channel_axis": 0},
    )


class Attention(eqx.Module):
    attention: eqx.nn.MultiheadAttention

    def __call__(self, tokens):
        return tokens + self.attention(tokens, tokens, tokens)


def vit(key):
    first, second = jax.random.split(key)
    embedding = eqx.nn.Linear(4, 8, key=first)
    attention = Attention(eqx.nn.MultiheadAttention(2, 8, key=second))
    return (
        [eqx.filter_vmap(embedding), attention],
        jnp.linspace(-1, 1, 20).reshape(5, 4),
        {"groups": 2},
    )


@pytest.mark.parametrize(
    ("build", "shapes"),
    [
        (mlp, [(1, 3, 2), (1, 3, 2)]),
        (cnn, [(9, 1, 4), (1, 3, 2)]),
        (vit, [(5, 2, 4), (5, 2, 4)]),
    ],
)
def test_any_blocks_get_local_losses(build, shapes):
    blocks, x, options = build(KEY)
    model = local(blocks, x, 3, **options, key=KEY)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    loss = lambda params, x, y: local_losses(eqx.combine(params, static), x, y)
    args = (params, x[None], jnp.array([1]))
    rule = fx.ActivityPerturbation()
    assert [h.shape for h in eqx.filter_eval_shape(model.features, x)] == shapes
    assert eqx.filter_eval_shape(model, x).shape == (3,)
    estimate = jax.eval_shape(fx.grad(loss, rule, in_axes=IN_AXES), KEY, *args)
    assert jax.tree.map(jnp.shape, estimate) == jax.tree.map(jnp.shape, params)
    if build is vit:  # the others are quicker, and nothing new
        basis = rule.basis(Signature(loss, 0, False, IN_AXES).bind(args, {}))
        both = jax.jit(
            lambda: [
                fx.grad(loss, each, in_axes=IN_AXES)(KEY, *args)
                for each in (basis, fx.Backprop())
            ]
        )
        assert_same(*both())


def test_blocks_that_cannot_be_cut_are_refused():
    with pytest.raises(ValueError, match="expected at least one block, got none"):
        local([], jnp.ones(3), 2, key=KEY)
    with pytest.raises(
        ValueError,
        match=r"a block of output shape \(3,\) has 3 channels, .* into 2 groups",
    ):
        local([jnp.tanh], jnp.ones(3), 2, groups=2, key=KEY)
    with pytest.raises(ValueError, match="expected groups for each of 1 blocks, got 2"):
        local([jnp.tanh], jnp.ones(3), 2, groups=(1, 1), key=KEY)
    with pytest.raises(
        ValueError,
        match=r"expected a block to return an array with axis 2, got shape \(3,\)",
    ):
        local([jnp.tanh], jnp.ones(3), 2, channel_axis=2, key=KEY)


@pytest.mark.parametrize("name", ["LF", "L-LF", "LG-LF"])
def test_learned_feedback_learns_step_by_step(name):
    model, (x, y) = mixer(), batch()
    start = ren2023.method(name, model, KEY)
    backprop = dataclasses.replace(start, rule=fx.Backprop())
    exact = ren2023.supervised(backprop)(KEY, model, x, y)[1]

    def step(rule, key):
        method = dataclasses.replace(start, rule=rule)
        _, grads, rule = ren2023.supervised(method)(key, model, x, y)
        return rule, grads.blocks

    first, _ = jax.jit(step)(start.rule, KEY)
    _, grads = jax.lax.scan(step, first, jax.random.split(KEY, 300))

    def cosine(tree):
        mine, true = (ravel_pytree(each)[0] for each in (tree, exact.blocks))
        return float(mine @ true / jnp.linalg.norm(mine) / jnp.linalg.norm(true))

    before = cosine(jax.tree.map(lambda g: g[0], grads))
    after = cosine(jax.tree.map(lambda g: g[-1], grads))
    assert after > before + 0.2


def test_methods_take_a_partitioned_model():
    x, y = batch()
    blocks = [eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(16, 4, key=KEY)]
    params, static = eqx.partition(
        local(blocks, x[0], 3, groups=2, key=KEY), eqx.is_inexact_array
    )
    methods = [ren2023.method(name, params, KEY) for name in ("LG-FA", "LG-BP")]
    (_, grads), (_, exact) = jax.jit(
        lambda: [ren2023.supervised(m, static)(KEY, params, x, y) for m in methods]
    )()
    assert_same(grads.heads, exact.heads, 1e-6)
    assert np.any(grads.blocks[1].weight)


def test_methods_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="DFA takes no axis_name"):
        ren2023.contrastive(ren2023.method("DFA", {}, KEY), axis_name="data")
    with pytest.raises(
        ValueError, match=r"expected one of BP, L-BP, .*, DFA, got 'LG-DFA'"
    ):
        ren2023.method("LG-DFA", {}, KEY)
    assert len(ren2023.NAMES) == 16
