"""What each rule would give and cost on a user's own loss, beside backprop: error, arithmetic, memory and time."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from forwax import _tree
from forwax._rule import check_count
from forwax._signature import Problem, Signature, check_key
from forwax._timing import interleaved
from forwax._tree import Tree
from forwax.diagnosis import Diagnosis, DiagnosisRow
from forwax.rules import ActivityPerturbation, Exact, Rule, WeightPerturbation
from forwax.safety import Safe
from forwax.tangents import LowRank
from forwax.tangents._base import typed_key

EXACT_LIMIT = 1024
"""The most parameters for which forward mode gives the reference where reverse mode does not run."""
ALONE, BACKPROP, CHECKPOINTED = (
    "the loss alone",
    "jax.value_and_grad",
    "the same with jax.checkpoint",
)
_REJECTIONS = (TypeError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError)
Step = Callable[[Array, Problem], tuple[Array, Tree, Tree]]


def diagnose(
    loss: Callable[..., Any],
    rules: Sequence[Rule] | Mapping[str, Rule] | None = None,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    in_axes: Any = None,
    draws: int = 16,
    rounds: int = 10,
) -> Callable[..., Diagnosis]:
    """Measure what rules give and cost on a loss, beside `jax.value_and_grad`, and say which gradient to use.

    Args:
        loss: as for `forwax.value_and_grad`.
        rules: the rules, by name if a mapping; by default weight perturbation with one dense and
            with one and eight rank-1 tangents, and activity perturbation with `in_axes`.
        argnums: as for `forwax.value_and_grad`.
        has_aux: as for `forwax.value_and_grad`.
        in_axes: as for `forwax.value_and_grad`.
        draws: how many estimates of each rule are compared with the exact gradient.
        rounds: how often each program is timed; a round runs every program once, so that a busy
            machine slows all alike.

    Returns:
        A function `f(key, *args, **kwargs)` that returns the table; print it. The exact gradient is
        backprop's, or by forward mode where reverse mode rejects the loss and there are at most
        1,024 parameters. Arithmetic and memory are those of the compiled programs; XLA counts the
        body of a loop once, whatever its length.

    Raises:
        ValueError: when a count is not a positive integer, there are no rules, or one has the name
            of another row.
        Exception: what the loss itself raises. A rule that does not run, or not within the memory,
            is a row that says why.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> def loss(x):  # reverse mode rejects a while_loop
        ...     return jax.lax.while_loop(lambda s: jnp.sum(s) < 100, lambda s: s * 2, x).sum()
        >>> rules = {"signs": fx.WeightPerturbation(), "forward mode": fx.Exact()}
        >>> found = fx.diagnose(loss, rules)(jax.random.key(0), jnp.array([1.0, 2.0, 3.0]))
        >>> [(row.name, row.predicted_mse) for row in found.rules]
        [('signs', 2.0), ('forward mode', 0.0)]
        >>> found.backprop.error[:43], found.reference
        ('Reverse-mode differentiation does not work ', 'forward mode')
    """
    check_count("diagnose", "draws", draws)
    check_count("diagnose", "rounds", rounds)
    named = named_rules(rules, in_axes)
    signature = Signature(loss, argnums, has_aux, in_axes, "diagnose")

    def diagnose_loss(key: Any, /, *args: Any, **kwargs: Any) -> Diagnosis:
        return _diagnose(
            typed_key(check_key(key, "diagnose")), signature, named, args, kwargs, draws, rounds
        )

    return diagnose_loss


def named_rules(rules: Sequence[Rule] | Mapping[str, Rule] | None, in_axes: Any) -> dict[str, Rule]:
    """The rules by name; a name that is not given tells what differs from the rule's defaults, or counts."""
    if rules is None:
        low_rank = LowRank()
        rules = [
            WeightPerturbation(),
            WeightPerturbation(low_rank),
            WeightPerturbation(low_rank, 8),
        ]
        rules += [] if in_axes is None else [ActivityPerturbation()]
    values = rules.values() if isinstance(rules, Mapping) else rules
    listed = list(values) if isinstance(values, Iterable) else []
    if not listed or not all(isinstance(rule, Rule) for rule in listed):
        raise ValueError(
            f"diagnose: expected one or more rules, such as [forwax.WeightPerturbation()], got "
            f"{rules!r}."
        )
    named = (
        dict(rules)
        if isinstance(rules, Mapping)
        else dict(zip(_labels(listed), listed, strict=True))
    )
    taken = sorted({ALONE, BACKPROP, CHECKPOINTED} & set(named))
    if taken:
        raise ValueError(
            f"diagnose: {taken} name rows that are always there. Give these rules other names."
        )
    return named


