"""An error of a derivative names the user's own line, or a library's switch, and the way out.

Each library's failure is imitated by a module with its name in its path; with the library itself
where it is installed.
"""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from jax.experimental import pallas as pl
from jax.experimental.ode import odeint

import forwax as fx
from helpers import module_at

KEY = jax.random.key(0)
P = jnp.array([0.5, 0.7, 0.9])
MODES = pytest.mark.parametrize("mode", [lambda f: f, jax.jit], ids=["eager", "jit"])
VERBS = {
    "value_and_grad": fx.value_and_grad,
    "grad": partial(fx.grad, rule=fx.WeightPerturbation(num_tangents=3)),
    "chunks": partial(
        fx.grad, rule=fx.WeightPerturbation(num_tangents=2, chunk_size=1)
    ),
    "normal": partial(fx.grad, rule=fx.WeightPerturbation(fx.tangents.Normal())),
    "low-rank": partial(fx.grad, rule=fx.WeightPerturbation(fx.tangents.LowRank())),
    "exact": partial(fx.grad, rule=fx.Exact()),
    "update": partial(fx.update, learning_rate=0.1),
    "safe": lambda loss: fx.Safe(fx.WeightPerturbation()).step(loss),
    "gauss-newton": lambda loss: fx.GaussNewton(1).step(lambda p: loss(p)[None]),
}
CALLS = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)

MAIN_CALLS = pytest.mark.parametrize("name", ["value_and_grad", "grad", "update"])

REVERSE_ONLY = """
import jax

@jax.custom_vjp
def reverse_only(x):
    return 2 * x

reverse_only.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))

@jax.custom_jvp
def refusing(x):
    return 2 * x

@refusing.defjvp
def rule(primals, tangents):
    raise RuntimeError(
        "Unexpected tangent. `*args` and `**kwargs` to `filter_custom_vjp` cannot be "
        "autodifferentiated."
    )

def loop(p):
    return jax.lax.fori_loop(0, 2, lambda _, x: reverse_only(x), p)

inside_jit = jax.jit(reverse_only)
"""
SWITCHES = {
    "diffrax/_adjoint.py": ("adjoint=diffrax.ForwardMode()", "diffrax.DirectAdjoint()"),
    "optimistix/_adjoint.py": ("adjoint=optimistix.ImplicitAdjoint()",),
    "jaxopt/_src/implicit_diff.py": ("implicit_diff=False",),
    "jax/experimental/ode.py": ("diffrax.diffeqsolve", "in place of odeint"),
    "equinox/_ad.py": ("equinox.filter_custom_jvp", "kind='lax'"),
}


