"""The statement in every form, against the schemas of those who ask for it."""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from tests.training.json_schema import faults
from typer.testing import CliRunner

import dptorch
from dptorch.cli.app import app
from dptorch.errors import DataError
from dptorch.ledger import Cap, open_ledger
from dptorch.randomness import KeySource
from dptorch.sampling.schemes import OWN_LOADER
from dptorch.statement import make_statement
from dptorch.training import run_folder
from dptorch.training.claims import FORMATS, claim, for_machines
from dptorch.training.job import Job, prepare
from dptorch.training.loop import train
from dptorch.training.release import release
from dptorch.training.run_folder import RunFolder

yaml = pytest.importorskip("yaml")
SCHEMA: dict[str, Any] = json.loads(
    resources.files("dptorch").joinpath("statement.schema.json").read_text("utf-8")
)
TEXT: dict[str, Any] = {"type": "string"}
TEXTS = {"type": "array", "items": TEXT, "minItems": 1}


def closed(required: str, **properties: Any) -> dict[str, Any]:
    """An object without further properties."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required.split(),
        "properties": properties,
    }


#: Names, types and choices of schemas/deployments-schema.yaml in opendp/deployments-registry-data, at
#: 3e9c812 (2026).
REGISTRY = closed(
    "url_slug status tier deployment",
    url_slug=TEXT,
    status={
        "enum": ["Converted", "Draft", "Pending", "Changes Required", "Approved",
                 "Approved (Update Requested)", "Approved (Pending)"]
    },
    tier={"type": "integer", "enum": [1, 2, 3]},
    deployment=closed(
        "basic",
        basic=closed(
            "name data_curators description intended_use data_product_type data_product_region "
            "publication_date",
            name=TEXT,
            data_curators=TEXTS,
            intended_use=TEXT,
            data_product_type={
                "enum": ["Summary statistics", "Machine learning model", "Dataset",
                         "Synthetic data", "Interactive API", "SQL queries"]
            },
            data_product_region=TEXT,
            description=TEXT,
            publication_date={"type": "string", "format": "date"},
            data_product_sector=TEXT,
        ),
        dp_variant=closed(
            "",
            variant_name={
                "enum": ["Pure DP", "Approximate DP", "Zero-concentrated DP", "Renyi DP", "Custom"]
            },
            data_domain=TEXT,
            unprotected_quantities=TEXT,
        ),
        privacy_loss=closed(
            "",
            privacy_unit=TEXT,
            privacy_unit_details=TEXT,
            privacy_parameters=closed(
                "",
                epsilon={"type": "number"},
                delta={"type": ["number", "string"]},
                rho={"type": "number"},
            ),
            privacy_parameters_details={},
        ),
        deployment_model=closed(
            "",
            model_name={"enum": ["Local", "Central", "Shuffle", "Federated", "Varies"]},
            model_name_details=TEXT,
            actors=TEXT,
            release_type={"enum": ["One release", "Many releases"]},
            release_type_details=TEXT,
            data_source_type={"enum": ["Static", "Dynamic"]},
            data_source_type_details={},
            access_type={"enum": ["Interactive", "Non-interactive"]},
            access_type_details=TEXT,
        ),
        accounting=closed("", post_processing=TEXT, composition=TEXT),
        implementation=closed(
            "",
            preprocessing_and_hyperparameter_tuning=TEXT,
            mechanisms=TEXT,
            justification=TEXT,
        ),
        administrative=closed("registry_authors", sources=TEXT, notes=TEXT, registry_authors=TEXTS),
    ),
)  # fmt: skip


@pytest.fixture
def private(job: Job, tmp_path: Path) -> RunFolder:
    """A run without a seed."""
    folder = run_folder.create(tmp_path / "runs", "small")
    setup = prepare(replace(job, seed=None, epochs=1))
    train(replace(setup, notes=("settings were chosen on other images.",)), folder)
    return folder


@pytest.mark.slow
def test_every_form_of_a_run_and_its_release(private: RunFolder, tmp_path: Path) -> None:
    shared = release(private, tmp_path / "shared")
    for folder in (private, shared):
        values = json.loads((folder.path / "statement.json").read_text())
        assert list(faults(values, SCHEMA)) == []
        assert json.loads(claim(folder, "json")) == values
        assert claim(folder) == (folder.path / "statement.txt").read_text()
        assert list(faults(yaml.safe_load(claim(folder, "registry")), REGISTRY)) == []
    card = claim(private, "model-card")
    entry = yaml.safe_load(claim(private, "registry"))["deployment"]
    for word in values["in_words"]:
        assert word in card
        assert word in claim(private)
        assert word in entry["privacy_loss"]["privacy_parameters_details"]
    assert "NOTE: settings were chosen on other images." in claim(private)
    (note,) = values["notes"]
    for item in (*values["assumed"], *values["not_covered"], f"S{note[1:]}"):
        assert item in card
        assert item in json.dumps(entry, ensure_ascii=False)
    assert entry["privacy_loss"]["privacy_parameters"]["epsilon"] == values["epsilon"]
    assert "class: 0" in card
    assert "class: 0" not in claim(shared, "model-card")
    for form in FORMATS:
        done = CliRunner().invoke(app, ["statement", str(private.path), "--format", form])
        assert (done.exit_code, done.stdout) == (0, claim(private, form))
    done = CliRunner().invoke(app, ["statement", str(private.path), "--format", "yml"])
    assert "model-card" in done.stderr


@pytest.mark.slow
def test_what_all_runs_on_the_data_cost_is_said_beside_what_this_one_did(
    job: Job, tmp_path: Path
) -> None:
    account = open_ledger(tmp_path / "ledger.db", create=True).dataset("blobs")
    for name in ("first", "second"):
        setup = prepare(replace(job, seed=None, epochs=1))
        setup.engine.use_ledger(account)
        train(setup, run_folder.create(tmp_path / "runs", name))
    run = tmp_path / "runs" / "first"

    def ask(*options: str) -> Any:
        return CliRunner().invoke(app, ["statement", str(run), *options])

    own = json.loads((run / "statement.json").read_text())["epsilon"]
    total = account.total()
    text = f"All 2 runs on this data in its ledger: epsilon {math.ceil(total.adaptive * 1e4) / 1e4}"
    assert total.adaptive > own
    assert ask().stdout.startswith((run / "statement.txt").read_text())
    for form in ("text", "model-card", "registry"):
        assert text in ask("--format", form).stdout
    assert "No cap is set: later runs may add to it." in ask().stdout
    account.set_cap(Cap(epsilon=50.0, delta=total.delta))
    assert f"Later runs may raise it to 50 at delta {total.delta:g}, the cap." in ask().stdout
    assert list(faults(yaml.safe_load(ask("--format", "registry").stdout), REGISTRY)) == []
    values = json.loads(ask("--format", "json").stdout)
    assert list(faults(values, SCHEMA)) == []
    assert values["epsilon"] == own
    assert values["all_runs"]["epsilon"] == total.adaptive
    # A recipient of the release has no ledger, and may not be told what it was.
    shared = release(RunFolder(run), tmp_path / "shared")
    assert "All 2 runs" not in claim(shared)
    # A ledger that is gone: the statement still stands, and it is said that the total is not known.
    (tmp_path / "ledger.db").unlink()
    alone = ask()
    assert (alone.exit_code, alone.stdout) == (0, (run / "statement.txt").read_text())
    assert "cost together is not known" in alone.stderr


def point_by_point() -> dict[str, str]:
    """What SP 800-226 wants a claim to let its reader evaluate, and the words that a statement has."""
    return {
        "epsilon and delta, in words": "recognise at most",
        "delta against one over the number of records": "times one over the number of",
        "variant": "Variant              approximate",
        "unit": "Unit of privacy",
        "neighbouring relation": "Adjacency",
        "group privacy": "who belong together",
        "composition": "other runs on the same data",
        "releases without privacy": "without differential privacy",
        "mechanism": "Mechanism            Gaussian noise",
        "version of the library": "Software: dptorch",
        "tuning": "hyper-parameters (tuning)",
        "amplification": "without amplification",
        "query model": "Releases             not interactive",
        "trust model": "Trust model          central",
        "timing": "how long steps take",
        "floating point": "floating-point arithmetic",
        "randomness": "key from the operating system",
        "keys and checkpoints": "holds the key of the noise",
        "assumptions": "Assumed:",
    }


@pytest.mark.slow
def test_a_statement_answers_every_point_of_the_guidelines(private: RunFolder) -> None:
    text = claim(private)
    assert [point for point, words in point_by_point().items() if words not in text] == []


@pytest.mark.parametrize(
    ("settings", "own"),
    [
        ({}, 0),
        ({}, 2),
        ({"unit": "user", "max_examples_per_user": 2}, 0),
        ({"mechanism": "discrete_gaussian", "accountant": "rdp"}, 0),
        ({"adjacency": "add-remove"}, 1),
    ],
)
def test_statements_of_all_kinds_fit_the_schema(settings: dict[str, Any], own: int) -> None:
    plan = dptorch.make_plan(
        batch_size=16, sample_size=64, steps=8, noise_multiplier=1.0, target_delta=1e-3, **settings
    )
    run = {plan.sampling: 4 - own, OWN_LOADER: own}
    found = make_statement(plan, 4, run, KeySource.OS).to_dict()
    found = json.loads(json.dumps(for_machines(found)))
    assert list(faults(found, SCHEMA)) == []
    # The broken twins.
    assert list(faults({**found, "news": 1}, SCHEMA)) == [": news is not known"]
    assert list(faults({k: v for k, v in found.items() if k != "delta"}, SCHEMA))
    assert list(faults({**found, "delta": 2.0}, SCHEMA)) == ["/delta: 2.0 is out of range"]
    assert for_machines({**found, "epsilon": math.inf})["epsilon"] is None


@pytest.mark.slow
def test_a_registry_entry_with_a_fault_is_caught(private: RunFolder) -> None:
    entry = yaml.safe_load(claim(private, "registry"))
    wrong = copy.deepcopy(entry)
    wrong["deployment"]["deployment_model"]["model_name"] = "central"
    wrong["deployment"]["basic"].pop("intended_use")
    assert len(list(faults(wrong, REGISTRY))) == 2
    owners = re.findall(r"FILL IN", claim(private, "registry"))
    assert len(owners) > 8, "what a run cannot know is left to the owner"


def test_a_run_without_a_statement(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    for form in FORMATS:
        with pytest.raises(DataError, match="neither finished nor been interrupted"):
            claim(RunFolder(tmp_path), form)
