"""How many rows a second a table goes through `dptorch train` and `dptorch predict`.

    python -m benchmarks.table_rows --rows 1000000

writes a seeded table (five numbers, two categories, a yes or no, a date, an id; 2 % of the cells
empty), trains on it and predicts all of it, each by the command in a process of its own, and prints
what each took: processor time, so that a busy machine says the same, rows for each second of it, and
the most memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

NUMBERS = 5
REGIONS = ("north", "south", "east", "west")
SCHEMA = {
    "dptorch_schema": 1,
    "label": {"column": "ill", "classes": ["no", "yes"]},
    "columns": {
        "id": {"kind": "drop"},
        "seen": {"kind": "date", "bounds": ["2019-01-01", "2025-12-31"]},
        "sex": {"kind": "category", "values": ["f", "m"], "missing": True},
        "region": {"kind": "category", "values": list(REGIONS), "other": True, "missing": True},
        "smoker": {"kind": "boolean", "missing": True},
        **{
            f"value_{i}": {"kind": "number", "bounds": [-4, 4], "missing": True}
            for i in range(NUMBERS)
        },
    },
}


def write_table(path: Path, rows: int) -> None:
    """Write `rows` rows whose label follows two of the numbers."""
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        file.write(",".join([*SCHEMA["columns"], "ill"]) + "\n")
        for start in range(0, rows, 100_000):
            n = min(100_000, rows - start)
            values = rng.normal(size=(n, NUMBERS))
            ill = values[:, 0] + values[:, 1] + rng.normal(size=n) > 0.5
            days = np.datetime64("2019-01-01") + rng.integers(0, 2500, n)
            columns = [
                np.char.add("P", (np.arange(n) + start).astype(str)),
                days.astype(str),
                np.array(["f", "m"])[rng.integers(0, 2, n)],
                np.array(REGIONS)[rng.integers(0, 4, n)],
                np.array(["yes", "no"])[rng.integers(0, 2, n)],
                *(np.char.mod("%.3f", column) for column in values.T),
            ]
            for column in columns[2:]:
                column[rng.random(n) < 0.02] = ""
            columns.append(np.where(ill, "yes", "no"))
            file.writelines(",".join(row) + "\n" for row in zip(*columns, strict=True))


def measure(what: str, rows: int, *command: str) -> None:
    """Run a command of dptorch and print a line about it."""
    code = "from dptorch.cli.app import main; main()"
    pid = subprocess.Popen([sys.executable, "-c", code, *command], stdout=subprocess.DEVNULL).pid
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"dptorch {' '.join(command)} failed.")
    seconds = usage.ru_utime + usage.ru_stime
    print(
        f"{what}: {seconds:.0f} s of processor time, {rows / seconds:,.0f} rows/s, "
        f"{usage.ru_maxrss / 2**20:.1f} GiB at most",
        flush=True,
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rows", type=int, default=1_000_000)
    rows = arguments.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        table, schema = Path(folder) / "table.csv", Path(folder) / "table.schema.json"
        write_table(table, rows)
        schema.write_text(json.dumps(SCHEMA), encoding="utf-8")
        print(f"{rows:,} rows, {table.stat().st_size / 2**20:.0f} MiB of CSV", flush=True)
        runs = ("--runs", f"{folder}/runs")
        train = ("train", *runs, "--name", "rows", "--data", str(table), "--schema", str(schema))
        options = ("--epochs", "1", "--sample-rate", "0.005", "--epsilon", "3")
        measure("dptorch train, 1 epoch of 200 steps", rows, *train, *options)
        out = ("--out", f"{folder}/predictions.csv")
        measure("dptorch predict", rows, "predict", f"{folder}/runs/rows", str(table), *out)


if __name__ == "__main__":
    main()