@pytest.fixture(scope="module", params=SWITCHES)
def library(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("site-packages") / request.param
    path.parent.mkdir(parents=True)
    path.write_text(REVERSE_ONLY)
    return module_at(path), SWITCHES[request.param]


def says(kind, *parts):
    return pytest.raises(kind, match="(?s)" + ".*".join(map(re.escape, parts)))


@MODES
@MAIN_CALLS
def test_a_library_that_has_reverse_rules_alone(mode, name, library):
    module, switches = library
    verb = VERBS[name]
    for name in ("reverse_only", "inside_jit", "loop"):
        function = getattr(module, name)

        def loss_of_mine(p, function=function):
            return jnp.sum(function(p) ** 2)

        with says(
            TypeError,
            "jax.custom_vjp function reverse_only",
            "test_ways_out.py",
            "loss_of_mine",
            "has no JVP",
            *switches,
            "forwax.FiniteDifference",
        ):
            mode(verb(loss_of_mine))(KEY, P)


@MODES
@MAIN_CALLS
def test_what_equinox_says_under_jit(mode, name, library):
    module, switches = library
    loss_of_mine = lambda p: jnp.sum(module.refusing(p) ** 2)
    with says(TypeError, "a custom_vjp function has no JVP", *switches):
        mode(VERBS[name](loss_of_mine))(KEY, P)


def test_an_unexpected_tangent_of_nobody_passes_as_it_is():
    @jax.custom_jvp
    def mine(x):
        return x

    @mine.defjvp
    def rule(primals, tangents):
        raise RuntimeError("Unexpected tangent.")

    with pytest.raises(RuntimeError, match=r"^Unexpected tangent\."):
        fx.grad(lambda p: jnp.sum(mine(p)))(KEY, P)


@jax.custom_vjp
def harmless(x):
    return x


@jax.custom_vjp
def harmful(x):
    return 2 * x


for function in (harmless, harmful):
    function.defvjp(lambda x: (x, None), lambda _, g: (g,))


@MODES
@CALLS
def test_the_users_function_and_not_one_that_no_tangent_meets(mode, verb):
    def loss_of_mine(p):
        data = harmless(jnp.ones(3))
        return jnp.sum(jax.jit(harmful)(p * data))

    with says(
        TypeError,
        "function harmful at ",
        "(called at ",
        "loss_of_mine)) on",
        "jax.custom_jvp; or use",
    ):
        mode(verb(loss_of_mine))(KEY, P)


@MODES
def test_one_that_no_tangent_meets_is_no_error(mode):
    got = mode(fx.grad(lambda p: jnp.sum(p * harmless(jnp.ones(3))), fx.Exact()))
    np.testing.assert_allclose(got(KEY, P), 1.0)
    single = fx.grad(lambda p: p[0] * harmless(jnp.ones(())))
    np.testing.assert_allclose(jnp.abs(mode(single)(KEY, P)), 1.0)


# --- no derivative at all ---


def double(x):
    return 2 * np.asarray(x)


def in_place(x_ref, o_ref):
    o_ref[...] = 2 * x_ref[...]


like = jax.ShapeDtypeStruct((3,), jnp.float32)
WITHOUT_DERIVATIVE = {
    "pure_callback": lambda p: jax.pure_callback(
        double, like, p, vmap_method="sequential"
    ),
    "io_callback": lambda p: io_callback(double, like, p),
    "schur": lambda p: jax.lax.linalg.schur(jnp.diag(p) + 1.0)[0],
    "betainc": lambda p: jax.scipy.special.betainc(p, p + 1, 0.3),
    "pallas": lambda p: pl.pallas_call(
        in_place, out_shape=like, interpret=True, input_output_aliases={0: 0}
    )(p),
}


@MODES
@CALLS
@pytest.mark.parametrize("name", WITHOUT_DERIVATIVE)
def test_what_has_no_derivative(mode, verb, name):
    def loss_of_mine(p):
        return jnp.sum(WITHOUT_DERIVATIVE[name](p) ** 2)

    with says(
        (ValueError, NotImplementedError),
        "JAX has no derivative of at ",
        "test_ways_out.py",
        "forwax.FiniteDifference()",
        "JAX says: ",
    ):
        mode(verb(loss_of_mine))(KEY, P)


@MODES
@pytest.mark.parametrize("name", WITHOUT_DERIVATIVE)
@pytest.mark.parametrize("num_tangents", [1, 4])
def test_finite_differences_take_it(mode, name, num_tangents):
    loss = lambda p: jnp.sum(WITHOUT_DERIVATIVE[name](p) ** 2)
    rule = fx.FiniteDifference(num_tangents=num_tangents, epsilon=1e-2)
    assert np.isfinite(mode(fx.grad(loss, rule))(KEY, P)).all()


def test_rules_on_sites_name_the_place_too():
    def loss_of_mine(p, x):
        return jnp.sum(WITHOUT_DERIVATIVE["schur"](p * x))

    with says(NotImplementedError, "test_ways_out.py", "FiniteDifference()", "schur"):
        fx.grad(loss_of_mine, fx.ActivityPerturbation())(KEY, P, P)


def test_an_error_of_the_loss_itself_passes_as_it_is():
    def loss(p):
        raise ValueError("my gradient is not mine")

    with pytest.raises(ValueError, match=r"^my gradient") as found:
        fx.grad(loss)(KEY, P)
    assert found.value.__cause__ is None


# --- NumPy ---

CONVERSIONS = {
    "asarray": lambda p: np.sum(np.asarray(p) ** 2),
    "float": lambda p: float(jnp.sum(p)) ** 2,
    "math": lambda p: math.sin(p[0]),
}


@MODES
@CALLS
@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_loss_of_numpy(mode, verb, name):
    def loss_of_mine(p):
        return jnp.asarray(CONVERSIONS[name](p), jnp.float32)

    with says(
        TypeError,
        "an array of NumPy or a number of Python at ",
        "test_ways_out.py",
        "jax.numpy",
        "forwax.FiniteDifference()",
        "jax.pure_callback",
    ):
        mode(verb(loss_of_mine))(KEY, P)


@pytest.mark.parametrize("name", CONVERSIONS)
def test_finite_differences_take_a_loss_of_numpy(name):
    rule = fx.FiniteDifference(epsilon=1e-2, num_tangents=2)
    assert np.isfinite(fx.grad(CONVERSIONS[name], rule)(KEY, P)).all()
    with says(TypeError, "jax.pure_callback"):
        jax.jit(fx.grad(CONVERSIONS[name], rule))(KEY, P)


def test_a_branch_on_values_keeps_jaxs_own_error():
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(fx.grad(lambda p: p[0] if p[1] > 0 else p[2]))(KEY, P)


# --- data ---


@MODES
def test_data_that_are_closed_over(mode):
    data = jnp.ones((4, 3))
    loss = lambda p, indices: jnp.sum(jnp.tanh(data @ p))
    grad = fx.grad(loss, fx.ActivityPerturbation(), in_axes=(None, 0))
    with says(
        ValueError,
        "depends on the parameters alone",
        "what it closes over is no data",
        "(key, params, data) with loss(params, data)",
    ):
        mode(grad)(KEY, P, jnp.arange(4))


# --- the libraries themselves ---


def odeint_loss(p):
    field = lambda y, t, a: -a * y
    return jnp.sum(odeint(field, jnp.ones(3), jnp.linspace(0.0, 1.0, 3), p) ** 2)


def diffrax_loss(p, **options):
    diffrax = pytest.importorskip("diffrax")
    term = diffrax.ODETerm(lambda t, y, a: -a * y)
    solution = diffrax.diffeqsolve(
        term, diffrax.Tsit5(), 0.0, 1.0, 0.1, jnp.ones(3), args=p, **options
    )
    return jnp.sum(solution.ys**2)


def backsolve_loss(p):
    diffrax = pytest.importorskip("diffrax")
    return diffrax_loss(p, adjoint=diffrax.BacksolveAdjoint())


def event_loss(p):
    diffrax = pytest.importorskip("diffrax")
    event = diffrax.Event(lambda t, y, args, **rest: jnp.sum(y) - 2.5)
    return diffrax_loss(p, event=event)


def optimistix_loss(p, checkpointed=True):
    optimistix = pytest.importorskip("optimistix")
    adjoint = optimistix.RecursiveCheckpointAdjoint()
    options = {"adjoint": adjoint} if checkpointed else {}
    solver = optimistix.Newton(1e-4, 1e-4)
    root = lambda y, a: y**2 - a
    solution = optimistix.root_find(root, solver, jnp.ones(3), args=p, **options)
    return jnp.sum(solution.value)


def jaxopt_loss(p, implicit_diff=True):
    jaxopt = pytest.importorskip("jaxopt", exc_type=ImportError)
    solver = jaxopt.GradientDescent(
        lambda x, a: jnp.sum((x - a) ** 2), maxiter=5, implicit_diff=implicit_diff
    )
    return jnp.sum(solver.run(jnp.zeros(3), p).params ** 2)


def equinox_loss(p, of_arguments=False):
    equinox = pytest.importorskip("equinox")

    @equinox.filter_custom_vjp
    def product(x, y):
        return x * y

    product.def_fwd(lambda perturbed, x, y: (x * y, None))
    product.def_bwd(lambda kept, g, perturbed, x, y: g)
    ones = jnp.ones(3)
    return jnp.sum(product(ones, p) if of_arguments else product(p, ones))


REAL = {
    "odeint": (odeint_loss, "odeint_loss", "in place of odeint"),
    "diffrax": (diffrax_loss, "diffrax_loss", "diffrax.ForwardMode()"),
    "backsolve": (backsolve_loss, "diffrax_loss", "diffrax.ForwardMode()"),
    "event": (event_loss, "diffrax_loss", "diffrax.ForwardMode()"),
    "optimistix": (optimistix_loss, "optimistix_loss", "optimistix.ImplicitAdjoint()"),
    "jaxopt": (jaxopt_loss, "jaxopt_loss", "implicit_diff=False"),
    "equinox": (equinox_loss, "equinox_loss", "equinox.filter_custom_jvp"),
    "equinox-arguments": (
        partial(equinox_loss, of_arguments=True),
        "equinox_loss",
        "equinox.filter_custom_jvp",
    ),
}
libraries = pytest.mark.filterwarnings("ignore")


@libraries
@pytest.mark.promotes("libraries mix dtypes")
@MODES
@pytest.mark.parametrize("verb", ["value_and_grad", "grad", "update"])
@pytest.mark.parametrize("name", REAL)
def test_real_libraries(mode, verb, name):
    loss, place, switch = REAL[name]
    with (
        jax.numpy_rank_promotion("allow"),
        says(TypeError, "test_ways_out.py", place, "has no JVP", switch),
    ):
        mode(VERBS[verb](loss))(KEY, P)


@libraries
@pytest.mark.promotes("libraries mix dtypes")
@MODES
@pytest.mark.parametrize("name", ["forward", "direct", "implicit", "unrolled"])
def test_the_switches_work(mode, name):
    with jax.numpy_rank_promotion("allow"):
        if name in ("forward", "direct"):
            diffrax = pytest.importorskip("diffrax")
            kind = diffrax.ForwardMode if name == "forward" else diffrax.DirectAdjoint
            loss = lambda p: diffrax_loss(p, adjoint=kind())
            truth = -2 * jnp.exp(-2 * P)
        elif name == "implicit":
            loss = lambda p: optimistix_loss(p, checkpointed=False)
            truth = 0.5 / jnp.sqrt(P)
        else:
            loss = lambda p: jaxopt_loss(p, implicit_diff=False)
            truth = 2 * P
        got = mode(fx.grad(loss, fx.Exact()))(KEY, P)
    np.testing.assert_allclose(got, truth, rtol=2e-3)
