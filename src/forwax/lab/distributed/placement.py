"""Where the arrays of a run lie: on one device, on all of this process, or on all of the team."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from forwax.lab.catalogue.settings import Settings
from forwax.lab.distributed.team import TEAM
from forwax.lab.flags import UsageError


def placement(settings: Settings) -> tuple[NamedSharding | None, Callable[[Any], Any]]:
    """Say where a run's arrays lie, and how a batch is spread over the devices.

    Args:
        settings: the run's settings.

    Returns:
        A sharding that copies an array to every device, or None for the one default device; and a
        function that spreads the leading axis of arrays inside a compiled program. The devices are
        this process's own, or those of all processes that train together.

    Raises:
        UsageError: when a batch cannot be spread evenly.

    >>> placement(Settings())[0] is None
    True
    """
    is_alone = TEAM.count == 1
    devices = jax.local_devices() if is_alone else jax.devices()
    count = len(devices)
    if count == 1 or (is_alone and not settings.data_parallel):
        return None, lambda batch: batch
    if settings.batch_size % count:
        raise UsageError(
            f"--batch-size must be a multiple of the {count} {'local ' * is_alone}devices that "
            f"share it, got {settings.batch_size}."
        )
    mesh = jax.make_mesh((count,), ("examples",), (AxisType.Auto,), devices=devices)
    rows = NamedSharding(mesh, PartitionSpec("examples"))
    return NamedSharding(
        mesh, PartitionSpec()
    ), lambda batch: jax.lax.with_sharding_constraint(batch, rows)


def num_devices(settings: Settings) -> int:
    """Give the number of devices that a run's steps are made on.

    >>> num_devices(Settings())
    1
    """
    sharding = placement(settings)[0]
    return 1 if sharding is None else len(sharding.device_set)
