"""Augmentation: shapes, range, the same image for the same key, and what each part does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forwax.lab.catalogue import augment
from forwax.lab.catalogue.augment import Augmentation


def image(channels=3):
    return jnp.asarray(np.random.default_rng(0).random((8, 8, channels), np.float32))


def test_two_views_differ_and_follow_their_key():
    images = jnp.stack([image(), image()])
    views = jax.jit(augment.two_views)
    x, y = views(jax.random.key(0), images)
    assert x.shape == y.shape == images.shape
    assert x.dtype == images.dtype
    again, other = (
        views(jax.random.key(0), images)[0],
        views(jax.random.key(1), images)[0],
    )
    assert jnp.array_equal(x, again)
    assert not jnp.allclose(x, other)
    assert not jnp.allclose(x, y)
    assert not jnp.allclose(x[0], x[1])  # each image has its own key
    assert float(x.min()) >= -1e-6
    assert float(x.max()) <= 1 + 1e-6


def test_an_image_without_colour_is_never_mirrored():
    ramp = jnp.broadcast_to(jnp.linspace(0, 1, 8)[None, :, None], (8, 8, 1))
    keys, plain = jax.random.split(jax.random.key(0), 16), Augmentation(blur=0.0)
    views = jax.jit(jax.vmap(lambda key: augment.view(key, ramp, plain)))(keys)
    assert views.shape == (16, 8, 8, 1)
    assert bool(jnp.all(jnp.diff(views, axis=2) >= -1e-5))


def test_a_crop_of_a_constant_is_constant_and_a_whole_one_changes_nothing():
    crop = jax.jit(augment.crop)
    assert jnp.allclose(
        crop(jax.random.key(0), jnp.full((8, 8, 3), 0.3)), 0.3, atol=1e-5
    )
    ramp = jnp.broadcast_to(jnp.arange(8.0)[None, :, None], (8, 8, 1))
    cut = crop(jax.random.key(3), ramp)
    assert float(cut.min()) >= 0
    assert float(cut.max()) <= 7
    assert bool(jnp.all(jnp.diff(cut[:, :, 0], axis=1) >= -1e-5))  # order is kept
    assert float(cut.max() - cut.min()) < 7  # less than the whole is seen


def test_flip_mirrors_half_of_the_images():
    keys, x = jax.random.split(jax.random.key(0), 64), image()
    flipped = jax.jit(jax.vmap(lambda key: augment.flip(key, x)))(keys)
    mirrored = jnp.all(flipped == x[None, :, ::-1], axis=(1, 2, 3))
    assert bool(jnp.all(mirrored | jnp.all(flipped == x[None], axis=(1, 2, 3))))
    assert 16 < int(mirrored.sum()) < 48


def test_shift_moves_by_at_most_the_given_pixels():
    x = jnp.zeros((8, 8, 1)).at[4, 4].set(1.0)
    places = set()
    keys = jax.random.split(jax.random.key(0), 60)
    for moved in np.asarray(
        jax.jit(jax.vmap(lambda key: augment.shift(key, x, 1)))(keys)
    ):
        (place,) = np.argwhere(moved[..., 0] == 1)
        places.add(tuple(place.tolist()))
    assert places == {(i, j) for i in (3, 4, 5) for j in (3, 4, 5)}


def test_a_shift_brings_in_the_least_value_of_the_whole_image():
    x = image().at[2, 3, 1].set(-1.0)
    moved = jax.jit(jax.vmap(lambda key: augment.shift(key, x, 2)))(
        jax.random.split(jax.random.key(0), 20)
    )
    assert (
        int((moved == -1).sum(axis=(1, 2, 3)).max()) >= 2 * 8 * 3
    )  # two rows or columns and more


def test_crops_go_down_to_a_twelfth_of_the_area_by_default():
    across = jnp.broadcast_to(jnp.linspace(0, 1, 32)[None, :, None], (32, 32, 1))
    seen = jax.jit(jax.vmap(lambda key: jnp.ptp(augment.crop(key, across))))(
        jax.random.split(jax.random.key(0), 200)
    )
    assert (
        float(seen.min()) < 0.35
    )  # of the width; sides of 3:4 of a fifth of the area are 0.39


def test_brightness_shifts_all_values():
    x = image() / 4 + 0.4
    only = (0.2, 0.0, 0.0, 0.0)
    change = jax.jit(augment.jitter)(jax.random.key(0), x, only) - x
    assert 0.01 < abs(float(change.mean())) < 0.2
    assert float(jnp.ptp(change)) < 2e-3


def test_blur_keeps_the_mean_of_each_inner_pixel_and_lowers_contrast():
    x = image()
    blur = jax.jit(augment.blur)
    blurred = blur(jax.random.key(1), x)
    assert jnp.allclose(blur(jax.random.key(1), jnp.ones((8, 8, 3))), 1.0, atol=1e-5)
    assert float(jnp.var(blurred)) < float(jnp.var(x))


def test_no_hue_leaves_the_colours():
    jitter = jax.jit(augment.jitter)
    still = jitter(jax.random.key(0), image(), (0.0,) * 4)
    assert jnp.allclose(still, image(), atol=1e-3)
    turned = jitter(jax.random.key(0), image() / 2 + 0.25, (0.0, 0.0, 0.0, 0.1))
    before = image() / 2 + 0.25
    assert not jnp.allclose(turned, before, atol=1e-2)
    # a hue of the same saturation keeps the largest of the three values, and the least
    assert jnp.allclose(turned.max(axis=-1), before.max(axis=-1), atol=1e-5)
    assert jnp.allclose(turned.min(axis=-1), before.min(axis=-1), atol=1e-5)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_solarise_and_greyscale(probability):
    only = Augmentation(1.0, 0.0, greyscale=probability, blur=0.0, solarise=probability)
    seen = jax.jit(augment.view, static_argnums=2)(jax.random.key(0), image(), only)
    assert bool(jnp.all(seen <= 0.5 + 1e-5)) == bool(probability)
    assert bool(jnp.allclose(seen[..., 0], seen[..., 1], atol=1e-5)) == bool(
        probability
    )
