"""`forwax train`: the loop, and the folder of a run that any interruption leaves resumable."""
