"""What a rule does to a loss: its sites, their noise, their credit, and where it falls back."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from forwax import _tree
from forwax._programs.links import Link
from forwax._programs.program import Variable
from forwax._reports.table import as_rich, as_text
from forwax._rule import check_rule
from forwax._rules import ActivityPerturbation, Rule
from forwax._signature import Signature
from forwax._sites.counts import Counts, parameter_counts, together
from forwax._sites.credit import Credit
from forwax._sites.feedback.inlets import Routes
from forwax._sites.feedback.maps import map_shapes
from forwax._sites.model import Site, Sites
from forwax._sites.scales import Scales, scales_of

_COLUMNS = (
    "operation",
    "parameters",
    "shape",
    "weight noise",
    "activity noise",
    "credit",
    "where",
)
_MOST_NAMES = 6
_MOST_PATHS = 3
_BY_EXAMPLE = "see WeightPerturbation(per_example=True)"


@dataclasses.dataclass(frozen=True)
class SiteRow:
    """One site.

    Attributes:
        operation: the operations from the parameters to the noise.
        shape: of one example's value, with a leading axis for each loop around it.
        weight_noise: the number of parameters that enter here, before anything is made of them.
        activity_noise: the number of coordinates of one example's activity.
        credit: what multiplies the site's noise; axes are those of `shape`. Of rules that send
            errors: how the site's data gets its error, axes being those of the data; and where the
            exact error is taken.
        where: the place in the user's source.
        scale: of the noise here; None where all are 1, or the error is exact.
        parameters: the paths of those that enter, such as `layers.0.weight`.
    """

    operation: str
    shape: tuple[int, ...]
    weight_noise: int
    activity_noise: int
    credit: str
    where: str
    scale: float | None = None
    parameters: tuple[str, ...] = ()

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        paths = list(self.parameters)
        if len(paths) > _MOST_PATHS:
            paths[2:] = [f"{len(paths) - 2} more"]
        return (
            self.operation,
            ", ".join(paths),
            "×".join(map(str, self.shape)) or "scalar",
            f"{self.weight_noise:,}",
            f"{self.activity_noise:,}",
            self.credit,
            self.where,
        )


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A table of sites; print it. `rich.print` shows it as a rich table.

    Attributes:
        rows: the sites in the program's order.

    Example:
        >>> import jax.numpy as jnp, forwax as fx
        >>> loss = lambda w, x: jnp.sum(jnp.tanh(w @ x))
        >>> explain = fx.explain(loss, fx.ActivityPerturbation(), in_axes=(None, 0))
        >>> table = explain(jnp.ones((2, 3)), jnp.ones((5, 3)))
        >>> [row.shape for row in table.rows]
        [(2,)]
    """

    rows: tuple[SiteRow, ...]

    def num_coordinates(self, *, of_activities: bool) -> int:
        """How many coordinates the noise of all rows has.

        Those of the activities of one example, but where the error is exact, or of the parameters.
        """
        if not of_activities:
            return sum(row.weight_noise for row in self.rows)
        noisy = [row for row in self.rows if not row.credit.startswith("exact error")]
        return sum(row.activity_noise for row in noisy)

    def cells(self) -> list[tuple[str, ...]]:
        """The table as text, the columns' names first; scales only where there are any."""
        rows = [_COLUMNS, *(row.cells() for row in self.rows)]
        scales = [row.scale for row in self.rows]
        if all(scale is None for scale in scales):
            return rows
        texts = ["scale", *("" if x is None else f"{x:.3g}" for x in scales)]
        return [(*row, text) for row, text in zip(rows, texts, strict=True)]

    def __str__(self) -> str:
        return as_text(self.cells())

    def __rich__(self) -> Any:
        return as_rich(self.cells())


