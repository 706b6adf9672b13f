"""Policy updates on problems with known answers, and what is left behind when there is no step to take."""

import io
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from helpers import Dense, Preconditioned, ScriptedProblem, relative_error
from torch import nn

from sb3_trpo_ext.optim import AdaptiveKLPenalty, KLConstraint, LinearOperator, Problem, UpdateResult, UpdateStatus
from sb3_trpo_ext.optim.line_search import FILLED
from sb3_trpo_ext.optim.vectors import flatten

pytestmark = pytest.mark.usefixtures("float64")

TARGET_KL = 0.01
MEAN = th.tensor([0.3, -1.0, 2.0], dtype=th.float64)
STD = th.tensor([0.1, 1.0, 5.0], dtype=th.float64)
GRADIENT = th.tensor([1.0, -2.0, 0.5], dtype=th.float64)


class GaussianMean:
    """
    The mean of a Gaussian with known std as parameters, cut in two, and an objective that is linear in it.

    Everything has a closed form: KL = |d / std|^2 / 2 for a step d, F = diag(1 / std^2), and the natural gradient is
    std^2 * gradient.
    """

    def __init__(self, gradient: th.Tensor = GRADIENT):
        self.params = [nn.Parameter(MEAN[:1].clone()), nn.Parameter(MEAN[1:].clone())]
        self.gradient = gradient

    @property
    def step(self) -> th.Tensor:
        return flatten(self.params) - MEAN

    def evaluate(self, indices: th.Tensor | None) -> tuple[th.Tensor, th.Tensor]:
        mean = th.cat([*self.params])
        return th.dot(self.gradient, mean), ((mean - MEAN) / STD).square().sum() / 2

    def fisher(self) -> LinearOperator:
        return Dense(th.diag(STD**-2))

    def problem(self, **replacements: Any) -> Problem:
        return ScriptedProblem(self.params, 4, **{"evaluate": self.evaluate, "fisher": self.fisher, **replacements})


def natural_gradient(damping: float) -> th.Tensor:
    return GRADIENT / (STD**-2 + damping)


def kl_of(step: th.Tensor) -> float:
    return float((step / STD).square().sum() / 2)


@pytest.mark.parametrize("damping", [0.0, 0.1, 10.0])
def test_step_is_along_the_natural_gradient_and_fills_the_region(damping: float) -> None:
    gaussian = GaussianMean()
    result = KLConstraint(cg_damping=damping, cg_tolerance=1e-12).update(gaussian.problem(), TARGET_KL)
    direction = natural_gradient(damping)
    assert result.is_accepted
    assert relative_error(gaussian.step / gaussian.step.norm(), direction / direction.norm()) < 1e-10
    assert FILLED * TARGET_KL <= result.kl <= TARGET_KL
    # Each fact that is reported, by another route
    assert result.kl == pytest.approx(kl_of(gaussian.step), rel=1e-10)
    assert result.objective_before == pytest.approx(float(GRADIENT @ MEAN))
    assert result.objective_after == pytest.approx(float(GRADIENT @ (MEAN + gaussian.step)))
    # The objective is linear, so the prediction is the improvement
    assert result.predicted_improvement == pytest.approx(result.objective_after - result.objective_before)
    assert result.grad_norm == pytest.approx(float(GRADIENT.norm()))
    assert result.curvature == pytest.approx(2 * kl_of(direction), rel=1e-8)
    assert relative_error(gaussian.step, result.step_size * direction) < 1e-10
    # As many as there are parameters, and one more where rounding has lost orthogonality (the condition number is 2500)
    assert 3 <= result.cg_steps <= 4
    assert result.cg_residual < 1e-12
    # The quadratic model is exact here: the first trial is on the edge, and a second one may be needed for the rounding
    assert result.n_trials <= 2


