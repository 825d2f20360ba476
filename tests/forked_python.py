"""A Python that has its imports behind it: an executable that runs programs in forks of one process.

Most of a short program's time is the import of torch. Where a test starts programs as a user would,
and what it holds is not how they are imported, the executable of `forking_python` stands for Python's.
It takes a script, ``-c`` or ``-m``, and has its own arguments, environment, folder, standard streams,
signals and exit status, as a process does.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["forking_python"]

ROOT = Path(__file__).parents[1]
#: What every program imports that trains.
TRAINING = (
    "torch",
    "torch._dynamo",
    "scipy.stats",
    "dptorch.engine.privacy_engine",
    "dptorch.cli.app",
)

# Asks the server at the socket for a fork, and stands for it. Without site-packages it starts at once.
_CLIENT = r"""#!{python} -SE
import json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    words = json.dumps([{before!r} + sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
    socket.send_fds(server, [len(words).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(words)
    pid = int.from_bytes(server.recv(8, socket.MSG_WAITALL), "big")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    status = int.from_bytes(server.recv(8, socket.MSG_WAITALL), "big")
code = os.waitstatus_to_exitcode(status)
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@contextlib.contextmanager
def forking_python(
    modules: Sequence[str] = TRAINING,
    commands: Mapping[str, Sequence[str]] | None = None,
    **variables: str,
) -> Iterator[Path]:
    """The executable, as long as the block lasts.

    Args:
        modules: what has been imported in every program.
        commands: further executables in its folder, and the words with which they call Python.
        variables: of the environment, which the imports may look at.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, address = Path(name), f"{name}/socket"
        for command, before in {"python": (), **(commands or {})}.items():
            text = _CLIENT.format(python=sys.executable, address=address, before=list(before))
            (folder / command).write_text(text)
            (folder / command).chmod(0o755)
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        words = [
            "-c",
            "from tests.forked_python import main; main()",
            address,
            str(folder / "python"),
        ]
        with subprocess.Popen(
            [sys.executable, *words, *modules],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | variables,
        ) as server:  # fmt: skip
            assert server.stdout is not None
            begun = any(line == b"ready\n" for line in server.stdout)  # imports may print, too
            assert begun, f"no server that has imported {modules}"
            yield folder / "python"
            server.communicate()  # the end of its standard input ends it


# -- the server ------------------------------------------------------------------------------------


def main() -> None:
    address, executable, *modules = sys.argv[1:]
    for module in modules:
        importlib.import_module(module)
    sys.executable = executable  # programs that start others start forks
    gc.collect()
    gc.freeze()  # or every collection in a fork would copy what was imported
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(32)
        print("ready", flush=True)
        _serve(listener)


def _serve(listener: socket.socket) -> None:
    """Fork for whoever asks, until standard input ends."""
    heard, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    clients: dict[socket.socket, int] = {}
    while True:
        watched: list[Any] = [0, heard, listener, *clients]
        ready, _, _ = select.select(watched, [], [])
        if 0 in ready:
            break
        if heard in ready:
            os.read(heard, 4096)
            _tell_who_ended(clients)
        if listener in ready:
            client, _ = listener.accept()
            request, descriptors = _received(client)
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for each in (listener, *clients, client):
                    each.close()
                _run(*request, descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            client.sendall(pid.to_bytes(8, "big"))
            clients[client] = pid
        for client in [c for c in ready if c in clients]:  # it was killed
            os.kill(clients.pop(client), signal.SIGKILL)
            client.close()
    for pid in clients.values():
        os.kill(pid, signal.SIGKILL)


def _tell_who_ended(clients: dict[socket.socket, int]) -> None:
    by_pid = {pid: client for client, pid in clients.items()}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid in by_pid:
            with by_pid[pid] as client, contextlib.suppress(OSError):
                del clients[client]
                client.sendall(status.to_bytes(8, "big"))


def _received(client: socket.socket) -> tuple[tuple[list[str], dict[str, str], str], list[int]]:
    """(arguments, environment, folder), and the standard streams."""
    size, descriptors, _, _ = socket.recv_fds(client, 8, 3)
    words = client.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)
    return tuple(json.loads(words)), list(descriptors)


# -- a fork ----------------------------------------------------------------------------------------


def _run(
    arguments: list[str], environment: dict[str, str], folder: str, descriptors: list[int]
) -> None:
    """Be the program, to its end."""
    code = 1
    try:
        for stream, descriptor in enumerate(descriptors):
            os.dup2(descriptor, stream)
            os.close(descriptor)
        for number in (signal.SIGCHLD, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        random.seed()
        _of_this_process()
        _program(arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code & 0xFF)


def _of_this_process() -> None:
    """What a process would have taken from its environment while it began."""
    import numpy as np
    import torch

    np.random.seed()  # noqa: NPY002
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = ["", *(p for p in path if p), *(p for p in sys.path if p and p not in path)]


def _program(arguments: list[str]) -> None:
    while arguments[0].startswith(("-u", "-X")):
        del arguments[0]
    kind, *rest = arguments
    if kind == "-c":
        main = sys.modules["__main__"] = ModuleType("__main__")
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        assert not kind.startswith("-"), f"the option {kind} of Python is not known here"
        sys.argv, sys.path[0] = arguments, str(Path(kind).resolve().parent)
        runpy.run_path(kind, run_name="__main__")
