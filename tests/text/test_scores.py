"""Scores of generated texts, against values that are known."""

from __future__ import annotations

import pytest

pytest.importorskip("sacrebleu")
pytest.importorskip("rouge_score")

from dptorch.text.scores import METEOR, METEOR_WITHOUT_SYNONYMS, text_scores


@pytest.mark.slow
def test_rouge_is_the_longest_common_subsequence() -> None:
    """Of "a b c d" and "a c d e f" it has 3 words: precision 3/5, recall 3/4, F = 2/3."""
    found = text_scores(["a c d e f"], [["a b c d"]])
    assert found["ROUGE-L"] == pytest.approx(100 * 2 / 3, abs=1e-3)


@pytest.mark.slow
def test_meteor_says_whether_it_knows_synonyms() -> None:
    """Six words in one chunk: a penalty of (1/6)^3 / 2. A common stem is a match, in two chunks."""
    text = "the eagle serves food by rivers"
    found = text_scores([text], [[text]])
    name = METEOR if METEOR in found else METEOR_WITHOUT_SYNONYMS
    assert found[name] == pytest.approx(100 * (1 - 0.5 / 6**3), abs=1e-3)
    stems = text_scores([text], [["the eagle serving food by a river"]])
    mean = (6 / 7) / (0.9 + 0.1 * 6 / 7)
    assert stems[name] == pytest.approx(100 * mean * (1 - 0.5 / 3**3), abs=1e-3)
    assert text_scores(["x y"], [["nothing of it"]])[name] == 0


def test_without_wordnet_no_word_has_a_synonym(monkeypatch: pytest.MonkeyPatch) -> None:
    from nltk.corpus import wordnet

    def missing() -> None:
        raise LookupError("Resource wordnet not found")

    monkeypatch.setattr(type(wordnet), "ensure_loaded", lambda self: missing(), raising=False)
    assert METEOR_WITHOUT_SYNONYMS in text_scores(["a b"], [["a b"]])


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
