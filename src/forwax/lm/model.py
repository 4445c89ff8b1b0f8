"""The forward pass."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax._tree import accumulation_dtype
from forwax.lm.config import LlamaConfig
from forwax.lm.packed import Packed, rows_of

Layer = Mapping[str, Any]
"""The arrays of one layer by their names, or of all layers with these in front."""


class Adapter(Protocol):
    """What `forward` asks of an adapter; see `forwax.adapters`."""

    @property
    def num_layers(self) -> int:
        """In how many of the last layers it acts."""
        ...

    @property
    def changes_last_token_alone(self) -> bool:
        """Whether all earlier tokens stay as they are."""
        ...

    def per_layer(self) -> Any:
        """What it has of each of its layers, with these in front of every leaf."""
        ...

    def beside(self, own: Any, layer: Layer) -> Layer:
        """A layer's arrays, with products of its own beside those that it adapts."""
        ...

    def behind(self, own: Any, states: Array) -> Array:
        """The states [B, T, width] behind a layer, of which it may change the last token's."""
        ...


def forward(
    config: LlamaConfig,
    params: Any,
    tokens: Any,
    *,
    mask: Any = None,
    adapter: Any = None,
    prefix: Any = None,
    checkpoint: bool = False,
) -> Array:
    """The logits of the next word at each token.

    One `lax.scan` goes over the layers. Packed matrices are unpacked inside its body, the
    embedding's rows where they are looked up, and a packed head some words at a time.

    Args:
        config: from `load_gguf`.
        params: from `load_gguf`. Pass them to a jitted function as an argument: what it closes over
            becomes a constant, which is held twice.
        tokens: integers [..., T], each in [0, num_words).
        mask: booleans [..., T], False where a token only fills up a shorter text, which stands on
            the right: pad on the left. Nothing looks at such tokens, and their own logits mean
            nothing. Positions are relative, so that padding changes nothing else.
        adapter: from `forwax.adapters`, or None.
        prefix: from `forwax.adapters.cached_prefix`: what the last token needs of all others. The
            tokens and the mask are the prefix's own then, and are not looked at.
        checkpoint: whether reverse mode keeps the states between layers alone, and computes each
            layer again on its way back. Other modes take no notice.

    Returns:
        Logits [..., T, num_words] in the parameters' dtype; with a prefix those of the last token
        alone, [..., num_words].

    Raises:
        TypeError: when tokens are no integers, or the mask no booleans.
        ValueError: when shapes do not fit, or a prefix is given without an adapter that acts on the
            last token of as many layers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from forwax import lm
        >>> config = lm.LlamaConfig(
        ...     num_layers=2, width=8, num_heads=2, num_kv_heads=1, head_size=4, inner_width=16,
        ...     num_words=32, context=64,
        ... )
        >>> layers = {name: jnp.ones((2, *shape)) for name, shape in config.shapes().items()}
        >>> params = {"layers": layers, "token_embd": jnp.ones((32, 8)), "output_norm": jnp.ones(8)}
        >>> lm.forward(config, params, jnp.array([[1, 2, 3]])).shape
        (1, 3, 32)
    """
    states = hidden(
        config,
        params,
        tokens,
        mask=mask,
        adapter=adapter,
        prefix=prefix,
        checkpoint=checkpoint,
    )
    head = params.get("output", params["token_embd"])
    # Flat positions: noise is added to [N, num_words] in place, to [B, T, num_words] it is not.
    flat = states.reshape(-1, config.width)
    logits = head.products(flat) if isinstance(head, Packed) else linear(flat, head)
    return logits.reshape(*states.shape[:-1], -1)


