"""The fused losses equal their literal definition.

Values, derivatives forwards and backwards, memory.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as Spec

from forwax.losses import (
    nt_xent,
    spatial_average_group_linear,
    spatial_average_group_linear_cross_entropy,
    spatial_average_group_linear_nt_xent,
)
from losses import literal

N, P, G, C, K = 3, 4, 2, 5, 6
OPERATIONS = {
    "linear": (spatial_average_group_linear, literal.linear),
    "cross_entropy": (
        spatial_average_group_linear_cross_entropy,
        literal.cross_entropy,
    ),
    "nt_xent": (spatial_average_group_linear_nt_xent, literal.nt_xent),
}


def normals(seed, *shapes):
    draw = np.random.default_rng(seed).normal
    return [jnp.asarray(draw(size=shape), jnp.float32) for shape in shapes]


def arguments(name, seed=0, n=N):
    x, y, w, b, targets, temperature = normals(
        seed, (n, P, G, C), (n, P, G, C), (G * C, K), (K,), (n, K), ()
    )
    return {
        "linear": (x, w, b),
        "cross_entropy": (x, w, b, abs(targets)),
        "nt_xent": (x, y, w, b, 0.3 + temperature**2),
    }[name]


def forwards_and_backwards(operation, args, tangents, cotangent):
    value, slope = jax.jvp(operation, args, tangents)
    return value, slope, jax.vjp(operation, *args)[1](cotangent.astype(value.dtype))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.bfloat16, 3e-2)]
)
@pytest.mark.parametrize("name", OPERATIONS)
def test_fused_is_literal_for_any_tangent_and_cotangent(name, dtype, tolerance):
    fused, plain = OPERATIONS[name]
    args, tangents = (
        tuple(x.astype(dtype) for x in arguments(name, seed)) for seed in (0, 1)
    )
    exact, moved = (
        tuple(x.astype(jnp.float32) for x in part) for part in (args, tangents)
    )
    (cotangent,) = normals(2, jax.eval_shape(plain, *exact).shape)
    got = jax.jit(lambda: forwards_and_backwards(fused, args, tangents, cotangent))()
    expected = jax.jit(lambda: forwards_and_backwards(plain, exact, moved, cotangent))()
    assert [x.dtype for x in got[2]] == [dtype] * len(args)
    for mine, true in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        mine, true = np.asarray(mine, np.float64), np.asarray(true, np.float64)
        assert np.linalg.norm(mine - true) <= tolerance * np.linalg.norm(true)


def alone(operation, args, number, tangent):
    """Value and slope where one argument moves."""
    return jax.jvp(
        lambda x: operation(*args[:number], x, *args[number + 1 :]),
        (args[number],),
        (tangent,),
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_slopes_along_one_argument_add_up_to_the_slope(name):
    operation, args, tangents = OPERATIONS[name][0], arguments(name), arguments(name, 1)

    @jax.jit
    def ways():
        apart = [
            alone(operation, args, i, tangent) for i, tangent in enumerate(tangents)
        ]
        return apart, jax.jvp(operation, args, tangents)

    apart, (value, slope) = ways()
    for each, _ in apart:
        np.testing.assert_allclose(each, value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        sum(part for _, part in apart), slope, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_large_batch_is_right_when_optimised(name):
    """With XLA's default options.

    A dot with zeros that are part of the program may then read memory not its own.
    """
    n = 512
    x, y, w, b, targets = normals(
        0, (n, 4, 4, 64), (n, 4, 4, 64), (256, 10), (10,), (n, 10)
    )
    args = {
        "linear": (x, w, b),
        "cross_entropy": (x, w, b, abs(targets)),
        "nt_xent": (x, y, w, b, 0.5),
    }[name]

    def slope(args, tangent):
        return alone(
            lambda *args: jnp.sum(OPERATIONS[name][0](*args) ** 2, -1), args, 0, tangent
        )

    optimised = jax.jit(slope)
    optimised(args, jnp.nan * y)  # leaves NaN behind in memory
    for got, expected in zip(optimised(args, y), jax.jit(slope)(args, y), strict=True):
        np.testing.assert_allclose(
            got, expected, rtol=1e-4, atol=1e-4 * float(abs(expected).max())
        )


@pytest.mark.parametrize(
    ("name", "head"), [("linear", 1), ("cross_entropy", 1), ("nt_xent", 2)]
)
def test_a_head_that_does_not_move_has_no_dot(name, head):
    operation, args, tangents = OPERATIONS[name][0], arguments(name), arguments(name, 1)

    def both(dx, dw):
        fun = lambda x, w: operation(x, *args[1:head], w, *args[head + 1 :])
        return jax.jvp(fun, (args[0], args[head]), (dx, dw))

    dots = lambda fun, *args: str(jax.make_jaxpr(fun)(*args)).count("dot_general[")
    alone_dots = dots(lambda dx: alone(operation, args, 0, dx), tangents[0])
    assert alone_dots == dots(both, tangents[0], tangents[head]) - 1


def test_a_bias_may_move_alone_on_a_mesh():
    x, w, b = arguments("linear", n=8)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def pushed(x, db):
        return jax.jvp(lambda b: spatial_average_group_linear(x, w, b), (b,), (db,))[1]

    spread = jax.shard_map(
        pushed, mesh=mesh, in_specs=(Spec("data"), Spec()), out_specs=Spec("data")
    )
    np.testing.assert_array_equal(
        jax.jit(spread)(x, b), jnp.broadcast_to(b, (8, P, G, K))
    )


def test_class_numbers_are_one_hot():
    x, w, b, _ = arguments("cross_entropy")
    labels = jnp.array([2, 0, 5])
    gradients = lambda y: jax.jacrev(
        spatial_average_group_linear_cross_entropy, (0, 1, 2)
    )(x, w, b, y)
    first, second = jax.jit(
        lambda: (gradients(labels), gradients(jax.nn.one_hot(labels, K)))
    )()
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_a_class_without_weight_may_be_impossible():
    x, w, b, targets = arguments("cross_entropy")
    b, targets = b.at[-1].set(-jnp.inf), targets.at[:, -1].set(0)
    total = lambda *args: jnp.sum(spatial_average_group_linear_cross_entropy(*args))
    both = lambda: [
        jax.value_and_grad(total, (0, 1, 2))(x, w, b, targets),
        jax.value_and_grad(total, (0, 1, 2))(x, w[:, :-1], b[:-1], targets[:, :-1]),
    ]
    (value, (dx, dw, db)), (true_value, (true_dx, *true_head)) = jax.jit(both)()
    assert float(value) == pytest.approx(float(true_value), rel=1e-5)
    np.testing.assert_allclose(dx, true_dx, rtol=1e-4, atol=1e-6)
    for mine, true in zip((dw, db), true_head, strict=True):
        np.testing.assert_allclose(mine[..., :-1], true, rtol=1e-4, atol=1e-6)
        assert not np.any(mine[..., -1])


def test_examples_may_be_mapped_or_have_any_leading_axes():
    x, w, b, targets = arguments("cross_entropy")
    dx = arguments("cross_entropy", 1)[0]

    def pushed(x, dx, targets):
        fused = lambda x: spatial_average_group_linear_cross_entropy(x, w, b, targets)
        return jax.jvp(fused, (x,), (dx,))

    @jax.jit
    def ways():
        mapped = jax.vmap(pushed)(x, dx, targets)
        deep = pushed(x[:, None], dx[:, None], targets[:, None])
        alone = pushed(x[:1], dx[:1], targets[:1])
        return pushed(x, dx, targets), mapped, deep, alone

    for true, mapped, deep, alone in zip(*ways(), strict=True):
        np.testing.assert_allclose(mapped, true, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(deep[:, 0], true, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(alone[0], true[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [N, 1])
def test_the_contrastive_value_is_nt_xent_of_the_projections(n):
    x, y, w, b, temperature = arguments("nt_xent", n=n)

    @jax.jit
    def both():
        views = [v.mean(1).reshape(n, -1) @ w + b[None] for v in (x, y)]
        return spatial_average_group_linear_nt_xent(x, y, w, b, temperature), nt_xent(
            *views, temperature
        )

    fused, plain = both()
    np.testing.assert_allclose(
        fused, jnp.broadcast_to(plain[:, None, None], fused.shape), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("axis_name", ["data", ("data", "more")])
def test_contrastive_negatives_come_from_all_devices(axis_name):
    x, y, w, b, temperature = arguments("nt_xent", n=8)
    mesh = jax.make_mesh((4, 2), ("data", "more"), axis_types=(AxisType.Auto,) * 2)
    (weights,) = normals(3, (2, 8, P, G))

    def total(x, y, w, b, weights, axis_name):
        losses = spatial_average_group_linear_nt_xent(
            x, y, w, b, temperature, axis_name=axis_name
        )
        loss = jnp.sum(losses * weights.reshape(losses.shape))
        return loss if axis_name is None else jax.lax.psum(loss, axis_name)

    specs = (Spec(axis_name), Spec(axis_name), Spec(), Spec(), Spec(None, axis_name))
    spread = jax.shard_map(
        lambda *args: total(*args, axis_name),
        mesh=mesh,
        in_specs=specs,
        out_specs=Spec(),
    )
    args, everything = (x, y, w, b, weights), (0, 1, 2, 3)
    value, grads = jax.jit(jax.value_and_grad(spread, everything))(*args)
    expected, truth = jax.jit(
        jax.value_and_grad(lambda *args: total(*args, None), everything)
    )(*args)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for mine, true in zip(grads, truth, strict=True):
        np.testing.assert_allclose(mine, true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("num_classes", "views"), [(10, 0), (128, 2)])
def test_temporaries_stay_small(num_classes, views):
    """At the last block of M/8/16 with 100 examples, or 50 with two views each."""
    n, p, g, c = 100 // max(views, 1), 64, 16, 32
    x, w, b = ((n, p, g, c), (g * c, num_classes), (num_classes,))
    args = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in (*[x] * max(views, 1), w, b)
    ]
    labels = [] if views else [jax.ShapeDtypeStruct((n,), jnp.int32)]
    loss = (
        spatial_average_group_linear_nt_xent
        if views
        else spatial_average_group_linear_cross_entropy
    )

    def jvp(args, labels, dargs):
        return jax.jvp(lambda *args: loss(*args, *labels), args, dargs)

    def gradient(args, labels):
        return jax.grad(lambda args: jnp.sum(loss(*args, *labels)))(args)

    def mebibytes(fun, *args):
        return (
            jax.jit(fun).lower(*args).compile().memory_analysis().temp_size_in_bytes
            / 2**20
        )

    assert mebibytes(jvp, args, labels, args) <= 1
    assert mebibytes(gradient, args, labels) <= 0.5


def test_shapes_that_do_not_fit_are_refused():
    x, w, b = jnp.ones((3, 4, 2, 5)), jnp.ones((10, 6)), jnp.ones(6)
    with pytest.raises(
        ValueError,
        match=r"linear: expected features x of shape \[..., P, G, C\], got \(2, 5\)",
    ):
        spatial_average_group_linear(x[0, 0], w, b)
    with pytest.raises(
        ValueError, match=r"w of shape \[G·C, K\] = \[10, K\] .* \(9, 6\) and \(6,\)"
    ):
        spatial_average_group_linear_cross_entropy(x, w[1:], b, jnp.ones(3, int))
    with pytest.raises(
        ValueError, match=r"expected class numbers of shape \(3,\), got \(2,\)"
    ):
        spatial_average_group_linear_cross_entropy(x, w, b, jnp.ones(2, int))
    with pytest.raises(
        ValueError,
        match=r"two views of one shape \[N, P, G, C\], got .* \(2, 4, 2, 5\)",
    ):
        spatial_average_group_linear_nt_xent(x, x[1:], w, b)
