"""Train with workers that come and go, over sockets: a few numbers up, a ledger's row down.

A server gives each worker a slot. In every round a worker takes 8 slopes of its own examples along
directions that follow from the round and its slot, and sends them. The server waits until all have
answered, or until a deadline; it divides what came by how many came, the absent are zeros, and this
row goes into an `fx.Ledger` and to all workers, which replay it. So all have the same parameters in
every bit, and none are sent. Who comes late gets the ledger and replays it, or a snapshot where the
ledger is long. Every 100 rounds workers send a hash of their parameters; who differs gets a
snapshot.

What comes over the network is read without trust: frames have a fixed header and a size that
follows from their kind, nothing is unpickled, and who sends anything else is cut off while the
others go on. It is not kept secret, and a worker may lie about its slopes: no one checks them.

    python examples/elastic.py

Three workers as processes of this machine, of which one is killed after a third of the rounds and
another one comes after two thirds. Expected: in about a minute on two CPU cores the loss falls from
2.41 to 0.12 or so; the workers that are left, the server and the ledger replayed alone have one
hash. A worker sends 52 bytes a round and gets 152, where a gradient of the 2,410 parameters has
9,640.
"""

import argparse
import contextlib
import hashlib
import selectors
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import forwax as fx

SLOTS, TANGENTS, RATE, BATCH = 4, 8, 0.02, 64
CHECK = 100
"""After so many rounds workers send a hash of their parameters."""
LIMIT = 120.0
"""Seconds after which nobody waits any longer."""
KEY = jax.random.key(0)
RULE = fx.WeightPerturbation(num_tangents=TANGENTS)

# The problem: pictures of ten kinds, and a network with one hidden layer as one vector.

SHAPES = ((64, 32), (32,), (32, 10), (10,))
SIZE = sum(int(np.prod(shape)) for shape in SHAPES)


def start() -> Array:
    """The parameters before the first round [n], the same in every process."""
    draws = np.random.default_rng(1)
    parts = [draws.normal(size=shape) * (2 / 64) ** 0.5 for shape in SHAPES]
    return jnp.asarray(np.concatenate([part.ravel() for part in parts]), jnp.float32)


def pictures(count: int = 1400) -> tuple[np.ndarray, np.ndarray]:
    """As many as there are digits in scikit-learn: noisy pictures [count, 64], labels [count]."""
    draws = np.random.default_rng(2)
    kinds = draws.uniform(size=(10, 64))
    labels = draws.integers(10, size=count)
    noisy = kinds[labels] + 0.3 * draws.normal(size=(count, 64))
    return noisy.astype(np.float32), labels.astype(np.int32)


def share(number: int, of: int = SLOTS) -> tuple[np.ndarray, np.ndarray]:
    """The examples that one worker alone has."""
    x, y = pictures()
    return x[number % of :: of], y[number % of :: of]


def loss(params: Array, x: Any, y: Any) -> Array:
    """The mean cross-entropy of a batch."""
    parts, first = [], 0
    for shape in SHAPES:
        size = int(np.prod(shape))
        parts.append(params[first : first + size].reshape(shape))
        first += size
    w1, b1, w2, b2 = parts
    hidden = jax.nn.relu(x @ w1 + b1[None])
    scores = jax.nn.log_softmax(hidden @ w2 + b2[None])
    return -jnp.mean(jnp.take_along_axis(scores, y[:, None], axis=1))


# A round, in two halves.


def keys_of(step: Array) -> Array:
    """The keys of all slots in a round, as `fx.Ledger` derives them [slots, words]."""
    own = jax.random.fold_in(KEY, step)
    each = jax.vmap(lambda slot: jax.random.fold_in(own, slot))(jnp.arange(SLOTS))
    return jax.random.key_data(each)


@jax.jit
def weights_of(params: Array, step: Array, slot: Array, x: Any, y: Any) -> Array:
    """What a worker sends of a round [k]."""
    key = jax.random.wrap_key_data(keys_of(step)[slot])
    _, slopes = fx.slopes(loss, RULE)(key, params, x, y)
    return slopes.weights[0]


