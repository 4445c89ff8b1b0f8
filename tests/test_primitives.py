"""PRIMITIVES names what JAX has, and everyday code emits nothing that is unknown."""

import ast
import functools
import pathlib
import subprocess
import sys

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import primitives

from forwax import _mesh
from forwax._programs.dataflow import mapped_variables
from forwax._programs.primitives import PRIMITIVES
from forwax._programs.program import equations_of, is_inexact
from forwax._programs.tracing import trace

ROOT = pathlib.Path(__file__).parents[1]
SOURCE = ROOT / "src" / "forwax"


def positive(*shape):
    """NumPy's, so that listing the functions compiles nothing; off the kinks of all of them."""
    return np.random.default_rng(0).uniform(0.2, 0.8, shape).astype(np.float32)


M = positive(4, 4)
IMAGE = positive(2, 6, 6, 3)
KERNEL = positive(3, 3, 3, 5)
ROWS = np.array([2, 0, 2])

# Functions of one array, from an array of the given shape.
EVERYDAY = {
    "sum": (jnp.sum, M),
    "mean": (jnp.mean, M),
    "var": (jnp.var, M),
    "std": (jnp.std, M),
    "max": (jnp.max, M),
    "prod": (jnp.prod, M),
    "maximum": (lambda x: jnp.maximum(x, 0.5), M),
    "minimum": (lambda x: jnp.minimum(x, x.T), M),
    "clip": (lambda x: jnp.clip(x, 0.3, 0.6), M),
    "where": (lambda x: jnp.where(x > 0.5, x, 2 * x), M),
    "abs": (jnp.abs, M),
    "negative": (jnp.negative, M),
    "square": (jnp.square, M),
    "power": (lambda x: x**3 + x**0.5, M),
    "sqrt": (jnp.sqrt, M),
    "exp": (jnp.exp, M),
    "log": (jnp.log, M),
    "sin": (lambda x: jnp.sin(x) + jnp.cos(x), M),
    "tanh": (jnp.tanh, M),
    "arctan2": (lambda x: jnp.arctan2(x, x.T), M),
    "divide": (lambda x: x / (1 + x.T), M),
    "matmul": (lambda x: x @ x, M),
    "einsum": (lambda x: jnp.einsum("ij,kj->ik", x, x), M),
    "tensordot": (lambda x: jnp.tensordot(x, x, 1), M),
    "outer": (lambda x: jnp.outer(x, x), M),
    "vdot": (lambda x: jnp.vdot(x, x), M),
    "kron": (lambda x: jnp.kron(x, x), M),
    "norm": (jnp.linalg.norm, M),
    "inv": (lambda x: jnp.linalg.inv(x + 4 * jnp.eye(4)), M),
    "solve": (lambda x: jnp.linalg.solve(x + 4 * jnp.eye(4), x), M),
    "reshape": (lambda x: x.reshape(2, 8), M),
    "transpose": (jnp.transpose, M),
    "moveaxis": (lambda x: jnp.moveaxis(x, 0, 1), M),
    "squeeze": (lambda x: jnp.squeeze(x[None]), M),
    "expand dims": (lambda x: jnp.expand_dims(x, (0, 2)), M),
    "broadcast to": (lambda x: jnp.broadcast_to(x, (3, 4, 4)), M),
    "concatenate": (lambda x: jnp.concatenate([x, x.T]), M),
    "stack": (lambda x: jnp.stack([x, x.T]), M),
    "unstack": (lambda x: jnp.unstack(x), M),
    "split": (lambda x: jnp.split(x, 2), M),
    "tile": (lambda x: jnp.tile(x, (2, 3)), M),
    "repeat": (lambda x: jnp.repeat(x, 2, axis=0), M),
    "pad": (lambda x: jnp.pad(x, 1), M),
    "reflect": (lambda x: jnp.pad(x, 1, mode="reflect"), M),
    "roll": (lambda x: jnp.roll(x, 1, axis=0), M),
    "flip": (jnp.flip, M),
    "triu": (jnp.triu, M),
    "diagonal": (jnp.diagonal, M),
    "trace": (jnp.trace, M),
    "cumsum": (lambda x: jnp.cumsum(x, axis=0), M),
    "cumprod": (lambda x: jnp.cumprod(x, axis=0), M),
    "sort": (jnp.sort, M),
    "take": (lambda x: x[ROWS], M),
    "take along": (lambda x: jnp.take_along_axis(x, jnp.argsort(x), 1), M),
    "slices": (lambda x: x[1:3, ::2], M),
    "dynamic slice": (lambda x: lax.dynamic_slice(x, (jnp.int32(1), 0), (2, 4)), M),
    "update": (lambda x: x.at[ROWS].set(1.0) + x.at[0].set(x[1]), M),
    "add at": (lambda x: x.at[ROWS].add(x[:3]), M),
    "subtract at": (lambda x: x.at[0].subtract(x[1]), M),
    "multiply at": (lambda x: x.at[:, 0].multiply(2.0), M),
    "max at": (lambda x: x.at[0].max(0.5) + x.at[0].min(0.5), M),
    "segment sum": (lambda x: jax.ops.segment_sum(x[:3], ROWS, 3), M),
    "complex": (lambda x: jnp.abs(jnp.conj(lax.complex(x, x.T))) ** 2, M),
    "real part": (
        lambda x: jnp.real(lax.complex(x, x)) + jnp.imag(lax.complex(x, x)),
        M,
    ),
    "fft": (lambda x: jnp.abs(jnp.fft.fft(x)), M),
    "half": (lambda x: x.astype(jnp.bfloat16) + 1, M),
    "copy": (jnp.copy, M),
    "relu": (jax.nn.relu, M),
    "gelu": (jax.nn.gelu, M),
    "silu": (jax.nn.silu, M),
    "elu": (jax.nn.elu, M),
    "sigmoid": (jax.nn.sigmoid, M),
    "softplus": (jax.nn.softplus, M),
    "softmax": (jax.nn.softmax, M),
    "log softmax": (jax.nn.log_softmax, M),
    "logsumexp": (jax.nn.logsumexp, M),
    "standardize": (jax.nn.standardize, M),
    "attention": (
        lambda x: jax.nn.dot_product_attention(x, x, x),
        positive(1, 4, 2, 4),
    ),
    "one hot": (lambda x: x * jax.nn.one_hot(ROWS, 4)[:, :1].sum(), M),
    "dropout": (
        lambda x: jnp.where(
            jax.random.bernoulli(jax.random.key(0), 0.5, x.shape), x, 0.0
        ),
        M,
    ),
    "convolution": (
        lambda x: lax.conv_general_dilated(
            x, KERNEL, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        IMAGE,
    ),
    "max pool": (
        lambda x: lax.reduce_window(
            x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
        ),
        IMAGE,
    ),
    "mean pool": (
        lambda x: (
            lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
        ),
        IMAGE,
    ),
    "stop gradient": (lambda x: x * lax.stop_gradient(x), M),
    "remat": (jax.checkpoint(lambda x: jnp.sin(x) * x), M),
    "jit": (jax.jit(lambda x: x + 1), M),
    "vmap": (lambda x: jax.vmap(jnp.dot, (0, None))(x, x), M),
    "scan": (lambda x: lax.scan(lambda c, r: (c + r, c * r), x[0], x), M),
    "associative scan": (lambda x: lax.associative_scan(jnp.add, x), M),
    "cond": (lambda x: lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x), M),
    "fori loop": (lambda x: lax.fori_loop(0, 3, lambda i, c: c * x, x), M),
    "while loop": (
        lambda x: lax.while_loop(lambda c: c[0, 0] > 9, lambda c: c + x, x),
        M,
    ),
    "name": (lambda x: checkpoint_name(x, "x"), M),
    "barrier": (lax.optimization_barrier, M),
    "precision": (lambda x: lax.reduce_precision(x, 5, 10), M),
    "device": (lambda x: jax.device_put(x, jax.devices()[0]), M),
}

