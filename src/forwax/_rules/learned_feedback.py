"""Reverse mode in which products with parameters hand back learned maps of the output's error.

Direct maps: Nøkland, "Direct Feedback Alignment Provides Learning in Deep Neural Networks", arXiv
1609.01596. Maps learnt from noise: Bacho, Chu, "Low-Variance Forward Gradients using Direct
Feedback Alignment and Momentum", arXiv 2212.07282. Mirrors: Akrout et al., "Deep Learning without
Weight Transport", arXiv 1904.05391.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax import _mesh
from forwax._checks import check_no_text, register_checked, set_counts
from forwax._rule import (
    LearningRule,
    check_directions,
    check_shared,
    starter,
)
from forwax._signature import Problem
from forwax._sites.feedback import direct, maps, mirrors
from forwax._sites.feedback.find_routes import find_routes
from forwax._sites.feedback.inlets import Routes
from forwax._tree import Tree
from forwax.tangents import Coordinate, Rademacher, Tangents
from forwax.tangents._base import typed_key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Feedback:
    """What `forwax.LearnedFeedback` has learnt.

    Attributes:
        direct: one map [e, h] for each inlet, in the order of `forwax.explain`.
        mirrors: one array of the weight's shape for each weight whose product is chained, with a
            leading axis for each loop in which the weight differs from step to step.
        num_steps: the number of steps so far.
    """

    direct: tuple[Array, ...]
    mirrors: tuple[Array, ...]
    num_steps: Array


@register_checked
@dataclasses.dataclass(frozen=True, eq=False)
class LearnedFeedback(LearningRule):
    """Reverse mode in which products with parameters hand back learned maps of the output's error.

    A product φ(w, h) of a parameter with data h gives h the error e·M in place of wᵀ times its own,
    where e is the exact error of the last products (those after which none comes), taken at their
    values or at their data, whichever has fewer coordinates; and at what these data are made of
    where that has no more, such as the residual stream in front of a last norm. Where data are a
    mean over positions it is taken in front of the mean if that makes maps and mirrors smaller by
    more than a third: all positions then teach one map. Through all that has no parameter
    (activations, pooling, softmax, statistics of norms, residual additions) and through the last
    products errors go exactly, and so do gradients from a product's error to its parameter. No
    other product waits for an error from behind it, and no weight's value enters the reverse pass
    but those of the last products and of a gain between them and e.

    Maps learn from noise u on all data inputs at once and the outlets' tangents ė along it, by
    least mean squares: R = ė - Σ u Mᵀ, M ← M + η mean(R ⊗ u). The mean is over examples, noises and
    the axes that an input has in common with the outlets (positions of a language model), which
    share a map; products that share their data have one map. In a linear network the maps converge
    to the Jacobians, and the estimate to the gradient.

    A direct map hears of its own position alone. Where a product's value reaches other positions
    before the next product (keys and values of attention, the recurrent weight of a loop over
    time), or a product goes along positions itself (a mixer's tokens), its data's error comes
    through a mirror of its own weight instead, which learns from the product's own answers to
    noise. So does that of a gain, or what is chained behind it would end there; its mirror has as
    many entries as the gain.

    `step` learns and estimates. `forwax.value_and_grad` takes the maps as they are; without
    `correction` it needs no noise, and ignores the key. A rule is a frozen value, so that `step`
    returns the next one, to be carried through the training loop and its checkpoints.

    Attributes:
        num_tangents: the number of noises in a step.
        tangents: the distribution of the noise.
        rate: η of the direct maps; None for 0.1 / (1 + D/N), where N is the number of samples in
            the mean and D that of the noise coordinates in one R. Above 2 / (1 + D/N) they diverge.
        every: maps learn in each n-th step; the others push no tangent.
        chain: which products have mirrors: "none", "positions" (those that mix positions, and
            gains), or "all": then the estimate tends to the gradient.
        correction: whether the noise also corrects the estimate, which makes it unbiased whatever
            the maps are: with the slopes c along the noise and those foreseen, ĉ = Σ<ê, u>, an
            input's error is ê + (c - ĉ) u. Each step then pushes tangents, and all products have
            direct maps.
        maps: what has been learnt, or None until `init` or the first step makes zeros.

    Raises:
        ValueError: when a field has no such value, a product reaches no last one, or the maps are
            missing or do not fit.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> loss = lambda w, x: jnp.sum((jnp.tanh(x @ w["a"]) @ w["b"]) @ w["c"])
        >>> params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 4)), "c": jnp.ones((4, 1))}
        >>> x = jnp.ones((8, 2))
        >>> rule = fx.LearnedFeedback().init(loss, in_axes=(None, 0))(params, x)
        >>> [m.shape for m in rule.maps.direct]
        [(1, 3)]
        >>> step = jax.jit(lambda rule, key: rule.step(loss, in_axes=(None, 0))(key, params, x))
        >>> for i in range(150):
        ...     value, grads, rule = step(rule, jax.random.key(i))
        >>> rule.maps.direct[0].round(2).tolist()
        [[4.0, 4.0, 4.0]]
    """

    num_tangents: int = dataclasses.field(default=1, metadata={"static": True})
    tangents: Tangents = Rademacher()  # noqa: RUF009 (a frozen value)
    rate: float | Array | None = None
    every: int = dataclasses.field(default=1, metadata={"static": True})
    chain: Literal["none", "positions", "all"] = dataclasses.field(
        default="positions", metadata={"static": True}
    )
    correction: bool = dataclasses.field(default=False, metadata={"static": True})
    maps: Feedback | None = None

    reverse_mode: ClassVar[bool] = True

    def __post_init__(self) -> None:
        set_counts(self, "num_tangents", "every")
        check_no_text(self, "rate")
        check_directions("LearnedFeedback", self.tangents)
        if self.chain not in ("none", "positions", "all"):
            raise ValueError(
                "LearnedFeedback: expected chain to be 'none', 'positions' or 'all', got "
                f"{self.chain!r}."
            )
        is_number = isinstance(self.rate, int | float)
        if is_number and not 0 < self.rate < 2:  # type: ignore[operator]
            raise ValueError(
                "LearnedFeedback: expected rate between 0 and 2, beyond which least mean squares "
                f"diverge whatever the samples, got {self.rate}. None takes 0.1 / (1 + D/N)."
            )

    @property
    def unbiased(self) -> bool:
        """Whether the noise corrects the estimate."""
        return self.correction

    def sites(self, problem: Problem) -> Routes:
        """The inlets and outlets of a problem under this rule."""
        name = type(self).__name__
        if self.correction:
            return find_routes(problem, name, must_hear=False, by_position=True)
        return find_routes(problem, name, self.chain, by_position=True)

    def basis(self, problem: Problem) -> "LearnedFeedback | None":
        """With `correction`, the rule with each coordinate of its noise once."""
        if not self.correction:
            return None
        n = direct.num_coordinates(self.sites(problem))
        return dataclasses.replace(
            self, tangents=Coordinate(replace=False), num_tangents=max(n, 1)
        )

    def init(
        self,
        loss: Callable[..., Any],
        *,
        argnums: int | Sequence[int] = 0,
        has_aux: bool = False,
        in_axes: Any = None,
    ) -> Callable[..., "LearnedFeedback"]:
        """The rule with maps of zeros, so that its structure stays the same in all steps.

        Takes the arguments of `forwax.value_and_grad`.

        Returns:
            A function of the loss's own arguments that returns the rule. Nothing is computed, the
            loss is only traced.
        """
        return starter(self, loss, argnums, has_aux, in_axes)

    def started(self, problem: Problem) -> Self:
        """The rule with maps of zeros for a problem."""
        return dataclasses.replace(self, maps=_zeros(self.sites(problem)))

    def advance(
        self, key: Array, problem: Problem
    ) -> tuple[Array, Tree, Tree, "LearnedFeedback"]:
        """Learn the maps by one noise, then estimate by them; see `LearningRule.advance`."""
        check_directions("LearnedFeedback", self.tangents)
        check_shared("LearnedFeedback", self.tangents)
        over = _mesh.axes(key)  # a key of its own gives each device maps of its own
        params = jax.tree.map(lambda leaf: _mesh.vary(leaf, over), problem.params)
        routes = self.sites(dataclasses.replace(problem, params=params))
        before = _zeros(routes) if self.maps is None else self._checked(routes)
        before = jax.tree.map(lambda leaf: _mesh.vary(leaf, over), before)

        # A correction needs the noise of every step, and its maps must not hang on it.
        pushed = self._pushed(routes, key) if self.correction else None

        def learn() -> Feedback:
            return self._learnt(
                routes, before, pushed or self._pushed(routes, key), key
            )

        after = before
        if self.every == 1:
            after = learn()
        else:
            # Errors are sent behind the branch: gradients that it returned would be held beside
            # the update.
            is_due = before.num_steps % self.every == 0
            after = lax.cond(is_due, learn, lambda: before)
        used = before if self.correction else after
        value, aux, grads = self._sent(routes, used, pushed)
        after = dataclasses.replace(after, num_steps=before.num_steps + 1)
        return value, aux, grads, dataclasses.replace(self, maps=after)

    def estimate(self, key: Array, problem: Problem) -> tuple[Array, Tree, Tree]:
        """The gradient by the maps as they are; see `Rule.estimate`."""
        routes = self.sites(problem)
        # Corrected, maps of zeros do as well: the estimate is then that of activity noise.
        is_new = self.correction and self.maps is None
        found = _zeros(routes) if is_new else self._checked(routes)
        pushed = self._pushed(routes, typed_key(key)) if self.correction else None
        return self._sent(routes, found, pushed)

    def _pushed(self, routes: Routes, key: Array) -> direct.Pushed:
        """Noise at all inlets, and what it does."""
        noise = direct.draw(routes, self.tangents, key, self.num_tangents)
        return direct.push(routes, noise, self.num_tangents)

    def _learnt(
        self,
        routes: Routes,
        before: Feedback,
        pushed: direct.Pushed,
        key: Array,
    ) -> Feedback:
        """The maps and mirrors after one step of learning."""
        over = _mesh.all_axes(pushed.noise) - _mesh.axes(key)
        left = maps.residuals(routes, before.direct, pushed.noise, pushed.tangents)
        updates = maps.products(routes, pushed.noise, left, over)
        rates = maps.rates(routes, self.num_tangents, _mesh.size(over))
        found: list[Array] = []
        for m, rate, x in zip(before.direct, rates, updates, strict=True):
            own = rate if self.rate is None else self.rate
            found.append(m + own * x)
        twins = mirrors.learnt(routes.sites, routes.mirrors, before.mirrors, key)
        return Feedback(tuple(found), tuple(twins), before.num_steps)

    def _sent(
        self, routes: Routes, found: Feedback, pushed: direct.Pushed | None
    ) -> tuple[Array, Tree, Tree]:
        def errors_of(exact: list[Array]) -> list[Array]:
            errors = maps.sent(routes, found.direct, exact)
            if pushed is None:
                return errors
            return maps.corrected(routes, errors, pushed.noise, pushed.slopes)

        return direct.estimate(routes, errors_of, found.mirrors)

    def _checked(self, routes: Routes) -> Feedback:
        expected = (
            maps.map_shapes(routes),
            mirrors.mirror_shapes(routes.sites, routes.mirrors),
        )
        got = None
        if self.maps is None and not any(expected):
            return Feedback((), (), jnp.int32(0))
        if self.maps is not None:
            got = (
                [m.shape for m in self.maps.direct],
                [m.shape for m in self.maps.mirrors],
            )
        if self.maps is None or got != expected:
            raise ValueError(
                f"LearnedFeedback: expected direct maps and mirrors of shapes {expected}, got "
                f"{got}. Make them with rule.init(loss)(*args), and let "
                "rule.step(loss)(key, *args) learn them."
            )
        return self.maps

    def relative_mse(self, n: int) -> float:
        """Not a number: it hangs on what the maps foresee."""
        return math.nan

    def learning_rate_scale(self, n: int) -> float:
        """1."""
        return 1.0


def _zeros(routes: Routes) -> Feedback:
    """Maps before the first step, in float32 or wider."""
    twins = mirrors.zeros(routes.sites, routes.mirrors)
    return Feedback(maps.zeros(routes), tuple(twins), jnp.int32(0))
