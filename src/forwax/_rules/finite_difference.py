"""Slopes from two evaluations each, without any derivative rule.

The zeroth-order estimator of SPSA (Spall 1992) and MeZO (Malladi et al. 2023, "Fine-Tuning Language
Models with Just Forward Passes").
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax import _mesh, _tree
from forwax._assemble import Weighing
from forwax._directions.formed import Formed
from forwax._pushforward import in_turn, is_concrete
from forwax._rule import Rule, check_count, check_directions, check_shared
from forwax._signature import Problem
from forwax._tree import Tree
from forwax.combine import Combine, Mean
from forwax.tangents import Rademacher, Tangents
from forwax.tangents._base import sampler


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FiniteDifference(Rule):
    """Central differences c_j = (f(θ + ε v_j) - f(θ - ε v_j)) / 2ε.

    In place of Jacobian-vector products, for losses without a derivative rule, `jax.custom_vjp`
    functions included. Costs 2k evaluations, one at a time. The directions are drawn anew from
    their seeds when the estimate is summed up, not stored, unless they are drawn jointly or the
    combination needs all of them.

    The estimate is that of `WeightPerturbation` up to a bias of order ε² and two roundings: of
    order u|f|/ε, with u the rounding unit of the loss (float32: 6e-8), and, relative to the slope,
    of order u|θ|/ε, with u that of a parameter θ (bfloat16: 4e-3): a step below the spacing of the
    floats around θ moves nothing. So ε must grow with |θ|, and parameters of low precision need a
    large one. `value` is the mean of all evaluations, the loss up to order ε²; `aux` is that of the
    first evaluation.

    Attributes:
        tangents: the distribution of directions.
        num_tangents: the number k of directions.
        combine: how slopes and directions become one estimate.
        epsilon: the step ε, in units of a direction's entries (1e-3 as in MeZO).

    Raises:
        TypeError: when tangents or combination are of another kind.
        ValueError: when the count is not a positive integer, or a step that is a Python number is
            too small for the dtype of a parameter near 1.

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
    epsilon: float | Array = 1e-3

    def __post_init__(self) -> None:
        check_count("FiniteDifference", "num_tangents", self.num_tangents)

    @property
    def unbiased(self) -> bool:
        """Never: the bias is of order ε²."""
        return False

    def estimate(self, key: Array, problem: Problem) -> tuple[Array, Tree, Tree]:
        """One estimate; see `Rule.estimate`."""
        check_directions("FiniteDifference", self.tangents, self.combine)
        check_shared("FiniteDifference", self.tangents)
        self._check_step(problem.params)
        k = self.num_tangents
        key_axes = _mesh.axes(key)
        params = problem.params
        weighing = Weighing(self.tangents, self.combine, params, key_axes)
        point = jax.tree.map(lambda leaf: _mesh.vary(leaf, key_axes), params)

        def source(key: Array) -> Callable[[Array], Tree]:
            hold = self.combine.joint
            return sampler(self.tangents, key, params, k, hold=hold)

        directions = Formed(problem.objective, point, source)
        draw = directions.sampler(key)

        def evaluate(_: None, index: Array) -> tuple[None, Any, Tree]:
            drawn = draw(index[None])
            tangent = jax.tree.map(lambda x: x[0], drawn)
            value, slope, aux = self._slope(problem, point, tangent)
            return None, (value, slope), aux

        # backwards, so that the aux is that of the first evaluation
        as_scan = not directions.is_concrete
        _, outs, aux = in_turn(
            evaluate,
            None,
            jnp.arange(k),
            as_scan=as_scan,
            reverse=True,
        )
        values, slopes = outs
        if self.combine.joint or not self.tangents.one_by_one:
            drawn = draw(jnp.arange(k))
            weights = weighing.weights(slopes, drawn)
            total = directions.assemble(weights, drawn)
        else:
            # The barrier makes the second drawing wait for the slopes; merged with the first, it
            # would be stored. Behind one barrier both vary over the same mesh axes, and the key
            # must keep its own.
            known = _mesh.reduced(slopes, key_axes)
            again, _ = lax.optimization_barrier((key, known))
            redraw = directions.sampler(again)

            def add(j: Array, total: Tree) -> Tree:
                drawn = redraw(j[None])
                weights = weighing.weights(slopes[j][None], drawn)
                return directions.add(total, weights, drawn)

            total = weighing.start()
            if k == 1:
                total = add(jnp.asarray(0), total)
            else:
                total = lax.fori_loop(0, k, add, total)
        return jnp.mean(values), aux, weighing.finish(total, k)

    def _check_step(self, params: Tree) -> None:
        if not isinstance(self.epsilon, int | float):
            return
        for leaf in jax.tree.leaves(params):
            least = float(jnp.finfo(leaf.dtype).eps)
            if not self.epsilon >= least:
                raise ValueError(
                    f"FiniteDifference: expected epsilon of at least {least} for parameters in "
                    f"{leaf.dtype}, got {self.epsilon}: a parameter of 1 would not move by it. "
                    f"Pass epsilon={8 * least:.2g}, or keep the parameters in float32."
                )

    def _slope(
        self,
        problem: Problem,
        point: Tree,
        tangent: Tree,
    ) -> tuple[Array, Array, Tree]:
        """The mean of both sides' values, their central difference, and the first side's aux."""

        def side(_: None, sign: Array) -> tuple[None, Array, Tree]:
            step = sign * self.epsilon

            def shifted(x: Array, v: Array) -> Array:
                return x + step.astype(x.dtype) * v

            params = jax.tree.map(shifted, point, tangent)
            value, aux = problem.objective(params)
            return None, value, aux

        # each side in its turn, so that one evaluation is held
        _, values, aux = in_turn(
            side,
            None,
            jnp.array([1.0, -1.0]),
            as_scan=not is_concrete((point, tangent)),
            reverse=True,
        )
        dtype = _tree.accumulation_dtype(values.dtype)
        wide = values.astype(dtype)
        distance = 2 * jnp.asarray(self.epsilon, dtype)
        slope = (wide[0] - wide[1]) / distance
        return jnp.mean(values), slope, aux

    def relative_mse(self, n: int) -> float:
        """The law of tangents and combination for n real coordinates of the parameters, ε → 0."""
        return self.combine.relative_mse(self._mean_law(n), n, self.num_tangents)

    def learning_rate_scale(self, n: int) -> float:
        """As for `WeightPerturbation`."""
        return self.combine.learning_rate_scale(self._mean_law(n))

    def _mean_law(self, n: int) -> float:
        self.tangents.check(n, self.num_tangents)
        return self.tangents.relative_mse(n, self.num_tangents)
