"""The page on transformers and the example run as printed."""

from __future__ import annotations

import re
import runpy

import pytest

pytest.importorskip("trl")

from tests.integrations.transformers.setup import build, data, tokenizer
from tests.source import REPOSITORY


@pytest.mark.slow
def test_the_page_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (REPOSITORY / "docs" / "transformers.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    rows = data("bert", [5 + i % 4 for i in range(64)])
    scope = {"model": build("bert"), "tokenizer": tokenizer(), "dataset": rows}
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "transformers.md", "exec"), scope)
    assert scope["trainer"].engine.sampling_run == {"poisson": 6}
    assert scope["trainer"].get_privacy_spent().epsilon <= 8.0
    assert scope["by_user"].unit == "user"
    assert "differentially private" in capsys.readouterr().out


@pytest.mark.slow
def test_the_example_trains_adapters(tmp_path, capsys):
    main = runpy.run_path(str(REPOSITORY / "examples" / "sft_lora.py"))["main"]
    trainer = main(["--out", str(tmp_path), "--epochs", "1"])
    assert trainer.engine.sampling_run == {"poisson": 6}
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert 7.9 < trainer.get_privacy_spent().epsilon <= 8.0
    assert str(trainer.privacy_statement()) in capsys.readouterr().out
