"""`python -m forwax` is the command `forwax`."""

from forwax.lab.cli import script

if __name__ == "__main__":
    script()
