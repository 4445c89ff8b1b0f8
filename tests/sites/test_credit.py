"""Credit along axes.

What a site's noise cannot change never multiplies it, and what it can change always does.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwax as fx
from forwax._programs.links import Link, along
from forwax._signature import Signature
from helpers import KEY, basis_of, estimates, leak
from sites.programs import PROGRAMS, Program, normal

P = {
    "w": normal(0, 3, 4),
    "b": normal(1, 4),
    "v": normal(2, 4, 4),
    "o": normal(3, 4, 2),
    "t": normal(4, 6, 6),
}
KEEP = fx.ActivityPerturbation()
SUMS = fx.ActivityPerturbation(exact_outputs=False)
LABELS = np.array([0, 1, 1, 0, 1])


def dense(p, x):
    return jnp.tanh(jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"]) @ p["o"]


def plain_mean(p, x):
    return jnp.mean(jnp.sin(dense(p, x)))


def cross_entropy(p, x):
    chosen = jnp.take_along_axis(
        jax.nn.log_softmax(dense(p, x)), LABELS[:, None], axis=1
    )
    return -jnp.mean(chosen[:, 0]) / 2


def contrastive(p, x):
    z = dense(p, x)
    z = z / jnp.sqrt(jnp.sum(z**2, axis=1, keepdims=True) + 0.1)
    return jnp.mean(
        jax.nn.logsumexp(z @ z.T, axis=1) - jnp.sum(z * jnp.roll(z, 1, axis=0), axis=1)
    )


def past_the_last_site(p, x):
    h = jnp.tanh(x @ p["w"])
    g = h + jnp.tanh(h @ p["v"])
    return (
        jnp.sum(jnp.sin(g @ p["o"]))
        + jnp.sum(h**2 * jnp.sin(g))
        + 0.1 * jnp.sum(p["w"] ** 2)
    )


def batch_norm(p, x):
    h = x @ p["w"]
    return jnp.mean(jnp.tanh((h - h.mean(0, keepdims=True)) @ p["v"]) ** 2)


def two_views(p, x):
    z = jnp.tanh(x @ p["w"]) @ p["v"]
    a, b = z[:3], z[3:]
    other = jax.lax.stop_gradient
    return fx.LocalLosses(
        jnp.concatenate([jnp.sum(a * other(b), 1), jnp.sum(b * other(jnp.sin(a)), 1)])
    )


def patches_and_groups(p, x):
    """One example [patches, 3].

    Mixing over patches, two groups, a loss for each patch and group.
    """
    h = jnp.tanh(fx.noise_point(x @ p["w"] - 0.1))
    mixed = jnp.tanh(fx.noise_point((p["t"] @ h) * 1.5))
    grouped = jnp.einsum(
        "pgc,gcd->pgd", mixed.reshape(6, 2, 2), p["v"].reshape(2, 2, 4)[..., :2]
    )
    spread = grouped - jnp.mean(grouped, axis=2, keepdims=True)
    return fx.LocalLosses(
        [jnp.sum(jnp.sin(spread), axis=2), jnp.sum(h.reshape(6, 2, 2) ** 3, axis=2)]
    )


def layers_by_scan(p, x):
    step = lambda h, scale: (jnp.tanh(h @ p["v"] * scale), jnp.sum(h, axis=1))
    h, ys = jax.lax.scan(step, jnp.tanh(x @ p["w"]), jnp.arange(2.0))
    return jnp.mean(jnp.sin(h @ p["o"])) + jnp.mean(ys**2)


def stacked_steps(p, x):
    """Each example's loss by a Python loop."""
    return fx.LocalLosses(
        jnp.stack(
            [jnp.sum(jnp.tanh(jnp.tanh(row @ p["w"]) @ p["v"]) @ p["o"]) for row in x]
        )
    )


