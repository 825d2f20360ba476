"""From a raw table to predictions in three commands, and what goes wrong on the way."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from tests.cli.commands import refused, run
from tests.tables.patients import SCHEMA, rows, write, write_schema


def editor(tmp_path: Path) -> str:
    """A program that does to a schema what its owner does: fill in what the hospital knows."""
    script = tmp_path / "editor.py"
    script.write_text(
        "import json, sys\n"
        "path = sys.argv[1]\n"
        "schema = json.load(open(path))\n"
        f"known = json.loads({json.dumps(SCHEMA)!r})\n"
        "assert schema['columns']['oxygen']['bounds'].startswith('FILL IN')\n"
        "schema['columns'].update({k: known['columns'][k] for k in ('admitted', 'region', 'oxygen',"
        " 'crp', 'notes')})\n"
        "schema['label'] = known['label']\n"
        "json.dump(schema, open(path, 'w'))\n"
    )
    import sys

    return f"{sys.executable} {script}"


def sklearn_accuracy(train: list[dict[str, str]], test: list[dict[str, str]]) -> float:
    """What logistic regression without privacy gets right, on the usual preprocessing."""
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def features(row: dict[str, str]) -> dict[str, object]:
        found: dict[str, object] = {}
        for name in ("age", "temperature", "oxygen", "crp"):
            gap = row[name] in ("", "NA")
            found[name] = 0.0 if gap else float(row[name])
            found[f"no {name}"] = float(gap)
        found["log crp"] = float(np.log(float(found["crp"]) + 1))  # type: ignore[arg-type]
        found |= {"sex": row["sex"], "region": row["region"], "smoker": row["smoker"]}
        return found | {f"word {word}": 1.0 for word in row["notes"].split()}

    model = make_pipeline(DictVectorizer(sparse=False), StandardScaler(), LogisticRegression())
    model.fit([features(row) for row in train], [row["outcome"] for row in train])
    return float(model.score([features(row) for row in test], [row["outcome"] for row in test]))


@pytest.mark.slow
def test_from_raw_table_to_predictions_in_three_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 4 points of logistic regression without privacy, at ε = 3."""
    write(Path("patients.csv"), 3000)
    write(Path("new.csv"), 1000, seed=1, label=False)
    monkeypatch.setenv("EDITOR", editor(tmp_path))
    monkeypatch.delenv("VISUAL", raising=False)
    done = run("schema", "patients.csv", "--label", "outcome", "--edit")
    assert done.exit_code == 0, done.output
    assert "patients.schema.json is complete" in done.stderr
    done = run(
        "train", "--data", "patients.csv", "--schema", "patients.schema.json", "--seed", "1",
        "--name", "patients",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "Predict: dptorch predict runs/patients" in done.output
    done = run(
        "predict", "runs/patients", "new.csv", "--out", "predictions.csv",
        "--keep", "patient_id", "--probabilities",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    with Path("predictions.csv").open() as file:
        found = list(csv.DictReader(file))
    unseen = rows(1000, seed=1)
    assert [row["patient_id"] for row in found] == [row["patient_id"] for row in unseen]
    assert [row["line"] for row in found] == [str(i) for i in range(2, 1002)]
    right = np.mean([a["prediction"] == b["outcome"] for a, b in zip(found, unseen, strict=True)])
    assert right >= sklearn_accuracy(rows(3000), unseen) - 0.04
    shares = np.array([[float(row[f"probability of {c}"]) for c in SCHEMA["label"]["classes"]]
                       for row in found])  # fmt: skip
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-5)
    statement = Path("runs/patients/statement.txt").read_text()
    assert "which columns hold numbers, dates or words" in statement


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("digits", 0.9), ("breast_cancer", 0.8)])
def test_data_of_scikit_learn_by_the_same_commands(name: str, least: float) -> None:
    """On rows that no step saw, at ε = 3."""
    from sklearn import datasets

    data = getattr(datasets, f"load_{name}")()
    order = np.random.default_rng(0).permutation(len(data.data))
    names = [str(feature).replace(" ", "_") for feature in data.feature_names]
    for file, rows_of in (("rows.csv", order[120:]), ("new.csv", order[:120])):
        with Path(file).open("w", newline="") as out:
            writer = csv.writer(out)
            writer.writerow([*names, "label"])
            writer.writerows([*data.data[i], data.target_names[data.target[i]]] for i in rows_of)
    if name == "digits":
        known = ("--label", "label", "--bounds", "0,16")
    else:  # ranges that the data set was published with
        found = re.findall(r"^ *([a-z ]+) \((mean|standard error|worst)\): +([\d.]+) +([\d.]+)",
                           data.DESCR, re.MULTILINE)  # fmt: skip
        assert len(found) == len(names)
        ranges = {"mean": "mean_{}", "standard error": "{}_error", "worst": "worst_{}"}
        columns = {
            ranges[kind].format(what.replace(" ", "_")): {
                "kind": "number",
                "bounds": [float(low), float(high)],
            }
            for what, kind, low, high in found
        }
        label = {"column": "label", "classes": [str(each) for each in data.target_names]}
        Path("schema.json").write_text(
            json.dumps({"dptorch_schema": 1, "label": label, "columns": columns})
        )
        known = ("--schema", "schema.json")
    done = run(
        "train", "--data", "rows.csv", *known, "--epsilon", "3", "--seed", "1", "--name", "x"
    )
    assert done.exit_code == 0, done.output
    done = run("predict", "runs/x", "new.csv", "--out", "found.csv", "--keep", "label")
    assert done.exit_code == 0, done.output
    with Path("found.csv").open() as file:
        right = [row["prediction"] == row["label"] for row in csv.DictReader(file)]
    assert len(right) == 120
    assert np.mean(right) > least


