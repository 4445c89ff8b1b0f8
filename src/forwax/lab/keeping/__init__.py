"""What a run leaves on a disk, kept so that damage is seen: checkpoints, metrics, settings."""
