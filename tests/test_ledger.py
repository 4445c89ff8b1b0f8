"""Runs that are kept as a list of slopes: rebuilt bit for bit, and no damage goes unseen."""

import dataclasses
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
import warnings
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import forwax as fx
from cases import normal

pytestmark = pytest.mark.usefixtures("optimised")

T = fx.tangents
KEY = jax.random.key(3)
PARAMS = {"b": normal(2, 3), "w": normal(1, 3, 3)}
RULE = fx.WeightPerturbation(num_tangents=3)


def loss(params, x=1.0):
    return jnp.sum(jnp.tanh(params["w"] @ params["b"]) ** 2) * x


@jax.jit
def slopes_at(step, key=KEY):
    return fx.slopes(loss, RULE)(jax.random.fold_in(key, step), PARAMS)[1]


def written(path, num_rows=4, **options):
    """A small ledger; its rows are not a run."""
    with fx.Ledger.create(path, RULE, PARAMS, KEY, **options) as ledger:
        for i in range(num_rows):
            ledger.append(i, slopes_at(i), 0.1 + i)
    return path


def same(got, expected):
    return all(
        map(np.array_equal, *(map(jax.tree.leaves, jax.device_get((got, expected)))))
    )


# --- rebuilt ---

FRESH = """
import sys
import jax, jax.numpy as jnp, numpy as np, forwax as fx

def loss(params, x):
    return jnp.mean(jnp.tanh(x @ params["w"]) ** 2) + jnp.sum(params["b"] ** 2)

spec = jax.ShapeDtypeStruct((4, 6), jnp.float32)
with np.load(sys.argv[1]) as file:
    start = {"w": jnp.asarray(file["w"]), "b": jnp.asarray(file["b"])}
with fx.Ledger.open(sys.argv[2]) as ledger:
    end = ledger.replay(loss, start, spec)
np.savez(sys.argv[3], **end)
"""


@pytest.mark.parametrize(
    "rule",
    [fx.WeightPerturbation(T.LowRank(), 3), fx.WeightPerturbation(T.Normal(), 3)],
)
def test_a_run_is_rebuilt_in_a_fresh_process(tmp_path, rule):
    """1,000 steps in one scan, with a rate that falls and with momentum, in blocks of rows."""
    loss = lambda p, x: jnp.mean(jnp.tanh(x @ p["w"]) ** 2) + jnp.sum(p["b"] ** 2)
    start, x = {"w": normal(1, 6, 2), "b": normal(2, 3)}, normal(3, 4, 6)
    momentum = fx.Momentum(0.5, 4)

    def step(state, step):
        params, momentum = state
        key, rate = (
            jax.random.fold_in(KEY, step),
            0.01 * 0.999 ** step.astype(jnp.float32),
        )
        slopes = fx.slopes(loss, rule)(key, params, x)[1]
        update = fx.update(loss, rule, learning_rate=rate, momentum=momentum)
        return update(key, params, x)[1:], (slopes, rate)

    @jax.jit
    def run(params):
        state = params, momentum.init(KEY, rule)
        return lax.scan(step, state, jnp.arange(1000))

    (end, _), (slopes, rates) = run(start)
    ledger_path, start_path = tmp_path / "run", tmp_path / "start.npz"
    with fx.Ledger.create(ledger_path, rule, start, KEY, momentum=momentum) as ledger:
        for first in (0, 600):
            part = slice(first, 600 if first == 0 else 1000)
            block = jax.tree.map(lambda x, part=part: x[part], slopes)
            ledger.append(np.arange(1000)[part], block, rates[part])
        ledger.sync()
    np.savez(start_path, **start)
    command = [sys.executable, "-W", "error", "-c", FRESH, start_path, ledger_path]
    subprocess.run([*command, tmp_path / "end.npz"], check=True, timeout=300)
    with np.load(tmp_path / "end.npz") as rebuilt:
        assert same(dict(rebuilt), end)
    assert not same(end, start)


