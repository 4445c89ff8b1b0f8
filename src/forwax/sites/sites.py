"""A problem's sites: values, slopes and errors at them, and from errors to gradients: what the rules use."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax import _mesh, _tree
from forwax._signature import Problem
from forwax._tree import Spec, Tree
from forwax.sites.classify import Kind
from forwax.sites.credit import Credit
from forwax.sites.feedback import forward_with_feedback
from forwax.sites.plan import Kinds, Level
from forwax.sites.program import Equation, Traced, Variable, bind
from forwax.sites.regions import Region
from forwax.sites.run import Values, forward, local
from forwax.sites.tail import Tail


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """A place where noise, or an error, enters.

    Attributes:
        variable: the value it is added to.
        region: the operations from the parameters to it.
        shape: of one example, with a leading axis for each loop around it.
        dtype: of the value.
        mapped: whether each example has a value of its own; if not, all share one noise and the sum
            of their slopes.
        reach: the losses that it reaches, as a bit mask.
        exact: whether the error is taken exactly, since no site follows.
        axes: the mesh axes, inside `jax.shard_map`, over which the value varies.
    """

    variable: Variable
    region: Region
    shape: tuple[int, ...]
    dtype: Any
    mapped: bool
    reach: int
    exact: bool
    axes: _mesh.Axes

    @property
    def size(self) -> int:
        """The number of real coordinates of one example's noise."""
        return _tree.num_coordinates(Spec(self.shape, self.dtype))


@dataclasses.dataclass(frozen=True, eq=False)
class Pass:
    """What a forward pass returns.

    Attributes:
        losses: the loss's parts, with a leading axis of examples if there are examples.
        aux: the loss's aux.
        slopes: for each loss its slope along each noise: [k] or, per example, [k, examples].
        tangents: for each source its tangent along each noise: [k, *shape] or, per example, [k,
            examples, *shape].
        records: the values that the assembly needs.
    """

    losses: list[Array]
    aux: Tree
    slopes: list[Array]
    tangents: list[Array]
    records: Values


@dataclasses.dataclass(frozen=True, eq=False)
class Sites:
    """A problem's program with its sites.

    Attributes:
        problem: parameters, loss and examples.
        traced: the program of the loss of one example.
        level: its plan.
        tail: from the last sites to the losses; empty when their error is not taken exactly.
        sources: from the values whose slopes are told apart to the losses; None when nothing is
            gained by it.
        credit: for each noisy site what its noise changes of the sources; empty without them.
        places: in the program's order.
        mapped: the variables that differ between examples.
        kinds: what each variable is made of.
    """

    problem: Problem
    traced: Traced
    level: Level
    tail: Tail
    sources: Tail | None
    credit: Mapping[Variable, Sequence[Credit]]
    places: tuple[Site, ...]
    mapped: set[Variable]
    kinds: Kinds

    @property
    def noisy(self) -> list[Site]:
        """The sites that noise is put on."""
        return [site for site in self.places if not site.exact]

    @property
    def num_examples(self) -> int | None:
        """The number of examples; None without `in_axes`."""
        return self.problem.num_examples

    def own_shape(self, site: Site) -> tuple[int, ...]:
        """The shape of a site's value in one step of the loops around it."""
        return tuple(self.traced.types[site.variable].shape)

    def parameter_shapes(self, site: Site) -> list[tuple[int, ...]]:
        """The shapes of the parameters, and of what is made of them alone, that enter a site."""
        inputs = [v for v in site.region.inputs if self.kinds[v] is Kind.PARAMETER]
        return [tuple(self.traced.types[v].shape) for v in inputs]

    @property
    def num_losses(self) -> int:
        """The number of parts of the loss."""
        return num_losses(self.traced)

    @property
    def tail_records(self) -> frozenset[Variable]:
        """The values that the errors of output sites and sources are made from."""
        return (
            self.tail.records if self.sources is None else self.tail.records | self.sources.records
        )

    def specs(self) -> list[Spec]:
        """Shape and dtype of the noise at each noisy site, all examples together."""
        lead = () if self.num_examples is None else (self.num_examples,)
        return [Spec((*lead, *s.shape) if s.mapped else s.shape, s.dtype) for s in self.noisy]

    def num_loops(self, site: Site) -> int:
        """The number of loops around a site."""
        return len(site.shape) - len(self.own_shape(site))






    def axis_of(self, variable: Variable) -> int | None:
        """The axis of examples of a variable's values; None where examples share it."""
        return 0 if self.num_examples is not None and variable in self.mapped else None