@pytest.mark.parametrize("target_kl", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("damped_scale", [False, True])
def test_first_trial_has_the_kl_that_its_scale_promises(target_kl: float, damped_scale: bool) -> None:
    gaussian, damping = GaussianMean(), 0.1
    update = KLConstraint(cg_damping=damping, cg_tolerance=1e-12, max_trials=1, damped_scale=damped_scale)
    evaluations: list[float] = []

    def evaluate(indices: th.Tensor | None) -> tuple[th.Tensor, th.Tensor]:
        objective, kl = gaussian.evaluate(indices)
        evaluations.append(float(kl.detach()))
        return objective, kl

    update.update(gaussian.problem(evaluate=evaluate), target_kl)

    direction = natural_gradient(damping)
    curvature, damped = 2 * kl_of(direction), 2 * kl_of(direction) + damping * float(direction @ direction)
    # The KL is quadratic, so that the undamped scale hits the target; the damped one stays inside the region
    expected = target_kl * curvature / damped if damped_scale else target_kl
    assert evaluations == pytest.approx([0.0, expected], rel=1e-9)
    assert curvature / damped < 0.75


@pytest.mark.parametrize("damping", [1e-3, 0.1])
def test_preconditioner_changes_the_number_of_products_only(damping: float) -> None:
    def step(inverse: th.Tensor | None, **kwargs: Any) -> tuple[th.Tensor, UpdateResult]:
        gaussian = GaussianMean()

        def make_inverse(given: float) -> th.Tensor | None:
            assert given == damping
            return inverse

        update = KLConstraint(cg_damping=damping, cg_tolerance=1e-10, **kwargs)
        fisher = Preconditioned(th.diag(STD**-2), make_inverse)
        result = update.update(gaussian.problem(fisher=lambda: fisher), TARGET_KL)
        # The direction alone: whether the first trial, on the edge of the region, is within it is a matter of rounding
        return gaussian.step / gaussian.step.norm(), result

    plain, plain_result = step(None)
    exact, exact_result = step(th.diag(1 / (STD**-2 + damping)))
    rough, rough_result = step(th.diag(th.tensor([0.5, 2.0, 1.0])))
    unused, unused_result = step(th.full((3, 3), math.nan), precondition=False)

    assert relative_error(exact, plain) < 1e-8
    assert relative_error(rough, plain) < 1e-8
    assert th.equal(unused, plain)
    assert exact_result.cg_steps == 1 < plain_result.cg_steps == unused_result.cg_steps
    assert rough_result.is_accepted


@pytest.mark.parametrize("fill", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_accepted_step_keeps_its_promises_where_the_kl_is_not_quadratic(seed: int, fill: bool) -> None:
    """Softmax over three bandit arms, with a target so large that the quadratic model is far off."""
    th.manual_seed(seed)
    logits = nn.Parameter(th.randn(3))
    old, advantages = th.log_softmax(logits.detach(), dim=0), th.randn(3)

    def evaluate(indices: th.Tensor | None) -> tuple[th.Tensor, th.Tensor]:
        new = th.log_softmax(logits, dim=0)
        return new.exp() @ advantages, old.exp() @ (old - new)

    p = old.exp()
    problem = ScriptedProblem([logits], 1, evaluate, lambda: Dense(th.diag(p) - th.outer(p, p)))
    result = KLConstraint(cg_damping=1e-3, fill=fill).update(problem, 0.5)
    objective, kl = (value.item() for value in evaluate(None))
    assert result.is_accepted
    assert 0 < kl <= 0.5
    assert (result.objective_after, result.kl) == (objective, kl)
    assert objective > result.objective_before == pytest.approx(float(p @ advantages))
    if fill:
        assert kl >= FILLED * 0.5


def test_parameters_in_the_end_are_those_that_were_evaluated() -> None:
    """To the last bit: the record is of the policy that is left, not of one nearby."""
    gaussian = GaussianMean()
    seen: list[th.Tensor] = []

    def evaluate(indices: th.Tensor | None) -> tuple[th.Tensor, th.Tensor]:
        seen.append(flatten(gaussian.params))
        return gaussian.evaluate(indices)

    KLConstraint().update(gaussian.problem(evaluate=evaluate), TARGET_KL)
    assert any(th.equal(flatten(gaussian.params), params) for params in seen[1:])


def hostile_params() -> list[nn.Parameter]:
    """Entries that a careless ``old + 0 * step`` would change."""
    return [
        nn.Parameter(th.tensor([-0.0, 1.0], dtype=th.float64)),
        nn.Parameter(th.tensor([[5e-324, -0.0]], dtype=th.float64)),
    ]


def bits(params: list[nn.Parameter]) -> list[list[int]]:
    return [param.detach().view(th.int64).flatten().tolist() for param in params]


class Raises(Exception):
    pass


class Hostile:
    """A problem that can be spoilt in one place; its Fisher matrix is the identity if nothing else is said."""

    def __init__(
        self,
        objective: Callable[[th.Tensor], th.Tensor] = th.sum,
        kl: Callable[[th.Tensor], th.Tensor] | None = None,
        matrix: th.Tensor | None = None,
        raises_at: int = 0,
    ):
        self.params = hostile_params()
        self.old = flatten(self.params)
        self.objective, self.kl = objective, kl
        self.matrix = th.eye(4) if matrix is None else matrix
        self.raises_at, self.n_evaluations = raises_at, 0

    def evaluate(self, indices: th.Tensor | None) -> tuple[th.Tensor, th.Tensor]:
        self.n_evaluations += 1
        if self.n_evaluations == self.raises_at:
            raise Raises
        vector = th.cat([param.reshape(-1) for param in self.params])
        step = vector - self.old
        kl = step.square().sum() / 2 if self.kl is None else self.kl(step)
        return self.objective(vector), kl

    def problem(self) -> Problem:
        return ScriptedProblem(self.params, 4, self.evaluate, lambda: Dense(self.matrix))


START = flatten(hostile_params())
IDENTITY = th.eye(4, dtype=th.float64)


def once_moved(value: float) -> Callable[[th.Tensor], th.Tensor]:
    """Zero at the start, and a constant wherever else the parameters are."""
    return lambda vector: th.where((vector.detach() - START).abs().sum() > 0, value, 0.0)


#: Problems without a step to take; the damping; the status that says why.
REJECTIONS: dict[str, tuple[Callable[[], Hostile], float, UpdateStatus]] = {
    "nan_objective": (lambda: Hostile(lambda x: x.sum() * math.nan), 0.1, UpdateStatus.NON_FINITE_OBJECTIVE),
    "inf_objective": (lambda: Hostile(lambda x: x.sum() + math.inf), 0.1, UpdateStatus.NON_FINITE_OBJECTIVE),
    "nan_gradient": (lambda: Hostile(lambda x: (0 * x).sum().sqrt()), 0.1, UpdateStatus.NON_FINITE_GRADIENT),
    "zero_gradient": (lambda: Hostile(lambda x: (0 * x).sum()), 0.1, UpdateStatus.ZERO_GRADIENT),
    "negative_curvature": (lambda: Hostile(matrix=-IDENTITY), 0.1, UpdateStatus.CG_NON_POSITIVE_CURVATURE),
    "negative_curvature_within_damping": (lambda: Hostile(matrix=-0.05 * IDENTITY), 0.1, UpdateStatus.NO_CURVATURE),
    "no_curvature_and_no_damping": (lambda: Hostile(matrix=0 * IDENTITY), 0.0, UpdateStatus.CG_NON_POSITIVE_CURVATURE),
    "nan_operator": (lambda: Hostile(matrix=IDENTITY * math.nan), 0.1, UpdateStatus.CG_NON_FINITE),
    "inf_operator": (lambda: Hostile(matrix=IDENTITY + math.inf), 0.1, UpdateStatus.CG_NON_FINITE),
    "infinite_direction": (
        lambda: Hostile(lambda x: 1e150 * x.sum(), matrix=1e-200 * IDENTITY),
        0.0,
        UpdateStatus.CG_NON_FINITE,
    ),
    "nan_kl": (lambda: Hostile(kl=once_moved(math.nan)), 0.1, UpdateStatus.NON_FINITE),
    "nan_objective_of_trials": (lambda: Hostile(lambda x: x.sum() + once_moved(math.nan)(x)), 0.1, UpdateStatus.NON_FINITE),
    "kl_too_large": (lambda: Hostile(kl=once_moved(1.0)), 0.1, UpdateStatus.KL_TOO_LARGE),
    "no_improvement": (lambda: Hostile(lambda x: x.sum() + once_moved(-1e6)(x)), 0.1, UpdateStatus.NO_IMPROVEMENT),
}


@pytest.mark.parametrize("fill", [True, False])
@pytest.mark.parametrize("case", REJECTIONS)
def test_rejected_step_leaves_every_bit_and_says_why(case: str, fill: bool) -> None:
    make_hostile, damping, status = REJECTIONS[case]
    hostile = make_hostile()
    result = KLConstraint(cg_damping=damping, fill=fill).update(hostile.problem(), TARGET_KL)
    assert result.status == status
    assert not result.is_accepted
    assert bits(hostile.params) == bits(hostile_params())
    assert (result.step_size, result.kl) == (0.0, 0.0)
    assert repr(result.objective_after) == repr(result.objective_before)


def test_rejections_have_a_twin_that_is_accepted() -> None:
    """So that it is not the common part of these problems that is at fault."""
    hostile = Hostile()
    assert KLConstraint().update(hostile.problem(), TARGET_KL).is_accepted
    assert bits(hostile.params) != bits(hostile_params())


@pytest.mark.parametrize("raises_at", [1, 2, 3])
def test_exception_leaves_every_bit(raises_at: int) -> None:
    # The KL makes the search go on after its first trial, the second evaluation
    hostile = Hostile(kl=lambda step: 4 * step.square().sum(), raises_at=raises_at)
    with pytest.raises(Raises):
        KLConstraint().update(hostile.problem(), TARGET_KL)
    assert bits(hostile.params) == bits(hostile_params())


def make_penalty(params: list[nn.Parameter], **kwargs: Any) -> AdaptiveKLPenalty:
    return AdaptiveKLPenalty(params, **{"learning_rate": 1e-3, "n_epochs": 2, "batch_size": 3, **kwargs})


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (100 * TARGET_KL, 2.0),
        (math.nextafter(1.5 * TARGET_KL, 1), 2.0),
        (1.5 * TARGET_KL, 1.0),
        (TARGET_KL, 1.0),
        (TARGET_KL / 1.5, 1.0),
        (math.nextafter(TARGET_KL / 1.5, 0), 0.5),
        (0.0, 0.5),
    ],
)
def test_penalty_adapts_beyond_its_thresholds_only(kl: float, factor: float) -> None:
    hostile = Hostile(kl=lambda step: 0 * step.sum() + kl)
    penalty = make_penalty(hostile.params, beta=3.0)
    result = penalty.update(hostile.problem(), TARGET_KL)
    assert (result.kl, result.beta, penalty.beta) == (kl, 3.0, 3.0 * factor)


