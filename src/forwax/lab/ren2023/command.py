"""`forwax reproduce`: run the experiments of a paper and set our figures beside the paper's."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from forwax.lab.data import DataSet, load
from forwax.lab.experiments import EXPERIMENTS
from forwax.lab.flags import Chosen
from forwax.lab.options import check_ranges
from forwax.lab.problem import checksum_of, problem_of
from forwax.lab.ren2023 import runs, table
from forwax.lab.ren2023.columns import COLUMNS, RULES, Column
from forwax.lab.ren2023.entries import Entry
from forwax.lab.ren2023.finished import finished, folder_of
from forwax.lab.settings import Settings, UsageError
from forwax.lab.train.runs import write_text
from forwax.lab.train.signals import INTERRUPTED, NOT_FINITE, TERMINATED, Signals

if TYPE_CHECKING:
    ColumnName = str
else:
    ColumnName = Literal[tuple(COLUMNS)]

TABLE, FIGURE = "table.md", "curves.png"


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions:
    """Run a column of a paper's tables over its methods and seeds.

    Example:
        ```sh
        forwax reproduce ren2023                                   # LocalMixer M/1/16 on MNIST, all 13 methods
        forwax reproduce ren2023 --column mnist-s --seeds 3
        forwax reproduce ren2023 --rules BP LG-FG-A LG-FG-A:4      # one noise a step, and four
        forwax reproduce ren2023 --column cifar-m --rules LG-FG-A  # for a GPU
        ```
    """

    paper: Annotated[Literal["ren2023"], tyro.conf.Positional] = "ren2023"
    """Whose experiments: Ren, Kornblith, Liao, Hinton 2023, "Scaling Forward Gradient With Local Losses"."""
    column: ColumnName = "mnist-m"
    """The model, the data set and the objective."""
    rules: tuple[str, ...] = RULES
    """Methods; of forward gradients also so many noises (LG-FG-A:4), of a kind (:normal), or :one-slope an example."""
    seeds: int = 3
    """How many seeds; the first is 0."""
    epochs: Chosen[int] = None
    """Passes over the training set, instead of the column's."""
    steps: Chosen[int] = None
    """Training steps, instead of epochs."""
    batch_size: Chosen[int] = None
    """The number of examples of a step, instead of the column's."""
    learning_rate: Chosen[float] = None
    """One rate for all methods, instead of the column's own for each."""
    augment: Chosen[bool] = None
    """Whether supervised training images are shifted by up to 2 pixels, and flipped where coloured."""
    dtype: Chosen[Literal["float32", "bfloat16"]] = None
    """The floating type that the model computes in, instead of the column's."""
    examples: Chosen[int] = None
    """Use only so many training and test images, to try a command out."""
    holdout: int = 0
    """Hold out so many of the last training images and report errors on them, to choose settings by."""
    out: Path = Path("runs/ren2023")
    """The folder of results; what is finished is kept there, and the same command goes on where it stopped."""
    data_dir: Chosen[Path] = None
    """A folder to look for the data in first, before FORWAX_DATA and the cache."""


DESCRIPTION = "\n".join(
    [
        "Run the experiments of a paper, and set our figures beside the paper's.",
        "",
        f"Methods: {', '.join(RULES)}.",
        "",
        "Columns:",
        *(
            f"- {column.name}: {column.title}, {column.epochs} epochs"
            for column in COLUMNS.values()
        ),
    ]
)
"""What `forwax reproduce --help` says first."""


def run(options: ReproduceOptions) -> int:
    """Run what is missing, seed by seed, then print and save the table and the curves.

    Args:
        options: the command's options.

    Returns:
        The exit code: 0 when done, 3 when done but for runs whose loss was not finite, 130 after
        Ctrl-C, 143 after a termination.

    Raises:
        UsageError: when the options do not go together.
        DataError: when the data cannot be loaded.

    Example:
        ```sh
        forwax reproduce ren2023 --rules BP LG-BP LG-FG-A --seeds 1
        ```
    """
    column, entries = COLUMNS[options.column], parse_entries(options)
    data = prepared(load(column.settings.data or "", options.data_dir), options)
    folder = options.out / column.name
    checksum, finite = checksum_of(data), True
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--out: the folder {folder} cannot be made ({error.strerror}); choose another."
        ) from error
    with Signals().watch() as signals:
        try:
            for seed in range(options.seeds):
                for entry in dict.fromkeys(entries):
                    summary = run_one(folder, column, entry, seed, data, options, signals)
                    finite &= summary["finite"]
                    save(
                        folder,
                        column,
                        checksum,
                        _facts(column, entries[0], data, options, summary),
                    )
        except KeyboardInterrupt:
            print(f"\nStopped; what was done is kept in {folder}. The same command goes on.")
            return TERMINATED if signals.received == signal.SIGTERM else INTERRUPTED
    console = Console() if sys.stdout.isatty() else Console(width=150)
    console.print(table.make_table(column, *finished(folder, checksum)))
    print(f"Table, curves and runs: {folder}")
    return 0 if finite else NOT_FINITE


