"""Where learned errors are handed back: the data that products with parameters take.

An *inlet* is the data input of one product or of several that share it; an *outlet* is where the
exact error of the last products is taken. Reverse mode is cut at every inlet, and a map from the
outlets' errors brings the inlet's error in its place.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from forwax import _mesh, _tree
from forwax._programs.axes import back
from forwax._programs.axis_rules import join_all
from forwax._programs.links import Factor, Link, Shape
from forwax._programs.program import (
    Atom,
    Constant,
    Equation,
    Program,
    Traced,
    Variable,
)
from forwax._programs.tracing import new_variable, renamed_inputs, trace
from forwax._pushforward import along
from forwax._signature import Problem
from forwax._sites.credit import Credit, credits_of
from forwax._sites.feedback.crossing import Crossing, Mirror, forward
from forwax._sites.feedback.mirrors import find_mirrors, may_have_mirror
from forwax._sites.find import find_sites
from forwax._sites.kinds import Kind
from forwax._sites.levels import Level
from forwax._sites.model import Site, Sites
from forwax._sites.outputs import Tail, is_crossed, tail_from, with_weight_noise
from forwax._tree import Spec, Tree

Numbers = Mapping[Equation, Mapping[Variable, int]]
"""For each product the inlets that it takes, by the variable that it reads."""


@dataclasses.dataclass(frozen=True, eq=False)
class Outlet:
    """Where the exact error is taken: the value of a last site, or its data input.

    Attributes:
        variable: the value.
        start: the variable of the tail that stands for it.
        shape: of one example.
        dtype: of the value.
        reach: the losses that it reaches, as a bit mask.
    """

    variable: Variable
    start: Variable
    shape: tuple[int, ...]
    dtype: Any
    reach: int


@dataclasses.dataclass(frozen=True, eq=False)
class Inlet:
    """What a product takes, or several products.

    Attributes:
        variable: the value.
        products: the operations that read it.
        shape: of one example, with a leading axis for each loop around it.
        dtype: of the value.
        mapped: whether each example has a value of its own.
        axes: the mesh axes over which it varies.
        heard: the numbers of the outlets that it reaches.
        common: the axes that it has in common with all of these: its own axis, and that of each
            outlet. One map serves all positions along them.
    """

    variable: Variable
    products: tuple[Equation, ...]
    shape: tuple[int, ...]
    dtype: Any
    mapped: bool
    axes: _mesh.Axes
    heard: tuple[int, ...] = ()
    common: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @property
    def spec(self) -> Spec:
        """Shape and dtype of one example's value."""
        return Spec(self.shape, self.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A problem's sites with the ways of its errors.

    Attributes:
        sites: the problem's sites; the last ones are exact.
        inlets: in the program's order.
        outlets: in the program's order.
        tail: from the outlets to the losses.
        numbers: the inlets of each product that is cut.
        mirrors: the weights that the other products' errors cross through their twins.
        chained: these products.
    """

    sites: Sites
    inlets: tuple[Inlet, ...]
    outlets: tuple[Outlet, ...]
    tail: Tail
    numbers: Numbers
    mirrors: tuple[Mirror, ...] = ()
    chained: frozenset[Equation] = frozenset()

    def crossing(self, mirrors: Sequence[Array] = ()) -> Crossing:
        """How the reverse pass goes: cut at all inlets, through the mirrors elsewhere."""
        variables = [mirror.variable for mirror in self.mirrors]
        twins = dict(zip(variables, mirrors, strict=bool(mirrors)))
        return Crossing(
            self.sites.kinds,
            self.numbers,
            self.chained.__contains__,
            twins,
            self.mirrors,
        )


def find_plan(problem: Problem, name: str, chain: str = "none") -> Plan:
    """The inlets and outlets of a problem.

    Args:
        problem: the parameters, the loss and the examples.
        name: the rule's name, for errors.
        chain: which products hand errors on through a mirror: "none", "positions" or "all".

    Raises:
        ValueError: when an inlet reaches no outlet.
    """
    sites = find_sites(problem, name, None, exact_outputs=True)
    inputs = data_inputs(sites.level, sites.kinds, sites.reach)
    outlets, tail = _outlets(sites, inputs)
    mapped = {o.start for o in outlets if o.variable in sites.mapped}
    sites = dataclasses.replace(sites, mapped=sites.mapped | mapped)
    exact = {e for site in sites.places if site.exact for e in site.region.equations}
    cut = {e: data for e, data in inputs.items() if e not in exact}

    chained: list[Equation] = []
    able = [e for e in cut if may_have_mirror(e, sites)]
    if chain == "all":
        chained = able
    elif chain == "positions" and able:
        direct = _plan(sites, outlets, tail, cut)
        chained = mixing_products(direct, able)
    for equation in chained:
        del cut[equation]
    plan = _plan(sites, outlets, tail, cut)
    for inlet in plan.inlets:
        _check_heard(inlet, name)
    mirrors = find_mirrors(sites, chained)
    return dataclasses.replace(plan, mirrors=tuple(mirrors), chained=frozenset(chained))


def _plan(
    sites: Sites,
    outlets: tuple[Outlet, ...],
    tail: Tail,
    cut: Mapping[Equation, Sequence[Variable]],
) -> Plan:
    inlets, numbers = _inlets(sites, cut)
    plan = Plan(sites, inlets, outlets, tail, numbers)
    if not inlets:
        return plan
    linked = tuple(_linked(plan, *found) for found in _with_heard(plan))
    return dataclasses.replace(plan, inlets=linked)


def data_inputs(
    level: Level,
    kinds: Mapping[Variable, Kind],
    reach: Sequence[int],
    weights: frozenset[Variable] = frozenset(),
) -> dict[Equation, list[Variable]]:
    """For each product of parameters with data the data that it takes, loops included.

    What reverse mode cannot cross counts as a product that takes all its inputs.

    Args:
        level: where to look.
        kinds: of all variables.
        reach: the losses that each variable reaches.
        weights: parameters with a noise of their own that enter the level.
    """
    found: dict[Equation, list[Variable]] = {}
    noisy = with_weight_noise(level.program, kinds, weights)
    for equation in level.program.equations:
        plan = level.loop_of(equation)
        if plan is not None:
            body = plan.level.program
            pairs = zip(body.inputs, equation.inputs, strict=True)
            inside = frozenset(v for v, atom in pairs if atom in noisy)
            found |= data_inputs(plan.level, kinds, reach, inside)
            continue
        if equation.primitive is None or not is_crossed(equation, reach):
            continue
        mixed = [v for v in equation.variables if kinds[v] is Kind.MIXED]
        if equation.contains(lambda facts: facts.irreversible):
            data = mixed
        elif equation.facts.additive:  # passes errors on as they are
            data = []
        else:
            is_weight = [
                v in noisy or kinds[v] is Kind.PARAMETER for v in equation.variables
            ]
            data = [v for v in mixed if v not in noisy] if any(is_weight) else []
        if data:
            found[equation] = list(dict.fromkeys(data))
    return found


def _outlets(
    sites: Sites, inputs: Mapping[Equation, Sequence[Variable]]
) -> tuple[tuple[Outlet, ...], Tail]:
    """The values of the last sites, or their data inputs where these have fewer coordinates."""
    types = sites.traced.types
    program = sites.level.program
    names: dict[Variable, Variable] = {}
    chosen: dict[Variable, int] = {}
    in_front: set[Equation] = set()
    for site in output_sites(sites):
        taken = [v for e in site.region.equations for v in inputs.get(e, ())]
        size = sum(_tree.num_coordinates(types[v]) for v in taken)
        if taken and size < site.size:
            in_front.update(site.region.equations)
            for v in taken:
                names.setdefault(v, new_variable(types, types[v]))
                chosen[v] = chosen.get(v, 0) | site.reach
        else:
            chosen[site.variable] = chosen.get(site.variable, 0) | site.reach

    def renamed(equation: Equation) -> Equation:
        return renamed_inputs(equation, names) if equation in in_front else equation

    # The tail starts at the edge into the last products alone: other uses are no part of it.
    read_anew = Program(
        program.inputs, tuple(map(renamed, program.equations)), program.outputs
    )
    reach = [*sites.reach, *[0] * (len(types) - len(sites.reach))]
    starts = tuple(names.get(v, v) for v in chosen)
    behind = _behind(read_anew, starts)
    tail = tail_from(read_anew, starts, behind.__contains__, reach, sites.num_losses)
    outlets = [
        Outlet(v, names.get(v, v), tuple(types[v].shape), types[v].dtype, losses)
        for v, losses in chosen.items()
    ]
    return tuple(outlets), tail


def _behind(program: Program, starts: Sequence[Variable]) -> set[Equation]:
    """The equations that read the starts, or what is computed from them."""
    reached = set(starts)
    behind: set[Equation] = set()
    for equation in program.equations:
        if not reached.isdisjoint(equation.variables):
            behind.add(equation)
            reached.update(equation.outputs)
    return behind


def output_sites(sites: Sites) -> list[Site]:
    """The last sites that put something out.

    An added weight decay is none: its error is constant, which tells nothing.
    """
    return [
        site for site in sites.places if site.exact and _tells_something(site, sites)
    ]


def _tells_something(site: Site, sites: Sites) -> bool:
    if site.region.promoted:
        return False
    if all(equation.facts.additive for equation in site.region.equations):
        return False
    return site.mapped or sites.num_examples is None


def _inlets(
    sites: Sites,
    cut: Mapping[Equation, Sequence[Variable]],
) -> tuple[tuple[Inlet, ...], Numbers]:
    lengths = lengths_around(sites.level)
    types = sites.traced.types
    products: dict[Variable, list[Equation]] = {}
    for equation, data in cut.items():
        for v in data:
            products.setdefault(v, []).append(equation)
    inlets: list[Inlet] = []
    numbers: dict[Equation, dict[Variable, int]] = {}
    for number, (v, readers) in enumerate(products.items()):
        aval = types[v]
        inlet = Inlet(
            v,
            tuple(readers),
            shape=(*lengths[readers[0]], *aval.shape),
            dtype=aval.dtype,
            mapped=v in sites.mapped,
            axes=_mesh.type_axes(aval),
        )
        inlets.append(inlet)
        for equation in readers:
            numbers.setdefault(equation, {})[v] = number
    return tuple(inlets), numbers


def lengths_around(
    level: Level, around: tuple[int, ...] = ()
) -> dict[Equation, tuple[int, ...]]:
    """For each equation the lengths of the loops around it, outermost first."""
    lengths: dict[Equation, tuple[int, ...]] = {}
    for equation in level.program.equations:
        lengths[equation] = around
        plan = level.loop_of(equation)
        if plan is not None:
            lengths |= lengths_around(plan.level, (*around, plan.loop.length))
    return lengths


def _with_heard(plan: Plan) -> list[tuple[Inlet, Sequence[Credit]]]:
    """Each inlet with what its noise changes of each outlet."""
    traced = _tangent_program(plan)
    noises = traced.data[-len(plan.inlets) :]
    shapes = [outlet.shape for outlet in plan.outlets]
    credit = credits_of(traced, noises, shapes, any_way=True)
    return list(zip(plan.inlets, credit, strict=True))


def _tangent_program(plan: Plan) -> Traced:
    """The program of one example from noises at inlets, its last inputs, to outlets' tangents."""
    sites = plan.sites

    def tangents(
        params: Tree, mapped: Sequence[Array], noises: Sequence[Array]
    ) -> list[Array]:
        inputs = sites.traced.arguments(params, mapped)
        noise = dict(enumerate(noises))

        def values(time: Array) -> tuple[list[Array], None]:
            env, _ = forward(sites.level, inputs, plan.crossing(), noise, time)
            return [env[outlet.variable] for outlet in plan.outlets], None

        return along(values)[1]

    noises = [_mesh.like(i.shape, i.dtype, i.axes) for i in plan.inlets]
    problem = sites.problem
    return trace(tangents, problem.params, problem.example_specs(), noises)


def _check_heard(inlet: Inlet, name: str) -> None:
    if inlet.heard:
        return
    operation = inlet.products[0]
    raise ValueError(
        f"{name}: found no output site after the {operation.name} that takes a value of shape "
        f"{inlet.shape}: none whose way to the loss is free of parameters. Use "
        "FeedbackAlignment for this loss."
    )


def _linked(plan: Plan, inlet: Inlet, credit: Sequence[Credit]) -> Inlet:
    """An inlet with the outlets that it hears, and the axes that it shares with all of them."""
    reach = 0
    for equation in inlet.products:
        for v in equation.outputs:
            reach |= plan.sites.reach[v]
    by_source = {c.source: c for c in credit if plan.outlets[c.source].reach & reach}
    if not by_source:
        return inlet
    # [outlets] of {axis of the inlet: axis of the outlet}
    shared: list[dict[int, int]] = []
    for number, heard in by_source.items():
        shape = plan.outlets[number].shape
        axes: dict[int, int] = {}
        for axis, link in heard.links:
            is_whole = link == Factor(link.axis, 1, shape[axis])
            if is_whole and inlet.shape[link.axis] == shape[axis]:
                axes[link.axis] = axis
        shared.append(axes)
    own = set.intersection(*map(set, shared)) - _axes_of_weights(plan.sites, inlet)
    common = tuple((axis, tuple(axes[axis] for axes in shared)) for axis in sorted(own))
    return dataclasses.replace(inlet, heard=tuple(by_source), common=common)


def mixing_products(plan: Plan, able: Sequence[Equation]) -> list[Equation]:
    """The products whose value reaches other positions before the next product.

    Positions are those along an axis that the product's inlet has in common with the outlets, and
    the steps of loops in which the product has the same weight.
    """
    sites = plan.sites
    lengths = lengths_around(sites.level)
    values = [e.outputs[0] for e in able]
    shapes = [
        (*lengths[e], *sites.traced.types[v].shape)
        for e, v in zip(able, values, strict=True)
    ]
    traced = _program_to_next(plan, values, shapes)
    noises = traced.data[-len(able) :]
    ends = [i.shape for i in plan.inlets] + [o.shape for o in plan.outlets]
    credit = credits_of(traced, noises, ends)
    mixing: list[Equation] = []
    for equation, heard in zip(able, credit, strict=True):
        (number,) = plan.numbers[equation].values()
        inlet = plan.inlets[number]
        followed = {
            (outlet, axes[place])
            for _, axes in inlet.common
            for place, outlet in enumerate(inlet.heard)
        }
        (mirror,) = find_mirrors(sites, [equation])
        # A loop in which the weight stays the same is one over time.
        loops = [d for d, varies in enumerate(mirror.varies) if not varies]
        if any(_mixes(plan, c, followed, loops) for c in heard):
            mixing.append(equation)
    return mixing


def _mixes(
    plan: Plan,
    credit: Credit,
    followed: set[tuple[int, int]],
    loops: Sequence[int],
) -> bool:
    """Whether what a product's value changes of an end lies at other positions too."""
    apart = {axis for axis, _ in credit.links}
    first_outlet = len(plan.inlets)
    if credit.source >= first_outlet:
        outlet = credit.source - first_outlet
        return any(number == outlet and axis not in apart for number, axis in followed)
    end = plan.inlets[credit.source]
    for axis, of_outlets in end.common:
        tied = set(zip(end.heard, of_outlets, strict=True))
        if axis not in apart and not followed.isdisjoint(tied):
            return True
    # The end lies in the same loop if it has its axis: then each step is to change its own.
    own_loops = lengths_around(plan.sites.level)[end.products[0]]
    return any(axis < len(own_loops) and axis not in apart for axis in loops)


def _program_to_next(
    plan: Plan, values: Sequence[Variable], shapes: Sequence[Shape]
) -> Traced:
    """The program of one example from noises at products' values to tangents at the next ends.

    Tangents end at inlets, so that those of an inlet come from the products before it alone.
    """
    sites = plan.sites
    types = sites.traced.types

    def tangents(
        params: Tree, mapped: Sequence[Array], noises: Sequence[Array]
    ) -> list[Array]:
        inputs = sites.traced.arguments(params, mapped)
        noise = dict(zip(values, noises, strict=True))

        def ends(time: Array) -> tuple[list[Array], None]:
            env, taps = forward(
                sites.level, inputs, plan.crossing(), behind=noise, time=time
            )
            inlets = [taps[number] for number in range(len(plan.inlets))]
            return [*inlets, *(env[o.variable] for o in plan.outlets)], None

        return along(ends)[1]

    noises = [
        _mesh.like(shape, types[v].dtype, _mesh.type_axes(types[v]))
        for v, shape in zip(values, shapes, strict=True)
    ]
    problem = sites.problem
    return trace(tangents, problem.params, problem.example_specs(), noises)


def _axes_of_weights(sites: Sites, inlet: Inlet) -> set[int]:
    """The inlet's axes along which a weight differs: a gain's own are no positions."""
    maker = _makers(sites.level)
    types = sites.traced.types
    num_loops = len(inlet.shape) - len(types[inlet.variable].shape)
    found: set[int] = set()
    for product in inlet.products:
        shapes = [_shape(atom, types) for atom in product.inputs]
        outs = [_shape(v, types) for v in product.outputs]
        for axis, length in enumerate(outs[0]):
            links = [
                back(product, place, 0, Factor(axis, 1, length), shapes, outs)
                for place in range(len(shapes))
            ]
            is_of_weight = False
            for atom, link in zip(product.inputs, links, strict=True):
                is_of_weight |= _varies(atom, link, maker, sites)
            for atom, link in zip(product.inputs, links, strict=True):
                if is_of_weight and atom == inlet.variable and link is not None:
                    found.add(num_loops + link.axis)
    return found


def _varies(
    atom: Atom,
    link: Link,
    maker: Mapping[Variable, Equation],
    sites: Sites,
) -> bool:
    """Whether a parameter, or what is made of it, has the axis of a link, and not broadcast."""
    if link is None or isinstance(atom, Constant) or link.size == 1:
        return False
    if sites.kinds[atom] is not Kind.PARAMETER:
        return False
    types = sites.traced.types
    if atom not in maker:
        return True
    equation = maker[atom]
    shapes = [_shape(a, types) for a in equation.inputs]
    outs = [_shape(v, types) for v in equation.outputs]
    output = equation.outputs.index(atom)
    for place, operand in enumerate(equation.inputs):
        further = back(equation, place, output, link, shapes, outs)
        if _varies(operand, further, maker, sites):
            return True
    # What an operation without a rule makes may differ along all axes.
    return equation.facts.credit is join_all


def _makers(level: Level) -> dict[Variable, Equation]:
    """The operation that makes each parameter chain, in a level and the loops inside it."""
    makers: dict[Variable, Equation] = {}
    for equation in level.program.equations:
        if level.loop_of(equation) is None and equation.primitive is not None:
            makers.update(dict.fromkeys(equation.outputs, equation))
    for plan in level.loops.values():
        makers |= _makers(plan.level)
    return makers


def _shape(atom: Atom, types: Sequence[Any]) -> Shape:
    if isinstance(atom, Constant):
        return tuple(jnp.shape(atom.value))
    return tuple(types[atom].shape)
