"""From a problem to its sites."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _mesh
from forwax._programs.dataflow import mapped_variables, reach
from forwax._programs.program import Equation, Traced
from forwax._programs.tracing import trace
from forwax._signature import Problem
from forwax._sites.kinds import Classifier, Kind
from forwax._sites.levels import make_level
from forwax._sites.model import Site, Sites, num_losses
from forwax._sites.outputs import Tail, make_tail, output_regions
from forwax._sites.sources import make_sources, with_credit
from forwax._sites.split_loops import split_loops
from forwax._tree import Tree


def find_sites(
    problem: Problem,
    name: str,
    select: Callable[[str], bool] | None,
    exact_outputs: bool,
    credit: bool = False,
) -> Sites:
    """Trace the loss of one example and find its sites.

    Args:
        problem: the parameters, the loss and the examples.
        name: the rule's name, for errors.
        select: which parameters, by their path, get activity noise; None for all. The others get
            weight noise.
        exact_outputs: whether the last sites take their exact error.
        credit: whether to look for the axes along which slopes can be told apart.
    """
    traced = trace(problem.example, problem.params, *problem.example_specs())
    if credit or exact_outputs:  # feedback alignment makes no arrays of its own
        _check_split([*traced.closed, *jax.tree.leaves(problem.params), *problem.mapped], name)
    count = num_losses(traced)
    start, paths = len(traced.closed), _paths(problem.params)
    inputs = traced.program.inputs
    given = [
        Kind.PARAMETER if start <= i < start + len(paths) else Kind.DATA for i in range(len(inputs))
    ]
    unselected = [
        inputs[start + i] for i, path in enumerate(paths) if select is not None and not select(path)
    ]
    _check_selection(paths, len(unselected), name)
    if exact_outputs:
        traced = _with_split_loops(traced, given, count)
    types, masks = traced.types, reach(traced.program, traced.types, count)
    classifier = Classifier(types, masks)
    program = classifier.classify(traced.program, given, unselected, count)
    kinds = classifier.kinds
    _check_data(traced, classifier, count, name)
    level = make_level(program, kinds, masks, types)
    tail = make_tail(level, kinds, masks, count)
    if not exact_outputs:
        tail = Tail((), (), (), frozenset())
    mapped = mapped_variables(program, inputs[start + len(paths) :])
    exact = {id(region) for region in output_regions(level, tail)}
    sites = tuple(
        Site(
            v,
            region,
            (*lengths, *types[v].shape),
            types[v].dtype,
            v in mapped,
            masks[v],
            id(region) in exact,
            _mesh.type_axes(types[v]),
        )
        for region, lengths in level.all_regions()
        for v in region.outputs
    )
    found = Sites(problem, traced, level, tail, None, {}, sites, mapped, kinds)
    if not credit:
        return found
    reached = mapped_variables(program, [site.variable for site in found.noisy])
    noisy = {
        v for v in reached if jnp.issubdtype(types[v].dtype, jnp.inexact)
    }  # comparisons pass no noise on
    return with_credit(found, make_sources(level, kinds, masks, count, noisy, tail, exact_outputs))


def _with_split_loops(traced: Traced, given: Sequence[Kind], count: int) -> Traced:
    if all(equation.loop is None for equation in traced.program.equations):
        return traced
    types = list(traced.types)  # classifying adds to them
    classifier = Classifier(types, reach(traced.program, types, count))
    classifier.classify(traced.program, given, (), count)

    def is_site(equation: Equation) -> bool:
        mixed = any(classifier.kinds.get(v) is Kind.MIXED for v in equation.outputs)
        return (
            equation.loop is None
            and mixed
            and any(classifier.kind(a) is Kind.PARAMETER for a in equation.inputs)
        )

    return split_loops(traced, is_site)


def _paths(params: Tree) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def _check_split(arrays: Sequence[Array], name: str) -> None:
    for x in filter(_mesh.is_split, arrays):
        raise ValueError(
            f"{name}: expected arrays that are not split over explicit mesh axes, got "
            f"{jax.typeof(x)}. Make the mesh "
            "with axis_types=(jax.sharding.AxisType.Auto,), one for each axis, or call it inside "
            "jax.sharding.auto_axes. forwax.WeightPerturbation takes such arrays."
        )


def _check_selection(paths: Sequence[str], num_unselected: int, name: str) -> None:
    if 0 < num_unselected == len(paths):
        raise ValueError(
            f"{name}: expected where to select a parameter, got one that selects none of "
            f"{', '.join(paths)}. Pass a "
            "regular expression that is found in one of these paths, or a function of them that is "
            "true for one; for "
            "weight noise alone use forwax.WeightPerturbation."
        )


def _check_data(traced: Traced, classifier: Classifier, count: int, name: str) -> None:
    kinds = {classifier.kind(atom) for atom in traced.program.outputs[:count]}
    if Kind.PARAMETER in kinds and not kinds & {Kind.DATA, Kind.MIXED}:
        raise ValueError(
            f"{name}: the loss depends on the parameters alone, so there is no site where a "
            f"parameter meets data. Pass "
            "the data as arguments of the loss, or use forwax.WeightPerturbation, which needs none."
        )
