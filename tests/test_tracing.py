"""Law 4: the user's function is traced once a call and compiled once a shape.

The primal is evaluated once a chunk.
"""

import jax
import jax.numpy as jnp
import pytest

import forwax as fx
from cases import RULES, SITE_RULES, normal

ALL_RULES = RULES | SITE_RULES


class Counted:
    """A loss that counts how often Python runs it."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, w, x):
        self.calls += 1
        return jnp.sum(jnp.tanh(x @ w) ** 2)


ARGS = (normal(0, 3, 2), normal(1, 4, 3))


@pytest.mark.parametrize("rule", ALL_RULES)
def test_the_loss_is_traced_once_a_call_and_once_a_shape(rule):
    loss = Counted()
    estimate = jax.jit(fx.value_and_grad(loss, ALL_RULES[rule]))
    estimate(jax.random.key(0), *ARGS)
    assert loss.calls == 1
    estimate(jax.random.key(1), *(2 * x for x in ARGS))
    assert loss.calls == 1
    estimate(jax.random.key(1), ARGS[0], normal(2, 5, 3))
    assert loss.calls == 2


@pytest.mark.parametrize(
    "rule", ["weight", "weight-chunked", "exact", "finite-differences"]
)
def test_the_loss_of_one_example_is_traced_once(rule):
    loss = Counted()
    estimate = jax.jit(fx.value_and_grad(loss, RULES[rule], in_axes=(None, 0)))
    estimate(jax.random.key(0), ARGS[0], normal(2, 5, 4, 3))
    assert loss.calls == 1


@pytest.mark.parametrize(
    ("rule", "calls"),
    [
        (fx.WeightPerturbation(num_tangents=4), 1),
        (fx.WeightPerturbation(num_tangents=4, chunk_size=2), 2),
        (fx.WeightPerturbation(num_tangents=5, chunk_size=2), 3),
        (fx.Exact(chunk_size=None), 1),
        (fx.FiniteDifference(num_tangents=3), 6),
    ],
    ids=str,
)
def test_outside_a_trace_the_loss_runs_once_a_chunk(rule, calls):
    loss = Counted()
    fx.grad(loss, rule)(jax.random.key(0), *ARGS)
    assert loss.calls == calls


def test_combinations_and_tangents_do_not_run_the_loss_again():
    loss = Counted()
    for combine in (
        fx.combine.Projection(),
        fx.combine.Shrinkage(),
        fx.combine.ControlVariate(jnp.ones((3, 2))),
    ):
        rule = fx.WeightPerturbation(fx.tangents.Guided(jnp.ones((3, 2))), 4, combine)
        loss.calls = 0
        fx.grad(loss, rule)(jax.random.key(0), *ARGS)
        assert loss.calls == 1


# --- arithmetic ---

WIDTH, DEPTH, BATCH = 32, 4, 64
STACK = [normal(i, WIDTH, WIDTH) / 6 for i in range(DEPTH)]
DATA = normal(9, BATCH, WIDTH)
FORWARD = 2 * BATCH * WIDTH * WIDTH * DEPTH


def deep(ws, x):
    for w in ws:
        x = jnp.tanh(x @ w)
    return jnp.sum(x**2)


def dot_flops(jaxpr) -> int:
    """The flops of all matrix products of data in a jaxpr, loops counted as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval, equation.outvars[0].aval
            is_data = BATCH in out.shape
            total += is_data * 2 * out.size * left.shape[contracted[0]]
        times = (
            equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        )
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * dot_flops(inner)
    return total


def forwards(rule) -> float:
    """The matrix products of an estimate in units of a forward pass."""
    return (
        dot_flops(
            jax.make_jaxpr(fx.grad(deep, rule))(jax.random.key(0), STACK, DATA).jaxpr
        )
        / FORWARD
    )


def test_the_counter_counts_a_forward_and_a_backward_pass():
    assert dot_flops(jax.make_jaxpr(deep)(STACK, DATA).jaxpr) == FORWARD
    one_tangent = 1 + (2 * DEPTH - 1) / DEPTH  # the first layer's input has no tangent
    assert forwards(fx.WeightPerturbation()) == one_tangent

    def loop(ws, x):
        return jax.lax.scan(
            lambda h, _: (jnp.tanh(h @ ws[0]), None), x, None, length=DEPTH
        )[0]

    assert dot_flops(jax.make_jaxpr(loop)(STACK, DATA).jaxpr) == FORWARD


@pytest.mark.parametrize("num_tangents", [1, 2, 8])
def test_the_primal_is_evaluated_once_for_all_tangents(num_tangents):
    tangent = (2 * DEPTH - 1) / DEPTH
    assert (
        forwards(fx.WeightPerturbation(num_tangents=num_tangents))
        == 1 + num_tangents * tangent
    )
    assert forwards(
        fx.WeightPerturbation(
            num_tangents=num_tangents, combine=fx.combine.Projection()
        )
    ) == (1 + num_tangents * tangent)


@pytest.mark.parametrize(
    ("num_tangents", "chunk_size", "chunks", "size"),
    [(8, 2, 4, 2), (8, 1, 8, 1), (7, 4, 2, 4)],
)
def test_the_primal_is_evaluated_once_a_chunk(num_tangents, chunk_size, chunks, size):
    tangent = (2 * DEPTH - 1) / DEPTH
    rule = fx.WeightPerturbation(num_tangents=num_tangents, chunk_size=chunk_size)
    assert forwards(rule) == chunks * (1 + size * tangent)


def test_a_finite_difference_costs_two_forwards_a_tangent():
    assert forwards(fx.FiniteDifference()) == 2
    assert forwards(fx.FiniteDifference(num_tangents=4)) == 8


def test_the_compiled_program_agrees():
    """XLA's own count, everything included: 1 + k (2 - 1/depth) forward passes within 5 %."""

    def flops(f, *args):
        return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]

    stack, data = (
        [jnp.ones((128, 128))] * DEPTH,
        jnp.ones((512, 128)),
    )  # wide, so that products prevail
    forward = flops(deep, stack, data)
    for k in (1, 8):
        estimate = flops(
            fx.grad(deep, fx.WeightPerturbation(num_tangents=k)),
            jax.random.key(0),
            stack,
            data,
        )
        assert estimate / forward == pytest.approx(1 + k * (2 - 1 / DEPTH), rel=0.05)
