"""private-transformers: its tests and scripts, which need transformers 4."""

from __future__ import annotations

from tests.peers.examples import Example
from tests.peers.peer import Peer
from tests.peers.reasons import NOT_APPLICABLE, Reason

__all__ = ["PRIVATE_TRANSFORMERS"]

PRIVATE_TRANSFORMERS = Peer(
    name="private-transformers",
    packages={"private_transformers": "dptorch.compat.private_transformers"},
    tests=("tests", "test_*.py"),
    folders=("examples",),
    examples=(
        Example("examples/table2text/run_language_modeling.py"),
        Example("examples/classification/run_classification.py"),
        Example("examples/image_classification/main.py"),
    ),
    reasons=(
        Reason(
            NOT_APPLICABLE, "test_privacy_engine", "ml_swissknife|No module named",
            "Needs ml_swissknife, and the weights of published models. "
            "`tests/compat/test_hf_gradients.py` makes its comparisons on small random models.",
        ),
        Reason(
            NOT_APPLICABLE, "examples/", "ml_swissknife|cannot import name|No module named",
            "Written for transformers 4: it imports ml_swissknife, and names that transformers 5 has "
            "removed (`AdamW`, `EvaluationStrategy`), so that it runs with private-transformers "
            "neither.",
        ),
    ),
)  # fmt: skip