def hidden(
    config: LlamaConfig,
    params: Any,
    tokens: Any,
    *,
    mask: Any = None,
    adapter: Any = None,
    prefix: Any = None,
    checkpoint: bool = False,
) -> Array:
    """The states behind the last norm, of which the head makes logits.

    With `forwax.losses.linear_cross_entropy` the logits need not be held.

    Args:
        config: as in `forward`.
        params: as in `forward`.
        tokens: as in `forward`.
        mask: as in `forward`.
        adapter: as in `forward`.
        prefix: as in `forward`.
        checkpoint: as in `forward`.

    Returns:
        States [..., T, width]; with a prefix [..., width].

    Raises:
        TypeError: as `forward`.
        ValueError: as `forward`.

    Example:
        ```python
        states = lm.hidden(config, params, tokens)
        head = params.get("output", params["token_embd"])
        losses = linear_cross_entropy(states[:, :-1], head, tokens[:, 1:])
        ```
    """
    # Below the adapter's layers nothing is trained.
    num_adapted = 0 if adapter is None else adapter.num_layers
    if num_adapted > config.num_layers:
        raise ValueError(
            f"forward: expected an adapter of at most {config.num_layers} layers, got one of "
            f"{num_adapted}. Make it with this model's config."
        )
    if prefix is not None:
        states = _behind_prefix(config, params, adapter, prefix, checkpoint)
        return norm(states, params["output_norm"], config)
    tokens, mask = checked(config, tokens, mask)
    # [B, T]
    flat = tokens.reshape(-1, tokens.shape[-1])
    flat_mask = None if mask is None else mask.reshape(flat.shape)
    states = embedded(params, flat)
    sees = visible(flat, flat_mask)
    layers = params["layers"]
    bottom = config.num_layers - num_adapted
    again = checkpoint and adapter is None
    # Below an adapter nothing is trained, so nothing is kept.
    states = through_layers(config, layers, states, sees, 0, bottom, again)
    if adapter is not None:
        states = _through_adapted(
            config,
            layers,
            states,
            sees,
            adapter,
            checkpoint=checkpoint,
        )
    states = norm(states, params["output_norm"], config)
    return states.reshape(*tokens.shape, config.width)


def checked(config: LlamaConfig, tokens: Any, mask: Any) -> tuple[Array, Array | None]:
    """Tokens [..., T] and a mask of the same shape, as arrays."""
    tokens = jnp.asarray(tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"forward: expected integers as tokens, got {tokens.dtype}.")
    if tokens.ndim < 1 or not tokens.shape[-1]:
        raise ValueError(
            f"forward: expected tokens [..., T] with T >= 1, got shape {tokens.shape}."
        )
    if tokens.shape[-1] > config.context:
        raise ValueError(
            f"forward: expected at most the context's {config.context} tokens, got "
            f"{tokens.shape[-1]}. Cut the text."
        )
    if mask is None:
        return tokens, None
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"forward: expected booleans as the mask, got {mask.dtype}.")
    if mask.shape != tokens.shape:
        raise ValueError(
            f"forward: expected a mask of the tokens' shape {tokens.shape}, got {mask.shape}."
        )
    return tokens, mask


def embedded(params: Any, tokens: Array) -> Array:
    """The states [B, T, width] in front of the first layer."""
    return rows_of(params["token_embd"], tokens, params["output_norm"].dtype)


def visible(tokens: Array, mask: Array | None) -> Array:
    """Which tokens may be looked at, booleans [B, 1, T]: those that are no filling."""
    real = jnp.ones((1, tokens.shape[-1]), bool) if mask is None else mask
    return real[:, None, :]


def through_layers(
    config: LlamaConfig,
    layers: Layer,
    states: Array,
    sees: Array,
    start: int,
    stop: int,
    checkpoint: bool = False,
) -> Array:
    """The states [B, T, width] behind the layers from start to stop."""

    def body(states: Array, layer: Layer) -> tuple[Array, None]:
        states, _ = block(config, layer, states, sees)
        return states, None

    def body_at(states: Array, index: Array) -> tuple[Array, None]:
        return body(states, layer_at(layers, index))

    if (start, stop) == (0, config.num_layers):
        whole = jax.checkpoint(body) if checkpoint else body
        return lax.scan(whole, states, layers)[0]
    # A slice of the stack would be a copy of its layers; one at a time is not.
    return lax.scan(body_at, states, jnp.arange(start, stop))[0]


def layer_at(layers: Layer, index: Array) -> Any:
    """One layer of the stack."""
    take = lax.dynamic_index_in_dim
    return jax.tree.map(lambda x: take(x, index, keepdims=False), layers)


