"""Tasks on texts, from rows to a run: steps, methods, kill and resume, pages, bad input."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from transformers import RobertaConfig, RobertaForMaskedLM

from dptorch.errors import ConfigurationError, DataError
from dptorch.text import job as job_module
from dptorch.text import language, load_run
from dptorch.text.classification import logits_of, tokenize_rows
from dptorch.text.job import TextJob, prepare
from dptorch.text.language import tokenize_pairs, tokenize_texts
from dptorch.text.methods import METHODS
from dptorch.text.recipes import RECIPES, defaults_of
from dptorch.text.rows import Split
from dptorch.training import run_folder
from dptorch.training.loop import Silent, train
from dptorch.training.run_folder import RunFolder
from tests.oracles.loop import norms_of, one_example_loop, relative_error
from tests.text.folders import ROBERTA_LARGE, tokenizer, write_jsonl

C = 0.05
FAST: dict[str, Any] = {"epochs": 1, "sample_rate": 0.5, "noise_multiplier": 1.0, "seed": 0}


def released(job: TextJob, rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of a step without noise over a few rows, and the clipped sum of a loop over them."""
    setup = prepare(job)
    collate = setup.task.collate
    assert collate is not None
    batch = collate([setup.data.train[i] for i in range(rows)])
    names = list(batch)

    def loss_of(model: torch.nn.Module, *values: torch.Tensor) -> torch.Tensor:
        loss, _ = setup.task.loss(model, dict(zip(names, values, strict=True)), setup.device)
        return loss[None]

    setup.engine.detach()
    setup.model.double()
    truth = one_example_loop(setup.model, tuple(batch.values()), loss_of)
    norms = norms_of(truth)
    coefficients = (C / norms).clamp(max=1)
    expected = {n: torch.tensordot(coefficients, g, 1) / rows for n, g in truth.items()}
    engine = type(setup.engine)(
        setup.model, sample_rate=1.0, sample_size=rows, steps=1, noise_multiplier=0.0,
        target_delta=1e-3, max_grad_norm=C, seed=0,
    )  # fmt: skip
    parameters = [p for p in setup.model.parameters() if p.requires_grad]
    optimizer = engine.attach(torch.optim.SGD(parameters, lr=0.0))
    some: Any = torch.utils.data.Subset(setup.data.train, range(rows))
    for part in engine.loader(some, collate_fn=collate, max_physical_batch_size=3):
        setup.task.loss(setup.model, part, setup.device)[0].backward()
        optimizer.step()
        if engine.steps_done:
            break
        optimizer.zero_grad()
    found = {n: p.grad for n, p in setup.model.named_parameters() if p.requires_grad}
    flat = [torch.cat([each[n].double().flatten() for n in expected]) for each in (found, expected)]
    return flat[0], flat[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
@pytest.mark.parametrize(
    ("task", "method"),
    [
        *product(["text-classification", "table-to-text"], METHODS),
        *product(["prompt", "pooled"], ["full", "lora", "prefix"]),
        ("pooled", "bias-only"),
    ],
)
def test_a_step_is_the_clipped_sum_over_single_examples(
    task: str, method: str, bert: str, gpt2: str, reviews: str, tables: str
) -> None:
    if task == "table-to-text":
        job = TextJob(task, data=tables, model=gpt2, method=method, **FAST)
    else:
        prompted = {"template": "{text} it was {mask} .", "label_words": "bad,good"}
        more = {"prompt": prompted, "pooled": {"pool": "mean"}}.get(task, {})
        job = TextJob(
            "text-classification", data=reviews, model=bert, method=method, **FAST, **more
        )
    found, expected = released(job)
    assert len(expected) > 0
    assert expected.norm() > 0
    assert relative_error(found, expected) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "share"),
    [("full", 1.0), ("last-layer", 0.1), ("bias-only", 0.2), ("ffa-lora", 0.5), ("prefix", 0.3)],
)
def test_a_method_trains_what_it_says(method: str, share: float, bert: str, reviews: str) -> None:
    setup = prepare(
        TextJob("text-classification", data=reviews, model=bert, method=method, lora_rank=2, **FAST)
    )
    trainable = {n for n, p in setup.model.named_parameters() if p.requires_grad}
    every = sum(p.numel() for p in setup.model.parameters())
    found = sum(p.numel() for p in setup.model.parameters() if p.requires_grad)
    assert 0 < found <= share * every
    assert any("classifier" in name for name in trainable)
    if method == "ffa-lora":
        assert not any("lora_A" in name for name in trainable)
        assert any("lora_B" in name for name in trainable)


