"""Command lines on pages, held against the commands that there are."""

from __future__ import annotations

import re
import shlex
from typing import Any


def shell_lines(text: str) -> list[str]:
    """Commands of dptorch in blocks of code; a line that ends in a backslash goes on."""
    lines = text.replace("\\\n", " ").splitlines()
    starts = re.compile(r"(?:    |\$ )?\s*(dptorch [a-z].*)")
    fenced, found = False, []
    for line in lines:
        fenced ^= line.startswith("```")
        match = starts.fullmatch(line)
        if match and (fenced or line.startswith("    ")):
            found.append(match[1].split("  #")[0].split(" > ")[0].split(" >> ")[0])
    return found


def unknown(line: str, known: dict[str, Any]) -> list[str]:
    """What a command line has that no command takes: a command, options, or arguments too many."""
    words = shlex.split(line, comments=True)
    name = words.pop(0)
    while words and f"{name} {words[0]}" in known:
        name = f"{name} {words.pop(0)}"
    if name == "dptorch":
        return words[:1]
    command = known[name]
    has = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
    options = {word.split("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
    wrong = sorted(options - has - {"--help"})
    context = command.make_context(name, words, resilient_parsing=True)
    return wrong or [*context.args, *getattr(context, "_protected_args", [])]
