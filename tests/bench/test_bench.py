"""The benchmark suite: what it measures is what is there, and what cannot run says so."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dptorch.bench import memory, suite, timing, worker
from dptorch.bench.all_engines import choose, engines
from dptorch.bench.cost_page import Measurements, load, page, save
from dptorch.bench.engines import NON_PRIVATE, Engine, Settings, Step, start
from dptorch.bench.exactness import WRONG, gradient_error
from dptorch.bench.memory import Question, allocator_peak, ask, largest_batch, memory_bytes
from dptorch.bench.peers import peer_engines, read_peers
from dptorch.bench.suite import Options, Row, measure
from dptorch.bench.timing import interleave
from dptorch.bench.workloads import WORKLOADS, Size, Unavailable, Workload
from dptorch.cli.app import app
from dptorch.errors import ConfigurationError

CPU = torch.device("cpu")
MACHINE = {"machine": "Some(R) Processor, 2 cores, 8 GiB"}
ENGINES = engines()


# -- time ------------------------------------------------------------------------------------------


class WorkClock:
    """Stands for `time` in the timing module: its clocks move by the work that is done, and by nothing
    that else runs on the machine."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def perf_counter(self) -> float:
        return self.wall

    monotonic = perf_counter

    def process_time(self) -> float:
        return self.cpu

    def work(self, wall: float, cpu: float) -> Callable[[], None]:
        """A step that takes these seconds."""

        def step() -> None:
            self.wall += wall
            self.cpu += cpu

        return step


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> WorkClock:
    made = WorkClock()
    monkeypatch.setattr(timing, "time", made)
    return made


def test_a_step_to_itself_is_one_and_a_slow_twin_shows(clock: WorkClock) -> None:
    step, thrice = clock.work(0.25, 0.5), clock.work(0.75, 1.0)
    found = interleave(step, {"same": step, "slow": thrice}, seconds=0, rounds=40)
    assert (found["same"].ratio, found["same"].cpu_ratio) == (1, 1)
    assert (found["slow"].ratio, found["slow"].cpu_ratio) == (3, 2)
    assert (found["same"].step_ms, found["slow"].step_ms) == (250, 750)
    assert found["same"].rounds == 40


def test_each_step_is_divided_by_the_ordinary_one_beside_it(clock: WorkClock) -> None:
    """A machine that slows down by the minute slows both: the ratio stays, medians apart would not."""
    slowness = 1.0

    def step(seconds: float) -> Callable[[], None]:
        def run() -> None:
            nonlocal slowness
            slowness *= 1.01
            clock.wall += seconds * slowness

        return run

    found = interleave(step(1.0), {"twice": step(2.0)}, seconds=0, rounds=40)["twice"]
    assert found.ratio == pytest.approx(2, rel=0.02)
    assert found.ratio_p10 <= found.ratio <= found.ratio_p90
    assert found.step_ms > 2 * 1000 * 1.5


@pytest.mark.slow
def test_rounds_follow_the_seconds_and_slow_engines_sit_out(clock: WorkClock) -> None:
    quick, slow = clock.work(1.0, 1.0), clock.work(20.0, 20.0)
    found = interleave(quick, {"quick": quick, "slow": slow}, seconds=0, rounds=24)
    assert (found["quick"].rounds, found["slow"].rounds) == (24, 6)
    # A round takes two seconds: 8 at the least, and otherwise as many as there is time for.
    assert interleave(quick, {"quick": quick}, seconds=3)["quick"].rounds == 8
    assert interleave(quick, {"quick": quick}, seconds=30)["quick"].rounds == 15


# -- workloads and engines -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKLOADS)
def test_each_workload_steps_and_ours_is_exact(name: str) -> None:
    recipe = WORKLOADS[name]
    work = recipe.make(recipe.tiny)
    assert work.per_example().shape == (recipe.tiny.B,)
    before = [p.detach().clone() for p in work.model.parameters() if p.requires_grad]
    start(ENGINES[NON_PRIVATE], work, Settings(lr=1.0))
    after = [p for p in work.model.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert gradient_error(ENGINES["dptorch/auto"], recipe) < WRONG


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in ENGINES if n.startswith("dptorch/")])
def test_each_mode_and_style_of_ours_is_measured(name: str) -> None:
    recipe = WORKLOADS["gpt2_tied"]
    start(ENGINES[name], recipe.make(recipe.tiny))
    if ENGINES[name].all_layer:
        assert gradient_error(ENGINES[name], recipe) < WRONG


def test_a_workload_is_the_same_each_time() -> None:
    first, second = (WORKLOADS["gpt2_lora"].make(WORKLOADS["gpt2_lora"].tiny) for _ in range(2))
    assert torch.equal(first.per_example(), second.per_example())


