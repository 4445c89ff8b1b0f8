"""Momentum that remembers keys and slopes instead of a copy of the parameters."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array

from forwax._checks import check_count, check_no_text, register_checked, set_counts
from forwax._rules import Rule, WeightPerturbation
from forwax._signature import check_key
from forwax._slopes import Slopes, check_form
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
        keys: the data of their keys [window, s, words], in a ring, with s = 1 in `forwax.update`;
            None until `init` or the first step makes it.
        coefficients: the weights of their tangents [window, s, k], or [window, s, k, examples]
            with `per_example=True`; None like the keys.
        num_steps: how many steps were made.
        impl: the keys' generator; None like the keys.

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
        (20, (32, 1, 1))
    """

    decay: float | Array = 0.9
    window: int = dataclasses.field(default=66, metadata={"static": True})
    keys: Array | None = None
    coefficients: Array | None = None
    num_steps: Array | None = None
    impl: str | None = dataclasses.field(default=None, metadata={"static": True})

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
        rule: Rule,
        num_examples: int | None = None,
        num_keys: int = 1,
    ) -> "Momentum":
        """The momentum before the first step, so that its structure stays the same in all steps.

        Args:
            key: any key of the kind that the steps will get.
            rule: the rule of the steps.
            num_examples: how many examples a step has, needed with `per_example=True`.
            num_keys: how many keys s the slopes of a step have: those of all devices, where they
                are gathered.

        Raises:
            ValueError: when the number of examples is needed and missing, or the number of keys is
                not a positive integer.
        """
        key = check_key(
            key,
            "Momentum.init",
            advice="Pass any key of the kind that the steps will get.",
        )
        check_count("Momentum.init", "num_keys", num_keys)
        weight = cast(WeightPerturbation, rule.inner)
        shape: tuple[int, ...] = (num_keys, weight.num_tangents)
        if weight.by_example:
            if num_examples is None:
                raise ValueError(
                    "Momentum.init: a rule with per_example=True has a slope for each example: "
                    "expected num_examples, got None."
                )
            shape = (*shape, num_examples)
        key = typed_key(key)
        data = jax.random.key_data(key)
        return self._empty(
            jax.ShapeDtypeStruct((num_keys, *data.shape), data.dtype),
            jax.ShapeDtypeStruct(shape, jnp.float32),
            str(jax.random.key_impl(key)),
        )

    def add(self, slopes: Slopes) -> "Momentum":
        """The momentum with one more step.

        Args:
            slopes: those of the step, of any number s of keys; the same number in all steps.

        Raises:
            ValueError: when the slopes are not like those of the steps before.

        Example:
            >>> import jax, jax.numpy as jnp, forwax as fx
            >>> loss = lambda w: jnp.sum(w**2)
            >>> value, slopes = fx.slopes(loss)(jax.random.key(0), jnp.ones(3))
            >>> momentum = fx.Momentum(decay=0.5, window=4).add(slopes).add(slopes)
            >>> window = momentum.slopes()
            >>> abs(window.weights / slopes.weights).ravel().tolist()
            [0.5, 1.0, 0.0, 0.0]
        """
        check_form("Momentum.add", slopes)
        ring = self
        if ring.keys is None:
            ring = self._empty(slopes.keys, slopes.weights, slopes.impl)
        keys = ring.keys
        weights = ring.coefficients
        num_steps = ring.num_steps
        assert keys is not None
        assert weights is not None
        assert num_steps is not None
        got = (slopes.keys.shape, slopes.weights.shape, slopes.impl)
        expected = (keys.shape[1:], weights.shape[1:], ring.impl)
        if got != expected:
            raise ValueError(
                f"Momentum: expected keys {list(expected[0])} of {expected[2]} and slopes "
                f"{list(expected[1])} in each step, got {list(got[0])} of {got[2]} and "
                f"{list(got[1])}. Make it with momentum.init(key, rule) for the rule and the "
                "number of keys that are used."
            )
        at = num_steps % self.window  # the oldest step's place
        return dataclasses.replace(
            ring,
            keys=keys.at[at].set(slopes.keys),
            coefficients=weights.at[at].set(slopes.weights.astype(weights.dtype)),
            num_steps=num_steps + 1,
        )

    def slopes(self) -> Slopes:
        """The window as the slopes of one step [window · s, ...]: what `forwax.replay` subtracts.

        The weights of step t - s are decay^s · c; of steps that were not made yet they are 0.

        Raises:
            ValueError: when no step was made, and `init` not called.
        """
        keys = self.keys
        weights = self.coefficients  # [window, s, k] or [window, s, k, N]
        num_steps = self.num_steps
        if keys is None or weights is None or num_steps is None:
            raise ValueError(
                "Momentum.slopes: expected at least one step, got none. Call "
                "momentum.add(slopes), or momentum.init(key, rule), before."
            )
        assert self.impl is not None
        places = jnp.arange(self.window)
        ages = (num_steps - 1 - places) % self.window
        decays = jnp.asarray(self.decay, weights.dtype) ** ages.astype(weights.dtype)
        ones = [1] * (weights.ndim - 1)
        # In the order of the ring, not of age: a replay adds in one fixed order all the same.
        decayed = decays.reshape(-1, *ones) * weights
        return Slopes(
            keys=keys.reshape(-1, keys.shape[-1]),
            weights=decayed.reshape(-1, *weights.shape[2:]),
            impl=self.impl,
        )

    def _empty(self, keys: Any, weights: Any, impl: str) -> "Momentum":
        """The momentum before the first step, for slopes of these shapes and types."""
        return dataclasses.replace(
            self,
            keys=jnp.zeros((self.window, *keys.shape), keys.dtype),
            coefficients=jnp.zeros((self.window, *weights.shape), weights.dtype),
            num_steps=jnp.int32(0),
            impl=impl,
        )
