"""What crosses a network in a step, what a replay costs, and how long a run is as a file.

    python benchmarks/wire.py [--processes 1 2 4] [--rounds 15] [--quick] [--out runs/wire]

Starts so many processes of one CPU device each, joined by gloo, which compile the steps of the MLP
784-1024-1024-10 and read the bytes of collectives in the compiled programs: what a process receives
in a step. Then times a replay of W·k terms beside taking k slopes of 64 examples, in turn, and
counts the bytes of ledgers. Saves all as wire.md. A few minutes, seconds with --quick.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import forwax as fx
from forwax import tangents
from forwax.lab.distributed.traffic import collective_bytes
from step_time import WIDTHS, loss, mlp
from timing import interleaved, machine, medians

K = 8
BATCH = 64
SEED = 0
RULE = fx.WeightPerturbation(tangents.LowRank(), K)
LIMIT = 600
"""Seconds that the processes may take."""

RANK = "WIRE_RANK"
"""The environment variable that numbers a process: rank, count and port."""


def own_keys(is_sent: bool, key: Any, params: Any, x: Any, y: Any) -> Any:
    own = jax.random.fold_in(key, lax.axis_index("d"))
    value, mine = fx.slopes(loss, RULE)(own, params, x, y)
    world = mine.gather("d", key=None if is_sent else key)
    return lax.pmean(value, "d"), fx.replay(loss, RULE)(world, 0.02, params, x, y)


def same_key(key: Any, params: Any, x: Any, y: Any) -> Any:
    def shared(params: Any, x: Any, y: Any) -> Any:
        return lax.pmean(loss(params, x, y), "d")

    return fx.update(shared, RULE, learning_rate=0.02)(key, params, x, y)


def gradient(rule: fx.Rule, key: Any, params: Any, x: Any, y: Any) -> Any:
    own = jax.random.fold_in(key, lax.axis_index("d"))
    # the gradient of the own rows: a varying copy, or else jax would sum gradients by itself
    copy = jax.tree.map(lambda p: lax.pcast(p, "d", to="varying"), params)
    value, grads = fx.value_and_grad(loss, rule)(own, copy, x, y)
    value, grads = lax.pmean((value, grads), "d")
    return value, jax.tree.map(lambda p, g: p - 0.02 * g, params, grads)


STEPS: dict[str, Callable[..., Any]] = {
    "one key, the mean inside the loss": same_key,
    "own keys, derived": partial(own_keys, False),
    "own keys, sent": partial(own_keys, True),
    "activity noise, the estimate's mean": partial(gradient, fx.ActivityPerturbation()),
    "backprop, the gradient's mean": partial(gradient, fx.Backprop()),
}


def received() -> Iterator[tuple[str, int]]:
    """The bytes of a step's collectives over all devices, from the compiled program."""
    devices = jax.devices()
    mesh = jax.make_mesh((len(devices),), ("d",), (AxisType.Auto,), devices=devices)

    def like(leaf: Any, spec: P) -> Any:
        where = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    params = jax.tree.map(
        partial(like, spec=P()), jax.eval_shape(mlp, jax.random.key(SEED))
    )
    x = like(jax.ShapeDtypeStruct((BATCH, WIDTHS[0]), jnp.float32), P("d"))
    y = like(jax.ShapeDtypeStruct((BATCH,), jnp.int32), P("d"))
    for name, step in STEPS.items():
        run = jax.shard_map(
            partial(step, jax.random.key(SEED)),
            mesh=mesh,
            in_specs=(P(), P("d"), P("d")),
            out_specs=P(),
        )
        text = jax.jit(run).lower(params, x, y).compile().as_text()
        yield name, collective_bytes(text)


def as_process(rank: int, count: int, port: int) -> None:
    if count > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{port}", count, rank, cluster_detection_method="deactivate"
        )
    for name, number in received():
        if rank == 0:
            print(f"{name}\t{number}", flush=True)