@pytest.mark.slow
def test_units_bad_rows_and_releases(tmp_path: Path) -> None:
    write(Path("patients.csv"), 300)
    with Path("patients.csv").open("a") as file:
        file.write("P1,soon,f,60,east,no,37,98,7,fine,ward\n")
    write_schema(Path("s.json"), unit={"column": "patient_id"})
    train = ("train", "--data", "patients.csv", "--schema", "s.json", "--epochs", "1")
    message = refused(run(*train))
    assert "line 302, column 'admitted': 'soon' is not a date" in message
    done = run(
        *train, "--on-bad-row", "skip", "--subgroups", "sex", "--name", "a", "--release", "shared"
    )
    assert done.exit_code == 0, done.output
    assert "Skipped  1 rows" in done.output
    groups = json.loads(Path("runs/a/run.json").read_text())["groups"]
    assert {group["by"] for group in groups} == {"class", "sex"}
    for by in ("class", "sex"):
        assert (
            sum(g["examples"] for g in groups if g["by"] == by)
            == json.loads(Path("runs/a/run.json").read_text())["data"]["test_examples"]
        )
    assert "Test results by group" in Path("runs/a/report.html").read_text()
    assert "Test results by group" not in Path("shared/report.html").read_text()
    assert '"groups"' not in Path("shared/run.json").read_text()
    assert "one user with all their examples" in Path("shared/statement.txt").read_text()
    assert "skipped" not in Path("shared/run.json").read_text()
    write(Path("new.csv"), 5, seed=3, label=False)
    ours, theirs = (run("predict", folder, "new.csv") for folder in ("runs/a", "shared"))
    assert ours.stdout == theirs.stdout
    assert ours.stdout.splitlines()[0] == "line,prediction"
    with Path("new.csv").open("a") as file:
        file.write("P1,soon,f,60,east,no,37,98,7,fine\n")
    assert "line 7, column 'admitted'" in refused(run("predict", "shared", "new.csv"))
    skipped = run("predict", "shared", "new.csv", "--on-bad-row", "skip")
    assert skipped.stdout == ours.stdout
    assert "Skipped 1 rows" in skipped.stderr
    for arguments, message in (
        (("nowhere.csv",), "nowhere.csv does not exist"),
        (("new.csv", "--digest", "00"), "not the one that you were given"),
        (("new.csv", "--keep", "doctor", "--on-bad-row", "skip"), "no column 'doctor'"),
        (("new.csv", "--on-bad-row", "stop"), "'stop'"),
        (("new.csv", "--on-bad-row", "skip", "--out", "no/such/p.csv"), "cannot be written"),
    ):
        assert message in refused(run("predict", "shared", *arguments))


def test_a_schema_says_label_and_bounds() -> None:
    write(Path("patients.csv"), 20)
    write_schema(Path("s.json"))
    train = ("train", "--data", "patients.csv", "--schema", "s.json")
    assert "--label and --schema exclude each other" in refused(run(*train, "--label", "outcome"))
    assert "--bounds and --schema exclude each other" in refused(run(*train, "--bounds", "0,1"))
    assert "--schema 'no.json' cannot be read" in refused(
        run("train", "--data", "patients.csv", "--schema", "no.json")
    )
