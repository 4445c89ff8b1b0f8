"""`forwax finetune --compare`: several rules from one start, each at a rate found on equal trials.

Each finished part is a file in the run's folder, so that what was done is not done again.
"""

import functools
import time

import jax

from forwax.lab.compare import rates
from forwax.lab.compare.bench import Trial
from forwax.lab.compare.setup import part
from forwax.lab.compare.tables import number
from forwax.lab.finetune import results
from forwax.lab.finetune.run import ADAPTER, Ready
from forwax.lab.report import Json, Table, finite, print_tables, write_json, write_text
from forwax.lab.training.folder import SUMMARY, Run
from forwax.lab.training.program import CompiledTraining
from forwax.lab.training.progress import reporting

TABLE = "table.md"
COLUMNS = (
    "rule",
    "learning rate",
    "test accuracy",
    "test loss",
    "a step, MiB",
    "inference, MiB",
    "ms a step",
)


class Versus:
    """Makes the parts, and compiles no program before a part needs it.

    Attributes:
        ready: the task.
        run: the folder.
    """

    def __init__(self, ready: Ready, run: Run):
        self.ready = ready
        self.run = run
        self.program = functools.cache(self._compiled)
        self.part = functools.partial(part, run.path)
        self._data = jax.device_put(ready.task.train)
        self._score = functools.cache(ready.score)

    def _compiled(self, rule: str) -> CompiledTraining:
        print(f"{rule}: compiling.", flush=True)
        settings = self.ready.options.settings(rule, 1.0)
        return CompiledTraining(self.ready.task, settings, self._data)

    def found(self, rule: str) -> Json:
        """Search a rule's rate, train at the best one, and test."""

        def candidate(index: int, rate: float) -> Json:
            return self.part(f"search-{rule}-{index}", self.candidate, rule, rate)

        start = self.ready.rate(self.run, rule)
        tried = rates.search(start, self.ready.options.trials, candidate)
        rate = rates.best_rate(rates.pairs(tried))
        made = self.part(f"run-{rule}", self.final, rule, rate)
        return made | {"search": tried, "edge": rates.edge_note(tried)}

    def candidate(self, rule: str, rate: float) -> Json:
        """Train at one rate."""
        trial = self._trained(rule, rate)
        loss = finite(trial.validation_losses[-1]) if trial.finite else None
        told = "not finite" if loss is None else f"validation loss {loss:.4g}"
        print(f"{rule}: rate {rate:.3g}, {told}", flush=True)
        return {"learning_rate": rate, "validation_loss": loss}

    def final(self, rule: str, rate: float) -> Json:
        """Train at the best rate and test; once for each rule."""
        trial = self._trained(rule, rate)
        task = self.ready.task
        trained = trial.trainer.state.params
        results.save(self.run.path / f"{rule}-{ADAPTER}", trained, self.ready.model)
        return {
            "rule": rule,
            "learning_rate": rate,
            "finite": trial.finite,
            "steps_made": len(trial.losses),
            **results.outcome(task, trained),
            **results.memory(task, self.program(rule).block),
            **trial.facts(),
        }

    def _trained(self, rule: str, rate: float) -> Trial:
        steps = self.ready.options.steps
        seed = self.ready.options.seed
        trial = Trial(self.program(rule), rate, seed, self._score(), [steps])
        with reporting(f"{rule}, rate {rate:.3g}", steps, 0) as trial.report:
            return trial.train()


def compare(ready: Ready, run: Run) -> int:
    """Train by each rule, and print and keep one table.

    Args:
        ready: the task.
        run: the run's folder.

    Returns:
        The exit code: 0 when done, 130 after Ctrl-C.
    """
    started = time.perf_counter()
    versus = Versus(ready, run)
    try:
        rows = [versus.found(rule) for rule in ready.options.rules]
    except KeyboardInterrupt:
        print(
            "\nStopped; what is finished is kept. Go on with: forwax finetune --resume "
            f"{run.path}"
        )
        return 130
    table = table_of(ready, rows)
    write_text(run.path / TABLE, f"{table.title}\n\n{table.markdown()}\n")
    print_tables(table)
    for row in rows:
        if row["edge"]:
            print(f"- {row['rule']}: {row['edge']}.")
    first = rows[0]
    write_json(run.path / SUMMARY, {**first, "rules": rows})
    print(f"{results.told(first)}\n{time.perf_counter() - started:.0f} s. {run.path}")
    return 0


def table_of(ready: Ready, rows: list[Json]) -> Table:
    """The table of all rules."""
    asked = ready.options
    title = (
        f"{ready.model.config.name}, {asked.adapter}, {asked.data}: {asked.steps:,} steps of "
        f"{asked.batch_size} texts, seed {asked.seed}; each rate the best of {asked.trials} by the "
        f"loss on {len(ready.task.validation[1])} held-out texts, {len(ready.task.test[1]):,} test "
        "texts"
    )
    return Table(COLUMNS, [_cells(row) for row in rows], title)


def _cells(row: Json) -> tuple[str, ...]:
    accuracy = row["test_accuracy"]
    sizes = [row[name] for name in ("step_bytes", "inference_bytes")]
    return (
        row["rule"],
        number(row["learning_rate"]) + (" (edge)" if row["edge"] else ""),
        "-" if accuracy is None else f"{accuracy:.1%}",
        f"{row['test_loss']:.3f}" + ("" if row["finite"] else " (not finite)"),
        *("-" if size is None else f"{size / results.MIB:.1f}" for size in sizes),
        number(1000 * row["seconds"] / max(row["steps_made"], 1)),
    )
