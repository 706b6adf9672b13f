"""Policy updates inside a trust region: as a constraint (TRPO) or as a penalty."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch as th

from sb3_trpo_ext.optim.conjugate_gradient import CGResult, CGStatus, conjugate_gradient
from sb3_trpo_ext.optim.devices import sent_to
from sb3_trpo_ext.optim.line_search import line_search
from sb3_trpo_ext.optim.operators import Averaged, Damped, LinearOperator
from sb3_trpo_ext.optim.status import UpdateStatus
from sb3_trpo_ext.optim.vectors import assign_, flatten, gradient_by_backward, unflatten
from sb3_trpo_ext.parallel.reductions import all_mean, all_means, average_, minibatch_shares, minibatch_sizes

#: Products without preconditioner after which to decide whether to build one.
_PROBE = 2


class Problem(NamedTuple):
    """
    What a policy update is given: maximise an objective within a KL ball around where the parameters are now.

    ``evaluate(indices)`` returns (objective, mean KL(old || new)) at the current parameters as scalars, with a graph if
    gradients are enabled: of the whole batch for ``None``, else of the samples at these indices. ``fisher()`` returns the
    operator of the Fisher matrix at the current parameters, without damping; ``preconditioner(fisher, damping)``, where there
    is one, an approximate inverse of ``fisher + damping I`` for a positive damping, or ``None`` if that failed, and
    ``preconditioner_cost(fisher)`` how many products with ``fisher`` it takes the time of. ``gradient()``, where there is one,
    returns the objective of the whole batch with its flat gradient, for a problem that knows a faster way to it than autograd.
    """

    params: Sequence[th.Tensor]
    n_samples: int
    evaluate: Callable[[th.Tensor | None], tuple[th.Tensor, th.Tensor]]
    fisher: Callable[[], LinearOperator]
    preconditioner: Callable[[LinearOperator, float], Callable[[th.Tensor], th.Tensor] | None] | None = None
    gradient: Callable[[], tuple[th.Tensor, th.Tensor]] | None = None
    preconditioner_cost: Callable[[LinearOperator], int] = lambda _: 0


class UpdateResult(NamedTuple):
    """All that happened in a policy update; entries that a kind of update does not have are NaN or 0."""

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
    #: Coefficient of the KL during this update.
    beta: float = math.nan

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


class KLConstraint(PolicyUpdate):
    """
    Trust region policy optimisation: maximise the objective subject to mean KL(old || new) <= target_kl.

    Schulman et al. (2015), appendix C, with two differences. The full step ``sqrt(2 target_kl / x^T F x) x`` uses the
    curvature without damping, which is what the quadratic model of the KL is about (with damping, the step ends well inside
    the region), and the line search fills the region instead of stopping at the first point within it.

    A preconditioner is built only where it pays: after two products the residual tells how many more plain conjugate gradient
    will need, and if these are fewer than what building costs, it gets them. Nothing is lost where that does not suffice: the
    preconditioned run goes on from the solution so far.

    :param cg_max_steps: at most that many Fisher-vector products
    :param cg_tolerance: of conjugate gradient's residual, relative to the gradient
    :param cg_damping: added to the diagonal of the Fisher matrix
    :param shrinking_factor: of the line search
    :param max_trials: of the line search
    :param fill: whether the line search fills the trust region
    :param damped_scale: scale the full step by the curvature with damping, as sb3-contrib and others do
    :param precondition: use the problem's preconditioner, if it has one
    :param first_trial: where the line search starts, as a share of the full step
    """

    def __init__(
        self,
        cg_max_steps: int = 15,
        cg_tolerance: float = 0.1,
        cg_damping: float = 0.1,
        shrinking_factor: float = 0.8,
        max_trials: int = 10,
        fill: bool = True,
        damped_scale: bool = False,
        precondition: bool = True,
        first_trial: float = 1.0,
    ):
        self.cg_max_steps = cg_max_steps
        self.cg_tolerance = cg_tolerance
        self.cg_damping = cg_damping
        self.shrinking_factor = shrinking_factor
        self.max_trials = max_trials
        self.fill = fill
        self.damped_scale = damped_scale
        self.precondition = precondition
        self.first_trial = first_trial

    def update(self, problem: Problem, target_kl: float) -> UpdateResult:
        """
        Take one step along the natural gradient.

        :param problem: objective, KL and Fisher matrix; its parameters are moved in place
        :param target_kl: radius of the trust region
        :return: what happened
        """
        objective, gradient, grad_norm = _objective_and_gradient(problem)
        result = UpdateResult(UpdateStatus.ACCEPTED, objective, objective, grad_norm=grad_norm)
        if not math.isfinite(objective):
            return result._replace(status=UpdateStatus.NON_FINITE_OBJECTIVE)
        if not math.isfinite(result.grad_norm):
            return result._replace(status=UpdateStatus.NON_FINITE_GRADIENT)
        if result.grad_norm == 0:
            return result._replace(status=UpdateStatus.ZERO_GRADIENT)

        solution = self._solve(problem, gradient)
        direction = solution.x
        squared_length, slope = th.stack([th.dot(direction, direction), th.dot(gradient, direction)]).tolist()
        curvature = solution.curvature - self.cg_damping * squared_length
        result = result._replace(curvature=curvature, cg_steps=solution.n_steps, cg_residual=solution.residual_norm)
        if solution.status in (CGStatus.NON_POSITIVE_CURVATURE, CGStatus.NON_FINITE):
            return result._replace(status=UpdateStatus[f"CG_{solution.status.name}"])
        scale = solution.curvature if self.damped_scale else curvature
        # Where the KL does not feel the direction at all, rounding leaves a remainder of either sign
        full_step = math.sqrt(2 * target_kl / scale) if scale > 0 else math.inf
        if not math.isfinite(full_step):
            return result._replace(status=UpdateStatus.NO_CURVATURE)

        old = flatten(problem.params)

        @th.no_grad()
        def evaluate(step_size: float) -> tuple[float, float]:
            assign_(problem.params, th.add(old, direction, alpha=step_size))
            new_objective, kl = all_mean(th.stack(problem.evaluate(None))).tolist()
            return new_objective, kl

        step_size = 0.0
        try:
            search = line_search(
                evaluate,
                objective,
                target_kl,
                full_step * self.first_trial,
                self.shrinking_factor,
                self.max_trials,
                fill=self.fill,
            )
            step_size = search.step_size
        finally:
            # The one place that decides where the parameters end, on an exception too. Not `old + 0 * direction`: that turns
            # -0.0 into 0.0, and an infinite direction into NaN
            assign_(problem.params, th.add(old, direction, alpha=step_size) if step_size > 0 else old)
        return result._replace(
            status=UpdateStatus[search.status.name],
            objective_after=search.objective,
            predicted_improvement=search.step_size * slope,
            kl=search.kl,
            step_size=search.step_size,
            step_share=search.step_size / full_step,
            n_trials=search.n_trials,
        )

    def _solve(self, problem: Problem, gradient: th.Tensor) -> CGResult:
        """
        Solve ``(F + damping I) x = gradient``.

        :param problem: with the Fisher matrix
        :param gradient: the right-hand side
        :return: x with its status; steps are those with and without preconditioner
        """
        fisher = problem.fisher()
        damped = Damped(Averaged(fisher), self.cg_damping)
        if not self.precondition or problem.preconditioner is None or self.cg_damping == 0:
            return conjugate_gradient(damped, gradient, self.cg_max_steps, self.cg_tolerance)
        # The same on all processes, whose numbers of samples may differ: all have to come to the same decision
        cost = round(float(all_mean(th.tensor(float(problem.preconditioner_cost(fisher))))))
        n_steps = self.cg_max_steps if cost >= self.cg_max_steps else min(cost, _PROBE)
        solution = conjugate_gradient(damped, gradient, n_steps, self.cg_tolerance)
        if solution.status is CGStatus.MAX_STEPS and _remaining_steps(solution, self.cg_tolerance) <= cost:
            n_steps = min(cost, self.cg_max_steps - solution.n_steps)
            solution = _continued(conjugate_gradient(damped, gradient, n_steps, self.cg_tolerance, start=solution), solution)
        n_steps = self.cg_max_steps - solution.n_steps
        if solution.status is CGStatus.MAX_STEPS and n_steps > 0:
            preconditioner = problem.preconditioner(fisher, self.cg_damping)
            solution = _continued(
                conjugate_gradient(damped, gradient, n_steps, self.cg_tolerance, preconditioner, start=solution), solution
            )
        return solution


class AdaptiveKLPenalty(PolicyUpdate):
    """
    The penalised form: maximise ``objective - beta KL(old || new)`` by Adam, with a beta that keeps the KL near its target.

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
        """
        Run the epochs of Adam, then adapt beta.

        :param problem: objective and KL; its parameters are moved in place
        :param target_kl: what the KL of an update should be
        :return: what happened
        """
        objective, gradient, grad_norm = _objective_and_gradient(problem)
        result = UpdateResult(UpdateStatus.ACCEPTED, objective, objective, grad_norm=grad_norm, beta=self.beta)
        if not math.isfinite(objective):
            return result._replace(status=UpdateStatus.NON_FINITE_OBJECTIVE)
        if not math.isfinite(result.grad_norm):
            return result._replace(status=UpdateStatus.NON_FINITE_GRADIENT)

        old = flatten(problem.params)
        old_optimizer = copy.deepcopy(self.optimizer.state_dict())
        is_accepted = False
        try:
            self._run_epochs(problem)
            with th.no_grad():
                new_objective, kl = all_mean(th.stack(problem.evaluate(None))).tolist()
                moved = flatten(problem.params) - old
            is_accepted = math.isfinite(new_objective) and math.isfinite(kl) and bool(th.isfinite(moved).all())
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            if not is_accepted:
                assign_(problem.params, old)
                self.optimizer.load_state_dict(old_optimizer)
        if not is_accepted:
            # Too far is the one way to get here from finite gradients: penalise more
            self._multiply_beta(2.0)
            return result._replace(status=UpdateStatus.NON_FINITE)
        if kl > 1.5 * target_kl:
            self._multiply_beta(2.0)
        elif kl < target_kl / 1.5:
            self._multiply_beta(0.5)
        return result._replace(
            objective_after=new_objective,
            predicted_improvement=float(th.dot(gradient, moved)),
            kl=kl,
            step_size=1.0,
        )

    def _multiply_beta(self, factor: float) -> None:
        """
        Adapt beta, within bounds from which it can come back.

        :param factor: what it is multiplied by
        """
        self.beta = min(max(self.beta * factor, 1e-10), 1e10)

    def _run_epochs(self, problem: Problem) -> None:
        """
        Maximise the penalised objective over shuffled minibatches.

        :param problem: objective and KL
        """
        self.optimizer.zero_grad(set_to_none=True)
        sizes = minibatch_sizes(problem.n_samples, self.batch_size)
        shares = minibatch_shares(problem.n_samples, self.batch_size)
        for _ in range(self.n_epochs):
            order = sent_to(problem.params[0].device, th.randperm(problem.n_samples))
            for indices, share in zip(order.split(sizes), shares, strict=True):
                objective, kl = problem.evaluate(indices)
                loss = self.beta * kl - objective
                gradient = gradient_by_backward(loss, problem.params)
                average_(gradient, share)
                for param, part in zip(problem.params, unflatten(gradient, problem.params), strict=True):
                    param.grad = part
                self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """
        Beta and Adam's moments.

        :return: the state
        """
        return {"beta": self.beta, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> None:
        """
        Restore what :meth:`state_dict` returned.

        :param state_dict: the state
        :param strict: not used, there are no optional entries: SB3 passes it as it does to a module
        """
        self.beta = state_dict["beta"]
        self.optimizer.load_state_dict(state_dict["optimizer"])


def _remaining_steps(solution: CGResult, tolerance: float) -> float:
    """
    How many more steps conjugate gradient will need, if the residual goes on to shrink by the same factor per step.

    :param solution: so far
    :param tolerance: where it ends
    :return: the number; infinite if it does not shrink
    """
    if solution.n_steps == 0 or solution.residual_norm >= 1 or tolerance == 0:
        return math.inf
    return solution.n_steps * (math.log(tolerance) / math.log(solution.residual_norm) - 1)


def _continued(second: CGResult, first: CGResult) -> CGResult:
    """
    The result of two runs, one after the other.

    :param second: what the second run returned
    :param first: where it started
    :return: the same with the steps of both
    """
    return second._replace(n_steps=first.n_steps + second.n_steps)


def _objective_and_gradient(problem: Problem) -> tuple[float, th.Tensor, float]:
    """
    Objective of the whole batch and its flat gradient at the current parameters, averaged over the processes.

    :param problem: the objective
    :return: objective, gradient of shape ``(n_params,)`` and its norm
    """
    if problem.gradient is not None:
        objective, gradient = problem.gradient()
    else:
        with th.enable_grad():
            objective, _ = problem.evaluate(None)
            gradient = flatten(th.autograd.grad(objective, problem.params, materialize_grads=True))
    objective, gradient = all_means([objective.detach(), gradient])
    value, norm = th.stack([objective, gradient.norm()]).tolist()
    return value, gradient, norm
