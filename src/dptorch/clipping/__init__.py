"""Clipping: bound what one example can contribute."""

from dptorch.clipping.functions import FUNCTIONS, coefficients

__all__ = ["FUNCTIONS", "coefficients"]
