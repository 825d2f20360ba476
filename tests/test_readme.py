"""The README's Python runs as printed, and the package keeps its promises about imports."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from dptorch.errors import PrivacyError

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_quick_start_runs_as_printed(capsys) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    torch.manual_seed(0)
    size = 4000
    scope = {
        "model": torch.nn.Linear(4, 2),
        "dataset": torch.utils.data.TensorDataset(
            torch.randn(size, 4), torch.randint(0, 2, (size,))
        ),
    }
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert scope["engine"].exhausted
    assert "differentially private" in capsys.readouterr().out


def test_the_clipping_page_runs_as_printed(capsys) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/clipping.md").read_text(), re.DOTALL)
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "clipping.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert "BK-MixOpt" in printed
    assert "0.weight" in printed
    assert printed.split()[-1].startswith("1.118")


@pytest.mark.slow
def test_the_noise_page_runs_as_printed(capsys) -> None:
    page = (ROOT / "docs/noise.md").read_text()
    scope: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "noise.md", "exec"), scope)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("True")
    assert printed[1] == "sequential 16"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
def test_the_guides_run_as_printed(capsys) -> None:
    page = (ROOT / "docs/guides.md").read_text()
    scope: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "guides.md", "exec"), scope)
    assert scope["report"].ok
    assert scope["privacy_engine"].steps == 4
    scope["model"][0].weight.requires_grad_(True)

    def step() -> None:
        x, y = scope["dataset"][:4]
        torch.nn.functional.cross_entropy(scope["model"](x), y).backward()
        scope["optimizer"].step()

    with pytest.raises(PrivacyError, match="trainable"):  # as the page says
        step()


def test_papers_in_the_citation_are_those_on_the_page() -> None:
    page = (ROOT / "docs/references.md").read_text()
    methods = re.findall(r"\d{4}, \*(.*?)\*, \[([\d.]+)\]\(https://arxiv.org/abs/\2\)", page)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    found = [(r["title"], r["identifiers"][0]["value"].removeprefix("arXiv:")) for r in cited]
    assert len(found) >= 12
    assert methods == found


@pytest.mark.slow
def test_importing_loads_torch_when_it_is_needed() -> None:
    code = (
        "import sys, dptorch; assert 'torch' not in sys.modules; dptorch.tape.public_number\n"
        "assert 'torch' in sys.modules; assert set(dptorch.__all__) <= set(dir(dptorch))\n"
        "for name in dptorch.__all__: assert getattr(dptorch, name), name\n"
        "print(hasattr(dptorch, 'no_such_name'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.slow
def test_importing_loads_little_and_no_optional_package() -> None:
    """What is loaded is counted: how long it takes depends on the machine."""
    code = (
        "import torch, numpy, sys; before = set(sys.modules);"
        "import dptorch; [getattr(dptorch, n) for n in dptorch.__all__ if n != 'load'];"
        "print(' '.join(set(sys.modules) - before))"
    )
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    packages = {module.split(".")[0] for module in modules} - sys.stdlib_module_names
    assert packages <= {"dptorch", "numpy", "cryptography", "_openssl", "_cffi_backend"}
    rooms = {module.split(".")[1] for module in modules if module.startswith("dptorch.")}
    assert not rooms & {"audit", "bench", "blogs", "cli", "compat", "integrations", "training"}
    assert len(modules) < 220
