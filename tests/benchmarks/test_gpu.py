"""The script for a GPU works where there is none: each of its parts, tiny, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu
from dptorch.bench.exactness import WRONG
from dptorch.bench.workloads import get_workload

pytest.importorskip("transformers")


@pytest.mark.slow
@pytest.mark.usefixtures("python_forks")
def test_each_part_runs_and_says_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--tiny", "--no-tests", "--workload", "gpt2_small"]
    gpu.main([*arguments, "--output", str(file)])
    found = json.loads(file.read_text())
    assert json.loads(capsys.readouterr().out) == found
    assert found["facts"]["machine"]
    assert found["exactness"]["gpt2_small"] < WRONG
    assert found["noise"]["as it should be"], found["noise"]
    steps = {row["engine"]: row for row in found["step gpt2_small"]}
    assert set(steps) == {"non-private", "dptorch/auto", "opacus/ghost"}
    assert all(steps[e]["examples_per_second"] > 0 for e in ("non-private", "dptorch/auto"))
    assert "tying" in steps["opacus/ghost"]["reason"]
    peaks = found["memory by mode"]["gpt2_small"]
    assert peaks["non-private"] > 0
    assert all(isinstance(peak, int) for peak in peaks.values()), peaks


def test_noise_that_is_not_normal_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A twin whose noise is uniform, of the right variance."""

    class Uniform(gpu.GaussianNoise):
        def privatize(self, clipped, *args, **kwargs):  # type: ignore[no-untyped-def]
            noisy = super().privatize(clipped, *args, **kwargs)
            for value in clipped.values.values():
                value.div_(2**0.5).erf_().mul_(3**0.5)
            return noisy

    plan = gpu.Plan(device="cpu", tiny=True)
    assert gpu._noise(plan)["as it should be"]
    monkeypatch.setattr(gpu, "GaussianNoise", Uniform)
    assert not gpu._noise(plan)["as it should be"]


def test_what_there_is_no_time_for_is_said() -> None:
    kept: list[dict[str, object]] = []
    plan = gpu.Plan(device="cpu", tiny=True, tests=False, minutes=-1.0)
    found = gpu.run(plan, kept.append)
    assert all(found[f"step {name}"] == "no time left" for name in gpu.WORKLOADS)
    assert len(kept) == 4 + len(gpu.WORKLOADS)


def test_what_it_measures_is_there() -> None:
    assert all(not get_workload(name).default for name in gpu.WORKLOADS)
    root = Path(__file__).parents[2]
    assert all((root / file).exists() for file in gpu.TESTS)
