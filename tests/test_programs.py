"""Programs as data: what is an input of which kind, and how a loop's values are told apart."""

import operator

import jax
import jax.numpy as jnp
import pytest

from forwax._programs.dataflow import fixed_point
from forwax._programs.evaluate import evaluate, read
from forwax._programs.program import Loop, Program, Variable
from forwax._programs.tracing import trace

PARAMS = {"state": jnp.eye(3), "start": jnp.zeros(3), "offset": jnp.ones(3)}
STEPS = jnp.arange(12.0).reshape(4, 3)
SHIFT = jnp.array([1.0, 2.0, 3.0])


def run(params, steps):
    def step(state, x):
        state = jnp.tanh(state @ params["state"] + x + params["offset"] + SHIFT)
        return state, state[0]

    return jax.lax.scan(step, params["start"], steps, reverse=True)


@pytest.fixture
def traced():
    return trace(run, PARAMS, STEPS)


@pytest.fixture
def scan(traced):
    return next(e for e in traced.program.equations if e.loop is not None)


def value_of(traced, params, steps):
    env = dict(
        zip(traced.program.inputs, traced.arguments(params, [steps]), strict=True)
    )
    evaluate(traced.program.equations, env)
    return jax.tree.unflatten(
        traced.out_tree, [read(a, env) for a in traced.program.outputs]
    )


def test_inputs_are_what_is_closed_over_then_parameters_then_data(traced):
    assert len(traced.closed) == 1
    assert traced.program.inputs[1:] == (*traced.parameters, *traced.data)
    shapes = [traced.types[v].shape for v in (*traced.parameters, *traced.data)]
    assert shapes == [(3,), (3,), (3, 3), (4, 3)]


def test_arguments_are_the_values_of_the_inputs(traced):
    out, expected = value_of(traced, PARAMS, STEPS), run(PARAMS, STEPS)
    assert jax.tree.structure(out) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        assert jnp.allclose(a, b)


def test_a_loop_splits_its_inputs_and_outputs(scan, traced):
    loop = scan.loop
    consts, carry, xs = loop.split(loop.body.inputs)
    assert [traced.types[v].shape for v in carry] == [(3,)]
    assert [traced.types[v].shape for v in xs] == [(3,)]
    assert (*consts, *carry, *xs) == loop.body.inputs
    assert [len(part) for part in loop.split_outputs(scan.outputs)] == [1, 1]


def test_a_loop_knows_the_carries_that_it_leaves_unchanged():
    fixed, kept, swapped, out = map(Variable, range(4))
    body = Program((fixed, kept, swapped), (), (kept, fixed, out))
    loop = Loop(body, num_consts=1, num_carry=2, length=3, reverse=False, unroll=1)
    assert loop.unchanged == [True, False]


def test_a_loop_scans_a_step_of_ones_own(scan):
    carry, ys = scan.loop.scan(
        lambda total, x: (total + x, total), 0.0, jnp.arange(4.0)
    )
    assert float(carry) == 6.0
    assert ys.tolist() == [6.0, 5.0, 3.0, 0.0]  # from the last step to the first


def test_new_constants_of_a_body_come_first(scan, traced):
    loop, body = scan.loop, scan.loop.body
    more = traced.parameters[0]
    longer = loop.with_body(
        Program((more, *body.inputs), body.equations, body.outputs), 1
    )
    old, new = loop.split(body.inputs), longer.split(longer.body.inputs)
    assert new[0] == [more, *old[0]]
    assert new[1:] == old[1:]


def delay():
    """A loop that hands a constant to its first carry, that to its second, and puts that out."""
    fixed, first, second, x = map(Variable, range(4))
    body = Program((fixed, first, second, x), (), (fixed, first, second))
    return Loop(body, num_consts=1, num_carry=2, length=9, reverse=False, unroll=1)


def test_a_fixed_point_follows_carries_from_step_to_step():
    loop = delay()

    def step(known):
        table = dict(zip(loop.body.inputs, known, strict=True))
        return [table[v] for v in loop.body.outputs]

    found = fixed_point(loop, [True, False, False, False], step, operator.or_)
    assert found == ([True, True, True, False], [True, True, True])


def test_a_fixed_point_follows_carries_backwards():
    loop = delay()

    def back(known):
        table = dict(zip(loop.body.outputs, known, strict=True))
        return [table.get(v, set()) for v in loop.body.inputs]

    found = fixed_point(loop, [set(), set(), {"y"}], back, operator.or_, backward=True)
    assert found == ([{"y"}, {"y"}, {"y"}], [{"y"}, {"y"}, {"y"}, set()])