def _through_adapted(
    config: LlamaConfig,
    layers: Layer,
    states: Array,
    sees: Array,
    adapter: Adapter,
    earlier: tuple[Array, Array] | None = None,
    checkpoint: bool = False,
) -> Array:
    """The states [B, T, width] behind the adapter's layers; of `earlier` see `block`.

    The last layer stands by itself, so that its adapter's error is known without crossing another:
    a loop has no last product, and `forwax.LearnedFeedback` would find no error to hand back.
    """
    first = config.num_layers - adapter.num_layers

    def body(carry: tuple[Array, Array], step: Any) -> tuple[tuple[Array, Array], None]:
        states, index = carry
        following, own, earlier = step
        layer = adapter.beside(own, layer_at(layers, index))
        states, _ = block(config, layer, states, sees, earlier)
        return (adapter.behind(own, states), following), None

    if checkpoint:
        body = jax.checkpoint(body)
    # The loop hands on the last index, or else XLA would take the last layer's arrays from the
    # stack before the loop and hold them all the while.
    carry = (states, jnp.asarray(first))
    following = jnp.arange(first + 1, config.num_layers + 1)
    steps = (following, adapter.per_layer(), earlier)
    if adapter.num_layers > 1:
        carry, _ = lax.scan(body, carry, jax.tree.map(lambda x: x[:-1], steps))
    (states, _), _ = body(carry, jax.tree.map(lambda x: x[-1], steps))
    return states


def _behind_prefix(
    config: LlamaConfig,
    params: Any,
    adapter: Adapter | None,
    prefix: Any,
    checkpoint: bool,
) -> Array:
    """The last token's states [..., width] behind the last layer."""
    *lead, num_kept, num_earlier, heads, size = prefix.keys.shape
    is_fit = adapter is not None and adapter.changes_last_token_alone
    num_adapted = adapter.num_layers if adapter is not None and is_fit else 0
    if adapter is None or num_kept != num_adapted:
        raise ValueError(
            f"forward: the prefix holds what the last token needs in the {num_kept} top layers, so "
            f"expected an adapter that acts there, got one of {num_adapted} layers. Use "
            "adapters.last_token and adapters.cached_prefix with the same number of layers."
        )
    dtype = params["output_norm"].dtype
    # [B, 1, width]
    states = prefix.state.reshape(-1, 1, config.width).astype(dtype)
    batch = len(states)

    def layers_in_front(x: Array) -> Array:
        stacked = x.reshape(batch, num_kept, num_earlier, heads, size)
        return jnp.moveaxis(stacked, 1, 0).astype(dtype)

    earlier = (layers_in_front(prefix.keys), layers_in_front(prefix.values))
    # The last token is never filling.
    itself = jnp.ones((batch, 1), bool)
    sees = jnp.concatenate([prefix.mask.reshape(batch, num_earlier), itself], axis=1)
    states = _through_adapted(
        config,
        params["layers"],
        states,
        sees[:, None],
        adapter,
        earlier,
        checkpoint,
    )
    return states.reshape(*lead, config.width)


def block(
    config: LlamaConfig,
    layer: Layer,
    states: Array,
    sees: Array,
    earlier: tuple[Array, Array] | None = None,
) -> tuple[Array, tuple[Array, Array]]:
    """One layer: states [B, T, width] behind it, and its keys and values [B, T, heads, head_size].

    With `earlier` keys and values [B, S, heads, head_size] stand in front of the tokens' own;
    `sees` is [B, 1, S + T], whether a token is no filling; each looks at those up to it alone.
    """
    inputs = norm(states, layer["attn_norm"], config)
    first = 0 if earlier is None else earlier[0].shape[1]
    positions = first + jnp.arange(states.shape[1])
    queries = _heads(linear(inputs, layer["attn_q"]), config)
    keys = _heads(linear(inputs, layer["attn_k"]), config)
    values = _heads(linear(inputs, layer["attn_v"]), config)
    queries = rotated(queries, positions, config.rope_base)
    keys = rotated(keys, positions, config.rope_base)
    # Keys are kept turned: their positions never change.
    own = (keys, values)
    if earlier is not None:
        keys = jnp.concatenate([earlier[0], keys], axis=1)
        values = jnp.concatenate([earlier[1], values], axis=1)
    mixed = _attention(queries, keys, values, sees)
    states = states + linear(mixed, layer["attn_output"])
    # SwiGLU: Shazeer 2020, arXiv 2002.05202.
    inputs = norm(states, layer["ffn_norm"], config)
    gate = jax.nn.silu(linear(inputs, layer["ffn_gate"]))
    inner = gate * linear(inputs, layer["ffn_up"])
    return states + linear(inner, layer["ffn_down"]), own


