"""Weight perturbation: the forward gradient of Baydin et al. 2022, "Gradients without Backpropagation"."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax import _mesh, _tree
from forwax._rule import Rule, check_count, check_directions, check_replicated
from forwax._signature import Problem
from forwax._tree import Tree
from forwax.assemble import Assembly
from forwax.combine import Combine, Mean
from forwax.pushforward import pushforward
from forwax.sites import plan_low_rank
from forwax.tangents import LowRank, Rademacher, Tangents
from forwax.tangents._base import sampler


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightPerturbation(Rule):
    """The loss's slopes along k random directions of all parameters, times these directions.

    With slopes c_j = <g, v_j> from one Jacobian-vector product each, the estimate is mean_j c_j v_j, unbiased because
    E[v vᵀ] = I; see `forwax.combine` for other combinations. Cost: one forward pass and two more per tangent. Memory
    does not grow with depth, since nothing is kept for a backward pass.

    Attributes:
        tangents: the distribution of directions; random signs have the least variance.
        num_tangents: the number k of directions.
        combine: how slopes and directions become one estimate.
        chunk_size: the most directions at a time, None for all at once. The estimate is the same up to rounding; the
            primal is evaluated once per chunk.

    Raises:
        TypeError: when tangents or combination are of another kind.
        ValueError: when a count is not a positive integer, or where `tangents.LowRank(per_example=True)` cannot be
            followed: without `in_axes`, with a combination other than `Mean`, with sharded parameters.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> rule = fx.WeightPerturbation(num_tangents=3, tangents=fx.tangents.Orthonormal())
        >>> grads = fx.grad(lambda x: jnp.sum(x**2), rule)(jax.random.key(0), jnp.array([1.0, 2.0, 3.0]))
        >>> bool(jnp.allclose(grads, jnp.array([2.0, 4.0, 6.0]), atol=1e-4))  # as many as parameters: exact
        True
    """

    tangents: Tangents = Rademacher()  # noqa: RUF009 (a frozen value)
    num_tangents: int = dataclasses.field(default=1, metadata={"static": True})
    combine: Combine = Mean()  # noqa: RUF009
    chunk_size: int | None = dataclasses.field(default=None, metadata={"static": True})

    has_slopes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("WeightPerturbation", "num_tangents", self.num_tangents)
        if self.chunk_size is not None:
            check_count("WeightPerturbation", "chunk_size", self.chunk_size)

    @property
    def unbiased(self) -> bool:
        """Whether the combination keeps the estimate unbiased."""
        return self.combine.unbiased

    def estimate(self, key: Array, problem: Problem) -> tuple[Array, Tree, Tree]:
        """One estimate; see `Rule.estimate`."""
        return self._estimate(key, problem, None)[:3]

    def guarded(self, key: Array, problem: Problem, guard: Callable[[Array], Array]) -> tuple[Array, Tree, Tree, Array]:
        """An estimate with guarded slopes; see `Rule.guarded`."""
        check_replicated("WeightPerturbation", problem.params, _mesh.axes(key))
        return self._estimate(key, problem, guard)

    def _estimate(
        self, key: Array, problem: Problem, guard: Callable[[Array], Array] | None
    ) -> tuple[Array, Tree, Tree, Array]:
        check_directions("WeightPerturbation", self.tangents, self.combine)
        if isinstance(self.tangents, LowRank):
            self.check_examples(problem, self.tangents)
            if self.combine.coordinatewise and not any(_mesh.tree_axes(problem.params)):
                return self._low_rank(key, problem, self.tangents, guard)
        k, key_axes = self.num_tangents, _mesh.axes(key)
        assembly = Assembly(self.tangents, self.combine, problem.params, key_axes, guard)
        draw = sampler(self.tangents, key, problem.params, k, hold=self.combine.joint)
        point = jax.tree.map(lambda leaf: _mesh.vary(leaf, key_axes), problem.params)
        fold = None if self.combine.joint else assembly.add
        value, aux, slopes, total = pushforward(
            problem.objective, point, draw, k, chunk_size=self.chunk_size, fold=fold, start=assembly.start()
        )
        if self.combine.joint:
            total = assembly.add(total, slopes, draw(jnp.arange(k)))
        if guard is not None:
            slopes = _mesh.total(slopes, _mesh.axes(slopes) - key_axes)
        return value, aux, assembly.finish(total, k), slopes

    def check_examples(self, problem: Problem, tangents: LowRank) -> None:
        """Raise a ValueError where examples cannot have directions of their own, though the tangents ask for it."""
        if not tangents.per_example:
            return
        if problem.num_examples is None:
            raise ValueError(
                "tangents.LowRank(per_example=True) needs examples: expected in_axes, got None. Pass in_axes, as in "
                "in_axes=(None, 0, 0), or per_example=False."
            )
        if not isinstance(self.combine, Mean):
            raise ValueError(
                "tangents.LowRank(per_example=True) gives each example its own slopes: expected combine.Mean(), got "
                f"{type(self.combine).__name__}, which needs the law of the whole estimate. Use combine.Mean(), or "
                "per_example=False."
            )
        if any(_mesh.tree_axes(problem.params)):
            raise ValueError(
                "tangents.LowRank(per_example=True) needs whole parameters on every device, but inside shard_map they "
                "vary over mesh axes. Replicate them, or use per_example=False."
            )

    def _low_rank(
        self, key: Array, problem: Problem, tangents: LowRank, guard: Callable[[Array], Array] | None
    ) -> tuple[Array, Tree, Tree, Array]:
        """The slopes along factors, pushed through the traced loss."""
        plan, k = plan_low_rank(problem, tangents.per_example), self.num_tangents
        num_chunks = -(-k // (self.chunk_size or k))
        size = -(-k // num_chunks)
        law = tangents.relative_mse(_tree.num_coordinates(problem.params), k)
        scale = self.combine.finish(1.0, k, law) / (problem.num_examples if tangents.per_example else 1)

        def chunk(first: Any, leaves: Sequence[Array]) -> tuple[Tree, tuple[Array, Tree, Array]]:
            indices = first + jnp.arange(size)
            drawn = plan.draw(key, indices, tangents.rank)
            if num_chunks > 1:  # else the compiler takes the primal out of the loop and keeps every activation
                leaves, drawn = lax.optimization_barrier((list(leaves), drawn))
            here = plan.at(leaves)
            value, aux, slopes = here.push(drawn, size, tangents.rank)
            found = _mesh.total(slopes, _mesh.axes(slopes) - _mesh.axes(key))
            slopes = (found if guard is None else guard(found)) * scale
            if num_chunks * size > k:
                slopes = jnp.where((indices < k).reshape(size, *[1] * (slopes.ndim - 1)), slopes, 0)
            return here.assemble(slopes, drawn, tangents.rank), (value, aux, found)

        total, (value, aux, slopes) = chunk(0, plan.leaves)
        if num_chunks > 1:

            def add(total: Tree, first: Array) -> tuple[Tree, Array]:
                more, (_, _, found) = chunk(first, plan.leaves)
                return jax.tree.map(jnp.add, total, more), found

            total, others = lax.scan(add, total, jnp.arange(1, num_chunks) * size)
            slopes = jnp.concatenate([slopes, others.reshape(-1, *slopes.shape[1:])])[:k]
        return value, aux, jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), total, problem.params), slopes

    def relative_mse(self, n: int) -> float:
        """The law of the tangents and their combination, for n real coordinates of the parameters.

        Not a number with `tangents.LowRank(per_example=True)`, where it depends on how far the examples agree.
        """
        return self.combine.relative_mse(self._mean_law(n), n, self.num_tangents)

    def learning_rate_scale(self, n: int) -> float:
        """1 / (1 + M) for the mean of relative MSE M: k / (n + k + 1) for normals, k / (n + k - 1) for signs."""
        return self.combine.learning_rate_scale(self._mean_law(n))

    def _mean_law(self, n: int) -> float:
        self.tangents.check(n, self.num_tangents)
        if isinstance(self.tangents, LowRank) and self.tangents.per_example:
            return math.nan
        return self.tangents.relative_mse(n, self.num_tangents)