def _labels(rules: Sequence[Rule]) -> list[str]:
    """A label for each rule; equal ones are numbered."""
    labels = [label(rule) for rule in rules]
    total, seen = collections.Counter(labels), collections.Counter[str]()
    for i, text in enumerate(labels):
        seen[text] += 1
        labels[i] = f"{text} #{seen[text]}" if total[text] > 1 else text
    return labels


def label(value: Any) -> str:
    """A value's fields that differ from their defaults.

    >>> label(WeightPerturbation(LowRank(), num_tangents=8))
    'WeightPerturbation(tangents=LowRank(), num_tangents=8)'
    """
    if not dataclasses.is_dataclass(value):
        return repr(value) if isinstance(value, bool | int | float | str | None) else "..."
    pairs = [(field, label(getattr(value, field.name))) for field in dataclasses.fields(value)]
    shown = [f"{field.name}={text}" for field, text in pairs if text != label(field.default)]
    return f"{type(value).__name__}({', '.join(shown)})"


def _diagnose(
    key: Array,
    signature: Signature,
    rules: Mapping[str, Rule],
    args: Any,
    kwargs: Any,
    draws: int,
    rounds: int,
) -> Diagnosis:
    problem = signature.bind(args, kwargs)
    n = _tree.num_coordinates(problem.params)
    arrays, rebuild = _split_arrays(args, kwargs)
    prepare = lambda step: _compiled(step, signature, rebuild, key, arrays)  # noqa: E731
    alone = prepare(_evaluate)
    value = float(alone(key, arrays)[0])  # what the loss raises is the caller's
    programs: dict[str, Any] = {ALONE: alone}
    errors: dict[str, str] = {}
    estimates = {name: rule.estimate for name, rule in rules.items()}
    for name, step in {BACKPROP: _backprop, CHECKPOINTED: _checkpointed, **estimates}.items():
        try:
            program = prepare(step)
            jax.block_until_ready(program(key, arrays))  # what is too large may compile and not run
            programs[name] = program
        except _REJECTIONS as error:
            errors[name] = _shortened(error)
    calls = {name: lambda key, f=program: f(key, arrays) for name, program in programs.items()}
    reference, source = _reference(calls, key, n, lambda: prepare(Exact().estimate)(key, arrays)[2])
    runs = {name: functools.partial(call, key) for name, call in calls.items()}
    seconds = interleaved(runs, rounds)

    def row(name: str, **own: Any) -> DiagnosisRow:
        if name in errors:
            return DiagnosisRow(name, error=errors[name], **own)
        median = float(np.median(seconds[name]))
        return DiagnosisRow(name, seconds=median, **_figures(programs[name]), **own)

    def rule_row(name: str, rule: Rule) -> DiagnosisRow:
        own: dict[str, Any] = {"unbiased": rule.unbiased, "reverse_mode": rule.reverse_mode}
        if name in calls:
            own["predicted_mse"] = _law(rule, n)
            own |= {} if reference is None else _accuracy(calls[name], key, reference, draws)
        return row(name, **own)

    exact: dict[str, Any] = {"predicted_mse": 0.0, "mse": (0.0, 0.0), "cosine": (1.0, 0.0)}
    rows = tuple(rule_row(name, rule) for name, rule in rules.items())
    backprop, checkpointed = row(BACKPROP, **exact), row(CHECKPOINTED, **exact)
    return Diagnosis(row(ALONE), backprop, checkpointed, rows, n, value, source, draws)


