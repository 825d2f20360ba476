"""A seeded table of patients as a hospital exports it: ids, dates, gaps, three uneven classes."""

from __future__ import annotations

import csv
import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = ("discharged", "ward", "intensive")
REGIONS = ("north", "south", "east", "west")

#: What the hospital knows of its table without looking into it.
SCHEMA: dict[str, Any] = {
    "dptorch_schema": 1,
    "label": {"column": "outcome", "classes": list(CLASSES)},
    "columns": {
        "patient_id": {"kind": "drop"},
        "admitted": {"kind": "date", "bounds": ["2019-01-01", "2025-12-31"]},
        "sex": {"kind": "category", "values": ["f", "m"], "other": True, "missing": True},
        "age": {"kind": "number", "bounds": [0, 100], "missing": True, "fill": 50},
        "region": {"kind": "category", "values": list(REGIONS), "other": True, "missing": True},
        "smoker": {"kind": "boolean", "missing": True},
        "temperature": {"kind": "number", "bounds": [35, 42], "missing": True},
        "oxygen": {"kind": "number", "bounds": [70, 100], "missing": True},
        "crp": {"kind": "number", "bounds": [0.1, 500], "log": True, "missing": True},
        "notes": {"kind": "text", "buckets": 16},
    },
}


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` stays of patients: three classes of about 68, 23 and 9 percent."""
    rng = np.random.default_rng(seed)
    age = np.clip(rng.normal(58, 19, count), 18, 99)
    severity = rng.normal(0, 1, count) + (age - 58) / 40
    smoker = rng.random(count) < 0.25
    severity += 0.4 * smoker
    temperature = np.clip(37.2 + 0.6 * severity + rng.normal(0, 0.5, count), 35, 42)
    oxygen = np.clip(96 - 2.5 * severity + rng.normal(0, 1.2, count), 70, 100)
    crp = np.clip(np.exp(2.5 + 0.9 * severity + rng.normal(0, 0.5, count)), 0.1, 500)
    noisy = severity + rng.normal(0, 0.35, count)
    label = (noisy > 0.75).astype(int) + (noisy > 1.75)
    first = datetime.date(2019, 1, 1)
    found = []
    for i in range(count):
        words = ["seen", "stable"] if noisy[i] < 0.5 else ["seen", "dyspnoea"]
        row = {
            "patient_id": f"P{rng.integers(10**6):06d}",
            "admitted": (first + datetime.timedelta(days=int(rng.integers(2500)))).isoformat(),
            "sex": str(rng.choice(["f", "m"])),
            "age": f"{age[i]:.0f}",
            "region": str(rng.choice(REGIONS)),
            "smoker": "yes" if smoker[i] else "no",
            "temperature": f"{temperature[i]:.1f}",
            "oxygen": f"{oxygen[i]:.0f}",
            "crp": f"{crp[i]:.1f}",
            "notes": " ".join(words) if rng.random() < 0.5 else "",
            "outcome": CLASSES[label[i]],
        }
        for name in ("sex", "age", "region", "smoker", "temperature", "oxygen", "crp"):
            if rng.random() < 0.04:
                row[name] = str(rng.choice(["", "NA"]))
        found.append(row)
    return found


def write(
    path: Path, count: int, seed: int = 0, *, label: bool = True, separator: str = ","
) -> Path:
    """Write `rows` as a CSV file, without the outcome for patients yet to be predicted."""
    table = rows(count, seed)
    names = [name for name in table[0] if label or name != "outcome"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore", delimiter=separator)
        writer.writeheader()
        writer.writerows(table)
    return path


def write_schema(path: Path, **changes: Any) -> Path:
    """Write `SCHEMA`, with changes at its top."""
    path.write_text(json.dumps({**SCHEMA, **changes}), encoding="utf-8")
    return path
