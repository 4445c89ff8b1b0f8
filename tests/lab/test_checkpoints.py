"""Checkpoints: bit for bit where they are sound, named where they are not, and nothing else."""

import random
import shutil
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from forwax.lab.flags import UsageError
from forwax.lab.keeping import checkpoints as kept
from forwax.lab.keeping.checkpoints import Checkpoints
from forwax.lab.training.step import TrainState

NUM_FAULTS = 10


def a_state(step):
    params = {"w": jnp.arange(300.0) + step, "b": jnp.ones(2, jnp.bfloat16)}
    return TrainState(params, optax.adam(0.1).init(params), None, jnp.int32(step))


LIKE = jax.eval_shape(lambda: a_state(0))


def equal(state, other):
    return jax.tree.all(
        jax.tree.map(
            lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), state, other
        )
    )


def restore(folder, like=LIKE):
    with closing(Checkpoints(folder)) as checkpoints:
        return checkpoints.restore(like)


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The checkpoints after steps 5 and 8."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with closing(Checkpoints(folder)) as checkpoints:
        for step in (3, 5, 5, 8):
            checkpoints.save(a_state(step), seconds=step / 7, rule="weight")
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "checkpoints")


def spoil(checkpoint, draw):
    """Flips a bit in each file of arrays: the format also leaves files that nothing reads."""
    for path in sorted((checkpoint / "state").rglob("d/*")):
        flip(path, draw)


def flip(path, draw):
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def test_checkpoints_come_back_bit_for_bit(folder, capsys):
    assert sorted(path.name for path in folder.iterdir()) == ["5", "8"]
    found = restore(folder)
    assert found is not None
    assert (found.seconds, found.notes) == (8 / 7, {"rule": "weight"})
    assert jax.tree.structure(found.state) == jax.tree.structure(a_state(8))
    assert equal(found.state, a_state(8))
    assert capsys.readouterr().err == ""


def test_no_checkpoint_yet(tmp_path):
    assert restore(tmp_path) is None
    assert restore(tmp_path / "nowhere") is None


@pytest.mark.parametrize("kind", ["flip", "truncation", "deletion"])
def test_damage_is_told_and_the_checkpoint_before_it_is_used(
    written, tmp_path, capsys, kind
):
    """No fault gives another state in silence."""
    draw = random.Random(kind)
    for number in range(NUM_FAULTS):
        folder = shutil.copytree(written, tmp_path / str(number))
        victim = draw.choice([f for f in (folder / "8").rglob("*") if f.is_file()])
        if number == 0:
            spoil(folder / "8", draw)
        elif kind == "flip":
            flip(victim, draw)
        elif kind == "truncation":
            size = draw.randrange(max(victim.stat().st_size, 1))
            victim.write_bytes(victim.read_bytes()[:size])
        else:
            victim.unlink()
        found = restore(folder)
        error = capsys.readouterr().err
        assert found is not None
        assert equal(found.state, a_state(5 if error else 8)), victim
        assert error or number, "arrays that are spoilt for certain"
        if error:
            assert error.startswith(f"forwax: The checkpoint {folder / '8'} ")
            aside = folder / "8.damaged"
            assert f"It is kept as {aside}; the one before it is used.\n" in error
            assert error.count("\n") == 1
            assert aside.is_dir()
            assert not (folder / "8").exists()


def test_a_changed_number_is_named_by_its_array(folder, capsys):
    """Orbax reads it without a word."""
    other = a_state(8)
    other.params["w"] = other.params["w"].at[7].add(1)
    tree = {"state": other._asdict(), "seconds": np.float64(8 / 7)}
    shutil.rmtree(folder / "8" / "state")
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder / "8" / "state", tree)
    found = restore(folder)
    assert equal(found.state, a_state(5))
    assert (
        f"The checkpoint {folder / '8'} is damaged: ['state']['params']['w'] is not what was "
        "written." in capsys.readouterr().err
    )


def test_after_damage_a_run_goes_on_and_damage_is_kept(folder, capsys):
    for _ in range(2):
        shutil.rmtree(folder / "8" / "sums")
        assert equal(restore(folder).state, a_state(5))
        assert "8 has no sums. It is kept" in capsys.readouterr().err
        with closing(Checkpoints(folder)) as checkpoints:
            checkpoints.save(a_state(8), seconds=2.0)
        assert equal(restore(folder).state, a_state(8))
    names = {path.name for path in folder.iterdir()}
    assert names == {"5", "8", "8.damaged", "8.damaged-2"}