def explain(
    loss: Callable[..., Any],
    rule: Rule = ActivityPerturbation(),  # noqa: B008 (a frozen value)
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    in_axes: Any = None,
) -> Callable[..., Explanation]:
    """List the sites that a rule finds in a loss.

    Args:
        loss: as for `forwax.value_and_grad`.
        rule: a rule that works on sites; for the others the sites of `ActivityPerturbation()` are
            shown. Its scales, if it has any, are a column.
        argnums: as for `forwax.value_and_grad`.
        has_aux: as for `forwax.value_and_grad`.
        in_axes: as for `forwax.value_and_grad`.

    Returns:
        A function of the loss's arguments that returns the table. Nothing is computed, the loss is
        only traced.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> def loss(w, x):
        ...     return jnp.sum(jnp.tanh(jnp.tanh(x @ w["a"] + w["b"]) @ w["c"]))
        >>> params = {"a": jnp.ones((2, 3)), "b": jnp.ones(3), "c": jnp.ones((3, 4))}
        >>> table = fx.explain(loss, in_axes=(None, 0))(params, jnp.ones((5, 2)))
        >>> for row in table.rows:
        ...     row.parameters, row.weight_noise, row.activity_noise, row.credit
        (('a', 'b'), 9, 3, 'one slope per example')
        (('c',), 12, 4, 'exact error')
    """
    signature = Signature(loss, argnums, has_aux, in_axes, "explain", keyed=False)
    check_rule("explain", rule)

    def explain_loss(*args: Any, **kwargs: Any) -> Explanation:
        problem = signature.bind(args, kwargs)
        sites = rule.sites(problem)
        if sites is None:
            sites = ActivityPerturbation().sites(problem)
        if isinstance(sites, Routes):
            return Explanation(_rows_of_routes(sites))  # rules that send errors
        # Of all rules one alone has a memory; "shared" gives all examples and positions one slope.
        is_shared = getattr(rule.inner, "memory", "keep") == "shared"
        decays = getattr(rule.inner, "credit", None) is not None
        counts = parameter_counts(sites.traced, sites.level.program, sites.kinds)
        scales = scales_of(sites, getattr(rule.inner, "scales", None), "explain")
        row_of = functools.partial(
            _row,
            sites=sites,
            counts=counts,
            scales=scales,
            is_shared=is_shared,
            decays=decays,
            has_data=bool(problem.arguments),
        )
        return Explanation(tuple(map(row_of, sites.places)))

    return explain_loss


def _rows_of_routes(routes: Routes) -> tuple[SiteRow, ...]:
    sites = routes.sites
    counts = parameter_counts(sites.traced, sites.level.program, sites.kinds)
    rows: list[SiteRow] = []
    for site in sites.places:
        # No noise enters at these sites: they have no scales.
        row = _row(site, sites, counts, {}, is_shared=False, decays=False)
        rows.append(dataclasses.replace(row, credit=_way_back(site, routes)))
    return tuple(rows)


def _way_back(site: Site, routes: Routes) -> str:
    """What a site's data gets in place of its own error, or where the exact error is taken."""
    equations = site.region.equations
    data = [v for e in equations for v in e.variables]
    taken = [
        outlet
        for outlet in routes.outlets
        if outlet.variable == site.variable or not outlet.crossed.isdisjoint(equations)
    ]
    if site.exact:
        if not taken:
            return "exact error"
        place = "what its data are made of"
        if taken[0].variable == site.variable:
            place = "its value"
        elif taken[0].variable in data:
            place = "its data"
        size = sum(_tree.num_coordinates(outlet) for outlet in taken)
        return f"exact error, sent from {place}: {size:,} coordinates"
    if taken:
        return "exact error of what follows; its data's too"
    if not routes.chained.isdisjoint(equations):
        return "exact error of what follows; its data's by a mirror of the weight"
    numbers = {
        number
        for equation in equations
        for number in routes.numbers.get(equation, {}).values()
    }
    if not numbers:
        return "exact error of what follows; its data needs none"
    texts: list[str] = []
    shapes = map_shapes(routes)
    for number in sorted(numbers):
        rows, columns = shapes[number]
        text = f"map {number} of {rows}×{columns}"
        axes = [str(axis) for axis, _ in routes.inlets[number].common]
        if axes:
            text += f", shared along axis {' and '.join(axes)}"
        texts.append(text)
    return f"exact error of what follows; its data's by {'; '.join(texts)}"


