"""DP-BloGS, ForgetNet's block-wise gradient shuffle: the method as published, its index as an index.

The shuffle is a heuristic without any privacy guarantee. `BloGSPrivacyEngine` with
``mechanism="gaussian"`` is the sound way under the same call.
"""

from dptorch.blogs.engine import BloGSPrivacyEngine
from dptorch.blogs.index import INDICES
from dptorch.blogs.statement import BloGSSpent, BloGSStatement

__all__ = ["INDICES", "BloGSPrivacyEngine", "BloGSSpent", "BloGSStatement"]