def test_rows_are_small_and_many_are_read(tmp_path):
    rule = fx.WeightPerturbation(num_tangents=8)
    with fx.Ledger.create(tmp_path / "a", rule, PARAMS, KEY, num_keys=4) as ledger:
        steps = np.arange(10_000)
        keys = jax.vmap(
            lambda step: jax.vmap(
                lambda i: jax.random.key_data(
                    jax.random.fold_in(jax.random.fold_in(KEY, step), i)
                )
            )(jnp.arange(4))
        )(steps)
        block = fx.Slopes(keys, jnp.ones((10_000, 4, 8)))
        ledger.append(steps, block, np.ones(10_000))
    assert 1_400_000 < os.path.getsize(tmp_path / "a") < 1_500_000
    assert len(fx.Ledger.open(tmp_path / "a")) == 10_000


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (fx.FiniteDifference(T.LowRank(2), 2, epsilon=0.01), {}),
        (fx.Safe(fx.WeightPerturbation(T.Sparse(0.5), 2)), {"rounding": "stochastic"}),
        (fx.WeightPerturbation(combine=fx.combine.Shrinkage(), chunk_size=1), {}),
    ],
)
def test_every_rule_that_replays_is_rebuilt(tmp_path, rule, options):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    params = half if options else PARAMS
    wide = lambda p: loss(jax.tree.map(lambda x: x.astype(jnp.float32), p))
    update = jax.jit(fx.update(wide, rule, learning_rate=0.3, **options))
    taken = jax.jit(fx.slopes(wide, rule))
    path = tmp_path / "run"
    with fx.Ledger.create(path, rule, params, KEY, **options) as ledger:
        start = params
        for i in range(7, 10):
            key = jax.random.fold_in(KEY, i)
            slopes = taken(key, params)[1]
            ledger.append(i, slopes, 0.3)
            params = update(key, params)[1]
    with fx.Ledger.open(path) as ledger:
        assert same(ledger.replay(wide, start), params)
        assert [step for step, _, _ in ledger] == [7, 8, 9]
        assert ledger.rule == rule.inner
        last = list(ledger)[-1]
    assert np.array_equal(last[1].weights, slopes.weights)
    assert np.array_equal(last[1].keys, slopes.keys)


def test_rows_with_slopes_of_each_example(tmp_path):
    rule = fx.WeightPerturbation(T.LowRank(per_example=True), 2)
    each = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]) ** 2)
    x, options = normal(4, 5, 3), {"in_axes": (None, 0)}
    _, slopes = fx.slopes(each, rule, **options)(jax.random.fold_in(KEY, 0), PARAMS, x)
    with fx.Ledger.create(tmp_path / "a", rule, PARAMS, KEY, num_examples=5) as ledger:
        ledger.append(0, slopes, 0.1)
        got = ledger.replay(each, PARAMS, x, **options)
    expected = jax.jit(fx.replay(each, rule, **options))(slopes, 0.1, PARAMS, x)
    assert same(got, expected)


def test_going_on_and_until(tmp_path):
    path = written(tmp_path / "run", 2)
    with fx.Ledger.open(path) as ledger:
        ledger.append(2, slopes_at(2), 0.1)
        assert len(ledger) == 3
        until = ledger.replay(loss, PARAMS, until=2)
        assert same(ledger.replay(loss, PARAMS, until=0), PARAMS)
    with fx.Ledger.open(path) as again:
        assert len(again) == 3
        assert not same(again.replay(loss, PARAMS), until)
    assert same(
        fx.Ledger.open(written(tmp_path / "short", 2)).replay(loss, PARAMS), until
    )


# --- damage ---


def read(path):
    """All that a ledger gives: the rows, and the parameters."""
    with fx.Ledger.open(path) as ledger:
        return len(ledger), [row[2] for row in ledger]