@pytest.mark.parametrize(("beta", "kl", "bound"), [(1e10, 1.0, 1e10), (1e-10, 0.0, 1e-10)])
def test_penalty_stays_where_it_can_come_back_from(beta: float, kl: float, bound: float) -> None:
    hostile = Hostile(kl=lambda step: 0 * step.sum() + kl)
    penalty = make_penalty(hostile.params, beta=beta)
    penalty.update(hostile.problem(), TARGET_KL)
    assert penalty.beta == bound


class Regression:
    """A problem that is a mean over samples, so that minibatches differ."""

    def __init__(self, n_samples: int = 7):
        self.params = [nn.Parameter(th.tensor([0.5, -1.0])), nn.Parameter(th.tensor(0.2))]
        self.inputs, self.advantages = th.randn(n_samples, 2), th.randn(n_samples)
        self.old = (self.inputs @ self.params[0] + self.params[1]).detach()
        self.indices: list[list[int]] = []

    def evaluate(self, indices: th.Tensor | None) -> tuple[th.Tensor, th.Tensor]:
        if indices is not None:
            self.indices.append(indices.tolist())
        index = slice(None) if indices is None else indices
        shift = self.inputs[index] @ self.params[0] + self.params[1] - self.old[index]
        return (shift.exp() * self.advantages[index]).mean(), shift.square().mean() / 2

    def problem(self) -> Problem:
        return ScriptedProblem(self.params, len(self.advantages), self.evaluate, lambda: Dense(th.eye(3)))


