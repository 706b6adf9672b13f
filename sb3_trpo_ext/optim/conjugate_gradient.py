"""Preconditioned conjugate gradient with a status, for a CPU and for an accelerator.

On an accelerator the loop always makes ``max_steps`` products and freezes the iterate on the device once it is done, so that
the host waits for it once, at the end. On the CPU, where reading a number costs nothing, the loop stops when it is done.
"""

from enum import IntEnum
from typing import NamedTuple

import torch as th

from sb3_trpo_ext.optim.operators import LinearOperator
from sb3_trpo_ext.optim.status import UpdateStatus


class CGStatus(IntEnum):
    """How a run of conjugate gradient ended; a failure has the code of the update that it rejects."""

    CONVERGED = 0
    MAX_STEPS = 1
    NON_POSITIVE_CURVATURE = UpdateStatus.CG_NON_POSITIVE_CURVATURE
    NON_FINITE = UpdateStatus.CG_NON_FINITE


#: The status while there is no other reason to end. A plain number: PyTorch is slow with members of enumerations.
_RUNNING = int(CGStatus.MAX_STEPS)


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


def _is_free_to_read(tensor: th.Tensor) -> bool:
    """Whether the host can read a number of this tensor without waiting for an accelerator."""
    return tensor.device.type == "cpu"


def _product(operator: LinearOperator | None, vector: th.Tensor) -> th.Tensor:
    """Multiply; no operator is the identity."""
    return vector if operator is None else operator @ vector


def _ended_if(condition: th.Tensor, reason: CGStatus, status: th.Tensor) -> th.Tensor:
    """The new status; of several reasons to end, the first counts."""
    return th.where((status == _RUNNING) & condition, int(reason), status)


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

    Starts at zero or where an earlier run stopped, without a product for the start. Ends as soon as
    ``||r||_P <= tolerance ||b||_P`` with ``||v||_P^2 = v . P v``. A zero ``b`` is solved by zero.
    In the code, r is the residual, p the search direction, and ``z = P r``.

    :param operator: A
    :param b: the right-hand side, shape ``(n_params,)``
    :param max_steps: maximum number of products with A
    :param tolerance: of the residual, relative to ``b``
    :param preconditioner: P, an approximate inverse of A: symmetric positive definite
    :param start: result of an earlier run on the same A and b; a preconditioner starts with search directions of its own
    """
    can_stop = _is_free_to_read(b)
    x, r = (th.zeros_like(b), b) if start is None else (start.x, start.residual)
    z = _product(preconditioner, r)
    p = z if start is None or start.direction is None or preconditioner is not None else start.direction
    rz = th.dot(r, z)
    bz = rz if start is None else th.dot(b, _product(preconditioner, b))
    bound = tolerance**2 * bz
    n_steps = th.full((), 0 if start is None else start.n_steps, device=b.device)
    status = th.full((), _RUNNING, device=b.device)
    status = _ended_if(~th.isfinite(rz), CGStatus.NON_FINITE, status)
    status = _ended_if(rz <= bound, CGStatus.CONVERGED, status)
    for _ in range(max_steps):
        if can_stop and status != _RUNNING:
            break
        ap = operator @ p
        # A NaN in `ap` that `p` multiplies by zero still makes the dot product NaN
        curvature = th.dot(p, ap)
        status = _ended_if(~th.isfinite(curvature), CGStatus.NON_FINITE, status)
        status = _ended_if(curvature <= 0, CGStatus.NON_POSITIVE_CURVATURE, status)
        is_active = status == _RUNNING
        if can_stop and not is_active:
            break
        alpha = rz / curvature
        new_x, new_r = x + alpha * p, r - alpha * ap
        z = _product(preconditioner, new_r)
        new_rz = th.dot(new_r, z)
        n_steps = n_steps + is_active
        status = _ended_if(~th.isfinite(new_rz), CGStatus.NON_FINITE, status)
        status = _ended_if(new_rz <= bound, CGStatus.CONVERGED, status)
        new, old = (new_x, new_r, z + (new_rz / rz) * p, new_rz), (x, r, p, rz)
        x, r, p, rz = new if can_stop else (th.where(is_active, *pair) for pair in zip(new, old, strict=True))

    # An overflow can spoil the iterate in the very step that reveals it
    status = th.where(th.isfinite(x.abs().amax()), status, int(CGStatus.NON_FINITE))
    residual_norm = th.where(bz == 0, bz, (rz / bz).clamp(min=0).sqrt())
    curvature, norm, steps, code = th.stack([th.dot(x, b - r), residual_norm, n_steps.to(b), status.to(b)]).tolist()
    return CGResult(x, curvature, norm, int(steps), CGStatus(int(code)), r, p if preconditioner is None else None)
