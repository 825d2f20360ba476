"""The study behind docs/blogs.md: what DP-BloGS costs, learns and leaks, beside DP-SGD.

One command makes the page: ``python -m benchmarks.blogs_study`` in a checkout, with
``pip install 'dptorch[report,transformers]'``.
"""

from benchmarks.blogs_study.measure import Result, Study, run_study
from benchmarks.blogs_study.methods import METHODS, Method
from benchmarks.blogs_study.page import write_page
from benchmarks.blogs_study.tasks import TASKS, Task, get_task

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
