"""The plain losses, against formulas in NumPy and against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as Spec

from forwax.losses import info_nce, nt_xent, nt_xent_of_view, softmax_cross_entropy
from losses.literal import numpy_nt_xent

KEY = jax.random.key(0)


def test_cross_entropy_is_its_formula():
    logits = np.asarray(jax.random.normal(KEY, (4, 3, 5)), np.float64)
    labels = np.arange(12).reshape(4, 3) % 5
    expected = (
        np.log(np.exp(logits).sum(-1))
        - np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    )
    logits = jnp.asarray(logits, jnp.float32)
    np.testing.assert_allclose(
        softmax_cross_entropy(logits, jnp.asarray(labels)), expected, rtol=1e-5
    )
    np.testing.assert_allclose(
        softmax_cross_entropy(logits, jax.nn.one_hot(labels, 5)), expected, rtol=1e-5
    )


def test_cross_entropy_of_half_precision_is_float32_and_a_label_outside_counts_nothing():
    losses = softmax_cross_entropy(jnp.ones((2, 4), jnp.bfloat16), jnp.array([0, 4]))
    assert losses.dtype == jnp.float32
    assert losses.tolist() == [pytest.approx(np.log(4)), 0.0]


@pytest.mark.parametrize("labels", [0, np.float32([1, 0, 0])])
def test_a_class_without_weight_may_be_impossible(labels):
    value, grads = jax.value_and_grad(softmax_cross_entropy)(
        jnp.array([1.0, 0.0, -jnp.inf]), labels
    )
    assert float(value) == pytest.approx(np.log1p(np.exp(-1)))
    np.testing.assert_allclose(
        grads, [-jax.nn.sigmoid(-1.0), jax.nn.sigmoid(-1.0), 0], rtol=1e-5
    )
    assert float(softmax_cross_entropy(jnp.array([1.0, 0.0, -jnp.inf]), 2)) == np.inf


def test_labels_that_do_not_fit_are_refused():
    logits = jnp.ones((3, 5))
    with pytest.raises(
        ValueError, match=r"expected class numbers of shape \(3,\), got \(3, 5\)"
    ):
        softmax_cross_entropy(logits, jnp.ones((3, 5), int))
    with pytest.raises(
        ValueError, match=r"expected one-hot labels of shape \(3, 5\), got \(3,\)"
    ):
        softmax_cross_entropy(logits, jnp.ones(3))
    with pytest.raises(
        TypeError, match=r"class numbers \(integers\) or one-hot \(floating\), got bool"
    ):
        softmax_cross_entropy(logits, jnp.ones((3, 5), bool))


def test_nt_xent_is_its_formula():
    x, y = jax.random.normal(KEY, (2, 5, 4))
    np.testing.assert_allclose(
        jax.jit(nt_xent)(x, y, 0.3), numpy_nt_xent(x, y, 0.3), rtol=1e-5
    )


def test_the_loss_of_one_view_is_its_nt_xent():
    x, y = jax.random.normal(KEY, (2, 5, 4))

    def one_by_one(x, y):
        views = jnp.concatenate([x, y])
        return jax.vmap(lambda query, index: nt_xent_of_view(query, index, views, 0.3))(
            views, jnp.arange(10)
        )

    both = jax.jit(
        lambda: [
            jax.jacrev(f, (0, 1))(x, y)
            for f in (one_by_one, lambda x, y: nt_xent(x, y, 0.3))
        ]
    )
    np.testing.assert_allclose(
        jax.jit(one_by_one)(x, y), numpy_nt_xent(x, y, 0.3), rtol=1e-5
    )
    np.testing.assert_allclose(*both(), rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ValueError,
        match=r"expected a query \[K\] and views \[2N, K\], got shapes \(4,\) and \(5, 4\)",
    ):
        nt_xent_of_view(x[0], 0, x)


@pytest.mark.parametrize("loss", [nt_xent, info_nce])
def test_the_length_of_a_view_counts_nothing_and_a_view_of_zeros_has_a_finite_slope(
    loss,
):
    x, y = jax.random.normal(KEY, (2, 5, 4))
    long, short, grads = jax.jit(
        lambda: (
            loss(x, y),
            loss(1e-4 * x, 1e3 * y),
            jax.grad(lambda x: loss(x, y).sum())(0 * x),
        )
    )()
    np.testing.assert_allclose(short, long, rtol=1e-5)
    assert np.all(np.isfinite(grads))


def test_info_nce_is_its_formula():
    x, y = jax.random.normal(KEY, (2, 5, 4))
    u, v = (
        np.asarray(z, np.float64) / np.linalg.norm(z, axis=-1, keepdims=True)
        for z in (x, y)
    )
    s = u @ v.T / 0.3
    np.testing.assert_allclose(
        jax.jit(info_nce)(x, y, 0.3), np.log(np.exp(s).sum(-1)) - np.diag(s), rtol=1e-5
    )


def test_keys_are_constants_unless_asked():
    x, y = jax.random.normal(KEY, (2, 5, 4))

    @functools.partial(jax.jit, static_argnums=1)
    def jacobians(y, stop):
        return jax.jacrev(
            lambda y: (
                info_nce(x, y, stop_gradient=stop),
                nt_xent(x, y, stop_gradient=stop),
            )
        )(y)

    to_keys, to_both = jacobians(y, True)
    assert not np.any(to_keys)
    assert not np.any(to_both[:5])
    assert not np.any(to_both[5:] * (1 - jnp.eye(5))[:, :, None])
    assert np.any(to_both[5:])
    to_keys, to_both = jacobians(y, False)
    assert np.any(to_keys)
    assert np.any(to_both[:5])


def test_views_of_unlike_shapes_are_refused():
    with pytest.raises(
        ValueError,
        match=r"nt_xent: expected two arrays of one shape \[N, K\], got shapes \(2, 3\)",
    ):
        nt_xent(jnp.ones((2, 3)), jnp.ones((2, 4)))


@pytest.mark.parametrize(
    ("axis_name", "stop_gradient"),
    [("data", True), ("data", False), (("data", "more"), False)],
)
def test_negatives_come_from_all_devices(axis_name, stop_gradient):
    x, y = jax.random.normal(KEY, (2, 8, 3))
    mesh = jax.make_mesh((4, 2), ("data", "more"), axis_types=(AxisType.Auto,) * 2)

    def total(x, y, axis_name):
        losses = nt_xent(x, y, 0.3, axis_name=axis_name, stop_gradient=stop_gradient)
        loss = (
            losses.sum()
            + info_nce(
                x, y, 0.3, axis_name=axis_name, stop_gradient=stop_gradient
            ).sum()
        )
        return loss if axis_name is None else jax.lax.psum(loss, axis_name)

    spread = jax.shard_map(
        lambda x, y: total(x, y, axis_name),
        mesh=mesh,
        in_specs=Spec(axis_name),
        out_specs=Spec(),
    )
    value, grads = jax.jit(jax.value_and_grad(spread, (0, 1)))(x, y)
    expected, truth = jax.jit(
        jax.value_and_grad(lambda x, y: total(x, y, None), (0, 1))
    )(x, y)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(grads, truth, rtol=1e-4, atol=1e-5)
