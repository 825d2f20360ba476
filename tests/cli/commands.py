"""Commands as a user types them."""

from click.testing import Result
from typer.testing import CliRunner

from dptorch.cli.app import app

QUICK = ("--label", "kind", "--epochs", "2", "--noise-multiplier", "2")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def refused(result: Result) -> str:
    """The message of a command that failed as it should: one line, no traceback."""
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Error: ")
    return lines[0]
