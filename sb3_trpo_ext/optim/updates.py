"""Policy updates inside a trust region: as a constraint (TRPO) or as a penalty."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch as th

from sb3_trpo_ext.optim.conjugate_gradient import CGResult, CGStatus, conjugate_gradient
from sb3_trpo_ext.optim.devices import sent_to
from sb3_trpo_ext.optim.line_search import LineSearchResult, line_search
from sb3_trpo_ext.optim.operators import Averaged, Damped, LinearOperator
from sb3_trpo_ext.optim.status import UpdateStatus
from sb3_trpo_ext.optim.transaction import Transaction
from sb3_trpo_ext.optim.vectors import assign_, flatten, gradient_by_backward, unflatten
from sb3_trpo_ext.parallel.reductions import Shares, average_

#: Products without preconditioner after which to decide whether to build one.
_PROBE = 2
#: The coefficient of the KL stays below this and above its inverse, from where it can come back.
_MAX_BETA = 1e10


class Problem(ABC):
    """What a policy update solves: maximize an objective within a KL ball around where the parameters are now."""

    #: What is optimized; moved in place.
    params: Sequence[th.Tensor]
    n_samples: int
    #: What each process counts in the means over samples.
    shares: Shares = Shares()

    @abstractmethod
    def evaluate(self, indices: th.Tensor | None = None) -> tuple[th.Tensor, th.Tensor]:
        """
        Objective and mean KL(old || new) at the current parameters.

        :param indices: of the samples to average over; ``None`` for all of this process
        :return: two scalars, with a graph if gradients are enabled
        """

    @abstractmethod
    def fisher(self) -> LinearOperator:
        """
        The Fisher matrix of the mean KL at the old parameters, over the samples of this process, without damping.

        Call it before the parameters move.
        """

    def minibatches(self, batch_size: int) -> Iterable[tuple[th.Tensor, float]]:
        """
        Shuffle the samples, and cut them into minibatches.

        :param batch_size: samples in a minibatch per process
        :return: the indices of each, with what this process counts in it
        """
        sizes = self.shares.minibatch_sizes(self.n_samples, batch_size)
        order = sent_to(self.params[0].device, th.randperm(self.n_samples))
        return zip(order.split(sizes), self.shares.minibatch_weights(self.n_samples, batch_size), strict=True)

    def objective_and_gradient(self) -> tuple[th.Tensor, th.Tensor]:
        """
        Objective of all samples of this process and its gradient at the old parameters.

        :return: scalar, and vector of shape ``(n_params,)``
        """
        with th.enable_grad():
            objective, _ = self.evaluate()
            gradient = th.autograd.grad(objective, self.params, materialize_grads=True)
        return objective.detach(), flatten(gradient)


class UpdateResult(NamedTuple):
    """All that happened in a policy update."""

    #: ``ACCEPTED``, or why the parameters are where they were.
    status: UpdateStatus
    objective_before: float
    #: Equal to ``objective_before`` if the update was rejected.
    objective_after: float
    #: First-order prediction of the improvement, g . step.
    predicted_improvement: float = math.nan
    #: Mean KL(old || new) of the step taken.
    kl: float = 0.0
    #: Factor of the direction.
    step_size: float = 0.0
    #: The same relative to the full step of the quadratic model.
    step_share: float = 0.0
    n_trials: int = 0
    grad_norm: float = math.nan
    #: x^T F x of the direction x, without damping.
    curvature: float = math.nan
    cg_steps: int = 0
    #: Residual of conjugate gradient relative to the gradient.
    cg_residual: float = math.nan
    #: Coefficient of the KL during this update; ``None`` for a constraint.
    beta: float | None = None

    @property
    def is_accepted(self) -> bool:
        """Whether the parameters moved."""
        return self.status is UpdateStatus.ACCEPTED


class PolicyUpdate(ABC):
    """
    A way to improve a policy within a trust region.

    An update either moves the parameters of its problem and says so, or leaves every one of them bit-identical and says why.
    """

    @abstractmethod
    def update(self, problem: Problem, target_kl: float) -> UpdateResult:
        """
        Take one step.

        :param problem: objective, KL and Fisher matrix; its parameters are moved in place
        :param target_kl: radius of the trust region, in units of the problem's KL; positive
        :return: what happened
        """


@dataclass(frozen=True)
class KLConstraint(PolicyUpdate):
    """
    Trust region policy optimization: maximize the objective subject to mean KL(old || new) <= target_kl.

    Schulman et al. (2015), appendix C, with two differences. The full step ``sqrt(2 target_kl / x^T F x) x`` uses the
    curvature without damping, which is what the quadratic model of the KL is about (with damping, the step ends well inside
    the region), and the line search fills the region instead of stopping at the first point within it.

    A preconditioner is built only where it pays: after two products the residual tells how many more plain conjugate gradient
    will need. If these are fewer than what building costs, it gets them. Nothing is lost if that is not enough: the
    preconditioned run continues from the solution so far.

    :param cg_max_steps: maximum number of Fisher-vector products
    :param cg_tolerance: of conjugate gradient's residual, relative to the gradient
    :param cg_damping: added to the diagonal of the Fisher matrix
    :param shrinking_factor: of the line search
    :param max_trials: of the line search
    :param fill: whether the line search fills the trust region
    :param damped_scale: scale the full step by the curvature with damping, as sb3-contrib and others do
    :param precondition: use the Fisher matrix's preconditioner, if it has one
    :param first_trial: where the line search starts, as a share of the full step
    """

    cg_max_steps: int = 15
    cg_tolerance: float = 0.1
    cg_damping: float = 0.1
    shrinking_factor: float = 0.8
    max_trials: int = 10
    fill: bool = True
    damped_scale: bool = False
    precondition: bool = True
    first_trial: float = 1.0

    def update(self, problem: Problem, target_kl: float) -> UpdateResult:
        """Take one step along the natural gradient."""
        gradient, result = _before_update(problem)
        if not result.is_accepted:
            return result
        if result.grad_norm == 0:
            return result._replace(status=UpdateStatus.ZERO_GRADIENT)

        solution = self._solve(problem, gradient)
        direction = solution.x
        squared_length, slope = th.stack([th.dot(direction, direction), th.dot(gradient, direction)]).tolist()
        curvature = solution.curvature - self.cg_damping * squared_length
        result = result._replace(curvature=curvature, cg_steps=solution.n_steps, cg_residual=solution.residual_norm)
        if solution.status in (CGStatus.NON_POSITIVE_CURVATURE, CGStatus.NON_FINITE):
            return result._replace(status=UpdateStatus(solution.status))
        scale = solution.curvature if self.damped_scale else curvature
        # Where the KL does not change along the direction, rounding leaves a remainder of either sign
        full_step = math.sqrt(2 * target_kl / scale) if scale > 0 else math.inf
        if not math.isfinite(full_step):
            return result._replace(status=UpdateStatus.NO_CURVATURE)

        search = self._move(problem, direction, full_step, result.objective_before, target_kl)
        return result._replace(
            status=search.status,
            objective_after=search.objective,
            predicted_improvement=search.step_size * slope,
            kl=search.kl,
            step_size=search.step_size,
            step_share=search.step_size / full_step,
            n_trials=search.n_trials,
        )

    def _move(
        self, problem: Problem, direction: th.Tensor, full_step: float, objective: float, target_kl: float
    ) -> LineSearchResult:
        """Search along the direction, and move the parameters to where the search ends."""
        old = flatten(problem.params)

        @th.no_grad()
        def evaluate(step_size: float) -> tuple[float, float]:
            assign_(problem.params, th.add(old, direction, alpha=step_size))
            return _evaluated(problem)

        first, step_size = full_step * self.first_trial, 0.0
        try:
            search = line_search(evaluate, objective, target_kl, first, self.shrinking_factor, self.max_trials, fill=self.fill)
            step_size = search.step_size
        finally:
            # The one place that decides where the parameters end, after an exception too. Not `old + 0 * direction`: that
            # turns -0.0 into 0.0, and an infinite direction into NaN
            assign_(problem.params, th.add(old, direction, alpha=step_size) if step_size > 0 else old)
        return search

    def _solve(self, problem: Problem, gradient: th.Tensor) -> CGResult:
        """Solve ``(F + damping I) x = gradient``."""
        fisher = problem.fisher()
        damped = Damped(Averaged(fisher, problem.shares), self.cg_damping)

        def run(n_steps: int, start: CGResult | None = None, preconditioner: LinearOperator | None = None) -> CGResult:
            return conjugate_gradient(damped, gradient, n_steps, self.cg_tolerance, preconditioner, start)

        # The mean over processes, whose numbers of samples may differ: all have to come to the same decision
        cost = float(problem.shares.mean(th.tensor(float(fisher.preconditioner_cost))))
        n_worth = round(cost) if math.isfinite(cost) else self.cg_max_steps
        if not self.precondition or self.cg_damping == 0 or n_worth >= self.cg_max_steps:
            return run(self.cg_max_steps)
        solution = run(min(n_worth, _PROBE))
        if solution.status is CGStatus.MAX_STEPS and _remaining_steps(solution, self.cg_tolerance) <= n_worth:
            solution = run(min(n_worth, self.cg_max_steps - solution.n_steps), solution)
        n_steps = self.cg_max_steps - solution.n_steps
        if solution.status is CGStatus.MAX_STEPS and n_steps > 0:
            solution = run(n_steps, solution, fisher.preconditioner(self.cg_damping))
        return solution


class AdaptiveKLPenalty(PolicyUpdate):
    """
    The penalized form: maximize ``objective - beta KL(old || new)`` by Adam, with a beta that keeps the KL near its target.

    Schulman et al. (2017), section 4: after each update beta is doubled if the KL came out above 1.5 times the target and
    halved if it came out below the target divided by 1.5. The KL is not bounded; an update that ends in a NaN is undone.

    The optimizer may hold more parameters than a problem has: an update steps those of the problem only.

    :param params: the parameters of all problems to come
    :param learning_rate: of Adam; 3e-4 as in Schulman et al. (2017), table 3
    :param n_epochs: passes over the batch per update; 10 as there
    :param batch_size: of the minibatches; 64 as there
    :param beta: the first coefficient; 1 as there
    """

    def __init__(
        self,
        params: Sequence[th.Tensor],
        learning_rate: float = 3e-4,
        n_epochs: int = 10,
        batch_size: int = 64,
        beta: float = 1.0,
    ):
        # PyTorch does not take NumPy's integers everywhere
        self.n_epochs = int(n_epochs)
        self.batch_size = int(batch_size)
        self.beta = beta
        self.optimizer = th.optim.Adam(params, lr=learning_rate, eps=1e-5)

    def update(self, problem: Problem, target_kl: float) -> UpdateResult:
        """Run the epochs of Adam, then adapt beta."""
        gradient, result = _before_update(problem)
        result = result._replace(beta=self.beta)
        if not result.is_accepted:
            return result
        old = flatten(problem.params)
        with Transaction(problem.params, self.optimizer) as transaction:
            self._run_epochs(problem)
            with th.no_grad():
                objective, kl = _evaluated(problem)
                moved = flatten(problem.params) - old
            is_finite = math.isfinite(objective) and math.isfinite(kl) and bool(th.isfinite(moved).all())
            if is_finite:
                transaction.commit()
        # With finite gradients, only a step that goes too far leads to a NaN
        if not is_finite or kl > 1.5 * target_kl:
            self.beta = min(2 * self.beta, _MAX_BETA)
        elif kl < target_kl / 1.5:
            self.beta = max(self.beta / 2, 1 / _MAX_BETA)
        if not is_finite:
            return result._replace(status=UpdateStatus.NON_FINITE)
        predicted = float(th.dot(gradient, moved))
        return result._replace(objective_after=objective, predicted_improvement=predicted, kl=kl, step_size=1.0)

    def _run_epochs(self, problem: Problem) -> None:
        """Maximize the penalized objective over shuffled minibatches."""
        self.optimizer.zero_grad(set_to_none=True)
        for _ in range(self.n_epochs):
            for indices, weight in problem.minibatches(self.batch_size):
                objective, kl = problem.evaluate(indices)
                gradient = gradient_by_backward(self.beta * kl - objective, problem.params)
                average_(gradient, weight)
                for param, part in zip(problem.params, unflatten(gradient, problem.params), strict=True):
                    param.grad = part
                self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Beta and Adam's moments."""
        return {"beta": self.beta, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.beta = state_dict["beta"]
        self.optimizer.load_state_dict(state_dict["optimizer"])


def _remaining_steps(solution: CGResult, tolerance: float) -> float:
    """How many more steps conjugate gradient needs if the residual goes on shrinking at the same rate; may be infinite."""
    if solution.n_steps == 0 or solution.residual_norm >= 1 or tolerance == 0:
        return math.inf
    return solution.n_steps * (math.log(tolerance) / math.log(solution.residual_norm) - 1)


def _evaluated(problem: Problem) -> tuple[float, float]:
    """Objective and KL at the current parameters, over the samples of all processes."""
    objective, kl = problem.shares.mean(th.stack(problem.evaluate())).tolist()
    return objective, kl


def _before_update(problem: Problem) -> tuple[th.Tensor, UpdateResult]:
    """The flat gradient over the samples of all processes, and a result with the status ``ACCEPTED`` if all is finite."""
    objective, gradient = problem.shares.means(problem.objective_and_gradient())
    value, norm = th.stack([objective, gradient.norm()]).tolist()
    status = UpdateStatus.ACCEPTED
    if not math.isfinite(value):
        status = UpdateStatus.NON_FINITE_OBJECTIVE
    elif not math.isfinite(norm):
        status = UpdateStatus.NON_FINITE_GRADIENT
    return gradient, UpdateResult(status, value, value, grad_norm=norm)
