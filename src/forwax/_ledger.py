"""A run as a list of slopes, from which its parameters are rebuilt, bit for bit.

MeZO (Malladi et al. 2023, arXiv 2305.17333) keeps seeds and projected gradients in place of
checkpoints; here with checksums, and for any number of keys.
"""

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from forwax import _tree
from forwax._checks import check_count
from forwax._ledger_file import UNKNOWN, RowFile, digest_of
from forwax._ledger_header import (
    differences,
    digest_of_params,
    environment,
    is_finite_rate,
    key_from_json,
    momentum_from_json,
    momentum_to_json,
    rule_from_json,
    rule_to_json,
)
from forwax._momentum import Momentum
from forwax._replay import check_rounding, checked, form_for, replay
from forwax._rules import Rule
from forwax._signature import check_key, check_leaves
from forwax._slopes import Slopes, derived, form_of, without_factors
from forwax._tree import Tree
from forwax.tangents._base import typed_key

_BLOCK = 256
"""So many rows are replayed by one call of a compiled loop."""


class Ledger:
    """A file with the slopes of each step of a run, 12 + 4sk bytes a row.

    From the parameters at the start and this file `replay` rebuilds those after any step, in every
    bit with the same forwax, jax, jaxlib and kind of machine. Keys are not kept: the key of step t
    is `jax.random.fold_in(key, t)`, with s keys a step their data are those of
    `jax.random.fold_in(jax.random.fold_in(key, t), i)`.

    A row is written in one piece. Where a process is killed in the middle the cut row is dropped,
    with a warning, when the file is opened, and the next one is written over it. Every row has a
    checksum, and nothing else is ever written over. The page "Many machines" has the format byte
    by byte.

    What it does not keep: weight decay, other optimisers than gradient descent with or without
    `Momentum`, and what `Safe` remembers; append what it let through. Iterate over rows to do such
    things yourself.

    Example:
        >>> import jax, jax.numpy as jnp, os, tempfile, forwax as fx
        >>> loss, rule, key = lambda w: jnp.sum(w**2), fx.WeightPerturbation(), jax.random.key(0)
        >>> start = w = jnp.ones(3)
        >>> path = os.path.join(tempfile.mkdtemp(), "run.ledger")
        >>> with fx.Ledger.create(path, rule, w, key) as ledger:
        ...     for i in range(5):
        ...         value, slopes = fx.slopes(loss, rule)(jax.random.fold_in(key, i), w)
        ...         w = fx.replay(loss, rule)(slopes, 0.1, w)
        ...         ledger.append(i, slopes, 0.1)
        >>> with fx.Ledger.open(path) as ledger:
        ...     rebuilt = ledger.replay(loss, start)
        >>> len(ledger), bool(jnp.all(rebuilt == w))
        (5, True)
    """

    def __init__(self, file: RowFile) -> None:
        """Use `create` or `open`."""
        header = file.header
        self._file = file
        row_size = file.dtype["weights"].shape[0]
        self.key = key_from_json(header.get("key"))
        self.rule = checked("Ledger.open", rule_from_json(header.get("rule")))
        self.momentum = momentum_from_json(header.get("momentum"), row_size)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        rule: Rule,
        params: Tree,
        key: Array,
        *,
        num_keys: int = 1,
        num_examples: int | None = None,
        momentum: Momentum | None = None,
        rounding: str = "nearest",
    ) -> "Ledger":
        """A new ledger.

        Args:
            path: where nothing is yet.
            rule: that of the run; of `forwax.Safe` the rule inside is kept.
            params: the parameters before the first step, of which a digest is kept.
            key: the key of the run, from which those of the steps are folded.
            num_keys: how many keys s a step has.
            num_examples: of a rule with directions of each example's own.
            momentum: that of the run; its decay and window are kept.
            rounding: as in `forwax.update`.

        Raises:
            FileExistsError: when the path exists.
            TypeError: when the rule cannot be replayed, or holds arrays.
            ValueError: when a count is none.
        """
        weight = checked("Ledger.create", rule)
        check_leaves("Ledger.create", params)
        check_rounding("Ledger.create", rounding)
        check_count("Ledger.create", "num_keys", num_keys)
        typed = typed_key(check_key(key, "Ledger.create", "key"))
        if weight.by_example:
            check_count("Ledger.create", "num_examples", num_examples)
        params = jax.tree.map(_tree.as_array, params)
        header = {
            "rule": rule_to_json(weight),
            "momentum": momentum_to_json(momentum),
            "rounding": rounding,
            "key": {
                "impl": str(jax.random.key_impl(typed)),
                "data": np.asarray(jax.random.key_data(typed)).tolist(),
            },
            "num_keys": num_keys,
            "num_tangents": weight.num_tangents,
            "num_examples": num_examples if weight.by_example else None,
            "leaves": list(form_of(params)),
            "params": digest_of_params(params),
            "made": environment(),
        }
        return cls(RowFile.create(os.fspath(path), header))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Ledger":
        """A ledger that exists, to go on or to read.

        Raises:
            ValueError: when it is no ledger, its header is damaged, or names what is unknown.
        """
        return cls(RowFile.open(os.fspath(path)))

    def append(self, step: Any, slopes: Slopes, learning_rate: Any) -> None:
        """Add the row of a step, or those of a block of steps, as a scan gives them.

        Args:
            step: its number, the last one's plus 1; any for the first row. Of a block [T].
            slopes: those that were subtracted, from a key that follows from the ledger's. Of a
                block all arrays have a leading axis T.
            learning_rate: the rate. Of a block [T].

        Raises:
            TypeError: for what is no `Slopes`.
            ValueError: when shapes, keys or parameters are not those of the ledger, or the step is
                not the next one.
            BlockingIOError: when another one writes to the file.
        """
        if not isinstance(slopes, Slopes):
            got = type(slopes).__name__
            raise TypeError(f"Ledger.append: expected forwax.Slopes, got {got}.")
        # A single step is a block of one.
        steps = np.atleast_1d(np.asarray(step))
        rates = np.atleast_1d(np.asarray(learning_rate, np.float32))
        one = np.ndim(step) == 0
        keys, weights = jax.device_get((slopes.keys, slopes.weights))
        if one:
            keys, weights = keys[None], weights[None]
        digest = self._check_form(slopes)
        self._check_block(steps, rates, keys, weights)
        self._check_keys(steps, keys, slopes.impl)
        rows = np.zeros(len(steps), self._file.dtype)
        rows["step"] = steps
        rows["rate"] = rates
        rows["weights"] = weights.reshape(len(steps), -1)
        # Another writer may have gone on: what is the next step is known behind the lock alone.
        self._file.lock()
        self._check_steps(steps)
        self._file.write(digest, rows)

    def replay(
        self,
        loss: Callable[..., Any],
        params0: Tree,
        /,
        *specs: Any,
        in_axes: Any = None,
        until: int | None = None,
        **kwargs: Any,
    ) -> Tree:
        """The parameters after all steps, or before the step `until`.

        Args:
            loss: that of the run.
            params0: the parameters before the first step.
            specs: what the loss takes behind the parameters, as arrays or their
                `jax.ShapeDtypeStruct`; needed with `tangents.LowRank` alone.
            in_axes: that of the run.
            until: the number of the first step that is not replayed.
            kwargs: as `specs`.

        Raises:
            ValueError: when the parameters are others, the loss splits them into other factors, a
                row is damaged, or a setting of JAX makes keys draw other numbers.

        Warns where versions or machine differ: steps are then the same but for rounding, which adds
        up.
        """
        params0 = jax.tree.map(_tree.as_array, params0)
        self._check_start(params0)
        self._check_splits(loss, params0, specs, kwargs, in_axes)
        self._check_environment()
        count = len(self)
        if until is not None:
            count = int(np.sum(self._file.rows["step"] < until))
        self._check_rows(count)
        rounding = self._file.header["rounding"]
        one = replay(loss, self.rule, in_axes=in_axes, rounding=rounding)

        def step(state: Any, row: Any) -> tuple[Any, None]:
            params, momentum = state
            number, rate, weights = row
            slopes = self._slopes(self._derive(number), weights)
            if momentum is not None:
                momentum = momentum.add(slopes)
                slopes = momentum.slopes()
            moved = one(slopes, rate, params, *specs, **kwargs)
            return (moved, momentum), None

        momentum = self.momentum
        if momentum is not None:
            examples = self._file.header["num_examples"]
            num_keys = self._file.header["num_keys"]
            momentum = momentum.init(self.key, self.rule, examples, num_keys)
        # Of one length but for the last block, so that two programs are compiled.
        scanned = jax.jit(lambda state, rows: lax.scan(step, state, rows)[0])
        state = (params0, momentum)
        for first in range(0, count, _BLOCK):
            rows = self._file.rows[first : min(first + _BLOCK, count)]
            arrays = [jnp.asarray(rows[name]) for name in ("step", "rate", "weights")]
            state = scanned(state, arrays)
        return state[0]

    def sync(self) -> None:
        """Wait until all rows are on the disk."""
        self._file.sync()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._file.rows)

    def __iter__(self) -> Iterator[tuple[int, Slopes, np.float32]]:
        """`(step, slopes, learning_rate)` of each row; a damaged one raises a ValueError."""
        for i, row in enumerate(self._file.rows):
            self._check_row(i)
            keys = self._derive(jnp.asarray(row["step"]))
            yield (
                int(row["step"]),
                self._slopes(keys, jnp.asarray(row["weights"])),
                row["rate"],
            )

    @property
    def _shape(self) -> tuple[int, ...]:
        """Of a step's weights."""
        header = self._file.header
        shape = (header["num_keys"], header["num_tangents"])
        examples = header["num_examples"]
        return shape if examples is None else (*shape, examples)

    def _slopes(self, keys: Array, weights: Array) -> Slopes:
        # Without a form: what the rows are of was compared once, for all of them.
        impl = self._file.header["key"]["impl"]
        return Slopes(keys, weights.reshape(self._shape), impl)

    def _derive(self, step: Any) -> Array:
        return _keys_of(self.key, step, self._file.header["num_keys"])

    def _check_form(self, slopes: Slopes) -> bytes:
        """The digest of the parameters that slopes are of, after checks."""
        if slopes.form is None:  # made by hand, as from what came over a network
            return UNKNOWN
        if without_factors(slopes.form) != tuple(self._file.header["leaves"]):
            raise ValueError(
                "Ledger.append: expected slopes of the ledger's parameters, "
                f"{self._file.header['leaves'][:3]} ..., got those of {list(slopes.form)[:3]} ..."
            )
        digest = digest_of(slopes.form)
        if self._file.digest not in (None, UNKNOWN, digest):
            raise ValueError(
                "Ledger.append: expected slopes of the loss of the rows before, which splits "
                "parameters into other factors. Begin another ledger for another loss."
            )
        return digest

    def _check_block(
        self, steps: np.ndarray, rates: np.ndarray, keys: Any, weights: Any
    ) -> None:
        count = len(steps)
        got = (rates.shape, keys.shape[:2], weights.shape)
        shape = (count, *self._shape)
        expected = ((count,), shape[:2], shape)
        if got != expected or steps.ndim != 1:
            raise ValueError(
                f"Ledger.append: expected rates, keys and weights of shapes {expected[0]}, "
                f"{(*expected[1], 'words')} and {expected[2]} for {count} steps, got "
                f"{rates.shape}, {keys.shape} and {weights.shape}. A single step has no leading "
                "axis."
            )
        if weights.dtype != np.float32:
            raise ValueError(
                "Ledger.append: expected weights in float32, which rows hold, got "
                f"{weights.dtype}. Cast them before they are subtracted, by "
                "dataclasses.replace(slopes, weights=slopes.weights.astype(jnp.float32))."
            )
        if not is_finite_rate(rates):
            raise ValueError(f"Ledger.append: expected finite rates, got {rates}.")

    def _check_steps(self, steps: np.ndarray) -> None:
        """Raise a ValueError where the steps are not the next ones."""
        self._check_rows(len(self))
        first = int(steps[0])
        if len(self):
            first = int(self._file.rows["step"][-1]) + 1
        expected = np.arange(first, first + len(steps))
        is_integer = np.issubdtype(steps.dtype, np.integer)
        if is_integer and np.array_equal(steps, expected) and 0 <= first < 1 << 32:
            return
        raise ValueError(
            f"Ledger.append: expected step {first}, the next one, got {steps.tolist()[:5]}. Steps "
            "follow one another by 1."
        )

    def _check_keys(self, steps: np.ndarray, keys: Any, impl: str) -> None:
        expected = np.stack([np.asarray(self._derive(jnp.uint32(n))) for n in steps])
        own = self._file.header["key"]["impl"]
        if impl == own and np.array_equal(expected, keys):
            return
        folded = "fold_in(key, step)"
        if self._file.header["num_keys"] > 1:
            folded = "fold_in(fold_in(key, step), i)"
        raise ValueError(
            f"Ledger.append: expected the keys {folded} of {own}, from step {steps[0]} on "
            f"{expected[0].tolist()}, got {np.asarray(keys)[0].tolist()} of {impl}. Keys are not "
            "kept, so that they must follow from the ledger's."
        )

    def _check_start(self, params0: Tree) -> None:
        header = self._file.header
        got = list(form_of(params0))
        if got != header["leaves"]:
            raise ValueError(
                f"Ledger.replay: expected parameters {header['leaves'][:3]} ..., got {got[:3]} ..."
            )
        if digest_of_params(params0) != header["params"]:
            raise ValueError(
                "Ledger.replay: expected the parameters that the ledger was created with, got "
                "others of the same shapes: their SHA-256 differs. Pass those before the first "
                "step."
            )

    def _check_splits(
        self, loss: Any, params0: Tree, specs: Any, kwargs: Any, in_axes: Any
    ) -> None:
        if self._file.digest in (None, UNKNOWN):
            return
        form = form_for(
            "Ledger.replay", loss, self.rule, in_axes, (params0, *specs), kwargs
        )
        if digest_of(form) != self._file.digest:
            raise ValueError(
                "Ledger.replay: expected the loss of the run, got one that splits parameters into "
                f"other factors: {list(form)[:3]} ... Low-rank directions depend on it."
            )

    def _check_environment(self) -> None:
        here = environment()
        made = self._file.header.get("made")
        found = differences(made, here)
        # Other rounding is a matter of bits, but other draws are another run.
        if any(each.startswith("threefry_partitionable") for each in found):
            raise ValueError(
                "Ledger.replay: expected the setting jax_threefry_partitionable of the run, which "
                f"decides on what keys draw: {'; '.join(found)}. Set it with jax.config.update."
            )
        if found:
            warnings.warn(
                f"Ledger.replay: not as it was: {'; '.join(found)}. Parameters may differ in their "
                "last bits, and in more after many steps.",
                stacklevel=3,
            )

    def _check_rows(self, count: int) -> None:
        for i in range(count):
            self._check_row(i)

    def _check_row(self, number: int) -> None:
        if self._file.is_good(number):
            return
        rows = self._file.rows["step"]
        step = int(rows[number - 1]) + 1 if number else int(rows[0])
        raise ValueError(
            f"Ledger: row {number} of {len(self)} in {self._file.path} is damaged: it has another "
            f"checksum. replay(..., until={step}) rebuilds the parameters before it."
        )


@functools.partial(jax.jit, static_argnums=2)
def _keys_of(key: Array, step: Array, num_keys: int) -> Array:
    """The data of the keys of a step [s, words]."""
    own = jax.random.fold_in(key, step)
    if num_keys == 1:
        return jax.random.key_data(own)[None]
    return derived(own, jnp.arange(num_keys))