@pytest.mark.parametrize("name", ["opacus/hooks", "opacus/ghost", "torch.func/vmap"])
def test_others_are_driven_rightly(name: str) -> None:
    """An engine that is right, as these are on a plain model, must come out right."""
    for workload in ("mlp", "gpt2"):
        assert gradient_error(ENGINES[name], WORKLOADS[workload]) < WRONG


def test_a_gradient_that_is_not_clipped_is_seen() -> None:
    """The negative control of the exactness check: the ordinary loop."""
    plain = ENGINES[NON_PRIVATE]
    assert gradient_error(plain, WORKLOADS["mlp"]) > 10 * WRONG


def test_noise_is_added_by_each_engine() -> None:
    """With a tiny clipping norm a step is noise alone; its standard deviation is sigma C / B. Over
    288 parameters 20 % is 4.8 standard errors, so a false alarm is one in 600 000."""
    recipe = WORKLOADS["mlp"]
    for name in ("dptorch/auto", "opacus/hooks", "opacus/ghost", "torch.func/vmap"):
        work = recipe.make(recipe.tiny)
        before = torch.cat([p.detach().clone().flatten() for p in work.model.parameters()])
        start(ENGINES[name], work, Settings(noise_multiplier=1e4, max_grad_norm=1e-4, lr=1.0))
        after = torch.cat([p.detach().flatten() for p in work.model.parameters()])
        std = (after - before).std().item() * recipe.tiny.B
        assert std == pytest.approx(1.0, rel=0.2), name


def test_choosing_engines() -> None:
    assert [e.name for e in choose(ENGINES, ["opacus"])] == [
        "opacus/hooks",
        "opacus/ghost",
        "opacus/functorch",
    ]
    assert len(choose(ENGINES, [])) == len(ENGINES)
    with pytest.raises(ConfigurationError, match="opacus"):
        choose(ENGINES, ["opakus"])


def test_an_engine_that_cannot_run_says_why() -> None:
    work = WORKLOADS["reused"].make(Size(2, d=4))
    with pytest.raises(Unavailable, match="tying is not supported"):
        start(ENGINES["opacus/ghost"], work)


@pytest.mark.parametrize("folder", ["private_CNN", "private_vision"])
def test_peers_are_looked_for_and_a_broken_one_is_reported(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match="fastDP"):
        read_peers([f"fastdp={tmp_path}"])
    with pytest.raises(ConfigurationError, match="fastdp"):
        read_peers([f"fastpd={tmp_path}"])
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "__init__.py").write_text("import no_such_package\n")
    monkeypatch.delitem(sys.modules, folder, raising=False)
    (engine,) = peer_engines(read_peers([f"private_vision={tmp_path}"]))
    with pytest.raises(Unavailable, match="no_such_package"):
        start(engine, WORKLOADS["mlp"].make(Size(2, d=4)))


# -- memory ----------------------------------------------------------------------------------------


def test_the_allocators_peak_is_a_peak_and_no_sum() -> None:
    size = 4 * 10**6

    def step() -> None:
        for _ in range(3):
            torch.ones(10**6)

    def both() -> list[torch.Tensor]:
        return [torch.ones(10**6) for _ in range(3)]

    assert size <= allocator_peak(step, CPU) < 1.1 * size
    assert 3 * size <= allocator_peak(lambda: both() and None, CPU) < 3.1 * size


@pytest.mark.slow
def test_the_largest_batch_is_found() -> None:
    """One example takes 1 MiB of a cap 100 MiB above what the process has."""
    if memory._begin_resident() is None:
        pytest.skip("peaks of the resident set are only known on Linux")
    cap = memory._resident("VmRSS") + 100 * 2**20
    kept = []

    def begin(B: int) -> Step:
        def step() -> None:
            kept.append(torch.ones(B, 2**18))
            kept.clear()

        return step

    assert 85 <= largest_batch(begin, cap, CPU) <= 101
    assert largest_batch(begin, 2**20, CPU) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("python_forks")
def test_a_process_of_its_own() -> None:
    question = Question("mlp", "dptorch/auto", {"B": 8, "T": None, "d": 64})
    peaks = ask(question)
    # Less than the sum of one step's activations, weights and gradients is no peak.
    assert peaks["allocator"] is not None
    assert 4 * 64 * 64 * 4 < peaks["allocator"] < 2**20
    with pytest.raises(Unavailable, match="tying"):
        ask(replace(question, workload="reused", engine="opacus/ghost"))
    with pytest.raises(Unavailable, match=r"process died.*nothing"):
        ask(replace(question, engine="nothing"))


