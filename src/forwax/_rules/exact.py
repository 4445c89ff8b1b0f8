"""The exact gradient by forward mode: one slope per coordinate."""

import dataclasses

import jax
from jax import Array

from forwax import _mesh, _tree
from forwax._checks import register_checked, set_counts
from forwax._directions.formed import Formed, basis_vectors
from forwax._pushforward import slopes
from forwax._rule import Rule
from forwax._signature import Problem
from forwax._tree import Tree


@register_checked
@dataclasses.dataclass(frozen=True)
class Exact(Rule):
    """The gradient without reverse mode: n slopes along the basis vectors, in chunks.

    Costs 1 + 2n forward passes (and one more per further chunk): for programs of few parameters
    that reverse mode rejects, and as the reference for random rules. Needs no noise; the key is
    ignored. A derivative that is infinite or not a number stays in the coordinates that it belongs
    to: what a basis vector does not move counts as 0, also times infinity, but for what happens
    inside a `while_loop` or `cond`.

    The fastest chunk size hangs on the program: `forwax.diagnose` times some. Where it solves small
    linear systems on a CPU, as MuJoCo's MJX does, set the environment variable
    OPENBLAS_NUM_THREADS=1: with many basis vectors at a time the BLAS library splits each of these
    solves over threads, which wait for one another, on busy cores far longer than they work. Chunks
    of up to ten avoid it too.

    Attributes:
        chunk_size: the most basis vectors at a time, None for all n at once.

    Raises:
        ValueError: when the chunk size is not a positive integer.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> def loss(x):  # reverse mode rejects a while_loop
        ...     return jax.lax.while_loop(lambda s: jnp.sum(s) < 100, lambda s: s * 2, x).sum()
        >>> fx.grad(loss, fx.Exact())(jax.random.key(0), jnp.array([1.0, 2.0])).tolist()
        [64.0, 64.0]
    """

    chunk_size: int | None = dataclasses.field(default=56, metadata={"static": True})

    def __post_init__(self) -> None:
        set_counts(self, or_none="chunk_size")

    def estimate(self, key: Array, problem: Problem) -> tuple[Array, Tree, Tree]:
        """The gradient; see `Rule.estimate`."""
        params = problem.params
        n = _tree.num_coordinates(params)
        if n == 0:
            return *problem.objective(params), params

        basis = basis_vectors(params)
        directions = Formed(
            params,
            lambda key: basis,
            has_zeros=True,
            objective=problem.objective,
        )
        result = slopes(directions, basis, n, chunk_size=self.chunk_size)
        return result.value, result.aux, _gradient(result.found, params)

    def in_chunks(self, problem: Problem) -> dict[int, Rule]:
        """Few at a time, more, and all at once; see `Rule.in_chunks`."""
        n = _tree.num_coordinates(problem.params)
        own = min(self.chunk_size or n, n)
        sizes = [size for size in (7, 56, n) if size <= n and size != own]
        return {size: dataclasses.replace(self, chunk_size=size) for size in sizes}

    def relative_mse(self, n: int) -> float:
        """Zero: nothing is random."""
        return 0.0

    def learning_rate_scale(self, n: int) -> float:
        """One: the rate of the exact gradient."""
        return 1.0


def _gradient(slopes: Array, params: Tree) -> Tree:
    """The gradient whose real coordinates are the slopes [n].

    Conjugate, as `jax.grad` writes complex gradients.
    """
    loss_axes = _mesh.axes(slopes)
    if any(over - loss_axes for over in _mesh.tree_axes(params)):
        raise ValueError(
            "Exact: inside shard_map every parameter must be one that the loss varies with on its "
            "own device, but some are sharded over mesh axes that the loss sums over. Use "
            "WeightPerturbation there, or return each device's own loss."
        )
    specs = _tree.real_specs(params)
    # cast last, once the slopes of several devices are summed
    widest = [_tree.Spec(spec.shape, slopes.dtype) for spec in specs]
    parts = _tree.split_flat(slopes, widest)
    gradient = _tree.conjugate(_tree.from_real(parts, params))

    def whole(x: Array, leaf: Array) -> Array:
        others = loss_axes - _mesh.axes(leaf)
        return _mesh.total(x, others).astype(leaf.dtype)

    return jax.tree.map(whole, gradient, params)
