"""A pass that keeps what the assembly needs: the loss, its slopes, errors, and gradients from them.

`forward` evaluates everything, lets noise in and records; `local` evaluates parameter chains and
regions alone, from those records, so that a reverse pass over it never crosses two sites.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _mesh, _tree
from forwax._programs.constants import constant_along
from forwax._programs.evaluate import Values, bind, evaluate, inject, read
from forwax._programs.program import Equation, Variable
from forwax._pushforward import along, over_tangents
from forwax._sites.levels import Level, LoopPlan
from forwax._sites.model import Pass, Sites
from forwax._sites.outputs import Tail
from forwax._sites.regions import Region
from forwax._tree import Tree

Noise = Mapping[Variable, Array]


def forward(
    level: Level,
    inputs: Sequence[Any],
    noise: Noise,
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
        plan = level.loop_of(equation)
        if plan is None:
            outputs = bind(equation, values)
        else:
            outputs, inner_records = _forward_loop(plan, values, noise, time)
            records.update(inner_records)
        for v, value in zip(equation.outputs, outputs, strict=True):
            if v in noise:
                value = inject(value, noise[v], time)
            env[v] = value
    # Records are constants of the assembly: nothing is ever differentiated through two sites.
    for v in level.records | extra:
        records[v] = env[v] if time is None else constant_along(time, env[v])
    returned = (*level.program.outputs, *taps)
    return [read(atom, env) for atom in returned], records


def _forward_loop(
    plan: LoopPlan,
    values: Sequence[Any],
    noise: Noise,
    time: Array | None,
) -> tuple[list[Any], Values]:
    consts, first_carry, scanned = plan.loop.split(values)
    # Noise inside the loop has a leading axis of steps: each step takes its slice.
    inner_noise: Values = {}
    for region, _ in plan.level.all_regions():
        for v in region.outputs:
            if v in noise:
                inner_noise[v] = noise[v]

    def step(
        carry: list[Any],
        slices: tuple[list[Any], Values],
    ) -> tuple[list[Any], Any]:
        xs, noise_of_step = slices
        outputs, records = forward(
            plan.level,
            [*consts, *carry, *xs],
            noise_of_step,
            time,
            extra=frozenset(),
        )
        carry, ys = plan.loop.split_outputs(outputs)
        return carry, (ys, records)

    carry, (ys, records) = plan.loop.scan(step, first_carry, (scanned, inner_noise))
    return [*carry, *ys], records


def local(
    level: Level, env: Values, apply: Callable[[Equation, list[Any]], list[Any]] = bind
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


def _local_region(
    region: Region,
    env: Values,
    apply: Callable,
) -> Values:
    scope = {v: env[v] for v in region.inputs}
    evaluate(region.equations, scope, apply)
    return {v: scope[v] for v in region.outputs}


def _local_loop(
    plan: LoopPlan,
    env: Values,
    apply: Callable,
) -> Values:
    """The steps do not depend on one another any more: a vmap over recorded time."""
    fixed = {v: read(atom, env) for v, atom in plan.fixed.items()}
    scanned = {v: read(atom, env) for v, atom in plan.scanned.items()}
    records = {v: env[v] for v in plan.level.all_records()}

    def step(of_step: Values) -> tuple[Values, Values]:
        scope = {**fixed, **of_step}
        outputs = local(plan.level, scope, apply)
        stacked = {outer: scope[inner] for outer, inner in plan.stacked.items()}
        return outputs, stacked

    of_steps = scanned | records
    outputs, stacked = jax.vmap(step, axis_size=plan.loop.length)(of_steps)
    env.update(stacked)
    for outer, atom in plan.unchanged.items():
        env[outer] = read(atom, env)
    return outputs


def push(
    sites: Sites,
    noise: Sequence[Array] = (),
    num_tangents: int = 1,
) -> Pass:
    """Evaluate the loss and its slopes along k noises [k, *spec]; without noise, the loss alone."""
    if not noise or not sites.noisy:
        (losses, *_), (aux, records) = _run(sites, {}, None)
        return Pass(losses, aux, [], [], records)
    variables = [site.variable for site in sites.noisy]
    table = dict(zip(variables, noise, strict=True))
    return push_along(functools.partial(_run, sites), table, num_tangents)


def _run(sites: Sites, noise: Values, time: Array | None) -> tuple[Any, Any]:
    """`((losses, sums of losses, sources), (aux, records))`, examples on a leading axis of each."""
    taps = () if sites.sources is None else sites.sources.starts
    extra = sites.tail_records

    def one(
        mapped: Sequence[Array],
        noise: Values,
    ) -> tuple[Any, Any, Values]:
        inputs = sites.traced.arguments(sites.problem.params, mapped)
        outputs, records = forward(
            sites.level,
            inputs,
            noise,
            time,
            extra,
            taps,
        )
        num_outputs = len(outputs) - len(taps)
        losses, aux = jax.tree.unflatten(sites.traced.out_tree, outputs[:num_outputs])
        sums = [_sum(x) for x in losses]
        return (losses, sums, outputs[num_outputs:]), aux, records

    if sites.num_examples is None:
        out, aux, records = one((), noise)
        return out, (aux, records)
    recorded = sites.level.all_records() | extra
    noise_axes = {v: sites.axis_of(v) for v in noise}
    record_axes = {v: sites.axis_of(v) for v in recorded}
    source_axes = [sites.axis_of(v) for v in taps]
    each = jax.vmap(
        one,
        in_axes=(list(sites.problem.mapped_axes), noise_axes),
        out_axes=((0, 0, source_axes), 0, record_axes),
        axis_size=sites.num_examples,
    )
    out, aux, records = each(list(sites.problem.mapped), noise)
    return out, (aux, records)


def push_along(
    run: Callable[[Any, Array], tuple[Any, Any]],
    noise: Any,
    num_tangents: int,
) -> Pass:
    """Evaluate the loss and its slopes along k noises.

    Args:
        run: takes one noise and the time, of which the tangent scales it, to `((losses, sums of
            losses, sources), (aux, records))`.
        noise: a tree with a leading axis k.
        num_tangents: the number k.
    """

    def slopes(noise: Any) -> tuple[Any, Any]:
        primal, tangent, rest = along(functools.partial(run, noise))
        losses, _, _ = primal
        _, sums, sources = tangent
        return (sums, sources), (losses, *rest)  # only the first carry a tangent index

    (sums, sources), (losses, aux, records) = over_tangents(slopes, noise, num_tangents)
    return Pass(losses, aux, sums, sources, records)


def output_errors(sites: Sites, records: Values) -> Values:
    """The exact derivative of the objective with respect to each output site."""
    return errors_at(sites, sites.tail, records)


def products(sites: Sites, out: Pass) -> list[Array]:
    """For each source its tangents times its error: the objective's slopes before they are summed.

    Shapes are [k, *source], with examples [k, examples, *source].
    """
    assert sites.sources is not None
    errors = errors_at(sites, sites.sources, out.records)
    pairs = zip(sites.sources.starts, out.tangents, strict=True)
    return [_product(errors[v], tangents) for v, tangents in pairs]


def _product(error: Array, tangent: Array) -> Array:
    """Re(error · tangent) in at least float32; the error counts for each of k tangents."""
    wide = _tree.accumulation_dtype(_tree.promoted(error.dtype, tangent.dtype))
    return jnp.real(error.astype(wide)[None] * tangent.astype(wide))


def errors_at(sites: Sites, tail: Tail, records: Values) -> Values:
    """The derivative of the objective with respect to where a tail starts."""
    if not tail.starts:
        return {}
    used = {v: records[v] for v in tail.records}
    shifts = {v: zeros(sites, v) for v in tail.starts}

    def objective_of_one(shifts: Values, used: Values) -> Array:
        total = jnp.zeros(())
        for loss in tail.run(shifts, used):
            total += _sum(loss)
        return total

    def objective(shifts: Values) -> Array:
        if sites.num_examples is None:
            return objective_of_one(shifts, used)
        shift_axes = {v: sites.axis_of(v) for v in shifts}
        used_axes = {v: sites.axis_of(v) for v in used}
        of_each = jax.vmap(
            objective_of_one, (shift_axes, used_axes), axis_size=sites.num_examples
        )
        return jnp.mean(of_each(shifts, used))

    return jax.grad(objective)(shifts)


def zeros(sites: Sites, variable: Variable) -> Array:
    """An error of zero at a variable of the top level."""
    aval = sites.traced.types[variable]
    lead = () if sites.axis_of(variable) is None else (sites.num_examples,)
    value = jnp.zeros((*lead, *aval.shape), aval.dtype)  # type: ignore[arg-type]
    return _mesh.vary(value, _mesh.type_axes(aval))


def assemble(
    sites: Sites,
    records: Values,
    errors: Mapping[Variable, Array],
) -> Tree:
    """The gradient from errors at sites: each region's own reverse pass, none across two.

    Sites without an error add nothing.
    """
    with_error = [site for site in sites.places if site.variable in errors]

    def values(params: Tree) -> Values:
        outputs = regions(sites, params, records)
        return {site.variable: outputs[site.variable] for site in with_error}

    _, pull = jax.vjp(values, sites.problem.params)
    cotangents: Values = {}
    for site in with_error:
        error = errors[site.variable]
        cotangents[site.variable] = error.astype(site.dtype)
    (gradient,) = pull(cotangents)
    return gradient


def regions(
    sites: Sites,
    params: Tree,
    records: Values,
    apply: Callable[[Equation, list[Any]], list[Any]] = bind,
) -> Values:
    """The sites' values from parameters and records."""
    leaves = jax.tree.leaves(params)
    given = dict(zip(sites.traced.parameters, leaves, strict=True))

    def one(records: Values) -> Values:
        return local(sites.level, {**given, **records}, apply)

    used = {v: records[v] for v in sites.level.all_records()}
    if sites.num_examples is None:
        return one(used)
    used_axes = {v: sites.axis_of(v) for v in used}
    outputs = [site.variable for site in sites.places]
    output_axes = {v: sites.axis_of(v) for v in outputs}
    of_each = jax.vmap(
        one,
        in_axes=(used_axes,),
        out_axes=output_axes,
        axis_size=sites.num_examples,
    )
    return of_each(used)


def value(sites: Sites, losses: Sequence[Array]) -> Array:
    """The objective of the losses: their sum, and the mean over the examples."""
    if sites.num_examples is None:
        sums = [jnp.sum(x) for x in losses]
    else:
        sums = [jnp.sum(x.reshape(x.shape[0], -1), 1) for x in losses]
    return _mesh.total(jnp.mean(sum(sums[1:], start=sums[0])), sites.summed)


def _sum(x: Array) -> Array:
    return jnp.sum(x.astype(_tree.accumulation_dtype(x.dtype)))