@jax.jit
def moved(params: Array, step: Array, weights: Array, rate: Array) -> Array:
    """The parameters after a round, of its row: weights [slots, k]."""
    return fx.replay(loss, RULE)(fx.Slopes(keys_of(step), weights), rate, params)


def hash_of(params: Array) -> bytes:
    """SHA-256 of the parameters' bytes."""
    return hashlib.sha256(np.asarray(params).tobytes()).digest()


# Frames: a fixed header, then as many bytes as its kind may have.

MAGIC = b"FWEL"
HEADER = struct.Struct("<4sIII")  # magic, kind, bytes that follow, their CRC-32
JOIN, SLOPES, HASH, WELCOME, LEDGER, ROW, SNAPSHOT, END, REFUSED = range(9)
LONGEST = 1 << 20
"""Bytes of a ledger that is sent; in place of a longer one a snapshot is."""

Sizes = dict[int, tuple[int, int]]
UP: Sizes = {  # the least and the most bytes of what workers send
    JOIN: (32, 32),  # hash of the parameters at the start
    SLOPES: (4 + 4 * TANGENTS, 4 + 4 * TANGENTS),  # round, weights
    HASH: (36, 36),  # round, hash
}
DOWN: Sizes = {  # of what the server sends
    WELCOME: (4, 4),  # slot
    LEDGER: (1, LONGEST),  # the file
    ROW: (8 + 4 * SLOTS * TANGENTS, 8 + 4 * SLOTS * TANGENTS),  # round, rate, weights
    SNAPSHOT: (4 + 4 * SIZE, 4 + 4 * SIZE),  # round, parameters
    END: (36, 36),  # round, hash
    REFUSED: (1, 200),  # why, in words
}


class FrameError(ValueError):
    """What came is no frame that can be meant."""


def frame(kind: int, payload: bytes) -> bytes:
    return HEADER.pack(MAGIC, kind, len(payload), zlib.crc32(payload)) + payload


def taken(inbox: bytearray, sizes: Sizes) -> tuple[int, bytes] | None:
    """Take the first frame out of what has come; None while it is not whole."""
    if len(inbox) < HEADER.size:
        return None
    magic, kind, size, crc = HEADER.unpack_from(inbox)
    least, most = sizes.get(kind, (1, 0))
    # before anything of that size is waited for
    if magic != MAGIC or not least <= size <= most:
        raise FrameError(f"no frame: {magic!r} of kind {kind} with {size:,} bytes")
    end = HEADER.size + size
    if len(inbox) < end:
        return None
    payload = bytes(inbox[HEADER.size : end])
    del inbox[:end]
    if zlib.crc32(payload) != crc:
        raise FrameError(f"a frame of kind {kind} with another checksum")
    return kind, payload


# The server: one thread that never waits for one worker.


class Peer:
    """A connection, and what the server knows of it."""

    def __init__(self, link: socket.socket) -> None:
        self.link = link
        self.inbox = bytearray()
        self.outbox = bytearray()
        self.slot: int | None = None
        self.is_awaited = False  # it has answered, and missed no deadline since
        self.heard = time.monotonic()


