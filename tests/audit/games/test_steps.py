"""The step game: shuffles are told apart, Gaussian noise only as far as it claims."""

import math

import pytest
import torch

from dptorch.accounting.pairs.sampled import gaussian_epsilon
from dptorch.audit import audit_step, play_steps
from dptorch.audit.games import SCORES, SortedBlocks
from dptorch.errors import ConfigurationError

GENERATOR = torch.Generator().manual_seed(0)
INSIDE = [torch.randn(12, 5, generator=GENERATOR), torch.randn(7, generator=GENERATOR)]
OUTSIDE = [t + 0.1 * torch.randn(t.shape, generator=GENERATOR) for t in INSIDE]


def shuffle(member: bool, block: int = 4) -> list[torch.Tensor]:
    """Blocks of each gradient in random order, what is left over last: no noise."""
    out = []
    for g in INSIDE if member else OUTSIDE:
        flat = g.flatten()
        whole = len(flat) - len(flat) % block
        blocks = flat[:whole].reshape(-1, block)
        blocks = blocks[torch.randperm(len(blocks), generator=GENERATOR)]
        out.append(torch.cat([blocks.flatten(), flat[whole:]]).reshape(g.shape))
    return out


def noise(member: bool, stddev: float) -> list[torch.Tensor]:
    known = INSIDE if member else OUTSIDE
    return [g + stddev * torch.randn(g.shape, generator=GENERATOR) for g in known]


@pytest.mark.slow
@pytest.mark.parametrize("score", ["exact-match", "norm", "sum", SortedBlocks(4)])
def test_a_shuffle_is_told_apart_without_error(score: str) -> None:
    result = audit_step(
        shuffle, inside=INSIDE, outside=OUTSIDE, epsilon=1.0, score=score, games=1000,
        threshold=0.0,
    )  # fmt: skip
    assert result.verdict == "REFUTED"
    assert result.epsilon_lower == pytest.approx(5.5999, abs=1e-3)  # all of 1000 + 1000 right


@pytest.mark.slow
def test_gaussian_noise_is_measured_at_what_it_gives() -> None:
    gap = math.sqrt(
        sum(float((a - b).square().sum()) for a, b in zip(INSIDE, OUTSIDE, strict=True))
    )
    true = gaussian_epsilon(1e-5, 1.0)
    result = audit_step(
        lambda member: noise(member, gap), inside=INSIDE, outside=OUTSIDE, epsilon=true,
        delta=1e-5, games=1500, bound="gaussian",
    )  # fmt: skip
    assert result.verdict == "NOT REFUTED"
    assert result.epsilon_lower > 0.8 * true
    for score in SCORES:
        other = audit_step(
            lambda member: noise(member, gap), inside=INSIDE, outside=OUTSIDE, epsilon=true,
            delta=1e-5, games=100, score=score,
        )  # fmt: skip
        assert not other.refuted
    # Half of the noise: a claim that is false.
    broken = audit_step(
        lambda member: noise(member, gap / 2), inside=INSIDE, outside=OUTSIDE, epsilon=true,
        delta=1e-5, games=300, bound="gaussian",
    )  # fmt: skip
    assert broken.refuted


def test_values_are_compared_bit_for_bit() -> None:
    known = torch.arange(1.0, 4.0, dtype=torch.float64)
    assert SCORES["exact-match"]([known + 1e-12], [known], [known + 1]) == 0


def test_mistakes() -> None:
    with pytest.raises(ConfigurationError, match="Did you mean 'norm'"):
        play_steps(shuffle, inside=INSIDE, outside=OUTSIDE, score="nrom")
    with pytest.raises(ConfigurationError, match="equal"):
        play_steps(shuffle, inside=INSIDE, outside=INSIDE)
    with pytest.raises(ConfigurationError, match="shape"):
        play_steps(shuffle, inside=INSIDE[:1], outside=OUTSIDE[:1])
    with pytest.raises(ConfigurationError, match="at least 20"):
        audit_step(shuffle, inside=INSIDE, outside=OUTSIDE, epsilon=1.0, games=5)
    with pytest.raises(ConfigurationError, match="block_size"):
        play_steps(shuffle, inside=INSIDE, outside=OUTSIDE, score=SortedBlocks((1, 2, 3)))
