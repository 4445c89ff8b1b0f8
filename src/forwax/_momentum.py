"""Momentum that remembers keys and slopes instead of a copy of the parameters."""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
from jax import Array

from forwax._checks import check_no_text, register_checked, set_counts
from forwax._rules import WeightPerturbation
from forwax._safety import Safe
from forwax._signature import check_key
from forwax.tangents._base import typed_key


@register_checked
@dataclasses.dataclass(frozen=True, eq=False)
class Momentum:
    """Heavy-ball momentum m_t = decay · m_{t-1} + ĝ_t in factored form, for `forwax.update`.

    An estimate is slopes times tangents, which the step's key draws again. So

        m_t = Σ_{s < window} decay^s ĝ_{t-s},    ĝ_t = Σ_j c_{t,j} v_j(key_t)

    needs the keys and the k slopes of the last `window` steps, a dozen bytes a step at k = 1, in
    place of an array like the parameters. What is older is left out: of the whole weight 1 / (1 -
    decay) a share of decay^window, which is 0.1 % at the defaults and below the rounding of float32
    from `window=152` on.

    The price is time: each step draws window · k tangents and adds them to the parameters. With
    `tangents.LowRank` that is as much arithmetic as a forward pass of window · k · rank rows, and a
    pass over the parameters for each eight of them; dense tangents are drawn in full. In low
    precision the parameters are rounded after each such pass. Where the memory for a copy of the
    parameters is at hand, an optimiser's own momentum on `forwax.value_and_grad` is faster.

    Attributes:
        decay: what a step leaves of the momentum, from 0 to below 1; may be an array.
        window: how many steps are remembered.
        keys: the data of their keys [window, words], in a ring; None until `init` or the first step
            makes it.
        coefficients: the weights of their tangents [window, k], or [window, k, examples] with
            `per_example=True`; None like the keys.
        num_steps: how many steps were made.

    Raises:
        ValueError: when the window is not a positive integer, or the decay is no such number.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> loss = lambda w: jnp.sum(w**2)
        >>> def step(key, w, momentum):
        ...     return fx.update(loss, learning_rate=1e-3, momentum=momentum)(key, w)
        >>> step, w = jax.jit(step, donate_argnums=(1, 2)), jnp.ones(50)
        >>> momentum = fx.Momentum(decay=0.9, window=32)
        >>> momentum = momentum.init(jax.random.key(0), fx.WeightPerturbation())
        >>> for i in range(20):
        ...     value, w, momentum = step(jax.random.key(i), w, momentum)
        >>> int(momentum.num_steps), momentum.coefficients.shape
        (20, (32, 1))
    """

    decay: float | Array = 0.9
    window: int = dataclasses.field(default=66, metadata={"static": True})
    keys: Array | None = None
    coefficients: Array | None = None
    num_steps: Array | None = None

    def __post_init__(self) -> None:
        set_counts(self, "window")
        check_no_text(self, "decay")
        if isinstance(self.decay, int | float) and not 0 <= self.decay < 1:
            raise ValueError(
                f"Momentum: expected decay from 0 to below 1, got {self.decay}."
            )

    def init(
        self,
        key: Array,
        rule: WeightPerturbation | Safe,
        num_examples: int | None = None,
    ) -> "Momentum":
        """The momentum before the first step, so that its structure stays the same in all steps.

        Args:
            key: any key of the kind that the steps will get.
            rule: the rule of the steps.
            num_examples: how many examples a step has, needed with `per_example=True`.

        Raises:
            ValueError: when the number of examples is needed and missing.
        """
        key = check_key(
            key,
            "Momentum.init",
            advice="Pass any key of the kind that the steps will get.",
        )
        weight = cast(WeightPerturbation, rule.inner)
        shape: tuple[int, ...] = (weight.num_tangents,)
        if weight.by_example:
            if num_examples is None:
                raise ValueError(
                    "Momentum.init: a rule with per_example=True has a slope for each example: "
                    "expected num_examples, got None."
                )
            shape = (*shape, num_examples)
        keys, coefficients, num_steps = self._ring(
            typed_key(key), shape, jnp.dtype(jnp.float32)
        )
        return dataclasses.replace(
            self, keys=keys, coefficients=coefficients, num_steps=num_steps
        )

    def add(self, key: Array, coefficients: Array) -> "Momentum":
        """The momentum with one more step.

        Args:
            key: the step's typed key.
            coefficients: the weights of its tangents [k] or [k, examples].
        """
        keys = self.keys
        weights = self.coefficients
        num_steps = self.num_steps
        if keys is None or weights is None or num_steps is None:
            keys, weights, num_steps = self._ring(
                key, coefficients.shape, coefficients.dtype
            )
        data = jax.random.key_data(key)
        got = (data.shape, coefficients.shape)
        expected = (keys.shape[1:], weights.shape[1:])
        if got != expected:
            raise ValueError(
                f"Momentum: expected a key of {expected[0]} words and slopes {list(expected[1])} "
                f"in each step, got {got[0]} and {list(got[1])}. Make it with "
                "momentum.init(key, rule) for the rule that is used."
            )
        at = num_steps % self.window  # the oldest step's place
        return dataclasses.replace(
            self,
            keys=keys.at[at].set(data),
            coefficients=weights.at[at].set(coefficients.astype(weights.dtype)),
            num_steps=num_steps + 1,
        )

    def last(self, impl: str) -> tuple[Array, Array, Array]:
        """Of the steps in the ring the typed keys [window], the weights, and how many they are.

        The weights of step t - s are decay^s · c.
        """
        assert self.keys is not None
        assert self.coefficients is not None
        assert self.num_steps is not None
        weights = self.coefficients  # [window, k] or [window, k, examples]
        places = jnp.arange(self.window)
        ages = (self.num_steps - 1 - places) % self.window
        decays = jnp.asarray(self.decay, weights.dtype) ** ages.astype(weights.dtype)
        ones = [1] * (weights.ndim - 1)
        decays = decays.reshape(-1, *ones)  # [window, 1] or [window, 1, 1]
        keys = jax.random.wrap_key_data(self.keys, impl=impl)
        num_held = jnp.minimum(self.num_steps, self.window)
        return keys, decays * weights, num_held

    def _ring(
        self,
        key: Array,
        shape: tuple[int, ...],
        dtype: jnp.dtype,
    ) -> tuple[Array, Array, Array]:
        """Keys, weights and the number of steps before the first one."""
        data = jax.random.key_data(key)
        keys = jnp.zeros((self.window, *data.shape), data.dtype)
        coefficients = jnp.zeros((self.window, *shape), dtype)
        return keys, coefficients, jnp.int32(0)