def test_every_flipped_bit_is_noticed_and_rows_are_named(tmp_path):
    whole = written(tmp_path / "whole", 3).read_bytes()
    row = 12 + 4 * 3
    first = len(whole) - 3 * row
    path = tmp_path / "flipped"
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        number = (bit // 8 - first) // row
        says = f"row {number}" if bit // 8 >= first else str(path)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            text = noticed(path, found)
        assert says in text, bit


def noticed(path, found):
    """What is said of a file, as an error or else as a warning."""
    try:
        read(path)
    except ValueError as error:
        return str(error)
    return str(found[0].message)


def test_every_cut_drops_one_row_at_most(tmp_path):
    whole = written(tmp_path / "whole", 3).read_bytes()
    row = 12 + 4 * 3
    first = len(whole) - 3 * row
    for size in range(first, len(whole)):
        path = tmp_path / "cut"
        path.write_bytes(whole[:size])
        count = (size - first) // row
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            with fx.Ledger.open(path) as ledger:
                assert len(ledger) == count
                ledger.append(count, slopes_at(count), 0.1 + count)
        assert [f"row {count}" in str(each.message) for each in found] == (
            [True] if (size - first) % row else []
        )
        assert path.read_bytes() == whole[: first + (count + 1) * row]
    path.write_bytes(whole[: first - 1])
    with pytest.warns(UserWarning, match="the digest behind the header is cut"):
        ledger = fx.Ledger.open(path)
    assert len(ledger) == 0
    ledger.append(0, slopes_at(0), 0.1)
    ledger.close()
    assert path.read_bytes() == whole[: first + row]


def test_a_damaged_row_inside_stops_and_those_before_are_replayed(tmp_path):
    path = written(tmp_path / "run", 4)
    expected = fx.Ledger.open(path).replay(loss, PARAMS, until=1)
    row, data = 12 + 4 * 3, bytearray(path.read_bytes())
    rows = [bytes(data[len(data) - (4 - i) * row :][:row]) for i in range(4)]
    swapped = bytes(data[: -4 * row]) + b"".join([rows[0], rows[2], rows[1], rows[3]])
    path.write_bytes(swapped)
    ledger = fx.Ledger.open(path)
    says = r"row 1 of 4 in .* is damaged: .* replay\(\.\.\., until=1\)"
    with pytest.raises(ValueError, match=says):
        ledger.replay(loss, PARAMS)
    with pytest.raises(ValueError, match=says):
        list(ledger)
    with pytest.raises(ValueError, match=says):
        ledger.append(4, slopes_at(4), 0.1)
    assert same(ledger.replay(loss, PARAMS, until=1), expected)
    assert path.read_bytes() == swapped


def header_of(path):
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data, 12)
    return json.loads(data[20 : 20 + length])


def with_header(path, header, length=None):
    """A ledger with another header and a right checksum."""
    text = json.dumps(header, sort_keys=True).encode()
    start = struct.pack("<8sIQ", b"FORWAXLG", 1, length or len(text)) + text
    path.write_bytes(start + struct.pack("<I", zlib.crc32(start)))
    return path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"rule": {"class": "Popen", "fields": {}}},
            "expected a rule of .* got 'Popen'",
        ),
        (
            {"rule": {"class": "LowRank", "fields": {"q": 1}}},
            "header's LowRank cannot be made",
        ),
        (
            {"rule": {"class": "LowRank", "fields": {}}},
            "Ledger.open: expected forwax.Weight",
        ),
        ({"num_keys": 1 << 40}, "a header without counts"),
        (
            {"num_keys": 1 << 20, "num_tangents": 1 << 20},
            "a row has 1,099,511,627,776 numbers",
        ),
        (
            {"momentum": {"decay": 0.9, "window": 1 << 60}},
            "expected a momentum's decay and",
        ),
        ({"key": {"impl": "rot13", "data": [1, 2]}}, "the header holds no key"),
        ({"key": {"impl": "rbg", "data": [-1, 2]}}, "the header holds no key"),
    ],
)
def test_headers_are_read_without_trust(tmp_path, change, says):
    path = written(tmp_path / "run", 0)
    with pytest.raises((ValueError, TypeError), match=says):
        fx.Ledger.open(with_header(path, header_of(path) | change))


