"""A `jax.custom_vjp` function has no forward derivative: which one is it, and what can be done?"""

from typing import Any

import jax
import jax.extend.core as jex
from jax.extend import source_info_util

from forwax._signature import Problem


def custom_vjp_error(equation: Any) -> TypeError:
    """The error that names the function of a jaxpr's custom_vjp equation, its place, and the ways out."""
    inner = equation.params["call_jaxpr"]
    name = getattr(inner, "jaxpr", inner).debug_info.func_src_info
    source = source_info_util.summarize(equation.source_info)
    place = f" (called at {source})" if source else ""
    return TypeError(
        f"forwax: the loss calls the jax.custom_vjp function {name}{place} on values that depend on the parameters, "
        "but a custom_vjp function has no JVP, which forward gradients need. Write its rule as a jax.custom_jvp, or "
        "use forwax.FiniteDifference, which needs no derivative rule."
    )


def named(error: TypeError, problem: Problem) -> TypeError:
    """JAX's own error on a custom_vjp function, with the function's name; every other error as it is."""
    if "custom_vjp" not in str(error) or str(error).startswith("forwax"):
        return error
    found = _find(jax.make_jaxpr(problem.objective)(problem.params))
    return error if found is None else custom_vjp_error(found)


def _find(jaxpr: Any) -> Any:
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name.startswith("custom_vjp_call"):
            return equation
        for inner in jex.jaxprs_in_params(equation.params):
            found = _find(inner)
            if found is not None:
                return found
    return None
