"""The verbs: `value_and_grad` and `grad`, with JAX's own signature plus one leading key."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from forwax._precision import check_dtype, widened
from forwax._programs import ways_out
from forwax._rule import check_rule
from forwax._rules import Rule, WeightPerturbation
from forwax._signature import Signature, check_key
from forwax.tangents._base import typed_key


def value_and_grad(
    loss: Callable[..., Any],
    rule: Rule = WeightPerturbation(),  # noqa: B008 (a frozen value)
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    in_axes: Any = None,
    gradient_dtype: Any = None,
) -> Callable[..., Any]:
    """A drop-in for `jax.value_and_grad` that estimates the gradient by a rule.

    What it returns takes one leading PRNG key.

    Args:
        loss: returns a real floating scalar, or `forwax.LocalLosses`, whose objective is the sum of
            all entries; with `has_aux`, a pair of it and a pytree. Its differentiated arguments are
            pytrees of floating or complex arrays.
        rule: how the gradient is estimated.
        argnums: which of the loss's own arguments are differentiated, the key not counted.
        has_aux: whether the loss returns `(loss, aux)`.
        in_axes: as in `jax.vmap`, for positional arguments; keyword arguments are broadcast. Makes
            the loss that of one example: the value is the mean over the examples and aux is stacked
            on a leading axis. Differentiated arguments must not be mapped.
        gradient_dtype: the narrowest type in which a gradient comes, such as `jnp.float32` for
            parameters in bfloat16; None for theirs. The loss gets parameters as they are: what it
            computes in their type, tangents included, is rounded to it.

    Returns:
        A function `f(key, *args, **kwargs)` that returns `(value, grads)`, or `((value, aux),
        grads)` with `has_aux`. `grads` has the structure, shapes and dtypes of
        `jax.value_and_grad`'s, or `gradient_dtype` where that is wider; the same key gives the same
        estimate. Nothing is jitted inside.

    Raises:
        TypeError: when `f` is called without a key, with arguments that cannot be differentiated,
            or with a loss that is not a real scalar; when `gradient_dtype` is not a floating type.
        ValueError: when `argnums` names an argument twice, or `in_axes` maps a differentiated
            argument, nothing, an axis that an argument does not have, or an empty batch.

    The estimate of the default rule is ĝ = <∇f, v> v with random signs v, after Baydin et al. 2022
    (arXiv 2202.08587).

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> loss = lambda w, x: jnp.sum((w * x) ** 2)
        >>> w, x = jnp.array([3.0]), jnp.array([2.0])
        >>> value, grads = fx.value_and_grad(loss)(jax.random.key(0), w, x)
        >>> float(value), grads.tolist()  # one parameter: exact
        (36.0, [24.0])
    """
    signature = Signature(loss, argnums, has_aux, in_axes)
    check_rule("value_and_grad", rule)
    check_dtype(gradient_dtype)
    name = getattr(loss, "__name__", type(loss).__name__)

    def value_and_grad_of_loss(key: Any, /, *args: Any, **kwargs: Any) -> Any:
        key = typed_key(check_key(key, "value_and_grad"))
        problem = widened(signature.bind(args, kwargs), gradient_dtype)
        with ways_out.named(problem):
            value, aux, grads = rule.estimate(key, problem)
        if has_aux:
            return (value, problem.restore(aux)), grads
        return value, grads

    value_and_grad_of_loss.__name__ = f"value_and_grad({name})"
    value_and_grad_of_loss.__doc__ = (
        f"Value and estimated gradient of {name}, by {type(rule).__name__}."
    )
    return value_and_grad_of_loss


def grad(
    loss: Callable[..., Any],
    rule: Rule = WeightPerturbation(),  # noqa: B008 (a frozen value)
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    in_axes: Any = None,
    gradient_dtype: Any = None,
) -> Callable[..., Any]:
    """A drop-in for `jax.grad`: `value_and_grad` without the value.

    Takes the arguments of `forwax.value_and_grad` and raises the same errors.

    Returns:
        A function `f(key, *args, **kwargs)` that returns `grads`, or `(grads, aux)` with `has_aux`.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> fx.grad(lambda w: w**3)(jax.random.key(0), 2.0).item()
        12.0
    """
    both = value_and_grad(
        loss,
        rule,
        argnums=argnums,
        has_aux=has_aux,
        in_axes=in_axes,
        gradient_dtype=gradient_dtype,
    )

    @functools.wraps(both)
    def grad_of_loss(key: Any, /, *args: Any, **kwargs: Any) -> Any:
        value, grads = both(key, *args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return grad_of_loss
