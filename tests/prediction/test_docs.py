"""The code in docs/prediction.md gives what the page says."""

import doctest

import torch
from tests.source import REPOSITORY


def test_the_page_runs():
    torch.manual_seed(0)
    page = REPOSITORY / "docs" / "prediction.md"
    result = doctest.testfile(str(page), module_relative=False)
    assert result.attempted > 5
    assert result.failed == 0
