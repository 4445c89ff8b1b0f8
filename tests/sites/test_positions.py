"""Credit along positions: what is said of masks, sums and loops is what the Jacobian shows.

A mask that is not known, or that leaves a row nothing, is said nothing of.
"""

import dataclasses
import os
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import forwax as fx
from forwax._programs.links import Link
from forwax._signature import Signature
from helpers import KEY, basis_of, estimates, jacobians_of, leak
from sites.programs import Program, normal

T, D = 6, 4
P = {
    "w": normal(0, 3, D),
    "v": normal(1, D, D),
    "o": normal(2, D, 2),
    "k": normal(3, 3, D, D),
    "a": normal(4, D),
    "mask": normal(5, T, T),
}
X = normal(7, 2, T, 3)
SEEN = np.array([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 1]], bool)
CAUSAL = np.tri(T, dtype=bool)
RULE = fx.ActivityPerturbation()
FIRST = int(os.environ["FORWAX_SEED"])  # conftest.py takes it from the clock
COUNT = int(os.environ.get("FORWAX_PROGRAMS", "200"))
SEEDS = list(range(5))
SEEDS += [pytest.param(FIRST + i, marks=pytest.mark.slow) for i in range(COUNT)]


def model(mix):
    """A layer, what mixes its positions, two layers and a loss that is a sum over positions."""

    def loss(p, x, seen):
        h = mix(p, jnp.tanh(x @ p["w"]), seen)
        return jnp.sum(jnp.sin(jnp.tanh(h @ p["v"]) @ p["o"]))

    return loss


def attention(masked):
    def mix(p, h, seen):
        return jax.nn.softmax(masked(h @ h.T / 2, p, seen[None])) @ h

    return mix


def recurrence(reverse):
    def mix(p, h, seen):
        def step(c, z):
            c = jnp.tanh(c @ p["v"] + z)
            return c, c

        return lax.scan(step, jnp.zeros(D), h, reverse=reverse)[1]

    return mix


def with_buffer(p, h, seen):
    def step(c, z):
        c = jnp.concatenate([c[1:], z[None]])
        return c, jnp.tanh(jnp.sum(c, 0))

    return lax.scan(step, jnp.zeros((3, D)), h)[1]


def convolved(padding):
    def mix(p, h, seen):
        numbers = ("NHC", "HIO", "NHC")
        return lax.conv_general_dilated(
            h[None], p["k"], (1,), padding, dimension_numbers=numbers
        )[0]

    return mix


def linear_recurrence(p, h, seen):
    decay = jnp.broadcast_to(jax.nn.sigmoid(p["a"]), h.shape)
    both = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])
    return lax.associative_scan(both, (decay, h))[1]


def layers(masked):
    """Attention in a loop over layers, its mask closed over or made inside."""

    def mix(p, h, seen):
        @jax.checkpoint
        def layer(h, w):
            return h + jax.nn.softmax(masked(h @ h.T)) @ jnp.tanh(h @ w), None

        return lax.scan(layer, h, jnp.stack([p["v"], p["v"] / 2]))[0]

    return mix


def from_iota(scores):
    row, column = (lax.broadcasted_iota(jnp.int32, (T, T), axis) for axis in (0, 1))
    return jnp.where(row >= column, scores, jnp.finfo(jnp.float32).min)


def library(p, h, seen):
    h = h[None, :, None]  # [examples, positions, heads, features]
    return jax.nn.dot_product_attention(h, h, h, is_causal=True)[0, :, 0]


