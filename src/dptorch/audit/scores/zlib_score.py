"""The zlib ratio (Carlini et al. 2021, arXiv:2012.07805): the loss in relation to how much there is
to know, as a general compressor sees it. A text that is easy for everyone is no sign of membership.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from dptorch.audit.evidence import Array

__all__ = ["zlib_ratio"]


def zlib_ratio(total_loss: Array, content: Sequence[bytes | str]) -> Array:
    """Minus the total loss of each example over the size of its compressed content in bytes, [N].

    Args:
        total_loss: [N]: for texts the sum over tokens; for images and rows the cross-entropy.
        content: the text, or the bytes of the image or row.

    Example:
        >>> zlib_ratio(np.array([10.0, 10.0]), ["a" * 1000, "qwertzuiopas"]).round(2).tolist()
        [-0.59, -0.5]
    """
    sizes = [len(zlib.compress(c.encode() if isinstance(c, str) else c)) for c in content]
    return -np.asarray(total_loss) / np.array(sizes)
