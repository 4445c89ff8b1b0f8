"""Which parameters have fewer entries than the activities that they make.

A gain of C entries at T positions makes T·C activities: noise on the gain itself, each example's
own, is of C coordinates.
"""

from collections.abc import Iterable, Mapping

from forwax import _tree
from forwax._programs.evaluate import read
from forwax._programs.program import Variable
from forwax._sites.levels import Level, LoopPlan
from forwax._sites.model import Site, Sites
from forwax._sites.regions import Region
from forwax._sites.sources import shared_noise

Leaves = frozenset[Variable]


def with_fewer_weights(sites: Sites, own_slopes: bool) -> dict[int, float]:
    """Parameters on which noise has fewer coordinates than at all sites that they enter.

    Parameters that enter one site, and the sites that one parameter enters, are weighed together: a
    site is spared its noise only if no parameter needs it any more. What counts is the noise that
    one slope hears. Parameters that enter a site with an exact error keep it.

    The noise's scale is √(entries / activities): a gain at T positions of inputs of variance 1 then
    adds no more than activity noise does to its own error, T·C, nor to others', at most |δ|²; where
    positions' errors do not agree it adds less.

    Args:
        sites: of the problem, all with activity noise.
        own_slopes: whether each example has slopes of its own.

    Returns:
        The places of these parameters, each with the scale of its noise.
    """
    found: dict[Variable, float] = {}
    leaves_at = _leaves_at(sites)
    for group in _connected(set(leaves_at.values())):
        members = [s for s in sites.places if not group.isdisjoint(leaves_at[s.region])]
        if not all(_may_change(site, sites) for site in members):
            continue
        noise = {s: shared_noise(sites, s, s, own_slopes) for s in members}
        sizes = {v: _tree.num_coordinates(sites.traced.types[v]) for v in group}
        if sum(sizes.values()) >= sum(noise.values()):
            continue
        for variable, size in sizes.items():
            made = [noise[s] for s in members if variable in leaves_at[s.region]]
            found[variable] = min(1, size / max(sum(made), 1)) ** 0.5
    places = enumerate(sites.traced.parameters)
    return {place: found[variable] for place, variable in places if variable in found}


def _may_change(site: Site, sites: Sites) -> bool:
    """Whether a site has activity noise, and each example its own if there are examples."""
    has_own = site.mapped or sites.num_examples is None
    return has_own and not site.exact and not site.region.promoted


def _leaves_at(sites: Sites) -> dict[Region, Leaves]:
    """The parameters that enter each region, be it behind chains of operations."""
    found: dict[Region, Leaves] = {}
    known = {v: frozenset([v]) for v in sites.traced.parameters}
    _follow(sites.level, known, found)
    return found


def _follow(
    level: Level, known: dict[Variable, Leaves], found: dict[Region, Leaves]
) -> None:
    for step in level.steps:
        if isinstance(step, Region):
            found[step] = _union(step.inputs, known)
        elif isinstance(step, LoopPlan):
            outside = {v: frozenset() for v in step.variables} | known
            inner = dict(known)
            for v, atom in (step.fixed | step.scanned).items():
                inner[v] = read(atom, outside)
            _follow(step.level, inner, found)
            known.update({v: read(atom, outside) for v, atom in step.unchanged.items()})
            known.update({v: inner[inside] for v, inside in step.stacked.items()})
        else:
            leaves = _union(step.variables, known)
            known.update(dict.fromkeys(step.outputs, leaves))


def _union(variables: Iterable[Variable], known: Mapping[Variable, Leaves]) -> Leaves:
    return frozenset().union(*(known.get(v, frozenset()) for v in variables))


def _connected(sets: Iterable[Leaves]) -> list[set[Variable]]:
    """Sets that share an element, joined; empty ones left out."""
    groups: list[set[Variable]] = []
    for leaves in filter(None, sets):
        apart = [group for group in groups if group.isdisjoint(leaves)]
        touching = [group for group in groups if not group.isdisjoint(leaves)]
        groups = [*apart, leaves.union(*touching)]
    return [set(group) for group in groups]