@pytest.mark.slow
def test_a_head_moves_first(bert: str, reviews: str) -> None:
    """Half of the steps: then the rest begins, at the rate that the schedule has come to."""
    job = TextJob(
        "text-classification", data=reviews, model=bert, method="bias-only", pool="mean",
        head_first=0.5, learning_rate=0.1, head_learning_rate=0.2, **(FAST | {"epochs": 2}),
    )  # fmt: skip
    setup = prepare(job)
    assert setup.engine.plan.steps == 4
    assert not any(p.any() for p in setup.model.head.parameters())
    rates = []
    for step in range(4):
        setup.task.before_step(setup.optimizer, step)
        rates.append([group["lr"] for group in setup.optimizer.param_groups])
    assert rates == [[0.0, 0.2], [0.0, pytest.approx(0.15)], [0.05, 0.1], [0.025, 0.05]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
def test_a_head_that_moves_alone_has_the_whole_norm(bert: str, reviews: str) -> None:
    """Before the body moves, a record is clipped by the head's gradient, not by that of both."""
    job = TextJob(
        "text-classification", data=reviews, model=bert, method="bias-only", pool="mean",
        head_first=0.5, learning_rate=0.1, **(FAST | {"sample_rate": 1.0, "epochs": 4}),
        max_physical_batch_size=60, max_grad_norm=1e-3,
    )  # fmt: skip
    setup = prepare(replace(job, noise_multiplier=1e-9))
    torch.nn.init.normal_(setup.model.head.weight)  # as after some steps: the body has a gradient
    loader = setup.engine.loader(
        setup.data.train, collate_fn=setup.task.collate, max_physical_batch_size=60
    )
    heads = {id(p) for p in setup.model.head.parameters()}
    body = [p for p in setup.model.parameters() if p.requires_grad and id(p) not in heads]
    steps = []
    for _ in range(4):
        for batch in loader:
            setup.task.loss(setup.model, batch, setup.device)[0].backward()
            setup.optimizer.step()
            norms = [torch.cat([p.grad.flatten() for p in ps]).norm().item()
                     for ps in (list(setup.model.head.parameters()), body)]  # fmt: skip
            steps.append((norms, setup.engine.diagnostics.mean_norm))
            setup.optimizer.zero_grad()
    assert [body > 1e-9 for (_, body), _ in steps] == [False, False, True, True]
    # The broken twin: a body that moves along leaves the head a part of the norm.
    assert steps[2][0][0] < 0.9 * steps[1][0][0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
@pytest.mark.parametrize("method", ["bias-only", "lora"])
def test_a_step_in_bf16_is_clipped_and_near_to_that_in_float32(
    method: str, bert: str, reviews: str
) -> None:
    """Norms and sums are taken in float32 of what the products gave: no record exceeds C."""

    def gradients(precision: str, rows: int) -> torch.Tensor:
        job = TextJob(
            "text-classification", data=reviews, model=bert, method=method, pool="mean",
            precision=precision, max_grad_norm=C,
            **(FAST | {"noise_multiplier": 0.0, "target_delta": 1e-3}),
        )  # fmt: skip
        setup = prepare(job)
        torch.manual_seed(0)
        torch.nn.init.normal_(setup.model.head.weight)
        setup.engine.detach()
        engine = type(setup.engine)(
            setup.model, sample_rate=1.0, sample_size=rows, steps=1, noise_multiplier=0.0,
            target_delta=1e-3, max_grad_norm=C, seed=0,
        )  # fmt: skip
        parameters = [p for p in setup.model.parameters() if p.requires_grad]
        optimizer = engine.attach(torch.optim.SGD(parameters, lr=0.0))
        some: Any = torch.utils.data.Subset(setup.data.train, range(rows))
        for part in engine.loader(some, collate_fn=setup.task.collate):
            setup.task.loss(setup.model, part, setup.device)[0].backward()
            optimizer.step()
            break
        assert all(p.dtype == torch.float32 for p in parameters)
        return torch.cat([p.grad.flatten() for p in parameters])

    one = gradients("bf16", 1).norm().item()
    assert 0.9 * C < one <= C * (1 + 1e-5)
    wide, narrow = gradients("float32", 6), gradients("bf16", 6)
    assert 1e-4 < relative_error(narrow, wide) < 0.05  # it did compute in bfloat16


@pytest.mark.slow
def test_parts_of_a_draw_hold_texts_of_like_length(bert: str, reviews: str) -> None:
    """Except where a record's place decides its steps."""
    job = TextJob("text-classification", data=reviews, model=bert, method="lora", **FAST)

    def lengths(job: TextJob) -> list[int]:
        return [len(row["input_ids"]) for row in prepare(job).data.train.rows]

    found = lengths(job)
    assert found == sorted(found)
    kept = lengths(replace(job, sampling="random-allocation", sample_rate=0.5))
    assert kept != sorted(kept)
    assert sorted(kept) == found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
def test_without_privacy_a_step_is_the_same_in_all_parts(
    gpt2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every example counts the same in a run to compare with too, however long those beside it are."""
    data = write_jsonl(tmp_path / "t.jsonl", [{"text": "film " * n + "good"} for n in range(1, 25)])
    job = TextJob(
        "language-model", data=data, model=gpt2, method="full", clipping_mode="non-private", **FAST
    )

    def gradient(rows: int) -> torch.Tensor:
        setup = prepare(job)
        loader = setup.engine.loader(
            setup.data.train, collate_fn=setup.task.collate, max_physical_batch_size=rows
        )
        for part in loader:
            setup.task.loss(setup.model, part, setup.device)[0].backward()
            setup.optimizer.step()
            if setup.engine.steps_done:
                break
            setup.optimizer.zero_grad()
        parameters = setup.model.parameters()
        return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])

    assert relative_error(gradient(2), gradient(24)) < 1e-5

    def over_tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels)

    monkeypatch.setattr(language, "mean_of_means", over_tokens)  # the broken twin
    assert relative_error(gradient(2), gradient(24)) > 1e-3


class Kill(Silent):
    def stepped(self, step: int, train_loss: float) -> None:
        if step == 5:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
@pytest.mark.parametrize(
    "model", [{"method": "lora"}, {"method": "bias-only", "pool": "mean", "head_first": 0.25}]
)
def test_a_killed_run_goes_on_to_the_same_end(
    model: dict[str, Any], bert: str, reviews: str, tmp_path: Path
) -> None:
    settings = FAST | {"epochs": 4, "learning_rate": 1e-2, **model}
    job = TextJob("text-classification", data=reviews, model=bert, **settings)
    whole = run_folder.create(tmp_path / "runs", "whole")
    train(prepare(job), whole)
    cut = run_folder.create(tmp_path / "runs", "cut")
    with pytest.raises(KeyboardInterrupt):
        train(prepare(job), cut, observer=Kill())
    outcome = train(prepare(job), cut, resume=True)
    assert outcome.last["step"] == 8
    outputs = []
    for folder in (whole, cut):
        model, words = load_run(folder.path)
        with torch.no_grad():
            outputs.append(logits_of(model(**words(["the film was good"], return_tensors="pt"))))
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    pretrained = prepare(job).model.eval()
    before = logits_of(pretrained(**words(["the film was good"], return_tensors="pt")))
    assert (before != outputs[0]).any()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
@pytest.mark.usefixtures("drawn")
def test_a_run_of_tables_has_scores_samples_and_a_page(
    gpt2: str, tables: str, tmp_path: Path
) -> None:
    job = TextJob(
        "table-to-text", data=tables, model=gpt2, method="full", generate=3, new_tokens=6, **FAST
    )
    folder = run_folder.create(tmp_path / "runs", "tables")
    outcome = train(prepare(job), folder)
    assert outcome.last["test_perplexity"] > 1
    about = folder.read_json("run.json")
    assert {"BLEU", "ROUGE-L"} <= set(about["scores"])
    assert about["samples"][0]["reference"].endswith("in the area")
    page = (folder.path / "report.html").read_text()
    for wanted in ("Test perplexity", "ROUGE-L", about["samples"][0]["prompt"], "load_run"):
        assert wanted in page
    model, words = load_run(folder.path)
    assert not model.training
    assert words.pad_token_id == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "no/such/folder"}, "cannot be loaded"),
        ({"data": "nowhere.csv"}, "does not exist"),
        ({"label": "class"}, "no column 'class'. Found text, label"),
        ({"method": "lorra"}, "Did you mean 'lora'"),
        ({"template": "{text} {mask}"}, "belong together"),
        ({"template": "{text} .", "label_words": "bad,good"}, "once each"),
        ({"template": "{text} {mask}", "label_words": "bad"}, "there are 2 classes: neg, pos"),
        ({"template": "{text} {mask}", "label_words": "bad,awful"}, "'awful'"),
        ({"template": "{pair} {text} {mask}", "label_words": "bad,good"}, "Give --pair"),
        ({"batch_size": 1e6, "sample_rate": None}, "expected between 1 and the"),
        ({"recipe": "e2e"}, "is one of table-to-text"),
        ({"decay": "cosin"}, "Did you mean 'cosine'"),
        ({"pool": "max"}, "Valid: 'model', 'mean'"),
        ({"precision": "fp16"}, "Valid: 'float32', 'bf16'"),
        (
            {"pool": "mean", "template": "{text} {mask}", "label_words": "bad,good"},
            "is for a new head",
        ),
        ({"head_first": 1.0}, r"a share of the steps in \[0, 1\)"),
        ({"max_length": -1}, "expected a positive number"),
    ],
)
def test_bad_input_is_named_before_anything_is_spent(
    change: dict[str, Any], message: str, bert: str, reviews: str
) -> None:
    settings = {"data": reviews, "model": bert, **FAST, **change}
    with pytest.raises((ConfigurationError, DataError), match=message):
        prepare(TextJob("text-classification", **settings))


@pytest.mark.slow
def test_a_tokenizer_that_does_not_fit_is_refused(gpt2: str, tables: str, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1, n_positions=8)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer(bert=False).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="25 tokens, but the model knows 9"):
        prepare(TextJob("table-to-text", data=tables, model=str(tmp_path), **FAST))


@pytest.mark.slow
def test_a_tokenizer_without_padding_and_end_is_refused(
    gpt2: str, tables: str, tmp_path: Path
) -> None:
    """With a token for the end it pads with that one."""
    words = tokenizer(bert=False)
    words.pad_token = None
    shutil.copytree(gpt2, tmp_path, dirs_exist_ok=True)
    words.save_pretrained(tmp_path)
    setup = prepare(TextJob("table-to-text", data=tables, model=str(tmp_path), **FAST))
    assert setup.task.tokenizer.pad_token == "</s>"  # type: ignore[attr-defined]
    words.eos_token = None
    words.save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="neither a token for padding nor one for the end"):
        prepare(TextJob("table-to-text", data=tables, model=str(tmp_path), **FAST))


def test_rows_in_which_nothing_counts_are_named() -> None:
    """A row of a task has a label that counts, however long what comes before it is."""
    words = tokenizer(bert=True)
    with pytest.raises(DataError, match="row 1 has no word to predict"):
        tokenize_texts(["good film", "good"], words, 8)
    with pytest.raises(DataError, match="row 0 has no word to predict"):
        tokenize_pairs(["film"], [" "], words, 8)
    (row,) = tokenize_pairs(["film " * 40], ["good bad"], words, 8)
    assert row["labels"][-2:] == words("good bad", add_special_tokens=False)["input_ids"]
    assert len(row["labels"]) == len(row["input_ids"]) == 8
    with pytest.raises(DataError, match="row 1 has no tokens"):
        tokenize_rows([("good",), ("",)], [0, 1], tokenizer(bert=False), 8)


def test_a_run_of_another_kind_is_not_loaded(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json("run.json", {"job": {}})
    with pytest.raises(DataError, match="no run of a task on texts"):
        load_run(tmp_path)


def on_rows_of_its_columns(name: str, model: str, folder: Path, **settings: Any) -> TextJob:
    """A recipe's job; its own model and rows are downloads, and these are small ones of their form."""
    recipe = RECIPES[name]
    named = {"text": "text", **recipe.settings}
    columns = [named[c] for c in ("text", "pair", "target") if named.get(c)]
    classes = len((recipe.settings.get("label_words") or "x,y").split(","))
    rows = [
        {c: f"film {i} {c}" for c in columns} | {"label": i % classes, "n": str(i)}
        for i in range(24)
    ]
    words = ",".join(["bad", "good", "not"][:classes])
    return TextJob(
        recipe.task,
        recipe=name,
        data=write_jsonl(folder / "rows.jsonl", rows),
        model=model,
        label_words=words if "label_words" in recipe.settings else None,
        template=recipe.settings.get("template"),
        **settings,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_prepares_on_rows_of_its_columns(
    name: str, bert: str, roberta_large: str, gpt2: str, tmp_path: Path
) -> None:
    recipe = RECIPES[name]
    model = bert if name == "reviews" else gpt2
    if recipe.settings["model"] == "roberta-base":
        model = roberta_large
    setup = prepare(on_rows_of_its_columns(name, model, tmp_path, batch_size=4))
    plan = setup.engine.plan
    assert plan.epsilon() <= recipe.settings.get("target_epsilon", 3.0)
    assert plan.max_grad_norm == recipe.settings.get("max_grad_norm", 1.0)
    assert setup.optimizer.param_groups[0]["lr"] == recipe.settings["learning_rate"]
    per_epoch = len(setup.data.train) / 4  # type: ignore[arg-type]
    assert plan.steps == pytest.approx(recipe.settings["epochs"] * per_epoch, abs=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
def test_what_a_recipe_owes_to_its_own_data_is_in_the_statement(
    bert: str, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.loads(line) for line in Path(reviews).read_text().splitlines()]
    monkeypatch.setattr(job_module, "movie_reviews", lambda: Split(rows[10:], rows[:10], "reviews"))
    job = TextJob("text-classification", recipe="reviews", model=bert, batch_size=25, epochs=1)
    folder = run_folder.create(tmp_path / "runs", "reviews")
    train(prepare(job), folder)
    said = "must be less than 0.005 was seen in an earlier run on these reviews"
    assert said in (folder.path / "statement.txt").read_text()
    # On other rows that look was at other people's texts.
    assert prepare(replace(job, data=reviews)).notes == ()


@pytest.mark.slow
def test_roberta_large_trains_by_a_recipe(roberta_large: str, tmp_path: Path) -> None:
    """Its 24 layers, narrow: every parameter takes part, and the budget is kept."""
    job = on_rows_of_its_columns("mnli", roberta_large, tmp_path, batch_size=10, epochs=1)
    setup = prepare(job)
    names = {n for n, p in setup.model.named_parameters() if p.requires_grad}
    with torch.device("meta"):
        published = RobertaForMaskedLM(RobertaConfig(**ROBERTA_LARGE, hidden_size=1024))
    assert {n.split("model.", 1)[-1] for n in names} == {n for n, _ in published.named_parameters()}
    folder = run_folder.create(tmp_path / "runs", "mnli")
    outcome = train(setup, folder)
    assert outcome.last["step"] == setup.engine.plan.steps >= 2
    assert 2.9 < outcome.last["epsilon"] <= 3.0
    model, _ = load_run(folder.path)
    before = RobertaForMaskedLM.from_pretrained(roberta_large).state_dict()
    after = {n.split("model.", 1)[-1]: t for n, t in model.state_dict().items()}
    assert {n for n, t in before.items() if torch.equal(t, after[n])} == set()


def test_a_recipe_changes_with_the_method() -> None:
    recipe = RECIPES["e2e"]
    full, biases = defaults_of(recipe, None), defaults_of(recipe, "bias-only")
    assert (full["learning_rate"], full["batch_size"], full["sample_rate"]) == (2e-3, 1024.0, None)
    assert biases["learning_rate"] == 1e-2
    assert defaults_of(None, "prefix")["learning_rate"] == 1e-2


@pytest.mark.slow
def test_a_model_of_a_run_without_privacy_on_the_same_data_is_refused(
    bert: str, reviews: str, tmp_path: Path
) -> None:
    """Its `model/` is a folder like that of any pretrained model, which would count as public."""
    job = TextJob(
        "text-classification", data=reviews, model=bert, method="last-layer", epochs=1, sample_rate=0.5,
        noise_multiplier=1.0,
    )  # fmt: skip
    plain = run_folder.create(tmp_path / "runs", "plain")
    with pytest.warns(UserWarning, match="neither clipped nor noised"):
        train(prepare(replace(job, clipping_mode="non-private")), plain)
    begun = replace(job, model=str(plain.path / "model"))
    with pytest.raises(ConfigurationError, match="was trained without privacy"):
        prepare(begun)
    shutil.copy(
        reviews, tmp_path / "other.jsonl"
    )  # what nobody says is the same is not known to be
    note = prepare(replace(begun, data=str(tmp_path / "other.jsonl"))).notes[0]
    assert "the run plain" in note
    assert "That data counts as public" in note
    assert prepare(job).notes == ()
