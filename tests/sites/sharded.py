"""A small loss whose examples lie on several devices."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import forwax as fx
from sites.programs import normal

PARAMS = {"w": normal(0, 3, 4), "b": normal(1, 4), "v": normal(2, 4, 2)}
EACH = (None, 0)


def loss(p, x):
    return jnp.sum(jnp.sin(jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]))


def sharded(rules, check=True, loss=loss, in_axes=EACH):
    """The gradients of all examples by each rule: one compiled program, and arrays of NumPy."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def grads(key, p, x):
        got = [fx.grad(loss, rule, in_axes=in_axes)(key, p, x) for rule in rules]
        return got if check else jax.lax.psum(got, "d")

    step = jax.shard_map(
        grads, mesh=mesh, in_specs=(P(), P(), P("d")), out_specs=P(), check_vma=check
    )
    return jax.device_get(jax.jit(step)(jax.random.key(0), PARAMS, normal(3, 8, 3)))
