"""Return the engines that can be measured, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from dptorch.bench.engines import Engine, our_engines
from dptorch.bench.peers import peer_engines
from dptorch.errors import one_of

__all__ = ["choose", "engines"]


def engines(peers: Mapping[str, Path] | None = None) -> dict[str, Engine]:
    """All engines by name, those of the given checkouts included."""
    return {e.name: e for e in [*our_engines(), *peer_engines(peers or {})]}


def choose(available: Mapping[str, Engine], names: Iterable[str]) -> list[Engine]:
    """The engines of these names or families, in the registry's order; all of them for none.

    Raises:
        ConfigurationError: for a name that is neither.
    """
    families = {name.split("/")[0] for name in available}
    wanted = {one_of("engine", name, sorted({*available, *families})) for name in names}
    return [e for name, e in available.items() if not wanted or wanted & {name, name.split("/")[0]}]
