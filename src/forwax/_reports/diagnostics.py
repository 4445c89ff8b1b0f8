"""What each rule would give and cost on a user's own loss, beside backprop."""

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
from forwax._checks import check_count
from forwax._reports.against_weights import about_examples, against_weight_noise
from forwax._reports.chunks import about_chunks
from forwax._reports.diagnosis import Diagnosis
from forwax._reports.diagnosis_row import DiagnosisRow
from forwax._reports.programs import REJECTIONS, CompiledStep, Step, compiled
from forwax._reports.timing import interleaved, medians
from forwax._rule import is_rule
from forwax._rules import (
    ActivityPerturbation,
    Backprop,
    Exact,
    Rule,
    WeightPerturbation,
)
from forwax._signature import Problem, Signature, check_key
from forwax._tree import Tree
from forwax.tangents import LowRank
from forwax.tangents._base import typed_key

EXACT_LIMIT = 1024
"""The most parameters for which forward mode gives a reference that reverse mode does not."""
ALONE = "the loss alone"
BACKPROP = "jax.value_and_grad"
CHECKPOINTED = "the same with jax.checkpoint"
_LONGEST_ERROR = 200


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
    """Measure what rules give and cost on a loss, and say which gradient to use.

    Beside them stands `jax.value_and_grad`, with and without `jax.checkpoint`.

    Args:
        loss: as for `forwax.value_and_grad`.
        rules: the rules, by name if a mapping; by default weight perturbation with one dense and
            with one and eight rank-1 tangents, and activity perturbation with `in_axes`. Of
            `forwax.Exact` two or three chunk sizes are timed, each of which is compiled.
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
    draws = check_count("diagnose", "draws", draws)
    rounds = check_count("diagnose", "rounds", rounds)
    named = named_rules(rules, in_axes)
    signature = Signature(loss, argnums, has_aux, in_axes, "diagnose")

    def diagnose_loss(key: Any, /, *args: Any, **kwargs: Any) -> Diagnosis:
        key = typed_key(check_key(key, "diagnose"))
        return _diagnose(key, signature, named, args, kwargs, draws, rounds)

    return diagnose_loss


def named_rules(
    rules: Sequence[Rule] | Mapping[str, Rule] | None, in_axes: Any
) -> dict[str, Rule]:
    """The rules by name; without names each gets a label, and equal labels are counted."""
    if rules is None:
        rules = _default_rules(in_axes)
    values = rules.values() if isinstance(rules, Mapping) else rules
    listed = list(values) if isinstance(values, Iterable) else []
    if not listed or not all(map(is_rule, listed)):
        raise ValueError(
            "diagnose: expected one or more rules, such as [forwax.WeightPerturbation()], got "
            f"{rules!r}."
        )
    names = list(rules) if isinstance(rules, Mapping) else _labels(listed)
    taken = sorted({ALONE, BACKPROP, CHECKPOINTED} & set(names))
    if taken:
        raise ValueError(
            f"diagnose: {taken} name rows that are always there. Give these rules other names."
        )
    return dict(zip(names, listed, strict=True))


def _default_rules(in_axes: Any) -> list[Rule]:
    rules: list[Rule] = [
        WeightPerturbation(),
        WeightPerturbation(LowRank()),
        WeightPerturbation(LowRank(), 8),
    ]
    if in_axes is not None:
        rules.append(ActivityPerturbation())
    return rules


def _labels(rules: Sequence[Rule]) -> list[str]:
    """A label for each rule; equal ones are numbered."""
    labels = [label(rule) for rule in rules]
    total = collections.Counter(labels)
    seen = collections.Counter[str]()
    for i, text in enumerate(labels):
        seen[text] += 1
        if total[text] > 1:
            labels[i] = f"{text} #{seen[text]}"
    return labels


def label(value: Any) -> str:
    """A value's fields that differ from their defaults.

    >>> label(WeightPerturbation(LowRank(), num_tangents=8))
    'WeightPerturbation(tangents=LowRank(), num_tangents=8)'
    """
    if not dataclasses.is_dataclass(value):
        # Arrays and functions would fill the table.
        return (
            repr(value) if isinstance(value, bool | int | float | str | None) else "..."
        )
    shown = []
    for field in dataclasses.fields(value):
        text = label(getattr(value, field.name))
        if text != label(field.default):
            shown.append(f"{field.name}={text}")
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

    def prepare(step: Step) -> CompiledStep:
        return compiled(step, signature, key, args, kwargs)

    alone = prepare(_evaluate)
    value = float(alone(key)[0])  # what the loss raises is the caller's
    # From here on an error is a row: the loss itself runs.
    estimates: dict[str, Step] = {name: rule.estimate for name, rule in rules.items()}
    steps = {BACKPROP: Backprop().estimate, CHECKPOINTED: _checkpointed, **estimates}
    programs, errors = _running(steps, prepare, key)
    sizes = {name: rule.in_chunks(problem) for name, rule in rules.items()}
    in_chunks: dict[str, Step] = {
        _sized(name, size): other.estimate
        for name, others in sizes.items()
        for size, other in others.items()
    }
    others, _ = _running(in_chunks, prepare, key)
    reference, source = _reference(programs, prepare, key, n)
    if not _tree.all_finite(reference):
        reference, source = None, None
    # All in one go, so that every round meets every program.
    costs = _costs({ALONE: alone, **programs, **others}, key, rounds)
    costs |= {name: DiagnosisRow(name, error=error) for name, error in errors.items()}

    def row(name: str, rule: Rule) -> DiagnosisRow:
        kind: dict[str, Any] = {
            "unbiased": rule.unbiased,
            "reverse_mode": rule.reverse_mode,
        }
        if name not in programs:
            return dataclasses.replace(costs[name], **kind)
        measured: dict[str, Any] = {}
        found = {size: costs.get(_sized(name, size)) for size in sizes[name]}
        chunked = {size: other for size, other in found.items() if other is not None}
        note = about_chunks(name, costs[name], chunked)
        note = note or about_examples(name, rule, problem)
        if reference is not None:
            errors, cosines = _accuracy(programs[name], key, reference, draws)
            # the worst news first
            bad = _not_finite(name, errors, source)
            worse = against_weight_noise(name, rule, problem.params, errors)
            note = bad or worse or note
            mse = _mean(errors.sum(1))
            measured = {"mse": mse, "cosine": _mean(cosines)}
        kind |= {"predicted_mse": rule.law(problem), "note": note}
        return dataclasses.replace(costs[name], **kind, **measured)

    # Backprop is the reference, or, where forward mode is, does not run.
    exact: dict[str, Any] = {
        "predicted_mse": 0.0,
        "mse": (0.0, 0.0),
        "cosine": (1.0, 0.0),
    }
    return Diagnosis(
        loss=costs[ALONE],
        backprop=dataclasses.replace(costs[BACKPROP], **exact),
        checkpointed=dataclasses.replace(costs[CHECKPOINTED], **exact),
        rules=tuple(row(name, rule) for name, rule in rules.items()),
        num_parameters=n,
        value=value,
        reference=source,
        draws=draws,
    )


def _sized(name: str, chunk_size: int) -> str:
    """The name of a rule with another chunk size."""
    return f"{name} with chunk_size={chunk_size}"


def _evaluate(key: Array, problem: Problem) -> tuple[Array, Tree, Tree]:
    value, aux = problem.objective(problem.params)
    return value, aux, None


def _checkpointed(key: Array, problem: Problem) -> tuple[Array, Tree, Tree]:
    recomputing = dataclasses.replace(
        problem, objective=jax.checkpoint(problem.objective)
    )
    return Backprop().estimate(key, recomputing)


def _running(
    steps: Mapping[str, Step], prepare: Callable[[Step], CompiledStep], key: Array
) -> tuple[dict[str, CompiledStep], dict[str, str]]:
    """The programs of the steps that run, and of the others why they do not."""
    programs: dict[str, CompiledStep] = {}
    errors: dict[str, str] = {}
    for name, step in steps.items():
        try:
            program = prepare(step)
            jax.block_until_ready(
                program(key)
            )  # what is too large may compile and not run
            programs[name] = program
        except REJECTIONS as error:
            errors[name] = _shortened(error)
    return programs, errors


def _reference(
    programs: Mapping[str, CompiledStep],
    prepare: Callable[[Step], CompiledStep],
    key: Array,
    n: int,
) -> tuple[Tree, str | None]:
    """The exact gradient and how it was found; None and None where it is out of reach."""
    if BACKPROP in programs:
        return programs[BACKPROP](key)[2], "backprop"
    if n > EXACT_LIMIT:  # forward mode runs the loss once for each parameter
        return None, None
    try:
        return prepare(Exact().estimate)(key)[2], "forward mode"
    except REJECTIONS:
        return None, None


def _costs(
    programs: Mapping[str, CompiledStep],
    key: Array,
    rounds: int,
) -> dict[str, DiagnosisRow]:
    """A row for each program, with its time, arithmetic and memory."""
    calls = {
        name: functools.partial(program, key) for name, program in programs.items()
    }
    seconds = medians(interleaved(calls, rounds))
    return {
        name: DiagnosisRow(
            name,
            flops=program.flops,
            temporary_bytes=program.temporary_bytes,
            seconds=seconds[name],
        )
        for name, program in programs.items()
    }


@jax.jit
def _compare(grads: Tree, reference: Tree) -> tuple[Array, Array]:
    """The relative squared error at each leaf [leaves], and the cosine, of one estimate."""
    squared = _tree.inner(reference, reference)
    difference = jax.tree.map(jnp.subtract, grads, reference)
    length = jnp.sqrt(_tree.inner(grads, grads) * squared)
    errors = [_tree.inner(leaf, leaf) for leaf in jax.tree.leaves(difference)]
    return jnp.stack(errors) / squared, _tree.inner(grads, reference) / length


def _accuracy(
    program: CompiledStep, key: Array, reference: Tree, draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """Relative squared errors [draws, leaves], whose sum is that of all, and cosines [draws]."""
    keys = jax.random.split(key, draws)
    found = [_compare(program(each)[2], reference) for each in keys]
    errors, cosines = zip(*found, strict=True)
    return np.array(errors, np.float64), np.array(cosines, np.float64)


def _not_finite(name: str, errors: np.ndarray, source: str | None) -> str | None:
    """One sentence where slopes are not finite and reverse mode is; else None."""
    if source != "backprop" or np.isfinite(errors).all():
        return None
    return (
        f"{name} is not finite here, and backprop's gradient is: in forward mode a square root, a "
        "norm, a logarithm or a power of what is masked to 0 gives 0 · ∞. Keep the argument away "
        "from there, y = jnp.where(ok, x, 1.0), and mask what comes out, "
        'jnp.where(ok, jnp.sqrt(y), 0.0): "NaN that only forward mode has" in the limits.'
    )


def _mean(found: np.ndarray) -> tuple[float, float]:
    """The mean over draws, and its standard error."""
    # A single draw has no spread to tell an error from.
    deviation = found.std(ddof=1) if len(found) > 1 else math.nan
    return found.mean(), deviation / math.sqrt(len(found))


def _shortened(error: Exception) -> str:
    text = " ".join(str(error).split())
    if len(text) <= _LONGEST_ERROR:
        return text
    whole_words, _ = text[:_LONGEST_ERROR].rsplit(" ", 1)
    return f"{whole_words} ..."
