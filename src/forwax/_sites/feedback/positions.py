"""Which axes an inlet has in common with the outlets, and which products mix positions."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from forwax import _mesh, _pushforward
from forwax._programs.axes import back
from forwax._programs.axis_rules import Crossing, join_all
from forwax._programs.links import Shape, along
from forwax._programs.program import Atom, Constant, Equation, Traced, Variable
from forwax._programs.tracing import trace
from forwax._sites.credit import Credit, credits_of
from forwax._sites.feedback.crossing import forward
from forwax._sites.feedback.inlets import Inlet, Routes, lengths_around
from forwax._sites.feedback.mirrors import find_mirrors
from forwax._sites.kinds import Kind
from forwax._sites.levels import Level
from forwax._sites.model import Sites
from forwax._tree import Tree


def with_positions(routes: Routes) -> Routes:
    """The routes, each inlet with the outlets that it reaches and the axes in common with them."""
    traced = _tangent_program(routes)
    noises = traced.data[-len(routes.inlets) :]
    shapes = [outlet.shape for outlet in routes.outlets]
    credit = credits_of(traced, noises, shapes, any_way=True)
    pairs = zip(routes.inlets, credit, strict=True)
    linked = tuple(_linked(routes, inlet, heard) for inlet, heard in pairs)
    return dataclasses.replace(routes, inlets=linked)


def _tangent_program(routes: Routes) -> Traced:
    """The program of one example from noises at inlets, its last inputs, to outlets' tangents."""
    sites = routes.sites
    way = dataclasses.replace(routes.way_back(), is_traced=True)

    def tangents(
        params: Tree, mapped: Sequence[Array], noises: Sequence[Array]
    ) -> list[Array]:
        inputs = sites.traced.arguments(params, mapped)
        noise = dict(enumerate(noises))

        def values(time: Array) -> tuple[list[Array], None]:
            env, _ = forward(sites.level, inputs, way, noise, time)
            return [env[outlet.variable] for outlet in routes.outlets], None

        return _pushforward.along(values)[1]

    noises = [_mesh.like(i.shape, i.dtype, i.axes) for i in routes.inlets]
    problem = sites.problem
    return trace(tangents, problem.params, problem.example_specs(), noises)


def _linked(
    routes: Routes,
    inlet: Inlet,
    credit: Sequence[Credit],
) -> Inlet:
    """An inlet with the outlets that it hears, and the axes that it shares with all of them."""
    # Of outlets that it changes, those whose losses it reaches: others are cut by stop_gradient.
    reach = 0
    for equation in inlet.products:
        for v in equation.outputs:
            reach |= routes.sites.reach[v]
    by_source = {c.source: c for c in credit if routes.outlets[c.source].reach & reach}
    if not by_source:
        return inlet
    # [outlets] of {axis of the inlet: axis of the outlet}
    shared: list[dict[int, int]] = []
    for heard in by_source.values():
        axes: dict[int, int] = {}
        for axis, link in heard.links:
            if link.axis is not None and link.is_kept:
                axes[link.axis] = axis
        shared.append(axes)
    own = set.intersection(*map(set, shared)) - _axes_of_weights(routes.sites, inlet)
    common = tuple((axis, tuple(axes[axis] for axes in shared)) for axis in sorted(own))
    return dataclasses.replace(inlet, heard=tuple(by_source), common=common)


def mixing_products(routes: Routes, able: Sequence[Equation]) -> list[Equation]:
    """The products whose value reaches other positions before the next product.

    Positions are those along an axis that the product's inlet has in common with the outlets, and
    the steps of loops in which the product has the same weight.
    """
    sites = routes.sites
    lengths = lengths_around(sites.level)
    values = [e.outputs[0] for e in able]
    shapes = [
        (*lengths[e], *sites.traced.types[v].shape)
        for e, v in zip(able, values, strict=True)
    ]
    traced = _program_to_next(routes, values, shapes)
    noises = traced.data[-len(able) :]
    ends = [i.shape for i in routes.inlets] + [o.shape for o in routes.outlets]
    credit = credits_of(traced, noises, ends)
    has_positions = any(inlet.common for inlet in routes.inlets)
    mixing: list[Equation] = []
    for equation, heard in zip(able, credit, strict=True):
        (number,) = routes.numbers[equation].values()
        inlet = routes.inlets[number]
        followed = {
            (outlet, axes[place])
            for _, axes in inlet.common
            for place, outlet in enumerate(inlet.heard)
        }
        (mirror,) = find_mirrors(sites, [equation])
        # A loop in which the weight stays the same is one over time.
        loops = [d for d, varies in enumerate(mirror.varies) if not varies]
        # A product along positions has lost them itself, as one of a mixer's tokens.
        joins = has_positions and not inlet.common
        if joins or any(_mixes(routes, c, followed, loops) for c in heard):
            mixing.append(equation)
    return mixing