def over_processes(count: int) -> dict[str, int]:
    """The bytes that each of so many processes receives."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, RANK: f"{rank} {count} {port}", "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        told = processes[0].communicate(timeout=LIMIT)[0]
    finally:
        for process in processes:
            process.kill()
    lines = [line.split("\t") for line in told.splitlines() if "\t" in line]
    if len(lines) < len(STEPS):
        raise RuntimeError(f"{count} processes told of {len(lines)} steps")
    return {name: int(number) for name, number in lines}


def replays(terms: list[int], rounds: int) -> dict[str, float]:
    """The median seconds of k slopes, and of replays of so many terms."""
    params = mlp(jax.random.key(SEED))
    x = jax.random.normal(jax.random.key(SEED), (BATCH, WIDTHS[0]))
    y = jnp.zeros(BATCH, jnp.int32)
    take, add = jax.jit(fx.slopes(loss, RULE)), jax.jit(fx.replay(loss, RULE))
    _, slopes = take(jax.random.key(SEED), params, x, y)
    calls: dict[str, Callable[[], Any]] = {
        "slopes": partial(take, jax.random.key(SEED), params, x, y)
    }
    for number in terms:
        world = slopes.concatenate(*[slopes] * (number // K - 1))
        calls[f"{number}"] = partial(add, world, 0.02, params, x, y)
    return medians(interleaved(calls, rounds))


def ledger_bytes(num_rows: int, num_keys: int, num_tangents: int) -> int:
    """The bytes of a ledger."""
    steps = np.arange(num_rows)
    rule = fx.WeightPerturbation(num_tangents=num_tangents)

    def key_of(step: Any, i: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(SEED), step)
        return jax.random.key_data(jax.random.fold_in(key, i) if num_keys > 1 else key)

    keys = jax.vmap(jax.vmap(key_of, (None, 0)), (0, None))(steps, np.arange(num_keys))
    block = fx.Slopes(keys, jnp.ones((num_rows, num_keys, num_tangents)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.ledger"
        params = {"w": jnp.zeros((4, 4))}
        with fx.Ledger.create(
            path, rule, params, jax.random.key(SEED), num_keys=num_keys
        ) as ledger:
            ledger.append(steps, block, np.ones(num_rows))
        return path.stat().st_size


def table(*rows: Any) -> list[str]:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return [*lines[:1], "|---|" + "---:|" * (len(rows[0]) - 1), *lines[1:], ""]


def report(counts: list[int], rounds: int, terms: list[int]) -> Iterator[str]:
    size = sum(
        leaf.size for leaf in jax.tree.leaves(jax.eval_shape(mlp, jax.random.key(SEED)))
    )
    yield f"{machine()}; n = {size:,}, k = {K}, rank-1, batch {BATCH}."
    yield ""
    found = {count: over_processes(count) for count in counts}
    yield from table(
        ["bytes received a step, processes:", *counts],
        *([name, *(f"{found[each][name]:,}" for each in counts)] for name in STEPS),
    )
    seconds = replays(terms, rounds)
    base = seconds.pop("slopes")
    yield from table(
        [f"time / that of {K} slopes ({1e3 * base:.1f} ms)", "ratio"],
        *(
            [f"replay of {name} terms", f"{s / base:.2f}"]
            for name, s in seconds.items()
        ),
    )
    ledgers = (10_000, 1, 1), (10_000, 1, 8), (10_000, 4, 8)
    yield from table(
        ["ledger of 10,000 steps", "bytes"],
        *([f"s = {s}, k = {k}", f"{ledger_bytes(r, s, k):,}"] for r, s, k in ledgers),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="2 processes, few terms")
    parser.add_argument("--out", type=Path, default=Path("runs/wire"))
    options = parser.parse_args()
    counts = [2] if options.quick else options.processes
    terms = [K, 4 * K] if options.quick else [K, 4 * K, 8 * K, 16 * K, 32 * K]
    options.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for line in report(counts, 3 if options.quick else options.rounds, terms):
        print(line, flush=True)
        lines.append(line)
    (options.out / "wire.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    if RANK in os.environ:
        as_process(*map(int, os.environ[RANK].split()))
    else:
        main()
