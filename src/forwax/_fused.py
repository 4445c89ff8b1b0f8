"""A training step that never holds a gradient: tangents are drawn again and added in place.

The idea of drawing a direction twice instead of keeping it is that of MeZO (Malladi et al. 2023,
arXiv 2305.17333), here with exact slopes.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax import _mesh, _tree
from forwax._checks import check_rate
from forwax._directions.formed import Formed
from forwax._directions.plan import WeightPlan
from forwax._directions.rounding import NEAREST, Rounding
from forwax._directions.steps import Steps
from forwax._momentum import Momentum
from forwax._programs import ways_out
from forwax._rules import FiniteDifference, Rule, WeightPerturbation
from forwax._safety import Safe
from forwax._signature import Problem, Signature, check_key
from forwax._tree import Tree
from forwax.tangents._base import typed_key


def update(
    loss: Callable[..., Any],
    rule: Rule = WeightPerturbation(),  # noqa: B008 (a frozen value)
    *,
    learning_rate: float | Array,
    momentum: Momentum | None = None,
    rounding: str = "nearest",
    has_aux: bool = False,
    in_axes: Any = None,
) -> Callable[..., Any]:
    """A step of gradient descent, w - learning_rate · ĝ, along weight tangents; ĝ is never held.

    With `forwax.FiniteDifference` it is MeZO (Malladi et al. 2023, arXiv 2305.17333) on any JAX
    model, without two copies of the parameters: inside a trace, such as that of `jax.jit`, the loss
    is evaluated at w ± ε v with v formed where the loss uses it, as x w ± ε (x a) bᵀ for the
    factors of `tangents.LowRank` and a layer at a time for signs. The parameters are never shifted
    in place, where each addition would round.

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
            `chunk_size=1` holds one at a time. Or `forwax.FiniteDifference` with these, which needs
            what inference needs with `Rademacher` and `LowRank`, and copies with the others. Or
            `forwax.Safe` around one of both.
        learning_rate: the rate of the step; an array where it changes.
        momentum: what is remembered of the last steps; the step is then w - learning_rate · m with
            their decaying sum m, and still no array like the parameters is held.
        rounding: how new parameters in bfloat16 and float16 are rounded. "stochastic": to one of
            their two neighbours by chance, so that the mean is what float32 would give, and steps
            below the spacing of the floats are not lost; s steps of size d spread by about √(s · d
            · spacing). The bits are a hash of the step's key and the entry's place, the same in
            every chunking and sharding. "nearest" leaves a parameter as it is for such steps.
            Wider parameters are the same with both.
        has_aux: whether the loss returns `(loss, aux)`.
        in_axes: as in `forwax.value_and_grad`.

    Returns:
        A function `f(key, params, *args, **kwargs)` that returns `(value, params)`, with `has_aux`
        `((value, aux), params)`. With `forwax.Safe` the next rule follows, and with momentum the
        next momentum.

    Raises:
        TypeError: when the rule is another one, the tangents cannot be drawn twice one by one, or
            the rate or the momentum is of another kind.
        ValueError: when the rate is a number that is negative or not finite, the combination needs
            all tangents at once, the rounding is another one, or inside `jax.shard_map` parameters
            are sharded.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
        >>> update = fx.update(loss, learning_rate=0.01)
        >>> step = jax.jit(lambda key, w, x: update(key, w, x), donate_argnums=1)
        >>> value, w = step(jax.random.key(0), jnp.ones(3), jnp.eye(3))
        >>> float(value), w.shape
        (1.0, (3,))
    """
    signature = Signature(loss, 0, has_aux, in_axes, "update")
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(
            f'update: expected rounding to be "nearest" or "stochastic", got {rounding!r}.'
        )
    is_nearest = rounding == "nearest"
    weight = checked(rule)
    check_rate("update", "learning_rate", learning_rate)
    if momentum is not None and not isinstance(momentum, Momentum):
        raise TypeError(
            "update: expected momentum such as forwax.Momentum(decay=0.9), or None, got "
            f"{momentum!r}."
        )

    def update_of_loss(key: Any, /, *args: Any, **kwargs: Any) -> Any:
        key = typed_key(check_key(key, "update"))
        problem = signature.bind(args, kwargs)
        _check_mesh(problem, key)
        params = problem.params
        is_safe = rule.inner is not rule
        guard = cast(Safe, rule).guard() if is_safe else None
        with ways_out.named(problem):
            directions = weight.in_place(problem)
            result, drawn = weight.slopes_along(directions, key, guard)
        n = _tree.num_coordinates(params)
        k = weight.num_tangents
        used = result.used * weight.combine.finish(
            1.0, k, weight.tangents.relative_mse(n, k)
        )
        rate = -jnp.asarray(learning_rate, used.dtype) / directions.num_examples
        # With bits of their own the passes are the same whatever the chunks.
        rounded = NEAREST if is_nearest else Rounding.by_chance(key)
        steps = weight.steps(params)
        add = functools.partial(_add_steps, directions, rounded, steps)
        state: list[Any] = [cast(Safe, rule).after(result.found)] if is_safe else []
        if momentum is not None:
            new = momentum.add(key, used)
            keys, weights, num_steps = new.last(str(jax.random.key_impl(key)))
            params = add(params, keys, rate * weights, num_steps)
            state.append(new)
        elif drawn is not None and (is_nearest or k <= directions.together):
            params = directions.add(params, rate * used, drawn, rounded.of(0), steps)
        else:
            params = add(params, key[None], rate * used[None], 1)
        value = (result.value, problem.restore(result.aux)) if has_aux else result.value
        return (value, params, *state)

    return update_of_loss


def checked(rule: Any) -> WeightPerturbation | FiniteDifference:
    """The weight rule of a rule, after the checks of `update`."""
    weight = rule.inner if isinstance(rule, Safe) else rule
    if not isinstance(weight, WeightPerturbation | FiniteDifference):
        raise TypeError(
            "update: expected forwax.WeightPerturbation or forwax.FiniteDifference, or forwax.Safe "
            f"around one, whose tangents can be drawn twice, got {type(weight).__name__}. Use "
            "forwax.value_and_grad and subtract its gradient."
        )
    if not getattr(weight.tangents, "drawn_twice", False):
        raise TypeError(
            "update: expected tangents that are drawn one by one and leaf by leaf, one of "
            "tangents.Rademacher(), tangents.Normal(), tangents.Sparse(), tangents.LowRank(), got "
            f"{type(weight.tangents).__name__}. Use forwax.value_and_grad and subtract its "
            "gradient."
        )
    if not weight.combine.coordinatewise:
        raise ValueError(
            "update: expected combine.Mean() or combine.Shrinkage(), got "
            f"{type(weight.combine).__name__}, which needs all tangents at once. Use "
            "forwax.value_and_grad and subtract its gradient."
        )
    return weight


def _check_mesh(problem: Problem, key: Array) -> None:
    over = _mesh.axes(key).union(*_mesh.tree_axes(problem.params))
    if over:
        raise ValueError(
            "update: expected parameters and a key that do not vary over mesh axes, got "
            f"{sorted(over)}. Inside shard_map replicate them, or use forwax.value_and_grad and "
            "subtract its gradient."
        )


def _add_steps(
    directions: Formed | WeightPlan,
    rounding: Rounding,
    steps: Steps | None,
    params: Tree,
    keys: Array,
    weights: Array,
    num_steps: Array | int,
) -> Tree:
    """Add the tangents of the first steps of several.

    Args:
        directions: how they are drawn and added.
        rounding: how the parameters are rounded after each pass over them.
        steps: how far finite differences moved the parameters.
        params: what they are added to.
        keys: of each step [steps].
        weights: of each step's tangents [steps, k] or [steps, k, examples].
        num_steps: how many steps are added.
    """
    num_keys, k = weights.shape[:2]
    size = min(directions.together, num_keys * k)
    flat = weights.reshape(-1, *weights.shape[2:])  # [terms] or [terms, examples]
    num_terms = num_steps * k

    def one(term: Array) -> Any:
        step = term // k
        draw = directions.sampler(keys[step])
        drawn = draw((term % k)[None])  # [1, ...]
        return jax.tree.map(lambda x: x[0], drawn)

    def add(i: Array, params: Tree) -> Tree:
        terms = i * size + jnp.arange(size)
        is_used = (terms < num_terms).reshape(size, *[1] * (flat.ndim - 1))
        # what only fills the last pass is the last term once more, of weight zero
        terms = jnp.minimum(terms, num_keys * k - 1)
        if size > 1:  # each has a key of its own
            drawn = lax.map(one, terms)
        else:
            drawn = jax.tree.map(lambda x: x[None], one(terms[0]))
        own = jnp.where(is_used, flat[terms], 0)
        return directions.add(params, own, drawn, rounding.of(i), steps)

    return lax.fori_loop(0, -(-num_terms // size), add, params)
