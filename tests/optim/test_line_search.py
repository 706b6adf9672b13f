"""The line search on scripted objectives and KLs."""

import math
import random
from collections.abc import Callable, Sequence

import pytest

from sb3_trpo_ext.optim import LineSearchResult, UpdateStatus, line_search
from sb3_trpo_ext.optim.line_search import FILLED

MAX_KL = 0.01
Function = Callable[[float], float]


class Script:
    """An objective and a KL along a line; remembers the trials."""

    def __init__(self, kl: Function, objective: Function = lambda step: step):
        self.kl = kl
        self.objective = objective
        self.trials: list[float] = []

    def __call__(self, step: float) -> tuple[float, float]:
        self.trials.append(step)
        return self.objective(step), self.kl(step)


def assert_keeps_its_promises(result: LineSearchResult, script: Script, before: float, max_kl: float, budget: int) -> None:
    """What holds of every search, whatever the functions."""
    assert result.n_trials == len(script.trials) <= budget
    assert len(set(script.trials)) == len(script.trials), "no trial twice"
    assert all(0 < trial < math.inf for trial in script.trials)
    measured = {trial: (script.objective(trial), script.kl(trial)) for trial in script.trials}
    good = {
        trial: (gain, kl) for trial, (gain, kl) in measured.items() if before < gain < math.inf and -math.inf < kl <= max_kl
    }
    assert result.status == UpdateStatus.ACCEPTED if good else result.status != UpdateStatus.ACCEPTED
    if good:
        # Of all that was seen and allowed, the best
        assert (result.objective, result.kl) == good[result.step_size]
        assert result.objective == max(objective for objective, _ in good.values())
    else:
        assert (result.step_size, result.objective, result.kl) == (0.0, before, 0.0)


@pytest.mark.parametrize("full_step", [0.01, 0.1, 0.5, 0.9, 0.97, 1.0, 1.03, 1.5, 4.0, 30.0])
def test_quadratic_kl_is_filled_in_two_trials(full_step: float) -> None:
    """The KL at the first trial says where the trust region ends, unless that is more than a factor of 4 away."""
    script = Script(lambda step: MAX_KL * step**2)
    result = line_search(script, 0.0, MAX_KL, full_step)
    assert_keeps_its_promises(result, script, 0.0, MAX_KL, 10)
    assert FILLED * MAX_KL <= result.kl <= MAX_KL
    n_growths = max(0, math.ceil(math.log(1 / full_step, 4)) - 1)
    assert result.n_trials <= 2 + n_growths


@pytest.mark.parametrize("fill", [True, False])
def test_exact_first_trial_is_the_only_one(fill: bool) -> None:
    result = line_search(Script(lambda step: MAX_KL * step**2), 0.0, MAX_KL, 0.98, fill=fill)
    assert result == LineSearchResult(0.98, 1, 0.98, MAX_KL * 0.98**2, UpdateStatus.ACCEPTED)


@pytest.mark.parametrize("full_step", [0.3, 0.8, 1.3, 3.0])
@pytest.mark.parametrize("power", [1.0, 1.5, 3.0, 4.0, 6.0])
def test_other_power_is_learnt_from_two_trials(power: float, full_step: float) -> None:
    script = Script(lambda step: MAX_KL * step**power)
    result = line_search(script, 0.0, MAX_KL, full_step)
    assert_keeps_its_promises(result, script, 0.0, MAX_KL, 10)
    assert FILLED * MAX_KL <= result.kl <= MAX_KL
    # One to see that the power is not 2, one that uses it; more where the first correction overshoots far
    assert result.n_trials <= 4


@pytest.mark.parametrize("full_step", [0.7, 1.0, 1.3])
def test_mixture_of_powers_is_filled_in_three_trials(full_step: float) -> None:
    """As a policy's KL looks like: quadratic near zero, then steeper."""
    script = Script(lambda step: MAX_KL * (0.6 * step**2 + 0.3 * step**3 + 0.1 * step**4))
    result = line_search(script, 0.0, MAX_KL, full_step)
    assert FILLED * MAX_KL <= result.kl <= MAX_KL
    assert result.n_trials <= 3


@pytest.mark.parametrize("cliff", [0.11, 0.5, 0.9])
@pytest.mark.parametrize("height", [1.0, math.inf, math.nan])
def test_cliff_of_the_kl_is_approached_from_below(cliff: float, height: float) -> None:
    script = Script(lambda step: MAX_KL * 0.1 * step**2 if step < cliff else height)
    result = line_search(script, 0.0, MAX_KL, 1.0, max_trials=20)
    assert_keeps_its_promises(result, script, 0.0, MAX_KL, 20)
    assert 0.8 * cliff < result.step_size < cliff


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("of", ["objective", "kl"])
@pytest.mark.parametrize("fill", [True, False])
def test_non_finite_trials_are_walked_back_from(bad: float, of: str, fill: bool) -> None:
    def spoilt(good: Function) -> Function:
        return lambda step: bad if step > 0.7 else good(step)

    kl, objective = (lambda step: MAX_KL * step**2), (lambda step: step)
    script = Script(spoilt(kl), objective) if of == "kl" else Script(kl, spoilt(objective))
    result = line_search(script, 0.0, MAX_KL, 1.0, fill=fill)
    assert result.status == UpdateStatus.ACCEPTED
    assert 0.56 <= result.step_size <= 0.7
    assert math.isfinite(result.objective)


