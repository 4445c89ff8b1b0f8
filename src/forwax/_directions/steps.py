"""How far finite differences move each parameter: far enough for its type to show it."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeGuard

import jax.numpy as jnp
import numpy as np
from jax import Array

from forwax import _tree
from forwax._programs.order import behind

_SPACINGS = 8


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is known before any trace."""
    return isinstance(value, int | float | np.number)


@dataclasses.dataclass(frozen=True, eq=False)
class Steps:
    """The steps of parameters along a direction: ε, or more where the floats are far apart.

    Attributes:
        epsilon: the step ε of parameters of ordinary size.
        by_leaf: whether all entries of a leaf have the same step, as factors of a direction need.
    """

    epsilon: float | Array
    by_leaf: bool = False

    def of(self, leaf: Array, one: Array | float = 1.0) -> Array:
        """The steps of a leaf, in at least float32: of its shape, or of size 1.

        They are made where `one` is known.
        """
        size = jnp.abs(leaf)
        wide = _tree.accumulation_dtype(size.dtype)
        unit = float(jnp.finfo(size.dtype).eps)
        share = jnp.asarray(_SPACINGS * unit * one)
        least = size * share.astype(size.dtype)
        if self.by_leaf and leaf.size:
            square = jnp.mean(
                size.astype(wide) ** 2,
                keepdims=True,
            )
            size = jnp.max(size, keepdims=True)
            # Products of factors do not round parameters, but formed ones do.
            typical = _SPACINGS * jnp.sqrt(square)
            most = jnp.maximum(typical, size.astype(wide))
            least = (unit * most).astype(size.dtype)
        # Whole spacings are not rounded when they are added: what is left of such a sum is one.
        whole = (size + least) - size
        epsilon = jnp.asarray(self.epsilon * one)
        return jnp.maximum(whole.astype(wide), epsilon.astype(wide))

    def shifted(
        self,
        leaf: Array,
        tangent: Array,
        sign: Array,
        known: Sequence[Array] = (),
    ) -> Array:
        """A leaf on one side of where it is, for a sign of 1 or -1, after what is known."""
        sign = behind(sign, known)
        # Entries' steps are made again on each side and for each leaf: kept, as what is constant
        # or the same for leaves of one shape is, they would be a copy of it.
        one = sign * sign if known else 1.0
        sign = sign.astype(leaf.dtype)
        step = self.of(leaf if self.by_leaf else sign * leaf, one)
        return leaf + sign * step.astype(leaf.dtype) * tangent

    def factor(self, leaf: Array) -> Array:
        """The factors s of a leaf: its steps, over ε."""
        steps = self.of(leaf)
        return steps / jnp.asarray(self.epsilon).astype(steps.dtype)

    def scaled(self, leaf: Array, tangents: Array) -> Array:
        """The directions s v along which slopes are taken, for v [c, *shape]."""
        return _wide(tangents) * self._factors(leaf, tangents)

    def divided(self, leaf: Array, tangents: Array) -> Array:
        """The directions v / s, whose sum is the estimate, for v [c, *shape]."""
        return _wide(tangents) / self._factors(leaf, tangents)

    def _factors(self, leaf: Array, tangents: Array) -> Array:
        """The factors [1, *shape], to be multiplied with tangents [c, *shape]."""
        factors = self.factor(leaf)[None]
        return factors.astype(_wide(tangents).dtype)


def _wide(tangents: Array) -> Array:
    """Tangents in at least float32."""
    dtype = _tree.accumulation_dtype(tangents.dtype)
    return tangents.astype(dtype)
