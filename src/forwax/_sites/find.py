"""From a problem to its sites."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from forwax import _mesh
from forwax._programs.dataflow import mapped_variables, reach
from forwax._programs.last_sums import without_last_sums
from forwax._programs.program import Equation, Program, Traced, Variable
from forwax._programs.tracing import trace
from forwax._signature import Problem
from forwax._sites.kinds import Classifier, Kind, Unselected
from forwax._sites.levels import make_level
from forwax._sites.model import Site, Sites, num_losses
from forwax._sites.outputs import NO_TAIL, check_tail, make_tail, output_regions
from forwax._sites.products import find_products
from forwax._sites.regions import Region
from forwax._sites.sources import make_sources, with_credit
from forwax._sites.split_loops import split_loops
from forwax._tree import Tree

Select = Callable[[str], bool]
"""Whether the parameter at a path gets activity noise."""


def find_sites(
    problem: Problem,
    name: str,
    select: Select | None,
    exact_outputs: bool,
    credit: bool = False,
    pushes: bool = True,
    weights: Mapping[int, float] | None = None,
    own_weights: bool = False,
) -> Sites:
    """Trace the loss of one example and find its sites.

    Args:
        problem: the parameters, the loss and the examples.
        name: the rule's name, for errors.
        select: which parameters, by their path, get activity noise; None for all. The others get
            weight noise.
        exact_outputs: whether the last sites take their exact error.
        credit: whether to look for the axes along which slopes can be told apart.
        pushes: whether the rule pushes tangents through the loss. One that does not takes
            `jax.custom_vjp` functions too, each with its own rule.
        weights: the places of parameters that get weight noise whatever `select` says, with its
            scale.
        own_weights: whether each example then has its own.
    """
    traced = trace(problem.example, problem.params, *problem.example_specs())
    # Each device has noise of its own: what the others' does to the sum would be error alone.
    with_noise = name if credit else ""
    traced, summed = without_last_sums(traced, num_losses(traced), with_noise)
    if credit or exact_outputs:  # feedback alignment makes no arrays of its own
        _check_split(traced.arguments(problem.params, problem.mapped), name)
    # One noise for all examples on these; on those of few entries each example's own, if asked.
    unselected = dict.fromkeys(_unselected(traced, problem.params, select, name), None)
    own = over_examples(problem) if own_weights else None
    scales = {traced.parameters[i]: scale for i, scale in (weights or {}).items()}
    unselected.update(dict.fromkeys(scales, own))
    given = dataclasses.replace(_kinds_of_closed(traced, problem), pushes=pushes)
    if exact_outputs:
        analysis = _analyse_with_split_loops(traced, unselected, given)
    else:
        analysis = _analyse(traced, unselected, given)
    _check_data(analysis, name)

    sites = _make_sites(problem, analysis, exact_outputs, scales)
    sites = dataclasses.replace(sites, summed=summed)
    if not credit:
        return sites
    sources = make_sources(sites, exact_outputs)
    check_tail(sources, sites.products)
    return with_credit(sites, sources)


@dataclasses.dataclass(frozen=True, eq=False)
class _Analysis:
    """A traced loss with what is known of its values.

    Attributes:
        traced: the loss; its types are those of the rewritten program's variables too.
        program: rewritten, so that noise has a place wherever parameters meet data.
        classifier: the kinds of all values, and the losses that they reach.
    """

    traced: Traced
    program: Program
    classifier: Classifier

    def is_site(self, equation: Equation) -> bool:
        """Whether an equation of the loss, or of a loop's body, lets a parameter meet data."""
        kinds = self.classifier.kinds
        if equation.loop is not None:
            return False
        is_mixed = any(kinds.get(v) is Kind.MIXED for v in equation.outputs)
        return is_mixed and any(map(self.classifier.is_parameter, equation.inputs))


@dataclasses.dataclass(frozen=True)
class _Given:
    """What is known of a traced loss before its analysis.

    Attributes:
        closed: the kinds of the arrays that are neither parameters nor mapped, the program's first
            inputs.
        inside: the kind of arrays written into the program.
        pushes: see `find_sites`.
    """

    closed: tuple[Kind, ...]
    inside: Kind
    pushes: bool = True


def _kinds_of_closed(traced: Traced, problem: Problem) -> _Given:
    """Which arrays of the loss are data, and which are to a parameter what a constant is.

    With examples, what no example owns is a constant: frozen weights, masks, running statistics.
    Without, arguments are data and what the loss closes over is a constant; but a loss that is
    given no array, or keys and scalars alone, must close over its data.
    """
    count = len(traced.closed)
    if problem.num_examples is not None:
        return _Given((Kind.CONSTANT,) * count, Kind.CONSTANT)
    if not any(map(_may_be_data, problem.arguments)):
        return _Given((Kind.DATA,) * count, Kind.DATA)
    given = {id(x) for x in problem.arguments}
    # Tracing keeps arrays of jax as they are, and copies those of NumPy: any may be an argument.
    numpy = Kind.CONSTANT
    if any(isinstance(x, np.ndarray) for x in problem.arguments):
        numpy = Kind.DATA
    kinds: list[Kind] = []
    for x in traced.closed:
        kind = Kind.CONSTANT if isinstance(x, jax.Array) else numpy
        kinds.append(Kind.DATA if id(x) in given else kind)
    return _Given(tuple(kinds), numpy)


