"""A loss that ends in a sum over devices, as each device's own part of it.

A slope of the sum hears the noise of every device; where the noise is each device's own, what the
others' noise changes has mean zero and is an error alone.
"""

import dataclasses
import itertools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from forwax import _mesh, _tree
from forwax._programs.evaluate import Values, bind, evaluate, read
from forwax._programs.primitives import facts_of
from forwax._programs.program import (
    Atom,
    Equation,
    Traced,
    Variable,
    equations_of,
    is_inexact,
    variables,
)
from forwax._programs.tracing import retrace, trace
from forwax._signature import Problem
from forwax._tree import Tree


def with_own_losses(problem: Problem, name: str) -> tuple[Problem, _mesh.Axes]:
    """A problem whose examples' losses are each device's part; see `without_last_sums`."""
    is_staged = _tree.is_abstract(jnp.zeros(()))
    if not is_staged and not _mesh.all_axes(problem.mapped):
        return problem, frozenset()  # such a loss may branch on values
    traced = trace(problem.example, problem.params, *problem.example_specs())
    losses, _ = traced.out_tree.children()
    traced, over = without_last_sums(traced, losses.num_leaves, name)

    def example(params: Tree, *slices: Any) -> Any:
        program = traced.program
        given = traced.arguments(params, slices)
        env: Values = dict(zip(program.inputs, given, strict=True))
        evaluate(program.equations, env)
        outputs = [read(atom, env) for atom in program.outputs]
        return jax.tree.unflatten(traced.out_tree, outputs)

    return dataclasses.replace(problem, example=example) if over else problem, over


def without_last_sums(
    traced: Traced, num_losses: int, name: str
) -> tuple[Traced, _mesh.Axes]:
    """The program without the sums over mesh axes that its losses end in, and these axes.

    Behind such a sum the loss is linear: each device keeps its own term, and an equal share of what
    all devices have alike, such as a penalty. The sum over these axes of the new losses is that of
    the old ones. All stays as it is where devices also talk inside the network, as for a batch's
    statistics: what one's noise changes of another's loss is then a part of the gradient.

    Where types do not say what varies, a warning in the name of the rule, if one is given, says so.
    """
    program = traced.program
    losses = variables(program.outputs[:num_losses])
    sums = [e for e in program.equations if e.facts.sums_over_mesh]
    linear = _linear_in(program.equations, losses, _behind(program.equations, sums))
    last = [e for e in sums if linear.issuperset(e.outputs)]
    if any(_talks(e) for e in program.equations if e not in last):
        return traced, frozenset()
    hidden = [e for e in last if not _says_what_varies(e, traced.types)]
    if hidden:
        if name:
            _warn(hidden[-1], name)
        return traced, frozenset()
    over = frozenset[str]().union(*(e.params["axes"] for e in last))
    # A loss that varies over these axes has a term that was not summed.
    is_mixed = any(over & _mesh.type_axes(traced.types[v]) for v in losses)
    if not last or is_mixed:
        return traced, frozenset()

    behind = _behind(program.equations, last)
    tail = [
        e for e in program.equations if e in last or not behind.isdisjoint(e.variables)
    ]
    tail = [e for e in tail if linear.issuperset(e.outputs)]
    inner = {v for e in tail for v in e.outputs}
    outer = [v for e in tail for v in e.variables if v not in inner]
    given = list(dict.fromkeys([*outer, *(v for v in losses if v not in inner)]))

    def own(*values: Any) -> list[Any]:
        env: Values = dict(zip(given, values, strict=True))
        evaluate(tail, env, _own_part)
        return [_share(read(atom, env), over) for atom in program.outputs[:num_losses]]

    new = retrace(own, given, traced.types)
    outputs = (*new.outputs, *program.outputs[num_losses:])
    kept = _needed(program.equations, tail, [*new.equations], outputs)
    changed = dataclasses.replace(
        program, equations=(*kept, *new.equations), outputs=outputs
    )
    return dataclasses.replace(traced, program=changed), over