LATER = (range(T), [T - 1] * T)
EARLIER = ([0] * T, range(T))
ALL = None
ones = np.ones((T, T), np.float32)
ALLOWED = lambda seen: seen | jnp.eye(T, dtype=bool)
MIXERS = {  # what mixes positions, and the first and the last of them that noise at each changes
    "cumsum": (lambda p, h, seen: jnp.cumsum(h, 0), LATER),
    "reward to go": (lambda p, h, seen: lax.cumsum(h, 0, reverse=True), EARLIER),
    "between flips": (lambda p, h, seen: jnp.cumsum(h[::-1], 0)[::-1], EARLIER),
    "cumprod": (lambda p, h, seen: jnp.cumprod(h, 0), LATER),
    "cummax": (lambda p, h, seen: lax.cummax(h, 0), LATER),
    "cumlogsumexp": (lambda p, h, seen: lax.cumlogsumexp(h, 0), LATER),
    "linear recurrence": (linear_recurrence, LATER),
    "recurrence": (recurrence(False), LATER),
    "backward recurrence": (recurrence(True), EARLIER),
    "buffer": (with_buffer, LATER),
    "shift": (
        lambda p, h, seen: jnp.concatenate([jnp.zeros((1, D)), h[:-1]]),
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, -1]),
    ),
    "token shift": (
        lambda p, h, seen: h + jnp.pad(h[:-1], ((1, 0), (0, 0))),
        (range(T), [1, 2, 3, 4, 5, 5]),
    ),
    "causal convolution": (convolved([(2, 0)]), (range(T), [2, 3, 4, 5, 5, 5])),
    "convolution": (convolved("SAME"), ([0, 0, 1, 2, 3, 4], [1, 2, 3, 4, 5, 5])),
    "infinite": (
        attention(lambda s, p, seen: jnp.where(CAUSAL, s, -jnp.inf)),
        LATER,
    ),
    "least": (attention(lambda s, p, seen: from_iota(s)), LATER),
    "added": (
        attention(lambda s, p, seen: s + jnp.where(CAUSAL, 0.0, -1e9)),
        LATER,
    ),
    "log of zeros": (
        attention(lambda s, p, seen: s + jnp.log(jnp.tril(jnp.ones((T, T))))),
        LATER,
    ),
    "counted": (
        attention(
            lambda s, p, seen: jnp.where(
                jnp.cumsum(ones, 0) >= jnp.cumsum(ones, 1), s, -jnp.inf
            )
        ),
        LATER,
    ),
    "looking ahead": (
        attention(lambda s, p, seen: jnp.where(CAUSAL.T, s, -jnp.inf)),
        EARLIER,
    ),
    "sliding window": (
        attention(
            lambda s, p, seen: jnp.where(
                CAUSAL & ~np.tri(T, k=-2, dtype=bool), s, -1e30
            )
        ),
        (range(T), [1, 2, 3, 4, 5, 5]),
    ),
    "softmax where": (
        lambda p, h, seen: jax.nn.softmax(h @ h.T, where=CAUSAL) @ h,
        LATER,
    ),
    "linear attention": (
        lambda p, h, seen: (CAUSAL.astype(np.float32) * jax.nn.sigmoid(h @ h.T)) @ h,
        LATER,
    ),
    "mixing weights": (lambda p, h, seen: jnp.tril(p["mask"]) @ h, LATER),
    "dot_product_attention": (library, LATER),
    "layers": (layers(lambda s: jnp.where(CAUSAL, s, -jnp.inf)), LATER),
    "layers with iota": (layers(from_iota), LATER),
    "learnt bias": (
        attention(lambda s, p, seen: jnp.where(CAUSAL, s + p["mask"], -jnp.inf)),
        LATER,
    ),
    "data and own": (
        attention(lambda s, p, seen: jnp.where(CAUSAL & ALLOWED(seen), s, -1e30)),
        LATER,
    ),
    # A row that is off everywhere hears all positions alike; the third one here.
    "row off": (
        attention(
            lambda s, p, seen: jnp.where(
                CAUSAL & (np.arange(T) != 2)[:, None], s, -1e30
            )
        ),
        ([0, 1, 2, 2, 2, 2], [T - 1] * T),
    ),
    # What cannot be known, or not be proved:
    "no mask": (attention(lambda s, p, seen: s), ALL),
    "mask by data": (attention(lambda s, p, seen: jnp.where(seen, s, -jnp.inf)), ALL),
    "mask by a parameter": (
        attention(lambda s, p, seen: jnp.where(p["mask"] > 0, s, -1e30)),
        ALL,
    ),
    "rows off by data": (
        attention(lambda s, p, seen: jnp.where(CAUSAL & seen, s, -1e30)),
        ALL,
    ),
    "low bias by a parameter": (
        attention(lambda s, p, seen: jnp.where(CAUSAL, s + 1e30 * p["mask"], -1e30)),
        ALL,
    ),
    "too small a constant": (
        attention(lambda s, p, seen: jnp.where(CAUSAL, s, -1e5)),
        ALL,
    ),
    "uniform where nothing is left": (
        lambda p, h, seen: (
            jnp.nan_to_num(
                jax.nn.softmax(jnp.where(CAUSAL & seen[None], h @ h.T, -jnp.inf)),
                nan=1 / T,
            )
            @ h
        ),
        ALL,
    ),
    "permuted": (lambda p, h, seen: h[jnp.argsort(h[:, 0])], ALL),
}
SUMMED = [  # each way in which positions are tied, once
    "between flips",
    "linear recurrence",
    "recurrence",
    "buffer",
    "shift",
    "convolution",
    "least",
    "sliding window",
    "dot_product_attention",
    "layers",
    "row off",
]


def problem_of(loss):
    return Signature(loss, 0, False, (None, 0, 0)).bind((P, X, SEEN), {})


