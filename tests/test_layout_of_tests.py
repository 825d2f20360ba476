"""Where tests are: a module's beside its like, shared code in modules that are no tests.

``src/dptorch/a/b.py`` has its tests in ``tests/a/test_b.py``. Beside these stand tests that ask one
question of many modules (`test_privacy`, `test_attacks`, `test_exactness`).
"""

from __future__ import annotations

import ast
from pathlib import Path

from tests.source import REPOSITORY, TESTS, nodes, trees

SOURCE = REPOSITORY / "src" / "dptorch"

#: Modules without a test module of their name, by file or by folder: who tests them, and why there.
ELSEWHERE = {
    "accounting/accountants/": ("accounting/test_reference.py", "each against the same table"),
    "accounting/arguments.py": ("accounting/test_bad_input.py", "all it does is refuse"),
    "accounting/composition/": ("accounting/test_oracles.py", "each against the same integrals"),
    "accounting/pairs/": ("accounting/test_oracles.py", "each against the same integrals"),
    "accounting/planning/calibration.py": ("accounting/planning/test_solve.py", "solves for noise"),
    "audit/audit_charts.py": ("audit/test_audit_page.py", "charts are looked at on the page"),
    "audit/auditing.py": ("audit/test_white_box.py", "chooses between the two audits"),
    "audit/black_box.py": ("audit/test_runs.py", "audits what a run has left"),
    "audit/bounds/": ("audit/test_bounds.py", "each against the same reference values"),
    "audit/evidence.py": ("audit/test_white_box.py", "what every game ends in"),
    "audit/games/": ("audit/test_white_box.py", "what a game is for is the verdict"),
    "audit/laws/": ("audit/test_laws.py", "each law, and faults that one of them finds"),
    "audit/membership/": ("audit/test_membership.py", "one attack, in parts"),
    "audit/result.py": ("audit/test_white_box.py", "the verdict of every audit"),
    "audit/roc.py": ("audit/test_audit_page.py", "curves are looked at on the page"),
    "audit/scores/": ("audit/test_scores.py", "each by its definition, and on the same models"),
    "audit/thresholds.py": ("audit/test_bounds.py", "chosen for the bounds"),
    "bench/": ("bench/test_bench.py", "one suite, in parts"),
    "blogs/": ("blogs/test_engine.py", "the engine's steps and what it says of them"),
    "cli/app.py": ("cli/test_plan_commands.py", "where the commands without training are"),
    "cli/audit.py": ("audit/test_runs.py", "where there are runs to audit"),
    "cli/bench.py": ("bench/test_bench.py", "where there are measurements to print"),
    "cli/plan_noise.py": ("cli/test_plan_commands.py", "one test asks all planning commands"),
    "cli/calibrate.py": ("cli/test_plan_commands.py", "one test asks all planning commands"),
    "cli/check.py": ("validation/test_gradient_check.py", "where there are models to check"),
    "cli/export.py": ("training/test_predictor.py", "where there are predictions to compare"),
    "cli/compare.py": ("training/test_comparison.py", "where there are runs to compare"),
    "cli/epsilon.py": ("cli/test_plan_commands.py", "one test asks all planning commands"),
    "cli/plan.py": ("cli/test_plan_commands.py", "one test asks all planning commands"),
    "cli/progress.py": ("cli/test_train.py", "shows what a run tells"),
    "cli/scale.py": ("distributed/test_cost.py", "where the numbers are that it says"),
    "cli/release.py": ("training/test_release.py", "where there are runs to release"),
    "cli/generate.py": ("cli/test_train_text.py", "writes what was trained"),
    "cli/train_vision.py": ("vision/test_command.py", "where there are pictures to train on"),
    "cli/tune.py": ("training/test_selection.py", "where there are runs to choose from"),
    "cli/vision_options.py": ("vision/test_command.py", "options of this command alone"),
    "cli/text_options.py": ("cli/test_train_text.py", "options of these commands alone"),
    "cli/statement.py": ("training/test_claims.py", "where there are runs to state"),
    "cli/train_options.py": ("cli/test_options.py", "one table of all options"),
    "clipping/rounding.py": ("noise/test_discrete.py", "rounds for the discrete mechanism alone"),
    "clipping/sums.py": ("engine/test_privacy.py", "types; the bound is the engine's to keep"),
    "compat/": ("compat/test_opacus_scenarios.py", "other libraries' calls, by scenario"),
    "distributed/": ("distributed/test_ranks.py", "what ranks do together"),
    "engine/loading.py": ("engine/test_sampling.py", "what is loaded is what was drawn"),
    "engine/": ("engine/test_privacy.py", "asked as a whole, one question a file"),
    "integrations/membership.py": ("audit/test_membership.py", "calls the attack after an epoch"),
    "integrations/transformers/": (
        "integrations/transformers/test_trainers.py", "parts of one trainer"),
    "ledger/chain.py": ("ledger/test_datasets.py", "a chain is verified over entries"),
    "ledger/": ("ledger/test_datasets.py", "asked as a whole, on both databases"),
    "native/": ("noise/test_compiled.py", "where there is code to compile"),
    "noise/": ("noise/test_gaussian.py", "parts of the Gaussian mechanism"),
    "plan/": ("test_plan.py", "a plan, and how it is made"),
    "prediction/accounts.py": ("prediction/test_predictor.py", "a predictor charges them"),
    "prediction/statement.py": ("prediction/test_predictor.py", "what a predictor says"),
    "sampling/": ("sampling/test_laws.py", "each scheme by the same brute force"),
    "tables/faults.py": ("tables/test_encoding.py", "where there are rows with faults"),
    "tables/preprocessing.py": ("tables/test_encoding.py", "the second half of the way to features"),
    "tables/rows.py": ("tables/test_encoding.py", "another way for rows to come in"),
    "tape/gradients/": ("tape/test_exactness.py", "forms and sums, each model against the loop"),
    "tape/propagation/": ("tape/test_dispatch.py", "an op is tested where it is called"),
    "tape/provenance/": ("tape/test_dispatch.py", "an op is tested where it is called"),
    "tape/recording/": ("tape/test_in_practice.py", "what is recorded shows in gradients"),
    "tape/rules/": ("tape/test_rules_property.py", "one property for every rule"),
    "training/canaries.py": ("audit/test_runs.py", "planted for the audit"),
    "training/digest.py": ("training/test_predictor.py", "where there are predictions to change"),
    "training/export.py": ("training/test_predictor.py", "where there are predictions to compare"),
    "training/groups.py": ("cli/test_predict.py", "where there are subgroups to tell apart"),
    "training/hyperparameters.py": ("cli/test_options.py", "numbers that the help shows"),
    "training/job.py": ("training/test_loop.py", "a job is what the loop runs"),
    "training/origin.py": ("vision/test_weights.py", "of runs on pictures, which have --init"),
    "training/task.py": ("training/test_loop.py", "what a run trains for"),
    "training/preparation.py": ("training/test_predictor.py", "what a predictor does first"),
    "training/table_tasks.py": ("training/test_table_data.py", "weights are a schema's"),
    "training/pretrained_files.py": ("text/test_predictor.py", "where a model is published"),
    "training/run_charts.py": ("training/test_run_page.py", "charts are looked at on the page"),
    "text/": ("text/test_job.py", "one task from rows to a trained model, in parts"),
    "vision/": ("vision/test_job.py", "one task from files to a trained network, in parts"),
    "validation/": ("validation/test_gradient_check.py", "parts of the check"),
}  # fmt: skip


