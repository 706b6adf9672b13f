"""Preconditioned conjugate gradient with a status, and without a host synchronisation per step on an accelerator."""

from collections.abc import Callable
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
    #: Number of products with A that moved ``x``.
    n_steps: int
    status: CGStatus


_STATUSES = tuple(CGStatus)
_CONVERGED, _MAX_STEPS, _NON_POSITIVE, _NON_FINITE = range(4)


def _is_free_to_read(tensor: th.Tensor) -> bool:
    """
    Whether the host can look at a number without waiting for an accelerator.

    :param tensor: where the number is
    :return: true on the CPU
    """
    return tensor.device.type == "cpu"


@th.no_grad()
def conjugate_gradient(
    operator: LinearOperator,
    b: th.Tensor,
    max_steps: int,
    tolerance: float,
    preconditioner: Callable[[th.Tensor], th.Tensor] | None = None,
) -> CGResult:
    """
    Solve ``A x = b`` for a positive definite A (Hestenes & Stiefel 1952; preconditioned: Saad 2003, algorithm 9.1).

    Starts at zero, so that no product is spent on the start and no random numbers are consumed, and ends as soon as
    ``||r||_P <= tolerance ||b||_P`` with ``||v||_P^2 = v . P v``. A zero ``b`` is solved by zero.

    On an accelerator the loop always makes ``max_steps`` products and freezes the iterate on the device once it is done; the
    host waits for it once, at the end. On the CPU, where looking at a number is free, it stops there.

    :param operator: A
    :param b: the right-hand side, shape ``(n_params,)``
    :param max_steps: at most that many products with A
    :param tolerance: of the residual, relative to ``b``
    :param preconditioner: P, an approximation of the inverse of A: symmetric positive definite
    :return: the solution with its status
    """

    def apply_preconditioner(vector: th.Tensor) -> th.Tensor:
        return vector if preconditioner is None else preconditioner(vector)

    x = th.zeros_like(b)
    r = b
    z = apply_preconditioner(r)
    p = z
    rz = th.dot(r, z)
    bound = tolerance**2 * rz
    # The first of several reasons counts, so the status is written only while the iteration is active.
    status = th.full((), _MAX_STEPS, device=b.device)
    status = th.where(rz == 0, _CONVERGED, status)
    status = th.where(th.isfinite(rz), status, _NON_FINITE)
    active = status == _MAX_STEPS
    first_rz = rz
    n_steps = th.zeros((), dtype=th.long, device=b.device)

    for _ in range(max_steps):
        if _is_free_to_read(active) and not active:
            break
        ap = operator @ p
        curvature = th.dot(p, ap)
        # A NaN in `ap` that `p` multiplies by zero still makes the dot product NaN, so this one number tells of them all
        is_finite = th.isfinite(curvature)
        status = th.where(active & ~is_finite, _NON_FINITE, status)
        status = th.where(active & is_finite & (curvature <= 0), _NON_POSITIVE, status)
        active = active & is_finite & (curvature > 0)
        alpha = rz / curvature
        x = th.where(active, x + alpha * p, x)
        r = th.where(active, r - alpha * ap, r)
        z = apply_preconditioner(r)
        new_rz = th.dot(r, z)
        n_steps += active
        status = th.where(active & ~th.isfinite(new_rz), _NON_FINITE, status)
        status = th.where(active & (new_rz <= bound), _CONVERGED, status)
        p = th.where(active, z + (new_rz / rz) * p, p)
        rz = th.where(active, new_rz, rz)
        active = active & (status == _MAX_STEPS)

    # An overflow can spoil the iterate in the very step that reveals it
    status = th.where(th.isfinite(x).all(), status, _NON_FINITE)
    residual_norm = th.where(first_rz == 0, first_rz, (rz / first_rz).clamp(min=0).sqrt())
    # One transfer for all that the host wants to know
    numbers = th.stack([th.dot(x, b - r), residual_norm, n_steps.to(b.dtype), status.to(b.dtype)]).tolist()
    return CGResult(
        x=x, curvature=numbers[0], residual_norm=numbers[1], n_steps=int(numbers[2]), status=_STATUSES[int(numbers[3])]
    )