def _talks(equation: Equation) -> bool:
    """Whether in an equation, or inside it, one device hears of another's values."""
    inside = itertools.chain(*map(equations_of, equation.inner_jaxprs))
    own = [] if equation.origin is None else [equation.origin]
    return any(map(_is_talk, itertools.chain(own, inside)))


def _is_talk(eqn: Any) -> bool:
    """Whether a jaxpr's equation is told mesh axes, by whichever name; array axes are numbers."""
    axes = eqn.params.get("axes", eqn.params.get("axis_name", ()))
    several = axes if isinstance(axes, tuple | list) else (axes,)
    is_named = any(isinstance(axis, str) for axis in several)
    moves_values = any(is_inexact(v.aval) for v in eqn.invars)
    return is_named and moves_values and not facts_of(eqn.primitive).varies


def _says_what_varies(equation: Equation, types: Sequence[Any]) -> bool:
    over = frozenset(equation.params["axes"])
    return all(over <= _mesh.type_axes(types[v]) for v in equation.variables)


def _warn(equation: Equation, name: str) -> None:
    warnings.warn(
        f"{name}: the sum over {sorted(equation.params['axes'])} at {equation.source} ends the "
        "loss, where no type says over which devices a value varies: each slope then hears the "
        "noise of all devices, as an error that grows with their number. Leave that sum out of "
        "the loss, give each device a key of its own and take jax.lax.pmean of the estimates, or "
        "use jax.shard_map with check_vma=True.",
        stacklevel=2,
    )


def _behind(equations: Iterable[Equation], starts: Sequence[Equation]) -> set[Variable]:
    """What depends on the outputs of some equations, these outputs included."""
    found: set[Variable] = set()
    for equation in equations:
        if equation in starts or not found.isdisjoint(equation.variables):
            found.update(equation.outputs)
    return found


def _linear_in(
    equations: Sequence[Equation], losses: Sequence[Variable], behind: set[Variable]
) -> set[Variable]:
    """The variables in which the losses are linear, in all ways from them to these."""
    reached = set(losses)
    bent: set[Variable] = set()
    for equation in reversed(equations):
        if reached.isdisjoint(equation.outputs):
            continue
        reached.update(equation.variables)
        if bent.isdisjoint(equation.outputs):
            bent.update(_bent(equation, behind))
        else:
            bent.update(equation.variables)
    return reached - bent


def _bent(equation: Equation, behind: set[Variable]) -> list[Variable]:
    """The inputs in which an equation is not linear, while no other input is behind a sum."""
    facts = equation.facts
    if facts.sums_over_mesh or facts.sum_behind_outputs:
        return []
    scaled = [equation.inputs[i] for i in facts.scaled]
    others = [v for v in equation.variables if v in behind]
    if len(others) == 1 and others[0] in scaled:
        return [v for v in equation.variables if v not in others]
    return equation.variables


def _own_part(equation: Equation, values: list[Any]) -> list[Any]:
    """An equation of a loss's end on one device's own terms."""
    if equation.facts.sums_over_mesh:
        return values
    over = _mesh.all_axes(values)
    if equation.facts.sum_behind_outputs:
        values = [_share(x, over) for x in values]
    return bind(equation, [_mesh.vary(x, over) for x in values])


def _share(x: Any, over: _mesh.Axes) -> Any:
    """A device's part of what is the same along mesh axes."""
    missing = over - _mesh.axes(x)
    return _mesh.vary(x / _mesh.size(missing), over) if missing else x


def _needed(
    equations: Sequence[Equation],
    tail: Sequence[Equation],
    new: Sequence[Equation],
    outputs: Sequence[Atom],
) -> list[Equation]:
    """The equations but for those of the old tail that nothing reads any more."""
    read_later = set(variables(outputs)).union(*(e.variables for e in new))
    kept: list[Equation] = []
    for equation in reversed(equations):
        if equation in tail and read_later.isdisjoint(equation.outputs):
            continue
        kept.append(equation)
        read_later.update(equation.variables)
    return kept[::-1]
