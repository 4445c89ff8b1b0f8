"""Random signs that are unpacked where they are needed: until then 32 of them are a word."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax import _mesh, _tree
from forwax._directions.direction import RowOf, Whole
from forwax._directions.rounding import NEAREST, Rounding
from forwax._programs.order import behind
from forwax._tree import Spec
from forwax.tangents._base import draw_each, typed_key
from forwax.tangents.rademacher import (
    WORD,
    draw_words,
    draws_anywhere,
    num_words,
    padded,
    unpack_signs,
    words_at,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Words:
    """Words that are held.

    Attributes:
        values: uint32 [*lead, count].
    """

    values: Array

    @property
    def drawn_late(self) -> bool:
        """Whether they are drawn where they are used."""
        return False

    def draw(self) -> Array:
        """The words [*lead, count]."""
        return self.values

    def after(self, known: Sequence[Array]) -> "Words":
        """The same, known only when something else is."""
        return Words(behind(self.values, known))

    def row(self, index: Array, count: int) -> "Words":
        """The words of one row, of so many words each."""
        lead = self.values.shape[:-1]
        rows = self.values.reshape(*lead, -1, count)
        row = lax.dynamic_index_in_dim(
            rows, index, -2, keepdims=False
        )  # [*lead, count]
        return Words(row)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Places:
    """Words that are drawn where they are used: what a key draws from one place on.

    Attributes:
        key: the key's own words [*lead, 2].
        start: the place of the first word, uint32 [*lead].
        count: how many there are.
    """

    key: Array
    start: Array
    count: int = dataclasses.field(metadata={"static": True})

    @property
    def drawn_late(self) -> bool:
        """Whether they are drawn where they are used."""
        return True

    def draw(self) -> Array:
        """The words [*lead, count]."""

        def draw(key: Array, start: Array) -> Array:
            offsets = jnp.arange(self.count, dtype=jnp.uint32)
            return words_at(key, start + offsets)

        for _ in self.start.shape:  # the leading axes
            draw = jax.vmap(draw)
        return draw(self.key, self.start)

    def after(self, known: Sequence[Array]) -> "Places":
        """The same, known only when something else is."""
        return dataclasses.replace(self, start=behind(self.start, known))

    def row(self, index: Array, count: int) -> "Places":
        """The words of one row, of so many words each."""
        index = jnp.asarray(index, jnp.uint32)
        start = self.start + index * jnp.uint32(count)
        return Places(self.key, start, count)


Source: TypeAlias = Words | Places

Divisor: TypeAlias = Callable[[Array], Array]
"""Takes a parameter, or a row of it, to the factor s of each entry."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Signs(Whole):
    """Signs ±1.

    Attributes:
        words: the first ones hold the first signs; further axes may lead.
        spec: shape and dtype of the signs.
        scale: what they are multiplied with.
        divisor: what `add` divides them by; None for nothing.
    """

    words: Source
    spec: Spec = dataclasses.field(metadata={"static": True})
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    divisor: Divisor | None = dataclasses.field(default=None, metadata={"static": True})

    def __mul__(self, scale: float) -> "Signs":
        return dataclasses.replace(self, scale=self.scale * scale)

    def after(self, known: Sequence[Array]) -> "Signs":
        """See `Direction.after`."""
        return dataclasses.replace(self, words=self.words.after(known))

    def unpack(self) -> Array:
        """The signs themselves, behind the further axes of the words: [*lead, *shape]."""

        def one(words: Array) -> Array:
            return settled(unpack_signs(words, self.spec))

        words = self.words.draw()  # [*lead, count]
        lead = words.shape[:-1]
        num_tangents = math.prod(lead)
        if num_tangents == 1:
            signs = one(words.reshape(-1))
        else:
            flat = words.reshape(num_tangents, words.shape[-1])  # [k, count]
            signs = jax.vmap(one)(flat)
        signs = signs.reshape(*lead, *self.spec.shape)
        return signs * self.scale

    def at(self, index: Array | int) -> "Signs":
        """Those of one tangent, for words with one further axis."""
        words = jax.tree.map(lambda x: x[index], self.words)
        return dataclasses.replace(self, words=words)

    @property
    def has_rows(self) -> bool:
        """Whether the words can be cut like the signs along their first axis."""
        return has_rows(self.spec)

    def row(self, index: Array) -> "Signs":
        """One slice along the first axis, of signs that have rows."""
        spec = Spec(self.spec.shape[1:], self.spec.dtype)
        words = self.words.row(index, num_words(spec))
        return dataclasses.replace(self, words=words, spec=spec)

    def rows(self) -> tuple[Any, RowOf]:
        """See `Direction.rows`; a step takes its own row of the words, which are not sliced."""
        if self.has_rows:
            return None, lambda _, index: self.row(index)
        return self.unpacked().rows()

    def sum(self, weights: Array, leaf: Array) -> Array:
        """See `Direction.sum`; one tangent after the other."""
        dtype = _tree.accumulation_dtype(leaf.dtype)
        start = jnp.zeros(leaf.shape, dtype)
        if not self._drawn_by_rows:
            return self._added(start, weights)

        def sum_row(i: Array) -> Array:
            return self.row(i)._added(start[0], weights)

        return lax.map(sum_row, jnp.arange(len(leaf)))

    def add(self, leaf: Array, weights: Array, rounding: Rounding = NEAREST) -> Array:
        """See `Direction.add`; one tangent after the other."""
        dtype = _tree.accumulation_dtype(leaf.dtype)

        def added(signs: Signs, part: Array, offset: Array | int) -> Array:
            wide = part.astype(dtype)
            if self.divisor is None:
                total = signs._added(wide, weights)
            else:
                divisor = self.divisor(part).astype(dtype)
                total = signs._added(wide, weights, divisor)
            return rounding.cast(total, part.dtype, offset)

        if not self._drawn_by_rows:
            return added(self, leaf, 0)

        def add_row(i: Array, leaf: Array) -> Array:
            row = leaf[i]
            new = added(self.row(i), row, i * row.size)
            return leaf.at[i].set(new)

        return lax.fori_loop(0, len(leaf), add_row, leaf)

    @property
    def _drawn_by_rows(self) -> bool:
        """Whether each row's words are best drawn where it is used."""
        return self.words.drawn_late and self.has_rows

    def _added(
        self, total: Array, weights: Array, divisor: Array | None = None
    ) -> Array:
        """Total + Σ c v over the tangents [k], one after the other: none is held.

        Added up in one pass they are unpacked entry by entry, which takes ten times as long.
        """

        def add(j: Array | int, total: Array) -> Array:
            weight = weights[j].astype(total.dtype)
            signs = self.at(j).unpack()
            if divisor is not None:
                weight = weight / divisor
            return total + weight * signs.astype(total.dtype)

        num_tangents = len(weights)
        if num_tangents == 1:
            return add(0, total)
        over = _mesh.axes(add(0, total))  # a loop's carry keeps its type
        start = _mesh.vary(total, over)
        return lax.fori_loop(0, num_tangents, add, start)


