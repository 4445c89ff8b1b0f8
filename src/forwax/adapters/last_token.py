"""A change of the last token's state behind the top layers."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from forwax.adapters.base import UNKNOWN, Base, check_rank
from forwax.lm.config import LlamaConfig
from forwax.lm.model import unit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LastTokenAdapter:
    """A change h + (rms(h) A) U of the last token's state h behind each of the top layers.

    An intervention as in ReFT (Wu et al. 2024, arXiv 2404.03592). Made by `last_token`. rms(h) is h
    over its root mean square. Only A is trained; it is a site, (rms(h) A), whose noise has as many
    coordinates an example as the rank. All earlier tokens are frozen: `cached_prefix` holds what
    the last one needs of them.

    Attributes:
        weights: A, [layers, width, rank], zero at the start.
        seed: of which U follows; fixed.
        scale: the length of U's rows; fixed.
        base: the name and hash of the frozen model's file.
        everywhere: whether every token's state is changed so, not the last one's alone; fixed.

    Example:
        >>> import jax.numpy as jnp
        >>> from forwax import adapters
        >>> adapter = adapters.LastTokenAdapter(jnp.zeros((3, 8, 2)), seed=0)
        >>> adapter.num_layers, adapter.directions().shape
        (3, (3, 2, 8))
    """

    weights: Array
    seed: int = dataclasses.field(metadata={"static": True})
    scale: float = dataclasses.field(default=10.0, metadata={"static": True})
    base: Base = dataclasses.field(default=UNKNOWN, metadata={"static": True})
    everywhere: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def num_layers(self) -> int:
        """Behind how many of the last layers it acts."""
        return self.weights.shape[0]

    @property
    def changes_last_token_alone(self) -> bool:
        """Whether it does, so that all others may be cached."""
        return not self.everywhere

    def directions(self) -> np.ndarray:
        """U, [layers, rank, width]: orthogonal rows of length `scale`.

        Example:
            >>> import jax.numpy as jnp
            >>> from forwax import adapters
            >>> rows = adapters.LastTokenAdapter(jnp.zeros((1, 8, 2)), seed=0).directions()[0]
            >>> (rows @ rows.T).round(3).tolist()
            [[100.0, 0.0], [0.0, 100.0]]
        """
        num_layers, width, rank = self.weights.shape
        return self.scale * _orthonormal(self.seed, num_layers, width, rank)

    def per_layer(self) -> Any:
        """A and U, with the layers in front."""
        return self.weights, jnp.asarray(self.directions())

    def beside(self, own: Any, layer: Mapping[str, Any]) -> Mapping[str, Any]:
        """A layer's arrays as they are."""
        del own
        return layer

    def behind(self, own: Any, states: Array) -> Array:
        """The states [B, T, width] behind a layer with the last token's, or all, changed."""
        weights, directions = own
        changed = states if self.everywhere else states[:, -1]
        # The site is the product of `rank` values an example, not a matrix A U.
        coordinates = unit(changed) @ weights.astype(states.dtype)
        change = coordinates @ directions.astype(states.dtype)
        if self.everywhere:
            return states + change
        is_last = jnp.arange(states.shape[1]) == states.shape[1] - 1
        return states + jnp.where(is_last[None, :, None], change[:, None], 0)


@functools.cache
def _orthonormal(seed: int, num_layers: int, width: int, rank: int) -> np.ndarray:
    """Random orthonormal rows [layers, rank, width], the same under every version of the libraries.

    NumPy has promised that this old generator's numbers stay as they are.
    """
    normals = np.random.RandomState(seed).standard_normal((num_layers, width, rank))
    columns, triangle = np.linalg.qr(normals)
    # The one factor with a positive diagonal, whatever LAPACK prefers.
    signs = np.sign(np.diagonal(triangle, axis1=1, axis2=2))
    rows = np.moveaxis(columns * signs[:, None, :], 1, 2)
    return rows.astype(np.float32)


def last_token(
    config: LlamaConfig,
    rank: int,
    layers: int,
    key: Array,
    *,
    scale: float = 10.0,
    everywhere: bool = False,
) -> LastTokenAdapter:
    """Make an adapter of the last token's state behind the top layers, in float32.

    Args:
        config: the model's.
        rank: the number of directions in which a state is changed.
        layers: behind how many of the last layers.
        key: for the directions; a concrete one, so call it outside of `jax.jit`.
        scale: the length of the directions.
        everywhere: whether every token's state is changed, as a loss on all next tokens asks for;
            nothing can be cached then.

    Returns:
        The adapter, which changes nothing at first.

    Raises:
        ValueError: when the model has not as many layers, or the rank is not in [1, width].

    Example:
        >>> import jax
        >>> from forwax import adapters, lm
        >>> config = lm.LlamaConfig(
        ...     num_layers=2, width=8, num_heads=2, num_kv_heads=1, head_size=4, inner_width=16,
        ...     num_words=32, context=64,
        ... )
        >>> adapters.last_token(config, 4, 2, jax.random.key(0)).weights.shape
        (2, 8, 4)
    """
    check_rank("last_token", rank, config.width)
    check_layers("last_token", layers, config)
    weights = jnp.zeros((layers, config.width, rank), jnp.float32)
    seed = int(jax.random.bits(key, dtype=jnp.uint32))
    base = Base(config.name, config.sha256)
    return LastTokenAdapter(weights, seed, scale, base, everywhere)


def check_layers(caller: str, layers: int, config: LlamaConfig) -> None:
    """Raise a ValueError for more layers than the model has."""
    if isinstance(layers, int) and 1 <= layers <= config.num_layers:
        return
    raise ValueError(
        f"{caller}: expected a number of top layers in [1, {config.num_layers}], got {layers!r}."
    )
