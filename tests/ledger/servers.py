"""A private PostgreSQL on loopback for the tests, in a folder of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def binaries() -> Path | None:
    """The folder of the newest installed server's programs."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=_version)
    on_path = shutil.which("initdb")
    found = debian[-1] if debian else Path(on_path) if on_path else None
    return None if found is None else found.parent


def _version(initdb: Path) -> int:
    name = initdb.parent.parent.name
    return int(name) if name.isdigit() else 0


def in_memory() -> str | None:
    """A folder whose files are in memory, where the system has one with four gigabytes free.

    A ledger waits for the disk with every entry, some milliseconds, in which a test does nothing. Tests
    kill processes and no machines: what a process has written is there afterwards on either. All
    databases of the tests together are 700 MB.
    """
    folder = Path("/dev/shm")
    room = folder.is_dir() and os.access(folder, os.W_OK) and shutil.disk_usage(folder).free
    return str(folder) if room > 2**32 else None


class NoServer(Exception):
    """PostgreSQL cannot be started here."""


@contextmanager
def server() -> Iterator[str]:
    """The URL of a running, empty server.

    Raises:
        NoServer: with the reason.
    """
    programs = binaries()
    if programs is None:
        raise NoServer("PostgreSQL is not installed (apt-get install postgresql)")
    root = Path(tempfile.mkdtemp(prefix="dptorch-pg-", dir=in_memory()))
    try:
        become = _not_root(root)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        data = root / "data"

        def run(*command: object) -> None:
            done = subprocess.run(
                [*become, *map(str, command)], capture_output=True, text=True, cwd=root, check=False
            )
            if done.returncode:
                log = root / "log"
                tail = log.read_text()[-500:] if log.exists() else ""
                raise NoServer(f"{command[0]}: {done.stderr or done.stdout} {tail}")

        run(programs / "initdb", "-D", data, "-U", "tester", "-A", "trust", "-E", "UTF8")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={root}"
        pg_ctl = programs / "pg_ctl"
        run(pg_ctl, "-D", data, "-l", root / "log", "-w", "-o", options, "start")
        try:
            yield f"postgresql://tester@127.0.0.1:{port}/postgres"
        finally:
            run(pg_ctl, "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _not_root(folder: Path) -> list[str]:
    """What to put before a command: a PostgreSQL server refuses to run as root."""
    if os.geteuid() != 0:
        return []
    for name in ("postgres", "nobody"):
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        os.chown(folder, user.pw_uid, user.pw_gid)
        return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    raise NoServer("this is root, and there is no other user to run a server as")


def give_up(reason: str) -> None:
    """Skip on a developer's machine; fail where the tests must be complete."""
    if os.environ.get("CI"):
        pytest.fail(f"CI must test PostgreSQL, and has none: {reason}")
    pytest.skip(f"no PostgreSQL: {reason}")
