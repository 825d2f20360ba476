"""What comes before tests and doctests alike."""

from pathlib import Path

import pytest

# Helpers assert too: a failure there shows its values, as one in a test does.
TESTS = Path(__file__).parent / "tests"
pytest.register_assert_rewrite(*(f"tests.{room.stem}" for room in TESTS.iterdir()))

import tests.oracles.torchvision_on_cpu  # noqa: E402, F401  (before transformers)
