"""What one model contributes stays in its ball, whatever its logits are."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dptorch.prediction.bounded import NORMS, clip_logits, votes_of

ANY = arrays(np.float64, (3, 4), elements=st.floats(width=64))


@given(ANY, st.sampled_from(sorted(NORMS)), st.floats(1e-3, 1e3))
def test_no_logits_leave_the_ball(logits, norm, bound):
    clipped = clip_logits(logits, bound, norm)
    assert np.isfinite(clipped).all()
    assert (NORMS[norm](clipped) <= bound).all()
    assert np.abs(clipped.sum(-1)).max() <= 1e-9 * bound


def test_what_is_inside_is_only_centred():
    logits = np.array([[0.3, 0.1, -0.1]])
    assert clip_logits(logits, 10.0) == pytest.approx(logits - 0.1)
    shifted = clip_logits(logits + 1000.0, 10.0)
    np.testing.assert_allclose(shifted, clip_logits(logits, 10.0), atol=1e-9)


def test_labels_survive_the_clip():
    logits = np.random.default_rng(0).normal(size=(200, 10)) * 100
    for norm in NORMS:
        assert (clip_logits(logits, 0.5, norm).argmax(-1) == logits.argmax(-1)).all()


@given(ANY)
def test_every_model_has_one_vote(logits):
    assert (votes_of(logits).sum(-1) == 1).all()
    assert set(np.unique(votes_of(logits))) == {0.0, 1.0}
