"""What a rule does to a loss: its sites, their noise, their credit, and where it falls back."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from forwax._reports.table import as_rich, as_text
from forwax._rule import check_rule
from forwax._rules import ActivityPerturbation, Rule
from forwax._signature import Signature
from forwax._sites.credit import Credit
from forwax._sites.model import Site, Sites
from forwax._sites.scales import Scales, scales_of

_COLUMNS = ("operation", "shape", "weight noise", "activity noise", "credit", "where")
_MOST_NAMES = 6


@dataclasses.dataclass(frozen=True)
class SiteRow:
    """One site.

    Attributes:
        operation: the operations from the parameters to the noise.
        shape: of one example's value, with a leading axis for each loop around it.
        weight_noise: the number of parameters that enter here.
        activity_noise: the number of coordinates of one example's activity.
        credit: what multiplies the site's noise; axes are those of `shape`.
        where: the place in the user's source.
        scale: of the noise here; None where all are 1, or the error is exact.
    """

    operation: str
    shape: tuple[int, ...]
    weight_noise: int
    activity_noise: int
    credit: str
    where: str
    scale: float | None = None

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        return (
            self.operation,
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
        ...     row.operation, row.weight_noise, row.activity_noise, row.credit
        ('dot_general + add', 9, 3, 'one slope per example')
        ('dot_general', 12, 4, 'exact error')
    """
    signature = Signature(loss, argnums, has_aux, in_axes, "explain", keyed=False)
    check_rule("explain", rule)

    def explain_loss(*args: Any, **kwargs: Any) -> Explanation:
        problem = signature.bind(args, kwargs)
        sites = rule.sites(problem)
        if sites is None:
            sites = ActivityPerturbation().sites(problem)
        # Of all rules one alone has a memory; "shared" gives all examples and positions one slope.
        is_shared = getattr(rule.inner, "memory", "keep") == "shared"
        given = getattr(rule.inner, "scales", None)
        scales = scales_of(sites, given, "explain")
        return Explanation(
            tuple(_row(site, sites, scales, is_shared) for site in sites.places)
        )

    return explain_loss


def _row(site: Site, sites: Sites, scales: Scales, is_shared: bool) -> SiteRow:
    entering = sum(math.prod(shape) for shape in sites.parameter_shapes(site))
    sources = [equation.source for equation in site.region.equations if equation.source]
    return SiteRow(
        operation=_operation(site, sites),
        shape=site.shape,
        weight_noise=entering,
        activity_noise=site.size,
        credit=_credit(site, sites, is_shared),
        where=sources[0] if sources else "",
        scale=float(scales[site.variable]) if site.variable in scales else None,
    )


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


def _credit(site: Site, sites: Sites, is_shared: bool) -> str:
    """What multiplies a site's noise: how far its slopes are told apart, and of which losses."""
    if site.exact:
        return "exact error"
    # One for each part of the loss that the site reaches; none where slopes are not told apart.
    by_source = sites.credit.get(site.variable, ())
    num_parts = 1 if sites.sources is None else len(sites.sources.starts)
    hears_all = len(by_source) in (0, num_parts)
    along = [] if is_shared else _along(by_source)
    if sites.num_examples is not None:
        each = site.mapped and not is_shared
        text = "one slope per example" if each else "one slope for all examples"
    elif not along and (is_shared or hears_all):
        text = "one slope for the batch: pass in_axes"
    else:
        text = "one slope"
    text += "".join(along)
    if sites.num_losses > 1:
        return f"{text}, {site.reach.bit_count()} of {sites.num_losses} losses"
    if hears_all:
        return text
    return f"{text}, {len(by_source)} of {num_parts} parts of the loss"


def _along(by_source: Sequence[Credit]) -> list[str]:
    """The axes of the site's value along which its slopes are told apart, whatever the source."""
    links = [
        {(link.axis, link.inner) for _, link in credit.links if link.size > 1}
        for credit in by_source
    ]
    # An axis counts if every part of the loss tells its positions apart.
    common = sorted(set.intersection(*links)) if links else []
    return [
        f" and position of axis {axis}"
        if inner == 1
        else f" and {inner} positions of axis {axis}"
        for axis, inner in common
    ]
