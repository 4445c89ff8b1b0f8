"""What a run is told to have reached: accuracies beside what needs no training, and memory."""

import resource
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from forwax import adapters
from forwax._reports.programs import held_bytes
from forwax.adapters import files
from forwax.lab.finetune.models import Model
from forwax.lab.finetune.problem import Tuning
from forwax.lab.report import Json

MIB = 2**20


def outcome(problem: Tuning, params: Any) -> Json:
    """Loss and accuracy on the test texts, of the model as it was too; called once, at the end.

    The shifted threshold's accuracy is the untrained model's whose logits each have their median
    over the training texts taken off: what knowing the shares of the classes alone gives.

    Args:
        problem: the task.
        params: the trained parameters.
    """
    start = problem.start
    score = problem.scores(problem.test)  # type: ignore[arg-type]
    before, _, logits = score(start)
    after, correct, _ = score(params)
    found: Json = {"test_loss": mean(after), "test_loss_before": mean(before)}
    if problem.loss_of_tokens is not None:
        return found | {"test_accuracy": None}
    labels = np.asarray(problem.test[1])
    *_, of_training = problem.scores(problem.train)(start)  # type: ignore[arg-type]
    centred = [x - x.mean(-1, keepdims=True) for x in (logits, of_training)]
    shifted = centred[0] - np.median(centred[1], axis=0)
    return found | {
        "test_accuracy": mean(correct),
        "test_accuracy_before": mean(logits.argmax(-1) == labels),
        "test_accuracy_shifted": mean(shifted.argmax(-1) == labels),
        "test_share_of_commonest": float(np.bincount(labels).max() / len(labels)),
    }


def mean(values: np.ndarray) -> float:
    """The mean in double precision."""
    return float(np.mean(values, dtype=float))


def told(found: Json) -> str:
    """The outcome in words."""
    loss = f"Test loss {found['test_loss_before']:.3f} before, {found['test_loss']:.3f} after."
    if found["test_accuracy"] is None:
        return loss
    return (
        f"Test accuracy {found['test_accuracy_before']:.1%} before, {found['test_accuracy']:.1%} "
        f"after; the commonest class alone {found['test_share_of_commonest']:.1%}, a shifted "
        f"threshold alone {found['test_accuracy_shifted']:.1%}.\n{loss}"
    )


def memory(problem: Tuning, block: Any) -> Json:
    """Bytes beside all arguments of a step and of inference on a batch, and the process's peak.

    As the compiler counts them: temporaries + outputs - aliases.

    Args:
        problem: the task.
        block: the compiled steps.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "step_bytes": held_bytes(block),
        "inference_bytes": held_bytes(problem.inference),
        "process_peak_bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def memory_told(found: Json) -> str:
    """The memory in words."""
    step, inference = found["step_bytes"], found["inference_bytes"]
    peak = f"the process's peak {found['process_peak_bytes'] / MIB:,.0f} MiB"
    if step is None:
        return f"Memory: {peak}."
    return (
        f"Memory beside the arguments: a step {step / MIB:,.1f} MiB, inference on its batch "
        f"{inference / MIB:,.1f} MiB; {peak}."
    )


def save(path: Path, params: Any, model: Model) -> None:
    """Write what was trained: an adapter, or all parameters by their names in the model's file.

    Args:
        path: the file.
        params: an adapter, or a model's parameters.
        model: the model.
    """
    if not isinstance(params, dict):
        adapters.save(path, params)
        return
    leaves = jax.tree_util.tree_leaves_with_path(params)
    arrays = {
        jax.tree_util.keystr(place, simple=True, separator="."): x
        for place, x in leaves
    }
    metadata = {
        "format": "forwax parameters 1",
        "base": model.config.name,
        "base_sha256": model.config.sha256,
    }
    files.write(path, arrays, metadata)
