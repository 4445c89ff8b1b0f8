"""Random signs that are unpacked where they are needed: until then 32 of them are a word."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from forwax._tree import Spec
from forwax.sites.order import behind
from forwax.tangents._base import draw_each, typed_key
from forwax.tangents.rademacher import WORD, draw_words, unpack_signs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Signs:
    """Signs ±1.

    Attributes:
        words: uint32, the first ones hold the first signs; further axes may lead.
        spec: shape and dtype of the signs.
        scale: what they are multiplied with.
    """

    words: Array
    spec: Spec = dataclasses.field(metadata={"static": True})
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})

    def __mul__(self, scale: float) -> "Signs":
        return dataclasses.replace(self, scale=self.scale * scale)

    def unpack(self) -> Array:
        """The signs themselves, behind the further axes of the words."""
        lead = self.words.shape[:-1]
        if math.prod(lead) == 1:
            found = settled(unpack_signs(self.words.reshape(-1), self.spec))
        else:
            one = lambda words: settled(unpack_signs(words, self.spec))  # noqa: E731
            found = jax.vmap(one)(self.words.reshape(-1, self.words.shape[-1]))
        return found.reshape(*lead, *self.spec.shape) * self.scale

    @property
    def has_rows(self) -> bool:
        """Whether the words can be cut like the signs along their first axis."""
        return len(self.spec.shape) > 0 and math.prod(self.spec.shape[1:]) % WORD == 0

    def rows(self) -> "Signs":
        """The same, of which one row each is a slice along the first axis: for words without further axes."""
        words = self.words.reshape(self.spec.shape[0], math.prod(self.spec.shape[1:]) // WORD)
        return Signs(words, Spec(self.spec.shape[1:], self.spec.dtype), self.scale)


def draw_signs(key: Array, specs: Sequence[Spec], indices: Array) -> list[Signs]:
    """The signs of the tangents of the given indices [c], as `Rademacher` draws them; words with a leading axis c."""
    words = draw_each(draw_words, typed_key(key), specs, indices)
    return [Signs(each, spec) for each, spec in zip(words, specs, strict=True)]


def settled(signs: Array) -> Array:
    """Unpacked signs, made once: they are their own inverses, and no compiler repeats a division for each use.

    Without it the bits of a factor's sign are unpacked anew for every entry of the products that it enters.
    """
    return 1 / signs


def unpacked(drawn: Sequence[Array | Signs]) -> list[Array]:
    """What was drawn, all of it unpacked."""
    return [x.unpack() if isinstance(x, Signs) else jnp.asarray(x) for x in drawn]


def after(drawn: Sequence[Array | Signs], known: Sequence[Array]) -> list[Array | Signs]:
    """What was drawn, its words known only when something else is: else signs are unpacked before they are needed."""
    return [dataclasses.replace(x, words=behind(x.words, known)) if isinstance(x, Signs) else x for x in drawn]
