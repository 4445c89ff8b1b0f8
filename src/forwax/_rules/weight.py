"""Weight perturbation: the forward gradient of Baydin et al. 2022, "Gradients without Backpropagation"."""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax import _mesh, _tree
from forwax._assemble import Assembly
from forwax._directions.plan import WeightPlan, plan_low_rank, plan_signs
from forwax._pushforward import is_staged, pushforward, scan_with_aux
from forwax._rule import Rule, check_count, check_directions, check_replicated
from forwax._signature import Problem
from forwax._tree import Tree
from forwax.combine import Combine, Mean
from forwax.tangents import LowRank, Rademacher, Tangents
from forwax.tangents._base import sampler


@jax.tree_util.register_dataclass
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

    Raises:
        TypeError: when tangents or combination are of another kind.
        ValueError: when a count is not a positive integer, or where
            `tangents.LowRank(per_example=True)` cannot be followed: without `in_axes`, with a
            combination other than `Mean`, with sharded parameters.

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

    def guarded(
        self, key: Array, problem: Problem, guard: Callable[[Array], Array]
    ) -> tuple[Array, Tree, Tree, Array]:
        """An estimate with guarded slopes; see `Rule.guarded`."""
        check_replicated("WeightPerturbation", problem.params, _mesh.axes(key))
        return self._estimate(key, problem, guard)

    def _estimate(
        self, key: Array, problem: Problem, guard: Callable[[Array], Array] | None
    ) -> tuple[Array, Tree, Tree, Array]:
        check_directions("WeightPerturbation", self.tangents, self.combine)
        plan = self.plan(problem, _mesh.axes(key))
        if plan is not None:
            return self._planned(key, plan, guard)
        k, key_axes = self.num_tangents, _mesh.axes(key)
        assembly = Assembly(self.tangents, self.combine, problem.params, key_axes, guard)
        draw = sampler(self.tangents, key, problem.params, k, hold=self.combine.joint)
        point = jax.tree.map(lambda leaf: _mesh.vary(leaf, key_axes), problem.params)
        fold = None if self.combine.joint else assembly.add
        value, aux, slopes, total = pushforward(
            problem.objective,
            point,
            draw,
            k,
            chunk_size=self.chunk_size,
            fold=fold,
            start=assembly.start(),
        )
        if self.combine.joint:
            total = assembly.add(total, slopes, draw(jnp.arange(k)))
        if guard is not None:
            slopes = _mesh.total(slopes, _mesh.axes(slopes) - key_axes)
        return value, aux, assembly.finish(total, k), slopes

    def plan(self, problem: Problem, key_axes: _mesh.Axes = frozenset()) -> WeightPlan | None:
        """How signs are formed where the traced loss uses them, or None where directions are held, for `jax.jvp`.

        Dense signs are planned inside a trace alone: outside, the loss may branch on concrete
        values.

        Raises:
            ValueError: where examples cannot have directions of their own, though the tangents ask
                for it.
        """
        point = jax.tree.map(lambda leaf: _mesh.vary(leaf, key_axes), problem.params)
        varied = dataclasses.replace(problem, params=point)
        possible = self.combine.coordinatewise and not any(_mesh.tree_axes(problem.params))
        if isinstance(self.tangents, LowRank):
            self._check_examples(problem, self.tangents)
            return (
                plan_low_rank(varied, self.tangents.rank, self.tangents.per_example)
                if possible
                else None
            )
        dense = isinstance(self.tangents, Rademacher) and possible and is_staged()
        return plan_signs(varied) if dense else None

    def _check_examples(self, problem: Problem, tangents: LowRank) -> None:
        """Raise a ValueError where examples cannot have directions of their own, though the tangents ask for it."""
        if not tangents.per_example:
            return
        if problem.num_examples is None:
            raise ValueError(
                "tangents.LowRank(per_example=True) needs examples: expected in_axes, got None. "
                "Pass in_axes, as in "
                "in_axes=(None, 0, 0), or per_example=False."
            )
        if not isinstance(self.combine, Mean):
            raise ValueError(
                "tangents.LowRank(per_example=True) gives each example its own slopes: expected "
                "combine.Mean(), got "
                f"{type(self.combine).__name__}, which needs the law of the whole estimate. Use "
                f"combine.Mean(), or "
                "per_example=False."
            )
        if any(_mesh.tree_axes(problem.params)):
            raise ValueError(
                "tangents.LowRank(per_example=True) needs whole parameters on every device, but "
                "inside shard_map they "
                "vary over mesh axes. Replicate them, or use per_example=False."
            )

    def _planned(
        self, key: Array, plan: WeightPlan, guard: Callable[[Array], Array] | None
    ) -> tuple[Array, Tree, Tree, Array]:
        """The slopes along signs that are pushed through the traced loss."""
        k, params = self.num_tangents, plan.problem.params
        num_chunks = -(-k // (self.chunk_size or k))
        size = -(-k // num_chunks)
        n = _tree.num_coordinates(params)
        law = self.tangents.relative_mse(n, k) if n else 0.0
        scale = self.combine.finish(1.0, k, law) / plan.num_examples

        def used(slopes: Array, indices: Array) -> tuple[Array, Array]:
            found = _mesh.total(slopes, _mesh.axes(slopes) - _mesh.axes(key))
            weights = (found if guard is None else guard(found)) * scale
            return found, jnp.where((indices < k).reshape(-1, *[1] * (slopes.ndim - 1)), weights, 0)

        def chunk(total: Tree, first: Array) -> tuple[Tree, tuple[Array, Array], Tree]:
            drawn = plan.draw(key, first + jnp.arange(size))
            # else the compiler takes the primal out of the loop and keeps every activation
            leaves, drawn = lax.optimization_barrier((plan.leaves, drawn))
            here = plan.at(leaves)
            value, aux, slopes = here.push(drawn, size)
            found, weights = used(slopes, first + jnp.arange(size))
            return here.add(total, weights, drawn), (value, found), aux

        if num_chunks == 1:
            drawn = plan.draw(key, jnp.arange(k))
            value, aux, slopes = plan.push(drawn, k)
            found, weights = used(slopes, jnp.arange(k))
            total = plan.assemble(weights, drawn)
        else:
            firsts = jnp.arange(num_chunks) * size
            start = Assembly(self.tangents, self.combine, params, _mesh.axes(key)).start()
            total, (values, found), aux = scan_with_aux(chunk, start, firsts)
            value, found = values[0], found.reshape(-1, *found.shape[2:])[:k]
        return (
            value,
            aux,
            jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), total, params),
            found,
        )

    def relative_mse(self, n: int) -> float:
        """The law of the tangents and their combination, for n real coordinates of the parameters.

        Not a number with `tangents.LowRank(per_example=True)`, where it depends on how far the
        examples agree.
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
