"""Programs in which parameters meet data in every way that the site finder must follow.

Each is a loss of one example.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import forwax as fx

N = 2


def normal(seed: int, *shape: int) -> np.ndarray:
    """NumPy's, so that listing the programs compiles nothing."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Program:
    """A loss with its parameters and data; `in_axes` None makes it a loss of the whole batch."""

    loss: Callable[..., Any]
    params: Any
    data: tuple[Any, ...]
    in_axes: Any = None

    @property
    def args(self):
        return (self.params, *self.data)

    @property
    def options(self):
        return {"in_axes": self.in_axes}


PROGRAMS: dict[str, Program] = {}


def program(params, *data, mapped=True, **options):
    """Register a loss under its function's name."""

    def register(loss):
        in_axes = (None, *[0] * len(data)) if mapped else None
        PROGRAMS[loss.__name__] = Program(loss, params, data, in_axes, **options)
        return loss

    return register


def squares(*values):
    return sum(jnp.sum(jnp.sin(v) * v) for v in values)


@program(
    {"right": normal(0, 3, 4), "left": normal(1, 2, 4), "bias": normal(2, 2)},
    normal(3, N, 3),
)
def dense_from_either_side(p, x):
    return squares(p["left"] @ jnp.tanh(x @ p["right"]) + p["bias"])


@program({"w": normal(0, 2, 3, 4), "v": normal(1, 4, 2, 2)}, normal(2, N, 2, 5, 3))
def batched_dot(p, x):
    h = jnp.tanh(jnp.einsum("gti,gio->gto", x, p["w"]))
    return squares(jnp.einsum("gto,ogk->tk", h, p["v"]))


@program({"w": normal(0, 12), "v": normal(1, 2, 4), "s": normal(2)}, normal(3, N, 3))
def reshaped_cast_and_scaled_weights(p, x):
    w = p["w"].reshape(4, 3).T.astype(jnp.float32) * jnp.exp(p["s"])
    h = jnp.tanh(x @ w)
    return squares(h @ p["v"].T)


