"""A problem's sites as data: what the rules read."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax import Array

from forwax import _mesh, _tree
from forwax._programs.dataflow import Reach
from forwax._programs.evaluate import Values
from forwax._programs.program import Traced, Variable
from forwax._signature import Problem
from forwax._sites.credit import Credit
from forwax._sites.levels import Level
from forwax._sites.outputs import Tail
from forwax._sites.products import Kinds, Products
from forwax._sites.regions import Region
from forwax._tree import Spec, Tree


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
        scale: of its noise, where the rule is given none.
    """

    variable: Variable
    region: Region
    shape: tuple[int, ...]
    dtype: Any
    mapped: bool
    reach: int
    exact: bool
    axes: _mesh.Axes
    scale: float = 1

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
        products: where trained weights meet data.
        reach: the losses that each variable reaches, as a bit mask.
        summed: the mesh axes over which the losses are each device's part of the user's.
    """

    problem: Problem
    traced: Traced
    level: Level
    tail: Tail
    sources: Tail | None
    credit: Mapping[Variable, Sequence[Credit]]
    places: tuple[Site, ...]
    mapped: set[Variable]
    products: Products
    reach: Reach
    summed: _mesh.Axes = frozenset()

    @property
    def kinds(self) -> Kinds:
        """What each variable is made of."""
        return self.products.kinds

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

    @property
    def num_losses(self) -> int:
        """The number of parts of the loss."""
        return num_losses(self.traced)

    @property
    def tail_records(self) -> frozenset[Variable]:
        """The values that the errors of output sites and sources are made from."""
        if self.sources is None:
            return self.tail.records
        return self.tail.records | self.sources.records

    def specs(self) -> list[Spec]:
        """Shape and dtype of the noise at each noisy site, all examples together."""
        specs: list[Spec] = []
        for site in self.noisy:
            shape = site.shape  # [*loops, *own axes]
            if site.mapped and self.num_examples is not None:
                shape = (self.num_examples, *shape)
            specs.append(Spec(shape, site.dtype))
        return specs

    def num_loops(self, site: Site) -> int:
        """The number of loops around a site: each is an axis of its noise."""
        return len(site.shape) - len(self.own_shape(site))

    def axis_of(self, variable: Variable) -> int | None:
        """The axis of examples of a variable's values; None where examples share it."""
        has_axis = self.num_examples is not None and variable in self.mapped
        return 0 if has_axis else None


def num_losses(traced: Traced) -> int:
    """The number of parts of a traced loss."""
    return traced.out_tree.children()[0].num_leaves
