"""What the shuffle takes by parameters: shapes of the models; the page keeps the rest."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from benchmarks.blogs_study.scale import MODELS, Row, measure, section, with_section
from benchmarks.sections import put


def test_the_largest_has_more_than_a_billion_parameters() -> None:
    totals = [sum(size * n for size, n in shapes.items()) for shapes in MODELS.values()]
    assert totals == sorted(totals)
    assert totals[-1] == 1_100_048_384  # TinyLlama's
    assert [round(t / 1e6) for t in totals] == [1, 11, 111, 1100]


def test_a_row_adds_up_what_its_tensors_take(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(float(i) for i in range(100))
    monkeypatch.setattr("benchmarks.blogs_study.scale.time.thread_time", lambda: next(ticks))
    row = measure("two sizes", {8: 3, 20: 1}, block=4)
    assert (row.seconds, row.plain, row.parameters) == (4.0, 4.0, 44)
    assert row.extra_bytes == 2 * 20 + 8 * 5


def test_the_page_keeps_what_else_it_says(tmp_path: Path) -> None:
    page = "# Study\n\nresults\n\n## Make this page\n\nso\n"
    assert with_section(page, tmp_path) == page

    def written(rows: list[Row], on: str) -> str:
        (tmp_path / "blogs").mkdir(exist_ok=True)
        (tmp_path / "blogs" / "scale.json").write_text(json.dumps([asdict(r) for r in rows]))
        return with_section(on, tmp_path)

    row = Row("1 M", 1024, 10**6, 0.01, 0.001, 2**20)
    once = written([row], page)
    assert once.replace(section([row]), "") == page
    assert "| 1 M | 1024 | 0.01 | 10 | 0.001 | 1 MiB |" in once
    assert written([row, row], once) == written([row, row], page)


def test_a_new_section_goes_to_the_end() -> None:
    assert put("# Page\n", "## A\n\nnew\n\n") == "# Page\n\n## A\n\nnew\n"
    assert put("# Page\n\n## A\n\nold\n", "## A\n\nnew\n\n") == "# Page\n\n## A\n\nnew\n\n"
