"""`forwax reproduce`: run the experiments of a paper and set our figures beside the paper's."""

from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

from forwax.lab import report
from forwax.lab.catalogue.columns import COLUMNS, Column
from forwax.lab.catalogue.experiments import EXPERIMENTS
from forwax.lab.catalogue.names import Entry
from forwax.lab.catalogue.options import check_numbers
from forwax.lab.catalogue.settings import Settings
from forwax.lab.data import DataSet, load
from forwax.lab.data.sets import ARRAYS
from forwax.lab.flags import (
    UsageError,
    check_ranges,
    given,
)
from forwax.lab.keeping.disk import check_path, going_on
from forwax.lab.options.reproduce import ReproduceOptions
from forwax.lab.ren2023 import runs, table
from forwax.lab.ren2023.finished import finished, folder_of
from forwax.lab.training.problem import checksum_of, problem_of
from forwax.lab.training.session import NOT_FINITE, Signals

_tell = partial(print, " ", flush=True)
"""Print a line of a run below the one that names it."""


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
    column = COLUMNS[options.column]
    entries = parse_entries(options)
    data = prepared(load(column.settings.data or "", options.data_dir), options)
    options = clipped(options, column, len(data.train_images))
    checksum = checksum_of(data)
    folder = options.out / column.name
    check_path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--out: the folder {folder} cannot be made ({error.strerror}); choose another."
        ) from error
    finite = True
    signals = Signals()
    with going_on(folder, "the same command"):
        try:
            for seed, entry in product(range(options.seeds), dict.fromkeys(entries)):
                settings = settings_of(column, entry, data, options, seed)
                if signals.received is not None:
                    raise KeyboardInterrupt
                problem = problem_of(data, EXPERIMENTS["local-mixer"], settings)
                print(
                    f"{column.title}: {entry.name}, seed {seed}, learning rate "
                    f"{settings.learning_rate:g}",
                    flush=True,
                )
                summary = runs.train(
                    folder_of(folder, entry, seed), problem, settings, _tell, signals
                )
                finite &= summary["finite"]
                facts = table.facts(settings, summary, options.holdout)
                save(folder, column, checksum, facts)
        except KeyboardInterrupt:
            print(
                f"\nStopped; what was done is kept in {folder}. The same command goes on."
            )
            return signals.code
    report.print_tables(table.make_table(column, *finished(folder, checksum)))
    print(f"Table, curves and runs: {folder}")
    return 0 if finite else NOT_FINITE


def parse_entries(options: ReproduceOptions) -> list[Entry]:
    """Read the rows that the options ask for.

    Raises:
        UsageError: when a name is unknown or a number out of range.

    >>> [entry.name for entry in parse_entries(ReproduceOptions(rules=("BP", "LG-FG-A:4")))]
    ['BP', 'LG-FG-A:4']
    """
    check_ranges(options)
    if options.epochs is not None and options.steps is not None:
        raise UsageError(
            "--steps and --epochs both say how long to train; give one of them."
        )
    if not options.rules:
        raise UsageError(
            "--rules needs at least one method, such as LG-FG-A; without --rules all 16 are run."
        )
    return [Entry.parse(text) for text in options.rules]


def prepared(data: DataSet, options: ReproduceOptions) -> DataSet:
    """Cut the data down: fewer examples, or a part held out in place of the test set.

    Raises:
        UsageError: when nothing would be left to train on.
    """
    arrays = [getattr(data, name) for name in ARRAYS]
    total = len(data.train_images)
    kept = total - options.holdout
    if kept <= 0:
        raise UsageError(
            f"--holdout must leave images to train on; there are {total} in all."
        )
    if options.holdout:
        train = arrays[:2]
        arrays = [x[:kept] for x in train] + [x[kept:] for x in train]
    few = (x[: options.examples] for x in arrays)
    return replace(data, **dict(zip(ARRAYS, few, strict=True)))


def clipped(
    options: ReproduceOptions, column: Column, num_examples: int
) -> ReproduceOptions:
    """Say and set the size of a batch where the column's own is larger than the data."""
    own = column.settings.batch_size
    if options.batch_size is not None or own <= num_examples:
        return options
    print(f"Batches of {num_examples} images, not of {own}: there are no more.")
    return replace(options, batch_size=num_examples)


def settings_of(
    column: Column, entry: Entry, data: DataSet, options: ReproduceOptions, seed: int
) -> Settings:
    """Give the settings of one run.

    Raises:
        UsageError: when one is out of range.
    """
    names = ("epochs", "steps", "batch_size", "learning_rate", "augment", "dtype")
    changes = given(options, names)
    num_examples = len(data.train_images)
    settings = entry.settings(column, num_examples, seed=seed, **changes)
    check_numbers(settings, num_examples)
    return settings


def save(folder: Path, column: Column, checksum: str, facts: str) -> None:
    """Write the table and the curves of all that is finished on this data, by any call."""
    # imported here: matplotlib takes a second that `forwax reproduce --help` need not wait for
    from forwax.lab import style
    from forwax.lab.pictures import reproduction

    entries, results = finished(folder, checksum)
    cells = table.make_table(column, entries, results).markdown()
    report.write_text(
        folder / "table.md", f"**{column.title}**\n\n{cells}\n\n{facts}\n"
    )
    style.save(
        reproduction.draw(column, entries, results), folder / "curves.png", dpi=120
    )
