"""From a function to its program: `jit` and `remat` inlined, `scan` as a loop over a sub-program."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex

from forwax import _mesh
from forwax._programs.primitives import facts_of
from forwax._programs.program import (
    Atom,
    Constant,
    Equation,
    Loop,
    Program,
    Traced,
    Variable,
    opened,
    variables,
)
from forwax._tree import Tree


def trace(fun: Callable[..., Any], params: Any, *specs: Any) -> Traced:
    """The program of a function of abstract parameters and of further abstract arguments."""
    structure: list[Any] = []

    def flat(*args: Any) -> list[Any]:
        leaves, tree = jax.tree.flatten(fun(*args))
        structure.append(tree)
        return leaves

    closed_jaxpr = jax.make_jaxpr(flat)(params, *specs)
    num_parameters = len(jax.tree.leaves(params))
    types: list[Any] = []
    program = _convert(closed_jaxpr.jaxpr, types)
    return Traced(program, list(closed_jaxpr.consts), num_parameters, types, structure[0])


def staged(fun: Callable[..., Tree], *args: Tree) -> tuple[Callable[..., Tree], Tree]:
    """A function that is traced once, for these arguments and others of the same types.

    Returns:
        A function that runs the trace, and the abstract values of what it returns.
    """
    traced, shapes = jax.make_jaxpr(fun, return_shape=True)(*args)
    structure = jax.tree.structure(shapes)
    flat = jex.jaxpr_as_fun(traced)

    def run(*args: Tree) -> Tree:
        return structure.unflatten(flat(*jax.tree.leaves(args)))

    return run, structure.unflatten(traced.out_avals)


def retrace(fun: Callable[..., Any], atoms: Sequence[Atom], types: list[Any]) -> Program:
    """The program of a function of some atoms; its variables are numbered behind those in `types`."""
    given = variables(atoms)

    def flat(*values: Any) -> Any:
        remaining = iter(values)
        return fun(
            *(atom.value if isinstance(atom, Constant) else next(remaining) for atom in atoms)
        )

    specs = [
        _mesh.like(tuple(types[v].shape), types[v].dtype, _mesh.type_axes(types[v])) for v in given
    ]
    closed_jaxpr = jax.make_jaxpr(flat)(*specs)
    program = _convert(closed_jaxpr.jaxpr, types, closed_jaxpr.consts)
    names: dict[Variable, Atom] = dict(zip(program.inputs, given, strict=True))
    equations = tuple(renamed_inputs(equation, names) for equation in program.equations)
    outputs = tuple(
        atom if isinstance(atom, Constant) else names.get(atom, atom) for atom in program.outputs
    )
    return Program(tuple(given), equations, outputs)


def renamed_inputs(equation: Equation, names: Mapping[Variable, Atom]) -> Equation:
    """The same operation on other inputs."""
    inputs = tuple(
        atom if isinstance(atom, Constant) else names.get(atom, atom) for atom in equation.inputs
    )
    return dataclasses.replace(equation, inputs=inputs)


def new_variable(types: list[Any], aval: Any) -> Variable:
    """A fresh variable of the given type."""
    types.append(aval)
    return Variable(len(types) - 1)


def _convert(jaxpr: Any, types: list[Any], consts: Sequence[Any] | None = None) -> Program:
    """A jaxpr as a program with variables of its own; without values for its constvars, they become inputs too."""
    env: dict[Any, Atom] = {}

    def define(var: Any) -> Variable:
        env[var] = number = new_variable(types, var.aval)
        return number

    if consts is not None:
        env.update(zip(jaxpr.constvars, map(Constant, consts), strict=True))
    inputs = tuple(map(define, [*(jaxpr.constvars if consts is None else ()), *jaxpr.invars]))
    equations: list[Equation] = []
    _convert_equations(jaxpr, types, env, equations)
    return Program(inputs, tuple(equations), tuple(_atom(env, var) for var in jaxpr.outvars))


def _convert_equations(
    jaxpr: Any, types: list[Any], env: dict[Any, Atom], equations: list[Equation]
) -> None:
    for eqn in jaxpr.eqns:
        inputs, facts = tuple(_atom(env, var) for var in eqn.invars), facts_of(eqn.primitive)
        if facts.inlined:
            outputs = _inline(eqn, inputs, types, equations)
            env.update(zip(eqn.outvars, outputs, strict=True))
            continue
        outputs = tuple(new_variable(types, var.aval) for var in eqn.outvars)
        env.update(zip(eqn.outvars, outputs, strict=True))
        loop = _loop(eqn, types) if facts.is_loop else None
        equations.append(Equation(eqn.primitive, inputs, outputs, eqn.params, loop, eqn))


def _inline(
    eqn: Any, inputs: tuple[Atom, ...], types: list[Any], equations: list[Equation]
) -> list[Atom]:
    inner = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
    jaxpr, consts = opened(inner)
    env: dict[Any, Atom] = dict(zip(jaxpr.constvars, map(Constant, consts), strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))
    _convert_equations(jaxpr, types, env, equations)
    return [_atom(env, var) for var in jaxpr.outvars]


def _loop(eqn: Any, types: list[Any]) -> Loop:
    jaxpr, consts = opened(eqn.params["jaxpr"])
    ranks = [len(atom.aval.shape) for atom in eqn.invars]
    num_xs = sum(rank != len(var.aval.shape) for rank, var in zip(ranks, jaxpr.invars, strict=True))
    num_carry = sum(
        len(out.aval.shape) == len(v.aval.shape)
        for out, v in zip(eqn.outvars, jaxpr.outvars, strict=True)
    )
    body, params = _convert(jaxpr, types, consts), eqn.params
    num_consts = len(ranks) - num_carry - num_xs
    return Loop(body, num_consts, num_carry, params["length"], params["reverse"], params["unroll"])


def _atom(env: dict[Any, Atom], var: Any) -> Atom:
    return Constant(var.val) if isinstance(var, jex.Literal) else env[var]
