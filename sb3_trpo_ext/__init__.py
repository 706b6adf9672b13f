"""TRPO for Stable-Baselines3: exact, fast, and pleasant to use."""

import importlib
from typing import Any

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

#: Names that need an extra, with their modules, which are imported on first use.
_LAZY = {
    "MaskableTRPO": "sb3_trpo_ext.maskable",
    "RecurrentTRPO": "sb3_trpo_ext.recurrent",
    "export": "sb3_trpo_ext.deployed",
}

# By name, so that the environment is imported only when it is made
register(
    "sb3_trpo_ext/PointMass1D-v0",
    entry_point="sb3_trpo_ext.envs.point_mass:PointMass1D",
    max_episode_steps=150,
    # Full force toward the goal, braking in time and a spring within the goal get 606, the mean of 300 episodes
    reward_threshold=550,
)
register("sb3_trpo_ext/Blocks-v0", entry_point="sb3_trpo_ext.envs.blocks:Blocks")

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


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "sb3_contrib":
            raise
        raise ImportError(f"{name} needs sb3-contrib: pip install 'sb3-trpo-ext[contrib]'.") from error


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
