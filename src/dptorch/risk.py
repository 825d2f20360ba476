"""What ε and δ mean for one person, in numbers and in plain words.

The bounds hold for every attack, whatever else the attacker knows: they are the definition of
(ε, δ)-differential privacy, read as a test of hypotheses. Wasserman and Zhou, "A Statistical Framework
for Differential Privacy", JASA 2010; Kairouz, Oh and Viswanath, "The Composition Theorem for
Differential Privacy", ICML 2015.
"""

from __future__ import annotations

import math
from typing import Final

__all__ = ["for_group", "guessed_right", "in_words", "recognised", "rounded_up"]

#: Above this share of members that may be recognised, the guarantee alone prevents nothing.
CERTAIN: Final = 0.995
FALSE_ALARMS: Final = 0.01
_GROUPS: Final = (2, 5)


def recognised(epsilon: float, delta: float, false_alarms: float = FALSE_ALARMS) -> float:
    """The largest share of members that any attack recognises which accuses this share of others.

    ``min(e^ε α + δ, 1 - e^-ε (1 - α - δ))``, the trade-off curve of (ε, δ).

    Example:
        >>> round(recognised(3.0, 1e-5), 3)
        0.201
    """
    low = math.exp(min(epsilon, 700.0)) * false_alarms + delta
    high = 1 - math.exp(-min(epsilon, 700.0)) * (1 - false_alarms - delta)
    return min(1.0, low, max(high, false_alarms))


def guessed_right(epsilon: float, delta: float) -> float:
    """The largest share of right guesses whether somebody is a member, where half of those asked are.

    ``(e^ε + δ) / (e^ε + 1)``.

    Example:
        >>> guessed_right(0.0, 0.0), round(guessed_right(3.0, 1e-5), 3)
        (0.5, 0.953)
    """
    odds = math.exp(-min(epsilon, 700.0))
    return min(1.0, (1 + delta * odds) / (1 + odds))


def for_group(epsilon: float, delta: float, members: int) -> tuple[float, float]:
    """(ε, δ) for a group of this many: ``k ε`` and ``δ (e^kε - 1) / (e^ε - 1)``.

    Vadhan, "The Complexity of Differential Privacy", 2017, Lemma 2.2.

    Example:
        >>> for_group(1.0, 1e-6, 1)
        (1.0, 1e-06)
    """
    total = members * epsilon
    if math.isinf(total):
        return math.inf, 1.0
    if epsilon == 0:
        return 0.0, min(1.0, members * delta)
    # In logarithms: e^kε may be too large for a float.
    log_factor = total + math.log1p(-math.exp(-total)) - epsilon - math.log1p(-math.exp(-epsilon))
    factor = math.exp(min(log_factor, 700.0))
    return total, min(1.0, delta * factor)


def in_words(
    epsilon: float,
    delta: float,
    unit: str,
    size: int | None,
    *,
    data: str = "training data",
    published: str = "model",
) -> list[str]:
    """Say what the guarantee means to somebody who has never heard of it, in three paragraphs.

    Args:
        unit: what one record is: example, user.
        size: number of records, if it is public.
        data, published: what the records are in, and what an attacker has of it.

    Returns:
        What an attacker can find out, what δ adds, what holds for several records together.
    """
    what = {"user": "person"}.get(unit, unit)
    found = recognised(epsilon, delta)
    first = (
        f"Suppose someone wants to find out whether one particular {what} was in the {data}. "
        f"They have the {published}, know every other {what}, and have all the computing power they "
        "like. "
    )
    if found < CERTAIN:
        first += (
            f"If they accept a false alarm for 1 in 100 who were not in it, they recognise at most "
            f"{_percent(found)} of those who were. Whoever thinks it a toss-up beforehand can be "
            f"right in at most {_percent(guessed_right(epsilon, delta))} of cases. Without a guarantee "
            "nothing rules out 100%."
        )
    else:
        first += (
            "At this epsilon the guarantee does not prevent it: a test with 1% false alarms might "
            "recognise every one. Only tests such as an audit can tell how hard it is in practice."
        )
    return [first, _delta_in_words(delta, what, size), _groups_in_words(epsilon, delta, what)]


def rounded_up(epsilon: float, digits: int = 4) -> str:
    """Write ε with some digits behind the point: a stated bound may not be below the computed one.

    Example:
        >>> rounded_up(1.1), rounded_up(2.00001), rounded_up(math.inf)
        ('1.1000', '2.0001', 'infinity')
    """
    if math.isinf(epsilon):
        return "infinity"
    text = f"{epsilon:.{digits}f}"
    return text if float(text) >= epsilon else f"{float(text) + 10**-digits:.{digits}f}"


def _delta_in_words(delta: float, what: str, size: int | None) -> str:
    text = (
        f"Delta, {delta:g}, is what the bound may be wrong by: at worst, with that probability, it "
        "does not hold at all."
    )
    if size is None:
        return text + f" It should be far below one over the number of {what}s."
    share = delta * size
    if share < 1:
        return text + f" It is {share:.2g} times one over the number of {what}s ({size})."
    return text + (
        f" It is not below one over the number of {what}s ({size}): publishing one {what} in full "
        "would satisfy it too. Such a delta protects nobody in particular."
    )


def _groups_in_words(epsilon: float, delta: float, what: str) -> str:
    parts = []
    for members in _GROUPS:
        total, more = for_group(epsilon, delta, members)
        if more >= CERTAIN or recognised(total, more) >= CERTAIN:
            parts.append(f"for {members} or more it rules out next to nothing")
            break
        parts.append(f"for {members}, epsilon is {_up(total)} and delta {more:.2g}")
    return (
        f"Several {what}s who belong together, a family say, are protected less: "
        + ", ".join(parts)
        + "."
    )


def _percent(share: float) -> str:
    """A bound, never shown smaller than it is."""
    return f"{math.ceil(share * 1000 - 1e-9) / 10:.1f}%"


def _up(epsilon: float) -> str:
    return f"{math.ceil(epsilon * 1e3 - 1e-9) / 1e3:g}"
