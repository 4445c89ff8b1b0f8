"""What a rule does to a loss: its sites, their noise, their credit, and where it falls back."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from forwax._rule import check_rule
from forwax._rules import ActivityPerturbation, Rule
from forwax._safety import Safe
from forwax._signature import Signature
from forwax._sites.credit import Credit
from forwax._sites.model import Site, Sites

_COLUMNS = ("operation", "shape", "weight noise", "activity noise", "credit", "where")


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
    """

    operation: str
    shape: tuple[int, ...]
    weight_noise: int
    activity_noise: int
    credit: str
    where: str

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        shape = "×".join(map(str, self.shape)) or "scalar"
        return (
            self.operation,
            shape,
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
        >>> table = fx.explain(loss, fx.ActivityPerturbation(), in_axes=(None, 0))(jnp.ones((2, 3)), jnp.ones((5, 3)))
        >>> [row.shape for row in table.rows]
        [(2,)]
    """

    rows: tuple[SiteRow, ...]

    def __str__(self) -> str:
        table = [_COLUMNS, *(row.cells() for row in self.rows)]
        widths = [max(len(cells[i]) for cells in table) for i in range(len(_COLUMNS))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(cells, widths, strict=True)).rstrip()
            for cells in table
        ]
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(*_COLUMNS)
        for row in self.rows:
            table.add_row(*row.cells())
        return table


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
            shown.
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
        >>> [(row.operation, row.weight_noise, row.activity_noise, row.credit) for row in table.rows]
        [('dot_general + add', 9, 3, 'one slope per example'), ('dot_general', 12, 4, 'exact
        error')]
    """
    signature = Signature(loss, argnums, has_aux, in_axes, "explain", keyed=False)
    check_rule("explain", rule)

    inner = rule.rule if isinstance(rule, Safe) else rule

    def explain_loss(*args: Any, **kwargs: Any) -> Explanation:
        find = getattr(inner, "sites", ActivityPerturbation().sites)
        sites = find(signature.bind(args, kwargs))
        shared = getattr(inner, "memory", "keep") == "shared"
        return Explanation(tuple(_row(site, sites, shared) for site in sites.places))

    return explain_loss


def _row(site: Site, sites: Sites, shared: bool) -> SiteRow:
    region = site.region
    operation = _shortened([equation.name for equation in region.equations])
    if region.promoted:
        origin = region.equations[0].origin
        operation = (
            f"weight noise ({origin.primitive.name})" if origin is not None else "weight noise"
        )
    entering = sum(math.prod(shape) for shape in sites.parameter_shapes(site))
    where = next((equation.source for equation in region.equations if equation.source), "")
    return SiteRow(operation, site.shape, entering, site.size, _credit(site, sites, shared), where)


def _shortened(names: Sequence[str]) -> str:
    """The names of a region's operations, those in the middle counted if there are many."""
    shown = names if len(names) <= 6 else [*names[:2], f"{len(names) - 3} more", names[-1]]
    return " + ".join(shown)


def _credit(site: Site, sites: Sites, shared: bool) -> str:
    if site.exact:
        return "exact error"
    own = sites.credit.get(site.variable, ())
    parts = len(sites.sources.starts) if sites.sources is not None else 1
    along = [] if shared else _along(own)
    if sites.num_examples is None:
        alone = not along and (shared or len(own) in (0, parts))
        text = "one slope for the batch: pass in_axes" if alone else "one slope"
    else:
        text = (
            "one slope per example" if site.mapped and not shared else "one slope for all examples"
        )
    text += "".join(along)
    count = site.reach.bit_count()
    if sites.num_losses > 1:
        return f"{text}, {count} of {sites.num_losses} losses"
    return text if len(own) in (0, parts) else f"{text}, {len(own)} of {parts} parts of the loss"


def _along(own: Sequence[Credit]) -> list[str]:
    """The axes of the site's value along which its slopes are told apart, whatever the source."""
    links = [{(x.axis, x.inner) for _, x in credit.links if x.size > 1} for credit in own]
    common = sorted(set.intersection(*links)) if links else []
    return [
        f" and position of axis {axis}" if inner == 1 else f" and {inner} positions of axis {axis}"
        for axis, inner in common
    ]
