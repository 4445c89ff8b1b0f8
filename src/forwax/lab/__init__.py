"""The command line of forwax: `forwax train`, `compare`, `optimize` and `data`. Needs the extra `lab`."""
