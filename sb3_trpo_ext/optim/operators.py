"""Linear operators: the Fisher matrix of a policy in its forms, and what is composed around it.

An operator only knows how to multiply a vector; no matrix is ever formed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch as th

from sb3_trpo_ext.optim.vectors import flatten, unflatten
from sb3_trpo_ext.parallel.reductions import Shares

#: The statistics of a policy's distribution on a batch (mean and log std, logits, ...): tensors whose first axis is the batch.
Statistics = tuple[th.Tensor, ...]
#: Maps tangents of the statistics to cotangents, sample by sample: the Fisher matrix in output space.
OutputFisher = Callable[[Statistics], Statistics]


class LinearOperator(ABC):
    """A symmetric matrix that can be multiplied with a vector of shape ``(n_params,)``: ``operator @ vector``."""

    @abstractmethod
    def __matmul__(self, vector: th.Tensor) -> th.Tensor:
        """Multiply; the result has the shape of ``vector``."""

    @property
    def preconditioner_cost(self) -> float:
        """What :meth:`preconditioner` costs, in products with this operator; infinite if there is none."""
        return math.inf

    def preconditioner(self, damping: float) -> LinearOperator | None:
        """An approximate inverse of ``A + damping I``."""
        return None


class Jacobian(ABC):
    """The derivative J of a policy's statistics on a batch with respect to its parameters."""

    #: Number of samples in the batch, which is the first axis of every statistic.
    n_samples: int

    @abstractmethod
    def jvp(self, vector: th.Tensor) -> Statistics:
        """
        J v: how the statistics move when the parameters move along ``vector``.

        :param vector: shape ``(n_params,)``
        :return: one tangent per statistic, of that statistic's shape
        """

    @abstractmethod
    def vjp(self, cotangents: Statistics) -> th.Tensor:
        """
        J^T u, summed over the samples.

        :param cotangents: one per statistic, of that statistic's shape
        :return: shape ``(n_params,)``
        """


class AutogradJacobian(Jacobian):
    """
    J of any architecture, by automatic differentiation.

    ``J^T u`` is one reverse pass. ``J v`` is the derivative of ``v . J^T u`` with respect to the dummy ``u`` (the
    "double-backward trick", J. Townsend 2017): it needs no forward-mode formulas, only operations that can be differentiated
    twice, and two reverse passes. The graphs are built once and kept.

    :param statistics: the statistics on the batch, with their graph
    :param params: the parameters, each reachable from the statistics
    """

    def __init__(self, statistics: Statistics, params: Sequence[th.Tensor]):
        self.n_samples = statistics[0].shape[0]
        self._params = list(params)
        self._dummies = [th.zeros_like(statistic, requires_grad=True) for statistic in statistics]
        # One that depends on no parameter, such as a log std that is frozen, has no graph
        self._has_graph = [statistic.requires_grad for statistic in statistics]
        self._statistics = self._with_graph(statistics)
        self._pullback = _pulled_back(self._with_graph(self._dummies), self._statistics, self._params, create_graph=True)

    def _with_graph(self, tensors: Sequence[th.Tensor]) -> list[th.Tensor]:
        """Of one tensor per statistic, those whose statistic has a graph."""
        return [tensor for tensor, has_graph in zip(tensors, self._has_graph, strict=True) if has_graph]

    def jvp(self, vector: th.Tensor) -> Statistics:
        """J v by the double-backward trick."""
        tangents = unflatten(vector, self._params)
        # A parameter outside every statistic has a pullback without graph, and so does a network that ignores its input
        paired = [(p, t) for p, t in zip(self._pullback, tangents, strict=True) if p.requires_grad]
        return _pulled_back([tangent for _, tangent in paired], [pullback for pullback, _ in paired], self._dummies)

    def vjp(self, cotangents: Statistics) -> th.Tensor:
        """J^T u by one reverse pass."""
        return flatten(_pulled_back(self._with_graph(cotangents), self._statistics, self._params))


def _pulled_back(
    cotangents: Sequence[th.Tensor], outputs: Sequence[th.Tensor], inputs: Sequence[th.Tensor], create_graph: bool = False
) -> Statistics:
    """``cotangents . d outputs / d inputs``, one tensor per input, by a reverse pass that keeps the graph."""
    return th.autograd.grad(outputs, inputs, cotangents, retain_graph=True, create_graph=create_graph, materialize_grads=True)


