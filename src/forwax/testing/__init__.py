"""Checks of rules and tangents, for forwax's own tests and for yours."""

from forwax.testing.contract import assert_contract
from forwax.testing.isotropic import assert_isotropic
from forwax.testing.unbiased import Unbiased, assert_unbiased

__all__ = ["Unbiased", "assert_contract", "assert_isotropic", "assert_unbiased"]
