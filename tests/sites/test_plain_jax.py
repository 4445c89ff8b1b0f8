"""Models in plain JAX."""

import pytest

from sites import models
from sites.interop import check


@pytest.mark.parametrize("make", [models.vision_transformer, models.mlp_mixer, models.scanned_transformer])
def test_a_model_in_plain_jax(make):
    check(make())