def link_along_positions(sites):
    """The first site's link from its positions to those of the one source, or None."""
    credit = sites.credit.get(sites.noisy[0].variable, ())
    links = [link for c in credit for axis, link in c.links if axis == 0]
    assert len(links) <= 1
    return links[0] if links else None


@pytest.mark.parametrize("name", MIXERS)
def test_what_noise_at_a_position_can_change(name):
    mix, expected = MIXERS[name]
    sites = RULE.sites(problem_of(model(mix)))
    link = link_along_positions(sites)
    if expected is ALL:
        assert link is None
    else:
        first, last = (np.array(list(windows)) for windows in expected)
        assert link == Link(0, first, last, T)
        assert leak(sites, problem_of(model(mix))) == 0


@pytest.mark.parametrize("name", SUMMED)
def test_the_mean_over_all_noise_is_the_gradient(name):
    program = Program(model(MIXERS[name][0]), P, (X, SEEN), (None, 0, 0))
    listed = basis_of(program, RULE)
    (_, grads), (_, truth) = estimates(program, listed, fx.Backprop())
    for leaf in P:
        np.testing.assert_allclose(grads[leaf], truth[leaf], rtol=2e-4, atol=1e-5)


def transformer(p, tokens, targets):
    """Two blocks of two causal heads, and the next token's cross-entropy."""
    h = p["embedding"][tokens]
    for block in p["blocks"]:
        n = h * lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-3)
        q, k, v = jnp.split((n @ block["qkv"]).reshape(1, len(tokens), 2, -1), 3, -1)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        h = h + mixed.reshape(h.shape) @ block["o"]
        h = h + jax.nn.gelu(h @ block["up"]) @ block["down"]
    scores = jax.nn.log_softmax(h @ p["head"])
    return -jnp.mean(jnp.take_along_axis(scores, targets[:, None], 1))


def test_a_causal_transformer_hears_later_terms_and_stays_unbiased():
    block = lambda i: {
        "qkv": normal(i, 4, 12) / 2,
        "o": normal(i + 1, 4, 4) / 2,
        "up": normal(i + 2, 4, 6) / 2,
        "down": normal(i + 3, 6, 4) / 2,
    }
    params = {
        "embedding": normal(0, 5, 4),
        "blocks": [block(10), block(20)],
        "head": normal(1, 4, 5),
    }
    tokens = np.array([[1, 4, 2, 0], [3, 3, 0, 1]])
    program = Program(
        transformer, params, (tokens, np.roll(tokens, -1, 1)), (None, 0, 0)
    )
    rows = fx.explain(transformer, in_axes=(None, 0, 0))(*program.args).rows
    heard = "one slope per example and position of axis 0, later terms"
    assert [row.credit.startswith(heard) for row in rows] == [True] * 6 + [False] * 4
    (_, grads), (_, truth) = estimates(program, basis_of(program, RULE), fx.Backprop())
    for mine, true in zip(*map(jax.tree.leaves, (grads, truth)), strict=True):
        np.testing.assert_allclose(mine, true, rtol=2e-4, atol=1e-5)


def by_equinox():
    eqx = pytest.importorskip("equinox")
    layer = eqx.nn.MultiheadAttention(2, D, key=KEY)
    params, static = eqx.partition(layer, eqx.is_inexact_array)

    def loss(p, x):
        return jnp.sum(jnp.sin(eqx.combine(p, static)(x, x, x, mask=CAUSAL)))

    return loss, params