def convolution(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    k = p["v"].reshape(2, 2, 1, 4)
    h = jax.lax.conv_general_dilated(
        x[..., None], k, (1, 1), "SAME", dimension_numbers=numbers
    )
    h = jax.lax.conv_general_dilated(
        jax.nn.relu(h),
        k,
        (2, 2),
        "VALID",
        dimension_numbers=numbers,
        feature_group_count=4,
    )
    h = jax.lax.reduce_window(
        h, -jnp.inf, jax.lax.max, (1, 2, 1, 1), (1, 1, 1, 1), "VALID"
    )
    return jnp.mean(jnp.sum(h, axis=(1, 2)) @ p["o"])


BATCH, IMAGES = normal(5, 5, 3), normal(6, 2, 4, 4)
ROWS = along(0, 5)


def windows(axis, size, first, last=None):
    """A link by its windows; each one position without `last`."""
    first = np.array(first)
    return Link(axis, first, first if last is None else np.array(last), size)


CASES = {  # loss, data, mapped, rule, the links of the first site
    "mean": (plain_mean, BATCH, False, KEEP, [{0: ROWS}]),
    "mean-of-sums": (plain_mean, BATCH, False, SUMS, [{0: ROWS}]),
    "labels": (cross_entropy, BATCH, False, KEEP, [{0: ROWS}]),
    "labels-of-sums": (cross_entropy, BATCH, False, SUMS, [{0: ROWS}]),
    "contrastive": (contrastive, BATCH, False, KEEP, [{0: ROWS}]),
    # Each row meets the next one, and the last one the first.
    "contrastive-of-sums": (
        contrastive,
        BATCH,
        False,
        SUMS,
        [{}, {0: windows(0, 5, [0, 1, 2, 3, 0], [1, 2, 3, 4, 4])}],
    ),
    "past": (
        past_the_last_site,
        BATCH,
        False,
        KEEP,
        [{0: ROWS}, {0: ROWS, 1: along(1, 4)}, {0: ROWS}],
    ),
    "batch-norm": (batch_norm, BATCH, False, KEEP, None),
    "views": (two_views, normal(7, 6, 3), False, KEEP, [{0: along(0, 6)}]),
    "views-of-sums": (
        two_views,
        normal(7, 6, 3),
        False,
        SUMS,
        [
            {0: windows(0, 3, [0, 1, 2, 3, 3, 3], [0, 1, 2, -1, -1, -1])},
            {0: windows(0, 3, [3, 3, 3, 0, 1, 2], [-1, -1, -1, 0, 1, 2])},
        ],
    ),
    "patches": (
        patches_and_groups,
        normal(8, 2, 6, 3),
        True,
        KEEP,
        [{0: windows(1, 2, [0, 0, 1, 1])}, {0: along(0, 6), 1: along(1, 4)}],
    ),
    "scan": (layers_by_scan, BATCH, False, KEEP, [{0: ROWS}, {1: ROWS}]),
    "stack": (stacked_steps, BATCH, False, SUMS, [{}]),
    "convolution": (convolution, IMAGES, False, KEEP, [{0: along(0, 2)}]),
}


def problem_of(loss, data, mapped):
    return Signature(loss, 0, False, (None, 0) if mapped else None).bind((P, data), {})


@pytest.mark.parametrize("name", CASES)
def test_the_axes_that_can_be_told_apart(name):
    loss, data, mapped, rule, expected = CASES[name]
    sites = rule.sites(problem_of(loss, data, mapped))
    if expected is None:
        assert sites.credit == {}
    else:
        first = sites.noisy[0]
        assert [
            dict(credit.links) for credit in sites.credit[first.variable]
        ] == expected


APART = [("keep", name) for name in CASES if CASES[name][4] is not None]


@pytest.mark.parametrize(
    ("memory", "name"),
    [*APART, ("replay", "past"), ("replay", "patches"), ("replay", "scan")],
)
def test_the_mean_over_all_noise_is_the_gradient(memory, name):
    loss, data, mapped, rule, _ = CASES[name]
    rule = dataclasses.replace(rule, memory=memory)
    program = Program(loss, P, (data,), (None, 0) if mapped else None)
    (_, grads), (_, truth) = estimates(program, basis_of(program, rule), fx.Backprop())
    for name in P:
        np.testing.assert_allclose(grads[name], truth[name], rtol=2e-4, atol=1e-5)


LINKED = [
    "batched_dot",
    "embedding",
    "attention",
    "residual_with_shared_gain",
    "parameters_in_carries",
]


@pytest.mark.parametrize(
    "name", [*(name for _, name in APART), *(f"program {name}" for name in LINKED)]
)
def test_nothing_leaks(name):
    """The Jacobian of the sources by the noises is zero wherever the credit says so.

    A probe, not a proof.
    """
    if name in CASES:
        loss, data, mapped, rule, _ = CASES[name]
        args, in_axes = (P, data), (None, 0) if mapped else None
    else:
        program = PROGRAMS[name.removeprefix("program ")]
        loss, args, in_axes, rule = program.loss, program.args, program.in_axes, KEEP
    problem = Signature(loss, 0, False, in_axes).bind(args, {})
    sites = rule.sites(problem)
    assert sites.credit
    assert leak(sites, problem) < 1e-6


def test_a_wrong_link_leaks():
    """Patch 0's noise is said to reach one position of axis 0 alone, but it reaches all."""
    problem = problem_of(*CASES["patches"][:3])
    sites = KEEP.sites(problem)
    first = sites.noisy[0].variable
    mixed, own = sites.credit[first]
    wrong = dataclasses.replace(mixed, links=own.links)
    assert (
        leak(
            dataclasses.replace(sites, credit={**sites.credit, first: [wrong, own]}),
            problem,
        )
        > 1e-3
    )


def test_the_table_tells_the_axes():
    def credit(name):
        loss, data, mapped, rule, _ = CASES[name]
        table = fx.explain(loss, rule, in_axes=(None, 0) if mapped else None)(P, data)
        return [row.credit for row in table.rows]

    assert credit("mean") == ["one slope and position of axis 0"] * 2 + ["exact error"]
    assert credit("batch-norm")[0] == "one slope for the batch: pass in_axes"
    assert credit("stack")[0] == "one slope, 1 of 5 parts of the loss"
    both = "one slope per example and position of axis 0 and 2 positions of axis 1, 1 of 2 losses"
    assert credit("patches") == [
        "one slope per example and 2 positions of axis 1, 2 of 2 losses",
        both,
        "exact error",
    ]


def spread(loss, data, rule, **options):
    """The squared error of the first layer's gradient, over 512 draws."""
    grad = fx.grad(loss, rule, **options)
    grads = jax.jit(jax.vmap(lambda key: grad(key, P, data)["w"]))(
        jax.random.split(KEY, 512)
    )
    return float(jnp.sum(jnp.var(grads, axis=0)))


def test_slopes_of_examples_in_a_mean_are_those_of_in_axes():
    x = normal(5, 16, 3)
    one = lambda p, row: jnp.mean(jnp.sin(dense(p, row[None])))
    assert spread(plain_mean, x, KEEP) == pytest.approx(
        spread(one, x, KEEP, in_axes=(None, 0)), rel=0.15
    )
    assert spread(plain_mean, x, fx.ActivityPerturbation(memory="shared")) > 8 * spread(
        plain_mean, x, KEEP
    )


def test_patches_and_groups_hear_less():
    """Both rules have a slope for each example.

    Only the first tells apart its patches and groups.
    """
    x = normal(8, 2, 6, 3)
    mixture = np.linalg.qr(np.random.default_rng(0).normal(size=(24, 24)))[0].astype(
        np.float32
    )

    def together(p, x):
        """The same losses, each a mixture of mixtures.

        Every noise then seems to reach every loss.
        """
        parts = jnp.concatenate(
            [part.ravel() for part in patches_and_groups(p, x).tree]
        )
        return fx.LocalLosses(mixture.T @ (mixture @ parts))

    apart, joined = (
        spread(loss, x, SUMS, in_axes=(None, 0))
        for loss in (patches_and_groups, together)
    )
    assert apart < 0.5 * joined


def test_shrinkage_counts_the_noise_that_shares_a_slope():
    mean = fx.grad(plain_mean, KEEP)(KEY, P, BATCH)
    shrunk = fx.grad(
        plain_mean, fx.ActivityPerturbation(combine=fx.combine.Shrinkage())
    )(KEY, P, BATCH)
    np.testing.assert_allclose(
        shrunk["w"], mean["w"] / 8, rtol=1e-5
    )  # eight coordinates a row
