"""The fused losses equal their literal definition: values, derivatives forwards and backwards, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as Spec

from cases import quick_jit
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
    "cross_entropy": (spatial_average_group_linear_cross_entropy, literal.cross_entropy),
    "nt_xent": (spatial_average_group_linear_nt_xent, literal.nt_xent),
}


def normals(seed, *shapes):
    draw = np.random.default_rng(seed).normal
    return [jnp.asarray(draw(size=shape), jnp.float32) for shape in shapes]


def arguments(name, seed=0, n=N):
    x, y, w, b, targets, temperature = normals(seed, (n, P, G, C), (n, P, G, C), (G * C, K), (K,), (n, K), ())
    return {
        "linear": (x, w, b),
        "cross_entropy": (x, w, b, abs(targets)),
        "nt_xent": (x, y, w, b, 0.3 + temperature**2),
    }[name]


def forwards_and_backwards(operation, args, tangents, cotangent):
    value, slope = jax.jvp(operation, args, tangents)
    return value, slope, jax.vjp(operation, *args)[1](cotangent.astype(value.dtype))


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.bfloat16, 3e-2)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_fused_is_literal_for_any_tangent_and_cotangent(name, dtype, tolerance):
    fused, plain = OPERATIONS[name]
    args, tangents = (tuple(x.astype(dtype) for x in arguments(name, seed)) for seed in (0, 1))
    exact, moved = (tuple(x.astype(jnp.float32) for x in part) for part in (args, tangents))
    (cotangent,) = normals(2, jax.eval_shape(plain, *exact).shape)
    got = quick_jit(lambda: forwards_and_backwards(fused, args, tangents, cotangent))()
    expected = quick_jit(lambda: forwards_and_backwards(plain, exact, moved, cotangent))()
    assert [x.dtype for x in got[2]] == [dtype] * len(args)
    for mine, true in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        mine, true = np.asarray(mine, np.float64), np.asarray(true, np.float64)
        assert np.linalg.norm(mine - true) <= tolerance * np.linalg.norm(true)


def test_class_numbers_are_one_hot():
    x, w, b, _ = arguments("cross_entropy")
    labels = jnp.array([2, 0, 5])
    gradients = lambda y: jax.jacrev(spatial_average_group_linear_cross_entropy, (0, 1, 2))(x, w, b, y)
    first, second = quick_jit(lambda: (gradients(labels), gradients(jax.nn.one_hot(labels, K))))()
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


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
        return spatial_average_group_linear_nt_xent(x, y, w, b, temperature), nt_xent(*views, temperature)

    fused, plain = both()
    np.testing.assert_allclose(fused, jnp.broadcast_to(plain[:, None, None], fused.shape), rtol=1e-5, atol=1e-6)


def test_contrastive_negatives_come_from_all_devices():
    x, y, w, b, temperature = arguments("nt_xent", n=8)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    (weights,) = normals(3, (2, 8, P, G))

    def total(x, y, w, b, weights, axis_name):
        losses = spatial_average_group_linear_nt_xent(x, y, w, b, temperature, axis_name=axis_name)
        loss = jnp.sum(losses * weights.reshape(losses.shape))
        return loss if axis_name is None else jax.lax.psum(loss, axis_name)

    specs = (Spec("data"), Spec("data"), Spec(), Spec(), Spec(None, "data"))
    spread = jax.shard_map(lambda *args: total(*args, "data"), mesh=mesh, in_specs=specs, out_specs=Spec())
    args, everything = (x, y, w, b, weights), (0, 1, 2, 3)
    value, grads = quick_jit(jax.value_and_grad(spread, everything))(*args)
    expected, truth = quick_jit(jax.value_and_grad(lambda *args: total(*args, None), everything))(*args)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for mine, true in zip(grads, truth, strict=True):
        np.testing.assert_allclose(mine, true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("num_classes", "views"), [(10, 0), (128, 2)])
def test_temporaries_stay_small(num_classes, views):
    """At the last block of M/8/16 with 100 examples, or 50 with two views each."""
    n, p, g, c = 100 // max(views, 1), 64, 16, 32
    x, w, b = ((n, p, g, c), (g * c, num_classes), (num_classes,))
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (*[x] * max(views, 1), w, b)]
    labels = [] if views else [jax.ShapeDtypeStruct((n,), jnp.int32)]
    loss = spatial_average_group_linear_nt_xent if views else spatial_average_group_linear_cross_entropy

    def jvp(args, labels, dargs):
        return jax.jvp(lambda *args: loss(*args, *labels), args, dargs)

    def gradient(args, labels):
        return jax.grad(lambda args: jnp.sum(loss(*args, *labels)))(args)

    def mebibytes(fun, *args):
        return jax.jit(fun).lower(*args).compile().memory_analysis().temp_size_in_bytes / 2**20

    assert mebibytes(jvp, args, labels, args) <= 1
    assert mebibytes(gradient, args, labels) <= 0.5


def test_shapes_that_do_not_fit_are_refused():
    x, w, b = jnp.ones((3, 4, 2, 5)), jnp.ones((10, 6)), jnp.ones(6)
    with pytest.raises(ValueError, match=r"linear: expected features x of shape \[..., P, G, C\], got \(2, 5\)"):
        spatial_average_group_linear(x[0, 0], w, b)
    with pytest.raises(ValueError, match=r"w of shape \[G·C, K\] = \[10, K\] .* \(9, 6\) and \(6,\)"):
        spatial_average_group_linear_cross_entropy(x, w[1:], b, jnp.ones(3, int))
    with pytest.raises(ValueError, match=r"expected class numbers of shape \(3,\), got \(2,\)"):
        spatial_average_group_linear_cross_entropy(x, w, b, jnp.ones(2, int))
    with pytest.raises(ValueError, match=r"two views of one shape \[N, P, G, C\], got .* \(2, 4, 2, 5\)"):
        spatial_average_group_linear_nt_xent(x, x[1:], w, b)
