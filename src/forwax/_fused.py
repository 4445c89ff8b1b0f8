"""A training step that never holds a gradient: tangents are drawn again from the key and added to the parameters.

The idea of drawing a direction twice instead of keeping it is that of MeZO (Malladi et al. 2023,
arXiv 2305.17333), here with exact slopes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax import _mesh, _tree
from forwax._directions.add import FEW, add_outer, whole
from forwax._directions.plan import WeightPlan
from forwax._momentum import Momentum
from forwax._programs import custom_rules
from forwax._pushforward import pushforward, scan_with_aux
from forwax._rules import Rule, WeightPerturbation
from forwax._safety import Safe
from forwax._signature import Problem, Signature, check_key
from forwax._tree import Tree
from forwax.tangents import LowRank, Normal, Rademacher, Sparse
from forwax.tangents._base import sampler, typed_key

_DRAWN_TWICE = (Rademacher, Normal, Sparse)


def update(
    loss: Callable[..., Any],
    rule: Rule = WeightPerturbation(),  # noqa: B008 (a frozen value)
    *,
    learning_rate: float | Array,
    momentum: Momentum | None = None,
    has_aux: bool = False,
    in_axes: Any = None,
) -> Callable[..., Any]:
    """A step of gradient descent along weight tangents, w - learning_rate · ĝ, in which ĝ is never held.

    For the same key it gives what `forwax.value_and_grad` and a subtraction give, up to rounding.
    Jitted with donated parameters it needs, besides these, what inference needs and, with
    `tangents.Rademacher` or `LowRank`, about one tangent of the largest parameter for each tangent
    of a chunk: slopes come first, then each tangent is drawn again, scaled, and subtracted in
    place, one parameter after the other. Normals and sparse signs are drawn for all parameters at
    once.

    Args:
        loss: as in `forwax.value_and_grad`; its first argument is the parameters.
        rule: `forwax.WeightPerturbation` with `tangents.Rademacher`, `Normal`, `Sparse` or
            `LowRank`, the combination `Mean` or `Shrinkage`, any number of tangents; with several,
            `chunk_size=1` holds one at a time. Or `forwax.Safe` around such a rule.
        learning_rate: the rate of the step; an array where it changes.
        momentum: what is remembered of the last steps; the step is then w - learning_rate · m with
            their decaying sum m, and still no array like the parameters is held.
        has_aux: whether the loss returns `(loss, aux)`.
        in_axes: as in `forwax.value_and_grad`.

    Returns:
        A function `f(key, params, *args, **kwargs)` that returns `(value, params)`, with `has_aux`
        `((value, aux), params)`. With `forwax.Safe` the next rule follows, and with momentum the
        next momentum.

    Raises:
        TypeError: when the rule is another one, or the tangents cannot be drawn twice one by one.
        ValueError: when the combination needs all tangents at once, or inside `jax.shard_map`
            parameters are sharded.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
        >>> step = jax.jit(lambda key, w, x: fx.update(loss, learning_rate=0.01)(key, w, x), donate_argnums=1)
        >>> value, w = step(jax.random.key(0), jnp.ones(3), jnp.eye(3))
        >>> float(value), w.shape
        (1.0, (3,))
    """
    signature = Signature(loss, 0, has_aux, in_axes, "update")
    weight = checked(rule)

    def update_of_loss(key: Any, /, *args: Any, **kwargs: Any) -> Any:
        key, problem = typed_key(check_key(key, "update")), signature.bind(args, kwargs)
        _check_mesh(problem, key)
        try:
            way = _way(weight, problem)
            value, aux, slopes, drawn = way.slopes(key)
        except TypeError as error:
            better = custom_rules.named(error, problem)
            if better is error:
                raise
            raise better from error
        slopes = _mesh.total(slopes, _mesh.axes(slopes))
        used = rule.guard()(slopes) if isinstance(rule, Safe) else slopes
        n, k = _tree.num_coordinates(problem.params), weight.num_tangents
        used = used * weight.combine.finish(1.0, k, weight.tangents.relative_mse(n, k))
        rate = -jnp.asarray(learning_rate, used.dtype)
        state: list[Any] = [rule.after(slopes)] if isinstance(rule, Safe) else []
        if momentum is not None:
            new = momentum.add(key, used)
            params = _add_momentum(way, problem.params, new, key, rate)
            state.append(new)
        elif drawn is not None:
            params = way.add(problem.params, rate * used, drawn)
        else:
            params = way.add_steps(problem.params, key[None], rate * used[None], 1)
        value = (value, problem.restore(aux)) if has_aux else value
        return (value, params, *state)

    return update_of_loss


def checked(rule: Any) -> WeightPerturbation:
    """The weight rule of a rule, after the checks of `update`."""
    weight = rule.rule if isinstance(rule, Safe) else rule
    if not isinstance(weight, WeightPerturbation):
        raise TypeError(
            "update: expected forwax.WeightPerturbation, or forwax.Safe around it, whose tangents "
            "can be drawn twice, "
            f"got {type(weight).__name__}. Use forwax.value_and_grad and subtract its gradient."
        )
    if not isinstance(weight.tangents, (*_DRAWN_TWICE, LowRank)):
        names = ", ".join(f"tangents.{each.__name__}()" for each in (*_DRAWN_TWICE, LowRank))
        raise TypeError(
            f"update: expected tangents that are drawn one by one and leaf by leaf, one of "
            f"{names}, got "
            f"{type(weight.tangents).__name__}. Use forwax.value_and_grad and subtract its "
            f"gradient."
        )
    if not weight.combine.coordinatewise:
        raise ValueError(
            f"update: expected combine.Mean() or combine.Shrinkage(), got "
            f"{type(weight.combine).__name__}, which needs "
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


@dataclasses.dataclass(frozen=True, eq=False)
class _Way:
    """How one kind of tangents is used.

    Attributes:
        weight: the rule.
        slopes: takes a key to `(value, aux, slopes, drawn)`, where `drawn` is what was drawn, or
            None if not held.
        draw: takes a key and indices [c] to what is drawn for them: arrays with a leading axis c.
        add: takes parameters, coefficients [c(, examples)] and what was drawn to the parameters + Σ
            c v.
        together: how many tangents are added at a time.
    """

    weight: WeightPerturbation
    slopes: Callable[[Array], tuple[Array, Tree, Array, list[Any] | None]]
    draw: Callable[[Array, Array], list[Any]]
    add: Callable[[Tree, Array, list[Any]], Tree]
    together: int

    def add_steps(
        self, params: Tree, keys: Array, coefficients: Array, num_steps: Array | int
    ) -> Tree:
        """Add the tangents of the first steps of several: keys [steps], coefficients [steps, k(, examples)]."""
        steps, k = coefficients.shape[:2]
        size, flat = (
            min(self.together, steps * k),
            coefficients.reshape(-1, *coefficients.shape[2:]),
        )

        def one(term: Array) -> list[Any]:
            return jax.tree.map(lambda x: x[0], self.draw(keys[term // k], (term % k)[None]))

        def add(i: Array, params: Tree) -> Tree:
            terms = i * size + jnp.arange(size)
            used = (terms < num_steps * k).reshape(size, *[1] * (flat.ndim - 1))
            terms = jnp.minimum(terms, steps * k - 1)
            drawn = (
                lax.map(one, terms) if size > 1 else jax.tree.map(lambda x: x[None], one(terms[0]))
            )
            return self.add(params, jnp.where(used, flat[terms], 0), drawn)

        return lax.fori_loop(0, -(-(num_steps * k) // size), add, params)


def _add_momentum(way: _Way, params: Tree, momentum: Momentum, key: Array, rate: Array) -> Tree:
    keys, weights, num_steps = momentum.last(str(jax.random.key_impl(key)))
    return way.add_steps(params, keys, rate * weights, num_steps)


def _way(weight: WeightPerturbation, problem: Problem) -> _Way:
    plan = weight.plan(problem)
    return _dense(weight, problem) if plan is None else _planned(weight, plan)


def _dense(weight: WeightPerturbation, problem: Problem) -> _Way:
    k, structure = weight.num_tangents, jax.tree.structure(problem.params)
    held = k <= min(weight.chunk_size or k, FEW)

    def draw(key: Array, indices: Array) -> list[Any]:
        return jax.tree.leaves(sampler(weight.tangents, key, problem.params, k)(indices))

    def slopes(key: Array) -> tuple[Array, Tree, Array, list[Any] | None]:
        drawn = draw(key, jnp.arange(k)) if held else None
        at = lambda indices: structure.unflatten(drawn or draw(key, indices))  # noqa: E731
        value, aux, slopes, _ = pushforward(
            problem.objective, problem.params, at, k, chunk_size=weight.chunk_size
        )
        return value, aux, slopes, drawn

    def add(params: Tree, coefficients: Array, drawn: list[Any]) -> Tree:
        leaves = zip(jax.tree.leaves(params), drawn, strict=True)
        return structure.unflatten([add_outer(leaf, coefficients, whole(v)) for leaf, v in leaves])

    return _Way(weight, slopes, draw, add, 1)


def _planned(weight: WeightPerturbation, plan: WeightPlan) -> _Way:
    """Signs that are unpacked in the traced loss where they are used."""
    k = weight.num_tangents
    num_chunks = -(-k // (weight.chunk_size or k))
    size = -(-k // num_chunks)

    def slopes(key: Array) -> tuple[Array, Tree, Array, list[Any] | None]:
        if num_chunks == 1:
            drawn = plan.draw(key, jnp.arange(k))
            return *plan.push(drawn, k), drawn

        def chunk(_: None, first: Array) -> tuple[None, tuple[Array, Array], Tree]:
            part = plan.draw(key, jnp.minimum(first + jnp.arange(size), k - 1))
            leaves, part = lax.optimization_barrier((plan.leaves, part))
            value, aux, slopes = plan.at(leaves).push(part, size)
            return None, (value, slopes), aux

        _, (values, slopes), aux = scan_with_aux(chunk, None, jnp.arange(num_chunks) * size)
        return values[0], aux, slopes.reshape(-1, *slopes.shape[2:])[:k], None

    def add(params: Tree, coefficients: Array, drawn: list[Any]) -> Tree:
        return plan.add(params, coefficients / plan.num_examples, drawn)

    # factors are thin, so that those of several tangents are added in one pass; dense signs are
    # added one by one
    together = 1 if plan.lazy else max(1, FEW // (plan.rank * plan.num_examples))
    return _Way(weight, slopes, plan.draw, add, together)
