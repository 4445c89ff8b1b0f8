"""A pass that keeps what the assembly needs: the loss, its slopes, errors, and gradients from them.

`forward` evaluates everything, lets noise in and records; `local` evaluates parameter chains and
regions alone, from those records, so that a reverse pass over it never crosses two sites.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax import _mesh, _tree
from forwax._programs.evaluate import Values, bind, evaluate, inject, read
from forwax._programs.program import Equation, Variable
from forwax._sites.levels import Level, LoopPlan
from forwax._sites.model import Pass, Sites
from forwax._sites.outputs import Tail
from forwax._sites.regions import Region
from forwax._tree import Tree


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
        plan = level.loop_of(equation)
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
    env.update({outer: read(atom, env) for outer, atom in plan.unchanged.items()})
    return outputs


def push(sites: Sites, noise: Sequence[Array] = (), num_tangents: int = 1) -> Pass:
    """Evaluate the loss, and its slopes along k noises [k, *spec]; with no noise there are no slopes."""
    table = dict(zip([site.variable for site in sites.noisy], noise, strict=False))
    if not table:
        (losses, *_), (aux, records) = _run(sites, {}, None)
        return Pass(losses, aux, [], [], records)
    return push_along(functools.partial(_run, sites), table, num_tangents)


def _run(sites: Sites, noise: Values, time: Array | None) -> tuple[Any, Any]:
    """`((losses, sums of losses, sources), (aux, records))`; each with a leading axis of examples."""
    taps = sites.sources.starts if sites.sources is not None else ()
    extra = sites.tail_records

    def one(mapped: Sequence[Array], noise: Values) -> tuple[Any, Any, Values]:
        inputs = [*sites.traced.closed, *jax.tree.leaves(sites.problem.params), *mapped]
        outputs, records = forward(sites.level, inputs, noise, time, extra, taps)
        cut = len(outputs) - len(taps)
        losses, aux = jax.tree.unflatten(sites.traced.out_tree, outputs[:cut])
        return (losses, list(map(_sum, losses)), outputs[cut:]), aux, records

    if sites.num_examples is None:
        out, aux, records = one((), noise)
        return out, (aux, records)
    axes = {v: sites.axis_of(v) for v in sites.level.all_records() | extra}
    in_axes = (list(sites.problem.mapped_axes), {v: sites.axis_of(v) for v in noise})
    out_axes = ((0, 0, [sites.axis_of(v) for v in taps]), 0, axes)
    out, aux, records = jax.vmap(one, in_axes, out_axes, axis_size=sites.num_examples)(
        list(sites.problem.mapped), noise
    )
    return out, (aux, records)


def push_along(run: Callable[[Any, Array], tuple[Any, Any]], noise: Any, num_tangents: int) -> Pass:
    """Evaluate the loss and its slopes along k noises.

    Args:
        run: takes one noise and the time, of which the tangent scales it, to `((losses, sums of
            losses, sources), (aux, records))`.
        noise: a tree with a leading axis k.
        num_tangents: the number k.
    """
    time = jnp.zeros((), jnp.float32)

    def slopes(noise: Any) -> tuple[list[Array], list[Array], list[Array], Any]:
        primal, tangent, rest = jax.jvp(lambda t: run(noise, t), (time,), (time + 1,), has_aux=True)
        return primal[0], tangent[1], tangent[2], rest

    if num_tangents == 1:
        losses, sums, taps, rest = slopes(jax.tree.map(lambda x: x[0], noise))
        sums, taps = [x[None] for x in sums], [x[None] for x in taps]
    else:
        losses, sums, taps, rest = jax.vmap(slopes, out_axes=(None, 0, 0, None))(noise)
    return Pass(losses, rest[0], sums, taps, rest[1])


def output_errors(sites: Sites, records: Values) -> Values:
    """The exact derivative of the objective with respect to each output site."""
    return _errors(sites, sites.tail, records)


def products(sites: Sites, out: Pass) -> list[Array]:
    """For each source its tangents times its error: slopes of the objective before they are summed."""
    assert sites.sources is not None
    errors = _errors(sites, sites.sources, out.records)
    return [_product(errors[v], x) for v, x in zip(sites.sources.starts, out.tangents, strict=True)]


def _product(error: Array, tangent: Array) -> Array:
    """Re(error · tangent) in at least float32; the error counts for each of k tangents."""
    wide = _tree.accumulation_dtype(jnp.promote_types(error.dtype, tangent.dtype))
    return jnp.real(error.astype(wide)[None] * tangent.astype(wide))


def _errors(sites: Sites, tail: Tail, records: Values) -> Values:
    """The derivative of the objective with respect to where a tail starts."""
    if not tail.starts:
        return {}
    used = {v: records[v] for v in tail.records}
    axes = {v: sites.axis_of(v) for v in used}
    shifts = {v: zeros(sites, v) for v in tail.starts}

    def objective(shifts: Values) -> Array:
        def one(shifts: Values, used: Values) -> Array:
            losses = tail.run(shifts, used)
            return sum(map(_sum, losses), start=jnp.zeros(()))

        if sites.num_examples is None:
            return one(shifts, used)
        each = jax.vmap(
            one, ({v: sites.axis_of(v) for v in shifts}, axes), axis_size=sites.num_examples
        )
        return jnp.mean(each(shifts, used))

    return jax.grad(objective)(shifts)


def zeros(sites: Sites, variable: Variable) -> Array:
    """An error of zero at a variable of the top level."""
    aval = sites.traced.types[variable]
    lead = (sites.num_examples,) if sites.axis_of(variable) == 0 else ()
    return _mesh.vary(jnp.zeros((*lead, *aval.shape), aval.dtype), _mesh.type_axes(aval))  # type: ignore[arg-type]


def assemble(sites: Sites, records: Values, errors: Mapping[Variable, Array]) -> Tree:
    """The gradient from the objective's error at sites: each region's own reverse pass, none across two.

    Sites without an error add nothing.
    """
    mine = [site for site in sites.places if site.variable in errors]

    def values(params: Tree) -> Values:
        outputs = regions(sites, params, records)
        return {site.variable: outputs[site.variable] for site in mine}

    _, pull = jax.vjp(values, sites.problem.params)
    return pull({site.variable: errors[site.variable].astype(site.dtype) for site in mine})[0]


def regions(
    sites: Sites,
    params: Tree,
    records: Values,
    apply: Callable[[Equation, list[Any]], list[Any]] = bind,
) -> Values:
    """The sites' values from parameters and records."""
    start = len(sites.traced.closed)
    leaves = jax.tree.leaves(params)
    names = sites.level.program.inputs[start : start + len(leaves)]

    def one(records: Values) -> Values:
        return local(sites.level, {**dict(zip(names, leaves, strict=True)), **records}, apply)

    used = {v: records[v] for v in sites.level.all_records()}
    if sites.num_examples is None:
        return one(used)
    outs = {site.variable: sites.axis_of(site.variable) for site in sites.places}
    axes = {v: sites.axis_of(v) for v in used}
    return jax.vmap(one, (axes,), outs, axis_size=sites.num_examples)(used)


def value(sites: Sites, losses: Sequence[Array]) -> Array:
    """The objective of the losses: their sum, and the mean over the examples."""
    sums = [
        jnp.sum(x) if sites.num_examples is None else jnp.sum(x.reshape(x.shape[0], -1), 1)
        for x in losses
    ]
    return jnp.mean(sum(sums[1:], start=sums[0]))


def _sum(x: Array) -> Array:
    return jnp.sum(x.astype(_tree.accumulation_dtype(x.dtype)))
