"""How close generated texts are to what people wrote: BLEU, ROUGE-L, NIST and METEOR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from dptorch.errors import ConfigurationError

__all__ = ["METEOR", "METEOR_WITHOUT_SYNONYMS", "text_scores"]

METEOR: Final = "METEOR"
#: Words match that are equal or have a stem in common; METEOR's third way needs WordNet.
METEOR_WITHOUT_SYNONYMS: Final = "METEOR (no synonyms)"


def text_scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return BLEU (sacrebleu, 0 to 100), ROUGE-L (F of the best reference, 0 to 100) and NIST.

    METEOR is nltk's (0 to 100), with synonyms where nltk has its WordNet data, which is downloaded by
    itself; otherwise it is called `METEOR_WITHOUT_SYNONYMS`, and is at most as high.

    Args:
        texts: generated.
        references: one or more for each text.

    Raises:
        ConfigurationError: the packages of the extra `text` are not installed.

    Example:
        >>> found = text_scores(["a quiet cafe by the river"], [["a quiet cafe by the river"]])
        >>> round(found["BLEU"]), round(found["ROUGE-L"])
        (100, 100)
    """
    if not texts:
        return {}
    try:
        from nltk.translate.nist_score import corpus_nist
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu import corpus_bleu
    except ImportError as error:
        raise ConfigurationError(
            f"Scores of texts need sacrebleu, rouge-score and nltk ({error}). Install them with: pip "
            "install 'dptorch[text]'."
        ) from error
    most = max(len(written) for written in references)
    by_place: Any = [
        [written[i] if i < len(written) else None for written in references] for i in range(most)
    ]
    rouge = RougeScorer(["rougeL"])
    best = [
        max(rouge.score(reference, text)["rougeL"].fmeasure for reference in written)
        for text, written in zip(texts, references, strict=True)
    ]
    words = [[r.lower().split() for r in written] for written in references]
    said = [text.lower().split() for text in texts]
    found = {
        "BLEU": corpus_bleu(list(texts), by_place, lowercase=True).score,
        "ROUGE-L": 100 * sum(best) / len(best),
    }
    found |= _meteor(words, said)
    if any(len(text) >= 5 for text in said):  # of shorter ones NIST has no five-grams
        found["NIST"] = corpus_nist(words, said)
    return {name: round(value, 3) for name, value in found.items()}


def _meteor(
    references: Sequence[Sequence[list[str]]], texts: Sequence[list[str]]
) -> dict[str, float]:
    """The mean METEOR of the best reference, by its name."""
    from nltk.corpus import wordnet
    from nltk.translate.meteor_score import meteor_score

    try:
        wordnet.ensure_loaded()
        name, synonyms = METEOR, wordnet
    except LookupError:
        name, synonyms = METEOR_WITHOUT_SYNONYMS, _NoSynonyms()
    scores = [
        meteor_score(list(written), text, wordnet=synonyms)
        for written, text in zip(references, texts, strict=True)
    ]
    return {name: 100 * sum(scores) / len(scores)}


class _NoSynonyms:
    """In place of WordNet: no word has a synonym."""

    def synsets(self, word: str) -> list[Any]:
        return []
