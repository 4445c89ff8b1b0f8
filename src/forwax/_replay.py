"""A training step in two halves: the slopes of a loss, and the parameters that follow from them.

The idea of drawing a direction twice instead of keeping it is that of MeZO (Malladi et al. 2023,
arXiv 2305.17333), here with exact slopes.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax import _mesh, _tree
from forwax._assemble import Weighing
from forwax._checks import check_rate
from forwax._directions.drawing import Drawing
from forwax._directions.formed import Formed, InFull
from forwax._directions.plan import WeightPlan
from forwax._directions.rounding import NEAREST, Rounding
from forwax._directions.splits import Split
from forwax._directions.steps import Steps
from forwax._programs import ways_out
from forwax._pushforward import Along
from forwax._rule import is_rule
from forwax._rules import FiniteDifference, Rule, WeightPerturbation
from forwax._safety import Safe
from forwax._signature import Problem, Signature, check_key, check_leaves
from forwax._slopes import Form, Slopes, check_form, check_params, form_of
from forwax._tree import Tree
from forwax.tangents._base import typed_key


def slopes(
    loss: Callable[..., Any],
    rule: Rule = WeightPerturbation(),  # noqa: B008 (a frozen value)
    *,
    has_aux: bool = False,
    in_axes: Any = None,
    per_example: bool = False,
) -> Callable[..., Any]:
    """The first half of a step: the loss, and its slopes along directions that a key draws.

    `forwax.replay` makes the step of them, here or on another machine; `forwax.update` is both.

    Inside `jax.shard_map` parameters are the same on all devices, and the key decides on how work
    is shared. The same key and the whole batch's loss, by `jax.lax.pmean`: one estimate with
    everybody's examples. A key of each device's own, `jax.random.fold_in(key,
    jax.lax.axis_index(axis))`, and its own examples' loss: W · k directions after
    `Slopes.gather`.

    Args:
        loss: as in `forwax.value_and_grad`; its first argument is the parameters.
        rule: one that `forwax.update` takes. Of `forwax.Safe` it is the rule inside, whose slopes
            are not guarded yet: `Safe.guard_slopes` does it, once they are gathered.
        has_aux: whether the loss returns `(loss, aux)`.
        in_axes: as in `forwax.value_and_grad`.
        per_example: whether each of the N examples of `in_axes` has slopes of its own along the
            same directions, found in one pass without a gradient for each. Directions of each
            example's own, as of `tangents.LowRank(per_example=True)`, have such slopes anyway.

    Returns:
        A function `f(key, params, *args, **kwargs)` that returns `(value, slopes)`, with `has_aux`
        `((value, aux), slopes)`: a `forwax.Slopes` of one key, with weights [1, k] or [1, k, N].

    Raises:
        TypeError: when the rule's directions do not follow from a key, or cannot be drawn one by
            one.
        ValueError: when the combination needs all tangents at once, parameters vary over mesh
            axes, or each example's slopes are asked for without `in_axes`, of a rule that gives
            each example other directions, or of a loss that sums over devices.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> loss = lambda w, x: (x @ w) ** 2
        >>> rule = fx.WeightPerturbation(num_tangents=2)
        >>> each = fx.slopes(loss, rule, in_axes=(None, 0), per_example=True)
        >>> value, slopes = each(jax.random.key(0), jnp.ones(3), jnp.eye(3))
        >>> float(value), slopes.weights.shape, slopes.mean().weights.shape
        (1.0, (1, 2, 3), (1, 2))
    """
    signature = Signature(loss, 0, has_aux, in_axes, "slopes")
    weight = checked("slopes", rule)
    if per_example:
        _check_examples(weight, in_axes)

    def slopes_of_loss(key: Any, /, *args: Any, **kwargs: Any) -> Any:
        key = typed_key(check_key(key, "slopes"))
        problem = signature.bind(args, kwargs)
        check_mesh("slopes", problem.params)
        result, mine, *_ = taken(weight, key, problem, per_example)
        return with_aux(signature, problem, result), mine

    return slopes_of_loss


def replay(
    loss: Callable[..., Any],
    rule: Rule = WeightPerturbation(),  # noqa: B008 (a frozen value)
    *,
    in_axes: Any = None,
    rounding: str = "nearest",
) -> Callable[..., Any]:
    """The second half of a step: w - learning_rate · Σ_ij weights_ij v_j(keys_i).

    The directions are drawn again from their keys and added in place, as `forwax.update` does: the
    parameters are the same in every bit, on the same kind of machine with the same versions of
    forwax, jax and jaxlib. Nothing is evaluated. Where the rule's tangents are `tangents.LowRank`
    the loss is traced, as it decides how parameters are split into factors.

    Of any optimiser's gradient it is the call `replay(loss, rule)(slopes, -1.0, zeros)` with zeros
    like the parameters; with one weight of 1 the same call shows a rule's own direction.

    Args:
        loss: that of `forwax.slopes`, which may return `(loss, aux)`.
        rule: that of `forwax.slopes`.
        in_axes: as in `forwax.value_and_grad`.
        rounding: as in `forwax.update`.

    Returns:
        A function `f(slopes, learning_rate, params, *args, **kwargs)` that returns the new
        parameters. `slopes` may have any number of keys. For any array behind `params` a
        `jax.ShapeDtypeStruct` may stand.

    Raises:
        TypeError: when the rule is none that `forwax.slopes` takes, or slopes or rate are of
            another kind.
        ValueError: when slopes have another number of tangents or an axis of examples that the
            rule has not, or were taken of other parameters, or when parameters or slopes vary over
            mesh axes.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
        >>> value, slopes = fx.slopes(loss)(jax.random.key(0), jnp.ones(3), jnp.eye(3))
        >>> estimate = fx.replay(loss)(slopes, -1.0, jnp.zeros(3))
        >>> expected = fx.grad(loss)(jax.random.key(0), jnp.ones(3), jnp.eye(3))
        >>> bool(jnp.allclose(estimate, expected))
        True
    """
    signature = Signature(without_aux(loss), 0, False, in_axes, "replay")
    weight = checked("replay", rule)
    check_rounding("replay", rounding)

    def replay_of_loss(
        slopes: Any, learning_rate: Any, params: Tree, /, *args: Any, **kwargs: Any
    ) -> Tree:
        check_form("replay", slopes)
        check_leaves("replay", params)
        params = jax.tree.map(_tree.as_array, params)
        check_params("replay", slopes.form, params)
        check_rate("replay", "learning_rate", learning_rate, signed=True)
        check_mesh("replay", params, slopes, learning_rate)
        examples = _check_weights(weight, slopes)
        splits = None
        if weight.splits_by_loss:
            splits = splits_of(weight, signature, (params, *args), kwargs)
            check_params("replay", slopes.form, params, splits)
        drawing = weight.drawing(params, splits, examples)
        steps = weight.steps(params)
        return added(drawing, steps, slopes, learning_rate, params, rounding)

    return replay_of_loss


def form_for(
    name: str,
    loss: Callable[..., Any],
    weight: WeightPerturbation | FiniteDifference,
    in_axes: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Form:
    """What slopes of a loss, which need not be evaluated, say of its parameters."""
    splits = None
    if weight.splits_by_loss:
        signature = Signature(without_aux(loss), 0, False, in_axes, name)
        splits = splits_of(weight, signature, args, kwargs)
    return form_of(args[0], splits)


def taken(
    weight: WeightPerturbation | FiniteDifference,
    key: Array,
    problem: Problem,
    per_example: bool = False,
) -> tuple[Along, Slopes, Formed | WeightPlan, Any]:
    """What the loss gave along the directions of a key, what is sent of it, these, and as drawn."""
    with ways_out.named(problem):
        directions = weight.in_place(problem, _mesh.axes(key), per_example)
        result, drawn = weight.slopes_along(directions, key, not per_example)
    if per_example:
        _check_own(problem, result.found)
    params = problem.params
    k = weight.num_tangents
    weighing = Weighing(weight.tangents, weight.combine, params, _mesh.axes(key))
    weights = result.found * weighing.scale(k)  # [k] or [k, N]
    splits = None
    if weight.splits_by_loss and isinstance(directions, WeightPlan):
        splits = directions.splits
    # What is done to them later is not to be folded into what made them.
    weights = lax.optimization_barrier(weights)
    mine = Slopes(
        keys=jax.random.key_data(key)[None],
        weights=weights[None],
        impl=str(jax.random.key_impl(key)),
        form=form_of(params, splits),
    )
    return result, mine, directions, drawn


def added(
    drawing: Drawing | InFull,
    steps: Steps | None,
    slopes: Slopes,
    rate: Any,
    params: Tree,
    rounding: str,
    held: Any = None,
) -> Tree:
    """The parameters minus the rate times the estimate, a few terms in each pass over them.

    The order of the sums decides on the last bits, so that it is part of what `replay` promises.

    Args:
        drawing: how directions are drawn and added.
        steps: how far finite differences moved the parameters.
        slopes: of any number of keys.
        rate: the learning rate.
        params: what they are added to.
        rounding: "nearest" or "stochastic".
        held: what the only key draws [k, ...], where it is at hand.
    """
    num_keys, k = slopes.weights.shape[:2]
    size = min(drawing.together, num_keys * k)
    # Constants behind the barrier are unknown to the compiler, the number of passes too: else a
    # step in one program would be simplified in another way than in two, to other bits.
    known = lax.optimization_barrier(
        (
            slopes.typed_keys,
            slopes.weights,
            jnp.asarray(rate, slopes.weights.dtype),
            jnp.int32(-(-num_keys * k // size)),
        )
    )
    keys, weights, rate, num_passes = known
    own_rounding = NEAREST if rounding == "nearest" else Rounding.by_chance(keys)
    scaled = -rate / drawing.num_examples * weights
    flat = scaled.reshape(-1, *scaled.shape[2:])  # [terms] or [terms, examples]
    # Directions and weights are made before they are added, whatever stands around that.
    flat = lax.optimization_barrier(flat)

    def one(term: Array) -> Any:
        step = term // k
        draw = drawing.sampler(keys[step])
        drawn = draw((term % k)[None])  # [1, ...]
        return jax.tree.map(lambda x: x[0], drawn)

    def add(i: Array, params: Tree) -> Tree:
        terms = i * size + jnp.arange(size, dtype=jnp.int32)
        is_used = (terms < len(flat)).reshape(size, *[1] * (flat.ndim - 1))
        # what only fills the last pass is the last term once more, of weight zero
        terms = jnp.minimum(terms, len(flat) - 1)
        if size > 1:  # each has a key of its own
            drawn = lax.map(one, terms)
        else:
            drawn = lax.optimization_barrier(one(terms[0]))
            drawn = jax.tree.map(lambda x: x[None], drawn)
        weights = jnp.where(is_used, flat[terms], 0)  # [size] or [size, examples]
        return drawing.add(params, weights, drawn, own_rounding.of(i), steps)

    if held is not None and size == num_keys * k:
        # One pass takes all: what it adds is at hand, and no loop copies it.
        held = lax.optimization_barrier(held)
        return drawing.add(params, flat, held, own_rounding.of(0), steps)
    return lax.fori_loop(0, num_passes, add, params)


def with_aux(signature: Signature, problem: Problem, result: Along) -> Any:
    """The loss, with its aux where there is one."""
    if signature.has_aux:
        return result.value, problem.restore(result.aux)
    return result.value


def checked(name: str, rule: Any) -> WeightPerturbation | FiniteDifference:
    """The weight rule of a rule, where its directions can be drawn again one by one."""
    found = rule.replayed if is_rule(rule) else None
    instead = "Use forwax.value_and_grad and subtract its gradient."
    if found is None:
        inside = rule.inner if isinstance(rule, Safe) else rule
        raise TypeError(
            f"{name}: expected forwax.WeightPerturbation or forwax.FiniteDifference, or "
            "forwax.Safe around one, whose directions follow from a key alone, got "
            f"{type(inside).__name__}. {instead}"
        )
    weight = cast(WeightPerturbation | FiniteDifference, found)
    if not getattr(weight.tangents, "drawn_twice", False):
        raise TypeError(
            f"{name}: expected tangents that are drawn one by one and leaf by leaf, one of "
            "tangents.Rademacher(), tangents.Normal(), tangents.Sparse(), tangents.LowRank(), got "
            f"{type(weight.tangents).__name__}. {instead}"
        )
    if not weight.combine.coordinatewise:
        raise ValueError(
            f"{name}: expected combine.Mean() or combine.Shrinkage(), got "
            f"{type(weight.combine).__name__}, which needs all tangents at once. {instead}"
        )
    return weight


def check_rounding(name: str, rounding: Any) -> None:
    """Raise a ValueError for an unknown rounding."""
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(
            f'{name}: expected rounding to be "nearest" or "stochastic", got {rounding!r}.'
        )


def check_mesh(name: str, *values: Tree) -> None:
    """Raise a ValueError where parameters, or what moves them, differ from device to device."""
    over = _mesh.all_axes(values)
    if over:
        raise ValueError(
            f"{name}: expected parameters, a key and slopes that do not vary over mesh axes, got "
            f"{sorted(over)}. Inside shard_map replicate the parameters; with a key of each "
            "device's own take forwax.slopes, make them the same everywhere by "
            "Slopes.gather(axis), and add them by forwax.replay. For sharded parameters use "
            "forwax.value_and_grad and subtract its gradient."
        )


def _check_examples(
    weight: WeightPerturbation | FiniteDifference, in_axes: Any
) -> None:
    """Raise where no example can have slopes of its own along directions of all."""
    if in_axes is None:
        raise ValueError(
            "slopes: per_example=True needs examples: expected in_axes, got None. Pass in_axes, as "
            "in in_axes=(None, 0, 0), or leave per_example out."
        )
    if weight.by_example:
        raise ValueError(
            "slopes: per_example=True gives all examples the same directions, expected a rule "
            "without per_example=True, got one that gives each its own. Leave one of both out."
        )


def _check_own(problem: Problem, found: Array) -> None:
    """Raise a ValueError where slopes of one example hold other devices' losses."""
    missing = _mesh.all_axes(problem.mapped) - _mesh.axes(found)
    if missing:
        raise ValueError(
            "slopes: per_example=True expected a loss of one example alone, got one that sums over "
            f"devices: its slopes do not vary over {sorted(missing)}, along which examples do. "
            "Leave the sum out of the loss, and gather the slopes."
        )


