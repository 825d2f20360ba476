"""Find out in the backward when all gradients of a group of parameters have arrived."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

__all__ = ["GroupWatcher"]


class GroupWatcher:
    """Counts the gradients of groups of parameters that are clipped in the backward.

    A group with a parameter that the loss does not reach, or that it reaches through a param-only
    tensor, never becomes complete; it is clipped after the backward.

    Args:
        groups: names of the parameters of each group.
        ids: id of each parameter, by name.
    """

    def __init__(self, groups: Sequence[Iterable[str]], ids: Mapping[str, int]) -> None:
        self._missing = [{ids[name] for name in group} for group in groups]
        self._group_of = {key: i for i, group in enumerate(self._missing) for key in group}
        self._arrived: dict[int, int] = {}

    def arrived(self, key: int, *, uses: int, derived: bool) -> int | None:
        """Note one gradient; return the number of the group that it makes complete, or None.

        Args:
            key: id of the parameter, or of a param-only tensor.
            uses: how many gradients of it will arrive.
            derived: whether more may arrive through a param-only tensor.
        """
        group = self._group_of.get(key)
        if group is None:
            return None
        self._arrived[key] = self._arrived.get(key, 0) + 1
        if self._arrived[key] < uses or derived:
            return None
        missing = self._missing[group]
        missing.discard(key)
        return None if missing else group