def with_slopes_of_loops(sites: Sites) -> Sites:
    """The same sites, but each step of a loop shares its slopes with the others."""

    def coarser(site: Site, credit: Credit) -> Credit:
        first = sites.num_loops(site)
        links = tuple(
            (a, link) for a, link in credit.links if link.size == 1 or link.axis >= first
        )
        return dataclasses.replace(credit, links=links)

    credit = {
        s.variable: [coarser(s, c) for c in sites.credit.get(s.variable, ())] for s in sites.noisy
    }
    return dataclasses.replace(sites, credit=credit if sites.credit else {})


def of_a_step(sites: Sites, site: Site, slopes: Array) -> Array:
    """Slopes without the axes of loops, along which they are the same."""
    lead = slopes.ndim - len(site.shape)
    return (
        jnp.squeeze(slopes, tuple(range(lead, lead + sites.num_loops(site))))
        if sites.credit
        else slopes
    )


def shared_noise(sites: Sites, site: Site, other: Site, own_slopes: bool = True) -> float:
    """How many coordinates of another site's noise one slope of this site hears, on average.

    Unless examples have slopes of their own and the site a value of its own for each, it hears
    all examples'.
    """
    examples = (
        1 if sites.num_examples is None or (own_slopes and site.mapped) else sites.num_examples
    )
    size = other.size * (examples if other.mapped else 1)
    if not sites.credit:
        return size if other.reach & site.reach else 0
    theirs = {credit.source: credit for credit in sites.credit[other.variable]}
    heard = [
        (mine, theirs[mine.source])
        for mine in sites.credit[site.variable]
        if mine.source in theirs
    ]
    return max((size / mine.common(their) for mine, their in heard), default=0)


def push(sites: Sites, noise: Sequence[Array] = (), num_tangents: int = 1) -> Pass:
    """Evaluate the loss, and its slopes along k noises [k, *spec]; with no noise there are no slopes."""
    table = dict(zip([site.variable for site in sites.noisy], noise, strict=False))
    if not table:
        (losses, *_), (aux, records) = _run(sites, {}, None)
        return Pass(losses, aux, [], [], records)
    return push_along(functools.partial(_run, sites), table, num_tangents)


def _run(sites: Sites, noise: Values, time: Array | None) -> tuple[Any, Any]:
    """`((losses, sums of losses, sources), (aux, records))`; each with a leading axis of examples."""
    taps = sites.sources.starts if sites.sources is not None else ()
    extra = sites.tail_records

    def one(mapped: Sequence[Array], noise: Values) -> tuple[Any, Any, Values]:
        inputs = [*sites.traced.closed, *jax.tree.leaves(sites.problem.params), *mapped]
        outputs, records = forward(sites.level, inputs, noise, time, extra, taps)
        cut = len(outputs) - len(taps)
        losses, aux = jax.tree.unflatten(sites.traced.out_tree, outputs[:cut])
        return (losses, list(map(_sum, losses)), outputs[cut:]), aux, records

    if sites.num_examples is None:
        out, aux, records = one((), noise)
        return out, (aux, records)
    axes = {v: sites.axis_of(v) for v in sites.level.all_records() | extra}
    in_axes = (list(sites.problem.mapped_axes), {v: sites.axis_of(v) for v in noise})
    out_axes = ((0, 0, [sites.axis_of(v) for v in taps]), 0, axes)
    out, aux, records = jax.vmap(one, in_axes, out_axes, axis_size=sites.num_examples)(
        list(sites.problem.mapped), noise
    )
    return out, (aux, records)


def output_errors(sites: Sites, records: Values) -> Values:
    """The exact derivative of the objective with respect to each output site."""
    return _errors(sites, sites.tail, records)


def products(sites: Sites, out: Pass) -> list[Array]:
    """For each source its tangents times its error: slopes of the objective before they are summed."""
    assert sites.sources is not None
    errors = _errors(sites, sites.sources, out.records)
    return [
        _product(errors[v], x) for v, x in zip(sites.sources.starts, out.tangents, strict=True)
    ]


def _errors(sites: Sites, tail: Tail, records: Values) -> Values:
    """The derivative of the objective with respect to where a tail starts."""
    if not tail.starts:
        return {}
    used = {v: records[v] for v in tail.records}
    axes = {v: sites.axis_of(v) for v in used}
    shifts = {v: zeros(sites, v) for v in tail.starts}

    def objective(shifts: Values) -> Array:
        def one(shifts: Values, used: Values) -> Array:
            losses = tail.run(shifts, used)
            return sum(map(_sum, losses), start=jnp.zeros(()))

        if sites.num_examples is None:
            return one(shifts, used)
        each = jax.vmap(
            one, ({v: sites.axis_of(v) for v in shifts}, axes), axis_size=sites.num_examples
        )
        return jnp.mean(each(shifts, used))

    return jax.grad(objective)(shifts)


