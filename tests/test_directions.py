"""The one loop over chunks of directions, along some whose slopes are known."""

import jax
import jax.numpy as jnp
import pytest

from cases import assert_trees_close
from forwax._directions.formed import Formed
from forwax._pushforward import over_tangents, slopes

POINT = jnp.array([1.0, 2.0, 3.0])


def along_the_axes(chunk_size):
    """Slopes 2, 4, 6, of which the guard leaves 2, 4, 5; weights are not zero where slopes are."""
    axes = lambda indices: jnp.eye(3)[indices]
    loss = lambda x: (jnp.sum(x**2), {"x": x})
    directions = Formed(POINT, lambda key: axes, objective=loss)
    result = slopes(
        directions,
        directions.sampler(jax.random.key(0)),
        3,
        chunk_size=chunk_size,
        guard=lambda slopes: jnp.minimum(slopes, 5.0),
        weigh=lambda slopes, drawn: slopes + 1.0,
        start=lambda: jnp.zeros(3),
    )
    return result.value, result.aux, result.found, result.used, result.total


@pytest.mark.parametrize("staged", [False, True], ids=["eager", "staged"])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 7])
def test_chunks_padding_and_guard(chunk_size, staged):
    """What fills the last chunk of two weighs nothing."""
    run = lambda: along_the_axes(chunk_size)
    found = (jax.jit(run) if staged else run)()
    expected = [2.0, 4.0, 6.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]
    assert_trees_close(found, (14.0, {"x": POINT}, *map(jnp.array, expected)))


def test_a_single_tangent_has_no_batch_axis():
    """So that functions without a batching rule serve too."""
    called = lambda x: (jax.pure_callback(lambda x: x, x, x), None)
    each, _ = over_tangents(called, POINT[None], 1)
    assert each.tolist() == [POINT.tolist()]
    with pytest.raises(NotImplementedError, match="vmap"):
        over_tangents(called, jnp.stack([POINT, POINT]), 2)
