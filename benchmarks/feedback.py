"""Training by learned feedback and others beside backprop: every row by one command.

    python benchmarks/feedback.py [--tasks mlp cnn vit lm lm-2000 lm-6] [--rules RULE ...]
                                  [--seeds 3] [--steps N] [--cost] [--out FOLDER]

Three rates are tried for each rule on the first seed, with two fifths of the steps and by the
training loss; the best trains all seeds. Runs are lines of FOLDER/feedback.jsonl as soon as they
are there, and what stands there is not run again. Then prints tables and draws pictures of all that
is there. --cost also measures steps beside backprop's. MNIST is looked up as `forwax data` does.
All of it takes some hours on two cores.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import feedback_cost
from feedback_picture import cost_tables, draw, table
from feedback_rules import METHODS, methods_of, rates
from feedback_tasks import ABOUT, TASKS, Task
from feedback_train import Trainer, arithmetic
from forwax.lab import style
from forwax.lab.report import write_text
from timing import machine

Record = dict[str, Any]


class Store:
    """The file of all that is measured, one JSON object a line."""

    def __init__(self, path: Path):
        self.path = path
        self.records: list[Record] = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                self.records.append(json.loads(line))

    def add(self, record: Record) -> None:
        self.records.append(record)
        write_text(self.path, "".join(json.dumps(r) + "\n" for r in self.records))

    def find(self, **fields: Any) -> list[Record]:
        wanted = fields.items()
        return [
            r for r in self.records if wanted <= {k: r.get(k) for k in fields}.items()
        ]


def train(
    store: Store, name: str, task: Task, method: str, seeds: int, steps: int
) -> None:
    """The runs of a row that are not there yet."""
    trainers: list[Trainer] = []  # compiled only where something is left to run

    def run(kind: str, rate: float, steps: int, seed: int) -> Record:
        row = {"kind": kind, "task": name, "rule": method}
        row |= {"rate": rate, "steps": steps, "seed": seed}
        if found := store.find(**row):
            return found[0]
        if not trainers:
            trainers.append(Trainer(task, method))
        record = row | trainers[0].run(rate, steps, seed)
        store.add(record | {"data": task.corpus, "machine": machine()})
        print(
            name, method, kind, rate, seed, record["last"], record["score"], flush=True
        )
        return record

    def tried(rate: float) -> float:
        last = run("search", rate, max(2 * steps // 5, 1), 0)["last"]
        return float("inf") if last is None else last

    searched = name.split("-")[0]  # longer and deeper models take the rate of the first
    if name == searched:
        rate = min(rates(name, method), key=tried)
    else:
        candidates = store.find(kind="run", task=searched, rule=method)
        if not candidates:
            raise SystemExit(
                f"{name}, {method}: run the task {searched} first, for the rate."
            )
        rate = max(candidates, key=lambda r: r["steps"])["rate"]
    for seed in range(seeds):
        run("run", rate, steps, seed)
    if not store.find(kind="arithmetic", task=name, rule=method):
        flops = arithmetic(task, method)
        store.add({"kind": "arithmetic", "task": name, "rule": method, "flops": flops})


def measure_cost(store: Store, rounds: int) -> None:
    for record in feedback_cost.measure(rounds):
        store.add({"kind": "cost", **record, "machine": machine()})
        print(record, flush=True)


def report(store: Store, out: Path) -> None:
    """Print the tables, and draw the tasks that have runs."""
    done = [name for name in TASKS if store.find(kind="run", task=name)]
    texts = [f"{ABOUT[name]}\n\n{table(store.records, name)}" for name in done]
    texts += cost_tables(store.records)
    print("\n\n".join(texts))
    for name in done:
        style.save(draw(store.records, name), out / f"feedback-{name}.png")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rules", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="in place of each task's own")
    parser.add_argument(
        "--cost", action="store_true", help="also steps beside backprop's"
    )
    parser.add_argument("--rounds", type=int, default=40, help="of --cost")
    parser.add_argument("--out", type=Path, default=Path("runs/feedback"))
    return parser.parse_args(given)


def main() -> None:
    options = arguments()
    store = Store(options.out / "feedback.jsonl")
    if options.cost:
        measure_cost(store, options.rounds)
    for name in options.tasks:
        task = TASKS[name]()
        for method in methods_of(name):
            if method in options.rules:
                steps = options.steps or task.steps
                train(store, name, task, method, options.seeds, steps)
    report(store, options.out)


if __name__ == "__main__":
    main()
