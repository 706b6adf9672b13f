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
    #: ``b - A x`` as the recursion has it, shape ``(n_params,)``.
    residual: th.Tensor
    #: The search direction of the next step, shape ``(n_params,)``; ``None`` after a preconditioned run.
    direction: th.Tensor | None


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
    start: CGResult | None = None,
) -> CGResult:
    """
    Solve ``A x = b`` for a positive definite A (Hestenes & Stiefel 1952; preconditioned: Saad 2003, algorithm 9.1).

    Starts at zero or where an earlier run stopped: no product is spent on the start, and no random numbers are consumed. Ends
    as soon as ``||r||_P <= tolerance ||b||_P`` with ``||v||_P^2 = v . P v``. A zero ``b`` is solved by zero.

    On an accelerator the loop always makes ``max_steps`` products and freezes the iterate on the device once it is done; the
    host waits for it once, at the end. On the CPU, where looking at a number is free, it stops there.

    :param operator: A
    :param b: the right-hand side, shape ``(n_params,)``
    :param max_steps: at most that many products with A
    :param tolerance: of the residual, relative to ``b``
    :param preconditioner: P, an approximation of the inverse of A: symmetric positive definite
    :param start: what an earlier run on the same A and b found. Two runs without a preconditioner are one; a preconditioner
        starts with search directions of its own
    :return: the solution with its status
    """

    def apply_preconditioner(vector: th.Tensor) -> th.Tensor:
        return vector if preconditioner is None else preconditioner(vector)

    x, r = (th.zeros_like(b), b) if start is None else (start.x, start.residual)
    z = apply_preconditioner(r)
    p = z if start is None or start.direction is None or preconditioner is not None else start.direction
    rz = th.dot(r, z)
    bz = rz if start is None else th.dot(b, apply_preconditioner(b))
    bound = tolerance**2 * bz
    # The first of several reasons counts, so the status is written only while the iteration is active.
    status = th.full((), _MAX_STEPS, device=b.device)
    status = th.where(rz <= bound, _CONVERGED, status)
    status = th.where(th.isfinite(rz), status, _NON_FINITE)
    active = status == _MAX_STEPS
    n_steps = th.zeros((), dtype=th.long, device=b.device)

    is_free = _is_free_to_read(b)

    def if_active(new: th.Tensor, old: th.Tensor) -> th.Tensor:
        # Where the loop has ended if it is not active, the choice would be another pass over each vector
        return new if is_free else th.where(active, new, old)

    for _ in range(max_steps):
        if is_free and not active:
            break
        ap = operator @ p
        curvature = th.dot(p, ap)
        # A NaN in `ap` that `p` multiplies by zero still makes the dot product NaN, so this one number tells of them all
        is_finite = th.isfinite(curvature)
        status = th.where(active & ~is_finite, _NON_FINITE, status)
        status = th.where(active & is_finite & (curvature <= 0), _NON_POSITIVE, status)
        active = active & is_finite & (curvature > 0)
        if is_free and not active:
            break
        alpha = rz / curvature
        x = if_active(x + alpha * p, x)
        r = if_active(r - alpha * ap, r)
        z = apply_preconditioner(r)
        new_rz = th.dot(r, z)
        n_steps += active
        status = th.where(active & ~th.isfinite(new_rz), _NON_FINITE, status)
        status = th.where(active & (new_rz <= bound), _CONVERGED, status)
        p = if_active(z + (new_rz / rz) * p, p)
        rz = if_active(new_rz, rz)
        active = active & (status == _MAX_STEPS)

    # An overflow can spoil the iterate in the very step that reveals it
    status = th.where(th.isfinite(x.abs().amax()), status, _NON_FINITE)
    residual_norm = th.where(bz == 0, bz, (rz / bz).clamp(min=0).sqrt())
    # One transfer for all that the host wants to know
    numbers = th.stack([th.dot(x, b - r), residual_norm, n_steps.to(b.dtype), status.to(b.dtype)]).tolist()
    return CGResult(
        x=x,
        curvature=numbers[0],
        residual_norm=numbers[1],
        n_steps=int(numbers[2]),
        status=_STATUSES[int(numbers[3])],
        residual=r,
        direction=p if preconditioner is None else None,
    )