class Server:
    """Collects slopes, keeps the ledger, tells all.

    Attributes:
        port: where it listens, on this machine alone.
        params: the parameters of now.
        up, down: bytes of all slopes that came, of all rows that were sent; with how many.
        cut_off: why connections ended.
        corrected: how many snapshots were sent to workers that differed.
    """

    def __init__(
        self, path: Path, patience: float = 1.0, longest: int = LONGEST
    ) -> None:
        self.path, self.patience, self.longest = path, patience, longest
        self.params = start()
        self.ledger = fx.Ledger.create(path, RULE, self.params, KEY, num_keys=SLOTS)
        self.hashes: dict[int, bytes] = {}
        self.came: dict[int, np.ndarray] = {}
        self.peers: list[Peer] = []
        self.cut_off: list[str] = []
        self.up, self.down = [0, 0], [0, 0]
        self.corrected = 0
        self.last: bytes | None = None
        self.selector = selectors.DefaultSelector()
        self.door = socket.create_server(("127.0.0.1", 0))
        self.door.setblocking(False)
        self.selector.register(self.door, selectors.EVENT_READ)
        self.port: int = self.door.getsockname()[1]

    def run(
        self, rounds: int, workers: int, each: Callable[[int], None] = lambda step: None
    ) -> None:
        """Begin when so many workers have answered; `each` is called before each round."""
        try:
            self.wait_for(workers)
            for step in range(rounds):
                each(step)
                self.add(step, self.collected())
            self.last = frame(END, struct.pack("<I", rounds) + hash_of(self.params))
            self.hashes[rounds] = hash_of(self.params)
            for peer in self.joined():
                self.send(peer, self.last)
            # they close, so that nothing on its way to them is lost
            end = time.monotonic() + LIMIT / 4
            while self.joined() and time.monotonic() < end:
                self.pump(0.1)
        finally:
            self.close()

    def joined(self) -> list[Peer]:
        return [peer for peer in self.peers if peer.slot is not None]

    def wait_for(self, workers: int) -> None:
        """Wait until so many workers have caught up and answered."""
        end = time.monotonic() + LIMIT
        while sum(peer.is_awaited for peer in self.peers) < workers:
            if time.monotonic() > end:
                raise TimeoutError(f"expected {workers} workers within {LIMIT} s")
            self.pump(0.1)

    def collected(self) -> dict[int, np.ndarray]:
        """The weights of this round by slot, those that came before the deadline."""
        begun = time.monotonic()
        while True:
            missing = [
                peer
                for peer in self.peers
                if peer.is_awaited and peer.slot not in self.came
            ]
            waited = time.monotonic() - begun
            if self.came and (not missing or waited > self.patience):
                for peer in missing:
                    peer.is_awaited = False  # until it answers again
                return self.came
            if waited > LIMIT:
                raise TimeoutError(f"no worker has answered for {LIMIT} s")
            self.pump(max(0.0, min(0.1, self.patience - waited)) or 0.1)

    def add(self, step: int, came: dict[int, np.ndarray]) -> None:
        """Make the step, write its row, and send it to all."""
        weights = np.zeros((SLOTS, TANGENTS), np.float32)
        for slot, own in came.items():
            weights[slot] = own / np.float32(len(came))
        number, rate = jnp.uint32(step), jnp.float32(RATE)
        slopes = fx.Slopes(keys_of(number), jnp.asarray(weights))
        self.ledger.append(step, slopes, RATE)
        self.params = moved(self.params, number, slopes.weights, rate)
        self.came = {}
        if (step + 1) % CHECK == 0:
            self.hashes[step + 1] = hash_of(self.params)
        row = frame(ROW, struct.pack("<If", step, RATE) + weights.tobytes())
        for peer in self.joined():
            self.send(peer, row)
            self.down = [self.down[0] + len(row), self.down[1] + 1]

    def pump(self, seconds: float) -> None:
        """Read and write what can be, for at most so many seconds."""
        for found, events in self.selector.select(seconds):
            if found.fileobj is self.door:
                self.welcome()
                continue
            peer: Peer = found.data
            try:
                if events & selectors.EVENT_WRITE:
                    self.flush(peer)
                if events & selectors.EVENT_READ:
                    self.read(peer)
            except (OSError, FrameError) as error:
                self.drop(peer, error)
        silent = time.monotonic() - LIMIT
        for peer in [peer for peer in self.peers if peer.heard < silent]:
            self.drop(peer, TimeoutError("silent for too long"))

    def welcome(self) -> None:
        try:
            link, _ = self.door.accept()
        except OSError:  # who knocked has gone
            return
        if len(self.peers) >= 4 * SLOTS:  # so many that never joined
            link.close()
            return
        link.setblocking(False)
        self.peers.append(Peer(link))
        self.selector.register(link, selectors.EVENT_READ, self.peers[-1])

    def read(self, peer: Peer) -> None:
        try:
            data = peer.link.recv(1 << 16)
        except BlockingIOError:
            return
        if not data:
            raise ConnectionError("closed by the other side")
        peer.heard = time.monotonic()
        peer.inbox += data
        while told := taken(peer.inbox, UP):
            self.answer(peer, *told)

    def answer(self, peer: Peer, kind: int, payload: bytes) -> None:
        """Do what a frame asks for."""
        slot = peer.slot
        if (kind == JOIN) != (slot is None):
            raise FrameError(f"a frame of kind {kind} out of order")
        if slot is None:
            self.join(peer, payload)
            return
        (step,) = struct.unpack_from("<I", payload)
        if step > len(self.ledger):
            raise FrameError(f"round {step}, where {len(self.ledger)} are over")
        if kind == HASH:
            if step not in self.hashes:
                raise FrameError(f"a hash of round {step}, which none is kept of")
            if payload[4:] != self.hashes[step]:
                self.corrected += 1
                self.send(peer, self.snapshot())
                if self.last:
                    self.send(peer, self.last)
            return
        weights = np.frombuffer(payload, "<f4", offset=4)
        if not np.all(np.isfinite(weights)):
            raise FrameError("weights that are not finite")
        self.up = [self.up[0] + HEADER.size + len(payload), self.up[1] + 1]
        peer.is_awaited = True
        if step == len(self.ledger):  # or else it is late, and dropped
            self.came.setdefault(slot, weights)

    def join(self, peer: Peer, begins: bytes) -> None:
        """Give a worker a slot, and what it needs to be where all are."""
        used = {other.slot for other in self.peers}
        free = [slot for slot in range(SLOTS) if slot not in used]
        why = None
        if begins != hash_of(start()):
            why = "other parameters at the start: take the same program and versions"
        elif not free:
            why = f"all {SLOTS} slots are taken: come later"
        if why:
            self.send(peer, frame(REFUSED, why.encode()))
            raise ConnectionError(f"refused, {why}")
        peer.slot = free[0]
        self.send(peer, frame(WELCOME, struct.pack("<I", peer.slot)))
        is_short = self.path.stat().st_size <= self.longest
        whole = frame(LEDGER, self.path.read_bytes()) if is_short else self.snapshot()
        self.send(peer, whole)

    def snapshot(self) -> bytes:
        step = struct.pack("<I", len(self.ledger))
        return frame(SNAPSHOT, step + np.asarray(self.params).tobytes())

    def send(self, peer: Peer, data: bytes) -> None:
        peer.outbox += data
        try:
            if len(peer.outbox) > 4 * LONGEST:
                raise ConnectionError("it does not read what it is sent")
            self.flush(peer)
        except OSError as error:
            self.drop(peer, error)

    def flush(self, peer: Peer) -> None:
        """Send what the network takes now; the rest waits for `pump`."""
        with contextlib.suppress(BlockingIOError):
            del peer.outbox[: peer.link.send(peer.outbox)]
        events = selectors.EVENT_READ
        if peer.outbox:
            events |= selectors.EVENT_WRITE
        self.selector.modify(peer.link, events, peer)

    def drop(self, peer: Peer, error: Exception) -> None:
        """End a connection; its slot is free again."""
        if peer in self.peers:
            self.peers.remove(peer)
            self.selector.unregister(peer.link)
            peer.link.close()
            self.cut_off.append(str(error))

    def close(self) -> None:
        for peer in self.peers:
            peer.link.close()
        self.door.close()
        self.selector.close()
        self.ledger.close()


