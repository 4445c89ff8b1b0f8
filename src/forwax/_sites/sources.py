"""Which parts of the loss each site must hear of: the tangent program, and the credit found in it."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _mesh
from forwax._programs.axes import Factor, back
from forwax._programs.dataflow import Reach
from forwax._programs.program import Constant, Equation, Traced, Variable, variables
from forwax._programs.tracing import trace
from forwax._sites.credit import Credit, credits_of
from forwax._sites.kinds import Kind
from forwax._sites.levels import Kinds, Level
from forwax._sites.model import Site, Sites
from forwax._sites.outputs import (
    Tail,
    blocked_variables,
    is_crossed,
    is_site_barrier,
    is_sum,
    output_regions,
    tail_from,
)
from forwax._sites.passes.keep import forward
from forwax._tree import Tree


def with_credit(sites: Sites, sources: Tail) -> Sites:
    """The sites with their credit, if slopes of sources can be told apart."""
    noisy = sites.noisy
    many = len(sources.starts) > sites.num_losses
    if not noisy or not (many or any(_may_gain(sites, v) for v in sources.starts)):
        return sites
    traced = tangent_program(sites, sources.starts)
    noises = traced.program.inputs[len(traced.program.inputs) - len(noisy) :]
    found = credits_of(traced, noises, [tuple(sites.traced.types[v].shape) for v in sources.starts])
    heard = {credit.source for own in found for credit in own}
    if not any(len(own) < len(heard) or any(credit.links for credit in own) for own in found):
        return sites
    table = {site.variable: own for site, own in zip(noisy, found, strict=True)}
    return dataclasses.replace(sites, sources=sources, credit=table)


def _may_gain(sites: Sites, source: Variable) -> bool:
    """Whether an axis of a source can be followed at least through the site that it comes from."""
    shape = tuple(sites.traced.types[source].shape)
    links = [Factor(axis, 1, length) for axis, length in enumerate(shape) if length > 1]
    region = next((s.region for s in sites.places if s.variable == source), None)
    if region is None:
        return bool(links)
    equation, *more = region.equations
    if more or not equation.facts.bilinear:
        return bool(links)
    shapes = [
        tuple(sites.traced.types[v].shape) for v in equation.inputs if not isinstance(v, Constant)
    ]
    mixed = [i for i, v in enumerate(equation.variables) if sites.kinds[v] is Kind.MIXED]
    return any(
        back(equation, i, 0, link, shapes, [shape]) is not None for i in mixed for link in links
    )


def tangent_program(sites: Sites, sources: Sequence[Variable]) -> Traced:
    """The program of one example whose last inputs are the noises, and whose outputs are the tangents of sources."""
    problem, time = sites.problem, jnp.zeros((), jnp.float32)

    def tangents(params: Tree, mapped: Sequence[Array], noises: Sequence[Array]) -> list[Array]:
        table = {site.variable: noise for site, noise in zip(sites.noisy, noises, strict=True)}
        inputs = [*sites.traced.closed, *jax.tree.leaves(params), *mapped]

        def values(time: Array) -> list[Array]:
            outputs, _ = forward(sites.level, inputs, table, time, frozenset(), sources)
            return outputs[len(outputs) - len(sources) :]

        return jax.jvp(values, (time,), (time + 1,))[1]

    noises = [_mesh.like(site.shape, site.dtype, site.axes) for site in sites.noisy]
    return trace(tangents, problem.params, problem.example_specs(), noises)


def make_sources(
    level: Level,
    kinds: Kinds,
    reach: Reach,
    num_losses: int,
    noisy: set[Variable],
    tail: Tail,
    exact: bool,
) -> Tail:
    """The tail behind a cut that every noise's way to the losses crosses once; its starts are the sources of credit.

    They are the output sites and the values that reach the losses past them, as far as they are
    noisy; or, if reverse mode over the loss is not wanted, what the losses are sums of.
    """
    program = level.program
    barrier = (
        is_site_barrier(level, kinds) if exact else lambda equation: not is_sum(equation, kinds)
    )
    blocked = blocked_variables(program, reach, barrier)
    ends = [
        r
        for r in output_regions(level, tail)
        if not blocked.isdisjoint(r.inputs) or noisy.isdisjoint(r.inputs)
    ]
    outside = {id(equation) for region in ends for equation in region.equations}

    def inside(equation: Equation) -> bool:
        mixed = [v for v in equation.outputs if kinds[v] is Kind.MIXED]
        return (
            bool(mixed)
            and blocked.isdisjoint(mixed)
            and id(equation) not in outside
            and not barrier(equation)
        )

    computed = {
        v for e in program.equations if is_crossed(e, reach) and inside(e) for v in e.outputs
    }
    read = [v for e in program.equations if is_crossed(e, reach) and inside(e) for v in e.variables]
    last = [v for region in ends for v in region.outputs]
    cut = dict.fromkeys([*last, *read, *variables(program.outputs[:num_losses])])
    starts = tuple(v for v in cut if v in noisy and v not in computed)
    return tail_from(program, starts, inside, reach, num_losses)


def with_slopes_of_loops(sites: Sites) -> Sites:
    """The same sites, but each step of a loop shares its slopes with the others."""

    def coarser(site: Site, credit: Credit) -> Credit:
        first = sites.num_loops(site)
        links = tuple((a, link) for a, link in credit.links if link.size == 1 or link.axis >= first)
        return dataclasses.replace(credit, links=links)

    credit = {
        s.variable: [coarser(s, c) for c in sites.credit.get(s.variable, ())] for s in sites.noisy
    }
    return dataclasses.replace(sites, credit=credit if sites.credit else {})


def of_a_step(sites: Sites, site: Site, slopes: Array) -> Array:
    """Slopes without the axes of loops, along which they are the same."""
    lead = slopes.ndim - len(site.shape)
    return (
        jnp.squeeze(slopes, tuple(range(lead, lead + sites.num_loops(site))))
        if sites.credit
        else slopes
    )


def shared_noise(sites: Sites, site: Site, other: Site, own_slopes: bool = True) -> float:
    """How many coordinates of another site's noise one slope of this site hears, on average.

    Unless examples have slopes of their own and the site a value of its own for each, it hears
    all examples'.
    """
    examples = (
        1 if sites.num_examples is None or (own_slopes and site.mapped) else sites.num_examples
    )
    size = other.size * (examples if other.mapped else 1)
    if not sites.credit:
        return size if other.reach & site.reach else 0
    theirs = {credit.source: credit for credit in sites.credit[other.variable]}
    heard = [
        (mine, theirs[mine.source]) for mine in sites.credit[site.variable] if mine.source in theirs
    ]
    return max((size / mine.common(their) for mine, their in heard), default=0)