def test_where_none_is_sound_each_is_named_and_nothing_changes(folder):
    for step in ("5", "8"):
        spoil(folder / step, random.Random(0))
    (folder / "9.orbax-checkpoint-tmp").mkdir()
    (folder / "9.orbax-checkpoint-tmp" / "a").write_text("left over")
    before = contents(folder)
    with pytest.raises(UsageError) as caught:
        restore(folder)
    for sentence in (
        f"No checkpoint in {folder} is sound, and nothing there was changed. The checkpoint ",
        f"The checkpoint {folder / '8'} ",
        f"The checkpoint {folder / '5'} ",
        "To train from the start, move that folder away.",
    ):
        assert sentence in str(caught.value)
    assert contents(folder) == before


def test_what_a_kill_left_is_removed(folder):
    for name in ("9.orbax-checkpoint-tmp", "9.orbax-checkpoint-tmp-1234"):
        (folder / name / "state").mkdir(parents=True)
    restore(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["5", "8"]


def test_what_is_not_forwax_s_is_left_alone(folder, tmp_path, capsys):
    outside = tmp_path / "outside"
    shutil.copytree(folder / "8", outside / "8")
    (folder / "99999999").mkdir()
    (folder / "1").mkdir()
    (folder / "1" / "photo.jpg").write_bytes(b"a photo")
    (folder / "11").mkdir()
    (folder / "10").symlink_to(outside / "8")
    (folder / "5" / "notes.txt").write_text("mine")
    (folder / "my.orbax-checkpoint-tmp").mkdir()
    before = contents(outside)
    assert equal(restore(folder).state, a_state(8))
    with closing(Checkpoints(folder)) as checkpoints:
        assert checkpoints.latest_step() == 8
        for step in (10, 11, 12):
            checkpoints.save(a_state(step), seconds=1.0)
        assert checkpoints.latest_step() == 12
    assert {path.name for path in folder.iterdir()} == {
        "1",
        "5",
        "10",
        "11",
        "11-2",
        "12",
        "99999999",
        "my.orbax-checkpoint-tmp",
    }
    assert contents(outside) == before
    assert (folder / "1" / "photo.jpg").read_bytes() == b"a photo"
    assert [path.name for path in (folder / "5").iterdir()] == ["notes.txt"]
    assert equal(restore(folder).state, a_state(12))
    shutil.rmtree(folder / "12")
    assert equal(restore(folder).state, a_state(11))
    assert capsys.readouterr().err == ""


def test_folders_from_before_the_sums_go_on_with_one_warning(tmp_path, capsys):
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        for step in (5, 8):
            tree = {"state": a_state(step)._asdict(), "seconds": np.float64(1.5)}
            manager.save(step, args=ocp.args.StandardSave(tree))
    capsys.readouterr()
    found = restore(tmp_path)
    assert equal(found.state, a_state(8))
    assert (found.seconds, found.notes) == (1.5, {})
    assert capsys.readouterr().err == (
        f"forwax: The checkpoint {tmp_path / '8'} is from a version that kept no sums: its "
        "content is taken as it is.\n"
    )
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(a_state(9), seconds=2.0)
    assert equal(restore(tmp_path).state, a_state(9))
    assert capsys.readouterr().err == ""


def test_other_shapes_are_told_before_arrays_are_read(folder, monkeypatch):
    def refuse(*args):
        raise AssertionError("the arrays were read")

    like = LIKE._replace(params=LIKE.params | {"w": jax.ShapeDtypeStruct((9,), "int8")})
    monkeypatch.setattr(kept, "leaf_sums", refuse)
    with pytest.raises(UsageError) as caught:
        restore(folder, like)
    told = (
        r"['state']['params']['w'] is declared as float32[300] and should be int8[9]."
    )
    assert told in str(caught.value)


class Metadata:
    """What Orbax tells of a checkpoint whose files declare a huge chunk."""

    def __init__(self, plain):
        self.plain = plain

    def __call__(self, path):
        found = self.plain(path)
        leaf = found.item_metadata["state"].tree["state"]["params"]["w"]
        object.__setattr__(leaf.storage, "chunk_shape", (2**34,))
        return found


def test_a_declared_chunk_larger_than_its_array_is_told(folder, capsys):
    with closing(Checkpoints(folder)) as checkpoints:
        checkpoints._writer.metadata = Metadata(checkpoints._writer.metadata)
        with pytest.raises(
            UsageError, match=r"declares chunks of .17179869184,. of an"
        ):
            checkpoints.restore(LIKE)


def test_a_checkpoint_under_another_step_is_told(folder, capsys):
    (folder / "8").rename(folder / "80")
    assert equal(restore(folder).state, a_state(5))
    assert "80 holds the state after step 8. It is kept" in capsys.readouterr().err