# No tangent goes through them: their derivatives are written in other primitives.
NONLINEAR = {
    "abs",
    "atan2",
    "cos",
    "cumprod",
    "exp",
    "expm1",
    "integer_pow",
    "log",
    "log1p",
    "logistic",
    "lu",
    "reduce_max",
    "reduce_prod",
    "reduce_window_max",
    "rsqrt",
    "sign",
    "sin",
    "sqrt",
    "square",
    "tanh",
    "triangular_solve",
}
# Their results are integers, booleans, keys or bits.
WITHOUT_DERIVATIVES = {
    "bitcast_convert_type",
    "eq",
    "ge",
    "gt",
    "iota",
    "is_finite",
    "lt",
    "ne",
    "or",
    "platform_index",
    "random_bits",
    "random_seed",
    "shift_right_logical",
}
# Linear, and each coordinate of the operand changes all of the result.
JOINING = {"custom_linear_solve"}


def names_in(fun, x):
    return {eqn.primitive.name for eqn in equations_of(jax.make_jaxpr(fun)(x))}


@functools.cache
def emitted(name):
    return names_in(*EVERYDAY[name])


def with_bodies(program):
    for equation in program.equations:
        yield equation
        if equation.loop is not None:
            yield from with_bodies(equation.loop.body)


def crossed_by_tangents(name):
    """The primitives through which a tangent of the function's input goes."""
    fun, x = EVERYDAY[name][0], jnp.asarray(EVERYDAY[name][1])
    traced = trace(lambda dx: jax.jvp(fun, (x,), (dx,))[1], x)
    moving = {
        v
        for v in mapped_variables(traced.program, traced.parameters)
        if is_inexact(traced.types[v])
    }
    return {
        e.name for e in with_bodies(traced.program) if moving.intersection(e.outputs)
    }


