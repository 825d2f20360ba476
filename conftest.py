"""What comes before tests and doctests alike."""

import gc
import os
import sys
from pathlib import Path

import pytest

# What is imported and collected stays to the end. The garbage collector need not look at it again and
# again, which would be a tenth of the time of quick tests.
gc.disable()

# Two test processes on two cores; and tests fork, which OpenMP does not survive with several threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What commands print is compared without colours, whatever terminal or service the tests run in.
for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):
    os.environ.pop(name, None)

# Helpers assert too: a failure there shows its values, as one in a test does.
TESTS = Path(__file__).parent / "tests"
pytest.register_assert_rewrite(*(f"tests.{room.stem}" for room in TESTS.iterdir()))

import tests.oracles.torchvision_on_cpu  # noqa: E402, F401  (before transformers)
import torch  # noqa: E402

# torch.manual_seed notes for each kind of device that this build lacks from where it was called, as
# text: milliseconds under pytest, and two thirds of the time of the sweep over all ops.
for device in (torch.cuda, torch.xpu, torch.mtia):
    if not device._is_compiled():
        device.manual_seed_all = lambda seed: None

if sys.version_info < (3, 11):  # which FastAPI has left
    collect_ignore = ["src/dptorch/prediction/serving/app.py"]


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # what libraries look for at exit is found
