"""Run functions in processes of their own that have the heavy imports already.

Most of a short script's time is the import of torch, torchvision and transformers. A server imports
them once, and each function runs in a fork of it.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["run"]

_IMPORTED = (
    "tests.oracles.torchvision_on_cpu",  # before transformers
    "torch",
    "torchvision",
    "timm",
    "datasets",
    "transformers.trainer",
    "opacus",
    "pytest",
    "hypothesis",
    "tests.peers.recorder",
    "dptorch.compat.opacus",
)
_CONTEXT: Any = multiprocessing.get_context("forkserver")


def run(
    call: Callable[[list[str]], Any],
    arguments: list[str],
    folder: Path,
    variables: Mapping[str, str],
) -> tuple[int, str]:
    """Exit status of ``call(arguments)`` in `folder`, below 0 if it was ended from outside, and what it
    printed, its errors last.

    Args:
        call: a function of a module; what it returns is the status, None being 0.
        arguments: for it.
        folder: the working directory.
        variables: of the environment, beside this process's.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    _CONTEXT.set_forkserver_preload(list(_IMPORTED))
    with tempfile.TemporaryDirectory() as place:
        printed = [f"{place}/stdout", f"{place}/stderr"]
        process = _CONTEXT.Process(
            target=_child, args=(call, arguments, folder, dict(variables), printed)
        )
        process.start()
        process.join()
        text = "\n".join(Path(name).read_text(errors="replace") for name in printed)
    return process.exitcode, text


def _child(
    call: Callable[[list[str]], Any], arguments: list[str], folder: Path,
    variables: Mapping[str, str], printed: list[str],
) -> None:  # fmt: skip
    gc.freeze()  # or every collection looks at all that the server imported
    for stream, name in enumerate(printed, 1):
        with Path(name).open("wb", buffering=0) as file:
            os.dup2(file.fileno(), stream)
    os.environ |= variables
    os.chdir(folder)
    sys.path.insert(0, "")
    sys.exit(call(arguments) or 0)
