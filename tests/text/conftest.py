"""Tiny pretrained models, and rows to train on."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.text.folders import WORDS, bert_folder, gpt2_folder, roberta_large_folder, write_jsonl


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return bert_folder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def roberta_large(tmp_path_factory: pytest.TempPathFactory) -> str:
    return roberta_large_folder(tmp_path_factory.mktemp("roberta-large"))


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return gpt2_folder(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture
def reviews(tmp_path: Path) -> str:
    """60 rows whose class is one of their words."""
    rows = [
        {"text": f"the film was {'very ' * (i % 3)}{'good' if i % 2 else 'bad'} " + "it " * (i // 6),
         "label": "pos" if i % 2 else "neg"}
        for i in range(60)
    ]  # fmt: skip
    return write_jsonl(tmp_path / "reviews.jsonl", rows)


@pytest.fixture
def tables(tmp_path: Path) -> str:
    rows = [
        {
            "text": [["film", "name", word], ["film", "area", "the"]],
            "target": f"{word} serves food in the area",
        }
        for word in WORDS[6:18] * 2
    ]
    return write_jsonl(tmp_path / "tables.jsonl", rows)
