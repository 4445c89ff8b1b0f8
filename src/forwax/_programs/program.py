"""A traced program as plain data: equations over numbered variables, loops as sub-programs.

Jaxprs differ between JAX versions in how `scan` writes its counts and in whether inner jaxprs are
closed, so both are derived from what all versions share: ranks, and `getattr(j, "jaxpr", j)`.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeAlias

import jax.extend.core as jex
import jax.numpy as jnp
from jax import Array
from jax.extend import source_info_util


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """A value that is written into the program.

    Attributes:
        value: a Python scalar or an array.
    """

    value: Any


Variable: TypeAlias = int


Atom: TypeAlias = Variable | Constant


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """What a `scan` repeats.

    Attributes:
        body: inputs are constants, carries and slices of the scanned arrays; outputs are carries
            and stacked outputs.
        num_consts: how many inputs are constants.
        num_carry: how many inputs, and outputs, are carries.
        length: the number of steps.
        reverse: whether it runs from the last step to the first.
        unroll: as in `jax.lax.scan`.
    """

    body: "Program"
    num_consts: int
    num_carry: int
    length: int
    reverse: bool
    unroll: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """One operation.

    Attributes:
        primitive: what is computed; None for an identity that gives a parameter a noise of its own.
        inputs: variables and constants.
        outputs: variables.
        params: the primitive's parameters.
        loop: the body, when this is a `scan`.
        origin: the jaxpr's equation, for its place in the user's source.
    """

    primitive: Any
    inputs: tuple[Atom, ...]
    outputs: tuple[Variable, ...]
    params: dict[str, Any] = dataclasses.field(default_factory=dict)
    loop: Loop | None = None
    origin: Any = None

    @property
    def name(self) -> str:
        """The primitive's name, or "parameter" for an identity."""
        return "parameter" if self.primitive is None else self.primitive.name

    @property
    def variables(self) -> list[Variable]:
        """The inputs that are variables."""
        return variables(self.inputs)

    @property
    def source(self) -> str:
        """Where in the user's code this operation stands, as `file:line (function)`."""
        return (
            source_info_util.summarize(self.origin.source_info) if self.origin is not None else ""
        )

    def contains(self, *names: str) -> bool:
        """Whether this is, or carries inside it, a primitive of one of the names."""
        return self.name in names or any(
            _contains(inner, names) for inner in jex.jaxprs_in_params(self.params)
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Equations in order.

    Attributes:
        inputs: the variables that must be given.
        equations: what is computed from them.
        outputs: what is returned.
    """

    inputs: tuple[Variable, ...]
    equations: tuple[Equation, ...]
    outputs: tuple[Atom, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """A function's program with what it closes over.

    Attributes:
        program: inputs are the closed-over arrays, then the function's own inputs.
        closed: the closed-over arrays.
        types: the abstract value of each variable, by number; promotions append to it.
        out_tree: the structure of the function's output.
    """

    program: Program
    closed: list[Array]
    types: list[Any]
    out_tree: Any


def variables(atoms: Iterable[Atom]) -> list[Variable]:
    """The atoms that are variables."""
    return [atom for atom in atoms if not isinstance(atom, Constant)]


def is_inexact(aval: Any) -> bool:
    """Whether values of this type carry derivatives."""
    return jnp.issubdtype(getattr(aval, "dtype", jnp.int32), jnp.inexact)


def opened(jaxpr: Any) -> tuple[Any, list[Any]]:
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


def _contains(jaxpr: Any, names: tuple[str, ...]) -> bool:
    inside, _ = opened(jaxpr)
    return any(
        eqn.primitive.name in names
        or any(_contains(inner, names) for inner in jex.jaxprs_in_params(eqn.params))
        for eqn in inside.eqns
    )
