"""The privacy statement of a run in the forms that others ask for.

=============  =======================================================================================
text           the statement as it is
json           for machines; `dptorch/statement.schema.json` describes it
registry       YAML for the Differential Privacy Deployments Registry of NIST and OpenDP: the fields
               that a run knows are filled in, the owner's are marked FILL IN
model-card     a section of a Hugging Face model card, in Markdown
=============  =======================================================================================

What a claim has to let its reader evaluate is the list of NIST SP 800-226, "Guidelines for Evaluating
Differential Privacy Guarantees" (2025).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from dptorch.errors import DataError
from dptorch.ledger import Total
from dptorch.risk import rounded_up
from dptorch.training.run_folder import RunFolder

__all__ = ["FORMATS", "claim", "for_machines"]

_FILL_IN: Final = "FILL IN"

Claims = Mapping[str, Any]


def claim(folder: RunFolder, form: str = "text", total: Total | None = None) -> str:
    """The statement of a run or release, in one of `FORMATS`.

    Args:
        total: what all runs on its data cost together, from the ledger: it is said beside what this
            run cost.

    Raises:
        DataError: the run has no statement yet.
    """
    return FORMATS[form](folder, total)


def _claims(folder: RunFolder) -> tuple[Claims, Mapping[str, Any]]:
    about = folder.read_json("run.json")
    if "statement" not in about:
        raise DataError(
            f"{folder.path}: this run has neither finished nor been interrupted in order, so it has no "
            "statement. Continue it with: dptorch train --resume --name " + folder.path.name
        )
    return about["statement"], about


def _text(folder: RunFolder, total: Total | None) -> str:
    _claims(folder)
    try:
        text = (folder.path / "statement.txt").read_text(encoding="utf-8")
        return text if total is None else f"{text}\n{_together(total)}\n"
    except OSError as error:
        raise DataError(f"{folder.path}/statement.txt cannot be read ({error.strerror}).") from None


def _together(total: Total) -> str:
    runs = "The one run" if total.runs == 1 else f"All {total.runs} runs"
    notes = "".join(f" {note[0].upper()}{note[1:]}." for note in total.notes)
    return (
        f"{runs} on this data in its ledger: epsilon {rounded_up(total.adaptive)} at delta "
        f"{total.delta:g} ({total.adjacency.value}) together, for {total.steps} steps, however later "
        f"runs were chosen; {rounded_up(total.planned)} if no run's settings depended on what others "
        f"had shown. {_cap_of(total)}{notes}"
    )


def _cap_of(total: Total) -> str:
    if total.cap is None:
        return "No cap is set: later runs may add to it."
    return (
        f"Later runs may raise it to {total.cap.epsilon:g} at delta {total.cap.delta:g}, the cap."
    )


def _json(folder: RunFolder, total: Total | None) -> str:
    claims, _ = _claims(folder)
    values = for_machines(claims)
    if total is not None:
        together = {
            "runs": total.runs,
            "steps": total.steps,
            "epsilon": total.adaptive,
            "epsilon_if_planned": total.planned,
            "delta": total.delta,
            "adjacency": total.adjacency.value,
            "notes": total.notes,
        }
        values["all_runs"] = for_machines(together)
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def for_machines(claims: Claims) -> dict[str, Any]:
    """The statement in strict JSON, which has no infinity: an epsilon without a bound is null.

    Example:
        >>> for_machines({"epsilon": math.inf, "steps": 3})
        {'epsilon': None, 'steps': 3}
    """
    return {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in claims.items()}


# -- the registry ----------------------------------------------------------------------------------


def _registry(folder: RunFolder, total: Total | None) -> str:
    """An entry of tier 3 for `schemas/deployments-schema.yaml` of opendp/deployments-registry-data."""
    claims, about = _claims(folder)
    plan, data = claims["plan"], about["data"]
    unit, epsilon = claims["unit"], claims["epsilon"]
    versions = ", ".join(f"{name} {number}" for name, number in claims["versions"].items())
    dataset = claims.get("ledger")
    entry = {
        "url_slug": f"{_FILL_IN}: name-owner-year",
        "status": "Draft",
        "tier": 3,
        "deployment": {
            "basic": {
                "name": f"{_FILL_IN}: the name of the model",
                "data_curators": [f"{_FILL_IN}: who publishes it"],
                "intended_use": f"{_FILL_IN}: what it is for",
                "data_product_type": "Machine learning model",
                "data_product_region": f"{_FILL_IN}: whose data, whose laws",
                "description": f"{_FILL_IN}, or leave it at this: {_described(about)}",
                # The registry takes dates alone; this is one that nobody takes for meant.
                "publication_date": "1970-01-01",
            },
            "dp_variant": {
                "variant_name": "Approximate DP",
                "data_domain": f"{_FILL_IN}: what data sets there could have been. One record is "
                f"{claims['unit_text']}.",
                "unprotected_quantities": _list(
                    [f"public by the plan: {item}" for item in claims["public"]]
                    + [f"classes: {', '.join(data['classes'])}"] * bool(data["classes"])
                    + claims["read_from_data"]
                ),
            },
            "privacy_loss": {
                "privacy_unit": "user level" if unit == "user" else f"{unit} level",
                "privacy_unit_details": f"Adjacent data sets differ by {claims['adjacency_text']} "
                f"({claims['adjacency']}). {claims['unit_text']}.",
                "privacy_parameters": {
                    **({"epsilon": epsilon} if math.isfinite(epsilon) else {}),
                    "delta": claims["delta"],
                },
                "privacy_parameters_details": f"Accountant: {claims['accountant']}, an upper bound, "
                f"for {claims['steps']} steps that ran. " + " ".join(claims["in_words"]),
            },
            "deployment_model": {
                "model_name": "Central",
                "model_name_details": claims["trust_model"],
                "actors": f"{_FILL_IN}: who sees the data and the model, and why they are trusted",
                "release_type": "One release",
                "release_type_details": f"{claims['release_type']}. {_FILL_IN}: are other releases of "
                "this data planned?",
                "data_source_type": "Static",
                "access_type": "Non-interactive",
                "access_type_details": claims["released"],
            },
            "accounting": {
                "post_processing": "Whatever is computed from the released model and from data that is "
                "not private.",
                "composition": f"{claims['sampling_law']}, accounted by: {claims['sampling_theorem']}. "
                + (
                    f"Every step is in a ledger of the data set ({dataset['dataset']}), in which all "
                    f"runs add up. {'' if total is None else _together(total)}".rstrip()
                    if dataset
                    else "No ledger was kept: other runs on this data are not counted."
                ),
            },
            "implementation": {
                "preprocessing_and_hyperparameter_tuning": _list(
                    [
                        "Preprocessing looks at one record at a time, by public bounds and lists.",
                        *(
                            f"Read off the data without noise: {i}"
                            for i in claims["read_from_data"]
                        ),
                        *_notes(claims),
                        f"{_FILL_IN}: how settings were chosen. Choices made on this data are not "
                        "covered.",
                    ]
                ),
                "mechanisms": _list(
                    [
                        f"DP-SGD: {plan['mechanism']} noise of multiplier "
                        f"{plan['noise_multiplier']:.6g} on sums of gradients clipped to "
                        f"{plan['max_grad_norm']:g}.",
                        f"Software: {versions}.",
                        f"Randomness: key from the {claims['key_provenance']}.",
                        *(f"Not covered: {item}." for item in claims["not_covered"]),
                        f"{_FILL_IN}: who may access the data, the logs and the checkpoints.",
                    ]
                ),
                "justification": f"{_FILL_IN}: why this epsilon. Assumptions: "
                + _list(claims["assumed"]),
            },
            "administrative": {
                "notes": f"SHA-256 of the model: {claims['model_digest']}",
                "registry_authors": [f"{_FILL_IN}: who wrote this entry"],
            },
        },
    }
    return _yaml(entry)


def _described(about: Mapping[str, Any]) -> str:
    model, data = about["model"], about["data"]
    what = f"a classifier of {len(data['classes'])} classes" if data["classes"] else "a model"
    return (
        f"{what} with {model['trainable_parameters']} trained parameters, from "
        f"{data['train_examples']} examples"
    )


def _notes(claims: Claims) -> list[str]:
    """The notes of a statement as sentences: who chose the settings, what weights it began from."""
    return [note[0].upper() + note[1:] for note in claims["notes"]]


def _list(items: list[str]) -> str:
    return "\n".join(f"- {item}" for item in items) or "none"


def _yaml(value: Any, indent: int = 0) -> str:
    """YAML of nested plain values. Texts of several lines are blocks, others are quoted as in JSON."""
    lines = []
    space = "  " * indent
    items = value.items() if isinstance(value, Mapping) else ((None, item) for item in value)
    for key, item in items:
        head = f"{space}-" if key is None else f"{space}{key}:"
        if isinstance(item, Mapping | list):
            lines.append(head + "\n" + _yaml(item, indent + 1).rstrip("\n"))
        elif isinstance(item, str) and "\n" in item:
            block = "\n".join(f"{space}  {line}" for line in item.splitlines())
            lines.append(f"{head} |\n{block}")
        else:
            lines.append(f"{head} {json.dumps(item, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


# -- a model card ----------------------------------------------------------------------------------


def _model_card(folder: RunFolder, total: Total | None) -> str:
    claims, about = _claims(folder)
    rows = [
        ("epsilon", rounded_up(claims["epsilon"])),
        ("delta", f"{claims['delta']:g}"),
        ("unit of privacy", claims["unit_text"]),
        ("adjacency", f"{claims['adjacency']}: {claims['adjacency_text']}"),
        ("variant", claims["variant"]),
        ("trust model", claims["trust_model"]),
        ("mechanism", f"{claims['plan']['mechanism']}, {claims['steps']} steps"),
        ("sampling", claims["sampling_law"]),
        ("accountant", f"{claims['accountant']}, an upper bound"),
        ("randomness", f"key from the {claims['key_provenance']}"),
        ("model", f"sha256 `{claims['model_digest']}`"),
        *([] if total is None else [("all runs", _together(total))]),
    ]
    table = "\n".join(f"| {name} | {text} |" for name, text in rows)
    words = "\n\n".join([*claims["in_words"], *_notes(claims)])
    groups = about.get("groups", [])
    by_group = ""
    if groups:
        name = "accuracy" if "accuracy" in groups[0] else "rmse"
        found = "\n".join(
            f"| {g['by']}: {g['group']} | {g['examples']} | {g[name]:.4g} |" for g in groups
        )
        by_group = (
            "\n### Results by group\n\nExact, on test examples that the guarantee does not cover.\n\n"
            f"| group | test examples | {name} |\n|---|---|---|\n{found}\n"
        )
    return (
        f"## Differential privacy\n\n{words}\n\n| | |\n|---|---|\n{table}\n\n"
        f"### Assumed\n\n{_list(claims['assumed'])}\n\n"
        f"### Not covered\n\n{_list(claims['not_covered'])}\n{by_group}"
    )


FORMATS: Final[Mapping[str, Callable[[RunFolder, Total | None], str]]] = {
    "text": _text,
    "json": _json,
    "registry": _registry,
    "model-card": _model_card,
}
