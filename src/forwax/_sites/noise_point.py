"""Noise points: marks inside a model that say where noise enters."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

NOISE_POINT = "forwax.noise_point"
"""The name that marks where a site's noise enters."""


def noise_point(x: Any) -> Any:
    """Mark where the noise of the sites before it enters: the identity, called inside a model.

    By default activity noise enters behind a site's own operation and its bias. A mark moves it:
    everything between the site and the mark, a normalisation included, then belongs to the site and
    is differentiated exactly, as long as all of it leads to the mark and no other dot, convolution
    or look-up lies between. Sites from which some way leads past the mark keep their noise where it
    was.

    Args:
        x: a pytree of arrays.

    Returns:
        `x` itself.

    Example:
        >>> import jax.numpy as jnp, forwax as fx
        >>> fx.noise_point(jnp.arange(3.0)).tolist()
        [0.0, 1.0, 2.0]
    """
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, NOISE_POINT), x)