# A worker.


def work(
    port: int, number: int, visit: Callable[[int, Array], Array] | None = None
) -> bytes:
    """Join, and train until the server says that it is over; gives the hash of the parameters.

    Args:
        port: the server's.
        number: which examples are this worker's.
        visit: for tests: what makes other parameters of those after a round.
    """
    x, y = share(number)
    batches = np.random.default_rng(number)
    step, slot, params = 0, 0, start()

    def own_weights() -> Array:
        rows = batches.integers(len(x), size=BATCH)
        return weights_of(params, jnp.uint32(step), jnp.int32(slot), x[rows], y[rows])

    # both are compiled before anyone waits for this worker
    moved(params, jnp.uint32(0), jnp.zeros((SLOTS, TANGENTS)), jnp.float32(0))
    jax.block_until_ready(own_weights())
    inbox = bytearray()
    with socket.create_connection(("127.0.0.1", port), LIMIT) as link:
        link.sendall(frame(JOIN, hash_of(params)))
        while True:
            kind, payload = received(link, inbox)
            if kind == WELCOME:
                (slot,) = struct.unpack("<I", payload)
                continue
            if kind == REFUSED:
                raise ConnectionError(payload.decode(errors="replace"))
            if kind == LEDGER:
                params, step = of_ledger(payload)
            if kind == SNAPSHOT:
                (step,) = struct.unpack_from("<I", payload)
                params = jnp.asarray(np.frombuffer(payload, "<f4", offset=4))
            if kind == ROW:
                told, rate = struct.unpack_from("<If", payload)
                if told != step:
                    raise FrameError(f"expected the row of round {step}, got {told}")
                weights = np.frombuffer(payload, "<f4", offset=8)
                weights = jnp.asarray(weights.reshape(SLOTS, TANGENTS))
                params = moved(params, jnp.uint32(step), weights, jnp.float32(rate))
                step += 1
                params = visit(step, params) if visit else params
                if step % CHECK == 0:
                    link.sendall(checked(step, params))
            if kind == END:
                if payload[4:] == hash_of(params):
                    return hash_of(params)
                link.sendall(checked(step, params))  # a snapshot comes
            elif not is_waiting(link, inbox):
                weights = np.asarray(own_weights()).tobytes()
                link.sendall(frame(SLOPES, struct.pack("<I", step) + weights))


