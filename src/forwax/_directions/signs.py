"""Random signs that are unpacked where they are needed: until then 32 of them are a word."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax._programs.order import behind
from forwax._tree import Spec
from forwax.tangents._base import draw_each, typed_key
from forwax.tangents.rademacher import (
    WORD,
    draw_words,
    draws_anywhere,
    num_words,
    unpack_signs,
    words_at,
)


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

    def draw(self) -> Array:
        """The words [*lead, count]."""
        draw = lambda key, start: words_at(key, start + jnp.arange(self.count, dtype=jnp.uint32))  # noqa: E731
        for _ in self.start.shape:
            draw = jax.vmap(draw)
        return draw(self.key, self.start)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Signs:
    """Signs ±1.

    Attributes:
        words: uint32, the first ones hold the first signs; further axes may lead. Or where they are
            drawn from.
        spec: shape and dtype of the signs.
        scale: what they are multiplied with.
    """

    words: Array | Places
    spec: Spec = dataclasses.field(metadata={"static": True})
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})

    def __mul__(self, scale: float) -> "Signs":
        return dataclasses.replace(self, scale=self.scale * scale)

    def unpack(self) -> Array:
        """The signs themselves, behind the further axes of the words."""
        words = self.words.draw() if isinstance(self.words, Places) else self.words
        lead = words.shape[:-1]
        if math.prod(lead) == 1:
            found = settled(unpack_signs(words.reshape(-1), self.spec))
        else:
            one = lambda words: settled(unpack_signs(words, self.spec))  # noqa: E731
            found = jax.vmap(one)(words.reshape(math.prod(lead), words.shape[-1]))
        return found.reshape(*lead, *self.spec.shape) * self.scale

    def tangent(self, index: Array | int) -> "Signs":
        """Those of one tangent, for words with one further axis."""
        return dataclasses.replace(self, words=jax.tree.map(lambda x: x[index], self.words))

    def after(self, known: Sequence[Array]) -> "Signs":
        """The same, known only when something else is."""
        words = self.words
        if isinstance(words, Places):
            return dataclasses.replace(
                self, words=dataclasses.replace(words, start=behind(words.start, known))
            )
        return dataclasses.replace(self, words=behind(words, known))

    @property
    def has_rows(self) -> bool:
        """Whether the words can be cut like the signs along their first axis."""
        return has_rows(self.spec)

    @property
    def drawn_by_rows(self) -> bool:
        """Whether each row's words are best drawn where it is used."""
        return isinstance(self.words, Places) and self.has_rows

    def row(self, index: Array) -> "Signs":
        """One slice along the first axis, of signs that have rows."""
        spec = Spec(self.spec.shape[1:], self.spec.dtype)
        count = num_words(spec)
        if isinstance(self.words, Places):
            start = self.words.start + jnp.asarray(index, jnp.uint32) * jnp.uint32(count)
            return Signs(Places(self.words.key, start, count), spec, self.scale)
        words = self.words.reshape(*self.words.shape[:-1], -1, count)
        return Signs(lax.dynamic_index_in_dim(words, index, -2, keepdims=False), spec, self.scale)


def has_rows(spec: Spec, least: int = WORD) -> bool:
    """Whether signs have several rows along their first axis, in whole words and of so many signs at least."""
    row = math.prod(spec.shape[1:])
    return len(spec.shape) > 0 and spec.shape[0] > 1 and row % WORD == 0 and row >= least


def draw_signs(
    key: Array, specs: Sequence[Spec], indices: Array, later: Sequence[bool] = ()
) -> list[Signs]:
    """The signs of the tangents of the given indices [c], as `Rademacher` draws them; words with a leading axis c.

    Args:
        key: PRNG key.
        specs: shape and dtype of each array of signs.
        indices: which tangents.
        later: for each spec whether its words are drawn where they are used, if the key's generator
            can.
    """
    key, counts = typed_key(key), list(map(num_words, specs))
    if not any(later) or not draws_anywhere(key) or sum(counts) >= 1 << WORD:
        words = draw_each(draw_words, key, specs, indices)
        return [Signs(each, spec) for each, spec in zip(words, specs, strict=True)]
    keys = jax.vmap(lambda index: jax.random.key_data(jax.random.fold_in(key, index)))(indices)
    starts, now = (
        list(itertools.accumulate(counts, initial=0)),
        [i for i, late in enumerate(later) if not late],
    )
    held: dict[int, Array] = {}
    if now:
        places = [jnp.arange(starts[i], starts[i + 1], dtype=jnp.uint32) for i in now]
        words = jax.vmap(words_at, (0, None))(keys, jnp.concatenate(places))
        cuts = list(itertools.accumulate(counts[i] for i in now))[:-1]
        held = dict(zip(now, jnp.split(words, cuts, axis=1), strict=True))

    def source(i: int) -> Array | Places:
        return (
            held[i]
            if i in held
            else Places(keys, jnp.full(indices.shape, starts[i], jnp.uint32), counts[i])
        )

    return [Signs(source(i), spec) for i, spec in enumerate(specs)]


def settled(signs: Array) -> Array:
    """Unpacked signs, made once: they are their own inverses, and no compiler repeats a division for each use.

    Without it the bits of a factor's sign are unpacked anew for every entry of the products that it
    enters.
    """
    return 1 / signs


def unpacked(drawn: Sequence[Array | Signs]) -> list[Array]:
    """What was drawn, all of it unpacked."""
    return [x.unpack() if isinstance(x, Signs) else jnp.asarray(x) for x in drawn]


def after(drawn: Sequence[Array | Signs], known: Sequence[Array]) -> list[Array | Signs]:
    """What was drawn, its words known only when something else is: else signs are unpacked before they are needed."""
    return [x.after(known) if isinstance(x, Signs) else x for x in drawn]
