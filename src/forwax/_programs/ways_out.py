"""Errors of a derivative that name the user's own line, or a library's switch, and what to do."""

import contextlib
import re
from collections.abc import Iterator

import jax

from forwax._programs import custom_rules, places
from forwax._programs.evaluate import PLACE
from forwax._signature import Problem

# Of callbacks, kernels, and primitives that have no rule.
_NO_DERIVATIVE = re.compile(
    r"JVP|jvp|Differentiation rule|gradient with respect to|not differentiable"
)

_CONVERSIONS = (
    jax.errors.TracerArrayConversionError,
    jax.errors.ConcretizationTypeError,
)


@contextlib.contextmanager
def named(problem: Problem) -> Iterator[None]:
    """What a derivative of the problem's loss raises, as an error that leads on.

    All other errors, among them those of the loss itself, pass as they are.
    """
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        better = _better(error, problem)
        if better is None:
            raise
        raise better from error


def _better(error: Exception, problem: Problem) -> Exception | None:
    text = str(error)
    is_unplaced = custom_rules.UNUSABLE in text and "(called at" not in text
    if text.startswith("forwax") and not is_unplaced:
        return None
    # The second is what Equinox and all that is built on it says.
    if "custom_vjp" in text or text.startswith("Unexpected tangent"):
        return _of_custom_rule(error, problem)
    if isinstance(error, _CONVERSIONS):
        return _of_conversion(error)
    if isinstance(error, ValueError | NotImplementedError):
        return _without_derivative(error) if _NO_DERIVATIVE.search(text) else None
    return None


def _of_custom_rule(error: Exception, problem: Problem) -> Exception | None:
    try:
        jaxpr = jax.make_jaxpr(problem.objective)(problem.params)
        found = custom_rules.first_without_jvp(jaxpr, [True] * len(jaxpr.in_avals))
    except jax.errors.ConcretizationTypeError:  # it branches on values
        found = []
    if found:
        return custom_rules.custom_vjp_error(*found)
    frames = places.of_error(error.__traceback__)
    if places.library_of(frames) is None:
        return None
    return custom_rules.without_jvp("custom derivative rule there", frames)


def _place(error: Exception) -> str:
    """Where in the loss it came from: of a traced loss its operation says so."""
    for note in getattr(error, "__notes__", []):
        if note.startswith(PLACE):
            return f" {note.removeprefix(PLACE)}"
    frames = places.of_error(error.__traceback__)
    place = places.call_of(frames, places.library_of(frames))
    return f" at {place}" if place else ""


def _without_derivative(error: Exception) -> Exception:
    return type(error)(
        f"forwax: the loss calls something that JAX has no derivative of{_place(error)}, on values "
        "that depend on the parameters. Use forwax.FiniteDifference(), which evaluates the loss "
        f"alone; or write a rule with jax.custom_jvp. JAX says: {error}"
    )


def _of_conversion(error: Exception) -> Exception | None:
    # A branch or an index has an error of its own, which is good.
    kinds = (
        jax.errors.TracerBoolConversionError,
        jax.errors.TracerIntegerConversionError,
    )
    if isinstance(error, kinds):
        return None
    first = str(error).splitlines()[0]
    return TypeError(
        "forwax: the loss turns a traced array into an array of NumPy or a number of Python"
        f"{_place(error)}, where neither derivatives nor traces can follow. Write it "
        "with jax.numpy; or use forwax.FiniteDifference(), which outside jax.jit, and without "
        "in_axes, calls the loss with plain arrays; inside, wrap that part in jax.pure_callback "
        f"for it. JAX says: {first}"
    )