def linear(inputs: Array, matrix: Any) -> Array:
    """Products [..., out] of inputs [..., in] with a matrix [out, in], packed, adapted or plain."""
    if isinstance(matrix, Packed):
        return inputs @ matrix.dense(inputs.dtype).T
    if hasattr(matrix, "times"):
        return matrix.times(inputs)
    return jnp.einsum("...i,oi->...o", inputs, matrix)


def norm(states: Array, gain: Array, config: LlamaConfig) -> Array:
    """States divided by their root mean square, times a gain."""
    gain = lax.expand_dims(gain, range(states.ndim - 1))
    return unit(states, config.rms_epsilon) * gain


def unit(states: Array, epsilon: float = 1e-5) -> Array:
    """States divided by their root mean square, in at least float32 (arXiv 1910.07467)."""
    wide = states.astype(accumulation_dtype(states.dtype))
    mean_square = jnp.mean(wide**2, axis=-1, keepdims=True)
    return (wide * lax.rsqrt(mean_square + epsilon)).astype(states.dtype)


def rotated(x: Array, positions: Array, base: float) -> Array:
    """Heads [B, T, heads, head_size] turned by their positions, each pair of neighbours by itself.

    Su et al. 2021, arXiv 2104.09864. The files' queries and keys are permuted for neighbours; on
    halves, as in the original checkpoints, every logit would be wrong.
    """
    half = x.shape[-1] // 2
    wide = accumulation_dtype(x.dtype)
    frequencies = base ** (-jnp.arange(half, dtype=wide) / half)
    angles = positions.astype(wide)[:, None] * frequencies[None, :]
    # [1, T, 1, head_size / 2]
    cosine = jnp.cos(angles)[None, :, None, :]
    sine = jnp.sin(angles)[None, :, None, :]
    even = x[..., 0::2].astype(wide)
    odd = x[..., 1::2].astype(wide)
    turned = [even * cosine - odd * sine, even * sine + odd * cosine]
    return jnp.stack(turned, axis=-1).reshape(x.shape).astype(x.dtype)


def _heads(x: Array, config: LlamaConfig) -> Array:
    return x.reshape(*x.shape[:-1], -1, config.head_size)


def _attention(queries: Array, keys: Array, values: Array, sees: Array) -> Array:
    """Mixed values [B, T, heads · head_size]; each key head serves a group of query heads."""
    batch, num_tokens, num_heads, size = queries.shape
    grouped = queries.reshape(batch, num_tokens, keys.shape[2], -1, size)
    # [B, key heads, group, T, S]
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, keys)
    scores = scores.astype(accumulation_dtype(scores.dtype)) * size**-0.5
    lowest = jnp.finfo(scores.dtype).min
    # Each token looks at itself, also one of filling, which else would look at all alike; so rules
    # find that none hears of later ones.
    num_keys = scores.shape[-1]
    offset = num_keys - num_tokens
    causal = jnp.tril(jnp.ones((num_tokens, num_keys), bool), offset)
    itself = jnp.eye(num_tokens, num_keys, offset, dtype=bool)
    seen = jnp.where(sees[:, None, None], scores, lowest)
    seen = jnp.where(itself[None, None, None], scores, seen)
    scores = jnp.where(causal[None, None, None], seen, lowest)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    mixed = jnp.einsum("bkgts,bskd->btkgd", weights, values)
    return mixed.reshape(batch, num_tokens, num_heads * size)
