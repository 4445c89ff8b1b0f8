"""What the last token needs of all earlier ones, computed once."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax.adapters.last_token import check_layers
from forwax.lm.config import LlamaConfig
from forwax.lm.model import (
    block,
    checked,
    embedded,
    layer_at,
    through_layers,
    visible,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """What the last token of each example needs of all that is frozen, made by `cached_prefix`.

    Every leaf has the examples in front, so that batches are rows of the leaves, and `in_axes` of a
    rule is 0. The leaves may be cast to float16 to be kept.

    Attributes:
        state: the last token's state in front of the top layers, [..., width].
        keys: of the earlier tokens in the top layers, [..., layers, T - 1, key heads, head_size].
        values: likewise.
        mask: which earlier tokens are no filling, booleans [..., T - 1].

    Example:
        ```python
        batch = jax.tree.map(lambda x: x[rows], prefix)
        ```
    """

    state: Array
    keys: Array
    values: Array
    mask: Array


def cached_prefix(
    config: LlamaConfig,
    params: Any,
    tokens: Any,
    *,
    layers: int,
    mask: Any = None,
) -> Prefix:
    """Compute what an adapter of the last token never changes.

    A step with it pushes one token an example through the top layers: `forwax.lm.forward(config,
    params, tokens, adapter=adapter, prefix=prefix)`.

    Args:
        config: from `forwax.lm.load_gguf`.
        params: from there.
        tokens: integers [..., T].
        layers: behind how many of the last layers the adapter acts.
        mask: booleans [..., T], as in `forwax.lm.forward`; texts stand on the right.

    Returns:
        The prefix; of an example the keys and values are 2 · layers · (T - 1) · key heads ·
        head_size numbers.

    Raises:
        TypeError: as `forwax.lm.forward`.
        ValueError: as that, or when the model has not as many layers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from forwax import adapters, lm
        >>> config = lm.LlamaConfig(
        ...     num_layers=2, width=8, num_heads=2, num_kv_heads=1, head_size=4, inner_width=16,
        ...     num_words=32, context=64,
        ... )
        >>> of_layers = {name: jnp.ones((2, *shape)) for name, shape in config.shapes().items()}
        >>> params = {
        ...     "layers": of_layers, "token_embd": jnp.ones((32, 8)), "output_norm": jnp.ones(8)
        ... }
        >>> prefix = adapters.cached_prefix(config, params, jnp.array([[1, 2, 3]]), layers=1)
        >>> prefix.state.shape, prefix.keys.shape
        ((1, 8), (1, 1, 2, 1, 4))
    """
    check_layers("cached_prefix", layers, config)
    tokens, mask = checked(config, tokens, mask)
    lead = tokens.shape[:-1]
    flat = tokens.reshape(-1, tokens.shape[-1])
    real = jnp.ones(flat.shape, bool) if mask is None else mask.reshape(flat.shape)
    sees = visible(flat, real)
    bottom = config.num_layers - layers
    states = embedded(params, flat)
    states = through_layers(config, params["layers"], states, sees, 0, bottom)

    def body(states: Array, index: Array) -> tuple[Array, tuple[Array, Array]]:
        states, (keys, values) = block(
            config,
            layer_at(params["layers"], index),
            states,
            sees,
        )
        # The last token's own follow from its state, which the adapter changes.
        return states, (keys[:, :-1], values[:, :-1])

    _, (keys, values) = lax.scan(body, states, jnp.arange(bottom, config.num_layers))

    def with_lead(x: Array) -> Array:
        return x.reshape(*lead, *x.shape[1:])

    return Prefix(
        state=with_lead(states[:, -1]),
        keys=with_lead(jnp.moveaxis(keys, 0, 1)),
        values=with_lead(jnp.moveaxis(values, 0, 1)),
        mask=with_lead(real[:, :-1]),
    )