def test_a_step_on_the_largest_batch_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    question = Question("mlp", "dptorch/auto", {"B": 4, "T": None, "d": 8}, cap=1)
    monkeypatch.setattr(worker, "largest_batch", lambda begin, cap, device: 3)
    found = worker.answer(question)
    assert (found["batch"], found["step_us"] > 0) == (3, True)
    monkeypatch.setattr(worker, "largest_batch", lambda begin, cap, device: 0)
    assert worker.answer(question) == {"batch": 0, "step_us": None}


def test_amounts_of_memory() -> None:
    assert memory_bytes("2 GiB") == 2**31
    for wrong in ("", "GB", "-1GB", "4 XB", "nan"):
        with pytest.raises(ConfigurationError, match="4GB"):
            memory_bytes(wrong)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """All workloads at their tiny size, in an empty folder."""
    for name, recipe in WORKLOADS.items():
        monkeypatch.setitem(WORKLOADS, name, replace(recipe, size=recipe.tiny))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bench(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bench", "--threads", "1", *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.mark.slow
def test_a_run_writes_everything(tiny: Path) -> None:
    (tiny / "docs").mkdir()
    chosen = ("--engine", "dptorch/auto", "--engine", "opacus/ghost", "--no-memory", "--docs")
    code, out = bench("mlp", "functional_tie", "reused", *chosen, "--rounds", "2")
    assert code == 0, out
    [place] = (tiny / "docs/cost").iterdir()  # named after this machine's processor
    with (place / "cost.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [f.name for f in fields(Row)]
    assert len(rows) == 3 * 3
    ours = [r for r in rows if r["engine"] == "dptorch/auto"]
    assert all(float(r["ratio"]) > 0 and float(r["gradient_error"]) < WRONG for r in ours)
    (refused,) = [r for r in rows if r["reason"]]
    assert (refused["workload"], refused["engine"]) == ("reused", "opacus/ghost")
    text = (tiny / "docs/cost.md").read_text()
    assert f"](cost/{place.name}/cost.svg)" in text
    assert (place / "cost.svg").exists()
    assert "tying is not supported" in text
    assert f"torch {torch.__version__}" in text
    for word in ("load average", "threads", "2 rounds", "opacus 1."):
        assert word in text
    # And sweeps beside it are added to the page.
    code, out = bench("--sweep", "B", "--sweep", "L", "mlp", "--no-memory", "--rounds", "1",
                      "--engine", "dptorch/auto", "--docs")  # fmt: skip
    assert code == 0, out
    text = (tiny / "docs/cost.md").read_text()
    assert "| engine | B=1 | B=2 | B=4 | B=8 |" in text
    assert "| engine | L=1 | L=2 | L=4 | L=8 |" in text
    # L layers of 8 x 8 weights and 8 biases.
    assert "| trained parameters | 72 | 144 | 288 | 576 |" in text
    assert "### Time and memory" in text
    assert (place / "sweep-B.svg").exists()


def test_the_largest_batch_from_the_command_line(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(question: Question) -> dict[str, int | None]:
        assert question.cap == 10**9
        if question.engine == "opacus/ghost":
            raise Unavailable("it is told not to")
        return {"batch": 7 if question.engine == NON_PRIVATE else 5, "step_us": 2000}

    monkeypatch.setattr(suite, "ask", answer)
    code, out = bench("--largest-batch", "--memory-cap", "1GB", "mlp")
    assert code == 0, out
    assert "told not to" in out
    text = (tiny / "bench/cost.md").read_text()
    assert "| mlp | 7 | 5 |" in text
    assert "| mlp | 3500 | 2500 |" in text  # examples a second
    assert "1 GB" in text


def test_a_wrong_gradient_is_no_best_of_anything(tmp_path: Path) -> None:
    wrong = Row("mlp", "peer/wrong", 2, None, 4, ratio=1.1, gradient_error=0.5)
    right = Row("mlp", "peer/right", 2, None, 4, ratio=1.5, gradient_error=1e-6)
    failed = Row("mlp", "peer/none", 2, None, 4, ratio=1.0, gradient_error=float("nan"))
    run = Measurements("cost", "dptorch bench", MACHINE, {}, [wrong, right, failed])
    save(run, tmp_path)
    text = page(load(tmp_path))
    assert "| mlp, B=2, d=4 | 1.50 |" in text
    assert "(1.10)" in text
    [kept] = json.loads((tmp_path / "some-processor/cost.json").read_text())
    assert kept["kind"] == "cost"


def test_a_run_replaces_what_it_measures_and_leaves_other_workloads(tmp_path: Path) -> None:
    def run(command: str, **ratios: float) -> Measurements:
        rows = [Row(w, "dptorch/auto", 2, None, 4, ratio=r) for w, r in ratios.items()]
        return Measurements("cost", command, MACHINE | {"date": command}, {}, rows)

    save(run("first", mlp=1.11, vit=1.22), tmp_path)
    save(run("second", vit=1.33, gpt2=1.44), tmp_path)
    first, second = load(tmp_path)
    assert [r.workload for r in first.rows] == ["mlp"]
    assert [r.ratio for r in second.rows] == [1.33, 1.44]
    text = page([first, second])
    assert "mlp:" in text
    assert "vit, gpt2:" in text
    assert "1.22" not in text
    assert text.index("first") < text.index("second")
    assert len((tmp_path / "some-processor/cost.csv").read_text().splitlines()) == 4
    save(run("third", mlp=1.55), tmp_path)
    assert [r.command for r in load(tmp_path)] == ["second", "third"]


def test_each_processor_keeps_its_numbers(tmp_path: Path) -> None:
    """One name may stand for processors with other instructions, as it does on rented machines."""
    older = MACHINE | {"instructions": "AVX-512"}
    for facts, ratio in ((older, 1.11), (MACHINE, 1.22), (older | {"date": "later"}, 1.33)):
        row = Row("mlp", "dptorch/auto", 2, None, 4, ratio=ratio, gradient_error=0.0)
        save(Measurements("cost", "dptorch bench mlp", facts, {}, [row]), tmp_path)
    text = page(load(tmp_path))
    alone, wide = text.split("## Some Processor with AVX-512")
    assert "## Some Processor\n" in alone
    for part, shown, elsewhere in ((alone, "| 1.22 |", "| 1.33 |"), (wide, "| 1.33 |", "| 1.22 |")):
        assert shown in part
        assert elsewhere not in part
    assert "| 1.11 |" not in text
    assert "](some-processor-with-avx-512/cost.svg)" in wide


def test_memory_is_a_ratio_to_the_ordinary_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {NON_PRIVATE: 2**20, "dptorch/auto": 3 * 2**20}
    monkeypatch.setattr(
        suite, "ask", lambda question: {"allocator": peaks[question.engine], "resident": None}
    )
    recipe = replace(WORKLOADS["mlp"], size=WORKLOADS["mlp"].tiny)
    options = Options([ENGINES["dptorch/auto"]], rounds=1, check=False)
    plain, ours = measure(recipe, options, tell=lambda text, over: None)
    assert (plain.allocator_ratio, ours.allocator_ratio) == (1.0, 3.0)
    assert (ours.allocator_mib, ours.resident_mib) == (3.0, None)


def test_an_engine_that_fails_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def attach(work: Workload, settings: Settings) -> Step:
        raise RuntimeError("this one\nnever works")

    recipe = replace(WORKLOADS["mlp"], size=WORKLOADS["mlp"].tiny)
    options = Options([Engine("broken/one", "", attach)], rounds=1, memory=False)
    plain, broken = measure(recipe, options, tell=lambda text, over: None)
    assert plain.ratio is not None
    assert broken.ratio is None
    assert broken.reason == "RuntimeError: this one never works"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nlp",), "mlp"),
        (("--engine", "opakus"), "opacus"),
        (("--sweep", "b", "mlp"), "B"),
        (("--sweep", "B", "--largest-batch"), "give one"),
        (("--sweep", "T", "mlp"), "has a T"),
        (("--sweep", "B", "--sweep", "L", "--values", "1", "mlp"), "give one"),
        (("--sweep", "B", "--values", "1,x"), "positive numbers"),
        (("--largest-batch", "--memory-cap", "much"), "4GB"),
        (("--dtype", "fp8"), "fp32"),
        (("--device", "tpu"), "cpu or cuda"),
        (("--peer", "fastdp=/nowhere"), "fastDP"),
        (("--docs", "mlp"), "docs"),
    ],
)
def test_wrong_arguments_are_explained(
    arguments: tuple[str, ...], message: str, tiny: Path
) -> None:
    code, out = bench(*arguments)
    assert code == 2
    assert message in out
    assert not list(tiny.iterdir())


def test_the_list_names_all(tiny: Path) -> None:
    code, out = bench("--list")
    assert code == 0
    for name in (*WORKLOADS, *ENGINES):
        assert name in out


def test_the_path_of_a_checkout_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    from dptorch.cli.bench import _command

    arguments = ["dptorch", "bench", "--peer", "fastdp=/home/me/x", "--peer=private-vision=/y"]
    monkeypatch.setattr("sys.argv", arguments)
    assert _command() == "dptorch bench --peer fastdp=PATH --peer=private-vision=PATH"
