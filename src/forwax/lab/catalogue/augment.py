"""Random views of images: flips, crops, colours, blur; small shifts for supervised training.

After Grill et al. 2020 (BYOL, arXiv 2006.07733), appendix B. Every function takes a key and one
image (height, width, channels) with values from 0 to 1, and gives an image of the same shape; the
same key gives the same image.
"""

# pyright: reportReturnType=false, reportIndexIssue=false
# dm-pix's types are chex's unions.

import math
from dataclasses import dataclass

import dm_pix
import jax
import jax.numpy as jnp
from jax import Array

ADJUSTMENTS = (
    dm_pix.adjust_brightness,
    dm_pix.adjust_contrast,
    dm_pix.adjust_saturation,
    dm_pix.adjust_hue,
)
"""What jitter does, in this order."""

JITTER = (0.4, 0.4, 0.2, 0.1)
"""How far jitter may go: a shift of all values, shares of contrast and saturation, and of the
circle of hues."""


@dataclass(frozen=True)
class Augmentation:
    """How views are made; the defaults are BYOL's first view.

    Attributes:
        least_area: the smallest share of the image's area that a crop keeps.
        jitter: the probability of colour jitter.
        greyscale: the probability of losing all colour.
        blur: the probability of a Gaussian blur.
        solarise: the probability of inverting bright pixels.

    >>> SECOND_VIEW.solarise
    0.2
    """

    least_area: float = 0.08
    jitter: float = 0.8
    greyscale: float = 0.2
    blur: float = 1.0
    solarise: float = 0.0


FIRST_VIEW = Augmentation()
"""BYOL's first view."""
SECOND_VIEW = Augmentation(blur=0.1, solarise=0.2)
"""BYOL's second view."""


def two_views(key: Array, images: Array) -> tuple[Array, Array]:
    """Two views of each image of a batch.

    Args:
        key: a JAX random key.
        images: values from 0 to 1, [N, height, width, channels].

    >>> x, y = jax.jit(two_views)(jax.random.key(0), jnp.full((2, 8, 8, 3), 0.5))
    >>> x.shape, y.shape
    ((2, 8, 8, 3), (2, 8, 8, 3))
    """
    first, second = (
        jax.random.split(each, len(images)) for each in jax.random.split(key)
    )
    views = jax.vmap(view, in_axes=(0, 0, None))
    return views(first, images, FIRST_VIEW), views(second, images, SECOND_VIEW)


def view(key: Array, image: Array, augmentation: Augmentation = FIRST_VIEW) -> Array:
    """One random view: crop, flip, colour jitter, greyscale, blur, solarise.

    An image without colour is not flipped, since it may be a digit, and skips what changes colours.

    >>> jax.jit(view)(jax.random.key(0), jnp.full((8, 8, 1), 0.5)).shape
    (8, 8, 1)
    """
    keys = jax.random.split(key, 6)
    # of each key, whether to change the image, and how
    whether, how = jax.vmap(jax.random.split, out_axes=1)(keys)
    x = crop(keys[1], image, augmentation.least_area)
    if image.shape[-1] == 3:
        x = flip(keys[0], x)
        x = _sometimes(whether[2], augmentation.jitter, jitter(how[2], x), x)
        x = _sometimes(whether[3], augmentation.greyscale, grey(x), x)
    x = _sometimes(whether[4], augmentation.blur, blur(how[4], x), x)
    return _sometimes(whether[5], augmentation.solarise, jnp.minimum(x, 1 - x), x)


def flip(key: Array, image: Array) -> Array:
    """Mirror left and right with probability one half.

    >>> flip(jax.random.key(0), jnp.ones((4, 4, 3))).shape
    (4, 4, 3)
    """
    return dm_pix.random_flip_left_right(key, image)


def shift(key: Array, image: Array, pixels: int = 2) -> Array:
    """Move by up to so many pixels each way; what comes in is the image's least value.

    >>> shift(jax.random.key(0), jnp.ones((4, 4, 1)), 1).shape
    (4, 4, 1)
    """
    border = (pixels, pixels)
    wide = jnp.pad(image, (border, border, (0, 0)), constant_values=image.min())
    return dm_pix.random_crop(key, wide, image.shape)


def crop(key: Array, image: Array, least_area: float = 0.08) -> Array:
    """Cut out a random part, of sides 3:4 to 4:3, and stretch it to the whole.

    Args:
        key: a JAX random key.
        image: one image.
        least_area: the smallest share of the area that is kept.

    >>> jax.jit(crop)(jax.random.key(0), jnp.ones((8, 8, 3))).shape
    (8, 8, 3)
    """
    for_area, for_ratio, for_place = jax.random.split(key, 3)
    area = jax.random.uniform(for_area, minval=least_area)
    widest = math.log(4 / 3)
    ratio = jnp.exp(jax.random.uniform(for_ratio, minval=-widest, maxval=widest))
    # shares of the image's, [2]
    sides = jnp.minimum(jnp.sqrt(area * jnp.stack([ratio, 1 / ratio])), 1.0)
    corner = jax.random.uniform(for_place, (2,)) * (1 - sides)
    corner *= jnp.array(image.shape[:2], image.dtype)
    return jax.image.scale_and_translate(
        image,
        image.shape,
        spatial_dims=(0, 1),
        scale=1 / sides,
        translation=-corner / sides,
        method="linear",
    )


def jitter(key: Array, image: Array, most: tuple[float, ...] = JITTER) -> Array:
    """Change brightness, contrast, saturation and hue at random, each by so much at most.

    >>> jitter(jax.random.key(0), jnp.full((4, 4, 3), 0.5)).shape
    (4, 4, 3)
    """
    changes = jax.random.uniform(key, (4,), minval=-1.0) * jnp.array(most)
    # contrast and saturation are factors
    amounts = changes + jnp.array([0.0, 1.0, 1.0, 0.0])
    x = image
    with jax.numpy_dtype_promotion("standard"):  # which dm-pix counts on
        for adjust, amount in zip(ADJUSTMENTS, amounts, strict=True):
            x = jnp.clip(adjust(x, amount), 0.0, 1.0)
    return x


def grey(image: Array) -> Array:
    """Give the brightness in all three channels.

    >>> grey(jnp.ones((4, 4, 3))).shape
    (4, 4, 3)
    """
    return dm_pix.rgb_to_grayscale(image, keep_dims=True)


def blur(key: Array, image: Array) -> Array:
    """A Gaussian blur of a width from 0.1 to 2 pixels, cut off at a twentieth of the height.

    >>> blur(jax.random.key(0), jnp.ones((4, 4, 3))).shape
    (4, 4, 3)
    """
    width = jax.random.uniform(key, minval=0.1, maxval=2.0)
    reach = max(1, image.shape[0] // 20)
    border = (reach, reach)
    wide = jnp.pad(image, (border, border, (0, 0)), mode="edge")
    return dm_pix.gaussian_blur(wide, width, 2 * reach + 1, padding="VALID")


def _sometimes(key: Array, probability: float, changed: Array, image: Array) -> Array:
    return jnp.where(jax.random.bernoulli(key, probability), changed, image)
