"""Models in plain JAX."""

import pytest

from sites import models
from sites.interop import check, check_factors

MODELS = {
    "vision-transformer": models.vision_transformer,
    "mlp-mixer": models.mlp_mixer,
    "scanned-transformer": models.scanned_transformer,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_plain_jax(name):
    check(MODELS[name]())


@pytest.mark.parametrize("name", MODELS)
def test_factors_give_the_slope_and_the_estimate_of_the_direction_in_full(name):
    check_factors(MODELS[name]())
