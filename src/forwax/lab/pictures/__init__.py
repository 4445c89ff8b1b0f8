"""The pictures of the commands, one module for each; all in the look of `forwax.lab.style`."""
