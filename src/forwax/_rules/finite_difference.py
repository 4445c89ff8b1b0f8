"""Slopes from two evaluations each, without any derivative rule.

The zeroth-order estimator of SPSA (Spall 1992) and MeZO (Malladi et al. 2023, "Fine-Tuning Language
Models with Just Forward Passes").
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax import _mesh, _tree
from forwax._assemble import Weighing
from forwax._checks import register_checked, set_counts
from forwax._directions.drawing import Drawing
from forwax._directions.formed import Formed, InFull
from forwax._directions.plan import (
    WeightPlan,
    default_splits,
    dense_splits,
    drawn_in_full,
    plan_in_place,
)
from forwax._directions.steps import Steps, is_number
from forwax._programs.order import behind
from forwax._pushforward import Along, in_turn, is_concrete, is_staged
from forwax._rule import Rule, check_directions, check_replicated, check_shared
from forwax._signature import Problem
from forwax._tree import Tree
from forwax.combine import Combine, Mean
from forwax.tangents import LowRank, Rademacher, Tangents
from forwax.tangents._base import sampler


@register_checked
@dataclasses.dataclass(frozen=True)
class FiniteDifference(Rule):
    """Central differences c_j = (f(θ + ε v_j) - f(θ - ε v_j)) / 2ε.

    In place of Jacobian-vector products, for losses without a derivative rule, `jax.custom_vjp`
    functions included. Costs 2k evaluations, one at a time. The directions are drawn anew from
    their seeds when the estimate is summed up, not stored, unless they are drawn jointly or the
    combination needs all of them.

    The estimate is that of `WeightPerturbation` up to a bias of order ε² and two roundings: of
    order u|f|/ε, with u the rounding unit of the loss (float32: 6e-8), and, relative to the slope,
    of order u|θ|/ε, with u that of a parameter θ (bfloat16: 4e-3). `value` is the mean of all
    evaluations, the loss up to order ε²; `aux` is that of the first evaluation.

    A step below the spacing of the floats around θ would move nothing. So no parameter's step is
    below eight such spacings: where ε is less, as for θ = 1e5 in float32, its direction is scaled
    by a factor s > 1. It moves by ε s v, and its estimate is c v / s, unbiased as before. The
    factors are those of single parameters; with `tangents.LowRank` they are those of whole leaves,
    whose root mean square then moves by eight spacings and whose largest entry by one. The relative
    MSE of one tangent of signs is (Σ g² s²)(Σ 1/s²) / |g|² - 1: n - 1 where all factors are equal,
    as they are for parameters of ordinary size.

    Attributes:
        tangents: the distribution of directions.
        num_tangents: the number k of directions.
        combine: how slopes and directions become one estimate.
        epsilon: the step ε, in units of a direction's entries. None is 1e-3 as in MeZO, or eight
            spacings of the parameters' type at 1 where that is more (bfloat16: 0.0625). An array,
            as of a schedule, counts as at least one such spacing.

    Raises:
        TypeError: when tangents or combination are of another kind.
        ValueError: when the count is not a positive integer, or a step that is a Python number is
            not positive and finite, or too small for the dtype of a parameter near 1.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> rule = fx.FiniteDifference(fx.tangents.Orthonormal(), num_tangents=2, epsilon=0.1)
        >>> gradient = fx.grad(lambda x: jnp.sum(x**2), rule)
        >>> gradient(jax.random.key(0), jnp.array([1.0, 2.0])).round(3).tolist()
        [2.0, 4.0]
    """

    tangents: Tangents = Rademacher()  # noqa: RUF009 (a frozen value)
    num_tangents: int = dataclasses.field(default=1, metadata={"static": True})
    combine: Combine = Mean()  # noqa: RUF009
    epsilon: float | Array | None = None

    has_slopes: ClassVar[bool] = True
    by_example: ClassVar[bool] = False
    splits_by_loss: ClassVar[bool] = False

    def __post_init__(self) -> None:
        set_counts(self, "num_tangents")
        check_directions("FiniteDifference", self.tangents, self.combine)
        if is_number(self.epsilon) and not 0 < self.epsilon < math.inf:
            raise ValueError(
                "FiniteDifference: expected epsilon, the length of a step, to be positive and "
                f"finite, got {self.epsilon}: both signs are evaluated anyway. Leave it out for a "
                "step that suits the parameters' type."
            )

    @property
    def unbiased(self) -> bool:
        """Never: the bias is of order ε²."""
        return False

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
        check_replicated("FiniteDifference", problem.params, _mesh.axes(key))
        return self._estimate(key, problem, guard)

    def _estimate(
        self,
        key: Array,
        problem: Problem,
        guard: Callable[[Array], Array] | None,
    ) -> tuple[Array, Tree, Tree, Array]:
        if _tree.num_coordinates(problem.params) == 0:  # nothing to estimate
            nothing = jnp.zeros(self.num_tangents)
            return *problem.objective(problem.params), problem.params, nothing
        k = self.num_tangents
        key_axes = _mesh.axes(key)
        directions = self.directions(problem, key_axes)
        point = directions.point
        steps = self.steps(point)
        weighing = Weighing(self.tangents, self.combine, problem.params, key_axes)
        result = self._slopes(directions, key, steps, guard)
        hold = self.combine.joint

        def weighed(slopes: Array, drawn: Tree) -> tuple[Tree, Tree]:
            """The weights, and what they are the weights of."""
            # Slopes are taken along s v. A projection is on the span of these; a sum is of v / s.
            late = jax.tree.map(lambda leaf: behind(leaf, [slopes]), point)
            pushed = jax.tree.map(steps.scaled, late, drawn)
            weights = weighing.weights(slopes, pushed)
            if hold:
                return weights, pushed
            return weights, jax.tree.map(steps.divided, late, drawn)

        slopes = result.used
        if hold or not self.tangents.one_by_one:
            drawn = directions.sampler(key)(jnp.arange(k))
            weights, summed = weighed(slopes, drawn)
            total = directions.assemble(weights, summed)
        else:
            # The barrier makes the second drawing wait for the slopes; merged with the first, it
            # would be stored. Behind one barrier both vary over the same mesh axes, and the key
            # must keep its own.
            known = _mesh.reduced(slopes, key_axes)
            again, _ = lax.optimization_barrier((key, known))
            redraw = directions.sampler(again)

            def add(j: Array, total: Tree) -> Tree:
                weights, summed = weighed(slopes[j][None], redraw(j[None]))
                return directions.add(total, weights, summed)

            total = weighing.start()
            if k == 1:
                total = add(jnp.asarray(0), total)
            else:
                total = lax.fori_loop(0, k, add, total)
        grads = weighing.finish(total, k)
        return result.value, result.aux, grads, result.found

    def directions(
        self, problem: Problem, key_axes: _mesh.Axes = frozenset()
    ) -> Formed:
        """Directions that are held, at parameters of the types in which the loss gets them."""
        check_shared("FiniteDifference", self.tangents)
        params = problem.narrow(problem.params)  # a step must show in these types
        point = jax.tree.map(lambda leaf: _mesh.vary(leaf, key_axes), params)

        return Formed(
            point,
            self._source(params),
            self.tangents.has_zeros,
            objective=problem.objective,
        )

    def _source(self, params: Tree) -> Callable[[Array], Callable[[Array], Tree]]:
        """What takes a key to directions that are held."""

        def source(key: Array) -> Callable[[Array], Tree]:
            k = self.num_tangents
            return sampler(self.tangents, key, params, k, hold=self.combine.joint)

        return source

    def in_place(
        self,
        problem: Problem,
        key_axes: _mesh.Axes = frozenset(),
        per_example: bool = False,
    ) -> Formed | WeightPlan:
        """The directions of `forwax.slopes`: inside a trace formed where the loss uses them.

        Raises:
            TypeError: where slopes of each example's own are asked for.
        """
        if per_example:
            raise TypeError(
                "slopes: per_example=True needs a slope for each example along shared tangents, "
                "expected forwax.WeightPerturbation, got FiniteDifference. Use that rule, or leave "
                "per_example out."
            )
        formed = self.directions(problem, key_axes)
        if not is_staged():
            return formed
        varied = dataclasses.replace(problem, params=formed.point)
        plan = plan_in_place(varied, self.tangents)
        return formed if plan is None else plan

    def drawing(self, params: Tree, splits: Any, examples: int | None) -> Any:
        """How directions are drawn again and added; see `WeightPerturbation.drawing`."""
        tangents = self.tangents
        check_shared("FiniteDifference", tangents)
        if drawn_in_full(params, tangents):
            return InFull(params, self._source(params), tangents.has_zeros)
        if tangents.planned == "signs":
            return Drawing(params, dense_splits(params), lazy=True)
        rank = cast(LowRank, tangents).rank
        return Drawing(params, default_splits(params), rank)

    def slopes_along(
        self,
        directions: Formed | WeightPlan,
        key: Array,
        is_summed: bool,
    ) -> tuple[Along, Any]:
        """The slopes of `forwax.slopes`, added up over devices in any case, and what was drawn.

        None where it is large or many, and better drawn again than held.
        """
        params = directions.tree_of(jax.tree.leaves(directions.point))
        whole = lambda slopes: slopes  # noqa: E731
        k = self.num_tangents
        drawn = None
        if directions.most_held is None and k <= directions.together:
            drawn = directions.sampler(key)(jnp.arange(k))
        return self._slopes(directions, key, self.steps(params), whole, drawn), drawn

    def _slopes(
        self,
        directions: Formed | WeightPlan,
        key: Array,
        steps: Steps,
        guard: Callable[[Array], Array] | None,
        held: Any = None,
    ) -> Along:
        """Two evaluations for each slope, one at a time; their mean is the value."""
        draw = directions.sampler(key)
        if held is not None:
            draw = lambda indices: jax.tree.map(lambda x: x[indices], held)  # noqa: E731
        as_scan = not directions.is_concrete

        def evaluate(_: None, index: Array) -> tuple[None, Any, Tree]:
            drawn = draw(index[None])
            direction: Any = jax.tree.map(lambda x: x[0], drawn)

            def side(_: None, sign: Array) -> tuple[None, Array, Tree]:
                value, aux = directions.evaluate(direction, sign, steps)
                return None, value, aux

            # each side in its turn, so that one evaluation is held
            signs = jnp.array([1.0, -1.0])
            is_scan = as_scan or not is_concrete(direction)
            _, values, aux = in_turn(side, None, signs, as_scan=is_scan, reverse=True)
            wide = values.astype(_tree.accumulation_dtype(values.dtype))
            distance = 2 * jnp.asarray(steps.epsilon, wide.dtype)
            slope = (wide[0] - wide[1]) / distance
            return None, (jnp.mean(values), slope), aux

        # backwards, so that the aux is that of the first evaluation
        _, outs, aux = in_turn(
            evaluate,
            None,
            jnp.arange(self.num_tangents),
            as_scan=as_scan,
            reverse=True,
        )
        values, found = outs
        used = found
        if guard is not None:  # it needs whole slopes
            others = _mesh.axes(found) - _mesh.axes(key)
            found = _mesh.total(found, others)
            used = guard(found)
        return Along(jnp.mean(values), aux, found, used, None)

    def steps(self, params: Tree) -> Steps:
        """How far each parameter is moved.

        Raises:
            ValueError: when a step that is a Python number is too small for a parameter's type.
        """
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(params)]
        units = [float(jnp.finfo(dtype).eps) for dtype in dtypes]
        most = max(units, default=0.0)  # the widest spacing of floats at 1
        by_leaf = self.tangents.planned == "factors"
        if self.epsilon is None:
            return Steps(max(1e-3, 8 * most), by_leaf)
        if not is_number(self.epsilon):
            # What is traced cannot be refused.
            size = jnp.abs(jnp.asarray(self.epsilon))
            wide = size.astype(_tree.promoted(size.dtype, jnp.float32))
            return Steps(jnp.maximum(wide, most), by_leaf)
        if self.epsilon < most:
            dtype = dtypes[units.index(most)]
            root = (most / 2) ** (1 / 3)  # where ε² and u/ε are alike
            raise ValueError(
                f"FiniteDifference: expected epsilon of at least {most} for parameters in "
                f"{dtype}, got {self.epsilon}: a parameter of 1 would not move by it. Pass "
                f"epsilon={root:.2g}, leave it out, or keep the parameters in float32."
            )
        return Steps(self.epsilon, by_leaf)

    def relative_mse(self, n: int) -> float:
        """The law of tangents and combination for n real coordinates of the parameters, ε → 0."""
        return self.combine.relative_mse(self._mean_law(n), n, self.num_tangents)

    def learning_rate_scale(self, n: int) -> float:
        """As for `WeightPerturbation`."""
        return self.combine.learning_rate_scale(self._mean_law(n))

    def _mean_law(self, n: int) -> float:
        self.tangents.check(n, self.num_tangents)
        return self.tangents.relative_mse(n, self.num_tangents)
