"""The mathematics of a trust-region update, on PyTorch and the standard library alone.

Nothing here knows of environments or of Stable-Baselines3: operators multiply, solvers consume operators, a search chooses
a step size, and an update puts them together on a :class:`~sb3_trpo_ext.optim.updates.Problem`.
"""

from sb3_trpo_ext.optim.conjugate_gradient import CGResult, CGStatus, conjugate_gradient
from sb3_trpo_ext.optim.kfac import KroneckerPreconditioner, MlpFisher
from sb3_trpo_ext.optim.line_search import LineSearchResult, line_search
from sb3_trpo_ext.optim.mlp import MlpJacobian
from sb3_trpo_ext.optim.operators import (
    AutogradJacobian,
    Averaged,
    ChunkedOperator,
    Damped,
    GaussNewtonFisher,
    HessianFisher,
    Jacobian,
    LinearOperator,
    Projected,
)
from sb3_trpo_ext.optim.regression import MlpRegression
from sb3_trpo_ext.optim.status import Status, UpdateStatus
from sb3_trpo_ext.optim.updates import AdaptiveKLPenalty, KLConstraint, PolicyUpdate, Problem, UpdateResult

__all__ = [
    "AdaptiveKLPenalty",
    "AutogradJacobian",
    "Averaged",
    "CGResult",
    "CGStatus",
    "ChunkedOperator",
    "Damped",
    "GaussNewtonFisher",
    "HessianFisher",
    "Jacobian",
    "KLConstraint",
    "KroneckerPreconditioner",
    "LineSearchResult",
    "LinearOperator",
    "MlpFisher",
    "MlpJacobian",
    "MlpRegression",
    "PolicyUpdate",
    "Problem",
    "Projected",
    "Status",
    "UpdateResult",
    "UpdateStatus",
    "conjugate_gradient",
    "line_search",
]
