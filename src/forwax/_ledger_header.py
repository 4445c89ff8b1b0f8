"""What the header of a ledger says: rule, momentum, key, parameters, and where it was made."""

import dataclasses
import hashlib
import importlib
import math
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from forwax import tangents
from forwax._momentum import Momentum
from forwax._rules import FiniteDifference, WeightPerturbation
from forwax._slopes import form_of
from forwax._tree import Tree
from forwax.combine import Mean, Shrinkage

CLASSES: dict[str, Any] = {
    known.__name__: known
    for known in (
        WeightPerturbation,
        FiniteDifference,
        tangents.Rademacher,
        tangents.Normal,
        tangents.Sparse,
        tangents.LowRank,
        Mean,
        Shrinkage,
    )
}
"""What may stand in a header: no name in it is ever imported."""

_MOST = 1 << 28
"""So many remembered numbers are more than a momentum is made for."""


def rule_to_json(value: Any) -> Any:
    """A rule as class names and fields.

    Raises:
        TypeError: when a class or a field is none that a header can hold.
    """
    if isinstance(value, bool | int | float | str | None):
        return value
    name = type(value).__name__
    if CLASSES.get(name) is not type(value):
        raise TypeError(
            "Ledger.create: expected a rule of forwax's own classes and numbers of Python, got "
            f"{value!r}. What a header cannot name cannot be rebuilt."
        )
    fields = [field.name for field in dataclasses.fields(value)]
    values = {field: rule_to_json(getattr(value, field)) for field in fields}
    return {"class": name, "fields": values}


def rule_from_json(value: Any) -> Any:
    """A rule of what `rule_to_json` gave.

    Raises:
        ValueError: for an unknown class, or fields that it has not.
    """
    if not isinstance(value, dict):
        return value
    known = CLASSES.get(str(value.get("class")))
    fields = value.get("fields")
    if known is None or not isinstance(fields, dict):
        raise ValueError(
            f"Ledger.open: expected a rule of {', '.join(CLASSES)}, got {value.get('class')!r}. "
            "Another version of forwax wrote the file, or somebody else."
        )
    try:
        return known(**{name: rule_from_json(field) for name, field in fields.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Ledger.open: the header's {known.__name__} cannot be made: {error}"
        ) from None


def momentum_to_json(momentum: Momentum | None) -> Any:
    """Decay and window."""
    if momentum is None:
        return None
    # As a number of float32, whose digits JSON keeps.
    return {"decay": float(momentum.decay), "window": momentum.window}


def momentum_from_json(value: Any, row_size: int) -> Momentum | None:
    """A momentum that has seen nothing.

    Raises:
        ValueError: when it is none, or larger than any machine's memory.
    """
    if value is None:
        return None
    try:
        momentum = Momentum(float(value["decay"]), value["window"])
    except (TypeError, KeyError, ValueError):
        momentum = None
    # Its ring is made before the first row is read.
    if momentum is None or momentum.window * row_size > _MOST:
        raise ValueError(
            f"Ledger.open: expected a momentum's decay and window, got {value!r}."
        )
    return momentum


def key_from_json(value: Any) -> jax.Array:
    """The typed key of a run.

    Raises:
        ValueError: when it is none.
    """
    try:
        words = jnp.asarray(np.asarray(value["data"], np.uint32))
        return jax.random.wrap_key_data(words, impl=str(value["impl"]))
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise ValueError(f"Ledger.open: the header holds no key: {error}") from None


def digest_of_params(params: Tree) -> str:
    """SHA-256 of all parameters, with their paths, dtypes and shapes."""
    digest = hashlib.sha256("\n".join(form_of(params)).encode())
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """What decides on the last bits, and on what keys draw."""
    device = jax.devices()[0]
    return {
        "forwax": importlib.import_module("forwax").__version__,
        "jax": jax.__version__,
        "jaxlib": importlib.import_module("jaxlib").__version__,
        "device": f"{device.platform} {device.device_kind}",
        "machine": _machine(),
        "x64": _setting("jax_enable_x64"),
        "threefry_partitionable": _setting("jax_threefry_partitionable"),
    }


def differences(made: Any, here: dict[str, Any]) -> list[str]:
    """What is not as it was, in words."""
    was = made if isinstance(made, dict) else {}
    return [
        f"{name} {was.get(name)!r} there and {value!r} here"
        for name, value in here.items()
        if was.get(name) != value
    ]


def is_finite_rate(rate: np.ndarray) -> bool:
    """Whether all rates can be used."""
    return all(math.isfinite(float(each)) for each in rate)


def _setting(name: str) -> bool:
    # JAX declares its settings when it runs.
    return bool(getattr(jax.config, name))


def _machine() -> str:
    """The kind of processor, with the instruction sets on which XLA's choices hang."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # of systems that do not say
        return platform.machine()
    lines = [
        line for line in text.splitlines() if line.startswith(("flags", "Features"))
    ]
    words = set(lines[0].split()) if lines else set()
    starts = ("sse4", "avx", "fma", "amx", "asimd", "sve")
    return " ".join(
        [platform.machine(), *sorted(w for w in words if w.startswith(starts))]
    )
