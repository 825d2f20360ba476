"""What ε and δ are said to mean, against the worst attack that they allow."""

from __future__ import annotations

import math

import pytest

from dptorch.risk import for_group, guessed_right, in_words, recognised


def worst(epsilon: float, delta: float) -> tuple[list[float], list[float]]:
    """Probabilities of four observations with and without a person: the pair of laws that dominates all
    (ε, δ)-private mechanisms (Kairouz, Oh, Viswanath, 2015)."""
    share = (1 - delta) / (1 + math.exp(epsilon))
    inside = [delta, share * math.exp(epsilon), share, 0.0]
    return inside, inside[::-1]


def best_attack(epsilon: float, delta: float, false_alarms: float) -> float:
    """By Neyman and Pearson: accuse by falling ratio, with a coin at the last observation."""
    inside, outside = worst(epsilon, delta)
    found, left = 0.0, false_alarms
    for p, q in zip(inside, outside, strict=True):
        part = 1.0 if q <= left else left / q
        found, left = found + part * p, left - part * q
        if part < 1:
            break
    return found


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0, 3.0, 8.0, 20.0])
@pytest.mark.parametrize("delta", [0.0, 1e-5, 0.01])
@pytest.mark.parametrize("false_alarms", [0.01, 0.2])
def test_no_attack_recognises_more_and_the_best_one_as_many(
    epsilon: float, delta: float, false_alarms: float
) -> None:
    best = best_attack(epsilon, delta, false_alarms)
    assert recognised(epsilon, delta, false_alarms) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 0.0), (3.0, 1e-5), (8.0, 0.01)])
def test_a_toss_up_is_guessed_right_as_often_as_said(epsilon: float, delta: float) -> None:
    inside, outside = worst(epsilon, delta)
    best = sum(max(p, q) for p, q in zip(inside, outside, strict=True)) / 2
    assert guessed_right(epsilon, delta) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 1e-6), (2.0, 1e-5)])
def test_a_group_is_as_many_steps_from_data_to_data(epsilon: float, delta: float) -> None:
    total, more = 0.0, 0.0
    for members in range(1, 6):
        # One more neighbour: P <= e^ε (e^total Q + more) + δ.
        total, more = total + epsilon, math.exp(epsilon) * more + delta
        assert for_group(epsilon, delta, members) == (pytest.approx(total), pytest.approx(more))


def test_extremes_are_bounds_and_no_errors() -> None:
    assert recognised(math.inf, 0.0) == guessed_right(math.inf, 0.0) == 1.0
    assert for_group(math.inf, 1e-5, 2) == (math.inf, 1.0)
    assert for_group(500.0, 1e-5, 5) == (2500.0, 1.0)
    assert for_group(0.0, 1e-5, 5) == (0.0, pytest.approx(5e-5))


def test_words_follow_from_the_numbers() -> None:
    text = " ".join(in_words(3.0, 1e-5, "user", 2400))
    assert "recognise at most 20.1% of those who were" in text
    assert "right in at most 95.3% of cases" in text
    assert "0.024 times one over the number of persons (2400)" in text
    assert "for 2 or more it rules out next to nothing" in text
    weaker = " ".join(in_words(1.0, 1e-5, "user", 2400))
    assert "for 2, epsilon is 2 and delta 3.7e-05, for 5, epsilon is 5 and delta 0.00086" in weaker
    assert "user" not in text


def test_weak_guarantees_are_called_so() -> None:
    first, second, _ = in_words(9.0, 0.01, "example", 100)
    assert "does not prevent it" in first
    assert "recognise at most" not in first
    assert "not below one over the number of examples (100)" in second
    assert "far below one over the number" in in_words(1.0, 1e-6, "example", None)[1]
