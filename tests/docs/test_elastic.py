"""The example with workers that come and go: processes, a late one, bad frames, other bits."""

import socket
import struct
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from helpers import module_at

pytestmark = pytest.mark.usefixtures("optimised")
EXAMPLE = Path(__file__).parents[2] / "examples" / "elastic.py"
LIMIT = 120.0
"""Seconds after which a wait has failed."""


@pytest.fixture
def example():
    return module_at(EXAMPLE)


@pytest.fixture
def server(example, tmp_path):
    server = example.Server(tmp_path / "run.ledger", patience=0.2)
    yield server
    server.close()


@pytest.fixture
def connect(server):
    """Opens connections that wait for so long and no longer."""
    links = []

    def connect():
        links.append(socket.create_connection(("127.0.0.1", server.port), LIMIT))
        return links[-1]

    yield connect
    for link in links:
        link.close()


def pump_until(server, condition):
    for _ in range(int(LIMIT / 0.1)):
        if condition():
            return
        server.pump(0.1)
    raise AssertionError(f"waited for too long; ended: {server.cut_off}")


def test_one_is_killed_and_one_is_late(example, monkeypatch, capsys):
    processes = []
    begin = example.begin

    def noted(port, number):
        processes.append(begin(port, number))
        return processes[-1]

    monkeypatch.setattr(example, "begin", noted)
    ends = example.main(rounds=120)
    assert [process.poll() for process in processes] == [-9, 0, 0, 0]
    names = ["worker 1", "worker 2", "worker 3", "server", "ledger"]
    assert list(ends) == names
    assert len(set(ends.values())) == 1
    assert len(ends["ledger"]) == 64
    assert ends["ledger"] != example.hash_of(example.start()).hex()
    said = capsys.readouterr().out
    assert "round 80: 3 workers, the late one among them" in said
    # 8 numbers up, 4 times as many down, and headers
    assert "round: 52 up and 152 down" in said
    assert f"{4 * len(example.start()):,} each way" in said


def test_one_differs_one_talks_nonsense_and_one_comes_by_a_snapshot(
    example, server, connect, monkeypatch
):
    monkeypatch.setattr(example, "CHECK", 10)
    server.longest = 0  # no ledger is short enough to be sent
    rounds = 60
    ends = {}

    def flipped(step, params):
        """One bit, after the third round and after the last one."""
        if step not in (3, rounds):
            return params
        bits = np.array(params)
        bits.view(np.uint32)[7] ^= 1
        return jnp.asarray(bits)

    def begin(number, visit=None):
        def run():
            ends[number] = example.work(server.port, number, visit)

        threads.append(threading.Thread(target=run, daemon=True))
        threads[-1].start()

    def each(step):
        if step == 20:
            connect().sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            begin(2)
        if step == 30:
            server.wait_for(3)

    threads = []
    begin(0)
    begin(1, flipped)
    server.run(rounds, 2, each)
    for thread in threads:
        thread.join(LIMIT)
    rebuilt, count = example.of_ledger(server.path.read_bytes())
    assert count == rounds
    expected = example.hash_of(rebuilt)
    assert ends == {0: expected, 1: expected, 2: expected}
    # once at a check, once at the end; who lags may ask again before the snapshot is there
    assert server.corrected >= 2
    (nonsense,) = (why for why in server.cut_off if why.startswith("no frame"))
    assert "b'GET ' of kind " in nonsense


def test_bad_frames_cut_off_who_sends_them_and_no_one_else(example, server, connect):
    frame, word = example.frame, lambda number: struct.pack("<I", number)
    join = frame(example.JOIN, example.hash_of(example.start()))
    weights = np.ones(example.TANGENTS, np.float32)
    good = frame(example.SLOPES, word(0) + weights.tobytes())
    weights[3] = np.nan
    header = example.HEADER.pack
    bad = {
        b"x" * 16: "no frame: b'xxxx' of kind ",
        header(example.MAGIC, example.SLOPES, 2**32 - 1, 0): "with 4,294,967,295 bytes",
        header(example.MAGIC, example.SNAPSHOT, 9644, 0): "no frame: b'FWEL' of kind 6",
        good: "a frame of kind 1 out of order",
        join[:-1] + b"x": "a frame of kind 0 with another checksum",
        frame(example.JOIN, bytes(32)): "other parameters at the start: take the same",
        join + join: "a frame of kind 0 out of order",
        join + good[:-1] + b"x": "a frame of kind 1 with another checksum",
        join + frame(example.SLOPES, word(0) + weights.tobytes()): "not finite",
        join + frame(example.SLOPES, word(1) + bytes(32)): "round 1, where 0 are over",
        join
        + frame(example.HASH, word(0) + bytes(32)): "a hash of round 0, which none",
    }
    onlooker = connect()
    onlooker.sendall(join)
    pump_until(server, server.joined)
    for data, why in bad.items():
        link = connect()
        link.sendall(data)
        pump_until(server, lambda: server.cut_off)
        assert why in server.cut_off.pop()
        while link.recv(1 << 16):  # until it is closed
            pass
        (peer,) = server.joined()
        assert peer.slot == 0
    assert server.came == {}
    onlooker.sendall(good)
    assert list(server.collected()) == [0]
    # whole frames only: what is cut waits, and is none of the round
    half = connect()
    half.sendall(join + good[:20])
    pump_until(server, lambda: len(server.joined()) == 2)
    assert list(server.collected()) == [0]


def test_who_finds_no_slot_is_told(example, server, connect):
    join = example.frame(example.JOIN, example.hash_of(example.start()))
    for _ in range(example.SLOTS):
        connect().sendall(join)
    pump_until(server, lambda: len(server.joined()) == example.SLOTS)
    last = connect()
    last.sendall(join)
    pump_until(server, lambda: server.cut_off)
    kind, why = example.received(last, bytearray())
    assert (kind, why) == (example.REFUSED, b"all 4 slots are taken: come later")


def test_a_deadline_goes_on_without_the_late(example, server, connect):
    def answer(link, step, weight):
        weights = np.full(example.TANGENTS, weight, np.float32)
        payload = struct.pack("<I", step) + weights.tobytes()
        link.sendall(example.frame(example.SLOPES, payload))

    first, second = connect(), connect()
    for count, link in enumerate((first, second), 1):
        link.sendall(example.frame(example.JOIN, example.hash_of(example.start())))
        pump_until(server, lambda count=count: len(server.joined()) == count)
        answer(link, 0, 2.0)
    server.wait_for(2)
    server.add(0, server.collected())
    answer(first, 1, 2.0)
    came = server.collected()
    assert list(came) == [0]
    assert [peer.is_awaited for peer in server.joined()] == [True, False]
    server.add(1, came)
    answer(second, 1, 9.0)  # too late, but there again
    server.wait_for(2)
    assert server.came == {}
    (_, both, _), (_, one, _) = server.ledger
    # divided by how many came, in the order of slots
    expected = np.zeros((example.SLOTS, example.TANGENTS), np.float32)
    expected[:2] = 1
    assert np.array_equal(both.weights, expected)
    expected[:2] = [[2], [0]]
    assert np.array_equal(one.weights, expected)
    rebuilt, count = example.of_ledger(server.path.read_bytes())
    assert count == 2
    assert jnp.array_equal(rebuilt, server.params)
