"""Forms in which the per-example gradients of a parameter can be held."""

from dptorch.tape.gradients.base import PerExampleGradient
from dptorch.tape.gradients.convolution import Convolution, Geometry
from dptorch.tape.gradients.dense import Dense
from dptorch.tape.gradients.outer import Outer
from dptorch.tape.gradients.scatter import Scatter

__all__ = ["Convolution", "Dense", "Geometry", "Outer", "PerExampleGradient", "Scatter"]
