"""A training step that never holds a gradient: tangents are drawn again and added in place.

The idea of drawing a direction twice instead of keeping it is that of MeZO (Malladi et al. 2023,
arXiv 2305.17333), here with exact slopes.
"""

from collections.abc import Callable
from typing import Any, cast

from jax import Array

from forwax._checks import check_rate
from forwax._directions.formed import InFull
from forwax._directions.plan import WeightPlan
from forwax._momentum import Momentum
from forwax._replay import added, check_mesh, check_rounding, checked, taken, with_aux
from forwax._rules import Rule, WeightPerturbation
from forwax._safety import Safe
from forwax._signature import Signature, check_key
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
    check_rounding("update", rounding)
    weight = checked("update", rule)
    check_rate("update", "learning_rate", learning_rate)
    if momentum is not None and not isinstance(momentum, Momentum):
        raise TypeError(
            "update: expected momentum such as forwax.Momentum(decay=0.9), or None, got "
            f"{momentum!r}."
        )

    def update_of_loss(key: Any, /, *args: Any, **kwargs: Any) -> Any:
        key = typed_key(check_key(key, "update"))
        problem = signature.bind(args, kwargs)
        params = problem.params
        check_mesh("update", params, key)
        result, slopes, directions, held = taken(weight, key, problem)
        state: list[Any] = []
        if rule.replayed is not rule:
            slopes, safe = cast(Safe, rule).guard_slopes(slopes, params)
            state.append(safe)
        if momentum is not None:
            new = momentum.add(slopes)
            slopes = new.slopes()
            held = None  # the keys of all remembered steps are drawn
            state.append(new)
        if isinstance(directions, WeightPlan):
            # It knows which parameters a loop slices, whose signs need not be held as a whole.
            drawing = directions.again()
        else:
            examples = problem.num_examples if weight.by_example else None
            drawing = weight.drawing(params, None, examples)
            # What was drawn in full is no use to a drawing of packed signs.
            held = held if isinstance(drawing, InFull) else None
        steps = weight.steps(params)
        params = added(drawing, steps, slopes, learning_rate, params, rounding, held)
        return (with_aux(signature, problem, result), params, *state)

    return update_of_loss