def _may_be_data(x: Any) -> bool:
    return x.ndim > 0 and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _analyse(traced: Traced, unselected: Unselected, given: _Given) -> _Analysis:
    types = list(traced.types)  # classifying adds to them
    traced = dataclasses.replace(traced, types=types)
    count = num_losses(traced)
    # [closed-over arrays, parameters, data]
    kinds = [
        *given.closed,
        *[Kind.PARAMETER] * len(traced.parameters),
        *[Kind.DATA] * len(traced.data),
    ]
    classifier = Classifier(
        types, reach(traced.program, types, count), given.inside, given.pushes
    )
    program = classifier.classify(
        traced.program,
        kinds,
        unselected,
        count,
    )
    return _Analysis(traced, program, classifier)


def _analyse_with_split_loops(
    traced: Traced, unselected: Unselected, given: _Given
) -> _Analysis:
    """The analysis of a loss whose loops are split where that makes sites output sites."""
    if all(equation.loop is None for equation in traced.program.equations):
        return _analyse(traced, unselected, given)
    # What is split does not hang on which parameters get weight noise.
    analysis = _analyse(traced, {}, given)
    in_parts = split_loops(traced, analysis.is_site)
    if in_parts is traced and not unselected:
        return analysis
    return _analyse(in_parts, unselected, given)


def _make_sites(
    problem: Problem,
    analysis: _Analysis,
    exact_outputs: bool,
    scales: Mapping[Variable, float],
) -> Sites:
    traced = analysis.traced
    types = traced.types
    reach = analysis.classifier.reach
    products = find_products(analysis.program, analysis.classifier.kinds)
    level = make_level(analysis.program, products, reach, types)
    tail = NO_TAIL
    if exact_outputs:
        tail = make_tail(level, products, reach, num_losses(traced))
        check_tail(tail, products)
    outputs = set(output_regions(level, tail))
    # Parameters and closed-over arrays are the same for all examples, unless they get own noise.
    mapped = mapped_variables(
        analysis.program, [*traced.data, *analysis.classifier.own_copies]
    )

    places: list[Site] = []
    for region, lengths in level.all_regions():
        for variable in region.outputs:
            aval = types[variable]
            site = Site(
                variable,
                region,
                shape=(*lengths, *aval.shape),
                dtype=aval.dtype,
                mapped=variable in mapped,
                reach=reach[variable],
                exact=region in outputs,
                axes=_mesh.type_axes(aval),
                scale=_scale(region, scales),
            )
            places.append(site)
    return Sites(
        problem,
        traced,
        level,
        tail,
        sources=None,
        credit={},
        places=tuple(places),
        mapped=mapped,
        products=products,
        reach=reach,
    )


def _scale(region: Region, scales: Mapping[Variable, float]) -> float:
    """The scale of a region's noise, given for parameters with weight noise."""
    first, *_ = region.inputs
    return scales.get(first, 1) if region.promoted else 1


def over_examples(problem: Problem) -> _mesh.Axes | None:
    """The mesh axes over which the examples lie; None without examples."""
    if problem.num_examples is None:
        return None
    return frozenset().union(*map(_mesh.axes, problem.mapped))


def _unselected(
    traced: Traced,
    params: Tree,
    select: Select | None,
    name: str,
) -> list[Variable]:
    """The parameters that get weight noise."""
    if select is None:
        return []
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [jax.tree_util.keystr(path) for path, _ in leaves]
    unselected = [
        v for v, path in zip(traced.parameters, paths, strict=True) if not select(path)
    ]
    if 0 < len(unselected) == len(paths):
        raise ValueError(
            f"{name}: expected where to select a parameter, got one that selects none of "
            f"{', '.join(paths)}. Pass a regular expression that is found in one of these paths, "
            "or a function of them that is true for one; for weight noise alone use "
            "forwax.WeightPerturbation."
        )
    return unselected


def selection(where: str | Select | None) -> Select | None:
    """A predicate of a parameter's path, from a pattern that is searched in it."""
    if isinstance(where, str):
        return lambda path: re.search(where, path) is not None
    return where


def _check_split(arrays: Sequence[Array], name: str) -> None:
    for x in filter(_mesh.is_split, arrays):
        raise ValueError(
            f"{name}: expected arrays that are not split over explicit mesh axes, got "
            f"{jax.typeof(x)}. Make the mesh with axis_types=(jax.sharding.AxisType.Auto,), one "
            "for each axis, or call it inside jax.sharding.auto_axes. forwax.WeightPerturbation "
            "takes such arrays."
        )


def _check_data(analysis: _Analysis, name: str) -> None:
    losses = analysis.traced.program.outputs[: num_losses(analysis.traced)]
    kinds = set(map(analysis.classifier.kind, losses))
    if Kind.PARAMETER in kinds and kinds.isdisjoint({Kind.DATA, Kind.MIXED}):
        raise ValueError(
            f"{name}: the loss depends on the parameters alone, so there is no site where a "
            "parameter meets data. Where a loss has arguments beside the parameters, or in_axes, "
            "what it closes over is no data: pass that as an argument too, forwax.grad(loss, rule)"
            "(key, params, data) with loss(params, data), or use forwax.WeightPerturbation, which "
            "needs none."
        )