class GaussNewtonFisher(LinearOperator):
    """
    The Fisher matrix ``F = J^T M J / n`` of a policy on a batch of n samples.

    M is block-diagonal: per sample, the Hessian of KL(old || new) in the statistics of ``new``, at ``new = old``. Since the KL
    has no gradient there, F is exactly the Hessian of the mean KL in the parameters (Martens 2014, "New insights and
    perspectives on the natural gradient method", section 9; Schulman et al. 2015, appendix C.1), at the cost of first
    derivatives alone, and positive semi-definite in floating point too.

    :param jacobian: J
    :param output_fisher: maps the tangents ``J v`` to ``M J v``, sample by sample
    """

    def __init__(self, jacobian: Jacobian, output_fisher: OutputFisher):
        self.jacobian = jacobian
        self._output_fisher = output_fisher

    def __matmul__(self, vector: th.Tensor) -> th.Tensor:
        return self.jacobian.vjp(self._output_fisher(self.jacobian.jvp(vector))) / self.jacobian.n_samples


class HessianFisher(LinearOperator):
    """
    The Fisher matrix as the Hessian of the mean KL, by double backpropagation (Schulman et al. 2015, appendix C.1).

    Needs nothing but the KL, so it serves distributions whose Fisher matrix has not been derived; it costs more than
    :class:`GaussNewtonFisher`, for which it is the oracle.

    :param mean_kl: KL(old || new) averaged over the batch, at ``new = old``, with its graph
    :param params: the parameters, each reachable from the KL
    """

    def __init__(self, mean_kl: th.Tensor, params: Sequence[th.Tensor]):
        self._params = list(params)
        gradient = th.autograd.grad(mean_kl, self._params, create_graph=True, materialize_grads=True)
        self._gradient = th.cat([part.reshape(-1) for part in gradient])

    def __matmul__(self, vector: th.Tensor) -> th.Tensor:
        """F v as the gradient of ``grad(KL) . v``."""
        return flatten(_pulled_back([vector], [self._gradient], self._params))


class ChunkedOperator(LinearOperator):
    """A weighted sum of operators that are built again for every product, so that only one graph at a time is in memory."""

    def __init__(self, parts: Sequence[Callable[[], LinearOperator]], weights: Sequence[float]):
        self._parts = parts
        self._weights = weights

    def __matmul__(self, vector: th.Tensor) -> th.Tensor:
        result = th.zeros_like(vector)
        for make, weight in zip(self._parts, self._weights, strict=True):
            result.add_(make() @ vector, alpha=weight)
        return result


class Damped(LinearOperator):
    """``A + damping I``; the damping is in the units of A and not negative."""

    def __init__(self, operator: LinearOperator, damping: float):
        self._operator = operator
        self._damping = damping

    def __matmul__(self, vector: th.Tensor) -> th.Tensor:
        return th.add(self._operator @ vector, vector, alpha=self._damping)


class Projected(LinearOperator):
    """
    ``P A P`` with the projection P that sets some entries of a vector to zero.

    Conjugate gradient stays among the vectors that P keeps, where the damped operator is positive definite.

    :param operator: A
    :param is_kept: the entries that P keeps, booleans of shape ``(n_params,)``
    """

    def __init__(self, operator: LinearOperator, is_kept: th.Tensor):
        self._operator = operator
        self._is_kept = is_kept

    @property
    def preconditioner_cost(self) -> float:
        """That of A."""
        return self._operator.preconditioner_cost

    def preconditioner(self, damping: float) -> LinearOperator | None:
        """``P B P`` with the preconditioner B of A."""
        inverse = self._operator.preconditioner(damping)
        return None if inverse is None else Projected(inverse, self._is_kept)

    def __matmul__(self, vector: th.Tensor) -> th.Tensor:
        return (self._operator @ (vector * self._is_kept)) * self._is_kept


class Averaged(LinearOperator):
    """
    The mean of an operator over all processes of a data-parallel run; the operator itself on one process.

    All processes must multiply the same vector, and get the same product.
    """

    def __init__(self, operator: LinearOperator, shares: Shares):
        self._operator = operator
        self._shares = shares

    def __matmul__(self, vector: th.Tensor) -> th.Tensor:
        return self._shares.mean(self._operator @ vector)
