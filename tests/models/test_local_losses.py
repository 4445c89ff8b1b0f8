"""Local losses: what they are worth, what they train, and that forward gradients of them are unbiased."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwax as fx
from forwax._signature import Signature
from forwax.losses import nt_xent, softmax_cross_entropy
from forwax.models import LocalMixer, contrastive_losses, local, local_losses, ren2023

KEY = jax.random.key(0)
TINY = {"blocks": 2, "patches": 2, "channels": 8, "groups": 2}
IN_AXES = (None, 0, 0)


def mixer(**options):
    return LocalMixer((4, 4, 1), 3, **TINY, **options, key=KEY)


def batch():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 1)), jnp.float32), jnp.array([0, 2])


def supervised(losses, parts):
    return lambda model, x, y: local_losses(model, x, y, losses, parts=parts)


def contrastive(losses, parts):
    return lambda model, x, y: contrastive_losses(model, x, x[::-1] + 1, y, losses, parts=parts)


def assert_same(got, expected, tolerance=5e-5):
    scale = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(expected)))
    pairs = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True)
    for (path, mine), true in pairs:
        assert jnp.linalg.norm((mine - true).ravel()) <= tolerance * scale, jax.tree_util.keystr(path)


FORWARD = ["FG-A", "L-FG-A", "LG-FG-A", "FG-W", "LG-FG-W"]


@pytest.mark.parametrize(("name", "objective"), [*((name, supervised) for name in FORWARD), ("LG-FG-A", contrastive)])
def test_the_mean_forward_gradient_is_the_gradient_of_backprop(name, objective):
    model, args = mixer(projection=5 if objective is contrastive else None), batch()
    in_axes = IN_AXES if objective is supervised else None
    method = ren2023.method(name, model, KEY)
    exact = ren2023.method(name.replace("FG-A", "BP").replace("FG-W", "BP"), model, KEY)
    assert (method.losses, method.parts, exact.parts) == (exact.losses, True, False)
    loss = objective(method.losses, method.parts)
    rule = method.rule.basis(Signature(loss, 0, False, in_axes).bind((model, *args), {}))
    whole = fx.value_and_grad(objective(exact.losses, exact.parts), exact.rule, in_axes=in_axes)
    value, grads = jax.jit(fx.value_and_grad(loss, rule, in_axes=in_axes))(KEY, model, *args)
    true_value, truth = jax.jit(whole)(KEY, model, *args)
    assert float(value) == pytest.approx(float(true_value), rel=1e-5)
    assert_same(grads, truth)


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


def test_feedback_alignment_sees_the_heads():
    model, (x, y) = mixer(), batch()

    def first(name):
        method = ren2023.method(name, model, jax.random.key(1))
        loss = supervised(method.losses, method.parts)
        return fx.grad(loss, method.rule, in_axes=IN_AXES)(KEY, model, x, y)

    plain, aligned = jax.jit(lambda: (first("LG-BP"), first("LG-FA")))()
    assert_same(aligned.heads, plain.heads, 1e-6)
    grouped = [grads.blocks[1].groups.weight.ravel() for grads in (plain, aligned)]
    cosine = grouped[0] @ grouped[1] / jnp.linalg.norm(grouped[0]) / jnp.linalg.norm(grouped[1])
    assert abs(float(cosine)) < 0.9


@pytest.mark.parametrize("name", ["L-FA", "FA", "DFA"])
def test_feedback_rules_run_and_train_the_readout_exactly(name):
    model, (x, y) = mixer(), batch()
    method = ren2023.method(name, model, jax.random.key(1))
    loss = supervised(method.losses, method.parts)
    both = lambda rule: fx.grad(loss, rule, in_axes=IN_AXES)(KEY, model, x, y)
    grads, exact = jax.jit(lambda: (both(method.rule), both(fx.Backprop())))()
    assert_same(grads.readout, exact.readout, 1e-6)
    assert np.any(grads.blocks[0].dense.weight)


def test_the_parts_add_up_to_the_losses():
    model, (x, y) = mixer(), batch()
    trees = jax.jit(lambda: [local_losses(model, x[0], y[0], "local", parts=parts).tree for parts in (True, False)])()
    parts, whole = trees
    assert [part.shape for part in parts["blocks"]] == [(4, 2), (4, 2)]
    for part, loss in zip(parts["blocks"], whole["blocks"], strict=True):
        np.testing.assert_allclose(part, jnp.full((4, 2), loss / 8), rtol=1e-5)
    assert parts["readout"] == whole["readout"]


def test_where_the_losses_sit():
    model, (x, y) = mixer(), batch()
    logits = model(x[0])

    def tree(losses):
        return local_losses(model, x[0], y[0], losses).tree

    assert set(tree("global")) == {"readout"}
    assert set(tree("greedy")) == {"readout", "blocks"}
    assert float(tree("global")["readout"]) == pytest.approx(float(softmax_cross_entropy(logits, y[0])), rel=1e-5)
    with pytest.raises(ValueError, match='expected losses to be "global", "local" or "greedy", got \'all\''):
        tree("all")


def test_the_contrastive_losses_are_nt_xent_of_the_projections():
    model, (x, y) = mixer(projection=5), batch()

    @jax.jit
    def both():
        found = [contrastive_losses(model, x, x + 1, y, where).tree["blocks"] for where in ("greedy", "global")]
        features = [jax.vmap(model.features)(view)[-1] for view in (x, x + 1)]
        projected = [model.heads[-1](h.mean(1).reshape(2, -1)) for h in features]
        return *found, nt_xent(*projected)

    greedy, whole, expected = both()
    assert [loss.shape for loss in greedy] == [(4, 4, 2)] * 2
    np.testing.assert_allclose(greedy[-1].sum((1, 2)) * 4, expected, rtol=1e-4)
    np.testing.assert_allclose(whole[0] * 4, expected, rtol=1e-4)


def mlp(key):
    layers = [eqx.nn.Linear(6, 6, key=k) for k in jax.random.split(key)]
    return [eqx.nn.Sequential([layer, eqx.nn.Lambda(jax.nn.relu)]) for layer in layers], jnp.ones(6), {"groups": 3}


def cnn(key):
    first, second = jax.random.split(key)
    convs = [eqx.nn.Conv2d(1, 4, 3, key=first), eqx.nn.Conv2d(4, 6, 3, key=second)]
    blocks = [eqx.nn.Sequential([conv, eqx.nn.Lambda(jnp.tanh)]) for conv in convs]
    return blocks, jnp.linspace(-1, 1, 36).reshape(1, 6, 6), {"groups": (1, 3), "channel_axis": 0}


class Attention(eqx.Module):
    attention: eqx.nn.MultiheadAttention

    def __call__(self, tokens):
        return tokens + self.attention(tokens, tokens, tokens)


def vit(key):
    first, second = jax.random.split(key)
    embedding = eqx.nn.Linear(4, 8, key=first)
    attention = Attention(eqx.nn.MultiheadAttention(2, 8, key=second))
    return [eqx.filter_vmap(embedding), attention], jnp.linspace(-1, 1, 20).reshape(5, 4), {"groups": 2}


@pytest.mark.parametrize(
    ("build", "shapes"),
    [
        (mlp, [(1, 3, 2), (1, 3, 2)]),
        (cnn, [(16, 1, 4), (4, 3, 2)]),
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
    rule = rule.basis(Signature(loss, 0, False, IN_AXES).bind(args, {}))
    both = jax.jit(lambda: [fx.grad(loss, each, in_axes=IN_AXES)(KEY, *args) for each in (rule, fx.Backprop())])
    assert [h.shape for h in model.features(x)] == shapes
    assert_same(*both())
    assert jax.eval_shape(model, x).shape == (3,)


def test_blocks_that_cannot_be_cut_are_refused():
    with pytest.raises(ValueError, match="expected at least one block, got none"):
        local([], jnp.ones(3), 2, key=KEY)
    with pytest.raises(ValueError, match=r"a block of output shape \(3,\) has 3 channels, .* into 2 groups"):
        local([jnp.tanh], jnp.ones(3), 2, groups=2, key=KEY)
    with pytest.raises(ValueError, match="expected groups for each of 1 blocks, got 2"):
        local([jnp.tanh], jnp.ones(3), 2, groups=(1, 1), key=KEY)
    with pytest.raises(ValueError, match=r"expected a block to return an array with axis 2, got shape \(3,\)"):
        local([jnp.tanh], jnp.ones(3), 2, channel_axis=2, key=KEY)


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match=r"expected one of BP, L-BP, .*, DFA, got 'LG-DFA'"):
        ren2023.method("LG-DFA", {}, KEY)
    assert len(ren2023.NAMES) == 13
