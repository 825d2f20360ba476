"""The study behind docs/blogs.md: what DP-BloGS costs, learns and leaks, beside DP-SGD.

One command makes the page: ``dptorch blogs`` (pip install 'dptorch[report,transformers]').
"""

from dptorch.blogs.study.measure import Result, Study, run_study
from dptorch.blogs.study.methods import METHODS, Method
from dptorch.blogs.study.page import write_page
from dptorch.blogs.study.tasks import TASKS, Task, get_task

__all__ = [
    "METHODS",
    "TASKS",
    "Method",
    "Result",
    "Study",
    "Task",
    "get_task",
    "run_study",
    "write_page",
]
