"""A section of a page that a script writes, in a page whose rest is written elsewhere."""

from __future__ import annotations

__all__ = ["put"]


def put(page: str, section: str, before: str = "") -> str:
    """The page with `section` in place of the one of its title, up to the next of that level.

    Args:
        page: Markdown.
        section: begins with its title, "## ...", and ends with an empty line.
        before: the title of the section before which a new one goes; by default it goes to the end.

    Example:
        >>> put("# Page\\n\\n## A\\n\\nold\\n\\n## B\\n", "## A\\n\\nnew\\n\\n")
        '# Page\\n\\n## A\\n\\nnew\\n\\n## B\\n'
    """
    title = section.partition("\n")[0] + "\n"
    head, found, rest = page.partition(title)
    if found:
        _, following, after = rest.partition("\n## ")
        return head + section + (f"## {after}" if following else "")
    if before:
        head, found, rest = page.partition(before + "\n")
        return head + section + found + rest
    return page.rstrip("\n") + "\n\n" + section.rstrip("\n") + "\n"
