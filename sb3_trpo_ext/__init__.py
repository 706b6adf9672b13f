"""TRPO for Stable-Baselines3: exact, fast, and pleasant to use."""

from sb3_trpo_ext.distributions import Family, register_family
from sb3_trpo_ext.policies import (
    CnnPolicy,
    MlpPolicy,
    MultiInputPolicy,
    SquashedCnnPolicy,
    SquashedMlpPolicy,
    SquashedMultiInputPolicy,
)
from sb3_trpo_ext.trpo import TRPO

__version__ = "0.1.0"

__all__ = [
    "TRPO",
    "CnnPolicy",
    "Family",
    "MlpPolicy",
    "MultiInputPolicy",
    "SquashedCnnPolicy",
    "SquashedMlpPolicy",
    "SquashedMultiInputPolicy",
    "__version__",
    "register_family",
]