@pytest.mark.parametrize("fill", [True, False])
@pytest.mark.parametrize(
    ("objective", "kl", "status"),
    [
        (lambda step: -step, lambda step: 1e-3 * MAX_KL * step**2, UpdateStatus.NO_IMPROVEMENT),
        (lambda step: 0.0, lambda step: 1e-3 * MAX_KL * step**2, UpdateStatus.NO_IMPROVEMENT),
        (lambda step: step, lambda step: 1.0, UpdateStatus.KL_TOO_LARGE),
        (lambda step: step, lambda step: math.nan, UpdateStatus.NON_FINITE),
        (lambda step: math.nan, lambda step: 0.0, UpdateStatus.NON_FINITE),
        (lambda step: math.inf, lambda step: 0.0, UpdateStatus.NON_FINITE),
    ],
    ids=["down", "flat", "kl", "nan_kl", "nan_objective", "inf_objective"],
)
def test_rejection_gives_its_reason_and_step_size_zero(
    objective: Function, kl: Function, status: UpdateStatus, fill: bool
) -> None:
    script = Script(kl, objective)
    result = line_search(script, 0.0, MAX_KL, 1.0, max_trials=7, fill=fill)
    assert result == LineSearchResult(0.0, 7, 0.0, 0.0, status)
    assert len(script.trials) == 7


def test_reason_is_that_of_the_last_trial() -> None:
    """The KL is too large far out, and nearer there is no improvement."""
    script = Script(lambda step: MAX_KL * step**2, lambda step: -step)
    assert line_search(script, 0.0, MAX_KL, 2.0, max_trials=1).status == UpdateStatus.KL_TOO_LARGE
    assert line_search(script, 0.0, MAX_KL, 2.0).status == UpdateStatus.NO_IMPROVEMENT


@pytest.mark.parametrize("peak", [0.2, 0.5, 0.9])
def test_objective_that_turns_over_gives_the_best_trial(peak: float) -> None:
    """The region could be filled, but the objective is above the one before only up to twice the peak."""
    script = Script(lambda step: 0.2 * MAX_KL * step**2, lambda step: step * (2 * peak - step))
    result = line_search(script, 0.0, MAX_KL, 1.0)
    assert_keeps_its_promises(result, script, 0.0, MAX_KL, 10)
    assert result.status == UpdateStatus.ACCEPTED


def test_step_grows_by_a_limited_factor_however_flat_the_kl_is_from_here() -> None:
    """One measurement far below the target says little of what is far above it."""
    script = Script(lambda step: 1e-8 * MAX_KL * step**2)
    result = line_search(script, 0.0, MAX_KL, 1.0)
    assert script.trials[:7] == [4.0**k for k in range(7)]
    assert FILLED * MAX_KL <= result.kl <= MAX_KL


def test_kl_of_zero_makes_the_step_grow() -> None:
    script = Script(lambda step: 0.0 if step < 10 else MAX_KL * (step / 40) ** 2)
    result = line_search(script, 0.0, MAX_KL, 1.0)
    assert FILLED * MAX_KL <= result.kl <= MAX_KL
    assert result.n_trials <= 4


def test_kl_that_rounding_made_negative_is_within_the_region() -> None:
    script = Script(lambda step: -1e-9 if step < 1 else 2 * MAX_KL * step**2)
    result = line_search(script, 0.0, MAX_KL, 0.5)
    assert_keeps_its_promises(result, script, 0.0, MAX_KL, 10)
    assert result.status == UpdateStatus.ACCEPTED


@pytest.mark.parametrize("max_trials", [1, 2, 3, 10])
@pytest.mark.parametrize("fill", [True, False])
def test_budget_of_trials_is_respected(max_trials: int, fill: bool) -> None:
    script = Script(lambda step: 1.0)
    result = line_search(script, 0.0, MAX_KL, 1.0, max_trials=max_trials, fill=fill)
    assert result.n_trials == len(script.trials) == max_trials


def test_narrow_bracket_ends_the_search() -> None:
    script = Script(lambda step: 0.0 if step < 0.3 else math.nan)
    result = line_search(script, 0.0, MAX_KL, 1.0, max_trials=10_000)
    assert 0.3 / 1.02 < result.step_size < 0.3
    assert result.n_trials < 15


