"""How directions of signs are drawn and added, whole or in factors; no loss is needed for it."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import ClassVar, TypeAlias, cast

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _tree
from forwax._directions.add import FEW
from forwax._directions.direction import Direction, Unpacked, Whole
from forwax._directions.factored import Factored, Sides
from forwax._directions.rounding import NEAREST, Rounding
from forwax._directions.signs import Signs, draw_signs
from forwax._directions.splits import Split
from forwax._directions.steps import Steps
from forwax._tree import Spec, Tree

Drawn: TypeAlias = Array | Signs


@dataclasses.dataclass(frozen=True, eq=False)
class Drawing:
    """How each parameter's tangent is drawn, and added to it.

    Attributes:
        params: the parameters.
        splits: for each leaf of the parameters the axes of its two factors, or None for dense
            signs.
        rank: the pairs of factors of each tangent.
        examples: how many examples have tangents of their own; None where all share them.
        lazy: whether all signs stay packed until they are used first, so that few leaves' are held
            at a time.
        rows: for each spec whether rows of its signs are drawn one by one; empty for none.
    """

    in_loop: ClassVar[bool] = True
    """Whether they are drawn in a loop over terms, out of which nothing is to be taken."""

    params: Tree
    splits: tuple[Split | None, ...]
    rank: int = 1
    examples: int | None = None
    lazy: bool = False
    rows: tuple[bool, ...] = ()

    @property
    def leaves(self) -> list[Array]:
        """The parameters."""
        return jax.tree.leaves(self.params)

    @property
    def num_examples(self) -> int:
        """How many examples have tangents of their own; 1 where all share them."""
        return self.examples or 1

    @property
    def together(self) -> int:
        """See `Directions.together`; dense signs are added one by one, thin factors in one pass."""
        return 1 if self.lazy else max(1, FEW // (self.rank * self.num_examples))

    def specs(self) -> list[Spec]:
        """What is drawn for one tangent: for each leaf dense signs, or two factors a rank."""
        lead = () if self.examples is None else (self.examples,)
        specs: list[Spec] = []
        for leaf, split in zip(self.leaves, self.splits, strict=True):
            if split is None:
                shapes = [leaf.shape]
            else:
                sides = [
                    _factor_shape(leaf.shape, axes) for axes in split
                ]  # left, right
                shapes = sides * self.rank
            for shape in shapes:
                specs.append(Spec((*lead, *shape), leaf.dtype))
        return specs

    def sampler(self, key: Array) -> Callable[[Array], list[Drawn]]:
        """See `Directions.sampler`."""
        return partial(self.draw, key)

    def draw(self, key: Array, indices: Array) -> list[Drawn]:
        """The signs of the tangents of the given indices [c], with a leading axis c.

        Those that a scan slices stay packed.
        """
        specs = self.specs()
        real_specs = _tree.real_specs(specs)
        later = self.later()
        signs = draw_signs(key, real_specs, indices, later, in_loop=self.in_loop)
        packed = self.packed()
        drawn: list[Drawn] = []
        for i, (each, spec) in enumerate(zip(signs, specs, strict=True)):
            if packed[i] and not _tree.is_complex(spec):
                drawn.append(each)
                continue
            array = each.unpack()  # [c, *shape]; of a complex spec [c, 2, *shape]
            drawn += _tree.from_real([array], [spec], lead=1)
        return drawn

    def packed(self) -> list[bool]:
        """For each spec whether its signs stay packed until a scan or something else uses them."""
        if self.lazy:
            return [True] * len(self.specs())
        return [sliced and self.examples is None for sliced in self.sliced()]

    def later(self) -> Sequence[bool]:
        """For each spec whether its words are drawn where its rows are used."""
        return self.rows

    def sliced(self) -> list[bool]:
        """For each spec whether scans slice its parameter, and nothing else uses it."""
        return [False] * len(self.specs())  # not known without the loss

    def directions(self, drawn: Sequence[Drawn]) -> list[Direction]:
        """The drawn signs as one direction for each leaf."""
        scale = self.rank**-0.5  # so that E[v vᵀ] = I at every rank
        parts = iter(map(_whole, drawn))
        directions: list[Direction] = []
        for split in self.splits:
            if split is None:
                directions.append(next(parts))
                continue
            sides: list[Sides] = []
            for _ in range(self.rank):
                left = next(parts) * scale
                sides.append((left, next(parts)))
            directions.append(Factored(tuple(sides)))
        return directions

    def assemble(self, weights: Array, drawn: Sequence[Drawn]) -> Tree:
        """Σ c v in at least float32, over tangents and examples with their own: [k] or [k, N]."""
        directions = self._late(weights, drawn)
        sums = [
            direction.sum(weights, leaf)
            for direction, leaf in zip(directions, self.leaves, strict=True)
        ]
        return self.tree_of(sums)

    def add(
        self,
        total: Tree,
        weights: Array,
        drawn: Sequence[Drawn],
        rounding: Rounding = NEAREST,
        steps: Steps | None = None,
    ) -> Tree:
        """Total + Σ c v, in place where it is donated: no summand is held; see `assemble`.

        With the steps that the directions' slopes were taken with, Σ c v / s.
        """
        directions = self._late(weights, drawn)
        totals: list[Array] = []
        for i, leaf in enumerate(jax.tree.leaves(total)):
            own = weights
            if steps is not None and steps.by_leaf:
                own = weights / steps.factor(leaf).reshape(()).astype(weights.dtype)
            elif steps is not None:
                signs = cast(Signs, directions[i])
                directions[i] = dataclasses.replace(signs, divisor=steps.factor)
            new = directions[i].add(leaf, own, rounding.of(i))
            totals.append(new)
        return self.tree_of(totals)

    def _late(self, weights: Array, drawn: Sequence[Drawn]) -> list[Direction]:
        """The directions, unpacked once the weights are known."""
        directions = self.directions(drawn)
        return [direction.after([weights]) for direction in directions]

    def tree_of(self, leaves: Iterable[Array]) -> Tree:
        """Leaves as a tree like the parameters."""
        structure = jax.tree.structure(self.params)
        return structure.unflatten(leaves)


def _factor_shape(shape: tuple[int, ...], axes: frozenset[int]) -> tuple[int, ...]:
    sizes = [n if axis in axes else 1 for axis, n in enumerate(shape)]
    return tuple(sizes)


def _whole(drawn: Drawn) -> Whole:
    return drawn if isinstance(drawn, Signs) else Unpacked(jnp.asarray(drawn))
