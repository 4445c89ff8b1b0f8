"""Federated learning in Flower: slopes up, a ledger's row down, parameters in no message.

Ten clients hold scikit-learn's digits, split unevenly by label, and never send any. In a round each
client takes 8 slopes of its own digits along directions that follow from the round and its number,
and sends them. The server weighs them by the clients' shares of examples and keeps the row in an
`fx.Ledger`; with the next message clients get the row and replay it. Each client misses a round
with a probability of 1/5, and one comes when half of the rounds are over: it is sent the rows that
it lacks, and replays them. At the end all clients, the server, the ledger replayed alone, and one
process that takes the same rounds without Flower have the same parameters in every bit, or the
example ends with an error.

Messages are Flower's own, by no strategy, since strategies send arrays. A message's bytes are those
of its protobuf with all metadata. FedAvg's are counted in the same way and not sent, and its rounds
by training in this process alone.

    pip install 'forwax[lab,federated]'
    python examples/flower_app.py

Expected, in about a minute on two CPU cores: 13 times the same hash, a test accuracy of 86 % after
200 rounds, and bytes a client and round of 201 up and 551 down, missed rows among them.
FedAvg's messages have 9,986 and 9,915. It passes twice over all digits in a round and comes to 86 %
in 10: then it has sent a third more in all, and waited for the network a twentieth of the times.
"""

import argparse
import copy
import functools
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

# Both would tell their makers of each run; read where they are imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import jax
import jax.numpy as jnp
import numpy as np
import ray
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_to_proto
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from jax import Array
from sklearn.datasets import load_digits

import forwax as fx

# Ray gives clients no accelerator, and bits are equal on one kind of device alone.
jax.config.update("jax_platforms", "cpu")

CLIENTS, TANGENTS, RATE, BATCH = 10, 8, 0.1, 64
AWAY = 0.2
"""The chance that a client misses a round."""
PROCESSES = 2
"""As many clients are simulated at a time."""
LIMIT = 120.0
"""Seconds after which nobody waits any longer; the first round compiles."""
SEED = 0
RULE = fx.WeightPerturbation(num_tangents=TANGENTS)
ROW = np.dtype(
    [("step", "<u4"), ("rate", "<f4"), ("weights", "<f4", (CLIENTS, TANGENTS))]
)

# The problem: digits, and a network with one hidden layer as one vector.

SHAPES = ((64, 32), (32,), (32, 10), (10,))
SIZE = sum(int(np.prod(shape)) for shape in SHAPES)
Examples = tuple[np.ndarray, np.ndarray]


def start() -> Array:
    """The parameters before the first round [n], the same in every process."""
    draws = np.random.default_rng(1)
    parts = [draws.normal(size=shape) * (2 / 64) ** 0.5 for shape in SHAPES]
    return jnp.asarray(np.concatenate([part.ravel() for part in parts]), jnp.float32)


@functools.cache
def digits() -> tuple[list[Examples], Examples]:
    """What each client has, and 360 digits that none has, for the test."""
    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype(np.float32), y.astype(np.int32)
    draws = np.random.default_rng(0)
    order = draws.permutation(len(x))
    test, rest = order[:360], order[360:]
    rows: list[list[int]] = [[] for _ in range(CLIENTS)]
    for label in range(10):
        own = rest[y[rest] == label]
        # few clients have most of a label: Dirichlet shares of concentration 0.3
        shares = np.cumsum(draws.dirichlet(np.full(CLIENTS, 0.3)))[:-1]
        for part, found in zip(
            rows, np.split(own, np.rint(shares * len(own)).astype(int)), strict=True
        ):
            part.extend(found)
    return [(x[part], y[part]) for part in rows], (x[test], y[test])


def batch(slot: int, step: int) -> Examples:
    """The digits that a client draws in a round."""
    x, y = digits()[0][slot]
    rows = np.random.default_rng([slot, step]).integers(len(x), size=BATCH)
    return x[rows], y[rows]


def logits(params: Array, x: Array) -> Array:
    parts, first = [], 0
    for shape in SHAPES:
        size = int(np.prod(shape))
        parts.append(params[first : first + size].reshape(shape))
        first += size
    w1, b1, w2, b2 = parts
    return jax.nn.relu(x @ w1 + b1[None]) @ w2 + b2[None]