def test_penalty_is_adam_on_shuffled_minibatches() -> None:
    ours, reference = Regression(), Regression()
    reference.inputs, reference.advantages, reference.old = ours.inputs, ours.advantages, ours.old
    penalty = make_penalty(ours.params, learning_rate=0.01, n_epochs=3, beta=5.0)

    result = penalty.update(ours.problem(), TARGET_KL)

    optimizer = th.optim.Adam(reference.params, lr=0.01, eps=1e-5)
    for indices in ours.indices:
        objective, kl = reference.evaluate(th.tensor(indices))
        optimizer.zero_grad()
        (5.0 * kl - objective).backward()
        optimizer.step()
    assert relative_error(flatten(ours.params), flatten(reference.params)) < 1e-12
    objective, kl = reference.evaluate(None)
    assert (result.objective_after, result.kl) == pytest.approx((objective.item(), kl.item()), rel=1e-9)
    # Each epoch sees every sample once, in an order of its own
    epochs = [[*itertools.chain(*ours.indices[start : start + 3])] for start in (0, 3, 6)]
    assert [len(indices) for indices in ours.indices] == [3, 3, 1] * 3
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 3
    assert epochs[0] != epochs[1]


def test_predicted_improvement_of_the_penalty_is_of_first_order() -> None:
    gaussian = GaussianMean()
    result = make_penalty(gaussian.params).update(gaussian.problem(), TARGET_KL)
    assert result.is_accepted
    assert result.predicted_improvement == pytest.approx(float(GRADIENT @ gaussian.step))
    # The objective is linear, so the prediction is the improvement
    assert result.predicted_improvement == pytest.approx(result.objective_after - result.objective_before)


