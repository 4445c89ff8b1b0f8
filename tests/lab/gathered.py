"""Trains through gathered slopes on all devices, for tests/lab/test_distributed.py.

Its words: a port, how many processes there are, the number of this one, and on how many devices to
train, several numbers where this process is alone. It prints a line of JSON for each of these: what
SHA-256 the parameters have after a scan of steps, and the bytes of a step's collectives.
"""

import hashlib
import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import forwax as fx
from forwax import tangents
from forwax.lab.distributed.traffic import collective_bytes

K = 3
RULES = {
    "rank 1": fx.WeightPerturbation(tangents.LowRank(), K),
    "normal": fx.WeightPerturbation(tangents.Normal(), K),
}
DRAW = np.random.default_rng(0)
PARAMS = {
    "in": DRAW.normal(size=(6, 8)).astype(np.float32),
    "out": DRAW.normal(size=(8, 3)).astype(np.float32),
}
ROWS = DRAW.normal(size=(8, 6)).astype(np.float32)
TARGETS = DRAW.normal(size=(8, 3)).astype(np.float32)


def loss(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["in"]) @ params["out"] - y) ** 2)


def steps(rule, key, params, x, y):
    """Twenty steps, each of which sends K slopes and a value from each device."""
    take, add = fx.slopes(loss, rule), fx.replay(loss, rule)

    def step(params, number):
        every = jax.random.fold_in(key, number)
        own = jax.random.fold_in(every, lax.axis_index("d"))
        value, mine = take(own, params, x, y)
        world = mine.gather("d", key=every)
        rate = 0.02 / (1 + number.astype(jnp.float32))
        return add(world, rate, params, x, y), lax.pmean(value, "d")

    return lax.scan(step, params, jnp.arange(20))


def spread(mesh, value, spec):
    """A global array, of which each process holds its part."""
    where = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(value.shape, where, lambda part: value[part])


def trained(devices, rule):
    mesh = jax.make_mesh((len(devices),), ("d",), (AxisType.Auto,), devices=devices)
    run = jax.jit(
        jax.shard_map(
            partial(steps, rule, jax.random.key(7)),
            mesh=mesh,
            in_specs=(P(), P("d"), P("d")),
            out_specs=P(),
        )
    )
    params = jax.tree.map(lambda leaf: spread(mesh, leaf, P()), PARAMS)
    inputs = params, spread(mesh, ROWS, P("d")), spread(mesh, TARGETS, P("d"))
    compiled = run.lower(*inputs).compile()
    # a mean of more than two values depends on the order in which a network sums them
    params, _ = compiled(*inputs)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    # a scan of known length; its steps are all that has collectives
    return digest.hexdigest(), collective_bytes(compiled.as_text()) / 20


if __name__ == "__main__":
    port, count, index = map(int, sys.argv[1:4])
    if count > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{port}",
            count,
            index,
            cluster_detection_method="deactivate",
            initialization_timeout=60,
            heartbeat_timeout_seconds=20,
            shutdown_timeout_seconds=20,
        )
    for number in map(int, sys.argv[4:]):
        devices = jax.devices()[:number]
        # a program takes seconds to compile in each process
        names = list(RULES)[: 1 if number > 2 else 2]
        found = {name: trained(devices, RULES[name]) for name in names}
        print(json.dumps(found), flush=True)