def test_no_length_is_believed(tmp_path):
    path = with_header(tmp_path / "a", {}, length=1 << 60)
    with pytest.raises(
        ValueError, match="said to have 1,152,921,504,606,846,976 bytes"
    ):
        fx.Ledger.open(path)
    path.write_bytes(b"not a ledger, and long enough to hold a start of one")
    with pytest.raises(ValueError, match="is no ledger of forwax"):
        fx.Ledger.open(path)
    path.write_bytes(struct.pack("<8sIQ", b"FORWAXLG", 9, 0) + bytes(20))
    with pytest.raises(ValueError, match="expected format 1, got 9"):
        fx.Ledger.open(path)
    text = b"[" * 100_000
    start = struct.pack("<8sIQ", b"FORWAXLG", 1, len(text)) + text
    path.write_bytes(start + struct.pack("<I", zlib.crc32(start)))
    with pytest.raises(ValueError, match="a header that forwax has not written"):
        fx.Ledger.open(path)


def test_a_killed_writer_loses_no_row(tmp_path):
    """Each append is on its way to the disk when it returns."""
    script = f"""
    import os, sys, jax, forwax as fx
    sys.path.insert(0, {os.path.dirname(__file__)!r})
    from test_ledger import *
    ledger = fx.Ledger.create(sys.argv[1], RULE, PARAMS, KEY)
    for i in range(3):
        ledger.append(i, slopes_at(i), 0.1 + i)
    os.kill(os.getpid(), {int(signal.SIGKILL)})
    """
    path = tmp_path / "run"
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert path.read_bytes() == written(tmp_path / "expected", 3).read_bytes()


# --- errors ---


def test_nothing_is_written_over(tmp_path):
    path = tmp_path / "run"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="expected a path where nothing is"):
        fx.Ledger.create(path, RULE, PARAMS, KEY)
    assert path.read_text() == "precious"


def test_there_is_one_writer(tmp_path):
    path = written(tmp_path / "run", 1)
    first, second, late = (fx.Ledger.open(path) for _ in range(3))
    first.append(1, slopes_at(1), 0.1)
    with pytest.raises(BlockingIOError, match="expected to be the only writer"):
        second.append(1, slopes_at(1), 0.1)
    first.close()
    with pytest.raises(
        RuntimeError, match="had 1 rows when it was opened, and has 2 now"
    ):
        late.append(1, slopes_at(1), 0.1)
    with pytest.raises(ValueError, match=r"is closed. Open it with forwax.Ledger.open"):
        first.append(2, slopes_at(2), 0.1)
    for ledger in (second, late):
        ledger.close()
    with fx.Ledger.open(path) as ledger:
        assert len(ledger) == 2


def test_what_cannot_be_kept_is_refused(tmp_path):
    path, created = tmp_path / "a", fx.Ledger.create
    with pytest.raises(
        TypeError, match=r"Ledger.create: expected forwax.Weight.* got Exact"
    ):
        created(path, fx.Exact(), PARAMS, KEY)
    array = fx.FiniteDifference(epsilon=jnp.float32(0.1))
    with pytest.raises(
        TypeError, match="of forwax's own classes and numbers of Python"
    ):
        created(path, array, PARAMS, KEY)
    with pytest.raises(
        ValueError, match="expected num_keys to be a positive integer, got 0"
    ):
        created(path, RULE, PARAMS, KEY, num_keys=0)
    own = fx.WeightPerturbation(T.LowRank(per_example=True))
    with pytest.raises(
        ValueError, match="num_examples to be a positive integer, got None"
    ):
        created(path, own, PARAMS, KEY)
    with pytest.raises(ValueError, match="expected rounding to be"):
        created(path, RULE, PARAMS, KEY, rounding="up")
    assert not path.exists()