def loss(params: Array, x: Array, y: Array) -> Array:
    """The mean cross-entropy of a batch."""
    scores = jax.nn.log_softmax(logits(params, x))
    return -jnp.mean(jnp.take_along_axis(scores, y[:, None], axis=1))


# A round, in two halves.


def keys_of(step: Array) -> Array:
    """The keys of all clients in a round, as `fx.Ledger` derives them [clients, words]."""
    own = jax.random.fold_in(jax.random.key(SEED), step)
    each = jax.vmap(lambda slot: jax.random.fold_in(own, slot))(jnp.arange(CLIENTS))
    return jax.random.key_data(each)


@jax.jit
def weights_of(params: Array, step: Array, slot: Array, x: Array, y: Array) -> Array:
    """What a client sends of a round [k]."""
    key = jax.random.wrap_key_data(keys_of(step)[slot])
    _, slopes = fx.slopes(loss, RULE)(key, params, x, y)
    return slopes.weights[0]


@jax.jit
def moved(params: Array, step: Array, weights: Array, rate: Array) -> Array:
    """The parameters after a round, of its row: weights [clients, k]."""
    return fx.replay(loss, RULE)(fx.Slopes(keys_of(step), weights), rate, params)


def own_weights(params: Array, step: int, slot: int) -> np.ndarray:
    x, y = batch(slot, step)
    return np.asarray(weights_of(params, np.uint32(step), np.int32(slot), x, y))


def row_of(step: int, came: dict[int, np.ndarray], counts: dict[int, int]) -> np.void:
    """A round's row: each client's slopes times its share of the examples of those that came."""
    row = np.zeros((), ROW)
    row["step"], row["rate"] = step, RATE
    total = sum(counts[slot] for slot in came)
    for slot, weights in came.items():
        row["weights"][slot] = weights * np.float32(counts[slot] / total)
    return row[()]


def after(params: Array, row: np.void) -> Array:
    return moved(params, row["step"], row["weights"], row["rate"])


def hash_of(params: Array) -> str:
    """SHA-256 of the parameters' bytes."""
    return hashlib.sha256(np.asarray(params).tobytes()).hexdigest()


# A client. Its parameters are in its own context, and are in no message.

client_app = ClientApp()


def caught_up(message: Message, context: Context) -> tuple[int, Array]:
    """How many rounds a client knows, and its parameters, after the rows that came."""
    step, params = 0, start()
    if "run" in context.state:
        kept = context.state["run"]
        step, params = kept["step"], jnp.asarray(np.frombuffer(kept["params"], "<f4"))
    for row in np.frombuffer(message.content["ledger"]["rows"], ROW):
        if row["step"] == step:  # rows before it are known; without it none can follow
            params = after(params, row)
            step += 1
    kept = {"step": step, "params": np.asarray(params).tobytes()}
    context.state["run"] = ConfigRecord(kept)
    return step, params


def reply(message: Message, **told: int | str | bytes) -> Message:
    return Message(RecordDict({"client": ConfigRecord(told)}), reply_to=message)


@client_app.train()
def take_slopes(message: Message, context: Context) -> Message:
    step, params = caught_up(message, context)
    slot = int(context.node_config["partition-id"])
    weights = own_weights(params, step, slot).tobytes()
    return reply(message, step=step, weights=weights)


@client_app.query()
def tell(message: Message, context: Context) -> Message:
    """Who it is, and a hash of its parameters."""
    step, params = caught_up(message, context)
    slot = int(context.node_config["partition-id"])
    count = len(digits()[0][slot][0])
    return reply(message, slot=slot, step=step, count=count, hash=hash_of(params))


# The server.


def size_of(message: Message) -> int:
    return message_to_proto(message).ByteSize()


