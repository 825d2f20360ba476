"""Build wheel and sdist, and try each in an environment of its own: ``python -m tests.dist``.

The environment has the file and nothing else of this repository. It borrows the dependencies of the
environment that runs this, so that nothing is downloaded, and it has no compiler: the loops in C are
left to numpy and torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from tests.source import REPOSITORY

#: What a user's first steps need, the files beside the code included.
TRIAL = """
import pathlib, shutil, sys
import torch
import dptorch

assert not any(map(shutil.which, ("cc", "gcc", "clang")))
assert pathlib.Path(dptorch.__file__).is_relative_to(sys.prefix), dptorch.__file__
model = torch.nn.Linear(4, 2)
engine = dptorch.PrivacyEngine(
    model, batch_size=16, sample_size=64, steps=3, noise_multiplier=1.0, target_delta=1e-3
)
optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(0, 2, (64,)))
for x, y in engine.loader(data):
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
assert engine.exhausted
assert not list(pathlib.Path.home().rglob("*.so"))
root = pathlib.Path(dptorch.__file__).parent
lost = [name for name in FILES if not (root / name).exists()]
assert not lost, lost
"""


def data_files() -> list[str]:
    """Files of the package that are no Python code, relative to it."""
    package = REPOSITORY / "src" / "dptorch"
    found = (file.relative_to(package) for file in package.rglob("*") if file.is_file())
    return sorted(str(file) for file in found if file.suffix not in (".py", ".pyc"))


def build(folder: Path) -> list[Path]:
    """Write the wheel and the sdist into `folder`, from a copy of what they are made of."""
    source = folder / "source"
    shutil.copytree(REPOSITORY / "src", source / "src", ignore=lambda _, names: {*_caches(names)})
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    code = "import setuptools.build_meta as b; b.build_wheel('..'); b.build_sdist('..')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(source)
    return sorted(folder.glob("dptorch-*"))


def _caches(names: list[str]) -> list[str]:
    return [name for name in names if name == "__pycache__" or name.endswith(".egg-info")]


def tried(file: Path, folder: Path) -> str:
    """Install `file` into an empty environment in `folder`, use it, return what it prints."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = next(folder.glob("lib/python*/site-packages"))
    # After the environment's own packages: what is installed there is found first.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index"]
    subprocess.run(
        [*pip, "--no-deps", "--no-build-isolation", "--no-compile", str(file)], check=True
    )
    environment = {
        "PATH": str(folder / "bin"),  # no compiler is there
        "HOME": str(folder / "home"),  # and no loop that was compiled before
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    code = f"FILES = {data_files()!r}\n{TRIAL}"
    subprocess.run([str(python), "-c", code], check=True, env=environment, cwd=folder)
    command = [str(folder / "bin" / "dptorch"), "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return shown.stdout.strip()


if __name__ == "__main__":
    target = REPOSITORY / "dist"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for built in build(target):
        trial = REPOSITORY / "build" / "trial"
        shutil.rmtree(trial, ignore_errors=True)
        print(f"{built.name}: {tried(built, trial)}")