def own(source: Path, tests: Path) -> tuple[list[str], list[str]]:
    """Modules with a test module of their name, and those without."""
    found: tuple[list[str], list[str]] = ([], [])
    for path in sorted(source.rglob("*.py")):
        module = path.relative_to(source)
        if not module.stem.startswith("__"):
            where = tests / module.parent / f"test_{module.name}"
            found[not where.exists()].append(str(module))
    return found


def covers(entry: str, module: str) -> bool:
    return module == entry or (entry.endswith("/") and module.startswith(entry))


def test_every_module_has_tests_where_a_reader_looks() -> None:
    _, without = own(SOURCE, TESTS)
    lost = [m for m in without if not any(covers(entry, m) for entry in ELSEWHERE)]
    assert lost == [], "write tests/<room>/test_<module>.py, or say in ELSEWHERE who tests it"


def test_exceptions_are_needed_and_name_a_test() -> None:
    _, without = own(SOURCE, TESTS)
    assert [e for e in ELSEWHERE if not any(covers(e, m) for m in without)] == []
    assert [file for file, _ in ELSEWHERE.values() if not (TESTS / file).exists()] == []


def test_a_module_without_tests_is_seen(tmp_path: Path) -> None:
    for file in ("src/room/a.py", "src/room/b.py", "tests/room/test_a.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert own(tmp_path / "src", tmp_path / "tests") == (["room/a.py"], ["room/b.py"])


def imported_tests(tree: ast.Module) -> list[str]:
    """Test modules that a file imports, lazily too."""
    names: list[str] = []
    for node in nodes(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return [name for name in names if name.startswith("tests.") and ".test_" in name]


def test_no_test_module_is_imported() -> None:
    """What tests share is in a module that is no test: it is collected once, and found by its name."""
    found = {name: imported for name, tree in trees().items() if (imported := imported_tests(tree))}
    assert found == {}


def test_an_imported_test_module_is_seen() -> None:
    lazy = "def f():\n    from tests.engine.test_privacy import recorded_sums"
    assert imported_tests(ast.parse(lazy))
    assert imported_tests(ast.parse("import tests.ledger.test_kill"))
    assert not imported_tests(ast.parse("from tests.engine.setup import train"))