def test_objective_that_turns_over_does_not_use_up_the_trials() -> None:
    script = Script(lambda step: MAX_KL * (step / 2) ** 2, objective=lambda step: step * (1.2 - step))
    result = line_search(script, 0.0, MAX_KL, 1.0, max_trials=10_000)
    assert result.status is UpdateStatus.ACCEPTED
    assert result.n_trials < 15


def test_huge_first_kl_is_left_within_the_usual_budget() -> None:
    script = Script(lambda step: MAX_KL * (step * 1e15) ** 2)
    result = line_search(script, 0.0, MAX_KL, 1.0)
    assert FILLED * MAX_KL <= result.kl <= MAX_KL


@pytest.mark.parametrize("below", [5e-324, 1e-300, 1e-3])
@pytest.mark.parametrize("above", [0.02, 1e30, 1e308])
def test_kls_of_extreme_ratios_are_no_error(below: float, above: float) -> None:
    script = Script(lambda step: below if step < 0.3 else above)
    result = line_search(script, 0.0, MAX_KL, 1.0, max_trials=200)
    assert_keeps_its_promises(result, script, 0.0, MAX_KL, 200)
    assert 0 < result.step_size < 0.3


def test_filling_never_gives_less_than_backtracking_on_a_quadratic() -> None:
    """The improvement grows with the step, and the search without filling gives away up to a third of the KL."""
    for full_step in (0.3, 0.9, 1.01, 1.2, 2.0):
        script = Script(lambda step: MAX_KL * step**2, lambda step: step - 0.1 * step**2)
        filled, plain = (line_search(script, 0.0, MAX_KL, full_step, fill=fill) for fill in (True, False))
        assert filled.objective >= plain.objective


def backtracking(
    evaluate: Callable[[float], tuple[float, float]], before: float, full_step: float, factor: float, max_trials: int
) -> tuple[float, int]:
    """Schulman et al. (2015), appendix C, and nothing else: step size and number of trials."""
    for k in range(max_trials):
        objective, kl = evaluate(full_step * factor**k)
        if kl <= MAX_KL and before < objective < math.inf:
            return full_step * factor**k, k + 1
    return 0.0, max_trials


def random_function(rng: random.Random, knots: Sequence[float], holes: float) -> Function:
    """A positive, wiggly function that grows by a random power, with holes where it is not a number."""
    power, scale = rng.uniform(0.5, 4), 10 ** rng.uniform(-3, 3)
    wiggles = [(rng.uniform(0, 1), rng.uniform(0.1, 20), rng.uniform(0, 6)) for _ in range(3)]
    bad = [(knot, knot * rng.uniform(1, 1.5), rng.choice([math.nan, math.inf])) for knot in knots if rng.random() < holes]

    def function(step: float) -> float:
        for low, high, value in bad:
            if low <= step < high:
                return value
        return scale * step**power * max(0.0, 1 + sum(a * math.sin(b * step + c) for a, b, c in wiggles) / 2)

    return function


def random_script(seed: int) -> tuple[Script, float, dict[str, float | int]]:
    """A script, the objective before, and settings of the search."""
    rng = random.Random(seed)
    knots = [10 ** rng.uniform(-3, 2) for _ in range(4)]
    gain, loss = random_function(rng, knots, 0.2), random_function(rng, knots, 0.0)
    before, share = rng.uniform(-1, 1), rng.choice([0.0, 0.5, 2.0])
    script = Script(random_function(rng, knots, 0.2), lambda step: before + gain(step) - share * loss(step))
    return (
        script,
        before,
        {
            "full_step": 10 ** rng.uniform(-4, 3),
            "shrinking_factor": rng.uniform(0.1, 0.95),
            "max_trials": rng.choice([1, 2, 5, 10, 100]),
        },
    )


@pytest.mark.parametrize("fill", [True, False])
def test_promises_hold_on_random_functions(fill: bool) -> None:
    statuses = set()
    failures = {UpdateStatus.KL_TOO_LARGE, UpdateStatus.NO_IMPROVEMENT, UpdateStatus.NON_FINITE}
    for seed in range(3000):
        script, before, settings = random_script(seed)
        result = line_search(script, before, MAX_KL, fill=fill, **settings)  # type: ignore[arg-type]
        if fill:
            assert_keeps_its_promises(result, script, before, MAX_KL, int(settings["max_trials"]))
        statuses.add(result.status)
    assert statuses == {UpdateStatus.ACCEPTED, *failures}, "the random functions must lead to every outcome"


def test_without_filling_it_is_plain_backtracking() -> None:
    for seed in range(3000):
        script, before, settings = random_script(seed)
        result = line_search(script, before, MAX_KL, fill=False, **settings)  # type: ignore[arg-type]
        step_size, n_trials = backtracking(
            script, before, settings["full_step"], settings["shrinking_factor"], int(settings["max_trials"])
        )
        # The search multiplies step by step, the reference by a power
        assert result.step_size == pytest.approx(step_size, rel=1e-9)
        assert result.n_trials == n_trials
