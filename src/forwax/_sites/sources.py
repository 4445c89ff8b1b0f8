"""Which parts of the loss each site must hear of: the tangent program, and the credit in it."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _mesh
from forwax._programs.axes import back
from forwax._programs.axis_rules import Crossing
from forwax._programs.dataflow import mapped_variables
from forwax._programs.links import along
from forwax._programs.program import (
    Equation,
    Traced,
    Variable,
    is_inexact,
    variables,
)
from forwax._programs.tracing import trace
from forwax._sites.credit import Credit, credits_of
from forwax._sites.kinds import Kind
from forwax._sites.model import Site, Sites
from forwax._sites.outputs import (
    Tail,
    blocked_variables,
    is_crossed,
    is_sum,
    output_regions,
    site_barrier,
    tail_from,
)
from forwax._sites.passes.keep import forward
from forwax._sites.regions import Region
from forwax._tree import Tree


def with_credit(sites: Sites, sources: Tail) -> Sites:
    """The sites with their credit, if slopes of sources can be told apart."""
    noisy = sites.noisy
    has_parts = len(sources.starts) > sites.num_losses
    if not noisy or not (has_parts or any(_may_gain(sites, v) for v in sources.starts)):
        return sites
    traced = tangent_program(sites, sources.starts)
    noises = traced.data[-len(noisy) :]
    shapes = [tuple(sites.traced.types[v].shape) for v in sources.starts]
    credit = credits_of(traced, noises, shapes)

    # If every site hears the same sources, each with one slope, nothing is told apart.
    heard = {c.source for site_credit in credit for c in site_credit}
    hears_less = any(len(site_credit) < len(heard) for site_credit in credit)
    has_links = any(c.links for site_credit in credit for c in site_credit)
    if not hears_less and not has_links:
        return sites
    return dataclasses.replace(
        sites,
        sources=sources,
        credit={site.variable: c for site, c in zip(noisy, credit, strict=True)},
    )


def _may_gain(sites: Sites, source: Variable) -> bool:
    """Whether an axis of a source can be followed at least through the site that it comes from.

    This is quick, and spares most losses the tangent program.
    """
    types = sites.traced.types
    shape = tuple(types[source].shape)
    links = [along(axis, length) for axis, length in enumerate(shape) if length > 1]
    layer = _layer_of(sites, source)
    if layer is None:
        return len(links) > 0
    shapes = [tuple(types[v].shape) for v in layer.variables]
    for position, variable in enumerate(layer.variables):
        if sites.kinds[variable] is not Kind.MIXED:
            continue
        at = Crossing(layer.params, position, 0, shapes, [shape])
        if not all(back(layer, at, link).is_open for link in links):
            return True
    return False


def _layer_of(sites: Sites, source: Variable) -> Equation | None:
    """The dot or convolution, nothing behind it, that gives a source; None if it is another."""
    for site in sites.places:
        if site.variable == source:
            equation, *more = site.region.equations
            if equation.facts.bilinear and not more:
                return equation
    return None


def tangent_program(sites: Sites, sources: Sequence[Variable]) -> Traced:
    """The program of one example from noises, its last inputs, to the tangents of sources."""
    problem = sites.problem
    time = jnp.zeros((), jnp.float32)

    def tangents(
        params: Tree,
        mapped: Sequence[Array],
        noises: Sequence[Array],
    ) -> list[Array]:
        noise_at = {
            site.variable: noise
            for site, noise in zip(sites.noisy, noises, strict=True)
        }
        inputs = sites.traced.arguments(params, mapped)

        def values(time: Array) -> list[Array]:
            outputs, _ = forward(
                sites.level,
                inputs,
                noise_at,
                time,
                frozenset(),
                sources,
            )
            return outputs[len(outputs) - len(sources) :]

        # `time` scales the noise: the derivative by it is linear in the noises.
        _, source_tangents = jax.jvp(values, (time,), (time + 1,))
        return source_tangents

    noises = [_mesh.like(site.shape, site.dtype, site.axes) for site in sites.noisy]
    return trace(tangents, problem.params, problem.example_specs(), noises)


def make_sources(sites: Sites, exact: bool) -> Tail:
    """The tail behind a cut that every noise's way to the losses crosses once.

    Its starts are the sources of credit: the output sites and the values that reach the losses past
    them, as far as they are noisy; or, unless exact, what the losses are sums of, for then reverse
    mode over the loss is not wanted.
    """
    level = sites.level
    kinds = sites.kinds
    reach = sites.reach
    stopped_by_sites = site_barrier(sites.products)

    def stopped(equation: Equation) -> Sequence[Variable]:
        if exact:
            return stopped_by_sites(equation)
        return () if is_sum(equation, kinds) else equation.variables

    equations = [e for e in level.program.equations if is_crossed(e, reach)]
    blocked = blocked_variables(level.program, reach, stopped)
    noisy = _noisy_variables(sites)

    def is_end(region: Region) -> bool:
        """Whether the cut lies behind an output site; a bias behind the cut lies inside."""
        return not blocked.isdisjoint(region.inputs) or noisy.isdisjoint(region.inputs)

    # Exact errors may not cross a site, so its own output is where it is heard.
    ends = [region for region in output_regions(level, sites.tail) if is_end(region)]
    in_ends = {equation for region in ends for equation in region.equations}

    def is_inside(equation: Equation) -> bool:
        if equation in in_ends or stopped(equation):
            return False
        mixed = [v for v in equation.outputs if kinds[v] is Kind.MIXED]
        return len(mixed) > 0 and blocked.isdisjoint(mixed)

    losses = level.program.outputs[: sites.num_losses]
    inside = [equation for equation in equations if is_inside(equation)]
    computed = {v for equation in inside for v in equation.outputs}
    cut = [v for region in ends for v in region.outputs]
    cut += [v for equation in inside for v in equation.variables]
    cut += variables(losses)
    # What is computed inside brings noise that crossed the cut before: it would count twice.
    starts = [v for v in dict.fromkeys(cut) if v in noisy and v not in computed]
    return tail_from(
        level.program,
        tuple(starts),
        is_inside,
        reach,
        sites.num_losses,
    )


def _noisy_variables(sites: Sites) -> set[Variable]:
    """What noise changes: not comparisons, which pass none on."""
    starts = [site.variable for site in sites.noisy]
    reached = mapped_variables(sites.level.program, starts)
    types = sites.traced.types
    return {v for v in reached if is_inexact(types[v])}


def with_slopes_of_loops(sites: Sites) -> Sites:
    """The same sites, but each step of a loop shares its slopes with the others."""

    def coarser(site: Site, credit: Credit) -> Credit:
        first = sites.num_loops(site)  # the axes before are those of loops
        links = [
            (a, link)
            for a, link in credit.links
            if link.axis is None or link.axis >= first
        ]
        return dataclasses.replace(credit, links=tuple(links))

    credit: dict[Variable, list[Credit]] = {}
    if sites.credit:
        for site in sites.noisy:
            fine = sites.credit.get(site.variable, ())
            credit[site.variable] = [coarser(site, c) for c in fine]
    return dataclasses.replace(sites, credit=credit)


def of_a_step(sites: Sites, site: Site, slopes: Array) -> Array:
    """Slopes without the axes of loops, along which they are the same."""
    if not sites.credit:
        return slopes
    first = slopes.ndim - len(site.shape)
    # [k, examples, *loops, *own axes]: the loops' axes have length 1
    loops = range(first, first + sites.num_loops(site))
    return jnp.squeeze(slopes, tuple(loops))


def shared_noise(
    sites: Sites, site: Site, other: Site, own_slopes: bool = True
) -> float:
    """How many coordinates of another site's noise one slope of this site hears, on average.

    Unless examples have slopes of their own and the site a value of its own for each, it hears
    all examples'.
    """
    size = other.size
    hears_one_example = own_slopes and site.mapped
    if other.mapped and sites.num_examples is not None and not hears_one_example:
        size *= sites.num_examples
    if not sites.credit:  # one slope of each loss
        return size if other.reach & site.reach else 0
    credit_of_other = {credit.source: credit for credit in sites.credit[other.variable]}
    most: float = 0
    for credit in sites.credit[site.variable]:
        if credit.source in credit_of_other:
            share = credit.overlap(credit_of_other[credit.source])
            most = max(most, size * share)
    return most
