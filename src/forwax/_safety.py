"""Safety in training: slopes clipped by their own running median, bad ones skipped.

They also tell of the noise.

A slope is the directional derivative c = <g, v> of a weight rule. For a tangent with |v|² = n the
estimate ĝ = c v has the norm |c| √n, so that clipping one scalar is clipping the norm of the
estimate, and costs nothing.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _mesh, _tree
from forwax._assemble import Weighing
from forwax._checks import check_no_text, register_checked, set_counts
from forwax._rule import (
    LearningRule,
    Rule,
    check_replicated,
    check_rule,
    guarded_by_norm,
)
from forwax._rules import WeightPerturbation
from forwax._signature import Problem
from forwax._slopes import Slopes, check_form
from forwax._tree import Tree


class Monitor(NamedTuple):
    """What the slopes of the last steps tell; see `Safe.monitor`. All are scalars in float32.

    Attributes:
        gradient_norm: |g|.
        relative_mse: E|ĝ - g|² / |g|².
        variance: E|ĝ - g|².
        cosine: the root mean square of cos(ĝ, g).
        error: the relative standard error of `gradient_norm`.
        growth: how many times larger, in root mean square, the slopes of the younger half of the
            remembered steps were than those of the older one.
        num_steps: how many steps had a finite slope since the start; of these the last `window`
            went in.
        num_clipped: how many slopes were clipped since the start.
        num_skipped: how many slopes were skipped since the start, as they were not finite.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> safe = fx.Safe(fx.WeightPerturbation()).init()
        >>> *_, safe = safe.step(lambda x: jnp.sum(x**2))(jax.random.key(0), jnp.ones(3))
        >>> int(safe.monitor(jnp.ones(3)).num_steps)
        1
    """

    gradient_norm: Array
    relative_mse: Array
    variance: Array
    cosine: Array
    error: Array
    growth: Array
    num_steps: Array
    num_clipped: Array
    num_skipped: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class History:
    """The sizes of the slopes of the last steps, in a ring.

    Attributes:
        sizes: the median over a step's slopes of |c| but for zeros, clipped as they were used
            [window]; infinite where there is none.
        squares: the mean over a step's slopes of c², not clipped [window]; -1 where there is none.
        num_steps: how many steps were recorded.
        num_clipped: how many slopes were clipped.
        num_skipped: how many slopes were skipped.
    """

    sizes: Array
    squares: Array
    num_steps: Array
    num_clipped: Array
    num_skipped: Array

    @classmethod
    def empty(cls, window: int) -> "History":
        """The history before the first step."""
        # Not NaN, at which JAX raises an error in one of its modes.
        sizes = jnp.full(window, jnp.inf, jnp.float32)
        squares = jnp.full(window, -1, jnp.float32)
        none = jnp.int32(0)
        return cls(sizes, squares, none, none, none)

    def add(self, slopes: Array, bound: Array) -> "History":
        """The history with one more step.

        Args:
            slopes: those of the step, before the guard [any shape].
            bound: beyond which they were clipped.
        """
        sizes = jnp.abs(slopes).astype(jnp.float32).reshape(-1)
        finite = jnp.isfinite(sizes)
        # A step without a finite slope leaves no trace but in the count.
        some = jnp.any(finite)
        at = self.num_steps % self.sizes.shape[0]
        # Zeros are left out: a median of 0 would clip all slopes to 0, for good.
        used = jnp.where(finite & (sizes > 0), jnp.minimum(sizes, bound), jnp.inf)
        num_finite = jnp.maximum(jnp.sum(finite), 1).astype(sizes.dtype)
        square = jnp.sum(jnp.where(finite, sizes, 0) ** 2) / num_finite
        size = jnp.where(some, _median(used), self.sizes[at])
        all_sizes = self.sizes.at[at].set(size)
        square = jnp.where(some, square, self.squares[at])
        all_squares = self.squares.at[at].set(square)
        return History(
            sizes=all_sizes,
            squares=all_squares,
            num_steps=self.num_steps + some.astype(jnp.int32),
            num_clipped=self.num_clipped
            + jnp.sum(finite & (sizes > bound), dtype=jnp.int32),
            num_skipped=self.num_skipped + jnp.sum(~finite, dtype=jnp.int32),
        )

    def growth(self) -> Array:
        """The root mean square slope of the younger half over that of the older; 1 for no halves.

        A slow explosion, in which the median follows the slopes, shows here first.
        """
        window = self.squares.shape[0]
        recorded = self.squares >= 0
        count = jnp.sum(recorded, dtype=jnp.int32)
        age = (self.num_steps - 1 - jnp.arange(window, dtype=jnp.int32)) % window
        is_young = age < count // 2

        def mean(of: Array) -> Array:
            total = jnp.sum(jnp.where(of, self.squares, 0))
            return total / jnp.maximum(jnp.sum(of), 1).astype(total.dtype)

        young = mean(recorded & is_young)
        old = mean(recorded & ~is_young)
        is_known = (count > 1) & (old > 0)
        return jnp.sqrt(jnp.where(is_known, young / jnp.where(is_known, old, 1), 1))


def _median(sizes: Array) -> Array:
    """The median of those that are finite; infinite where none is."""
    finite = jnp.isfinite(sizes)
    ordered = jnp.sort(jnp.where(finite, sizes, jnp.inf))
    count = jnp.sum(finite, dtype=jnp.int32)
    lower = ordered[jnp.maximum(count - 1, 0) // 2]
    # of an even number the mean of both in the middle
    return lower / 2 + ordered[count // 2] / 2


@register_checked
@dataclasses.dataclass(frozen=True, eq=False)
class Safe(LearningRule):
    """A rule whose slopes are clipped by their running median, and skipped if not finite.

    A slope beyond `clip` times the median of |c| over the last `window` steps is cut to that bound.
    With normal tangents the clipped estimate keeps its direction in the mean: by Stein's lemma
    E[h(c) v] = E[h'(c)] g, which for clipping at b is P(|c| < b) g. The median of normal slopes is
    0.674 |g|: at `clip=5` 7 slopes in 10,000 are cut and the estimate is shortened by as much, at
    `clip=1` half of them. What is remembered are the clipped slopes, so that the bound grows at
    most `clip`-fold in half a window, and with `clip=1` never: a slow explosion, in which slopes
    double every few dozen steps, is stopped by a small `clip` and a long window alone. Below 1 the
    bound would fall to zero by itself.

    `step` clips and remembers. `forwax.value_and_grad` clips by what is remembered and remembers
    nothing. A rule is a frozen value, so that `step` returns the next one, to be carried through
    the training loop and its checkpoints: the field `history` is all that changes.

    A slope that is not finite in every step, as where forward mode makes 0 · ∞ of a square root of
    what is masked to 0, is skipped in every step: nothing is learnt, and `history.num_skipped`
    grows as fast as the steps do. `forwax.diagnose` tells whether reverse mode is finite there, and
    the limits show how to write such a loss.

    Supported: `forwax.WeightPerturbation` with any tangents, combination and number of tangents,
    each slope on its own, one for each example with `per_example=True`. Inside
    `jax.shard_map` the parameters must be replicated. All other rules,
    `forwax.ActivityPerturbation` with its slopes for each example among them, have no slope that
    scales their estimate as a whole: there the norm |ĝ| takes the place of |c|, and an estimate
    whose norm is not finite, or overflows when it is squared, is skipped as a whole. Of a rule that
    learns from step to step, such as `forwax.LearnedFeedback`, the field `rule` of the successor is
    the rule's own successor; what a skipped step has taught is dropped. It is to be initialised
    before it is wrapped.

    Attributes:
        rule: the rule to guard.
        clip: the largest slope, in medians; None to clip nothing.
        skip: whether slopes that are not finite count as zero. If not, infinite ones are clipped,
            and those that are not a number make the estimate so; for rules without slopes both make
            it so.
        window: how many steps are remembered.
        warm_up: how many steps are made before the first slope is clipped.
        history: what is remembered, or None until `init` or the first step makes it.

    Raises:
        TypeError: when the rule is itself a `Safe`.
        ValueError: when a field has no such value, or where parameters are sharded.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> rule = fx.Safe(fx.WeightPerturbation(), clip=5.0).init()
        >>> step = jax.jit(lambda rule, key, w: rule.step(lambda w: jnp.sum(w**2))(key, w))
        >>> for i in range(20):
        ...     value, grads, rule = step(rule, jax.random.key(i), jnp.ones(100))
        >>> explosion = jnp.full(100, 1e30)
        >>> value, grads, rule = step(rule, jax.random.key(0), explosion)
        >>> bool(jnp.abs(grads).max() < 1e3), int(rule.history.num_clipped)
        (True, 1)
    """

    rule: Rule
    clip: float | Array | None = 1.0
    skip: bool = dataclasses.field(default=True, metadata={"static": True})
    window: int = dataclasses.field(default=1001, metadata={"static": True})
    warm_up: int = dataclasses.field(default=10, metadata={"static": True})
    history: History | None = None

    def __post_init__(self) -> None:
        set_counts(self, "window", "warm_up")
        check_no_text(self, "clip")
        check_rule("Safe", self.rule)
        if hasattr(self.rule, "history"):
            raise TypeError(
                "Safe: expected a rule such as forwax.WeightPerturbation(), got "
                f"{type(self.rule).__name__}, which guards slopes already. Use it as it is."
            )
        if isinstance(self.clip, int | float) and not self.clip >= 1:
            raise ValueError(
                f"Safe: expected clip of at least 1, or None to clip nothing, got {self.clip}. "
                "Below 1 the bound, a multiple of the median of slopes that were clipped by it, "
                "would fall to zero."
            )

    @property
    def reverse_mode(self) -> bool:  # type: ignore[override]
        """Whether the rule runs reverse mode."""
        return self.rule.reverse_mode

    @property
    def unbiased(self) -> bool:
        """Whether the rule is and nothing is clipped."""
        return self.clip is None and self.rule.unbiased

    @property
    def inner(self) -> Rule:
        """The rule that is guarded."""
        return self.rule

    @property
    def replayed(self) -> Rule | None:
        """What is replayed of the rule that is guarded."""
        return self.rule.replayed

    def law(self, problem: Problem) -> float | None:
        """That of the rule, as if nothing were clipped."""
        return self.rule.law(problem)

    def sites(self, problem: Problem) -> Any:
        """Those of the rule."""
        return self.rule.sites(problem)

    def init(self) -> "Safe":
        """The rule with an empty history, so that its structure stays the same in all steps."""
        return dataclasses.replace(self, history=History.empty(self.window))

    def bound(self) -> Array:
        """The largest slope of the next step: `clip` times the median.

        Infinite in the warm-up, and where there is no median.
        """
        if self.clip is None or self.history is None:
            return jnp.float32(jnp.inf)
        median = _median(self.history.sizes)
        ready = jnp.isfinite(median) & (self.history.num_steps >= self.warm_up)
        return jnp.where(ready, jnp.float32(self.clip) * median, jnp.inf)

    def guard(self) -> Callable[[Array], Array]:
        """What is done to the slopes of the next step."""
        return self._guard_below(self.bound())

    def _guard_below(self, bound: Array) -> Callable[[Array], Array]:
        def guarded(slopes: Array) -> Array:
            clipped = slopes
            if self.clip is not None:
                limit = bound.astype(slopes.dtype)
                clipped = jnp.clip(slopes, -limit, limit)
            return jnp.where(jnp.isfinite(slopes), clipped, 0) if self.skip else clipped

        return guarded

    def after(self, slopes: Array) -> "Safe":
        """The rule that has seen the slopes of one more step."""
        history = History.empty(self.window) if self.history is None else self.history
        return dataclasses.replace(self, history=history.add(slopes, self.bound()))

    def guard_slopes(self, slopes: Slopes, params: Tree) -> tuple[Slopes, "Safe"]:
        """Slopes of `forwax.slopes`, clipped and skipped, and the rule that has seen them.

        With several devices it is given what was gathered, and does the same on each. What it
        remembers is in units of slopes, so that `monitor` stays what it is.

        Args:
            slopes: of any number s of keys; the weights of gathered ones are divided by it.
            params: the parameters.

        Raises:
            TypeError: when the rule inside is none that `forwax.slopes` takes.

        Example:
            >>> import jax, jax.numpy as jnp, forwax as fx
            >>> safe = fx.Safe(fx.WeightPerturbation()).init()
            >>> value, slopes = fx.slopes(lambda w: w[0] / 0, safe)(jax.random.key(0), jnp.ones(3))
            >>> guarded, safe = safe.guard_slopes(slopes, jnp.ones(3))
            >>> guarded.weights.tolist(), int(safe.history.num_skipped)
            ([[0.0]], 1)
        """
        check_form("Safe.guard_slopes", slopes)
        rule = self.rule.replayed
        if rule is None:
            raise TypeError(
                "Safe.guard_slopes: expected a rule inside such as forwax.WeightPerturbation(), "
                f"got {type(self.rule).__name__}, which has no slopes that can be sent."
            )
        weight = cast(WeightPerturbation, rule)
        weighing = Weighing(weight.tangents, weight.combine, params, frozenset())
        num_keys = len(slopes.weights)
        # What takes a slope to its weight.
        unit = weighing.scale(weight.num_tangents) / num_keys
        # The bound is scaled, not the weights: those that are not cut keep all their bits.
        guard = self._guard_below(self.bound() * unit)
        used = dataclasses.replace(slopes, weights=guard(slopes.weights))
        return used, self.after(slopes.weights / unit)

    def advance(self, key: Array, problem: Problem) -> tuple[Array, Tree, Tree, "Safe"]:
        """The estimate, and the rule that remembers its slopes; see `LearningRule.advance`."""
        guard = self.guard()
        if not self.rule.learns:
            value, aux, grads, slopes = self.rule.guarded(key, problem, guard)
            return value, aux, grads, self.after(slopes)
        name = type(self.rule).__name__
        check_replicated(name, problem.params, _mesh.axes(key))
        # Its slopes go into maps; what can be guarded is the estimate.
        learner = cast(LearningRule, self.rule)
        value, aux, grads, learnt = learner.advance(key, problem)
        grads, norm = guarded_by_norm(grads, guard)
        # What a bad step taught is dropped with its estimate.
        is_good = jnp.isfinite(norm) & _tree.all_finite(learnt)
        kept = jax.tree.map(
            lambda new, old: jnp.where(is_good, new, old), learnt, self.rule
        )
        return value, aux, grads, dataclasses.replace(self.after(norm[None]), rule=kept)

    def estimate(self, key: Array, problem: Problem) -> tuple[Array, Tree, Tree]:
        """The estimate, clipped by what is remembered; see `Rule.estimate`."""
        return self.rule.guarded(key, problem, self.guard())[:3]

    def monitor(self, params: Tree | int) -> Monitor:
        """What the remembered slopes tell of the gradient and of the noise of its estimate.

        With E[v vᵀ] = I, E c² = |g|²: the mean of c² over slopes and steps estimates |g|² without
        bias, with a relative standard error of √(2/m) for m normal slopes while g stays as it is.
        The inner product of the plain mean with the gradient is known exactly, <ĝ, g> = mean_j
        c_j², whose mean is |g|². The relative MSE M is the rule's law; so E|ĝ - g|² = M |g|², E|ĝ|²
        = (1 + M) |g|², and the mean square of the cosine is near <ĝ, g>² / (|ĝ|² |g|²) = 1 / (1 +
        M), with normals and signs k / (n + k ± 1).

        What this is not: the noise of the batch. Slopes of one batch are slopes of its own
        gradient, whose norm this is. With `per_example=True` the norm is the root
        mean square of the examples' own gradients, and relative MSE, variance and cosine are not
        numbers: they depend on how far the examples agree. Slopes are taken before clipping.

        Args:
            params: the parameters, or their number n of real coordinates.

        Raises:
            ValueError: when nothing is remembered, or the rule has no slopes.
        """
        if self.history is None or not self.rule.has_slopes:
            raise ValueError(
                "Safe.monitor: expected the history of a rule with slopes, such as "
                f"forwax.WeightPerturbation(), got history={type(self.history).__name__} of "
                f"{type(self.rule).__name__}. Make it with rule.init(), and let "
                "rule.step(loss)(key, *args) fill it."
            )
        n = params if isinstance(params, int) else _tree.num_coordinates(params)
        law = self.rule.relative_mse(n)
        squares = self.history.squares  # [window]
        recorded = squares >= 0
        count = jnp.sum(recorded).astype(squares.dtype)
        square = jnp.mean(squares, where=recorded)
        # Of |g|², the mean of `squares`; the root |g| has half its relative error.
        spread = jnp.std(squares, where=recorded)
        error = spread / (2 * square * jnp.sqrt(jnp.maximum(count - 1, 1)))
        return Monitor(
            gradient_norm=jnp.sqrt(square),
            relative_mse=jnp.float32(law),
            variance=law * square,
            cosine=jnp.float32(1 / math.sqrt(1 + law)),
            error=error,
            growth=self.history.growth(),
            num_steps=self.history.num_steps,
            num_clipped=self.history.num_clipped,
            num_skipped=self.history.num_skipped,
        )

    def relative_mse(self, n: int) -> float:
        """That of the rule, as if nothing were clipped."""
        return self.rule.relative_mse(n)

    def learning_rate_scale(self, n: int) -> float:
        """That of the rule."""
        return self.rule.learning_rate_scale(n)
