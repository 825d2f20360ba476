"""Fixtures for every test."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Helpers assert too: a failure there shows its values, as one in a test does.
pytest.register_assert_rewrite(*(f"tests.{room.name}" for room in Path(__file__).parent.iterdir()))


@pytest.fixture
def float64() -> Iterator[None]:
    """Make float64 torch's default for the test, and its generator start at zero."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
