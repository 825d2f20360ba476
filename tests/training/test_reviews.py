"""The reviews recipe: its archive is read as it is, its split is fixed, each text is embedded alone."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch

from dptorch.errors import ConfigurationError, DataError
from dptorch.training import reviews
from dptorch.training.recipes import get_recipe
from dptorch.training.reviews import embed, encoder_folder, read_snippets, review_split

ROWS = "1\t2.25\tA warm, funny film\n2\t-0.6\tToo tepid\n3\t0.0\tna\xefve\twith a tab\n"


def member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(content)
    archive.addfile(about, io.BytesIO(content))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """An archive in the form of the package's."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as files:
        member(
            files, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", ROWS.encode("latin-1")
        )
    path = tmp_path / "vaderSentiment-3.3.2.tar.gz"
    with tarfile.open(path, "w:gz") as outer:
        inside = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        member(outer, inside, inner.getvalue())
    return path


def test_snippets_are_read_as_they_are(archive: Path) -> None:
    texts, labels = read_snippets(archive, "movieReviewSnippets_GroundTruth.txt")
    assert texts == ["A warm, funny film", "Too tepid", "na\xefve\twith a tab"]
    assert labels.tolist() == [1, 0, 0]
    with pytest.raises(DataError, match="holds no readable tweets"):
        read_snippets(archive, "tweets_GroundTruth.txt")


def test_the_split_is_fixed() -> None:
    train, test = review_split(10605)
    assert (len(train), len(test)) == (9014, 1591)
    assert len(set(train.tolist()) | set(test.tolist())) == 10605
    assert torch.equal(test, review_split(10605)[1])
    assert (int(test.sum()), int(test[0])) == SPLIT


SPLIT = (8568631, 1)


@pytest.mark.slow
def test_a_text_is_embedded_by_itself() -> None:
    folder = encoder_folder()
    texts = ["Yes.", "A film that is as long as this sentence, and not a word longer than that."]
    together, alone = embed(texts, folder), embed(texts[:1], folder)
    assert together.shape == (2, 2, 384)
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=0)


def test_embeddings_are_computed_once(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counted(texts: list[str], folder: Path) -> torch.Tensor:
        calls.append(len(texts))
        return torch.eye(len(texts), 4)[:, None].expand(-1, 2, -1)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = {
        kind: ([f"{kind} {i}" for i in range(size)], torch.arange(size) % 2)
        for kind, size in (("movie", 20), ("amazon", 7))
    }
    monkeypatch.setattr(reviews, "snippets", made.get)
    monkeypatch.setattr(reviews, "encoder_folder", lambda: tmp_path)
    monkeypatch.setattr(reviews, "embed", counted)
    first, second = (get_recipe("reviews").load() for _ in range(2))
    assert calls == [7, 20]
    assert first.sizes == second.sizes == (17, 3)
    assert first.input_shape == (8,)
    assert torch.equal(first.train.inputs, second.train.inputs)  # type: ignore[attr-defined]
    assert first.classes == ("negative", "positive")


def test_a_missing_encoder_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reviews.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'dptorch\[reviews\]'"):
        encoder_folder()
