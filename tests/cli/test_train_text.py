"""Tasks on texts as a user types them."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")

from tests.cli.commands import refused, run
from tests.source import REPOSITORY
from tests.text.folders import gpt2_folder

from dptorch.cli import text_options
from dptorch.text.job import TextJob

NOTES = ("train", "language-model", "--data", "notes.jsonl", "--method", "lora")


@pytest.fixture
def notes() -> Path:
    """32 rows beside a tiny model; the commands run in an empty folder."""
    path = Path("notes.jsonl")
    words = ["good", "bad", "very", "not"]
    rows = [{"text": f"the film was {words[i % 4]} " + "it was " * (i % 5 + 1)} for i in range(32)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    gpt2_folder(Path("tiny"))
    return path


def test_options_are_the_fields_of_a_job() -> None:
    groups = (
        text_options.TextDataOptions,
        text_options.ClassOptions,
        text_options.TextModelOptions,
        text_options.TextTrainingOptions,
        text_options.GenerationOptions,
        text_options.TextPrivacyOptions,
    )
    names = [f.name for group in groups for f in fields(group)]
    assert len(names) == len(set(names))
    of_commands = {"task", "diagnostics", "test_name", "target", "generate", "prompts"}
    assert {*names, *of_commands} == {f.name for f in fields(TextJob)}


@pytest.mark.slow
def test_notes_from_rows_to_texts_and_a_release(notes: Path) -> None:
    quick = ("--epochs", "1", "--sample-rate", "0.5", "--epsilon", "8", "--new-tokens", "5")
    done = run(*NOTES, "--model", "tiny", *quick)
    assert done.exit_code == 0, done.output
    assert "test perplexity" in done.output.splitlines()[-1]
    assert "epsilon" in done.output.splitlines()[-1]
    assert "Generate: dptorch generate runs/notes-1" in done.output
    assert "Warning" not in done.output
    about = json.loads(Path("runs/notes-1/run.json").read_text())
    assert about["job"]["target_epsilon"] == 8
    assert len(about["samples"]) == 3
    assert Path("runs/notes-1/model/adapter_model.safetensors").exists()

    written = run(
        "generate", "runs/notes-1", "--prompt", "the film", "--greedy", "--new-tokens", "3"
    )
    assert written.exit_code == 0, written.output
    assert written.output.startswith("the film")

    page = (REPOSITORY / "docs" / "tasks.md").read_text()
    scope: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "tasks.md", "exec"), scope)
    assert scope["model"].config.model_type == "gpt2"
    assert scope["tokenizer"].pad_token == "[PAD]"

    released = run("release", "runs/notes-1", "published")
    assert released.exit_code == 0, released.output
    names = {p.name for p in Path("published/model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    everything = "".join(
        p.read_text(errors="ignore") for p in Path("published").rglob("*") if p.is_file()
    )
    assert str(Path.cwd()) not in everything
    assert "samples" not in everything
    assert "not_private" not in (Path("published/metrics.csv")).read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--epochs", "2", "language-model"), "after it: dptorch train language-model"),
        (("train", "language-model", "--model", "tiny"), "--data is missing"),
        (NOTES, "--model is missing"),
        ((*NOTES, "--model", "tiny", "--text", "body"), "no column 'body'. Found text"),
        ((*NOTES, "--model", "tiny", "--prompts", "no.txt"), "no.txt cannot be read"),
        ((*NOTES, "--model", "tiny", "--recipe", "sst2"), "one of text-classification"),
        ((*NOTES, "--model", "tiny", "--head-learning-rate", "1"), "No such option"),
        (("generate", "notes.jsonl"), "cannot be read"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(
    notes: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run(*arguments)
    if "No such option" in message:
        assert result.exit_code == 2
        assert message in result.stderr
    else:
        assert message in refused(result)
    assert not Path("runs").exists()
