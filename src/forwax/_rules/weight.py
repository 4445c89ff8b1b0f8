"""Weight perturbation: the forward gradient of Baydin et al. 2022.

"Gradients without Backpropagation".
"""

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _mesh, _tree
from forwax._assemble import Weighing
from forwax._checks import memory_limit, register_checked, set_counts
from forwax._directions.drawing import Drawing
from forwax._directions.formed import Formed, FormedByExample, InFull
from forwax._directions.plan import (
    WeightPlan,
    dense_splits,
    plan_low_rank,
    plan_signs,
)
from forwax._directions.splits import Split
from forwax._programs.last_sums import with_own_losses
from forwax._pushforward import Along, is_staged, num_chunks, slopes
from forwax._rule import Rule, check_directions, check_replicated
from forwax._signature import Problem
from forwax._tree import Tree
from forwax.combine import Combine, Mean
from forwax.tangents import Coordinate, LowRank, Rademacher, Tangents
from forwax.tangents._base import sampler, sampler_of_examples


@register_checked
@dataclasses.dataclass(frozen=True)
class WeightPerturbation(Rule):
    """The loss's slopes along k random directions of all parameters, times these directions.

    With slopes c_j = <g, v_j> from one Jacobian-vector product each, the estimate is mean_j c_j
    v_j, unbiased because E[v vᵀ] = I; see `forwax.combine` for other combinations. Cost: one
    forward pass and two more per tangent. No activations are kept for a backward pass. Inside a
    trace, such as that of `jax.jit`, random signs are formed where the loss uses them, with `Mean`
    or `Shrinkage` and parameters that are whole on every device: held are those of the layer in
    use, for one chunk of tangents, and of the others at most a bit each. Other directions are held
    in full.

    Attributes:
        tangents: the distribution of directions; random signs have the least variance.
        num_tangents: the number k of directions.
        combine: how slopes and directions become one estimate.
        chunk_size: the most directions at a time, None for all at once. The estimate is the same up
            to rounding; the primal is evaluated once per chunk.
        per_example: whether each of the N examples of `in_axes` has directions and slopes of its
            own: where the tangents' law is M, the error is M·mean|g_i|²/N with the examples'
            gradients g_i, in place of M·|mean g_i|². So it pays where examples disagree, and for
            losses of which nothing but evaluations is known: a solver, an unrolled optimiser. It
            forms k·N·n numbers, of which `chunk_size=1` holds N·n at a time: for few parameters;
            for networks there are `tangents.LowRank` and `forwax.ActivityPerturbation`.

    Raises:
        TypeError: when tangents or combination are of another kind.
        ValueError: when a count is not a positive integer, or where `per_example=True`, here or in
            `tangents.LowRank`, cannot be followed: without `in_axes`, with a combination other than
            `Mean`, with sharded parameters.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> rule = fx.WeightPerturbation(num_tangents=3, tangents=fx.tangents.Orthonormal())
        >>> gradient = fx.grad(lambda x: jnp.sum(x**2), rule)
        >>> grads = gradient(jax.random.key(0), jnp.array([1.0, 2.0, 3.0]))
        >>> expected = jnp.array([2.0, 4.0, 6.0])
        >>> bool(jnp.allclose(grads, expected, atol=1e-4))  # as many as parameters: exact
        True
    """

    tangents: Tangents = Rademacher()  # noqa: RUF009 (a frozen value)
    num_tangents: int = dataclasses.field(default=1, metadata={"static": True})
    combine: Combine = Mean()  # noqa: RUF009
    chunk_size: int | None = dataclasses.field(default=None, metadata={"static": True})
    per_example: bool = dataclasses.field(default=False, metadata={"static": True})

    has_slopes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        set_counts(self, "num_tangents", or_none="chunk_size")
        check_directions("WeightPerturbation", self.tangents, self.combine)

    @property
    def unbiased(self) -> bool:
        """Whether the combination keeps the estimate unbiased."""
        return self.combine.unbiased

    @property
    def by_example(self) -> bool:
        """Whether each example has directions of its own, as the rule or its tangents say."""
        return self.per_example or self.tangents.per_example

    @property
    def replayed(self) -> Rule:
        """Itself."""
        return self

    def estimate(self, key: Array, problem: Problem) -> tuple[Array, Tree, Tree]:
        """One estimate; see `Rule.estimate`."""
        return self._estimate(key, problem, None)[:3]

    def guarded(
        self,
        key: Array,
        problem: Problem,
        guard: Callable[[Array], Array],
    ) -> tuple[Array, Tree, Tree, Array]:
        """An estimate with guarded slopes; see `Rule.guarded`."""
        check_replicated("WeightPerturbation", problem.params, _mesh.axes(key))
        return self._estimate(key, problem, guard)

    def _estimate(
        self,
        key: Array,
        problem: Problem,
        guard: Callable[[Array], Array] | None,
    ) -> tuple[Array, Tree, Tree, Array]:
        k = self.num_tangents
        if _tree.num_coordinates(problem.params) == 0:  # nothing to estimate
            value, aux = problem.objective(problem.params)
            return value, aux, problem.params, jnp.zeros(k)
        joint = self.combine.joint
        key, own_axes = self.own_key(key, problem)
        key_axes = _mesh.axes(key)
        directions = self.directions(problem, key_axes)
        is_planned = self.by_example or isinstance(directions, WeightPlan)
        weighing = Weighing(self.tangents, self.combine, problem.params, key_axes)
        weigh = weighing.weights
        if is_planned:
            # Its combination only scales the sum: here its weights, which are fewer.
            scale = weighing.scale(k) / directions.num_examples
            weigh = lambda slopes, drawn: slopes * scale  # noqa: E731
        draw = directions.sampler(key)
        # A guard needs whole slopes; sharded parameters need each device's own.
        is_summed = is_planned or guard is not None
        result = slopes(
            directions,
            draw,
            k,
            chunk_size=self.chunk_size,
            sum_to=key_axes if is_summed else None,
            guard=guard,
            weigh=None if joint else weigh,
            start=weighing.start,
        )
        total = result.total
        if joint:  # the weight of each direction depends on all slopes
            drawn = draw(jnp.arange(k))
            total = directions.assemble(weigh(result.used, drawn), drawn)
        # Each device has added up its own examples' directions.
        total = jax.tree.map(lambda leaf: _mesh.total(leaf, own_axes), total)
        grads = weighing.cast(total) if is_planned else weighing.finish(total, k)
        found = _mesh.gathered(result.found, own_axes, axis=1)
        return result.value, result.aux, grads, found

    def own_key(self, key: Array, problem: Problem) -> tuple[Array, _mesh.Axes]:
        """The key that directions are drawn from, and the mesh axes on which it is made to differ.

        Examples of different devices have directions of their own.
        """
        if not self.by_example:
            return key, frozenset()
        over = _mesh.all_axes(problem.mapped) - _mesh.axes(key)
        return _mesh.own_key(key, over), over

    def slopes_along(
        self,
        directions: Formed | WeightPlan,
        key: Array,
        is_summed: bool,
    ) -> tuple[Along, Any]:
        """The slopes of `forwax.slopes`, and what was drawn for them.

        None where it is better drawn again than held.

        Args:
            directions: what they are taken along.
            key: what draws these.
            is_summed: whether those of devices with the same directions are added up.
        """
        k = self.num_tangents
        most = directions.most_held
        is_one = num_chunks(k, self.chunk_size) == 1
        is_held = is_one and (most is None or k <= most)
        draw = directions.sampler(key)
        drawn = draw(jnp.arange(k)) if is_held else None
        result = slopes(
            directions,
            draw if drawn is None else lambda indices: drawn,
            k,
            chunk_size=self.chunk_size,
            sum_to=_mesh.axes(key) if is_summed else None,
        )
        return result, drawn

    def steps(self, params: Tree) -> None:
        """Of no length: slopes are exact."""

    def in_place(
        self,
        problem: Problem,
        key_axes: _mesh.Axes = frozenset(),
        per_example: bool = False,
    ) -> Formed | WeightPlan:
        """The directions of `forwax.slopes`.

        Args:
            problem: the parameters, the loss and the examples.
            key_axes: the mesh axes over which the key varies.
            per_example: whether each example has slopes along the same directions.
        """
        directions = self.directions(problem, key_axes)
        return directions.by_examples(problem) if per_example else directions

    @property
    def splits_by_loss(self) -> bool:
        """Whether directions are drawn as the loss uses the parameters."""
        return self.tangents.planned == "factors"

    def drawing(
        self,
        params: Tree,
        splits: tuple[Split | None, ...] | None,
        examples: int | None,
    ) -> Drawing | InFull:
        """How directions are drawn again and added, without the loss.

        Args:
            params: the parameters.
            splits: those of factors, where the loss decides on them.
            examples: how many examples have directions of their own.
        """
        tangents = self.tangents
        if splits is not None:
            rank = cast(LowRank, tangents).rank
            return Drawing(params, splits, rank, examples)
        if tangents.planned == "signs" and examples is None:
            return Drawing(params, dense_splits(params), lazy=True)
        has_zeros = tangents.has_zeros and examples is None
        return InFull(params, self._source(params, examples), has_zeros, examples)

    def directions(
        self, problem: Problem, key_axes: _mesh.Axes = frozenset()
    ) -> Formed | WeightPlan:
        """Signs that are formed where the traced loss uses them, or directions that are held.

        Dense signs are planned inside a trace alone: outside, the loss may branch on concrete
        values.

        Raises:
            ValueError: where examples cannot have directions of their own, though the tangents ask
                for it.
        """
        self._check_examples(problem)
        self._check_memory(problem)
        tangents = self.tangents
        summed: _mesh.Axes = frozenset()
        if self.by_example:
            problem, summed = with_own_losses(problem, "WeightPerturbation")
        point = jax.tree.map(lambda leaf: _mesh.vary(leaf, key_axes), problem.params)
        varied = dataclasses.replace(problem, params=point)
        plan = None
        if self.combine.coordinatewise and not any(_mesh.tree_axes(problem.params)):
            if tangents.planned == "factors":
                rank = cast(LowRank, tangents).rank
                plan = plan_low_rank(varied, rank, self.by_example, summed)
            elif tangents.planned == "signs" and is_staged() and not self.by_example:
                plan = plan_signs(varied)
        if plan is not None:
            return plan

        examples = (problem.num_examples or 1) if self.by_example else None
        source = self._source(problem.params, examples)
        if examples is None:
            return Formed(
                point,
                source,
                tangents.has_zeros,
                objective=problem.objective,
            )
        return FormedByExample(
            point,
            source,
            examples=examples,
            objective=problem.objective,
            problem=problem,
            summed=summed,
        )

    def _source(
        self, params: Tree, examples: int | None
    ) -> Callable[[Array], Callable[[Array], Tree]]:
        """What takes a key to directions that are held."""
        k = self.num_tangents
        hold = self.combine.joint  # its weights need all directions

        def source(key: Array) -> Callable[[Array], Tree]:
            if examples is None:
                return sampler(self.tangents, key, params, k, hold=hold)
            return sampler_of_examples(self.tangents, key, params, k, examples)

        return source

    def _check_memory(self, problem: Problem) -> None:
        """Warn where the tangents of a chunk are larger than the memory of a device.

        Counted are those of the largest parameter, which all ways of drawing them must hold, and
        their slopes.
        """
        count = -(-self.num_tangents // num_chunks(self.num_tangents, self.chunk_size))
        leaves = jax.tree.leaves(problem.params)
        largest = max((leaf.size * leaf.dtype.itemsize for leaf in leaves), default=0)
        needed = count * (largest + 4)
        limit = memory_limit()
        if limit is not None and needed > limit:
            warnings.warn(
                f"WeightPerturbation: {count:,} tangents at a time take at least "
                f"{needed / 2**30:,.3g} GiB, and the device has {limit / 2**30:,.3g} GiB. Pass "
                "chunk_size, such as chunk_size=64, to hold so many at a time.",
                stacklevel=2,
            )

    def _check_examples(self, problem: Problem) -> None:
        """Raise a ValueError where examples cannot have directions of their own, if asked for."""
        if not self.by_example:
            return
        name = "WeightPerturbation(per_example=True)"
        if self.tangents.per_example:
            name = "tangents.LowRank(per_example=True)"
        if problem.num_examples is None:
            raise ValueError(
                f"{name} needs examples: expected in_axes, got None. "
                "Pass in_axes, as in in_axes=(None, 0, 0), or per_example=False."
            )
        if not isinstance(self.combine, Mean):
            raise ValueError(
                f"{name} gives each example its own slopes: expected "
                f"combine.Mean(), got {type(self.combine).__name__}, which needs the law of the "
                "whole estimate. Use combine.Mean(), or per_example=False."
            )
        if any(_mesh.tree_axes(problem.params)):
            raise ValueError(
                f"{name} needs whole parameters on every device, but "
                "inside shard_map they vary over mesh axes. Replicate them, or use "
                "per_example=False."
            )

    def basis(self, problem: Problem) -> "WeightPerturbation | None":
        """This rule along each coordinate once; None for factors, which other code follows."""
        if self.tangents.planned == "factors":
            return None
        n = _tree.num_coordinates(problem.params)
        return dataclasses.replace(
            self, tangents=Coordinate(replace=False), num_tangents=n
        )

    def relative_mse(self, n: int) -> float:
        """The law of the tangents and their combination, for n real coordinates of the parameters.

        Not a number with `per_example=True`, where it depends on how far the examples agree.
        """
        return self.combine.relative_mse(self._mean_law(n), n, self.num_tangents)

    def learning_rate_scale(self, n: int) -> float:
        """1 / (1 + M) for the mean of relative MSE M.

        k / (n + k + 1) for normals, k / (n + k - 1) for signs.
        """
        return self.combine.learning_rate_scale(self._mean_law(n))

    def _mean_law(self, n: int) -> float:
        self.tangents.check(n, self.num_tangents)
        if self.by_example:  # it depends on how far the examples agree
            return math.nan
        return self.tangents.relative_mse(n, self.num_tangents)
