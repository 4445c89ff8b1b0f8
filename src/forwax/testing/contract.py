"""Does a rule keep the promises that every rule makes?"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from forwax._rules import Rule
from forwax._signature import objective_value
from forwax._transforms import value_and_grad
from forwax._tree import Tree

_ROUNDING = 1e-3
"""How far compiled estimates may lie from eager ones, of the largest entry."""


def assert_contract(
    rule: Rule,
    loss: Callable[..., Any],
    args: Sequence[Any],
    *,
    key: Array | None = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    in_axes: Any = None,
    value_tolerance: float = 1e-5,
) -> None:
    """Assert what every rule promises, whatever its estimate.

    The value is the loss's own; the gradient has the structure, shapes and dtypes of the arguments;
    the same key gives the same estimate; under `jit`, with the rule passed as an argument, the
    estimate is the same to rounding, the loss is traced once, and a second call with another key
    compiles nothing; `vmap` over keys gives the estimates one by one; a call without a key is
    refused.

    Args:
        rule: the rule under test.
        loss: the loss, as for `forwax.value_and_grad`; it must be traceable.
        args: the loss's positional arguments.
        key: PRNG key; `jax.random.key(0)` by default.
        argnums: as for `forwax.value_and_grad`.
        has_aux: as for `forwax.value_and_grad`.
        in_axes: as for `forwax.value_and_grad`.
        value_tolerance: relative tolerance of the value (finite differences need more).

    Raises:
        AssertionError: when a promise is broken; the text says which.

    Example:
        >>> import jax.numpy as jnp, forwax as fx
        >>> rule = fx.WeightPerturbation(num_tangents=2)
        >>> fx.testing.assert_contract(rule, lambda x: jnp.sum(x**2), [jnp.ones(3)])
    """
    key = jax.random.key(0) if key is None else key
    other_key = jax.random.fold_in(key, 1)
    calls: list[None] = []

    def counted(*args: Any) -> Any:
        calls.append(None)
        return loss(*args)

    def run(rule: Rule, key: Array, *args: Any) -> Any:
        both = value_and_grad(
            counted, rule, argnums=argnums, has_aux=has_aux, in_axes=in_axes
        )
        return both(key, *args)

    eager = run(rule, key, *args)
    _check_value(eager, loss, args, has_aux, in_axes, value_tolerance)
    _check_form(eager[1], tuple(args), argnums)
    _same(eager, run(rule, key, *args), 0.0, "the same key gives another estimate")
    calls.clear()
    compiled = jax.jit(run)
    jitted = compiled(rule, key, *args)
    _expect(
        len(calls) == 1, f"under jit the loss is traced {len(calls)} times per call"
    )
    compiled(rule, other_key, *args)
    _expect(len(calls) == 1, "a second call with another key traces the loss again")
    _same(eager, jitted, _ROUNDING, "the estimate differs under jit")
    keys = jnp.stack([key, other_key])
    batched = jax.vmap(lambda key: run(rule, key, *args))(keys)
    first = jax.tree.map(lambda x: x[0], batched)
    _same(eager, first, _ROUNDING, "the estimate differs under vmap over keys")
    _check_key_is_needed(run, rule, args)


def _check_value(
    out: Any,
    loss: Callable[..., Any],
    args: Sequence[Any],
    has_aux: bool,
    in_axes: Any,
    tolerance: float,
) -> None:
    def objective(*args: Any) -> Array:
        result = loss(*args)
        return objective_value(result[0] if has_aux else result)

    if in_axes is None:
        true = objective(*args)
    else:
        true = jnp.mean(jax.vmap(objective, in_axes)(*args))
    value = out[0][0] if has_aux else out[0]
    _same(true, value, tolerance, "the value is not the loss's own")


def _check_form(
    grads: Tree, args: tuple[Any, ...], argnums: int | Sequence[int]
) -> None:
    chosen = (
        tuple(args[i] for i in argnums)
        if isinstance(argnums, Sequence)
        else args[argnums]
    )
    got = _form(grads)
    expected = _form(chosen)
    _expect(
        got == expected, f"the gradient has the form {got}, the arguments {expected}"
    )


def _form(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: (str(jnp.asarray(x).dtype), jnp.shape(x)), tree)


def _check_key_is_needed(run: Callable, rule: Rule, args: Sequence[Any]) -> None:
    try:
        run(rule, args[0], *args[1:])
    except TypeError as error:
        _expect(
            "PRNG key" in str(error), f"a call without a key does not say so: {error}"
        )
    else:
        raise AssertionError("contract: a call without a key is accepted.")


def _same(left: Tree, right: Tree, tolerance: float, broken: str) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        dtype = a.dtype
        if jnp.issubdtype(dtype, jnp.inexact):
            # A difference in half precision would itself be rounded.
            dtype = np.promote_types(dtype, np.float32)
        x = np.asarray(a).astype(dtype)
        y = np.asarray(b).astype(dtype)
        limit = tolerance * max(1e-6, float(np.abs(x).max(initial=0)))
        worst = float(np.abs(x - y).max(initial=0))
        # The second is for infinities and what is no number, of which the difference is none.
        kept = worst <= limit or np.array_equal(x, y, equal_nan=True)
        _expect(kept, f"{broken} (by {worst:.3g})")


def _expect(kept: bool, broken: str) -> None:
    if not kept:
        raise AssertionError(f"contract: {broken}.")
