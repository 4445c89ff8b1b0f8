"""Which parameters have fewer entries than the activities that they make.

A gain of C entries at T positions makes T·C activities: noise on the gain itself, each example's
own, is of C coordinates.
"""

from collections.abc import Iterable, Mapping

from forwax import _tree
from forwax._programs.program import Atom, Variable, variables
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
    for group in _connected(leaves_at.values()):
        members: list[Site] = []
        for site in sites.places:
            if not group.isdisjoint(leaves_at[site.region]):
                members.append(site)
        if all(_may_change(site, sites) for site in members):
            noise: dict[Site, float] = {}
            for site in members:
                noise[site] = shared_noise(sites, site, site, own_slopes)
            found.update(_scales(group, noise, leaves_at, sites))

    scales: dict[int, float] = {}
    for place, variable in enumerate(sites.traced.parameters):
        if variable in found:
            scales[place] = found[variable]
    return scales


def _scales(
    group: Leaves,
    noise: Mapping[Site, float],
    leaves_at: Mapping[Region, Leaves],
    sites: Sites,
) -> dict[Variable, float]:
    """The scale of the noise on each parameter of a group; none if that has no fewer entries."""
    types = sites.traced.types
    sizes = {v: _tree.num_coordinates(types[v]) for v in group}
    if sum(sizes.values()) >= sum(noise.values()):
        return {}
    scales: dict[Variable, float] = {}
    for variable, size in sizes.items():
        made: float = 0
        for site, count in noise.items():
            if variable in leaves_at[site.region]:
                made += count
        # A parameter may be of more entries than its own site's noise, and its group of fewer.
        scales[variable] = 1 if made <= size else (size / made) ** 0.5
    return scales


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
    """Add the parameters behind each value to `known`, and those at regions to `found`."""
    for step in level.steps:
        if isinstance(step, Region):
            found[step] = _union(step.inputs, known)
        elif isinstance(step, LoopPlan):
            # A slice of an array has all the array's parameters behind it.
            inner = dict(known)
            for variable, atom in (step.fixed | step.scanned).items():
                inner[variable] = _union([atom], known)
            _follow(step.level, inner, found)
            for variable, atom in step.unchanged.items():
                known[variable] = _union([atom], known)
            for variable, inside in step.stacked.items():
                known[variable] = inner[inside]
        else:
            leaves = _union(step.inputs, known)
            known.update(dict.fromkeys(step.outputs, leaves))


def _union(atoms: Iterable[Atom], known: Mapping[Variable, Leaves]) -> Leaves:
    union: Leaves = frozenset()
    for variable in variables(atoms):
        union |= known.get(variable, frozenset())
    return union


def _connected(sets: Iterable[Leaves]) -> list[Leaves]:
    """Sets that share an element, joined; empty ones left out."""
    groups: list[Leaves] = []
    for leaves in sets:
        apart: list[Leaves] = []
        for group in groups:
            if group.isdisjoint(leaves):
                apart.append(group)
            else:
                leaves |= group
        groups = [*apart, leaves] if leaves else apart
    return groups
