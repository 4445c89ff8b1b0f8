"""`forwax finetune`: train an adapter of a language model, by default forwards only."""

from forwax.lab.finetune.command import DESCRIPTION, FinetuneOptions, run

__all__ = ["DESCRIPTION", "FinetuneOptions", "run"]
