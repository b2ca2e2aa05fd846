"""How often to save: what saving costs against what failures cost. Pure; all times in seconds.

Sources: J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17 (1974) 530-531;
J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation Computer
Systems 22 (2006) 303-312. Both reckon with failures that come at any moment with the same chance (exponential times
between them, `mtbf` on average).

interval: training time between two saves, so one comes every interval + cost. cost: how long training stands still
for a save. restart: from the failure to the first step that is new to this start, without the steps to be redone.
All functions raise UsageError for numbers that no run has.
"""

from __future__ import annotations

import math

from lastgood.errors import wrong_type


def young(cost: float, mtbf: float) -> float:
    """Young's interval, sqrt(2 C M): good as long as a save takes a small part of the time between failures."""
    _check(cost=cost)
    _check_above(mtbf=mtbf)
    return math.sqrt(2 * cost) * math.sqrt(mtbf)


def daly(cost: float, mtbf: float) -> float:
    """Daly's higher-order interval: sqrt(2 C M) (1 + 1/3 sqrt(C / 2M) + 1/9 (C / 2M)) - C for C < 2 M, else M.

    Within 0.1 % of the exact optimum where a save takes less than a tenth of mtbf, within 7 % always; the run then
    takes at most 0.2 % longer than at the optimum.
    """
    first = young(cost, mtbf)
    if cost >= 2 * mtbf:
        return mtbf
    part = cost / (2 * mtbf)
    return first * (1 + math.sqrt(part) / 3 + part / 9) - cost


def expected_time(work: float, interval: float, cost: float, mtbf: float, restart: float = 0.0) -> float:
    """How long `work` seconds of training take with saves, failures, restarts and steps done again; inf if for ever.

    Daly's complete model, M e^(R/M) (e^((tau + C)/M) - 1) W / tau, which counts a failure during a save
    or a restart as well. The last save of a run is counted too, so it is an upper bound for runs of few saves.
    """
    _check(work=work, cost=cost, restart=restart)
    _check_above(interval=interval, mtbf=mtbf)
    try:
        per_segment = mtbf * math.exp(restart / mtbf) * math.expm1((interval + cost) / mtbf)
    except OverflowError:
        return math.inf if work else 0.0
    return per_segment * (work / interval)


def waste(interval: float, cost: float, mtbf: float, restart: float = 0.0) -> float:
    """The share of the time, 0 to 1, that isn't new training: saves, restarts and steps done again."""
    return 1.0 - 1.0 / expected_time(1.0, interval, cost, mtbf, restart)


def lost_per_failure(interval: float, cost: float, mtbf: float) -> float:
    """Time that one failure throws away, on average: since the last finished save, about half of interval + cost."""
    _check(cost=cost)
    _check_above(interval=interval, mtbf=mtbf)
    length = interval + cost
    part = length / mtbf
    if part < 1e-4:  # where the difference below would lose its digits
        return length * (0.5 - part / 12)
    return mtbf - length / math.expm1(part) if part < 700 else mtbf


def for_overhead(cost: float, share: float) -> float:
    """The shortest interval with cost / (interval + cost) <= share: saves take at most this share of the time."""
    _check(cost=cost)
    _check_above(share=share)
    if share > 1:
        raise wrong_type("share", share, "a share of the time: above 0, at most 1")
    return cost * ((1 - share) / share)


def _check(**times: float) -> None:
    for name, value in times.items():
        if not 0 <= value < math.inf:
            raise wrong_type(name, value, "a number of seconds, 0 or more")


def _check_above(**times: float) -> None:
    for name, value in times.items():
        if not 0 < value < math.inf:
            raise wrong_type(name, value, "a number above 0")
