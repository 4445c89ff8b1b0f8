"""Custom derivative rules of the user: those without a JVP, and those that close over a trace."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend import source_info_util

from forwax import _mesh, _tree
from forwax._programs import places
from forwax._programs.evaluate import bind, read
from forwax._programs.primitives import facts_of
from forwax._programs.program import (
    Equation,
    Program,
    Traced,
    equations_of,
    is_inexact,
    opened,
)

UNUSABLE = "a custom_vjp function has no JVP"
"""What all errors say that name one."""


def custom_vjp_error(*calls: Any) -> TypeError:
    """The error that names a custom_vjp function, where it was called, and the ways out.

    Args:
        calls: a jaxpr's equation that calls it, and before it those around it, outermost first.
    """
    frames = [frame for call in calls for frame in places.of_equation(call)]
    function = _function(calls[-1])
    return without_jvp(function, frames)


def without_jvp(function: str, frames: Sequence[places.Frame]) -> TypeError:
    """The error on a function that reverse mode alone can differentiate, and the ways out."""
    # A library's function may be called by the user, not by the library.
    where = function.rpartition(" at ")[2].rpartition(":")[0]
    library = places.library_of([*frames, places.Frame(where, 0, function)])
    place = places.call_of(frames, library)
    if library is None:
        way = (
            "Write its rule as a jax.custom_jvp; or use forwax.FeedbackAlignment or "
            "forwax.DirectFeedbackAlignment, whose errors go back by the function's own rule; or"
        )
    else:
        way = f"{places.WAYS[library]}; or use"
    called = f" (called at {place})" if place else ""
    return TypeError(
        f"forwax: the loss calls the {function}{called} on values that depend "
        f"on the parameters, but {UNUSABLE}, which this rule needs to push "
        f"tangents. {way} forwax.FiniteDifference, which needs no derivative rule."
    )


def _function(equation: Any) -> str:
    """The user's function behind a jaxpr's custom_vjp equation."""
    inner, _ = opened(equation.params["call_jaxpr"])
    name = inner.debug_info.func_src_info
    # custom_gradient names a place of its own; the user's function stands where its equations are.
    if "custom_derivatives.py" not in name:
        return f"jax.custom_vjp function {name}"
    first = [source_info_util.summarize(eqn.source_info) for eqn in inner.eqns[:1]]
    return " at ".join(["jax.custom_gradient function", *first])


def with_jvp(
    equation: Equation, values: Sequence[Any], *, or_joined: bool = False
) -> list[Any]:
    """The outputs of a custom_vjp function, with a JVP: the transpose of its backward rule.

    A backward rule takes a cotangent g to Jᵀg, linearly. Its transpose takes a tangent t to J t,
    where J is the Jacobian that the rule pretends: that of a surrogate, if it is one.

    Args:
        equation: the call of the function.
        values: its operands.
        or_joined: whether a rule that has no transpose counts as one in which all hangs on all, so
            that what hangs on what can be told, and no more.

    Raises:
        TypeError: under differentiation, where the rule is not linear in the cotangent, or has an
            operation that JAX cannot transpose.
    """
    # What the function closes over comes first; its rule knows no derivative by that.
    first = equation.params.get("num_consts", 0)
    operands = range(first, len(values))
    moving = [i for i in operands if is_inexact(jax.typeof(values[i]))]

    def outputs(part: list[Any]) -> list[Any]:
        whole = list(values)
        for i, value in zip(moving, part, strict=True):
            whole[i] = value
        return bind(equation, whole)

    @jax.custom_jvp
    def function(part: list[Any]) -> list[Any]:
        return outputs(part)

    @function.defjvp
    def rule(primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
        (part,) = primals
        (moved,) = tangents
        out, pull = jax.vjp(outputs, part)
        inexact = [is_inexact(jax.typeof(x)) for x in out]

        def pull_inexact(given: list[Any]) -> list[Any]:
            remaining = iter(given)
            cotangents: list[Any] = []
            for x, has_tangent in zip(out, inexact, strict=True):
                zero = np.zeros(x.shape, jax.dtypes.float0)
                cotangents.append(next(remaining) if has_tangent else zero)
            return pull(cotangents)[0]

        given = list(itertools.compress(out, inexact))
        try:
            (pushed,) = jax.linear_transpose(pull_inexact, given)(moved)
        except (NotImplementedError, TypeError, ValueError, AssertionError) as error:
            if not or_joined:
                raise custom_vjp_error(equation.origin) from error
            # A sum of all tangents stands for what hangs on all of them.
            sums = [jnp.sum(x).real.astype(jnp.float32) for x in moved]
            joined = jnp.sum(jnp.stack(sums))
            pushed = [jnp.broadcast_to(joined.astype(x.dtype), x.shape) for x in given]
        remaining = iter(pushed)
        return out, [
            next(remaining) if has_tangent else np.zeros(x.shape, jax.dtypes.float0)
            for x, has_tangent in zip(out, inexact, strict=True)
        ]

    return function([values[i] for i in moving])


def first_without_jvp(jaxpr: Any, moved: Sequence[bool]) -> list[Any]:
    """The first call of a custom_vjp function on what depends on inputs.

    Args:
        jaxpr: where it is looked for, and in jaxprs inside.
        moved: which of its inputs count.

    Returns:
        The equations that lead to it, outermost first; none if there is no such call.
    """
    inside, _ = opened(jaxpr)
    known = set(itertools.compress(inside.invars, moved))
    for eqn in inside.eqns:
        depends = [not isinstance(x, jex.Literal) and x in known for x in eqn.invars]
        facts = facts_of(eqn.primitive)
        if not any(depends) or facts.stops_derivatives:
            continue
        if facts.lacks_jvp:
            return [eqn]
        for inner in jex.jaxprs_in_params(eqn.params):
            # Loops hand on what they carry: there all inputs may depend on one.
            count = len(opened(inner)[0].invars)
            given = depends if facts.inlined else [True] * count
            found = first_without_jvp(inner, given)
            if found:
                return [eqn, *found]
        known.update(eqn.outvars)
    return []


def check_inside(equation: Any, moved: Sequence[bool]) -> None:
    """Raise `custom_vjp_error` if a derivative through an equation meets a custom_vjp inside it.

    Under `jit` JAX itself would only find out when it lowers the whole program. Under `vmap` it
    does at once.

    Args:
        equation: a jaxpr's, which carries jaxprs, such as `cond` and `while`.
        moved: which of its operands depend on the parameters.
    """
    inside = map(_without_jvp, jex.jaxprs_in_params(equation.params))
    found = next(filter(None, inside), None)
    if found is None:
        return
    avals = [atom.aval for atom in equation.invars]
    specs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    chosen = [i for i, spec in enumerate(specs) if moved[i] and is_inexact(spec)]
    params = equation.primitive.get_bind_params(equation.params)

    def push(values: list[Any], tangents: list[Any]) -> Any:
        def apply(part: list[Any]) -> Any:
            whole = list(values)
            for i, value in zip(chosen, part, strict=True):
                whole[i] = value
            return equation.primitive.bind(*whole, **params)

        primals = [values[i] for i in chosen]
        return jax.jvp(apply, (primals,), (tangents,))

    tangents = []
    for spec in [specs[i] for i in chosen]:
        tangents.append(jax.ShapeDtypeStruct((1, *spec.shape), spec.dtype))
    batched = jax.vmap(push, (None, 0))
    try:
        jax.eval_shape(batched, specs, tangents)
    except (TypeError, ValueError) as error:
        # All others are about this trial: inside shard_map it lacks mesh axes.
        if "custom_vjp" in str(error):
            raise custom_vjp_error(found) from error


def _without_jvp(jaxpr: Any) -> Any:
    """The first call of a custom_vjp function in a jaxpr, if there is one."""
    for eqn in equations_of(jaxpr):
        if facts_of(eqn.primitive).lacks_jvp:
            return eqn
    return None


def reads_its_trace(traced: Traced) -> bool:
    """Whether the rule of a `jax.custom_jvp` function closes over what the traced one computed.

    `jax.jvp` of that function can use the value, and a program that was traced before cannot.
    """
    known = {id(value) for value in traced.closed}
    for equation in _with_own_jvp(traced.program):
        for value in _closed_over(equation, traced.types):
            if _tree.is_abstract(value) and id(value) not in known:
                return True
    return False


def _with_own_jvp(program: Program) -> Iterator[Equation]:
    for equation in program.equations:
        if equation.loop is not None:
            yield from _with_own_jvp(equation.loop.body)
        elif equation.contains(lambda facts: facts.has_own_jvp):
            yield equation


def _closed_over(equation: Equation, types: list[Any]) -> list[Any]:
    """What an operation's Jacobian-vector product reads beside its operands."""
    given = list(dict.fromkeys(equation.variables))
    moving = [v for v in given if is_inexact(types[v])]

    def product(*values: Array) -> list[Any]:
        env = dict(zip(given, values, strict=True))

        def outputs(*moved: Array) -> list[Any]:
            scope = env | dict(zip(moving, moved, strict=True))
            operands = [read(atom, scope) for atom in equation.inputs]
            return [x for x in bind(equation, operands) if is_inexact(x)]

        point = [env[v] for v in moving]
        _, tangents = jax.jvp(outputs, point, point)
        return tangents

    # What a trace reads beside its inputs are the constants of its jaxpr.
    specs = [_mesh.stand_in(types[v]) for v in given]
    jaxpr = jax.make_jaxpr(product)(*specs)
    return list(jaxpr.consts)
