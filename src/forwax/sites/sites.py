"""A problem's sites: values, slopes and errors at them, and from errors to gradients: what the rules use."""

import dataclasses
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
        sites: in the program's order.
        mapped: the variables that differ between examples.
        kinds: what each variable is made of.
    """

    problem: Problem
    traced: Traced
    level: Level
    tail: Tail
    sources: Tail | None
    credit: Mapping[Variable, Sequence[Credit]]
    sites: tuple[Site, ...]
    mapped: set[Variable]
    kinds: Kinds

    @property
    def noisy(self) -> list[Site]:
        """The sites that noise is put on."""
        return [site for site in self.sites if not site.exact]

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

    def with_slopes_of_loops(self) -> "Sites":
        """The same sites, but each step of a loop shares its slopes with the others."""

        def coarser(site: Site, credit: Credit) -> Credit:
            first = self.num_loops(site)
            links = tuple(
                (a, link) for a, link in credit.links if link.size == 1 or link.axis >= first
            )
            return dataclasses.replace(credit, links=links)

        credit = {
            s.variable: [coarser(s, c) for c in self.credit.get(s.variable, ())] for s in self.noisy
        }
        return dataclasses.replace(self, credit=credit if self.credit else {})

    def of_a_step(self, site: Site, slopes: Array) -> Array:
        """Slopes without the axes of loops, along which they are the same."""
        lead = slopes.ndim - len(site.shape)
        return (
            jnp.squeeze(slopes, tuple(range(lead, lead + self.num_loops(site))))
            if self.credit
            else slopes
        )

    def shared_noise(self, site: Site, other: Site, own_slopes: bool = True) -> float:
        """How many coordinates of another site's noise one slope of this site hears, on average.

        Unless examples have slopes of their own and the site a value of its own for each, it hears
        all examples'.
        """
        examples = (
            1 if self.num_examples is None or (own_slopes and site.mapped) else self.num_examples
        )
        size = other.size * (examples if other.mapped else 1)
        if not self.credit:
            return size if other.reach & site.reach else 0
        theirs = {credit.source: credit for credit in self.credit[other.variable]}
        heard = [
            (mine, theirs[mine.source])
            for mine in self.credit[site.variable]
            if mine.source in theirs
        ]
        return max((size / mine.common(their) for mine, their in heard), default=0)

    def push(self, noise: Sequence[Array] = (), num_tangents: int = 1) -> Pass:
        """Evaluate the loss, and its slopes along k noises [k, *spec]; with no noise there are no slopes."""
        table = dict(zip([site.variable for site in self.noisy], noise, strict=False))
        if not table:
            (losses, *_), (aux, records) = self._run({}, None)
            return Pass(losses, aux, [], [], records)
        return push_along(self._run, table, num_tangents)

    def _run(self, noise: Values, time: Array | None) -> tuple[Any, Any]:
        """`((losses, sums of losses, sources), (aux, records))`; each with a leading axis of examples."""
        taps = self.sources.starts if self.sources is not None else ()
        extra = self.tail_records

        def one(mapped: Sequence[Array], noise: Values) -> tuple[Any, Any, Values]:
            inputs = [*self.traced.closed, *jax.tree.leaves(self.problem.params), *mapped]
            outputs, records = forward(self.level, inputs, noise, time, extra, taps)
            cut = len(outputs) - len(taps)
            losses, aux = jax.tree.unflatten(self.traced.out_tree, outputs[:cut])
            return (losses, list(map(_sum, losses)), outputs[cut:]), aux, records

        if self.num_examples is None:
            out, aux, records = one((), noise)
            return out, (aux, records)
        axes = {v: self._axis(v) for v in self.level.all_records() | extra}
        in_axes = (list(self.problem.mapped_axes), {v: self._axis(v) for v in noise})
        out_axes = ((0, 0, [self._axis(v) for v in taps]), 0, axes)
        out, aux, records = jax.vmap(one, in_axes, out_axes, axis_size=self.num_examples)(
            list(self.problem.mapped), noise
        )
        return out, (aux, records)

    def _axis(self, variable: Variable) -> int | None:
        return 0 if self.num_examples is not None and variable in self.mapped else None

    def output_errors(self, records: Values) -> Values:
        """The exact derivative of the objective with respect to each output site."""
        return self._errors(self.tail, records)

    def products(self, out: Pass) -> list[Array]:
        """For each source its tangents times its error: slopes of the objective before they are summed."""
        assert self.sources is not None
        errors = self._errors(self.sources, out.records)
        return [
            _product(errors[v], x) for v, x in zip(self.sources.starts, out.tangents, strict=True)
        ]

    def _errors(self, tail: Tail, records: Values) -> Values:
        """The derivative of the objective with respect to where a tail starts."""
        if not tail.starts:
            return {}
        used = {v: records[v] for v in tail.records}
        axes = {v: self._axis(v) for v in used}
        shifts = {v: self.zeros(v) for v in tail.starts}

        def objective(shifts: Values) -> Array:
            def one(shifts: Values, used: Values) -> Array:
                losses = tail.run(shifts, used)
                return sum(map(_sum, losses), start=jnp.zeros(()))

            if self.num_examples is None:
                return one(shifts, used)
            each = jax.vmap(
                one, ({v: self._axis(v) for v in shifts}, axes), axis_size=self.num_examples
            )
            return jnp.mean(each(shifts, used))

        return jax.grad(objective)(shifts)

    def zeros(self, variable: Variable) -> Array:
        """An error of zero at a variable of the top level."""
        aval = self.traced.types[variable]
        lead = (self.num_examples,) if self._axis(variable) == 0 else ()
        return _mesh.vary(jnp.zeros((*lead, *aval.shape), aval.dtype), _mesh.type_axes(aval))  # type: ignore[arg-type]

    def assemble(self, records: Values, errors: Mapping[Variable, Array]) -> Tree:
        """The gradient from the objective's error at sites: each region's own reverse pass, none across two.

        Sites without an error add nothing.
        """
        mine = [site for site in self.sites if site.variable in errors]

        def values(params: Tree) -> Values:
            outputs = self.regions(params, records)
            return {site.variable: outputs[site.variable] for site in mine}

        _, pull = jax.vjp(values, self.problem.params)
        return pull({site.variable: errors[site.variable].astype(site.dtype) for site in mine})[0]

    def regions(
        self,
        params: Tree,
        records: Values,
        apply: Callable[[Equation, list[Any]], list[Any]] = bind,
    ) -> Values:
        """The sites' values from parameters and records."""
        start = len(self.traced.closed)
        leaves = jax.tree.leaves(params)
        names = self.level.program.inputs[start : start + len(leaves)]

        def one(records: Values) -> Values:
            return local(self.level, {**dict(zip(names, leaves, strict=True)), **records}, apply)

        used = {v: records[v] for v in self.level.all_records()}
        if self.num_examples is None:
            return one(used)
        outs = {site.variable: self._axis(site.variable) for site in self.sites}
        axes = {v: self._axis(v) for v in used}
        return jax.vmap(one, (axes,), outs, axis_size=self.num_examples)(used)

    def aligned(self, params: Tree, feedback: Sequence[Array | None]) -> tuple[Array, Tree]:
        """`(value, aux)`, whose reverse pass crosses dots and convolutions through the feedback; None: as they are."""
        leaves = jax.tree.leaves(params)
        start = len(self.traced.closed)
        names = self.level.program.inputs[start : start + len(leaves)]
        twins = {
            v: lax.stop_gradient(x) for v, x in zip(names, feedback, strict=True) if x is not None
        }

        def one(mapped: Sequence[Array]) -> tuple[list[Array], Tree]:
            inputs = [*self.traced.closed, *leaves, *mapped]
            outputs = forward_with_feedback(self.level, self.kinds, inputs, dict(twins))
            losses, aux = jax.tree.unflatten(self.traced.out_tree, outputs)
            return losses, aux

        if self.num_examples is not None:
            one = jax.vmap(one, (list(self.problem.mapped_axes),), axis_size=self.num_examples)
        losses, aux = one(list(self.problem.mapped))
        return self.value(losses), aux

    def value(self, losses: Sequence[Array]) -> Array:
        """The objective of the losses: their sum, and the mean over the examples."""
        sums = [
            jnp.sum(x) if self.num_examples is None else jnp.sum(x.reshape(x.shape[0], -1), 1)
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