def _evaluate(key: Array, problem: Problem) -> tuple[Array, Tree, Tree]:
    value, aux = problem.objective(problem.params)
    return value, aux, None


def _backprop(key: Array, problem: Problem) -> tuple[Array, Tree, Tree]:
    (value, aux), grads = jax.value_and_grad(problem.objective, has_aux=True)(problem.params)
    return value, aux, grads


def _checkpointed(key: Array, problem: Problem) -> tuple[Array, Tree, Tree]:
    return _backprop(key, dataclasses.replace(problem, objective=jax.checkpoint(problem.objective)))


def _split_arrays(
    args: Any, kwargs: Any
) -> tuple[list[Array], Callable[[Sequence[Array]], tuple[Any, Any]]]:
    """The arrays of a call, to be arguments of a compiled program, and how to put them back among the rest."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    places = [
        i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray | np.generic)
    ]

    def rebuild(arrays: Sequence[Array]) -> tuple[Any, Any]:
        full = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            full[place] = array
        return structure.unflatten(full)

    return [jnp.asarray(leaves[i]) for i in places], rebuild


def _compiled(
    step: Step, signature: Signature, rebuild: Callable, key: Array, arrays: list[Array]
) -> Any:
    def program(key: Array, arrays: list[Array]) -> tuple[Array, Tree, Tree]:
        return step(key, signature.bind(*rebuild(arrays)))

    return jax.jit(program).lower(key, arrays).compile()


def _figures(program: Any) -> dict[str, Any]:
    """Arithmetic and memory; None where a backend does not tell."""
    costs, memory = program.cost_analysis(), program.memory_analysis()
    flops = costs.get("flops") if isinstance(costs, dict) else None
    return {"flops": flops, "temporary_bytes": getattr(memory, "temp_size_in_bytes", None)}


def _reference(calls: Mapping[str, Callable], key: Array, n: int, forward_mode: Callable) -> Any:
    """The exact gradient and how it was found."""
    if BACKPROP in calls:
        return calls[BACKPROP](key)[2], "backprop"
    if n > EXACT_LIMIT:
        return None, None
    try:
        return forward_mode(), "forward mode"
    except _REJECTIONS:
        return None, None


@jax.jit
def _compare(grads: Tree, reference: Tree) -> tuple[Array, Array]:
    """The relative squared error and the cosine of one estimate."""
    squared = _tree.inner(reference, reference)
    difference = jax.tree.map(jnp.subtract, grads, reference)
    length = jnp.sqrt(_tree.inner(grads, grads) * squared)
    return _tree.inner(difference, difference) / squared, _tree.inner(grads, reference) / length


def _accuracy(
    call: Callable, key: Array, reference: Tree, draws: int
) -> dict[str, tuple[float, float]]:
    found = np.array(
        [_compare(call(own)[2], reference) for own in jax.random.split(key, draws)], np.float64
    )
    deviation = found.std(axis=0, ddof=1) if draws > 1 else np.full(2, math.nan)
    errors = deviation / math.sqrt(draws)
    return {"mse": (found[:, 0].mean(), errors[0]), "cosine": (found[:, 1].mean(), errors[1])}


def _law(rule: Rule, n: int) -> float | None:
    """The predicted relative MSE for n parameters, None where the law counts something else or there is none."""
    if isinstance(rule.rule if isinstance(rule, Safe) else rule, ActivityPerturbation):
        return None
    law = rule.relative_mse(n)
    return law if math.isfinite(law) else None


def _shortened(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:200].rsplit(" ", 1)[0] + " ..."
