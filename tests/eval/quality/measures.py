"""Numbers of numbers: means, interpolation, rank correlation, the binomial test."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

# KL below this is rounding of float32 logits; logarithms stop here.
KL_LEAST = 1e-9


def log_kl(kl: float) -> float:
    """ln of a KL, of what can be told from rounding."""
    return math.log(max(kl, KL_LEAST))


def mean(numbers: Sequence[float]) -> float | None:
    """Arithmetic mean; None of nothing."""
    return math.fsum(numbers) / len(numbers) if numbers else None


def geometric_mean(numbers: Sequence[float]) -> float | None:
    """Geometric mean of KLs or ratios; None of nothing."""
    logs = mean([log_kl(number) for number in numbers])
    return None if logs is None else math.exp(logs)


def interpolate(points: Iterable[tuple[float, float]], x: float) -> float | None:
    """y at x on the straight lines between the points; None outside them."""
    ordered = sorted(points)
    for (x0, y0), (x1, y1) in zip(ordered, ordered[1:], strict=False):
        if x0 <= x <= x1:
            share = (x - x0) / (x1 - x0) if x1 > x0 else 0.0
            return y0 + share * (y1 - y0)
    return ordered[0][1] if len(ordered) == 1 and ordered[0][0] == x else None


def ranks(numbers: Sequence[float]) -> list[float]:
    """Rank of each from 1; equals share the mean of their ranks."""
    order = sorted(range(len(numbers)), key=lambda index: numbers[index])
    result = [0.0] * len(numbers)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and numbers[order[end]] == numbers[order[start]]:
            end += 1
        for index in order[start:end]:
            result[index] = (start + 1 + end) / 2
        start = end
    return result


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Rank correlation; None for fewer than three pairs or where one side is constant."""
    if len(xs) != len(ys) or len(xs) < 3:
        return None
    a, b = ranks(xs), ranks(ys)
    middle = (len(a) + 1) / 2
    covariance = math.fsum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True))
    spread = math.fsum((x - middle)**2 for x in a) * math.fsum((y - middle)**2 for y in b)
    return covariance / math.sqrt(spread) if spread > 0 else None


def binomial_tail(trials: int, probability: float, successes: int) -> float:
    """P(X >= successes) for X ~ Binomial(trials, probability), exactly: a sum of its terms."""
    if successes <= 0:
        return 1.0
    if successes > trials or probability <= 0.0:
        return 0.0
    if probability >= 1.0:
        return 1.0

    def term(count: int) -> float:
        return math.exp(math.lgamma(trials + 1) - math.lgamma(count + 1)
                        - math.lgamma(trials - count + 1) + count * math.log(probability)
                        + (trials - count) * math.log1p(-probability))

    if successes <= trials * probability:
        return max(0.0, 1.0 - math.fsum(term(count) for count in range(successes)))
    tail = []
    for count in range(successes, trials + 1):
        tail.append(term(count))
        if tail[-1] < 1e-18 * tail[0]:
            break  # Beyond the mean, terms fall at least geometrically.
    return min(1.0, math.fsum(tail))
