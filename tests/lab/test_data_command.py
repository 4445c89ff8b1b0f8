"""`forwax data`: what it prints."""

from forwax.lab.commands import data as data_command
from forwax.lab.data import names


def test_the_command_tells_where_a_set_was_found(tiny_data, capsys):
    assert data_command.run(data_command.DataOptions("cifar10")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0]
        == f"cifar10: found in {tiny_data / 'cifar-10-batches-bin'}, checksums verified"
    )
    assert lines[1] == "  training: 60 images of 32x32x3, uint8 from 0 to 255"
    assert lines[2] == "  test: 20 images of 32x32x3, uint8 from 0 to 255"
    assert lines[4].split() == ["airplane", "6", "2"]
    assert len(lines) == 4 + 10


def test_the_command_fetches_and_then_finds(remote, isolated_data, serve, datafiles):
    serve(datafiles.pages_of(remote("mnist")))
    folder = isolated_data / "mnist"
    assert data_command.describe("mnist").startswith(
        f"mnist: fetched, now found in {folder}, checksums verified\n"
    )
    assert data_command.describe("mnist").startswith(
        f"mnist: found in {folder}, checksums verified\n"
    )


def test_the_table_lists_every_set_and_fetches_none(
    write_tiny, tmp_path, monkeypatch, capsys
):
    write_tiny("mnist", tmp_path)
    (write_tiny("fashion-mnist", tmp_path).folder / "train-images-idx3-ubyte").unlink()
    monkeypatch.setenv("COLUMNS", "500")
    assert data_command.run(data_command.DataOptions(data_dir=tmp_path)) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in names())
    assert f"found in {tmp_path / 'mnist'}" in out
    assert "not here; `forwax data cifar10` fetches it (170 MB)" in out
    assert "but without train-images-idx3-ubyte; add what is missing" in out
