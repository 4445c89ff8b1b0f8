"""Two interpreters of a planned program, both ordinary traceable functions.

`forward` evaluates all of it, lets noise in and keeps what the assembly needs; `local` evaluates
parameter chains and regions alone, from those records, so that a reverse pass over it never crosses
two sites.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax import Array, lax

from forwax import _mesh
from forwax.sites.plan import Level, LoopPlan
from forwax.sites.program import Equation, Variable, bind, evaluate, read
from forwax.sites.regions import Region

Values: TypeAlias = dict[Variable, Any]


@jax.custom_jvp
def inject(value: Array, noise: Array, time: Array) -> Array:
    """The value itself; its tangent gains the noise times the tangent of `time`."""
    return value


@inject.defjvp
def _inject_jvp(
    primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    value, noise, _ = primals
    dvalue, _, dtime = tangents
    return value, dvalue + _mesh.vary(dtime.astype(noise.real.dtype) * noise, _mesh.axes(value))


def forward(
    level: Level,
    inputs: Sequence[Any],
    noise: Mapping[Variable, Array],
    time: Array | None,
    extra: frozenset,
    taps: Sequence[Variable] = (),
) -> tuple[list[Any], Values]:
    """Evaluate a level.

    Args:
        level: what to evaluate.
        inputs: the values of the program's inputs.
        noise: by the variable that it enters at; with a leading axis for each loop around it.
        time: the scalar whose tangent scales the noise, or None for no noise.
        extra: further variables of this level to record.
        taps: variables of this level whose values, and tangents, are returned behind the outputs.

    Returns:
        The program's outputs with the taps, and the recorded values: those of a loop's body with a
        leading axis.
    """
    env: Values = dict(zip(level.program.inputs, inputs, strict=True))
    records: Values = {}
    for equation in level.program.equations:
        values = [read(atom, env) for atom in equation.inputs]
        plan = level.loops.get(equation.outputs[0]) if equation.outputs else None
        if plan is None:
            outputs = bind(equation, values)
        else:
            outputs, inner = _forward_loop(plan, values, noise, time)
            records.update(inner)
        for v, value in zip(equation.outputs, outputs, strict=True):
            env[v] = value if v not in noise else inject(value, noise[v], time)
    records.update({v: lax.stop_gradient(env[v]) for v in level.records | extra})
    return [read(atom, env) for atom in (*level.program.outputs, *taps)], records


def _forward_loop(
    plan: LoopPlan, values: Sequence[Any], noise: Mapping[Variable, Array], time: Array | None
):
    loop, level = plan.loop, plan.level
    first, last = loop.num_consts, loop.num_consts + loop.num_carry
    own = {v: noise[v] for region, _ in level.all_regions() for v in region.outputs if v in noise}

    def step(
        carry: list[Any], slices: tuple[list[Any], Values]
    ) -> tuple[list[Any], tuple[list[Any], Values]]:
        xs, noise = slices
        outputs, records = forward(level, [*values[:first], *carry, *xs], noise, time, frozenset())
        return outputs[: loop.num_carry], (outputs[loop.num_carry :], records)

    carry, (ys, records) = lax.scan(
        step,
        list(values[first:last]),
        (list(values[last:]), own),
        loop.length,
        loop.reverse,
        loop.unroll,
    )
    return [*carry, *ys], records


def local(
    level: Level,
    env: Values,
    apply: Callable[[Equation, list[Any]], list[Any]] = bind,
) -> Values:
    """The regions' outputs from parameters and records.

    Args:
        level: what to evaluate.
        env: the values of parameters and of records, by variable.
        apply: how one equation is evaluated.

    Returns:
        The regions' outputs by variable; those of a loop's body with a leading axis. Parameters
        that were computed on the way are added to `env`.
    """
    outputs: Values = {}
    for step in level.steps:
        if isinstance(step, Region):
            outputs.update(_local_region(step, env, apply))
        elif isinstance(step, LoopPlan):
            outputs.update(_local_loop(step, env, apply))
        else:
            evaluate([step], env, apply)
    return outputs


def _local_region(region: Region, env: Values, apply: Callable) -> Values:
    scope = {v: env[v] for v in region.inputs}
    evaluate(region.equations, scope, apply)
    return {v: scope[v] for v in region.outputs}


def _local_loop(plan: LoopPlan, env: Values, apply: Callable) -> Values:
    """The steps do not depend on one another any more: a vmap over recorded time."""
    fixed = {v: read(atom, env) for v, atom in plan.fixed.items()}
    mapped = {v: read(atom, env) for v, atom in plan.scanned.items()}
    mapped |= {v: env[v] for v in plan.level.all_records()}

    def step(mapped: Values) -> tuple[Values, Values]:
        inner = {**fixed, **mapped}
        outputs = local(plan.level, inner, apply)
        return outputs, {outer: inner[v] for outer, v in plan.stacked.items()}

    outputs, stacked = jax.vmap(step, axis_size=plan.loop.length)(mapped)
    env.update(stacked)
    env.update({outer: read(atom, env) for outer, atom in plan.kept.items()})
    return outputs
