"""A training step that never holds a gradient: tangents are drawn again from the key and added to the parameters.

The idea of drawing a direction twice instead of keeping it is that of MeZO (Malladi et al. 2023, arXiv 2305.17333),
here with exact slopes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax import _mesh, _tree
from forwax._signature import Problem, Signature, check_key
from forwax._tree import Tree
from forwax.pushforward import pushforward
from forwax.rules import Rule, WeightPerturbation
from forwax.safety import Safe
from forwax.sites import custom_vjp, plan_low_rank
from forwax.tangents import LowRank, Normal, Rademacher, Sparse
from forwax.tangents._base import sampler, typed_key

_DRAWN_TWICE = (Rademacher, Normal, Sparse)


def update(
    loss: Callable[..., Any],
    rule: Rule = WeightPerturbation(),  # noqa: B008 (a frozen value)
    *,
    learning_rate: float | Array,
    has_aux: bool = False,
    in_axes: Any = None,
) -> Callable[..., Any]:
    """A step of gradient descent along weight tangents, w - learning_rate · ĝ, in which ĝ is never held.

    For the same key it gives what `forwax.value_and_grad` and a subtraction give, up to rounding. Jitted with donated
    parameters it needs, besides these, what inference needs and about one tangent of the largest parameter: slopes come
    first, then each tangent is drawn again, scaled, and subtracted in place, one parameter after the other.

    Args:
        loss: as in `forwax.value_and_grad`; its first argument is the parameters.
        rule: `forwax.WeightPerturbation` with `tangents.Rademacher`, `Normal`, `Sparse` or `LowRank`, the combination
            `Mean` or `Shrinkage`, any number of tangents; with several, `chunk_size=1` holds one at a time. Or
            `forwax.Safe` around such a rule.
        learning_rate: the rate of the step; an array where it changes.
        has_aux: whether the loss returns `(loss, aux)`.
        in_axes: as in `forwax.value_and_grad`.

    Returns:
        A function `f(key, params, *args, **kwargs)` that returns `(value, params)`, with `has_aux`
        `((value, aux), params)`. With `forwax.Safe` the next rule comes third.

    Raises:
        TypeError: when the rule is another one, or the tangents cannot be drawn twice one by one.
        ValueError: when the combination needs all tangents at once, or inside `jax.shard_map` parameters are sharded.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
        >>> step = jax.jit(lambda key, w, x: fx.update(loss, learning_rate=0.01)(key, w, x), donate_argnums=1)
        >>> value, w = step(jax.random.key(0), jnp.ones(3), jnp.eye(3))
        >>> float(value), w.shape
        (1.0, (3,))
    """
    signature = Signature(loss, 0, has_aux, in_axes)
    weight = checked(rule)

    def update_of_loss(key: Any, /, *args: Any, **kwargs: Any) -> Any:
        key, problem = typed_key(check_key(key, "update")), signature.bind(args, kwargs)
        _check_mesh(problem, key)
        find = _low_rank if isinstance(weight.tangents, LowRank) else _dense
        try:
            value, aux, slopes, add = find(weight, key, problem)
        except TypeError as error:
            raise custom_vjp.named(error, problem) from error
        used = rule.guard()(slopes) if isinstance(rule, Safe) else slopes
        n, k = _tree.num_coordinates(problem.params), weight.num_tangents
        scale = weight.combine.finish(1.0, k, weight.tangents.relative_mse(n, k))
        params = add(-jnp.asarray(learning_rate, used.dtype) * scale * used)
        value = (value, problem.restore(aux)) if has_aux else value
        return (value, params, rule.after(slopes)) if isinstance(rule, Safe) else (value, params)

    return update_of_loss


def checked(rule: Any) -> WeightPerturbation:
    """The weight rule of a rule, after the checks of `update`."""
    weight = rule.rule if isinstance(rule, Safe) else rule
    if not isinstance(weight, WeightPerturbation):
        raise TypeError(
            "update: expected forwax.WeightPerturbation, or forwax.Safe around it, whose tangents can be drawn twice, "
            f"got {type(weight).__name__}. Use forwax.value_and_grad and subtract its gradient."
        )
    if not isinstance(weight.tangents, (*_DRAWN_TWICE, LowRank)):
        names = ", ".join(f"tangents.{each.__name__}()" for each in (*_DRAWN_TWICE, LowRank))
        raise TypeError(
            f"update: expected tangents that are drawn one by one and leaf by leaf, one of {names}, got "
            f"{type(weight.tangents).__name__}. Use forwax.value_and_grad and subtract its gradient."
        )
    if not weight.combine.coordinatewise:
        raise ValueError(
            f"update: expected combine.Mean() or combine.Shrinkage(), got {type(weight.combine).__name__}, which needs "
            "all tangents at once. Use forwax.value_and_grad and subtract its gradient."
        )
    return weight


def _check_mesh(problem: Problem, key: Array) -> None:
    if any(_mesh.tree_axes(problem.params)) or _mesh.axes(key):
        raise ValueError(
            "update: expected parameters and a key that do not vary over mesh axes, got "
            f"{sorted({axis for over in _mesh.tree_axes(problem.params) for axis in over} | _mesh.axes(key))}. Inside "
            "shard_map replicate them, or use forwax.value_and_grad and subtract its gradient."
        )


def _after(slopes: Array, key: Array) -> tuple[Array, Array]:
    """The same key, but known only when the slopes are: else the compiler would keep the tangents instead."""
    data, slopes = lax.optimization_barrier((jax.random.key_data(key), slopes))
    return slopes, jax.random.wrap_key_data(data, impl=str(jax.random.key_impl(key)))


def _in_turn(make: Callable[[Array], Tree], coefficients: Array, params: Tree) -> Tree:
    """Add to one leaf after the other: `make` gives all summands, of which all but one are dead code in each call.

    What the next leaf needs is made to depend on the last one, or the compiler would make all summands at once; it
    takes optimisation barriers out before it orders its work, but it cannot know that no parameter is not a number.
    """
    leaves, structure = jax.tree.flatten(params)
    done = []
    for i, leaf in enumerate(leaves):
        summand = jax.tree.leaves(make(coefficients))[i]
        done.append((leaf.astype(summand.dtype) + summand).astype(leaf.dtype))
        if leaf.size:
            first = jnp.real(done[-1].reshape(-1)[0])
            coefficients = jnp.where(jnp.isnan(first), jnp.nan, coefficients)
    return structure.unflatten(done)


def _dense(weight: WeightPerturbation, key: Array, problem: Problem) -> tuple[Array, Tree, Array, Callable]:
    k, params = weight.num_tangents, problem.params
    draw = sampler(weight.tangents, key, params, k)
    value, aux, slopes, _ = pushforward(problem.objective, params, draw, k, chunk_size=weight.chunk_size)
    slopes = _mesh.total(slopes, _mesh.axes(slopes))

    def add(coefficients: Array) -> Tree:
        ready, again = _after(coefficients, key)
        draw = sampler(weight.tangents, again, params, k)

        def add_one(leaf: Array, tangent: Array, coefficient: Array) -> Array:
            wide = _tree.accumulation_dtype(leaf.dtype)
            step = coefficient.astype(jnp.finfo(wide).dtype) * jnp.conj(tangent[0]).astype(wide)
            return (leaf.astype(wide) + step).astype(leaf.dtype)

        def body(j: Array, params: Tree) -> Tree:
            return jax.tree.map(lambda leaf, t: add_one(leaf, t, ready[j]), params, draw(jnp.asarray(j)[None]))

        return body(jnp.int32(0), params) if k == 1 else lax.fori_loop(0, k, body, params)

    return value, aux, slopes, add


def _low_rank(weight: WeightPerturbation, key: Array, problem: Problem) -> tuple[Array, Tree, Array, Callable]:
    """The factors are thin, so that they are kept."""
    tangents, k = weight.tangents, weight.num_tangents
    weight.thin(problem)  # raises where examples are missing
    plan = plan_low_rank(problem, tangents.per_example)  # type: ignore[attr-defined]
    rank = tangents.rank  # type: ignore[attr-defined]
    drawn = sampler(Rademacher(), key, plan.specs(rank), k)(jnp.arange(k))
    num_chunks = -(-k // (weight.chunk_size or k))
    size = -(-k // num_chunks)

    def chunk(first: Array) -> tuple[Array, Tree, Array]:
        part = [jnp.take(x, jnp.minimum(first + jnp.arange(size), k - 1), axis=0) for x in drawn]
        leaves, part = lax.optimization_barrier((plan.leaves, part))
        return plan.at(leaves).push(part, size, rank)

    if num_chunks == 1:
        value, aux, slopes = plan.push(drawn, k, rank)
    else:
        values, auxs, slopes = lax.map(chunk, jnp.arange(num_chunks) * size)
        value, aux = jax.tree.map(lambda x: x[0], (values, auxs))
        slopes = slopes.reshape(-1, *slopes.shape[2:])[:k]
    slopes = _mesh.total(slopes, _mesh.axes(slopes))

    def add(coefficients: Array) -> Tree:
        coefficients = coefficients / (problem.num_examples if tangents.per_example else 1)  # type: ignore[attr-defined]
        return _in_turn(lambda c: plan.assemble(c, drawn, rank), coefficients, problem.params)

    return value, aux, slopes, add
