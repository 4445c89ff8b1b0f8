"""Products of two thin matrices beside those of the layers."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from forwax.adapters.base import UNKNOWN, Base, check_rank
from forwax.lm.config import LlamaConfig
from forwax.lm.model import linear
from forwax.lm.packed import Packed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraAdapter:
    """Low-rank changes of some of a model's matrices: W x becomes W x + scale · up (down x).

    Hu et al. 2021, arXiv 2106.09685. Made by `lora`; all leaves are trained.

    Attributes:
        down: [layers, in, rank] of each adapted matrix, by its name.
        up: [layers, rank, out] of each, zero at the start.
        scale: what the change is multiplied by; fixed.
        base: the name and hash of the frozen model's file.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from forwax import adapters
        >>> params = {"layers": {"attn_q": jnp.ones((2, 6, 4)), "attn_norm": jnp.ones((2, 4))}}
        >>> adapter = adapters.lora(params, 3, "attn", jax.random.key(0))
        >>> jax.tree.map(jnp.shape, (adapter.down, adapter.up))
        ({'attn_q': (2, 4, 3)}, {'attn_q': (2, 3, 6)})
    """

    down: Mapping[str, Array]
    up: Mapping[str, Array]
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    base: Base = dataclasses.field(default=UNKNOWN, metadata={"static": True})

    @property
    def num_layers(self) -> int:
        """It acts in all layers."""
        return next(iter(self.down.values())).shape[0]

    @property
    def changes_last_token_alone(self) -> bool:
        """It changes all tokens."""
        return False

    def per_layer(self) -> Any:
        """The factors, with the layers in front."""
        return self.down, self.up

    def beside(self, own: Any, layer: Mapping[str, Any]) -> Mapping[str, Any]:
        """A layer's arrays, with a product of its own beside the adapted matrices."""
        down, up = own
        adapted = {
            name: WithFactors(layer[name], down[name], up[name], self.scale)
            for name in down
        }
        return {**layer, **adapted}

    def behind(self, own: Any, states: Array) -> Array:
        """Nothing is added behind layers."""
        del own
        return states


@dataclasses.dataclass(frozen=True)
class WithFactors:
    """A layer's matrix, plain or packed, and its change."""

    matrix: Any
    down: Array
    up: Array
    scale: float

    def times(self, inputs: Array) -> Array:
        """Products [..., out] of inputs [..., in]; the factors are never multiplied."""
        down = self.down.astype(inputs.dtype)
        up = self.up.astype(inputs.dtype)
        # Two thin products: [..., rank], then [..., out].
        return linear(inputs, self.matrix) + self.scale * ((inputs @ down) @ up)


def lora(
    params: Any,
    rank: int,
    where: str | Callable[[str], bool] | None,
    key: Array,
    *,
    scale: float = 1.0,
    config: LlamaConfig | None = None,
) -> LoraAdapter:
    """Make a low-rank adapter of the matrices of a model's layers, in float32.

    Down factors are normals of variance 1 / in, up factors zero, so that nothing changes at first.

    Args:
        params: from `forwax.lm.load_gguf`, packed or not.
        rank: the rank of the changes.
        where: which matrices: a regular expression searched in a parameter's path such as
            "['layers']['attn_q']", or a function of that path; None for all. Norms, the embedding
            and the head are never adapted.
        key: for the down factors.
        scale: what changes are multiplied by.
        config: the model's, whose name and hash are kept for `save`.

    Returns:
        The adapter.

    Raises:
        ValueError: when no matrix is selected, or the rank is none that all can have.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from forwax import adapters
        >>> layers = {"attn_q": jnp.ones((2, 6, 4)), "attn_k": jnp.ones((2, 6, 4))}
        >>> adapter = adapters.lora({"layers": layers}, 3, "attn_[qv]", jax.random.key(0))
        >>> sorted(adapter.down)
        ['attn_q']
    """
    # Norms have two axes.
    matrices = {
        name: matrix
        for name, matrix in params["layers"].items()
        if len(matrix.shape) == 3
    }
    selected = _selection(where)
    names = [name for name in matrices if selected(f"['layers']['{name}']")]
    if not names:
        raise ValueError(
            f"lora: expected `where` to select some of {', '.join(matrices)}, in paths such as "
            f"['layers']['attn_q'], got {where!r}, which selects none."
        )
    check_rank("lora", rank, min(min(matrices[name].shape[1:]) for name in names))
    keys = jax.random.split(key, len(names))
    down: dict[str, Array] = {}
    up: dict[str, Array] = {}
    for name, own in zip(names, keys, strict=True):
        num_layers, num_out, num_in = matrices[name].shape
        noise = jax.random.normal(own, (num_layers, num_in, rank), jnp.float32)
        down[name] = noise * num_in**-0.5
        up[name] = jnp.zeros((num_layers, rank, num_out), jnp.float32)
    base = UNKNOWN if config is None else Base(config.name, config.sha256)
    return LoraAdapter(down, up, scale, base)


def _selection(where: str | Callable[[str], bool] | None) -> Callable[[str], bool]:
    if where is None:
        return lambda path: True
    if isinstance(where, str):
        return lambda path: re.search(where, path) is not None
    return where


def merge(params: Any, adapter: Any) -> Any:
    """The parameters with a low-rank adapter's changes added: W + scale · (down up)ᵀ.

    Args:
        params: from `forwax.lm.load_gguf`, not packed.
        adapter: from `lora`.

    Returns:
        Parameters with which `forwax.lm.forward` gives what it gives with the adapter, up to
        rounding.

    Raises:
        ValueError: for another adapter, whose change is none of a matrix, and for packed matrices,
            which have no room for it.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from forwax import adapters
        >>> params = {"layers": {"attn_q": jnp.ones((2, 6, 4))}}
        >>> adapter = adapters.lora(params, 3, None, jax.random.key(0))
        >>> float(adapters.merge(params, adapter)["layers"]["attn_q"].sum())
        48.0
    """
    if not isinstance(adapter, LoraAdapter):
        raise ValueError(
            "merge: expected an adapter of adapters.lora, whose changes are matrices, got "
            f"{type(adapter).__name__}. Keep it beside the model."
        )
    layers = dict(params["layers"])
    for name, down in adapter.down.items():
        matrix = layers[name]
        if isinstance(matrix, Packed):
            raise ValueError(
                f"merge: expected plain matrices, but {name} is packed, in which a change would "
                "be lost. Load the model without packed=True."
            )
        change = jnp.einsum("lir,lro->loi", down, adapter.up[name])
        wide = matrix.astype(change.dtype) + adapter.scale * change
        layers[name] = wide.astype(matrix.dtype)
    return {**params, "layers": layers}