def test_penalty_finds_a_beta_for_the_target() -> None:
    beta, kls = 1.0, []
    for _ in range(12):
        gaussian = GaussianMean(GRADIENT / STD)
        penalty = make_penalty(gaussian.params, learning_rate=0.05, n_epochs=30, batch_size=4, beta=beta)
        kls.append(penalty.update(gaussian.problem(), TARGET_KL).kl)
        beta = penalty.beta
    assert kls[0] > 4 * TARGET_KL
    # A factor of 2 in beta is one of 4 in the KL, more than the band from 1 / 1.5 to 1.5 is wide
    assert all(TARGET_KL / 4 < kl < 4 * TARGET_KL for kl in kls[-4:])


def optimizer_state(penalty: AdaptiveKLPenalty) -> str:
    return repr(penalty.state_dict()["optimizer"])


@pytest.mark.parametrize("n_updates_before", [0, 2])
@pytest.mark.parametrize("spoilt", ["kl", "objective"])
def test_penalty_undoes_an_update_that_ends_in_nan(spoilt: str, n_updates_before: int) -> None:
    good = Hostile()
    penalty = make_penalty(good.params)
    for _ in range(n_updates_before):
        assert penalty.update(good.problem(), TARGET_KL).is_accepted
    params_before, state_before, beta_before = bits(good.params), optimizer_state(penalty), penalty.beta

    here = flatten(good.params)

    def bad_once_moved(vector: th.Tensor) -> th.Tensor:
        return th.where((vector.detach() - here).abs().sum() > 0, math.nan, 0.0)

    bad = Hostile()
    bad.params = good.params
    if spoilt == "kl":
        bad.kl = lambda step: bad_once_moved(step + bad.old)
    else:
        bad.objective = lambda x: x.sum() + bad_once_moved(x)
    result = penalty.update(bad.problem(), TARGET_KL)

    assert (result.status, result.kl, result.step_size) == (UpdateStatus.NON_FINITE, 0.0, 0.0)
    assert result.objective_after == result.objective_before
    assert bits(good.params) == params_before
    assert optimizer_state(penalty) == state_before
    assert penalty.beta == 2 * beta_before


@pytest.mark.parametrize("case", ["nan_objective", "inf_objective", "nan_gradient"])
def test_penalty_does_not_start_from_what_is_not_finite(case: str) -> None:
    make_hostile, _, status = REJECTIONS[case]
    hostile = make_hostile()
    penalty = make_penalty(hostile.params)
    before = optimizer_state(penalty)
    assert penalty.update(hostile.problem(), TARGET_KL).status == status
    assert bits(hostile.params) == bits(hostile_params())
    assert (optimizer_state(penalty), penalty.beta) == (before, 1.0)


