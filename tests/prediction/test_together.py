"""Smoothing of noisy scores: it is the posterior mean, it helps, and it reads nothing private."""

import numpy as np
import pytest
import torch
from tests.prediction.setup import predictor, rows

from dptorch.errors import ConfigurationError
from dptorch.prediction import together
from dptorch.prediction.together import smooth


def test_the_posterior_mean_by_the_textbook(monkeypatch):
    monkeypatch.setattr(together, "_WIDTHS", (0.3,))
    monkeypatch.setattr(together, "_AMPLITUDES", (7.0,))
    rng = np.random.default_rng(0)
    z, scores, noise = rng.normal(size=(40, 3)), rng.normal(size=(40, 2)), 2.0
    distances = ((z[:, None] - z[None]) ** 2).sum(-1)
    middle = np.median(distances[distances > 1e-12])
    kernel = 7.0 * (noise / 5) ** 2 * np.exp(-distances / (0.6 * middle))
    wanted = kernel @ np.linalg.solve(kernel + noise**2 * np.eye(40), scores)
    np.testing.assert_allclose(smooth(z, scores, noise), wanted, atol=1e-8)


def test_equal_rows_and_single_rows_stay_as_they_are():
    scores = np.array([[1.0, 2.0]])
    assert smooth(np.zeros((1, 3)), scores, 5.0).tolist() == scores.tolist()
    assert (
        smooth(np.zeros((4, 3)), scores.repeat(4, 0), 5.0).tolist() == scores.repeat(4, 0).tolist()
    )


def test_many_rows_are_smoothed_in_blocks(monkeypatch):
    monkeypatch.setattr(together, "_ROWS_AT_ONCE", 50)
    rng = np.random.default_rng(0)
    assert smooth(rng.normal(size=(120, 2)), rng.normal(size=(120, 3)), 1.0).shape == (120, 3)


def test_it_is_post_processing_of_what_was_charged():
    made = predictor("gnmax", 5, queries=30)
    plain = made.predict(rows(30))
    smoothed = made.predict_together(rows(30))
    assert smoothed.charged == 0
    again = made.predict_together(rows(30))
    assert torch.equal(smoothed.scores, again.scores)  # no noise of its own
    assert not torch.equal(smoothed.scores, plain.scores)
    twice = made.predict_together(torch.cat([rows(30), rows(3)]))
    assert torch.equal(twice.scores[:3], twice.scores[30:])


def test_it_needs_normal_noise():
    with pytest.raises(ConfigurationError, match="'gnmax' or 'gaussian'"):
        predictor("laplace").predict_together(rows(3))
