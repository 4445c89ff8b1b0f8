"""Which parts of the loss each site must hear of: the tangent program, and the credit found in it."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _mesh
from forwax._tree import Tree
from forwax.sites.axes import Factor, back
from forwax.sites.classify import Kind
from forwax.sites.credit import credits_of
from forwax.sites.operations import BILINEAR
from forwax.sites.program import Constant, Traced, Variable, trace
from forwax.sites.run import forward
from forwax.sites.sites import Sites
from forwax.sites.tail import Tail


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
    if more or equation.name not in BILINEAR:
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
