"""Numbers drawn in one axis are those of the shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forwax.tangents._base import draw_in_one_axis


@pytest.mark.parametrize(
    "draw", [jax.random.normal, jax.random.bits], ids=["normal", "bits"]
)
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_draws_in_one_axis_are_those_of_the_shape(draw, impl):
    key = jax.random.key(3, impl=impl)
    dtype = jnp.float32 if draw is jax.random.normal else jnp.uint32
    found = draw_in_one_axis(draw, key, (2, 1, 3, 5), dtype)
    np.testing.assert_array_equal(found, draw(key, (2, 1, 3, 5), dtype))
