"""Direct feedback alignment whose maps are learnt by activity noise (Bacho & Chu 2022).

Bacho, Chu, "Low-Variance Forward Gradients using Direct Feedback Alignment and Momentum", arXiv
2212.07282.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import jax
from jax import Array

from forwax import _mesh
from forwax._checks import check_no_text, register_checked, set_counts
from forwax._rule import (
    LearningRule,
    check_directions,
    check_shared,
    starter,
)
from forwax._signature import Problem
from forwax._sites.feedback import direct, maps
from forwax._sites.feedback.find_routes import find_routes
from forwax._sites.feedback.inlets import Routes
from forwax._tree import Tree
from forwax.tangents import Rademacher, Tangents

Maps = tuple[Array, ...]


@register_checked
@dataclasses.dataclass(frozen=True, eq=False)
class FDFA(LearningRule):
    """Forward direct feedback alignment: the output error through maps that slopes teach.

    As in `forwax.DirectFeedbackAlignment` the data h of a product gets the error e·M in place of
    its own, where e is the exact error of the last products. Here M is the running mean of (the
    slope of what e is taken at along noise u) ⊗ u, whose mean is the Jacobian with respect to h.
    Noise enters all inlets at once; the slopes along it are vectors, not those of the loss, and are
    averaged over the examples. The estimate is the gradient when M is the Jacobian of every
    example: in a linear network, in the mean. `forwax.LearnedFeedback` learns the same maps with
    less noise, by least mean squares.

    `step` learns and estimates. `forwax.value_and_grad` takes the maps as they are; it needs no
    noise, and ignores the key. A rule is a frozen value, so that `step` returns the next one, to be
    carried through the training loop.

    Attributes:
        decay: how much of the maps is kept in each step, in [0, 1).
        tangents: the distribution of the noise.
        num_tangents: the number of noises in a step.
        maps: one [size of e, size of h] for each inlet, in the order of `forwax.explain`; or None
            until `init` or the first step makes zeros.

    Raises:
        ValueError: when a field has no such value, no last product can be found, or the maps are
            missing or do not fit.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> loss = lambda w, x: jnp.sum(jnp.tanh(jnp.tanh(x @ w["a"]) @ w["b"]) @ w["c"])
        >>> params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 4)), "c": jnp.ones((4, 1))}
        >>> rule = fx.FDFA().init(loss, in_axes=(None, 0))(params, jnp.ones((4, 2)))
        >>> [m.shape for m in rule.maps]
        [(1, 3)]
        >>> step = rule.step(loss, in_axes=(None, 0))
        >>> value, grads, rule = step(jax.random.key(0), params, jnp.ones((4, 2)))
        >>> grads["a"].shape
        (2, 3)
    """

    decay: float | Array = 0.99
    tangents: Tangents = Rademacher()  # noqa: RUF009 (a frozen value)
    num_tangents: int = dataclasses.field(default=1, metadata={"static": True})
    maps: Maps | None = None

    reverse_mode: ClassVar[bool] = True

    def __post_init__(self) -> None:
        set_counts(self, "num_tangents")
        check_no_text(self, "decay")
        check_directions("FDFA", self.tangents)
        if isinstance(self.decay, int | float) and not 0 <= self.decay < 1:
            raise ValueError(f"FDFA: expected decay in [0, 1), got {self.decay}.")

    @property
    def unbiased(self) -> bool:
        """False: the estimate only aligns with the gradient in the course of training."""
        return False

    def sites(self, problem: Problem) -> Routes:
        """The inlets and outlets of a problem under this rule."""
        return find_routes(problem, type(self).__name__)

    def init(
        self,
        loss: Callable[..., Any],
        *,
        argnums: int | Sequence[int] = 0,
        has_aux: bool = False,
        in_axes: Any = None,
    ) -> Callable[..., "FDFA"]:
        """The rule with maps of zeros, so that its structure stays the same in all steps.

        Takes the arguments of `forwax.value_and_grad`.

        Returns:
            A function of the loss's own arguments that returns the rule. Nothing is computed, the
            loss is only traced.
        """
        return starter(self, loss, argnums, has_aux, in_axes)

    def started(self, problem: Problem) -> Self:
        """The rule with maps of zeros for a problem."""
        return dataclasses.replace(self, maps=maps.zeros(self.sites(problem)))

    def advance(self, key: Array, problem: Problem) -> tuple[Array, Tree, Tree, "FDFA"]:
        """Learn the maps by one noise, then estimate by them; see `LearningRule.advance`."""
        check_shared("FDFA", self.tangents)
        # A key of its own gives each device an estimate of its own.
        over = _mesh.axes(key)
        params = jax.tree.map(lambda leaf: _mesh.vary(leaf, over), problem.params)
        routes = self.sites(dataclasses.replace(problem, params=params))
        rule = dataclasses.replace(self, maps=self._learnt(key, routes))
        return *rule._sent(routes), rule

    def estimate(self, key: Array, problem: Problem) -> tuple[Array, Tree, Tree]:
        """The gradient by the maps as they are; see `Rule.estimate`."""
        return self._sent(self.sites(problem))

    def _sent(self, routes: Routes) -> tuple[Array, Tree, Tree]:
        used = self._checked(routes)
        return direct.estimate(routes, lambda exact: maps.sent(routes, used, exact))

    def _learnt(self, key: Array, routes: Routes) -> Maps:
        """The running mean with one more sample."""
        before = maps.zeros(routes) if self.maps is None else self._checked(routes)
        # Without an inlet all errors are exact.
        if not before:
            return ()
        noise = direct.draw(routes, self.tangents, key, self.num_tangents)
        pushed = direct.push(routes, noise, self.num_tangents)
        # Devices that share a key share their maps, whatever examples they hold.
        over = _mesh.all_axes(noise) - _mesh.axes(key)
        samples = maps.products(routes, noise, pushed.tangents, over)
        pairs = zip(before, samples, strict=True)
        return tuple(self.decay * m + (1 - self.decay) * x for m, x in pairs)

    def _checked(self, routes: Routes) -> Maps:
        expected = maps.map_shapes(routes)
        if self.maps is None and not expected:
            return ()
        got = None if self.maps is None else [m.shape for m in self.maps]
        if self.maps is None or got != expected:
            raise ValueError(
                f"FDFA: expected maps of shapes {expected} (size of the output error, size of the "
                f"product's data), got {got}. Make them with rule.init(loss)(*args), and let "
                "rule.step(loss)(key, *args) learn them."
            )
        return self.maps

    def relative_mse(self, n: int) -> float:
        """Not a number: no law is known."""
        return math.nan

    def learning_rate_scale(self, n: int) -> float:
        """1."""
        return 1.0
