"""Three diagrams for learners: the forward step, the backward step, and the forward gradient."""

import os
from pathlib import Path

from forwax.lab import style
from forwax.lab.diagrams.gradient import forward_gradient
from forwax.lab.diagrams.neurons import backward_step, forward_step

__all__ = ["backward_step", "forward_gradient", "forward_step", "save_all"]


def save_all(folder: str | os.PathLike[str]) -> list[Path]:
    """Save the three diagrams as PNG files in the folder, which is made when absent, and return their paths.

    Example: `save_all("docs/pictures")` writes forward-step.png, backward-step.png and
        forward-gradient.png.
    """
    figures = {
        "forward-step": forward_step,
        "backward-step": backward_step,
        "forward-gradient": forward_gradient,
    }
    return [style.save(draw(), Path(folder) / f"{name}.png") for name, draw in figures.items()]