def has_rows(spec: Spec, least: int = WORD) -> bool:
    """Whether signs have several rows along their first axis, in whole words, of so many signs."""
    if not spec.shape or spec.shape[0] < 2:
        return False
    size = math.prod(spec.shape[1:])
    return size % WORD == 0 and size >= least


def draw_signs(
    key: Array,
    specs: Sequence[Spec],
    indices: Array,
    later: Sequence[bool] = (),
    *,
    in_loop: bool = False,
) -> list[Signs]:
    """The signs of the tangents of the given indices [c], as `Rademacher` draws them.

    Args:
        key: PRNG key.
        specs: shape and dtype of each array of signs.
        indices: which tangents.
        later: for each spec whether its words are drawn where they are used, if the key's generator
            can.
        in_loop: whether they are drawn in a loop out of which no compiler is to take a part.

    Returns:
        Signs for each spec, their words with a leading axis c.
    """
    key = typed_key(key)
    num_all = sum(map(num_words, specs))
    has_places = draws_anywhere(key) and num_all < 1 << WORD  # they are uint32
    sources: list[Source]
    if (any(later) or in_loop) and has_places:
        sources = _some_later(key, specs, indices, later, in_loop)
    else:
        words = draw_each(draw_words, key, specs, indices)
        sources = [Words(each) for each in words]
    pairs = zip(sources, specs, strict=True)
    return [Signs(source, spec) for source, spec in pairs]


def _some_later(
    key: Array,
    specs: Sequence[Spec],
    indices: Array,
    later: Sequence[bool],
    in_loop: bool,
) -> list[Source]:
    """Where each spec's words come from: from their places, or drawn at once, in one draw."""

    def key_words(index: Array) -> Array:
        own = jax.random.fold_in(key, index)
        return jax.random.key_data(own)

    keys = jax.vmap(key_words)(indices)  # [c, 2]
    counts = [num_words(spec) for spec in specs]
    starts = list(itertools.accumulate(counts, initial=0))
    now = [i for i in range(len(specs)) if not (later and later[i])]
    held: dict[int, Array] = {}
    if now:
        # of all words that are drawn now, side by side
        one = jnp.uint32(1)
        if in_loop:  # places that are made before it would be held
            keys, one = lax.optimization_barrier((keys, one))
        own_counts = [counts[i] for i in now]
        # What is behind the last place makes it a number of words that is drawn fast.
        num_idle = padded(sum(own_counts)) - sum(own_counts)
        pieces = [(starts[i], counts[i]) for i in now] + [(starts[-1], num_idle)]
        if len(now) == len(specs):  # they lie in one piece
            pieces = [(0, starts[-1] + num_idle)]
        ranges = [
            start + one * jnp.arange(count, dtype=jnp.uint32) for start, count in pieces
        ]
        places = jnp.concatenate(ranges)
        if len(indices) == 1:  # a batch of one is slower
            words = words_at(keys[0], places)[None]
        else:
            draw = jax.vmap(words_at, (0, None))
            words = draw(keys, places)  # [c, words]
        ends = list(itertools.accumulate(own_counts))
        parts = jnp.split(words, ends, axis=1)[:-1]
        held = dict(zip(now, parts, strict=True))
    sources: list[Source] = []
    for i, count in enumerate(counts):
        if i in held:
            sources.append(Words(held[i]))
        else:
            start = jnp.full(indices.shape, starts[i], jnp.uint32)
            sources.append(Places(keys, start, count))
    return sources


def settled(signs: Array) -> Array:
    """Unpacked signs, made once: they are their own inverses, and no compiler repeats a division.

    Without it the bits of a factor's sign are unpacked anew for every entry of the products that it
    enters.
    """
    return 1 / signs
