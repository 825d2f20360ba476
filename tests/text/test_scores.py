"""Scores of generated texts, against values that are known."""

from __future__ import annotations

import pytest

pytest.importorskip("sacrebleu")
pytest.importorskip("rouge_score")

from dptorch.text.scores import text_scores


@pytest.mark.slow
def test_rouge_is_the_longest_common_subsequence() -> None:
    """Of "a b c d" and "a c d e f" it has 3 words: precision 3/5, recall 3/4, F = 2/3."""
    found = text_scores(["a c d e f"], [["a b c d"]])
    assert found["ROUGE-L"] == pytest.approx(100 * 2 / 3, abs=1e-3)


@pytest.mark.slow
def test_the_best_reference_counts_and_case_does_not() -> None:
    texts = ["The Eagle serves fast food by the river", "It is cheap and good for families too"]
    references = [["other words", texts[0].lower()], [texts[1]]]
    found = text_scores(texts, references)
    assert found["BLEU"] == pytest.approx(100)
    assert found["ROUGE-L"] == pytest.approx(100)
    assert found["NIST"] > 0
    assert text_scores(["x y z"], [["nothing of it"]])["BLEU"] < 5
    assert text_scores([], []) == {}
