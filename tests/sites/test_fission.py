"""Loops are split so that a site on which no step depends is an output site."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import forwax as fx
from forwax._signature import Signature
from forwax._sites.passes import keep
from sites.programs import PROGRAMS, normal, squares

P = {"i": normal(0, 2, 3), "h": normal(1, 3, 3), "o": normal(2, 3, 2)}
XS = normal(3, 4, 2)


def credit(loss, *args, **options):
    return [row.credit for row in fx.explain(loss, **options)(*args).rows]


def test_a_readout_in_a_loop_takes_its_exact_error():
    program = PROGRAMS["readout_and_loss_in_a_scan"]
    assert credit(program.loss, *program.args, in_axes=program.in_axes) == [
        "one slope per example",
        "exact error",
    ]
    rule = fx.ActivityPerturbation(exact_outputs=False)
    rows = fx.explain(program.loss, rule, in_axes=program.in_axes)(*program.args).rows
    assert [row.credit.split(",")[0] for row in rows] == ["one slope per example"] * 2


def with_map(p, xs):
    return squares(lax.map(lambda x: jnp.tanh(x @ p["i"]) @ p["o"], xs))


def with_two_layers_behind(p, xs):
    def step(h, x):
        h = jnp.tanh(x @ p["i"] + h)
        return h, jnp.tanh(h @ p["h"]) @ p["o"]

    return squares(lax.scan(step, jnp.zeros(3), xs)[1])


def with_a_condition(p, xs):
    def step(h, x):
        h = jnp.tanh(x @ p["i"] + h @ p["h"])
        return h, lax.cond(x[0] > 0, lambda h: h, lambda h: 2 * h, h) @ p["o"]

    return squares(lax.scan(step, jnp.zeros(3), xs)[1])


def with_a_total_that_is_read(p, xs):
    def step(total, x):
        return total + jnp.sum(jnp.tanh(x @ p["i"]) @ p["o"]) * total, None

    return lax.scan(step, 0.5, xs)[0]


EXACT = {
    with_map: [False, True],
    with_two_layers_behind: [False, False, True],
    with_a_condition: [False, False],
}
EXACT[with_a_total_that_is_read] = [False, False]


@pytest.mark.parametrize("loss", EXACT)
def test_what_is_split(loss):
    assert [text == "exact error" for text in credit(loss, P, XS)] == EXACT[loss]


def test_the_value_is_that_of_the_loop():
    program = PROGRAMS["readout_and_loss_in_a_scan"]
    args = (program.args[0], program.args[1][0])
    sites = fx.ActivityPerturbation().sites(
        Signature(program.loss, 0, False, None).bind(args, {})
    )
    assert float(keep.value(sites, keep.push(sites).losses)) == pytest.approx(
        float(program.loss(*args)), rel=1e-6
    )


def test_direct_feedback_reaches_the_loop_from_its_readout():
    rule = fx.DirectFeedbackAlignment(jax.random.key(0))
    program = PROGRAMS["readout_and_loss_in_a_scan"]
    both = lambda *args: [
        fx.grad(program.loss, r, **program.options)(*args)
        for r in (rule, fx.Backprop())
    ]
    got, exact = jax.jit(both)(jax.random.key(1), *program.args)
    np.testing.assert_allclose(got["o"], exact["o"], rtol=1e-4, atol=1e-5)
    assert bool(jnp.any(got["h"]))


def test_what_adds_up_keeps_its_dtype():
    """A counter of 16 bits beside a readout: `jnp.sum` would give it 32."""

    def loss(p, xs):
        def step(carry, x):
            h, steps, total = carry
            h = jnp.tanh(x @ p["i"] + h)
            return (
                h,
                steps + (x[0] > 0).astype(jnp.int16),
                total + jnp.sum(h @ p["o"]),
            ), None

        start = jnp.zeros(3), jnp.int16(3), 0.0
        _, steps, total = lax.scan(step, start, xs)[0]
        return total, lax.mul(steps, jnp.int16(1))

    value = jax.jit(fx.value_and_grad(loss, fx.ActivityPerturbation(), has_aux=True))
    (_, steps), _ = value(jax.random.key(0), P, XS)
    assert (steps.dtype, int(steps)) == (jnp.int16, 3 + int((XS[:, 0] > 0).sum()))
