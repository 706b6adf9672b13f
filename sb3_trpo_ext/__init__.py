"""TRPO for Stable-Baselines3: exact, fast, and pleasant to use."""

from gymnasium import register

from sb3_trpo_ext.callbacks import TrainingRecorder
from sb3_trpo_ext.policies import (
    CnnPolicy,
    MlpPolicy,
    MultiInputPolicy,
    SquashedCnnPolicy,
    SquashedMlpPolicy,
    SquashedMultiInputPolicy,
)
from sb3_trpo_ext.trpo import TRPO
from sb3_trpo_ext.update.distributions import Family, register_family

__version__ = "0.2.0"

# By name, so that the environment is imported only when it is made
register(
    "sb3_trpo_ext/PointMass1D-v0",
    entry_point="sb3_trpo_ext.envs.point_mass:PointMass1D",
    max_episode_steps=150,
    # Full force towards the goal, a brake in time and a spring within the goal gets 606, the mean of 300 episodes
    reward_threshold=550,
)

__all__ = [
    "TRPO",
    "CnnPolicy",
    "Family",
    "MlpPolicy",
    "MultiInputPolicy",
    "SquashedCnnPolicy",
    "SquashedMlpPolicy",
    "SquashedMultiInputPolicy",
    "TrainingRecorder",
    "__version__",
    "register_family",
]
