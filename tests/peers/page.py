"""Write docs/compatibility.md from what came of every test and example."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from tests.peers.reasons import NOT_APPLICABLE, REFUSED, Verdict

__all__ = ["render"]

_HEAD = """\
# Other libraries' tests and examples on the adapters

Written by

    {command}

The runner takes a checkout of the library, changes its import lines and nothing else
(`import opacus` becomes `import dptorch.compat.opacus as opacus`), and runs its own tests and examples.
Nothing of theirs is in this repository. [migrating.md](migrating.md) says what each call means here.

The examples run to the end of an epoch on tiny files in the formats of their data sets, with small
random models in the place of published ones, without workers of loaders, and on the CPU where there is
no GPU. Notebooks run as the script of their code cells. The text scripts were written for
transformers 4. For names that transformers 5 has removed (`AdamW`, `EvaluationStrategy`, the readers of
GLUE), and for the helpers of `ml_swissknife` and `fire`, the runner has stand-ins of its own
(`tests/peers/former_names.py`). Tests that draw random cases (Hypothesis) draw at least {cases} each.
dptorch's keys are drawn from a fixed seed, so that the page can be written again.

- *passed*: as it stands.
- *refused on purpose*: what it asks for is unsound, or has another meaning here, and an error or
  another number says so.
- *not applicable*: it reads internals of the library, or needs what the machine has not.
"""
_KINDS = ("passed", REFUSED, NOT_APPLICABLE, "unexplained")


def render(
    peers: Iterable[str],
    found: Mapping[str, tuple[Mapping[str, Verdict], Mapping[str, Verdict]]],
    versions: Mapping[str, str],
    command: str,
    cases: int,
    before: str = "",
) -> str:
    """The page: for each peer what came of its (tests, examples).

    Args:
        peers: names, in order.
        found: of those that were run; the others stay as they are on the page before.
        versions: what each was run on.
        command: that writes the page.
        cases: that a Hypothesis test draws.
        before: the page as it was.
    """
    lines = [_HEAD.format(command=command, cases=cases)]
    lines += ["| library | | " + " | ".join(_KINDS) + " |", "|---|---|" + "---|" * len(_KINDS)]
    for peer in peers:
        if peer not in found:
            lines += [row for row in before.splitlines() if row.startswith(f"| {peer} | ")]
            continue
        for part, verdicts in zip(("tests", "examples"), found[peer], strict=True):
            if verdicts:
                lines.append(f"| {peer} | {part} | {_counts(verdicts.values())} |")
    for peer in peers:
        if peer not in found:
            section = re.search(rf"^## {re.escape(peer)}\n.*?(?=^## |\Z)", before, re.M | re.S)
            lines += ["", section[0].rstrip()] if section else []
            continue
        tests, examples = found[peer]
        lines += ["", f"## {peer}", "", f"Run on {versions[peer]}."]
        if tests:
            lines += ["", "| test file | " + " | ".join(_KINDS) + " |", "|---|" + "---|" * 4]
            files: dict[str, list[Verdict]] = defaultdict(list)
            for test, verdict in tests.items():
                files[test.partition("::")[0].removeprefix("suite/")].append(verdict)
            lines += [f"| `{file}` | {_counts(each)} |" for file, each in sorted(files.items())]
        if examples:
            lines += ["", "| example | outcome |", "|---|---|"]
            lines += [
                f"| `{title}` | {v.kind}{': ' + v.why if v.why else ''} |"
                for title, v in examples.items()
            ]
        lines += _reasons(tests)
    return "\n".join(lines) + "\n"


def _counts(verdicts: object) -> str:
    counts = Counter(v.kind for v in verdicts)  # type: ignore[attr-defined]
    return " | ".join(str(counts[kind]) for kind in _KINDS)


def _reasons(tests: Mapping[str, Verdict]) -> list[str]:
    """Each reason with the tests that it explains."""
    named: dict[tuple[str, str], list[str]] = defaultdict(list)
    for test, verdict in tests.items():
        if verdict.kind != "passed":
            named[verdict.kind, verdict.why].append(test.rpartition("::")[2].rpartition("/")[2])
    lines: list[str] = []
    for kind in _KINDS[1:]:
        of_kind = {why: sorted(set(t)) for (k, why), t in named.items() if k == kind}
        if of_kind:
            lines += ["", f"### Tests {kind}", ""]
            lines += [f"- {why} {_list(found)}" for why, found in of_kind.items()]
    return lines


def _list(tests: list[str]) -> str:
    return "(" + ", ".join(f"`{t}`" for t in tests) + ")"