def _row(
    site: Site,
    sites: Sites,
    counts: Mapping[Variable, Counts],
    scales: Scales,
    is_shared: bool,
    decays: bool,
    has_data: bool = False,
) -> SiteRow:
    entering = together([counts.get(v, {}) for v in site.region.inputs])
    credit = _credit(site, sites, is_shared, decays)
    if credit.startswith("one slope for ") and not is_shared:
        credit += _advice(site, sites.num_examples is not None, has_data)
    sources = [equation.source for equation in site.region.equations if equation.source]
    paths = _paths(sites)
    return SiteRow(
        operation=_operation(site, sites),
        shape=site.shape,
        weight_noise=sum(entering.values()),
        activity_noise=site.size,
        credit=credit,
        where=sources[0] if sources else "",
        scale=float(scales[site.variable]) if site.variable in scales else None,
        parameters=tuple(path for v, path in paths.items() if v in entering),
    )


def _paths(sites: Sites) -> dict[Variable, str]:
    """The path of each parameter in the user's tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(sites.problem.params)
    paths: list[str] = []
    for path, _ in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        paths.append(name or "the parameter")
    return dict(zip(sites.traced.parameters, paths, strict=True))


def _operation(site: Site, sites: Sites) -> str:
    """The names of a region's operations, those in the middle counted if there are many."""
    region = site.region
    if region.promoted:
        # Noise enters at the parameter, and one equation stands for all that use it.
        origin = region.equations[0].origin
        is_own = site.mapped and sites.num_examples is not None
        noise = "weight noise of each example" if is_own else "weight noise"
        return noise if origin is None else f"{noise} ({origin.primitive.name})"
    names = [equation.name for equation in region.equations]
    if len(names) > _MOST_NAMES:
        names = [*names[:2], f"{len(names) - 3} more", names[-1]]
    return " + ".join(names)


def _credit(site: Site, sites: Sites, is_shared: bool, decays: bool) -> str:
    """What multiplies a site's noise: how far its slopes are told apart, and of which losses."""
    if site.exact:
        return "exact error"
    # One for each part of the loss that the site reaches; none where slopes are not told apart.
    by_source = sites.credit.get(site.variable, ())
    num_parts = 1 if sites.sources is None else len(sites.sources.starts)
    hears_all = len(by_source) in (0, num_parts)
    along = [] if is_shared else _along(by_source, decays)
    if sites.num_examples is not None:
        each = site.mapped and not is_shared
        text = "one slope per example" if each else "one slope for all examples"
    elif not along and (is_shared or hears_all):
        text = "one slope for the batch"
    else:
        text = "one slope"
    text += "".join(along)
    if sites.num_losses > 1:
        return f"{text}, {site.reach.bit_count()} of {sites.num_losses} losses"
    if hears_all:
        return text
    return f"{text}, {len(by_source)} of {num_parts} parts of the loss"


def _advice(site: Site, has_examples: bool, has_data: bool) -> str:
    """What would tell the slopes of examples apart where one is for all; else nothing."""
    if has_examples:
        return f": {_BY_EXAMPLE}" if site.region.promoted else ""
    if not has_data:
        return ""
    # Noise that enters at a parameter itself is shared by all examples, with `in_axes` too.
    return f": {_BY_EXAMPLE} with in_axes" if site.region.promoted else ": pass in_axes"


def _along(by_source: Sequence[Credit], decays: bool) -> list[str]:
    """The axes of the site's value along which its slopes are told apart, whatever the source."""
    links = [
        {link.axis: link for _, link in credit.links if link.axis is not None}
        for credit in by_source
    ]
    # An axis counts if every part of the loss tells its positions apart.
    common = set.intersection(*map(set, links)) if links else set()
    return [
        _along_axis(axis, [of[axis] for of in links], decays) for axis in sorted(common)
    ]


def _along_axis(axis: int, links: Sequence[Link], decays: bool) -> str:
    """How slopes are told apart along one axis, and which terms each of them hears."""
    width = max(link.group for link in links)
    places = (
        f"position of axis {axis}"
        if width == 1
        else f"{width} positions of axis {axis}"
    )
    wide = [link for link in links if not link.is_exact]
    if not wide:
        return f" and {places}"
    if all(link.is_later for link in wide):
        terms = "later terms"
    elif all(link.is_earlier for link in wide):
        terms = "earlier terms"
    else:
        terms = "terms near it"
    return f" and {places}, {terms}{' decaying' if decays else ''}"
