"""Arms compared seed by seed: differences with 95% intervals, sign-flip p, Holm's correction, and a verdict.

A seed fixes clips, backbone and order, so arms are compared within seeds: what seeds differ in cancels out.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .settings import Contrast

__all__ = ["Difference", "Tested", "compared", "difference", "holm", "mean_interval", "sign_flip_p", "verdict"]

LEVEL = 0.05
EXACT = 14  # seeds, up to which all sign flips are gone through
POWER = 0.8


def t_cdf(t: float, df: int) -> float:
    """Of Student's distribution with ``df`` degrees of freedom, by Simpson's rule."""
    steps, norm = 2000, math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    width = abs(t) / steps
    values = [norm * (1 + (i * width) ** 2 / df) ** (-(df + 1) / 2) for i in range(steps + 1)]
    area = width / 3 * (values[0] + values[-1] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2]))
    return 0.5 + math.copysign(area, t)


@functools.cache
def t_quantile(p: float, df: int) -> float:
    """Where :func:`t_cdf` is ``p``, from 0.5 to below 1."""
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


class Difference(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean: of the seeds' values.
        low, high: its 95% interval, Student's; without end where there is one seed.
        seeds: how many.
        resolution: the true mean that such an interval would show to differ from 0 in four of five repetitions, at the
            spread that was seen.
    """

    mean: float
    low: float
    high: float
    seeds: int
    resolution: float


def mean_interval(values: Sequence[float]) -> Difference:
    """Mean and 95% interval of values of independent seeds."""
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Difference(mean, -math.inf, math.inf, n, math.inf)
    error = statistics.stdev(values) / math.sqrt(n)
    wide = t_quantile(1 - LEVEL / 2, n - 1)
    return Difference(mean, mean - wide * error, mean + wide * error, n, (wide + t_quantile(POWER, n - 1)) * error)


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> tuple[list[float], Difference]:
    """``first - second`` of the seeds that both have: each, and their mean."""
    found = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    if not found:
        raise ValueError("first, second: got no seed that both have, wanted one at least")
    return found, mean_interval(found)


def sign_flip_p(values: Sequence[float]) -> float:
    """Two-sided p of a mean of 0: the share of all sign flips whose mean lies as far from 0.

    Exact, and without any assumption but that a difference is as likely as its negative where arms are alike. Of ``n``
    seeds it is ``2 / 2**n`` at least.

    Raises:
        ValueError: more seeds than can be gone through.
    """
    if len(values) > EXACT:
        raise ValueError(f"values: got {len(values)} seeds, wanted {EXACT} at most")
    seen = abs(sum(values)) * (1 - 1e-9)
    flips = itertools.product((1, -1), repeat=len(values))
    return sum(abs(sum(s * v for s, v in zip(signs, values, strict=True))) >= seen for signs in flips) / 2 ** len(
        values
    )


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given. At most 5% of families have one below 0.05 whose arms are alike."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = highest
    return adjusted


class Tested(NamedTuple):
    """A contrast and what came of it.

    Attributes:
        contrast: as it was named.
        values: differences in top-1, seed by seed.
        found: their mean, interval and resolution.
        p, holm_p: of the sign flips, and adjusted over all contrasts of the task.
        costs: what each of its changes costs ``first``, over seeds.
        verdict: see :func:`verdict`.
    """

    contrast: Contrast
    values: list[float]
    found: Difference
    p: float
    holm_p: float
    costs: dict[str, Difference]
    verdict: str


def verdict(found: Difference, holm_p: float, costs: Mapping[str, Difference]) -> str:
    """``reproduced`` only where the interval lies above 0, also after Holm, and every change costs more than its own
    interval; ``in accuracy alone`` where a change does not; ``the reverse`` where it lies below 0; else ``not shown``.
    """
    if holm_p >= LEVEL or found.low <= 0 <= found.high:
        return "not shown"
    if found.high < 0:
        return "the reverse"
    return "reproduced" if all(cost.low > 0 for cost in costs.values()) else "in accuracy alone"


def costs_of(records: Mapping[int, Mapping[str, Any]], change: str) -> Difference:
    """What a change costs an arm, over its seeds.

    Raises:
        ValueError: a run without that change.
    """
    found = []
    for seed, record in sorted(records.items()):
        rows = {row["name"]: row["cost"] for row in record["counterfactuals"]}
        if change not in rows:
            raise ValueError(f"change: got {change!r}, which seed {seed} was not measured for")
        found.append(rows[change])
    return mean_interval(found)


def compared(records: Mapping[str, Mapping[int, Mapping[str, Any]]], contrasts: Sequence[Contrast]) -> list[Tested]:
    """Every contrast of a task whose arms have seeds in common.

    Args:
        records: by arm and seed.
        contrasts: all that were named: Holm's correction counts those, too, whose runs are missing, as p = 1.
    """
    found = []
    for contrast in contrasts:
        arms = [{s: r["accuracy"] for s, r in records.get(a, {}).items()} for a in (contrast.first, contrast.second)]
        found.append(difference(*arms) if arms[0].keys() & arms[1].keys() else None)
    p = [1.0 if one is None else sign_flip_p(one[0]) for one in found]
    tested = []
    for contrast, one, own, adjusted in zip(contrasts, found, p, holm(p), strict=True):
        if one is None:
            continue
        costs = {change: costs_of(records[contrast.first], change) for change in contrast.changes}
        tested.append(Tested(contrast, *one, own, adjusted, costs, verdict(one[1], adjusted, costs)))
    return tested
