"""Preconditioned conjugate gradient with a status, for a CPU and for an accelerator.

On an accelerator the loop always makes ``max_steps`` products and freezes the iterate on the device once it is done, so that
the host waits for it once, at the end. On the CPU, where the host can read a number at no cost, the loop stops there.
"""

from enum import Enum
from typing import NamedTuple

import torch as th

from sb3_trpo_ext.optim.operators import LinearOperator


class CGStatus(str, Enum):
    """How a run of conjugate gradient ended."""

    CONVERGED = "converged"
    MAX_STEPS = "max_steps"
    NON_POSITIVE_CURVATURE = "non_positive_curvature"
    NON_FINITE = "non_finite"


class CGResult(NamedTuple):
    """What conjugate gradient found; with the status ``NON_POSITIVE_CURVATURE`` or ``NON_FINITE``, ``x`` is no solution."""

    #: The solution of ``A x = b``, shape ``(n_params,)``.
    x: th.Tensor
    #: ``x^T A x``, without a further product: ``x . (b - r)``.
    curvature: float
    #: Norm of the residual relative to that of ``b``, in the norm of the preconditioner.
    residual_norm: float
    #: Number of products with A that moved ``x``, those of an earlier run that was continued included.
    n_steps: int
    status: CGStatus
    #: ``b - A x`` as the recursion has it, shape ``(n_params,)``.
    residual: th.Tensor
    #: The search direction of the next step, shape ``(n_params,)``; ``None`` after a preconditioned run.
    direction: th.Tensor | None


_STATUSES = tuple(CGStatus)
_CONVERGED, _MAX_STEPS, _NON_POSITIVE, _NON_FINITE = range(4)


def _is_free_to_read(tensor: th.Tensor) -> bool:
    """Whether the host can read a number of this tensor without waiting for an accelerator."""
    return tensor.device.type == "cpu"


@th.no_grad()
def conjugate_gradient(
    operator: LinearOperator,
    b: th.Tensor,
    max_steps: int,
    tolerance: float,
    preconditioner: LinearOperator | None = None,
    start: CGResult | None = None,
) -> CGResult:
    """
    Solve ``A x = b`` for a positive definite A (Hestenes & Stiefel 1952; preconditioned: Saad 2003, algorithm 9.1).

    Starts at zero or where an earlier run stopped, without a product for the start and without random numbers. Ends as soon as
    ``||r||_P <= tolerance ||b||_P`` with ``||v||_P^2 = v . P v``. A zero ``b`` is solved by zero.

    :param operator: A
    :param b: the right-hand side, shape ``(n_params,)``
    :param max_steps: maximum number of products with A
    :param tolerance: of the residual, relative to ``b``
    :param preconditioner: P, an approximate inverse of A: symmetric positive definite
    :param start: result of an earlier run on the same A and b. Two runs without a preconditioner are one run; a preconditioner
        starts with search directions of its own
    :return: the solution with its status
    """
    iteration = _Iteration(operator, b, tolerance, preconditioner, start)
    for _ in range(max_steps):
        if iteration.can_stop():
            break
        iteration.step()
    return iteration.result()


class _Iteration:
    """The state of a run of :func:`conjugate_gradient`: x, residual r, search direction p, and ``z = P r``."""

    def __init__(
        self,
        operator: LinearOperator,
        b: th.Tensor,
        tolerance: float,
        preconditioner: LinearOperator | None,
        start: CGResult | None,
    ):
        self._operator, self._b, self._preconditioner = operator, b, preconditioner
        self._x, self._r = (th.zeros_like(b), b) if start is None else (start.x, start.residual)
        z = self._preconditioned(self._r)
        direction = None if start is None or preconditioner is not None else start.direction
        self._p = z if direction is None else direction
        self._rz = th.dot(self._r, z)
        self._bz = self._rz if start is None else th.dot(b, self._preconditioned(b))
        self._bound = tolerance**2 * self._bz
        self._n_steps = th.full((), 0 if start is None else start.n_steps, device=b.device)
        # The first of several reasons counts, so the status is written only while the iteration is active
        status = th.full((), _MAX_STEPS, device=b.device)
        status = th.where(self._rz <= self._bound, _CONVERGED, status)
        self._status = th.where(th.isfinite(self._rz), status, _NON_FINITE)
        self._active = self._status == _MAX_STEPS
        self._is_free_to_read = _is_free_to_read(b)

    def _preconditioned(self, vector: th.Tensor) -> th.Tensor:
        return vector if self._preconditioner is None else self._preconditioner @ vector

    def _if_active(self, new: th.Tensor, old: th.Tensor) -> th.Tensor:
        # Where the loop stops, the choice would be one more pass over each vector
        return new if self._is_free_to_read else th.where(self._active, new, old)

    def can_stop(self) -> bool:
        """Whether the iteration is over and the host can know it without waiting."""
        return self._is_free_to_read and not self._active

    def step(self) -> None:
        """Make one product and move x."""
        ap = self._operator @ self._p
        curvature = th.dot(self._p, ap)
        # A NaN in `ap` that `p` multiplies by zero still makes the dot product NaN, so this one number tells of them all
        is_finite = th.isfinite(curvature)
        self._status = th.where(self._active & ~is_finite, _NON_FINITE, self._status)
        self._status = th.where(self._active & is_finite & (curvature <= 0), _NON_POSITIVE, self._status)
        self._active = self._active & is_finite & (curvature > 0)
        if self.can_stop():
            return
        alpha = self._rz / curvature
        self._x = self._if_active(self._x + alpha * self._p, self._x)
        self._r = self._if_active(self._r - alpha * ap, self._r)
        z = self._preconditioned(self._r)
        rz = th.dot(self._r, z)
        self._n_steps = self._n_steps + self._active
        self._status = th.where(self._active & ~th.isfinite(rz), _NON_FINITE, self._status)
        self._status = th.where(self._active & (rz <= self._bound), _CONVERGED, self._status)
        self._p = self._if_active(z + (rz / self._rz) * self._p, self._p)
        self._rz = self._if_active(rz, self._rz)
        self._active = self._active & (self._status == _MAX_STEPS)

    def result(self) -> CGResult:
        """What was found, in one transfer to the host."""
        # An overflow can spoil the iterate in the very step that reveals it
        status = th.where(th.isfinite(self._x.abs().amax()), self._status, _NON_FINITE)
        residual_norm = th.where(self._bz == 0, self._bz, (self._rz / self._bz).clamp(min=0).sqrt())
        curvature = th.dot(self._x, self._b - self._r)
        numbers = [curvature, residual_norm, self._n_steps.to(curvature), status.to(curvature)]
        values = th.stack(numbers).tolist()
        return CGResult(
            x=self._x,
            curvature=values[0],
            residual_norm=values[1],
            n_steps=int(values[2]),
            status=_STATUSES[int(values[3])],
            residual=self._r,
            direction=self._p if self._preconditioner is None else None,
        )
