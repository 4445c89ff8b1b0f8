"""Private slopes: one example moves the sum by at most the clip, and the noise has its scale."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwax as fx
from cases import normal

KEY, SECRET = jax.random.key(0), jax.random.key(1)
W = normal(1, 6, 2)
X = normal(2, 5, 6)
RULE = fx.WeightPerturbation(num_tangents=3)


def loss(w, x):
    return jnp.sum(jnp.tanh(x @ w) ** 2)


TAKEN = jax.jit(fx.slopes(loss, RULE, in_axes=(None, 0), per_example=True))
EACH = TAKEN(KEY, W, X)[1]
private = fx.privacy.clip_and_noise


def total(slopes, clip=0.7, **options):
    """The noiseless sum of clipped slopes, in their own units [k]."""
    given = {"batch_size": 5, **options}
    return 3 * 5 * private(slopes, clip, 0.0, SECRET, **given).weights[0]


def test_without_clipping_and_noise_it_is_the_mean():
    got = private(EACH, 1e6, 0.0, SECRET)
    np.testing.assert_allclose(got.weights, EACH.mean().weights, rtol=1e-5)
    moved = fx.replay(loss, RULE, in_axes=(None, 0))(got, 0.1, W, X)
    assert moved.shape == W.shape


def test_each_example_is_clipped_to_the_norm():
    found = 3 * EACH.weights[0]  # [k, N]
    norms = jnp.linalg.norm(found, axis=0)
    clip = float(jnp.median(norms))
    assert int(jnp.sum(norms > clip)) == 2
    expected = jnp.sum(found * jnp.minimum(1, clip / norms)[None], axis=1)
    np.testing.assert_allclose(total(EACH, clip), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6, 1e30, jnp.inf, jnp.nan])
def test_one_example_changes_the_sum_by_at_most_the_clip(size):
    """Whatever it is, and where it is taken away; not more than rounding beyond."""
    own = EACH.weights.at[0, :, 2].set(size * jnp.array([1.0, -2.0, 0.5]))
    changed = dataclasses.replace(EACH, weights=own)
    for other in (EACH.scaled(jnp.arange(5) != 2), EACH):
        most = 0.7 if other is not EACH else 1.4
        moved = jnp.linalg.norm(total(changed) - total(other))
        assert float(moved) <= most * (1 + 1e-5)
    if size == 1e6:
        without = total(EACH.scaled(jnp.arange(5) != 2))
        np.testing.assert_allclose(
            jnp.linalg.norm(total(changed) - without), 0.7, rtol=1e-5
        )


def test_noise_has_its_scale_and_its_numbers_are_independent():
    """300 draws of 3 numbers: a standard deviation within 10 % is missed by chance 1 in 40,000."""
    draw = jax.jit(lambda key: private(EACH, 0.7, 2.0, key, batch_size=8).weights[0])
    draws = jax.vmap(draw)(jax.random.split(SECRET, 300))
    noise = 3 * 8 * draws - total(EACH)[None]
    np.testing.assert_allclose(jnp.std(noise), 2.0 * 0.7, rtol=0.1)
    assert float(jnp.abs(jnp.mean(noise, axis=0)).max()) < 4.5 * 1.4 / 300**0.5
    correlations = jnp.corrcoef(noise.T)[jnp.triu_indices(3, 1)]
    assert float(jnp.abs(correlations).max()) < 0.25


def test_a_mask_and_the_expected_size():
    """As for Poisson sampling: who is not drawn adds nothing, and the divisor stays."""
    mask = jnp.array([1, 0, 1, 1, 0])
    got = private(EACH.scaled(mask), 0.7, 0.0, SECRET, batch_size=4)
    kept = dataclasses.replace(EACH, weights=EACH.weights[..., mask == 1])
    expected = private(kept, 0.7, 0.0, SECRET, batch_size=4)
    np.testing.assert_allclose(got.weights, expected.weights, rtol=1e-5)


def test_what_is_not_private_is_refused():
    with pytest.raises(
        ValueError, match=r"expected a slope for each example, .* got \[1, 3\]"
    ):
        private(EACH.mean(), 1.0, 1.0, SECRET)
    with pytest.raises(
        TypeError, match=r"clip_and_noise: expected forwax.Slopes, got tuple"
    ):
        private((KEY, 1.0), 1.0, 1.0, SECRET)
    for clip in (0, 0.0, -1.0, float("inf"), float("nan"), "1", True):
        with pytest.raises(
            ValueError, match="expected clip to be a number of more than 0"
        ):
            private(EACH, clip, 1.0, SECRET)
    for multiplier in (-1.0, float("nan"), None):
        with pytest.raises(
            ValueError, match=r"expected noise_multiplier to be .* at least 0"
        ):
            private(EACH, 1.0, multiplier, SECRET)
    with pytest.raises(
        ValueError, match="expected batch_size to be a positive integer, got 0"
    ):
        private(EACH, 1.0, 1.0, SECRET, batch_size=0)
    with pytest.raises(
        ValueError, match="expected a secret key, got one from which directions"
    ):
        private(EACH, 1.0, 1.0, KEY)
    with pytest.raises(TypeError, match="key must be a PRNG key, got int"):
        private(EACH, 1.0, 1.0, 3)
