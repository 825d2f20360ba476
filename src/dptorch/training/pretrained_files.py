"""Which files of a transformers folder make a trained model, and what of them is of this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

__all__ = ["without_places"]

_JSON: Final = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "model.safetensors.index.json",
    "vocab.json",
)
_TEXT: Final = ("vocab.txt", "merges.txt", "chat_template.jinja")
_PATHS: Final = frozenset({"base_model_name_or_path", "name_or_path", "_name_or_path"})


def without_places(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each file but the weights, without where the model lay on this machine.

    Files that are not listed here are left out.
    """
    for path in sorted(folder.iterdir()):
        if path.name in _TEXT:
            yield path.name, path.read_text(encoding="utf-8")
        elif path.name in _JSON:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            for key in _PATHS & values.keys():
                values[key] = Path(values[key] or "").name
            yield path.name, json.dumps(values, indent=2)
