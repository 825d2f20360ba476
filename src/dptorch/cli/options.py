"""Options that several commands share, each written once, and commands that take groups of options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup
from typing_extensions import Unpack

if TYPE_CHECKING:
    from dptorch.plan import PlanSettings

__all__ = [
    "LENGTH",
    "AsJson",
    "Command",
    "Group",
    "RunOptions",
    "flag_of",
    "grouped",
    "panel_option",
    "plan_option",
]

SAMPLING, LENGTH = "Sampling: two of these", "Length: one of these"

AsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]

#: What each setting of a plan means on the command line, by its name in `dptorch.plan.PlanSettings`.
_HELP: Final[Mapping[str, str]] = {
    "sample_rate": "Probability with which each example enters a batch.",
    "batch_size": "Expected batch size.",
    "sample_size": "Number of training examples.",
    "sampling": "How batches are drawn: poisson, truncated-poisson (constant shapes), "
    "random-allocation, fixed-size, shuffled, ... Each has its own ε.",
    "epochs": "Passes over the data.",
    "steps": "Training steps.",
    "target_epsilon": "Budget of the whole run.",
    "noise_multiplier": "Standard deviation of the noise divided by the clipping norm.",
    "target_delta": "Probability that the guarantee fails. Choose it well below 1 / number of "
    "examples.",
    "max_grad_norm": "Clipping norm C: bound on the norm of one example's gradient.",
    "clipping_fn": "How gradients are clipped: abadi, automatic, ...",
    "mechanism": "The noise: gaussian; banded, correlated over steps, which leaves less of it in the "
    "model; inverse-banded, the same without sampling; buffered-toeplitz, that for long runs; or "
    "discrete_gaussian, which needs --accountant rdp: whole numbers, added to gradients rounded to "
    "whole numbers. It is slower.",
    "bands": "Over how many steps noise is correlated; auto: the number that leaves the least noise. "
    "See dptorch plan --mechanism banded. Of buffered-toeplitz: how many buffers.",
    "coefficients": "What correlated noise is optimised for: prefix-sum (SGD at a constant rate), sgd "
    "(this run's momentum and learning rates), or square-root, which is not optimised.",
    "accountant": "Who computes ε: pld, exact, rdp, prv, gdp.",
    "adjacency": "Which data sets must be indistinguishable: add-remove, zero-out, replace-one.",
}
_FLAGS: Final = {"target_epsilon": "--epsilon", "target_delta": "--delta"}
_DEFAULTS: Final[Mapping[str, str | bool]] = {
    "target_delta": "1 / (10 N), at most 1e-5, as a power of ten",
    "sampling": True,
    "mechanism": True,
    "accountant": True,
    "bands": "auto with a target ε, else at most 8",
    "coefficients": "prefix-sum for banded and buffered-toeplitz, square-root for inverse-banded",
}


def panel_option(
    panel: str, *flags: str, help: str, default: str | bool = True, **more: Any
) -> Any:
    """Return an option that the help shows under the heading `panel`."""
    return typer.Option(*flags, help=help, show_default=default, rich_help_panel=panel, **more)


def plan_option(
    name: str, panel: str | None = None, *, more: str = "", default: str | bool | None = None
) -> Any:
    """Return the option of a plan's setting.

    Args:
        name: of the setting in `dptorch.plan.PlanSettings`.
        panel: under which heading the help shows it.
        more: appended to its help.
        default: shown as its default in the help.
    """
    return typer.Option(
        *([_FLAGS[name]] if name in _FLAGS else []),
        help=f"{_HELP[name]} {more}".strip(),
        show_default=_DEFAULTS.get(name, False) if default is None else default,
        rich_help_panel=panel,
    )


def flag_of(parameter: Any) -> str:
    """Return the long flag of an option, or the name of an argument."""
    return max(parameter.opts, key=len)


class Command(TyperCommand):
    """A command whose help shows a switch as what is typed: ``--json``, without ``<bool>``."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return its parameters, ``--help`` among them."""
        return _bare_switches(super().get_params(ctx))


class Group(TyperGroup):
    """The same for a command that has commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return its parameters, ``--help`` among them."""
        return _bare_switches(super().get_params(ctx))


def _bare_switches(parameters: list[Any]) -> list[Any]:
    """Remove the type from the help of switches."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of each group among its parameters, in its place.

    A group is a dataclass whose fields are annotated as options. The command receives it filled.

    Example:
        >>> @dataclass(frozen=True)
        ... class Place:
        ...     folder: Annotated[str, typer.Option(help="Where.")] = "here"
        >>> def show(place: Place, as_json: AsJson = False) -> None:
        ...     print(place.folder, as_json)
        >>> grouped(show)(folder="there")
        there False
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if is_dataclass(kind):
            groups[parameter.name] = kind
            parameters += _options_of(kind)
        else:
            only = inspect.Parameter.KEYWORD_ONLY
            parameters.append(parameter.replace(kind=only, annotation=kind))

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        names = {f.name for kind in groups.values() for f in fields(kind)}
        rest = {name: value for name, value in given.items() if name not in names}
        filled = {
            name: kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given})
            for name, kind in groups.items()
        }
        command(**filled, **rest)

    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


def _options_of(kind: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if f.default is MISSING else f.default,
            annotation=hints[f.name],
        )
        for f in fields(kind)
    ]


@dataclass(frozen=True)
class RunOptions:
    """The settings of a plan that describe a run: its sampling, its length, who accounts."""

    sample_rate: Annotated[float | None, plan_option("sample_rate", SAMPLING)] = None
    batch_size: Annotated[float | None, plan_option("batch_size", SAMPLING)] = None
    sample_size: Annotated[
        int | None,
        plan_option(
            "sample_size", SAMPLING, more="Not needed if --sample-rate and --delta are given."
        ),
    ] = None
    sampling: Annotated[str, plan_option("sampling")] = "poisson"
    epochs: Annotated[float | None, plan_option("epochs", LENGTH)] = None
    steps: Annotated[int | None, plan_option("steps", LENGTH)] = None
    target_delta: Annotated[float | None, plan_option("target_delta")] = None
    mechanism: Annotated[str, plan_option("mechanism")] = "gaussian"
    bands: Annotated[str | None, plan_option("bands")] = None
    accountant: Annotated[str, plan_option("accountant")] = "pld"
    adjacency: Annotated[
        str | None,
        plan_option("adjacency", default="zero-out with --sample-size, else add-remove"),
    ] = None

    def settings(self, **more: Unpack[PlanSettings]) -> PlanSettings:
        """Return the arguments of `dptorch.plan.make_plan`, `more` among them."""
        found: Any = vars(self) | more
        if self.sample_rate is not None and self.batch_size is None and self.sample_size is None:
            found["batch_size"] = 1.0  # the divisor of the noisy sum, on which ε does not depend
        settings: PlanSettings = found
        return settings