class Server:
    """Asks clients, keeps the ledger.

    Attributes:
        params: the parameters of now.
        attendance: which clients came, for each round.
        counts: how many examples each client has.
        up, down: bytes of all messages of training, each way; with how many.
        last: a message of training and a reply, the last ones.
        hashes: what each client has at the end.
    """

    def __init__(self, path: Path) -> None:
        self.params = start()
        key = jax.random.key(SEED)
        self.ledger = fx.Ledger.create(path, RULE, self.params, key, num_keys=CLIENTS)
        self.rows: list[bytes] = []
        self.known: dict[int, int] = {}  # how many rows each node has
        self.attendance: list[list[int]] = []
        self.counts: dict[int, int] = {}
        self.hashes: dict[int, str] = {}
        self.up, self.down = [0, 0], [0, 0]
        self.last: tuple[Message, Message]

    def run(self, grid: Grid, rounds: int) -> None:
        for node in nodes_of(grid):
            self.known[node] = 0
        told = self.ask(grid, self.known, "query")
        slots = {node: one["slot"] for node, one in told.items()}
        self.counts = {one["slot"]: one["count"] for one in told.values()}
        for step in range(rounds):
            here = present(step, rounds)
            nodes = [node for node, slot in slots.items() if slot in here]
            told = self.ask(grid, nodes, "train")
            came = {
                slots[node]: np.frombuffer(one["weights"], "<f4")
                for node, one in told.items()
                if one["step"] == step
            }
            self.add(step, dict(sorted(came.items())))
        for one in self.ask(grid, self.known, "query").values():
            self.hashes[one["slot"]] = one["hash"]
        self.ledger.close()

    def ask(
        self, grid: Grid, nodes: Iterable[int], kind: str
    ) -> dict[int, ConfigRecord]:
        """Send the rows that each lacks; what those tell that answer before the deadline."""
        messages = []
        for node in nodes:
            rows = ConfigRecord({"rows": b"".join(self.rows[self.known[node] :])})
            messages.append(Message(RecordDict({"ledger": rows}), node, kind))
        told = {}
        replies = list(grid.send_and_receive(messages, timeout=LIMIT))
        for message in replies:
            if message.has_error():
                raise RuntimeError(f"a client failed: {message.error.reason}")
            node, one = message.metadata.src_node_id, message.content["client"]
            told[node], self.known[node] = one, one["step"]
        if kind == "train" and replies:
            self.last = messages[-1], replies[-1]
            for total, sent in ((self.down, messages), (self.up, replies)):
                total[0] += sum(map(size_of, sent))
                total[1] += len(sent)
        return told

    def add(self, step: int, came: dict[int, np.ndarray]) -> None:
        """Make the step and write its row; who was late is a row of zeros."""
        if not came:
            raise TimeoutError(f"no client has answered for {LIMIT} s")
        row = row_of(step, came, self.counts)
        slopes = fx.Slopes(keys_of(np.uint32(step)), jnp.asarray(row["weights"]))
        self.ledger.append(step, slopes, RATE)
        self.params = after(self.params, row)
        self.rows.append(row.tobytes())
        self.attendance.append(list(came))


def nodes_of(grid: Grid) -> list[int]:
    """All clients' nodes, as soon as they are there."""
    end = time.monotonic() + LIMIT
    while len(nodes := list(grid.get_node_ids())) < CLIENTS:
        if time.monotonic() > end:
            raise TimeoutError(f"expected {CLIENTS} clients, {len(nodes)} came")
        time.sleep(0.1)
    return nodes