def _check_weights(
    weight: WeightPerturbation | FiniteDifference, slopes: Slopes
) -> int | None:
    """How many examples have directions of their own, of slopes that fit the rule."""
    shape = slopes.weights.shape
    k = weight.num_tangents
    if shape[1] != k:
        raise ValueError(
            f"replay: expected slopes along {k} tangents, weights [s, {k}], got {list(shape)}. "
            "Replay them with the rule that they were taken with."
        )
    if weight.by_example:
        if len(shape) == 2:
            raise ValueError(
                "replay: the rule gives each example directions of its own: expected weights "
                f"[s, {k}, N], got {list(shape)}."
            )
        return shape[2]
    if len(shape) == 3:
        raise ValueError(
            f"replay: expected weights [s, {k}], got {list(shape)}, a slope for each example. "
            "Take slopes.mean(), or forwax.privacy.clip_and_noise(slopes, ...)."
        )
    return None


def without_aux(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The loss alone, where it returns a pair."""
    if not callable(loss):
        return loss

    @functools.wraps(loss)
    def alone(*args: Any, **kwargs: Any) -> Any:
        out = loss(*args, **kwargs)
        # No loss is a tuple: the other half is aux, which nothing here reads.
        return out[0] if isinstance(out, tuple) else out

    return alone


def splits_of(
    weight: WeightPerturbation | FiniteDifference,
    signature: Signature,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Split | None, ...]:
    """How the loss has its parameters' directions split, where shapes may stand for arrays."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    is_spec = [isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves]
    specs = list(itertools.compress(leaves, is_spec))
    found: list[Any] = []

    def plan(arrays: list[Array]) -> None:
        remaining = iter(arrays)
        pairs = zip(leaves, is_spec, strict=True)
        filled = [next(remaining) if spec else leaf for leaf, spec in pairs]
        args, kwargs = structure.unflatten(filled)
        problem = signature.bind(args, kwargs)
        with ways_out.named(problem):
            directions = weight.in_place(problem)
        found.append(directions)

    if specs:  # what stands for arrays is a tracer while the loss is read
        jax.eval_shape(plan, specs)
    else:
        plan([])
    return found[0].splits
