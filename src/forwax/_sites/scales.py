"""How large each site's noise is.

Noise σ u enters and the error is slope · u / σ, so that the estimate is unbiased for any σ > 0.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import Array

from forwax import _mesh, _tree
from forwax._programs.program import Variable
from forwax._sites.model import Sites

Scales: TypeAlias = Mapping[Variable, Array]
"""The scale of each noisy site, in the dtype of its noise; empty where all are 1."""


def scales_of(sites: Sites, scales: Any, name: str) -> Scales:
    """A rule's scales by site; None gives those of the sites."""
    noisy = sites.noisy
    if scales is None:
        if all(site.scale == 1 for site in noisy):
            return {}
        scales = [site.scale for site in noisy]
    given = jnp.asarray(scales)
    if given.shape != (len(noisy),):
        raise ValueError(
            f"{name}: expected one scale for each of the {len(noisy)} sites with noise, in the "
            f"order of forwax.explain, got an array of shape {given.shape}. Pass an array of "
            f"shape ({len(noisy)},), or let rule.calibrate find the scales of this loss."
        )
    if not _tree.is_abstract(given):
        values = np.asarray(given, np.float64)
        if not np.all((values > 0) & np.isfinite(values)):
            raise ValueError(
                f"{name}: expected positive, finite scales, got {values.tolist()}. Use "
                "where=... to take the activity noise off parameters."
            )
    found: dict[Variable, Array] = {}
    for site, scale in zip(noisy, given, strict=True):
        # Rounded once: noise and error must hold the same scale.
        found[site.variable] = scale.astype(jnp.finfo(site.dtype).dtype)
    return found


def scaled(noise: Array, scale: Array | None) -> Array:
    """σ u."""
    if scale is None:
        return noise
    return noise * _mesh.vary(scale.astype(noise.dtype), _mesh.axes(noise))


def divided(x: Array, scale: Array | None) -> Array:
    """What belongs to u / σ, from what belongs to σ u."""
    if scale is None:
        return x
    wide = scale.astype(_tree.accumulation_dtype(scale.dtype))
    return scaled(x, 1 / jnp.square(wide))
