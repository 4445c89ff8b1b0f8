"""Three figures for learners: the forward step, the backward step, and the forward gradient."""

import os
from pathlib import Path

from figures.gradient import forward_gradient
from figures.neurons import backward_step, forward_step
from forwax.lab import style

__all__ = ["backward_step", "forward_gradient", "forward_step", "save_all"]


def save_all(folder: str | os.PathLike[str]) -> list[Path]:
    """Save the three figures as PNG files and return their paths; the folder is made when absent.

    Example: `save_all("docs/pictures")` writes forward-step.png, backward-step.png and
        forward-gradient.png.
    """
    figures = {
        "forward-step": forward_step,
        "backward-step": backward_step,
        "forward-gradient": forward_gradient,
    }
    return [
        style.save(draw(), Path(folder) / f"{name}.png")
        for name, draw in figures.items()
    ]