def checked(step: int, params: Array) -> bytes:
    return frame(HASH, struct.pack("<I", step) + hash_of(params))


def of_ledger(data: bytes) -> tuple[Array, int]:
    """The parameters after all rows of a ledger, and how many there are."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.ledger"
        path.write_bytes(data)
        with fx.Ledger.open(path) as ledger:
            return ledger.replay(loss, start()), len(ledger)


def received(link: socket.socket, inbox: bytearray) -> tuple[int, bytes]:
    """The next frame, waited for until the socket's time is over."""
    while not (told := taken(inbox, DOWN)):
        data = link.recv(1 << 16)
        if not data:
            raise ConnectionError("the server has cut this worker off, or is gone")
        inbox += data
    return told


def is_waiting(link: socket.socket, inbox: bytearray) -> bool:
    """Whether more has come: then this worker is behind, and its slopes would be late."""
    with selectors.DefaultSelector() as selector:
        selector.register(link, selectors.EVENT_READ)
        return bool(inbox or selector.select(0))


def begin(port: int, number: int) -> subprocess.Popen:
    """A worker as a process of its own."""
    words = [sys.executable, __file__, "--port", f"{port}", "--number", f"{number}"]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def main(rounds: int = 600, workers: int = 3) -> dict[str, str]:
    """Train, kill a worker, take another one in; print and return the hash that each ends with."""
    processes: list[subprocess.Popen] = []
    x, y = pictures()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.ledger"
        server = Server(path)

        def each(step: int) -> None:
            if step == rounds // 3:
                processes[0].kill()
                processes.append(begin(server.port, 0))
                print(f"round {step}: a worker is killed, and another one starts")
            if step == 2 * rounds // 3:  # that it is there before the end
                server.wait_for(workers)
                print(f"round {step}: {workers} workers, the late one among them")

        try:
            processes += [begin(server.port, i) for i in range(workers)]
            server.run(rounds, workers, each)
            said = [process.communicate(timeout=LIMIT)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        rebuilt, _ = of_ledger(path.read_bytes())
        size = path.stat().st_size
    ends = {f"worker {i}": text.strip() for i, text in enumerate(said) if i}
    ends["server"] = hash_of(server.params).hex()
    ends["ledger"] = hash_of(rebuilt).hex()
    for name, end in ends.items():
        print(f"{name:9} ends with {end[:16]}")
    print(f"loss {loss(start(), x, y):.2f} at first, {loss(rebuilt, x, y):.2f} at last")
    up, down = (bytes_ // count for bytes_, count in (server.up, server.down))
    print(
        f"bytes a worker and round: {up} up and {down} down; a gradient and parameters would be "
        f"{4 * SIZE:,} each way. The ledger: {size:,}"
    )
    return ends


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train with workers that come and go.")
    parser.add_argument("--rounds", type=int, default=600)
    parser.add_argument("--port", type=int, help="be a worker of the server there")
    parser.add_argument("--number", type=int, default=0, help="whose examples it has")
    arguments = parser.parse_args()
    if arguments.port:
        print(work(arguments.port, arguments.number).hex())
    else:
        main(arguments.rounds)
