"""Models in plain JAX."""

import pytest

from sites import models
from sites.interop import check

MODELS = {
    "vision-transformer": models.vision_transformer,
    "mlp-mixer": models.mlp_mixer,
    "scanned-transformer": models.scanned_transformer,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_plain_jax(name):
    check(MODELS[name]())