def parse_entries(options: ReproduceOptions) -> list[Entry]:
    """Read the rows that the options ask for.

    Raises:
        UsageError: when a name is unknown or a number out of range.

    >>> [entry.name for entry in parse_entries(ReproduceOptions(rules=("BP", "LG-FG-A:4")))]
    ['BP', 'LG-FG-A:4']
    """
    for name in ("seeds", "epochs", "examples", "steps", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
    if options.epochs is not None and options.steps is not None:
        raise UsageError("--steps and --epochs both say how long to train; give one of them.")
    if not options.rules:
        raise UsageError(
            "--rules needs at least one method, such as LG-FG-A; without --rules all 13 are run."
        )
    if options.holdout < 0:
        raise UsageError(f"--holdout must be zero or more, got {options.holdout}.")
    return [Entry.parse(text) for text in options.rules]


def prepared(data: DataSet, options: ReproduceOptions) -> DataSet:
    """Cut the data down to what the options ask for: fewer examples, or a part held out in place of the test set.

    Raises:
        UsageError: when nothing would be left to train on.
    """
    train, test = (
        (data.train_images, data.train_labels),
        (data.test_images, data.test_labels),
    )
    if options.holdout:
        if options.holdout >= len(train[0]):
            raise UsageError(
                f"--holdout must leave images to train on; there are {len(train[0])} in all."
            )
        train, test = (
            [x[: -options.holdout] for x in train],
            [x[-options.holdout :] for x in train],
        )
    (train_images, train_labels), (test_images, test_labels) = (
        [x[: options.examples] for x in y] for y in (train, test)
    )
    return dataclasses.replace(
        data,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
    )


def settings_of(
    column: Column,
    entry: Entry,
    num_examples: int,
    options: ReproduceOptions,
    seed: int,
) -> Settings:
    """Give the settings of one run.

    Raises:
        UsageError: when one is out of range.
    """
    names = ("epochs", "steps", "batch_size", "learning_rate", "augment", "dtype")
    changes = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    settings = entry.settings(column, num_examples, seed=seed, **changes)
    check_ranges(settings, num_examples)
    return settings


def run_one(
    folder: Path,
    column: Column,
    entry: Entry,
    seed: int,
    data: DataSet,
    options: ReproduceOptions,
    signals: Signals,
) -> dict[str, Any]:
    """Train one method with one seed, or read what an earlier sitting finished.

    Raises:
        KeyboardInterrupt: after a signal.
    """
    if signals.received is not None:
        raise KeyboardInterrupt
    settings = settings_of(column, entry, len(data.train_images), options, seed)
    problem = problem_of(data, EXPERIMENTS["local-mixer"], settings)
    print(
        f"{column.title}: {entry.name}, seed {seed}, learning rate {settings.learning_rate:g}",
        flush=True,
    )
    return runs.train(folder_of(folder, entry, seed), problem, settings, _teller(), signals)


def _teller() -> Callable[[str], None]:
    return lambda line: print(f"  {line}", flush=True)


def _facts(
    column: Column,
    entry: Entry,
    data: DataSet,
    options: ReproduceOptions,
    summary: dict[str, Any],
) -> str:
    settings = settings_of(column, entry, len(data.train_images), options, 0)
    told = table.facts(column, settings, summary, os.cpu_count())
    if options.holdout:
        told += (
            f" Errors are on {options.holdout} training images that were held out, not on "
            f"the "
            f"test set."
        )
    return told


def save(folder: Path, column: Column, checksum: str, facts: str) -> None:
    """Write the table and the curves of all that is finished on this data, by this call or another."""
    # imported here: matplotlib takes a second that `forwax reproduce --help` need not wait for
    from forwax.lab import style
    from forwax.lab.ren2023 import picture

    entries, results = finished(folder, checksum)
    write_text(folder / TABLE, table.markdown(column, entries, results, facts))
    style.save(picture.draw(column, entries, results), folder / FIGURE, dpi=120)
