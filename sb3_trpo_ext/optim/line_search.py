"""The search along the natural gradient: to where the trust region ends, on the exact KL and objective."""

import math
from collections.abc import Callable
from typing import NamedTuple

from sb3_trpo_ext.optim.status import UpdateStatus


class LineSearchResult(NamedTuple):
    """What a line search found; a rejected search has step size 0, objective before and KL 0."""

    #: Factor of the direction.
    step_size: float
    #: Evaluations of objective and KL.
    n_trials: int
    #: Objective at that step.
    objective: float
    #: Mean KL(old || new) at that step.
    kl: float
    status: UpdateStatus


#: An accepted step that reaches this share of the KL budget ends the search: the rest is not worth an evaluation.
FILLED = 0.95
#: What a trial aims at: the middle of the band from `FILLED` to 1.
_AIM = 0.975
#: A trial grows the step by at most this factor, however flat the KL looks from here, until there is an upper bound.
_MAX_GROWTH = 4.0
#: A trial shrinks the step by at most this factor: a KL from far outside says little about where the region ends.
_MAX_SHRINKING = 0.01
#: A bracket that is narrower than this is not searched any further.
_NARROW = 1.02


def line_search(
    evaluate: Callable[[float], tuple[float, float]],
    objective_before: float,
    max_kl: float,
    full_step: float,
    shrinking_factor: float = 0.8,
    max_trials: int = 10,
    fill: bool = True,
) -> LineSearchResult:
    """
    Find a step size whose KL is within ``max_kl`` and whose objective is above the one before.

    With ``fill`` off, this is the backtracking of Schulman et al. (2015), appendix C: the first of ``full_step * factor^k``
    that meets both. With ``fill`` on, each trial uses the KL that was measured: along a line the KL is close to a power of the
    step size (2 near zero), so that one division tells where it will be just inside the trust region. A trial below
    ``FILLED * max_kl`` is followed by a larger one, a trial above ``max_kl`` by a smaller one, always within the bracket known
    so far. Of all trials that met both conditions, the one with the best objective is returned.

    :param evaluate: maps a step size to (objective, mean KL(old || new))
    :param objective_before: the objective at step size 0
    :param max_kl: the trust region's radius; positive
    :param full_step: the first trial; positive and finite
    :param shrinking_factor: between 0 and 1: shrinks a trial that fails for another reason than its KL
    :param max_trials: maximum number of evaluations
    :param fill: whether to use up the trust region
    :return: the accepted step, or step size 0 with the reason why the last trial was refused
    """
    step = full_step
    # The bracket: the largest step size that met both conditions and the smallest that did not
    lower, upper = 0.0, math.inf
    best: LineSearchResult | None = None
    measured: list[tuple[float, float]] = []
    n_trials, status = 0, UpdateStatus.NO_IMPROVEMENT
    for n_trials in range(1, max_trials + 1):
        objective, kl = evaluate(step)
        trial = _judged(objective, kl, objective_before, max_kl)
        if trial is UpdateStatus.ACCEPTED:
            lower = step
            if best is None or objective >= best.objective:
                best = LineSearchResult(step, n_trials, objective, kl, trial)
            if not fill or kl >= FILLED * max_kl:
                break
        else:
            upper, status = step, trial
        if trial is not UpdateStatus.NON_FINITE and kl > 0:
            measured.append((step, kl))
        guess = step * shrinking_factor
        if fill and trial in (UpdateStatus.ACCEPTED, UpdateStatus.KL_TOO_LARGE):
            guess = step * _growth(kl, max_kl, measured, is_bounded=upper < math.inf)
        if fill and not lower < guess < upper:
            # The power law leaves the bracket where the KL is far from one: halve the bracket instead
            guess = math.sqrt(lower * upper) if lower > 0 and upper < math.inf else step * shrinking_factor
        step = guess
        if not lower < step < upper or (lower > 0 and upper < _NARROW * lower):
            break
    if best is None:
        return LineSearchResult(0.0, n_trials, objective_before, 0.0, status)
    return best._replace(n_trials=n_trials)


def _judged(objective: float, kl: float, objective_before: float, max_kl: float) -> UpdateStatus:
    """Whether a trial is good, or why not."""
    if not (math.isfinite(objective) and math.isfinite(kl)):
        return UpdateStatus.NON_FINITE
    if kl > max_kl:
        return UpdateStatus.KL_TOO_LARGE
    return UpdateStatus.ACCEPTED if objective > objective_before else UpdateStatus.NO_IMPROVEMENT


def _growth(kl: float, max_kl: float, measured: list[tuple[float, float]], is_bounded: bool) -> float:
    """
    Factor from the last trial to where the trust region ends.

    :param kl: of the last trial
    :param max_kl: the trust region's radius
    :param measured: step size and KL of all trials whose KL is positive and finite
    :param is_bounded: whether a trial has been refused, which bounds the growth
    """
    if kl <= 0:
        # Nothing has moved yet
        return _MAX_GROWTH
    power = 2.0
    if len(measured) > 1:
        # The power law through the last two measurements. The logarithms are subtracted because the ratio of two KLs can
        # underflow to zero; that of two steps is never quite one
        (s1, kl1), (s2, kl2) = measured[-2:]
        power = min(max((math.log(kl2) - math.log(kl1)) / math.log(s2 / s1), 1.0), 8.0)
    growth = max(math.pow(_AIM * max_kl / kl, 1 / power), _MAX_SHRINKING)
    return growth if is_bounded else min(growth, _MAX_GROWTH)
