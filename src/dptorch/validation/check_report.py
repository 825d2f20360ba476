"""The findings of `dptorch.check`, as data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["CheckReport", "Finding", "ParameterRow"]


_LISTED = ("inexact", "examples mix", "not covered")


@dataclass(frozen=True)
class ParameterRow:
    """How one parameter fared.

    Attributes:
        name, shape: of the parameter.
        status: "exact"; "inexact"; "examples mix"; "no gradient": no example of this batch reaches
            it, or its gradient is zero for all of them; "not covered": the tape cannot follow it;
            "not compared".
        error: largest relative error, over the examples, of its per-example gradients, its norms
            and its clipped sum; NaN where none was compared.
        uses: how many ops take it.
        slow_ops: those among them without a rule of their own.
    """

    name: str
    shape: tuple[int, ...]
    status: str
    error: float
    uses: int
    slow_ops: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """One thing to know about the model.

    Attributes:
        kind: "examples mix", "inexact", "not covered", "random", "no gradient", "slow" or "escape".
        where: the module, parameter or function it is about.
        message: what was found, and the way out.
        fault: whether the model cannot be trained privately as it is, or could not be verified.
    """

    kind: str
    where: str
    message: str
    fault: bool


@dataclass(frozen=True)
class CheckReport:
    """The result of `dptorch.check`; ``print`` it.

    Attributes:
        model: class name.
        examples: how many were compared.
        dtype: the precision of the comparison.
        mode: what the modules were set to: "training, without chance", "training" or "evaluation".
        loss_reduction: "sum", "mean" or "none" (one value for each example); "" if not known.
        tolerance: largest relative error that counts as exact.
        error: largest relative error of a whole example's gradient norm; NaN if not compared.
        leakage: largest relative change of one example's gradient when another example is replaced;
            NaN if not compared.
        parameters: one row for each trainable parameter.
        findings: faults first.
    """

    model: str
    examples: int
    dtype: str
    mode: str
    loss_reduction: str
    tolerance: float
    error: float
    leakage: float
    parameters: tuple[ParameterRow, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether no fault was found."""
        return not any(f.fault for f in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON (`error` and `leakage` may be NaN)."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        return self.table()

    def table(self, *, every_parameter: bool = False) -> str:
        """The report as text.

        Args:
            every_parameter: list every parameter, not only those at fault.
        """
        lines = [
            f"{self.model}: {'ok' if self.ok else 'NOT ok'}",
            f"  {self.examples} examples, {self.dtype}, {self.mode}, "
            f"loss reduction {self.loss_reduction or 'unknown'}",
            f"  norms against a loop over single examples: error {_number(self.error)} "
            f"(tolerance {self.tolerance:.0e})",
            f"  gradients when another example changes: change {_number(self.leakage)}",
        ]
        total = len(self.parameters)
        for status in dict.fromkeys(r.status for r in self.parameters):
            rows = [r for r in self.parameters if r.status == status]
            worst = max(r.error for r in rows)
            error = "" if worst != worst else f", error at most {_number(worst)}"
            lines.append(f"  parameters {status}: {len(rows)} of {total}{error}")
        shown = [r for r in self.parameters if every_parameter or r.status in _LISTED]
        if shown:
            lines += ["", *_columns(shown)]
        for fault, title in ((True, "Faults"), (False, "Notes")):
            chosen = [f for f in self.findings if f.fault is fault]
            if chosen:
                lines += ["", title, *(f"  {f.kind}: {f.where}\n    {f.message}" for f in chosen)]
        return "\n".join(lines)


def _number(x: float) -> str:
    return "not compared" if x != x else f"{x:.1e}"


def _columns(rows: list[ParameterRow]) -> list[str]:
    cells = [("parameter", "shape", "uses", "status", "error", "slow ops")]
    for r in rows:
        shape = "x".join(map(str, r.shape)) or "scalar"
        error = "" if r.error != r.error else f"{r.error:.1e}"
        cells.append((r.name, shape, str(r.uses), r.status, error, ", ".join(r.slow_ops)))
    widths = [max(len(row[i]) for row in cells) for i in range(6)]
    return [
        "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