@pytest.mark.parametrize("raises_at", [1, 2, 3])
def test_penalty_undoes_an_update_that_raises(raises_at: int) -> None:
    hostile = Hostile(raises_at=raises_at)
    penalty = make_penalty(hostile.params)
    before = optimizer_state(penalty)
    with pytest.raises(Raises):
        penalty.update(hostile.problem(), TARGET_KL)
    assert bits(hostile.params) == bits(hostile_params())
    assert optimizer_state(penalty) == before
    assert penalty.beta == 1.0
    assert all(param.grad is None for param in hostile.params)


def test_penalty_continues_from_its_state_as_if_nothing_had_happened() -> None:
    one, other = Regression(), Regression()
    other.inputs, other.advantages, other.old = one.inputs, one.advantages, one.old
    penalty = make_penalty(one.params)
    penalty.update(one.problem(), TARGET_KL)
    copy = make_penalty(other.params, beta=77.0)
    with th.no_grad():
        for param, value in zip(other.params, one.params, strict=True):
            param.copy_(value)
    buffer = io.BytesIO()
    th.save(penalty.state_dict(), buffer)
    buffer.seek(0)
    copy.load_state_dict(th.load(buffer))

    results = []
    for updated, problem in ((penalty, one.problem()), (copy, other.problem())):
        th.manual_seed(5)
        results.append(updated.update(problem, TARGET_KL))

    assert repr(results[0]) == repr(results[1])
    assert bits(one.params) == bits(other.params)
    assert penalty.beta == copy.beta != 77.0


def test_only_an_accepted_update_says_that_it_moved_the_parameters() -> None:
    assert UpdateResult(UpdateStatus.ACCEPTED, 0.0, 1.0).is_accepted
    assert not UpdateResult(UpdateStatus.KL_TOO_LARGE, 0.0, 0.0).is_accepted


@pytest.mark.parametrize(("cost", "plain", "preconditioned"), [(0, 0, 1), (1, 1, 1), (2, 2, 1), (100, 3, 0)])
def test_preconditioner_is_built_when_plain_steps_have_cost_as_much(cost: int, plain: int, preconditioned: int) -> None:
    gaussian = GaussianMean()
    fisher = Preconditioned(th.diag(STD**-2), lambda damping: th.diag(1 / (STD**-2 + damping)), cost)
    result = KLConstraint(cg_damping=0.1, cg_tolerance=1e-6).update(gaussian.problem(fisher=lambda: fisher), TARGET_KL)
    assert result.cg_steps == fisher.n_products == plain + preconditioned
    assert fisher.built_after == ([plain] if preconditioned else [])
    direction = natural_gradient(0.1)
    assert relative_error(gaussian.step / gaussian.step.norm(), direction / direction.norm()) < 1e-5


def test_steps_with_and_without_preconditioner_are_bounded_together() -> None:
    gaussian, fisher = GaussianMean(), Preconditioned(th.diag(STD**-2), lambda _: th.eye(3), cost=1)
    update = KLConstraint(cg_damping=0.1, cg_tolerance=1e-9, cg_max_steps=2)
    result = update.update(gaussian.problem(fisher=lambda: fisher), TARGET_KL)
    assert result.cg_steps == fisher.n_products == 2


@pytest.mark.parametrize("share", [0.5, 0.9, 1.5])
def test_line_search_starts_where_it_is_told(share: float) -> None:
    gaussian = GaussianMean()
    update = KLConstraint(cg_damping=0.1, cg_tolerance=1e-12, max_trials=1, fill=True, first_trial=share)
    kls: list[float] = []

    def evaluate(indices: th.Tensor | None) -> tuple[th.Tensor, th.Tensor]:
        objective, kl = gaussian.evaluate(indices)
        kls.append(float(kl.detach()))
        return objective, kl

    result = update.update(gaussian.problem(evaluate=evaluate), TARGET_KL)
    assert kls[1:] == pytest.approx([share**2 * TARGET_KL], rel=1e-9)
    assert result.step_share == pytest.approx(share if share < 1 else 0.0)
