"""Tasks on texts: classification, table-to-text, language modelling (docs/tasks.md).

    from dptorch.text import load_run

Needs the extra `text`; transformers is imported when a task is prepared.
"""

from dptorch.text.models import load_run

__all__ = ["load_run"]
