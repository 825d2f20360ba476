"""Linux tells of itself in /proc, which macOS does not have: what asks there does without."""

from __future__ import annotations

import builtins
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dptorch.bench import memory
from dptorch.native import threads
from dptorch.tape.gradients import device_cost


@pytest.fixture
def without_proc(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No file below /proc can be opened; those that were asked for."""
    asked: list[str] = []

    def refused(function: Any) -> Any:
        def opened(path: Any, *args: Any, **kwargs: Any) -> Any:
            if str(path).startswith("/proc/"):
                asked.append(str(path))
                raise FileNotFoundError(path)
            return function(path, *args, **kwargs)

        return opened

    monkeypatch.setattr(builtins, "open", refused(open))
    for name in ("read_text", "write_text"):
        monkeypatch.setattr(Path, name, refused(getattr(Path, name)))
    return asked


def test_what_linux_alone_tells_is_done_without(without_proc: list[str]) -> None:
    assert threads._was_forked() is False
    assert threads._openmp_start.__wrapped__() is None  # threads of Python's own are begun
    assert device_cost.free_bytes(torch.device("cpu")) == math.inf
    assert isinstance(device_cost._processor(), str)
    assert memory._begin_resident() is None
    assert {Path(path).name for path in without_proc} == {
        "stat", "maps", "meminfo", "cpuinfo", "clear_refs"
    }  # fmt: skip
