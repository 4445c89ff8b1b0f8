"""From a function to its program: `jit` and `remat` inlined, `scan` a loop over a program."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.extend.core as jex
import numpy as np

from forwax import _mesh
from forwax._programs.evaluate import NARROWED
from forwax._programs.primitives import facts_of
from forwax._programs.program import (
    Atom,
    Constant,
    Equation,
    Loop,
    Program,
    Traced,
    Variable,
    equations_of,
    opened,
    renamed,
    variables,
)
from forwax._tree import Tree


def trace(fun: Callable[..., Any], params: Tree, *specs: Any) -> Traced:
    """The program of a function of abstract parameters and of further abstract arguments."""
    # The structure of what it returns is known only once the function runs.
    structure: list[Any] = []

    def flat(*args: Any) -> list[Any]:
        leaves, tree = jax.tree.flatten(fun(*args))
        structure.append(tree)
        return leaves

    closed_jaxpr = jax.make_jaxpr(flat)(params, *specs)
    types: list[Any] = []
    program = _Conversion(types).program(closed_jaxpr.jaxpr)
    return Traced(
        program,
        closed=list(closed_jaxpr.consts),
        num_parameters=len(jax.tree.leaves(params)),
        types=types,
        out_tree=structure[0],
    )


def staged(fun: Callable[..., Tree], *args: Tree) -> tuple[Callable[..., Tree], Tree]:
    """A function that is traced once, for these arguments and others of the same types.

    Returns:
        A function that runs the trace, and the abstract values of what it returns.

    Raises:
        TypeError: for a tangent through a custom_vjp function, which JAX would only find when it
            lowers the whole program.
    """
    run, closed, shapes = staged_apart(fun, *args)
    return functools.partial(run, closed), shapes


def staged_apart(
    fun: Callable[..., Tree], *args: Tree
) -> tuple[Callable[..., Tree], list[Any], Tree]:
    """As `staged`, but the arrays that the function closes over become its first argument.

    Returns:
        A function that runs the trace on such arrays and on arguments, the arrays, and the abstract
        values of what it returns.
    """
    traced, shapes = jax.make_jaxpr(fun, return_shape=True)(*args)
    if any(facts_of(eqn.primitive).refuses for eqn in equations_of(traced)):
        raise TypeError("a tangent meets a custom_vjp function.")
    structure = jax.tree.structure(shapes)

    def run(closed: Sequence[Any], *args: Tree) -> Tree:
        flat = jex.jaxpr_as_fun(jex.ClosedJaxpr(traced.jaxpr, closed))
        leaves = jax.tree.leaves(args)
        return structure.unflatten(flat(*leaves))

    return run, list(traced.consts), structure.unflatten(traced.out_avals)


def retrace(
    fun: Callable[..., Any], atoms: Sequence[Atom], types: list[Any]
) -> Program:
    """The program of a function of some atoms; its variables follow those of `types`."""
    given = variables(atoms)

    def flat(*values: Any) -> Any:
        remaining = iter(values)
        whole = [
            atom.value if isinstance(atom, Constant) else next(remaining)
            for atom in atoms
        ]
        return fun(*whole)

    specs = []
    for aval in [types[v] for v in given]:
        axes = _mesh.type_axes(aval)
        specs.append(_mesh.like(tuple(aval.shape), aval.dtype, axes))
    closed_jaxpr = jax.make_jaxpr(flat)(*specs)
    program = _Conversion(types).program(closed_jaxpr.jaxpr, closed_jaxpr.consts)
    # The new program reads the given variables in place of inputs of its own.
    names: dict[Variable, Atom] = dict(zip(program.inputs, given, strict=True))
    equations = [renamed_inputs(equation, names) for equation in program.equations]
    outputs = renamed(program.outputs, names)
    return Program(tuple(given), tuple(equations), outputs)


def called(equation: Equation, types: list[Any]) -> Program:
    """What an operation that calls a program computes, from its own operands."""
    equations: list[Equation] = []
    outputs = _Conversion(types).inline(equation, equation.inputs, equations)
    given = variables(equation.inputs)
    return Program(tuple(given), tuple(equations), tuple(outputs))


def renamed_inputs(equation: Equation, names: Mapping[Variable, Atom]) -> Equation:
    """The same operation on other inputs."""
    inputs = renamed(equation.inputs, names)
    return dataclasses.replace(equation, inputs=inputs)


def new_variable(types: list[Any], aval: Any) -> Variable:
    """A fresh variable of the given type."""
    types.append(aval)
    return Variable(len(types) - 1)


Env: TypeAlias = dict[Any, Atom]
"""What stands for each variable of a jaxpr."""


@dataclasses.dataclass(frozen=True)
class _Conversion:
    """Makes programs of jaxprs, with variables of their own.

    Attributes:
        types: the abstract value of each variable; new ones are appended.
        wide: of variables that were made narrower without a loss what they were.
    """

    types: list[Any]
    wide: dict[Atom, Variable] = dataclasses.field(default_factory=dict)

    def program(self, jaxpr: Any, consts: Sequence[Any] | None = None) -> Program:
        """The program of a jaxpr; without values for its constvars they become inputs too."""
        env: Env = {}
        inputs = list(jaxpr.invars)
        if consts is None:
            inputs = [*jaxpr.constvars, *inputs]
        else:
            env = _constants(jaxpr, consts)
        names = self.define(env, inputs)
        equations: list[Equation] = []
        self.convert(jaxpr, env, equations)
        outputs = _atoms(env, jaxpr.outvars)
        # A number that the function returns is an array to all that reads it.
        arrays = [
            Constant(np.asarray(atom.value, jax.typeof(atom.value).dtype))
            if isinstance(atom, Constant) and not hasattr(atom.value, "astype")
            else atom
            for atom in outputs
        ]
        return Program(names, tuple(equations), tuple(arrays))

    def define(self, env: Env, jaxpr_variables: Sequence[Any]) -> tuple[Variable, ...]:
        """Fresh variables for those of a jaxpr."""
        names = tuple(new_variable(self.types, v.aval) for v in jaxpr_variables)
        env.update(zip(jaxpr_variables, names, strict=True))
        return names

    def convert(self, jaxpr: Any, env: Env, equations: list[Equation]) -> None:
        """Append a jaxpr's equations; `env` has its inputs, and gets all its variables."""
        for eqn in jaxpr.eqns:
            facts = facts_of(eqn.primitive)
            inputs = _atoms(env, eqn.invars)
            if facts.inlined:
                outputs = self.inline(eqn, inputs, equations)
                env.update(zip(eqn.outvars, outputs, strict=True))
                if eqn.params.get("name") == NARROWED:
                    self.wide.update(zip(outputs, variables(inputs), strict=True))
                continue
            if facts.casts and self.is_cast_back(eqn, inputs[0]):
                env[eqn.outvars[0]] = self.wide[inputs[0]]
                continue
            names = self.define(env, eqn.outvars)
            loop = self.loop(eqn) if facts.is_loop else None
            equation = Equation(
                eqn.primitive,
                inputs,
                names,
                params=eqn.params,
                loop=loop,
                origin=eqn,
            )
            equations.append(equation)

    def is_cast_back(self, eqn: Any, atom: Atom) -> bool:
        """Whether a cast gives what its operand was made of."""
        if isinstance(atom, Constant) or atom not in self.wide:
            return False
        wide = self.wide[atom]
        return self.types[wide].dtype == eqn.params["new_dtype"]

    def inline(
        self,
        eqn: Any,
        inputs: Sequence[Atom],
        equations: list[Equation],
    ) -> Sequence[Atom]:
        """Append what an equation calls; the atoms of its outputs."""
        params = eqn.params
        # `jit` and `remat` call it the one, plain calls the other.
        name = "jaxpr" if "jaxpr" in params else "call_jaxpr"
        jaxpr, consts = opened(params[name])
        # Several calls may share one jaxpr: each gets variables of its own.
        env = _constants(jaxpr, consts)
        env.update(zip(jaxpr.invars, inputs, strict=True))
        self.convert(jaxpr, env, equations)
        return _atoms(env, jaxpr.outvars)

    def loop(self, eqn: Any) -> Loop:
        """What a `scan` repeats. How it writes its counts differs between versions of jax."""
        params = eqn.params
        jaxpr, consts = opened(params["jaxpr"])
        # What is scanned has one axis more outside of the body; a carry has the same rank.
        num_xs = _num_scanned(eqn.invars, jaxpr.invars)
        num_ys = _num_scanned(eqn.outvars, jaxpr.outvars)
        num_carry = len(eqn.outvars) - num_ys
        return Loop(
            self.program(jaxpr, consts),
            num_consts=len(eqn.invars) - num_carry - num_xs,
            num_carry=num_carry,
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )


def _num_scanned(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """How many values have another rank inside a loop."""
    pairs = zip(outside, inside, strict=True)
    return sum(len(a.aval.shape) != len(b.aval.shape) for a, b in pairs)


def _constants(jaxpr: Any, consts: Sequence[Any]) -> Env:
    values = map(Constant, consts)
    return dict(zip(jaxpr.constvars, values, strict=True))


def _atoms(env: Env, jaxpr_atoms: Sequence[Any]) -> tuple[Atom, ...]:
    """What stands for variables and literals of a jaxpr."""
    return tuple(
        Constant(atom.val) if isinstance(atom, jex.Literal) else env[atom]
        for atom in jaxpr_atoms
    )
