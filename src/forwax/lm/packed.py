"""Matrices of small integers and scales, as the blocks of a GGUF file hold them."""

import dataclasses
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BLOCK = 32
"""Weights that share a scale; blocks run along the input axis."""

ROWS_AT_A_TIME = 1024
"""How many rows of a head are unpacked at a time."""

_ZERO_OF_Q4_0 = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """Matrices [..., out, in] in blocks of 32 entries w = d q + m along the input axis.

    Made by `forwax.lm.load_gguf` with `packed=True`. Their entries are formed where a product needs
    them, of one layer, or one block of words, at a time. They are not trained: pass them to a loss
    as an argument that is not differentiated.

    Attributes:
        quants: q, int8 [..., out, in / 32, 32], or two of four bits in a byte, uint8 [..., out, in
            / 32, 16]: the low halves are a block's entries 0 to 15, the high ones 16 to 31.
        scale: d, float16 [..., out, in / 32].
        offset: m, float16 [..., out, in / 32]; None where it is -8 d for four bits (Q4_0), and 0
            for eight (Q8_0).

    Example:
        >>> import jax.numpy as jnp
        >>> from forwax.lm import Packed
        >>> ones = jnp.ones((2, 1), jnp.float16)
        >>> packed = Packed(jnp.full((2, 1, 16), 0x21, jnp.uint8), ones, -ones)
        >>> packed.shape, packed.dense(jnp.float32)[0, ::16].tolist()
        ((2, 32), [0.0, 1.0])
    """

    quants: Any
    scale: Any
    offset: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrices."""
        *lead, num_blocks = self.scale.shape
        return (*lead, num_blocks * BLOCK)

    def rows(self, index: Any) -> "Packed":
        """What stands at an index of the first axis: layers of a stack, or rows of a matrix."""
        return jax.tree.map(lambda x: x[index], self)

    def dense(self, dtype: Any, module: ModuleType = jnp) -> Any:
        """The entries [..., out, in], computed in float32; `module` is `jax.numpy` or `numpy`."""
        # [..., out, in / 32, 1]
        scale = self.scale.astype(np.float32)[..., None]
        entries = self._integers(module).astype(np.float32) * scale
        if self.offset is not None:
            entries = entries + self.offset.astype(np.float32)[..., None]
        return entries.reshape(self.shape).astype(dtype)

    def products(self, inputs: Any) -> jax.Array:
        """Products [N, out] of inputs [N, in] with a matrix, of which some rows are unpacked.

        Example:
            >>> import jax.numpy as jnp
            >>> from forwax.lm import Packed
            >>> packed = Packed(jnp.ones((2, 1, 32), jnp.int8), jnp.ones((2, 1), jnp.float16))
            >>> packed.products(jnp.ones((1, 32))).tolist()
            [[32.0, 32.0]]
        """

        # Reverse mode would keep what is unpacked; so it unpacks it again.
        @jax.checkpoint
        def of_row(row: Packed) -> jax.Array:
            # [N]
            return inputs @ row.dense(inputs.dtype)

        return lax.map(of_row, self, batch_size=ROWS_AT_A_TIME).T

    def _integers(self, module: ModuleType) -> Any:
        """The blocks' entries q [..., out, in / 32, 32]."""
        if self.quants.dtype == np.int8:
            return self.quants
        # Two entries in a byte, half a block apart.
        low = self.quants & np.uint8(0xF)
        high = self.quants >> np.uint8(4)
        both = module.concatenate([low, high], axis=-1).astype(np.int8)
        return both if self.offset is not None else both - np.int8(_ZERO_OF_Q4_0)


def rows_of(table: Any, index: Any, dtype: Any) -> Any:
    """The rows at an index of a matrix, packed or plain, in the dtype of what they meet."""
    if isinstance(table, Packed):
        return table.rows(index).dense(dtype)
    return table[index]
