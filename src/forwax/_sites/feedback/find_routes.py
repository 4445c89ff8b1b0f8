"""From a problem to the routes of its errors."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

from forwax import _mesh, _tree
from forwax._programs.dataflow import Reach
from forwax._programs.program import Equation, Program, Variable, variables
from forwax._programs.tracing import new_variable, renamed_inputs
from forwax._signature import Problem
from forwax._sites.feedback.inlets import (
    Inlet,
    Numbers,
    Outlet,
    Routes,
    lengths_around,
)
from forwax._sites.feedback.maps import map_shapes
from forwax._sites.feedback.mirrors import (
    find_mirrors,
    may_have_mirror,
    mirror_shapes,
)
from forwax._sites.feedback.positions import (
    makers_of,
    mixing_products,
    with_positions,
)
from forwax._sites.find import find_sites
from forwax._sites.kinds import Kind
from forwax._sites.levels import Level
from forwax._sites.model import Site, Sites
from forwax._sites.outputs import Tail, is_crossed, tail_from
from forwax._sites.products import Products

Ends = tuple[tuple[Outlet, ...], Tail]
"""Where exact errors are taken, and the tail behind."""


def find_routes(
    problem: Problem,
    name: str,
    chain: str = "none",
    *,
    must_hear: bool = True,
    by_position: bool = False,
) -> Routes:
    """The inlets and outlets of a problem.

    Args:
        problem: the parameters, the loss and the examples.
        name: the rule's name, for errors.
        chain: which products hand errors on through a mirror: "none", "positions" or "all".
        must_hear: whether an inlet without an outlet is an error.
        by_position: whether errors may be taken in front of a sum over positions, where that makes
            maps smaller.

    Raises:
        ValueError: when an inlet reaches no outlet, and must.
    """
    sites = find_sites(problem, name, None, exact_outputs=True, pushes=False)
    inputs = data_inputs(sites.level, sites.products, sites.reach)
    ends = _outlets(sites, inputs, apart=False)
    routes = _routes(sites, inputs, chain, ends)
    others = _outlets(sites, inputs, apart=True) if by_position else ends
    if _taken_at(others) != _taken_at(ends):
        # In front of a mean over positions errors have more coordinates, but those of one position
        # are few, and all positions teach one map. It hears of its own position alone, though, so
        # that it has to be smaller by more than a third.
        apart = _routes(sites, inputs, chain, others)
        if 3 * _num_entries(apart) < 2 * _num_entries(routes):
            routes = apart
    if must_hear:
        for inlet in routes.inlets:
            _check_heard(inlet, name)
    return routes


def _routes(
    sites: Sites,
    inputs: Mapping[Equation, Sequence[Variable]],
    chain: str,
    ends: Ends,
) -> Routes:
    """The routes to one choice of outlets."""
    outlets, tail = ends
    mapped = {o.start for o in outlets if o.variable in sites.mapped}
    sites = dataclasses.replace(sites, mapped=sites.mapped | mapped)
    exact = {e for site in sites.places if site.exact for e in site.region.equations}
    exact = exact.union(*(outlet.crossed for outlet in outlets))
    cut = {e: data for e, data in inputs.items() if e not in exact}

    chained: list[Equation] = []
    routes = None
    able = [e for e in cut if may_have_mirror(e, sites)]
    if chain == "all":
        chained = able
    elif chain == "positions":
        # What mixes positions behind a gain hands its error on through the gain.
        makers = makers_of(sites.level)
        gains = {e for e in able if _is_gain(e, sites, makers)}
        chained = [e for e in able if e in gains]
        others = [e for e in able if e not in gains]
        direct = {e: data for e, data in cut.items() if e not in gains}
        if others:
            routes = _plan(sites, outlets, tail, direct)
            chained += mixing_products(routes, others)
    # What stays cut has direct maps: of an input that both read, the other uses alone.
    for equation in chained:
        del cut[equation]
    if chained or routes is None:
        routes = _plan(sites, outlets, tail, cut)
    mirrors = find_mirrors(sites, chained)
    return dataclasses.replace(
        routes, mirrors=tuple(mirrors), chained=frozenset(chained)
    )


def _taken_at(ends: Ends) -> list[Variable]:
    """The values at which exact errors are taken; two choices differ in nothing else."""
    return [outlet.variable for outlet in ends[0]]


def _num_entries(routes: Routes) -> int:
    """Of all maps and mirrors."""
    shapes = [*map_shapes(routes), *mirror_shapes(routes.sites, routes.mirrors)]
    return sum(math.prod(shape) for shape in shapes)


def _plan(
    sites: Sites,
    outlets: tuple[Outlet, ...],
    tail: Tail,
    cut: Mapping[Equation, Sequence[Variable]],
) -> Routes:
    inlets, numbers = _inlets(sites, cut)
    routes = Routes(sites, inlets, outlets, tail, numbers)
    return with_positions(routes) if inlets else routes


def data_inputs(
    level: Level, products: Products, reach: Reach
) -> dict[Equation, list[Variable]]:
    """For each product of trained weights with data the data that it takes, loops included.

    What reverse mode cannot cross counts as a product that takes all its inputs.
    """
    found: dict[Equation, list[Variable]] = {}
    for equation in level.program.equations:
        plan = level.loop_of(equation)
        if plan is not None:
            found |= data_inputs(plan.level, products, reach)
            continue
        if equation.primitive is None or not is_crossed(equation, reach):
            continue
        data = products.data_inputs(equation)
        # Weights that enter a `while_loop` are cut off too: only from outside can they hear.
        if equation.irreversible:
            kinds = products.kinds
            data = [v for v in equation.variables if kinds[v] is Kind.MIXED]
        if data:
            found[equation] = list(dict.fromkeys(data))
    return found


def _outlets(
    sites: Sites,
    inputs: Mapping[Equation, Sequence[Variable]],
    *,
    apart: bool,
) -> Ends:
    """Where exact errors are taken, and the tail behind.

    They are the values of the last sites or, where these have fewer coordinates, their data; or
    what their data are made of, as far as there are no more coordinates. Where data are a sum, with
    `apart`, what they sum.
    """
    types = sites.traced.types
    program = sites.level.program
    makers = makers_of(sites.level)
    names: dict[Variable, Variable] = {}
    chosen: dict[Variable, int] = {}
    crossed: dict[Variable, set[Equation]] = {}
    for site in output_sites(sites):
        last = site.region.equations
        taken = [v for e in last for v in inputs.get(e, ())]
        # Logits of ten classes are fewer than the data, and the data fewer than a vocabulary.
        size = sum(_tree.num_coordinates(types[v]) for v in taken)
        earlier = [_earlier(sites, v, last, makers, apart) for v in taken]
        is_wider = any(
            _tree.num_coordinates(types[start]) > _tree.num_coordinates(types[v])
            for v, (start, _) in zip(taken, earlier, strict=True)
        )
        if taken and (is_wider or size < site.size):
            for start, between in earlier:
                crossed.setdefault(start, set()).update(between, last)
                names.setdefault(start, new_variable(types, types[start]))
                chosen[start] = chosen.get(start, 0) | site.reach
        else:
            chosen[site.variable] = chosen.get(site.variable, 0) | site.reach
    in_front = set[Equation]().union(*crossed.values())

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
        Outlet(
            v,
            start=names.get(v, v),
            shape=tuple(types[v].shape),
            dtype=types[v].dtype,
            reach=losses,
            crossed=frozenset(crossed.get(v, ())),
        )
        for v, losses in chosen.items()
    ]
    return tuple(outlets), tail


def _earlier(
    sites: Sites,
    data: Variable,
    readers: Collection[Equation],
    makers: Mapping[Variable, Equation],
    apart: bool,
) -> tuple[Variable, set[Equation]]:
    """The first value of no more coordinates that all of a last product's data are made of.

    Maps need not learn what lies between: it holds no weight but gains, which keep entries apart.

    Args:
        sites: the problem's sites.
        data: what the product takes.
        readers: the operations that may read it.
        makers: what makes each variable.
        apart: whether the value may have more coordinates, such as terms of a mean.

    Returns:
        The value, and the operations that lie between.
    """
    types = sites.traced.types
    all_equations = sites.level.program.equations
    outputs = variables(sites.level.program.outputs)

    def size(v: Variable) -> int:
        return _tree.num_coordinates(types[v])

    found, between = data, set[Equation]()
    open_ends = {data}
    crossed: set[Equation] = set()
    for equation in reversed(all_equations):
        made = open_ends.intersection(equation.outputs)
        if not made:
            continue
        # Another reader would hear of an error that is not all of it.
        inside = crossed.union(readers)
        is_read_inside = all(
            e in inside or made.isdisjoint(e.variables) for e in all_equations
        )
        if not is_read_inside or not made.isdisjoint(outputs):
            break
        if not _may_lie_between(equation, sites, makers):
            break
        crossed.add(equation)
        open_ends -= made
        mixed = [v for v in equation.variables if sites.kinds[v] is Kind.MIXED]
        open_ends.update(mixed)
        if len(open_ends) == 1:
            (only,) = open_ends
            if apart or size(only) <= size(found):
                found, between = only, set(crossed)
    return found, between


def _may_lie_between(
    equation: Equation, sites: Sites, makers: Mapping[Variable, Equation]
) -> bool:
    """Whether an operation has no trained weight, or is a gain."""
    if equation.primitive is None or not is_crossed(equation, sites.reach):
        return False
    if equation.loop is not None or equation.irreversible:
        return False
    weights = sites.products.weights(equation)
    return not weights or _is_gain(equation, sites, makers)


def _is_gain(
    equation: Equation, sites: Sites, makers: Mapping[Variable, Equation]
) -> bool:
    """Whether a product multiplies each entry of its data by one of a parameter.

    One that multiplies repeated data is a whole layer once it is summed: (h[:, None] * w).sum(0).
    """
    data = [v for v in equation.variables if sites.kinds[v] is Kind.MIXED]
    if equation.facts.scaled != (0, 1) or len(data) != 1:
        return False

    def size(v: Variable) -> int:
        return _tree.num_coordinates(sites.traced.types[v])

    value = equation.outputs[0]
    (source,) = data
    maker = makers.get(source)
    # Data are repeated by the product itself, or in front of it.
    while maker is not None and (maker.facts.casts or maker.facts.repeats):
        source = maker.variables[0]
        maker = makers.get(source)
    return size(value) <= size(source)


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
    # Products that read the same value hand back one error, by one map.
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


def _check_heard(inlet: Inlet, name: str) -> None:
    if inlet.heard:
        return
    operation = inlet.products[0]
    raise ValueError(
        f"{name}: found no output site after the {operation.name} that takes a value of shape "
        f"{inlet.shape}: none whose way to the loss is free of parameters. Use "
        "FeedbackAlignment for this loss."
    )