def by_flax(dtype):
    nnx = pytest.importorskip("flax.nnx")
    layer = nnx.MultiHeadAttention(2, D, decode=False, dtype=dtype, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def loss(p, x):
        layer = nnx.merge(graph, p, rest, copy=True)
        mask = nnx.make_causal_mask(jnp.ones(T))
        return jnp.sum(jnp.sin(layer(x.astype(dtype), mask=mask).astype(jnp.float32)))

    return loss, params


@pytest.mark.promotes("Flax mixes integers and floats")
@pytest.mark.parametrize(
    "made",
    [
        by_equinox,
        lambda: by_flax(jnp.float32),
        lambda: by_flax(jnp.bfloat16),
        lambda: by_flax(jnp.float16),
    ],
    ids=["equinox", "flax", "flax bfloat16", "flax float16"],
)
def test_masks_of_libraries_are_known(made):
    """Queries change their own term, keys and values those of all that look back at them."""
    loss, params = made()
    rows = fx.explain(loss, in_axes=(None, 0))(params, normal(8, 2, T, D)).rows
    own, *later = [row.credit for row in rows if row.credit != "exact error"][:3]
    assert re.fullmatch("one slope per example and position of axis .", own)
    for credit in later:
        assert re.fullmatch(own + ", later terms", credit)


# --- random masks ---

OFF = {
    "infinite": lambda on, s: jnp.where(on, s, -jnp.inf),
    "least": lambda on, s: jnp.where(on, s, jnp.finfo(jnp.float32).min),
    "finite": lambda on, s: jnp.where(on, s, -1e9),
    "added": lambda on, s: s + jnp.where(on, 0.0, -1e30),
    "twice": lambda on, s: jnp.where(on, jnp.where(on.T | on, s, -1e30), -1e30),
}


def random_masks(seed):
    """A loss with two or three masked attentions, and whether their masks are known."""
    rng = random.Random(seed)
    generator = np.random.default_rng(seed)
    stages = []
    for _ in range(rng.randint(1, 3)):
        on = generator.random((T, T)) < rng.choice([0.2, 0.5, 0.8])
        on = {"any": on, "causal": on & CAUSAL, "ahead": on & CAUSAL.T}[
            rng.choice(["any", "causal", "ahead"])
        ]
        off = rng.choice(list(OFF))
        # Without an entry a row is NaN, or uniform.
        if off == "infinite" or rng.random() < 0.5:
            on = on | np.eye(T, dtype=bool)
        stages.append((on, off, rng.choice(["sure", "sure", "or data", "and data"])))
    print([(on.astype(int).tolist(), off, how) for on, off, how in stages])

    def mix(p, h, seen):
        for on, off, how in stages:
            mask = {
                "sure": jnp.asarray(on),
                "or data": on | seen[None],
                "and data": on & (seen[None] | (off == "infinite")),
            }[how]
            h = h + jax.nn.softmax(OFF[off](mask, jnp.sin(h @ p["v"]) @ h.T)) @ h
        return h

    return model(mix)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_masks_leak_nothing(seed):
    print(f"FORWAX_SEED={seed} FORWAX_PROGRAMS=1 pytest -m slow {__file__}")
    loss = random_masks(seed)
    problem = problem_of(loss)
    sites = RULE.sites(problem)
    for example in range(len(X)):
        assert leak(sites, problem, example) == 0


# --- twins that must fail ---


def test_a_narrower_window_is_found_out():
    """Noise is said to change the terms behind its own alone."""
    problem = problem_of(model(MIXERS["infinite"][0]))
    sites = RULE.sites(problem)
    first = sites.noisy[0].variable
    (credit,) = sites.credit[first]
    ((axis, link),) = credit.links
    late = dataclasses.replace(link, first=link.first + 1)
    wrong = dataclasses.replace(credit, links=((axis, late),))
    narrow = dataclasses.replace(sites, credit={**sites.credit, first: [wrong]})
    assert leak(sites, problem) == 0
    assert leak(narrow, problem) > 1e-3


def test_less_credit_for_later_terms_is_biased():
    args = (P, X, SEEN)
    options = {"in_axes": (None, 0, 0), "tolerance": 0.1, "reference": fx.Backprop()}
    loss = model(MIXERS["infinite"][0])
    assert fx.testing.assert_unbiased(RULE, loss, args, **options).basis_sum
    assert not DECAYED.unbiased
    with pytest.raises(AssertionError, match=r"biased|mean"):
        fx.testing.assert_unbiased(DECAYED, loss, args, **options)


DECAYED = fx.ActivityPerturbation(credit=fx.credit.Decay(0.5))


# --- decay ---


@pytest.mark.parametrize("gamma", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(
    "name",
    ["cumsum", "reward to go", "infinite", "convolution", "shift", "recurrence"],
)
def test_the_mean_under_decay_is_the_sum_of_weighted_terms(name, gamma):
    """Against the Jacobian of each position's term by each position's activity."""
    loss = model(MIXERS[name][0])
    rule = fx.ActivityPerturbation(credit=fx.credit.Decay(gamma))
    listed = rule.basis(problem_of(loss))

    def terms(z, p, seen):
        h = MIXERS[name][0](p, jnp.tanh(z), seen)
        return jnp.sum(jnp.sin(jnp.tanh(h @ p["v"]) @ p["o"]), axis=1)  # [T]

    def expected(x, seen):
        jacobian = jax.jacobian(terms)(x @ P["w"], P, seen)  # [T, T, D]
        weights = weights_of(name, gamma)
        return x.T @ jnp.einsum("tsd,ts->sd", jacobian, weights)

    @jax.jit
    def both(x, seen):
        grads = fx.grad(loss, listed, in_axes=(None, 0, 0))(KEY, P, x, seen)["w"]
        return grads, jnp.mean(jax.vmap(expected)(x, seen), 0)

    np.testing.assert_allclose(*both(X, SEEN), rtol=2e-4, atol=1e-5)


def weights_of(name, gamma):
    """Gamma to the power of the distance from a position's own term, [terms, positions]."""
    own = np.arange(T) + (name == "shift")
    distance = np.abs(np.arange(T)[:, None] - own[None])
    # A shift changes one term, a sum over later ones those alone, which its Jacobian shows.
    return np.float32(gamma) ** distance.astype(np.float32)


def test_decay_may_be_traced_and_learnt():
    loss = model(MIXERS["infinite"][0])

    @jax.jit
    def of(gamma):
        rule = fx.ActivityPerturbation(credit=fx.credit.Decay(gamma))
        assert not rule.unbiased  # 1 cannot be known to be
        return fx.grad(loss, rule, in_axes=(None, 0, 0))(KEY, P, X, SEEN)

    whole = fx.grad(loss, RULE, in_axes=(None, 0, 0))(KEY, P, X, SEEN)
    for leaf in P:
        np.testing.assert_allclose(of(1.0)[leaf], whole[leaf], rtol=1e-4, atol=1e-5)
    assert np.max(np.abs(of(0.5)["w"] - whole["w"])) > 1e-3


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan"), np.ones(2), jnp.array(2.0)])
def test_decays_are_checked(bad):
    with pytest.raises(
        ValueError, match=r"credit.Decay: expected gamma to be a scalar in \[0, 1\], 0"
    ):
        fx.credit.Decay(bad)


def test_credit_of_another_kind_is_named():
    with pytest.raises(
        TypeError,
        match=r"expected credit such as forwax.credit.Decay\(0.9\), or None, got 0.9",
    ):
        fx.ActivityPerturbation(credit=0.9)


@pytest.mark.parametrize("memory", ["replay", "shared"])
@pytest.mark.parametrize("name", ["infinite", "layers", "recurrence", "convolution"])
def test_other_memories_hear_as_much(name, memory):
    rule = dataclasses.replace(RULE, memory=memory)
    program = Program(model(MIXERS[name][0]), P, (X, SEEN), (None, 0, 0))
    (_, grads), (_, truth) = estimates(program, basis_of(program, rule), fx.Backprop())
    for leaf in P:
        np.testing.assert_allclose(grads[leaf], truth[leaf], rtol=2e-4, atol=1e-5)


def test_the_table_says_which_terms_are_heard():
    def credit(name, rule=RULE):
        table = fx.explain(model(MIXERS[name][0]), rule, in_axes=(None, 0, 0))
        return table(P, X, SEEN).rows[0].credit

    each = "one slope per example"
    here = f"{each} and position of axis 0"
    assert credit("infinite") == f"{here}, later terms"
    assert credit("reward to go") == f"{here}, earlier terms"
    assert credit("convolution") == f"{here}, terms near it"
    assert credit("shift") == here
    assert credit("no mask") == each
    assert credit("infinite", DECAYED) == f"{here}, later terms decaying"
    assert credit("shift", DECAYED) == here


def test_later_terms_alone_are_less_noise():
    """Half of all pairs of positions are not heard, and each pair adds as much."""
    x = jnp.asarray(normal(9, 2, T, 3))

    def spread(name):
        grad = fx.grad(model(MIXERS[name][0]), RULE, in_axes=(None, 0, 0))
        grads = jax.vmap(lambda key: grad(key, P, x, SEEN)["w"])
        return float(
            jnp.sum(jnp.var(jax.jit(grads)(jax.random.split(KEY, 512)), axis=0))
        )

    # The same function, by an operation that is not followed.
    MIXERS["hidden"] = (lambda p, h, seen: jnp.linalg.solve(INVERSE, h), ALL)
    assert spread("cumsum") < 0.8 * spread("hidden")
    del MIXERS["hidden"]


INVERSE = np.eye(T, dtype=np.float32) - np.eye(T, k=-1, dtype=np.float32)


def test_shrinkage_counts_what_later_terms_hear():
    """Of two noises the slopes hear all, or with the exact one's alone half of the pairs."""
    problem = problem_of(model(MIXERS["cumsum"][0]))
    sites = RULE.sites(problem)
    first, second = (sites.credit[site.variable][0] for site in sites.noisy[:2])
    assert first.overlap(first) == 1
    assert second.overlap(second) == pytest.approx(1 / T)
    assert first.overlap(second) == pytest.approx((T + 1) / (2 * T))
    assert jacobians_of(sites, problem)[0][0].shape == (T, 2, T, D)