def zeros(sites: Sites, variable: Variable) -> Array:
    """An error of zero at a variable of the top level."""
    aval = sites.traced.types[variable]
    lead = (sites.num_examples,) if sites.axis_of(variable) == 0 else ()
    return _mesh.vary(jnp.zeros((*lead, *aval.shape), aval.dtype), _mesh.type_axes(aval))  # type: ignore[arg-type]


def assemble(sites: Sites, records: Values, errors: Mapping[Variable, Array]) -> Tree:
    """The gradient from the objective's error at sites: each region's own reverse pass, none across two.

    Sites without an error add nothing.
    """
    mine = [site for site in sites.places if site.variable in errors]

    def values(params: Tree) -> Values:
        outputs = regions(sites, params, records)
        return {site.variable: outputs[site.variable] for site in mine}

    _, pull = jax.vjp(values, sites.problem.params)
    return pull({site.variable: errors[site.variable].astype(site.dtype) for site in mine})[0]


def regions(
    sites: Sites,
    params: Tree,
    records: Values,
    apply: Callable[[Equation, list[Any]], list[Any]] = bind,
) -> Values:
    """The sites' values from parameters and records."""
    start = len(sites.traced.closed)
    leaves = jax.tree.leaves(params)
    names = sites.level.program.inputs[start : start + len(leaves)]

    def one(records: Values) -> Values:
        return local(sites.level, {**dict(zip(names, leaves, strict=True)), **records}, apply)

    used = {v: records[v] for v in sites.level.all_records()}
    if sites.num_examples is None:
        return one(used)
    outs = {site.variable: sites.axis_of(site.variable) for site in sites.places}
    axes = {v: sites.axis_of(v) for v in used}
    return jax.vmap(one, (axes,), outs, axis_size=sites.num_examples)(used)


def aligned(sites: Sites, params: Tree, feedback: Sequence[Array | None]) -> tuple[Array, Tree]:
    """`(value, aux)`, whose reverse pass crosses dots and convolutions through the feedback; None: as they are."""
    leaves = jax.tree.leaves(params)
    start = len(sites.traced.closed)
    names = sites.level.program.inputs[start : start + len(leaves)]
    twins = {
        v: lax.stop_gradient(x) for v, x in zip(names, feedback, strict=True) if x is not None
    }

    def one(mapped: Sequence[Array]) -> tuple[list[Array], Tree]:
        inputs = [*sites.traced.closed, *leaves, *mapped]
        outputs = forward_with_feedback(sites.level, sites.kinds, inputs, dict(twins))
        losses, aux = jax.tree.unflatten(sites.traced.out_tree, outputs)
        return losses, aux

    if sites.num_examples is not None:
        one = jax.vmap(one, (list(sites.problem.mapped_axes),), axis_size=sites.num_examples)
    losses, aux = one(list(sites.problem.mapped))
    return value(sites, losses), aux


def value(sites: Sites, losses: Sequence[Array]) -> Array:
    """The objective of the losses: their sum, and the mean over the examples."""
    sums = [
        jnp.sum(x) if sites.num_examples is None else jnp.sum(x.reshape(x.shape[0], -1), 1)
        for x in losses
    ]
    return jnp.mean(sum(sums[1:], start=sums[0]))


def push_along(run: Callable[[Any, Array], tuple[Any, Any]], noise: Any, num_tangents: int) -> Pass:
    """Evaluate the loss and its slopes along k noises.

    Args:
        run: takes one noise and the time, of which the tangent scales it, to `((losses, sums of
            losses, sources), (aux, records))`.
        noise: a tree with a leading axis k.
        num_tangents: the number k.
    """
    time = jnp.zeros((), jnp.float32)

    def slopes(noise: Any) -> tuple[list[Array], list[Array], list[Array], Any]:
        primal, tangent, rest = jax.jvp(lambda t: run(noise, t), (time,), (time + 1,), has_aux=True)
        return primal[0], tangent[1], tangent[2], rest

    if num_tangents == 1:
        losses, sums, taps, rest = slopes(jax.tree.map(lambda x: x[0], noise))
        sums, taps = [x[None] for x in sums], [x[None] for x in taps]
    else:
        losses, sums, taps, rest = jax.vmap(slopes, out_axes=(None, 0, 0, None))(noise)
    return Pass(losses, rest[0], sums, taps, rest[1])


def _product(error: Array, tangent: Array) -> Array:
    """Re(error · tangent) in at least float32; the error counts for each of k tangents."""
    wide = _tree.accumulation_dtype(jnp.promote_types(error.dtype, tangent.dtype))
    return jnp.real(error.astype(wide)[None] * tangent.astype(wide))


def num_losses(traced: Traced) -> int:
    """The number of parts of a traced loss."""
    return traced.out_tree.children()[0].num_leaves


def _sum(x: Array) -> Array:
    return jnp.sum(x.astype(_tree.accumulation_dtype(x.dtype)))
