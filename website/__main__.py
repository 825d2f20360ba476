"""Build the site into build/site: ``python -m website``. It fails on any dead link."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from website.links import built_faults
from website.staging import ROOT, stage


def build(folder: Path) -> list[str]:
    """Write the pages below `folder` and the site to ``folder/site``; return what is wrong with it."""
    stage(folder)
    if find_spec("zensical") is None:
        return ["zensical is not installed: pip install 'dptorch[docs]', on Python 3.11 or newer"]
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run([*command, "-f", str(folder / "mkdocs.yml")], cwd=folder)
    if done.returncode:
        return ["zensical build --strict failed"]
    return list(built_faults(folder / "site"))


if __name__ == "__main__":
    faults = build(ROOT / "build" / "website")
    print("\n".join(faults) or f"Open {ROOT / 'build/website/site/index.html'}")
    sys.exit(bool(faults))