def test_rows_that_do_not_fit_are_refused(tmp_path):
    path = written(tmp_path / "run", 2)
    before = path.read_bytes()
    ledger = fx.Ledger.open(path)
    for step in (1, 3, 2.5, -1):
        match = r"expected step 2, the next one|expected the keys"
        with pytest.raises(ValueError, match=match):
            ledger.append(step, slopes_at(int(step) if step > 0 else 2), 0.1)
    says = (
        r"expected the keys fold_in\(key, step\) of threefry2x32, from step 2 on \[\["
    )
    with pytest.raises(ValueError, match=says):
        ledger.append(2, slopes_at(2, key=jax.random.key(9)), 0.1)
    with pytest.raises(ValueError, match=r"rates, keys and weights of shapes \(1,\)"):
        ledger.append(2, slopes_at(2).concatenate(slopes_at(2)), 0.1)
    with pytest.raises(ValueError, match="expected weights in float32"):
        ledger.append(
            2, dataclasses.replace(slopes_at(2), weights=np.ones((1, 3))), 0.1
        )
    with pytest.raises(ValueError, match="expected finite rates"):
        ledger.append(2, slopes_at(2), float("nan"))
    with pytest.raises(ValueError, match="expected slopes of the ledger's parameters"):
        ledger.append(
            2, dataclasses.replace(slopes_at(2), form=("w: float32[2]",)), 0.1
        )
    with pytest.raises(TypeError, match=r"expected forwax.Slopes, got list"):
        ledger.append(2, [1.0], 0.1)
    ledger.close()
    assert path.read_bytes() == before


def test_other_parameters_and_losses_are_refused(tmp_path):
    path = written(tmp_path / "run", 2)
    ledger = fx.Ledger.open(path)
    with pytest.raises(
        ValueError, match="expected the parameters that the ledger was created"
    ):
        ledger.replay(loss, PARAMS | {"b": PARAMS["b"] + 1e-6})
    with pytest.raises(ValueError, match=r"Ledger.replay: expected parameters \["):
        ledger.replay(loss, {"w": PARAMS["w"]})
    rule = fx.WeightPerturbation(T.LowRank())
    params = {"w": normal(1, 2, 3, 4)}
    first = lambda p: jnp.sum(jnp.einsum("ijk,ij->k", p["w"], jnp.ones((2, 3))) ** 2)
    other = lambda p: jnp.sum(jnp.einsum("ijk,jk->i", p["w"], jnp.ones((3, 4))) ** 2)
    taken = lambda loss, i: fx.slopes(loss, rule)(jax.random.fold_in(KEY, i), params)[1]
    with fx.Ledger.create(tmp_path / "low", rule, params, KEY) as ledger:
        ledger.append(0, taken(first, 0), 0.1)
        with pytest.raises(
            ValueError, match="expected slopes of the loss of the rows before"
        ):
            ledger.append(1, taken(other, 1), 0.1)
        assert same(
            ledger.replay(first, params),
            jax.jit(fx.replay(first, rule))(taken(first, 0), 0.1, params),
        )
        with pytest.raises(
            ValueError, match="expected the loss of the run, got one that splits"
        ):
            ledger.replay(other, params)
    with pytest.raises(ValueError, match=r"replay: expected parameters .* in factors"):
        fx.replay(other, rule)(taken(first, 0), 0.1, params)


def test_another_machine_is_named(tmp_path):
    path = written(tmp_path / "run", 0)
    header = header_of(path)
    made = header["made"] | {"jaxlib": "0.0.1"}
    with_header(path, header | {"made": made})
    with (
        fx.Ledger.open(path) as ledger,
        pytest.warns(UserWarning, match="not as it was: jaxlib '0.0.1' there and"),
    ):
        assert same(ledger.replay(loss, PARAMS), PARAMS)
    made = header["made"] | {"threefry_partitionable": None}
    with_header(path, header | {"made": made})
    with (
        fx.Ledger.open(path) as ledger,
        pytest.raises(
            ValueError, match="expected the setting jax_threefry_partitionable"
        ),
    ):
        ledger.replay(loss, PARAMS)