def on_a_mesh(x):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("i")
    whole = jax.sharding.PartitionSpec()

    def both(x):
        spread = _mesh.vary(x, {"i"})
        return spread, jax.lax.psum(spread, "i")

    varied = jax.shard_map(both, mesh=mesh, in_specs=None, out_specs=(spec, whole))
    return varied(x)


def test_every_row_is_a_primitive_of_this_jax():
    listed = {
        value.name
        for value in vars(primitives).values()
        if isinstance(value, jex.Primitive)
    }
    # jax.extend lists not all of them; those that it leaves out are seen where they are emitted.
    seen = set().union(names_in(on_a_mesh, M), *map(emitted, EVERYDAY))
    assert PRIMITIVES.keys() - listed - seen == set()


@pytest.mark.parametrize("name", EVERYDAY)
def test_what_everyday_functions_emit_is_known(name):
    unknown = emitted(name) - PRIMITIVES.keys()
    assert unknown - NONLINEAR - WITHOUT_DERIVATIVES - JOINING == set()


@pytest.mark.parametrize("name", EVERYDAY)
def test_what_tangents_of_everyday_functions_cross_is_known(name):
    assert crossed_by_tangents(name) - PRIMITIVES.keys() - JOINING == set()


def test_the_lists_of_exceptions_name_what_is_emitted():
    seen = set().union(*map(emitted, EVERYDAY))
    assert (NONLINEAR | WITHOUT_DERIVATIVES | JOINING) - seen == set()


RENAMED = """
import sys
import jax.extend.core as jex
jex.primitives.neg_p.name = "negative"
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def test_a_primitive_with_a_new_name_is_noticed():
    tests = ["test_every_row_is_a_primitive_of_this_jax"]
    tests += [f"{test}[negative]" for test in KNOWN_TESTS]
    out = subprocess.run(
        [sys.executable, "-c", RENAMED, *(f"{__file__}::{test}" for test in tests)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert f"{len(tests)} failed" in out.stdout, out.stdout + out.stderr


KNOWN_TESTS = (
    "test_what_everyday_functions_emit_is_known",
    "test_what_tangents_of_everyday_functions_cross_is_known",
)


def strings(node):
    return {
        part.value
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    }


def is_a_name(node):
    return any(
        getattr(part, "attr", None) == "name" or getattr(part, "id", None) == "name"
        for part in ast.walk(node)
    )


def names_held(tree):
    """Sets of primitives' names, and comparisons of a name with some of them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Set | ast.List | ast.Tuple | ast.Dict):
            parts = node.keys if isinstance(node, ast.Dict) else node.elts
            held = {p.value for p in parts if isinstance(p, ast.Constant)} & NAMES
            if len(held) > 1:
                yield node.lineno, held
        elif (
            isinstance(node, ast.Compare) and is_a_name(node) and strings(node) & NAMES
        ):
            yield node.lineno, strings(node) & NAMES


NAMES = PRIMITIVES.keys() | {
    p.name for p in vars(primitives).values() if hasattr(p, "name")
}


def test_the_search_finds_sets_and_comparisons():
    text = 'SUMS = {"add", "sub"}\nfound = equation.name == "neg" or name in ("pvary", "x")\n'
    assert [held for _, held in names_held(ast.parse(text))] == [
        {"add", "sub"},
        {"neg"},
        {"pvary"},
    ]


def test_no_other_file_holds_names_of_primitives():
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        if path.name != "primitives.py":
            assert list(names_held(ast.parse(text))) == [], path
            assert "core.primitives" not in text, path
            assert "core import primitives" not in text, path
