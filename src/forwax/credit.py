"""Which terms of a loss a site hears along an axis, beside those that its noise can change."""

# pyright: strict, reportUnknownMemberType=false

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from forwax import _tree
from forwax._checks import register_checked


@register_checked
@dataclasses.dataclass(frozen=True)
class Decay:
    """Terms of the loss count less, the further behind the noise's own position they stand.

    Noise at position s of a causal model changes the terms c_t with t ≥ s, and without this its
    slope is their sum. With it the slope is Σ_{t ≥ s} gamma^(t - s)·c_t: most of the signal is
    near, and each further term adds as much noise. For gamma < 1 the estimate is biased; 0 leaves
    the position's own term alone, and 1 changes nothing. Where noise at s changes earlier terms
    instead (a mask that looks ahead, a scan that runs backwards), or a window around s, the
    exponent is |t - s|. Sites whose positions are not told apart, or change their own term alone,
    stay as they are: `forwax.explain` says which.

    Attributes:
        gamma: the factor for one position further, a scalar in [0, 1], without a unit.

    Raises:
        ValueError: when gamma is known and no scalar in [0, 1].

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> def loss(w, x):  # [positions, features]
        ...     mean = jnp.cumsum(jnp.tanh(x @ w["in"]), axis=0) / 3
        ...     return jnp.sum(jnp.tanh(mean @ w["mid"]) @ w["out"])
        >>> w = {"in": jnp.ones((2, 4)), "mid": jnp.ones((4, 4)), "out": jnp.ones((4, 1))}
        >>> rule = fx.ActivityPerturbation(credit=fx.credit.Decay(0.9))
        >>> x = jnp.ones((5, 3, 2))
        >>> fx.grad(loss, rule, in_axes=(None, 0))(jax.random.key(0), w, x)["in"].shape
        (2, 4)
        >>> fx.explain(loss, rule, in_axes=(None, 0))(w, x).rows[0].credit
        'one slope per example and position of axis 0, later terms decaying'
        >>> rule.unbiased, fx.ActivityPerturbation(credit=fx.credit.Decay(1.0)).unbiased
        (False, True)
    """

    gamma: float | Array

    def __post_init__(self) -> None:
        # Transformations put other things in the place of leaves, which pass.
        known = _known(self.gamma)
        if known is None:
            return
        if known.shape != () or not 0 <= known <= 1:
            raise ValueError(
                "credit.Decay: expected gamma to be a scalar in [0, 1], 0 for a position's own "
                f"term alone and 1 for all that it changes, got {self.gamma}."
            )

    @property
    def unbiased(self) -> bool:
        """Whether gamma is known to be 1."""
        known = _known(self.gamma)
        return known is not None and bool(known == 1)

    @property
    def rate(self) -> Array | None:
        """The factor; None where it is known to be 1."""
        return None if self.unbiased else jnp.asarray(self.gamma)


def _known(gamma: Any) -> np.ndarray | None:
    """The factor as NumPy's, unless it is traced."""
    # In a tree of something else, of axes for instance, it is no number.
    is_number = isinstance(gamma, int | float | np.ndarray | np.number)
    is_array = isinstance(gamma, jax.Array) and not _tree.is_abstract(gamma)
    return np.asarray(cast(Any, gamma)) if is_number or is_array else None
