"""``python -m tests.peers opacus=PATH ...``: run the peers that are given, and write the page.

What was found is kept in a JSON file as soon as it is known, so that peers can be run one at a time,
and a run that was ended can be gone on with. A peer of which nothing is kept has its part of the page
as it was. ``only=PATTERN`` runs the test files and examples in whose names the pattern is found, and
``only=PATTERN::EXPRESSION`` the tests that pytest's ``-k`` finds there.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.peers.data_files import write_all
from tests.peers.fastdp import FASTDP
from tests.peers.opacus import OPACUS
from tests.peers.page import render
from tests.peers.peer import Peer, run_peer
from tests.peers.private_transformers import PRIVATE_TRANSFORMERS
from tests.peers.private_vision import PRIVATE_VISION
from tests.peers.reasons import judge
from tests.peers.recorder import CASES
from tests.source import REPOSITORY

PEERS: dict[str, Peer] = {
    "opacus": OPACUS,
    "fastdp": FASTDP,
    "private-transformers": PRIVATE_TRANSFORMERS,
    "private-vision": PRIVATE_VISION,
}
PAGE = REPOSITORY / "docs" / "compatibility.md"
KEPT = REPOSITORY / "build" / "peers.json"
COMMAND = "make peers OPACUS=PATH FASTDP=PATH PRIVATE_TRANSFORMERS=PATH PRIVATE_VISION=PATH"


def version_of(checkout: Path) -> str:
    """Its commit, or what it is installed as."""
    done = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f"commit {done.stdout.strip()}" if done.returncode == 0 else "a checkout without history"


def main(arguments: list[str]) -> int:
    """Run what is given; returns the number of outcomes that nothing explains."""
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    KEPT.parent.mkdir(exist_ok=True)
    given = dict(argument.split("=", 1) for argument in arguments)
    only = given.pop("only", "")
    for name, path in given.items():
        if name not in PEERS:
            raise SystemExit(f"{name!r} is not known; expected NAME=PATH with one of {list(PEERS)}")
        if not path:
            continue
        peer, checkout = PEERS[name], Path(path).resolve()
        before = kept.get(name, {}) if only else {}
        found = kept[name] = (
            {"tests": {}, "examples": {}} | before | {"version": version_of(checkout)}
        )
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            data = work / "data"
            data.mkdir()
            for part, outcomes in run_peer(peer, checkout, work, write_all(data), only):
                found[part] |= outcomes
                KEPT.write_text(json.dumps(kept, indent=1))
    if "opacus" not in kept and importlib.util.find_spec("opacus"):
        print("opacus: give OPACUS=PATH; the installed package has its tests and no examples")
    verdicts_of = {}
    for name, peer in PEERS.items():
        if name in kept:
            parts = (kept[name]["tests"], kept[name]["examples"])
            verdicts_of[peer.name] = tuple(judge(part, peer.reasons) for part in parts)
    versions = {peer.name: kept[name]["version"] for name, peer in PEERS.items() if name in kept}
    names, before = [peer.name for peer in PEERS.values()], PAGE.read_text()
    PAGE.write_text(render(names, verdicts_of, versions, COMMAND, CASES, before))  # type: ignore[arg-type]
    left = [
        f"{peer}: {test}: {verdict.why}"
        for peer, parts in verdicts_of.items()
        for verdicts in parts
        for test, verdict in verdicts.items()
        if verdict.kind == "unexplained"
    ]
    print("\n".join(left), file=sys.stderr)
    print(f"{len(left)} unexplained; {PAGE.name} is written", file=sys.stderr)
    return len(left)


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