@program(
    {
        "k": normal(0, 3, 3, 2, 4),
        "b": normal(1, 4),
        "d": normal(2, 2, 2, 1, 8),
        "o": normal(3, 8, 2),
    },
    normal(4, N, 5, 5, 2),
)
def convolutions(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    h = (
        lax.conv_general_dilated(
            x[None], p["k"], (2, 2), "SAME", dimension_numbers=numbers
        )
        + p["b"][None, None, None]
    )
    h = jax.nn.relu(h)
    h = lax.conv_general_dilated(
        h,
        p["d"],
        (1, 1),
        "VALID",
        rhs_dilation=(1, 1),
        dimension_numbers=numbers,
        feature_group_count=4,
    )
    return squares(jnp.mean(jnp.tanh(h[0]), axis=(0, 1)) @ p["o"])


@program(
    {
        "w": normal(0, 3, 4),
        "gain": normal(1, 4),
        "bias": normal(2, 4),
        "out": normal(3, 4, 2),
    },
    normal(4, N, 3),
)
def layer_norm(p, x):
    h = x @ p["w"]
    h = (h - jnp.mean(h)) / jnp.sqrt(jnp.var(h) + 1e-5)
    return squares(jnp.tanh(h * p["gain"] + p["bias"]) @ p["out"])


@program(
    {"table": normal(0, 5, 3), "position": normal(1, 4, 3), "w": normal(2, 3, 3)},
    np.arange(N * 4).reshape(N, 4) % 5,
)
def embedding(p, tokens):
    h = p["table"][tokens] + p["position"]
    h = jnp.tanh(h @ p["w"])
    return squares(h @ p["table"].T)


@program({"w": normal(0, 3, 3)}, normal(1, N, 3))
def tied(p, x):
    return squares(jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"].T) @ p["w"])


@program(
    {"w": normal(0, 3, 4), "g": normal(1, 4), "v": normal(2, 4, 2)}, normal(3, N, 3)
)
def weight_standardisation(p, x):
    w = (
        (p["w"] - p["w"].mean(0, keepdims=True))
        / (p["w"].std(0, keepdims=True) + 1e-3)
        * p["g"][None]
    )
    return squares(jax.nn.silu(x @ w) @ p["v"])


@program({"w": normal(0, 3, 4), "v": normal(1, 4, 2)}, normal(2, N, 3))
def weight_decay(p, x):
    return squares(jnp.tanh(x @ p["w"]) @ p["v"]) + 0.1 * (
        jnp.sum(p["w"] ** 2) + jnp.sum(p["v"] ** 4)
    )


@program(
    {
        "i": normal(0, 2, 3),
        "h": normal(1, 3, 3),
        "b": normal(2, 3),
        "start": normal(3, 3),
        "o": normal(4, 3, 2),
    },
    normal(5, N, 4, 2),
)
def recurrent(p, xs):
    def step(h, x):
        h = jnp.tanh(x @ p["i"] + h @ p["h"] + p["b"])
        return h, h

    last, hs = lax.scan(step, p["start"], xs)
    return squares(hs @ p["o"]) + squares(last @ p["o"])


@program(
    {
        "i": normal(0, 2, 9),
        "h": normal(1, 3, 9),
        "b": normal(2, 9),
        "o": normal(3, 3, 2),
    },
    normal(4, N, 3, 2),
)
def gated_recurrent(p, xs):
    def step(h, x):
        ir, iz, ic = jnp.split(x @ p["i"] + p["b"], 3)
        hr, hz, hc = jnp.split(h @ p["h"], 3)
        z = jax.nn.sigmoid(iz + hz)
        return (1 - z) * jnp.tanh(ic + jax.nn.sigmoid(ir + hr) * hc) + z * h, None

    return squares(lax.scan(step, jnp.zeros(3), xs, reverse=True)[0] @ p["o"])


@program(
    {
        "i": normal(0, 2, 3),
        "h": normal(1, 3, 3),
        "o": normal(2, 3, 2),
        "c": normal(3, 2),
    },
    normal(4, N, 4, 2),
)
def readout_and_loss_in_a_scan(p, xs):
    def step(carry, x):
        h, total = carry
        h = jnp.tanh(x @ p["i"] + h @ p["h"])
        y = h @ p["o"] + p["c"]
        return (h, total + squares(y)), (y * 2, x)

    (h, total), (ys, xs) = lax.scan(step, (jnp.zeros(3), 0.5), xs, reverse=True)
    return squares(ys) + total + squares(h)


@program(
    {"w": normal(0, 3, 3, 3), "b": normal(1, 3, 3), "o": normal(2, 3, 2)},
    normal(3, N, 3),
)
def scan_over_layers(p, x):
    @jax.checkpoint
    def block(h, layer):
        w, b = layer
        return h + jnp.tanh(h @ w + b), jnp.sum(w**2)

    h, decay = lax.scan(block, x, (p["w"], p["b"]))
    return squares(h @ p["o"]) + 0.1 * jnp.sum(decay)


@program({"w": normal(0, 3, 3), "gain": normal(1, 3)}, normal(2, N, 2, 3))
def nested_scans(p, xs):
    def inner(h, t):
        return jnp.tanh(h @ p["w"] * p["gain"] + t), None

    def outer(h, x):
        h, _ = lax.scan(inner, h, jnp.arange(2.0))
        return h + x, h @ p["w"].T

    h, ys = lax.scan(outer, xs[0], xs)
    return squares(h, ys)


@program({"w": normal(0, 3, 3), "b": normal(1, 3)}, normal(2, N, 3))
def jit_and_remat(p, x):
    dense = jax.jit(lambda w, x: x @ w)
    add = jax.jit(lambda x, b: x + b)
    h = jnp.tanh(add(dense(p["w"], x), p["b"]))
    return squares(jax.checkpoint(lambda w, h: jnp.tanh(h @ w) @ w)(p["w"], h))


@program(
    {"w": normal(0, 3, 3), "v": normal(1, 3, 3), "s": normal(2)},
    normal(3, N, 3),
    np.array([0, 1]),
)
def conditional(p, x, which):
    h = jnp.tanh(x @ p["w"])
    h = lax.switch(which, [lambda h: h @ p["v"], lambda h: jnp.sin(h) * p["s"]], h)
    return squares(jnp.tanh(h) @ p["w"])


@program({"w": 0.3 * normal(0, 3, 3), "v": normal(1, 3, 2)}, normal(2, N, 3))
def while_loop(p, x):
    def again(state):
        return (jnp.sum(state[1] ** 2) > 1e-2) & (state[0] < 4)

    h = lax.while_loop(again, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"])), (0, x))[1]
    return squares(h @ p["v"])


@program({"w": normal(0, 3, 3, 3), "v": normal(1, 3, 2)}, normal(2, N, 3))
def fori_with_indexed_weights(p, x):
    h = lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"][i]), x)
    return squares(h @ p["v"])


@program(
    {
        "q": normal(0, 3, 4),
        "k": normal(1, 3, 4),
        "v": normal(2, 3, 4),
        "o": normal(3, 4, 3),
    },
    normal(4, N, 3, 3),
)
def attention(p, x):
    q, k, v = (jnp.moveaxis((x @ p[name]).reshape(3, 2, 2), 1, 0) for name in "qkv")
    weights = jax.nn.softmax(
        jnp.where(jnp.tri(3, dtype=bool), q @ jnp.swapaxes(k, 1, 2), -1e9)
    )
    h = x + jnp.moveaxis(weights @ v, 0, 1).reshape(3, 4) @ p["o"]
    return squares(jnp.tanh(h) @ p["q"])


@program(
    {"w": normal(0, 3, 4), "v": normal(1, 4, 3), "heads": normal(2, 2, 4, 2)},
    normal(3, N, 3),
)
def local_losses(p, x):
    first = jnp.tanh(x @ p["w"])
    second = jnp.tanh(jnp.tanh(lax.stop_gradient(first) @ p["v"]) @ p["v"].T)
    return fx.LocalLosses(
        {"a": jnp.sin(first @ p["heads"][0]) ** 2, "b": squares(second @ p["heads"][1])}
    )


@program({"w": normal(0, 3, 4), "v": normal(1, 4, 2)}, normal(2, N, 3))
def comparison_behind_outputs(p, x):
    hidden = jnp.tanh(x @ p["w"])
    scores = hidden @ p["v"]
    return fx.LocalLosses(
        {"a": squares(hidden), "b": jnp.where(scores < -0.5, 0.0, scores)[0]}
    )


@program({"w": normal(0, 3, 4), "v": normal(1, 4, 2)}, normal(2, 5, 3), mapped=False)
def batch_loss(p, x):
    h = jnp.tanh(x @ p["w"])
    h = (h - h.mean(0, keepdims=True)) / (h.std(0, keepdims=True) + 0.1)
    return squares(h @ p["v"]) / 5


@program({"w": normal(0, 3, 4), "v": normal(1, 4, 2)}, normal(2, N, 3))
def stopped_weights(p, x):
    w = p["w"] / lax.stop_gradient(jnp.linalg.norm(p["w"]))
    return squares(jnp.tanh(x @ w) @ p["v"] * lax.stop_gradient(p["v"]).sum())


@program({"w": normal(0, 3, 4), "a": normal(1), "v": normal(2, 4, 2)}, normal(3, N, 3))
def custom_rule_with_a_parameter(p, x):
    h = _leaky(x @ p["w"], p["a"])
    return squares(h @ p["v"])


@jax.custom_jvp
def _leaky(x, a):
    return jnp.where(x > 0, x, a * x)


@_leaky.defjvp
def _leaky_jvp(primals, tangents):
    (x, a), (dx, da) = primals, tangents
    return _leaky(x, a), jnp.where(x > 0, dx, a * dx + da * x)


@program(
    {
        "w": normal(0, 3, 4),
        "b": normal(1, 4),
        "v": normal(2, 4, 4),
        "o": normal(3, 4, 2),
    },
    normal(4, N, 3),
)
def noise_points(p, x):
    def norm(h):
        return fx.noise_point((h - jnp.mean(h)) / jnp.sqrt(jnp.var(h) + 1e-5))

    h = jax.nn.relu(norm(x @ p["w"] + p["b"]))
    return squares(jax.nn.relu(norm(h @ p["v"])) @ p["o"])


@program({"w": normal(0, 3, 3), "v": normal(1, 3, 2)}, normal(2, N, 3))
def spectral_norm(p, x):
    u = lax.while_loop(
        lambda s: s[0] < 3,
        lambda s: (s[0] + 1, p["w"] @ s[1] / jnp.linalg.norm(s[1])),
        (0, jnp.ones(3)),
    )[1]
    return squares(jnp.tanh(x @ (p["w"] / jnp.linalg.norm(u))) @ p["v"])


@program(
    {"w": normal(0, 3, 3), "used": normal(1, 3), "unused": normal(2, 3)},
    normal(3, N, 3),
)
def residual_with_shared_gain(p, x):
    h = x + jnp.tanh(x @ p["w"]) * p["used"]
    h = h + jnp.tanh(h @ p["w"]) * p["used"]
    return squares(h) + 0.0 * jnp.sum(lax.stop_gradient(p["unused"]))


@program({"w": normal(0, 3, 3), "s": normal(1, 3)}, normal(2, N, 4, 3))
def conditional_inside_a_scan(p, xs):
    def step(h, x):
        h = lax.cond(x[0] > 0, lambda h: h @ p["w"], lambda h: h * p["s"], h)
        return jnp.tanh(h + x @ p["w"]), None

    return squares(lax.scan(step, xs[0], xs)[0] * p["s"])


@program({"w": normal(0, 3, 3), "c": normal(1, 3)}, normal(2, N, 4, 3))
def parameters_in_carries(p, xs):
    def step(carry, x):
        h, w, total, c = carry
        return (jnp.tanh(h @ w + x), w, total + jnp.sum(w**2), c * 0.5), h * c

    (h, _, total, c), ys = lax.scan(step, (xs[0], p["w"], 0.0, p["c"]), xs)
    return squares(h, ys, c) + 0.1 * total


@program({"w": normal(0, 3, 2, 2), "b": normal(1, 4)}, normal(2, N, 3))
def complex_activities(p, x):
    z = lax.complex(x @ p["w"][..., 0], x @ p["w"][..., 1])
    h = jnp.fft.fft(jnp.concatenate([z, z * z]) * p["b"].astype(jnp.complex64))
    return jnp.sum(jnp.abs(h) ** 2 * 0.1) + squares(jnp.angle(h + 3))


@program({"w": normal(0, 4, 4)}, normal(1, N, 4), np.array([1, 3]))
def scatter_and_slices(p, x, i):
    w = p["w"].at[i].add(x)
    h = jnp.tanh(lax.dynamic_index_in_dim(w, i, keepdims=False) + x @ p["w"])
    return squares(jnp.sort(h)[1:] * p["w"][0, 1:])


@program({"w": 2 * normal(0, 3, 4), "v": normal(1, 4, 2)}, normal(2, N, 3))
def casts_to_integers(p, x):
    whole = p["w"].astype(jnp.int32)
    h = jnp.tanh(
        x @ p["w"]
        + x @ whole.astype(jnp.float32)
        + jnp.sum(whole @ whole.T).astype(jnp.float32)
    )
    return squares(h @ p["v"]) + 0.1 * jnp.sum(p["v"].astype(bool).astype(jnp.float32))


@program(
    {"table": normal(0, 5, 3), "w": normal(1, 3, 3)}, np.array([[1, 7, 4], [9, 0, 1]])
)
def rows_that_are_not_there(p, tokens):
    ones = jnp.take(p["table"], tokens, axis=0, mode="fill", fill_value=1.0)
    nans = jnp.take(p["table"], tokens, axis=0, mode="fill")
    return squares(jnp.tanh(ones @ p["w"]) + jnp.where(jnp.isnan(nans), 0.5, nans))
