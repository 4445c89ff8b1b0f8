"""Table and picture of runs with and without clipped slopes: `safety.py PICTURE RUN...`."""

import json
import pathlib
import sys

import numpy as np
from matplotlib.figure import Figure

from forwax.lab import style

MEAN_OF = 100
COLUMNS = (
    "clip, in medians",
    "seed",
    "steps made",
    "best batch",
    "best mean of 100",
    "last mean of 100",
    "best test loss",
    "last test accuracy",
)


def read(path: pathlib.Path) -> tuple[dict, np.ndarray, list[dict]]:
    """The settings of a run, the training loss of each step, and its evaluations."""
    rows = [
        json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()
    ]
    losses = np.array([row["loss"] for row in rows if "loss" in row])
    return (
        json.loads((path / "config.json").read_text()),
        losses,
        [row for row in rows if "test_loss" in row],
    )


def running_mean(losses: np.ndarray) -> np.ndarray:
    """The mean over the last 100 steps."""
    with np.errstate(over="ignore"):
        return np.convolve(losses, np.ones(MEAN_OF) / MEAN_OF, "valid")


def line(config: dict, losses: np.ndarray, tests: list[dict]) -> str:
    """One line of the table."""
    means, clip = running_mean(losses), config.get("clip_slopes")
    last = (
        tests[-1]
        if tests
        else {"test_loss": float("nan"), "test_accuracy": float("nan")}
    )
    best = min((row["test_loss"] for row in tests), default=float("nan"))
    cells = [
        "none" if clip is None else f"{clip:g}",
        str(config["seed"]),
        f"{len(losses):,} of {config['steps']:,}",
        f"{losses.min():.3f}",
        f"{means.min():.3f}",
        f"{means[-1]:.3g}",
        f"{best:.3f}",
        f"{last['test_accuracy']:.1%}",
    ]
    return "| " + " | ".join(cells) + " |"


@style.styled
def draw(runs: list[tuple[dict, np.ndarray, list[dict]]]) -> Figure:
    """The mean training loss of all runs against steps."""
    figure = style.new_figure(7, 4)
    axes = figure.subplots()
    names = set()
    for config, losses, _ in runs:
        clipped = config.get("clip_slopes") is not None
        name = "slopes clipped at their running median" if clipped else "plain"
        colour = style.PALETTE["forward" if clipped else "muted"]
        means = running_mean(losses)
        steps = np.arange(MEAN_OF, MEAN_OF + len(means))
        axes.plot(
            steps,
            np.minimum(means, 20),
            color=colour,
            label=None if name in names else name,
            linewidth=1,
        )
        names.add(name)
    axes.set(
        xlabel="steps",
        ylabel=f"training loss, mean of {MEAN_OF} steps",
        yscale="log",
        ylim=(0.6, 20),
    )
    axes.minorticks_off()
    axes.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.legend()
    return figure


def main() -> None:
    """Print the table and save the picture."""
    runs = sorted(
        (read(pathlib.Path(p)) for p in sys.argv[2:]),
        key=lambda r: r[0].get("clip_slopes") or 0,
    )
    print(f"| {' | '.join(COLUMNS)} |\n|{' ---: |' * len(COLUMNS)}")
    for run in runs:
        print(line(*run))
    style.save(draw(runs), sys.argv[1])


if __name__ == "__main__":
    main()