def present(step: int, rounds: int) -> list[int]:
    """Who can be asked in a round; the last client comes when half of the rounds are over."""
    coins = np.random.default_rng([7, step]).random(CLIENTS)
    here = [slot for slot in range(CLIENTS) if coins[slot] >= AWAY]
    late = CLIENTS - 1
    return [slot for slot in here or [0] if slot != late or step >= rounds // 2]


# What it is compared with.


def alone(attendance: list[list[int]], counts: dict[int, int]) -> Array:
    """The same rounds in one process, without Flower."""
    params = start()
    for step, slots in enumerate(attendance):
        came = {slot: own_weights(params, step, slot) for slot in slots}
        params = after(params, row_of(step, came, counts))
    return params


def fedavg_rounds(goal: float, most: int = 200) -> int:
    """How many rounds FedAvg takes to this test accuracy: two local passes, a rate of 0.3.

    That is the best of 0.1, 0.3 and 1 after 20 rounds.
    """
    descend = jax.jit(lambda params, x, y: params - 0.3 * jax.grad(loss)(params, x, y))
    shares, test = digits()
    params = start()
    for step in range(most):
        if accuracy(params, *test) >= goal:
            return step
        here, ends = present(step, 0), []
        for slot in here:
            own = params
            draws = np.random.default_rng([slot, step])
            for _ in range(2 * -(-len(shares[slot][0]) // BATCH)):
                x, y = shares[slot]
                rows = draws.integers(len(x), size=BATCH)
                own = descend(own, x[rows], y[rows])
            ends.append(own)
        counts = [len(shares[slot][0]) for slot in here]
        params = jnp.asarray(np.average(ends, axis=0, weights=counts), jnp.float32)
    return most


def fedavg_bytes(sent: Message, got: Message) -> tuple[int, int]:
    """Of the same two messages with the parameters in both, as FedAvg has them: down, up."""
    params = ArrayRecord([np.asarray(start())])
    metrics = ConfigRecord({"num-examples": 100})
    down, up = copy.deepcopy(sent), copy.deepcopy(got)
    down.content = RecordDict({"arrays": params})
    up.content = RecordDict({"arrays": params, "metrics": metrics})
    return size_of(down), size_of(up)


def main(rounds: int = 200) -> dict[str, str]:
    """Train; print and return the hash that each ends with."""
    # Ray forks, which is safe only as long as JAX has started no thread.
    ray.init(
        num_cpus=PROCESSES,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}},
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.ledger"
        server = Server(path)
        server_app = ServerApp()

        @server_app.main()
        def serve(grid: Grid, context: Context) -> None:
            server.run(grid, rounds)

        run_simulation(
            server_app,
            client_app,
            CLIENTS,
            backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
        )
        with fx.Ledger.open(path) as ledger:
            rebuilt = ledger.replay(loss, start())
        size = path.stat().st_size
    ends = {f"client {slot}": end for slot, end in sorted(server.hashes.items())}
    ends["server"] = hash_of(server.params)
    ends["ledger"] = hash_of(rebuilt)
    ends["one process"] = hash_of(alone(server.attendance, server.counts))
    report(server, rebuilt, size)
    for name, end in ends.items():
        print(f"{name:11} ends with {end[:16]}")
    if len(ends) != CLIENTS + 3 or len(set(ends.values())) != 1:
        raise RuntimeError(
            "expected one hash of all clients, server, ledger and process"
        )
    return ends


def accuracy(params: Array, x: np.ndarray, y: np.ndarray) -> float:
    return float(jnp.mean(jnp.argmax(logits(params, x), axis=1) == y))


def report(server: Server, params: Array, size: int) -> None:
    shares, test = digits()
    for slot, (_, labels) in enumerate(shares):
        kinds = " ".join(f"{count:3}" for count in np.bincount(labels, minlength=10))
        came = sum(slot in slots for slots in server.attendance)
        print(f"client {slot}: {kinds} of the labels 0 to 9; in {came} rounds")
    first, last = accuracy(start(), *test), accuracy(params, *test)
    rounds = len(server.rows)
    print(f"test accuracy {first:.1%} at first, {last:.1%} after {rounds} rounds")
    up, down = (total / count for total, count in (server.up, server.down))
    print(f"bytes a client and round: {up:,.0f} up, {down:,.0f} down")
    fedavg_down, fedavg_up = fedavg_bytes(*server.last)
    print(f"those of FedAvg's messages: {fedavg_up:,} up, {fedavg_down:,} down")
    needed = fedavg_rounds(last)
    own, other = rounds * (up + down), needed * (fedavg_up + fedavg_down)
    print(
        f"bytes of a client to {last:.1%}: {own:,.0f} in {rounds} rounds, "
        f"FedAvg's {other:,} in {needed}"
    )
    print(f"the ledger: {size:,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train ten clients in Flower.")
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    # By this name other processes import the app; what is in __main__ they would be
    # sent with each message, and compile anew.
    import flower_app

    flower_app.main(arguments.rounds)
