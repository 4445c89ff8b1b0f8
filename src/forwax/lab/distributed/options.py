"""How several processes may be asked to train one run; read without jax."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from forwax.lab.flags import Chosen, Count, CountOrNot, Natural


@dataclass(frozen=True, kw_only=True)
class TeamOptions:
    """The options of a command that several processes may run together."""

    distributed: Annotated[bool | None, tyro.conf.arg(help_behavior_hint="")] = None
    """Whether all processes that were started train one run together, or each its own."""
    coordinator_address: Chosen[str] = None
    """Host and port of process 0, by default JAX_COORDINATOR_ADDRESS or what jax finds."""
    num_processes: CountOrNot = None
    """How many processes there are, by default JAX_NUM_PROCESSES or what jax finds."""
    process_id: Chosen[Natural] = None
    """Which one this is, from 0; by default JAX_PROCESS_ID or what jax finds."""
    heartbeat_seconds: Count = 30
    """After how many seconds without a sign of life a process counts as gone."""
