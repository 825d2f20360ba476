"""A real browser for tests of pages."""

from __future__ import annotations

import os
import shutil

import pytest

__all__ = ["browser"]


def browser() -> str:
    """A headless Chromium. Where there is none a laptop skips; continuous integration may not."""
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if found := shutil.which(name):
            return found
    message = "no Chromium on this machine: apt-get install chromium"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)
