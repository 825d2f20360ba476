"""Train one model on several processes: what they exchange, and what they have to agree on.

The plan does not change with the number of processes, and neither does ε: see docs/scale.md.
"""

from dptorch.distributed.ranks import Ranks

__all__ = ["Ranks"]