def _mixes(
    routes: Routes,
    credit: Credit,
    followed: set[tuple[int, int]],
    loops: Sequence[int],
) -> bool:
    """Whether what a product's value changes of an end lies at other positions too."""
    apart = {axis for axis, link in credit.links if link.is_kept}
    first_outlet = len(routes.inlets)
    if credit.source >= first_outlet:
        outlet = credit.source - first_outlet
        return any(number == outlet and axis not in apart for number, axis in followed)
    end = routes.inlets[credit.source]
    for axis, of_outlets in end.common:
        tied = set(zip(end.heard, of_outlets, strict=True))
        if axis not in apart and not followed.isdisjoint(tied):
            return True
    # The end lies in the same loop if it has its axis: then each step is to change its own.
    own_loops = lengths_around(routes.sites.level)[end.products[0]]
    return any(axis < len(own_loops) and axis not in apart for axis in loops)


def _program_to_next(
    routes: Routes, values: Sequence[Variable], shapes: Sequence[Shape]
) -> Traced:
    """The program of one example from noises at products' values to tangents at the next ends.

    Tangents end at inlets, so that those of an inlet come from the products before it alone.
    """
    sites = routes.sites
    types = sites.traced.types
    way = dataclasses.replace(routes.way_back(), is_traced=True)

    def tangents(
        params: Tree, mapped: Sequence[Array], noises: Sequence[Array]
    ) -> list[Array]:
        inputs = sites.traced.arguments(params, mapped)
        noise = dict(zip(values, noises, strict=True))

        def ends(time: Array) -> tuple[list[Array], None]:
            env, taps = forward(sites.level, inputs, way, behind=noise, time=time)
            inlets = [taps[number] for number in range(len(routes.inlets))]
            return [*inlets, *(env[o.variable] for o in routes.outlets)], None

        return _pushforward.along(ends)[1]

    noises = [
        _mesh.like(shape, types[v].dtype, _mesh.type_axes(types[v]))
        for v, shape in zip(values, shapes, strict=True)
    ]
    problem = sites.problem
    return trace(tangents, problem.params, problem.example_specs(), noises)


def _axes_of_weights(sites: Sites, inlet: Inlet) -> set[int]:
    """The inlet's axes along which a weight differs: a gain's own are no positions."""
    makers = makers_of(sites.level)
    types = sites.traced.types
    num_loops = len(inlet.shape) - len(types[inlet.variable].shape)
    found: set[int] = set()
    for product in inlet.products:
        out = product.outputs[0]
        for axis in range(len(_shape(out, types))):
            axes = _axes_behind(product, out, axis, types)
            operands = zip(product.inputs, axes, strict=True)
            if not any(_varies(atom, own, makers, sites) for atom, own in operands):
                continue
            for atom, own in zip(product.inputs, axes, strict=True):
                if atom == inlet.variable and own is not None:
                    found.add(num_loops + own)
    return found


def _axes_behind(
    equation: Equation, out: Variable, axis: int, types: Sequence[Any]
) -> list[int | None]:
    """For each operand of an equation its axis that a result's axis follows, if there is one."""
    shapes = [_shape(atom, types) for atom in equation.inputs]
    outs = [_shape(v, types) for v in equation.outputs]
    output = equation.outputs.index(out)
    link = along(axis, outs[output][axis])
    axes: list[int | None] = []
    for place in range(len(shapes)):
        at = Crossing(equation.params, place, output, shapes, outs)
        axes.append(back(equation, at, link).axis)
    return axes


def _varies(
    atom: Atom,
    axis: int | None,
    makers: Mapping[Variable, Equation],
    sites: Sites,
) -> bool:
    """Whether a parameter, or what is made of it, has an axis, and not by repetition."""
    if axis is None or isinstance(atom, Constant):
        return False
    if sites.kinds[atom] is not Kind.PARAMETER:
        return False
    if atom not in makers:
        return _shape(atom, sites.traced.types)[axis] > 1
    equation = makers[atom]
    axes = _axes_behind(equation, atom, axis, sites.traced.types)
    for operand, own in zip(equation.inputs, axes, strict=True):
        if _varies(operand, own, makers, sites):
            return True
    # What an operation without a rule makes may differ along all axes.
    return equation.facts.credit is join_all


def makers_of(level: Level) -> dict[Variable, Equation]:
    """The operation that makes each variable, in a level and the loops inside it."""
    makers: dict[Variable, Equation] = {}
    for equation in level.program.equations:
        if level.loop_of(equation) is None and equation.primitive is not None:
            makers.update(dict.fromkeys(equation.outputs, equation))
    for plan in level.loops.values():
        makers |= makers_of(plan.level)
    return makers


def _shape(atom: Atom, types: Sequence[Any]) -> Shape:
    if isinstance(atom, Constant):
        return tuple(jnp.shape(atom.value))
    return tuple(types[atom].shape)
