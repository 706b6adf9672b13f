"""Environments for Stable-Baselines3, each loaded when it is first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sb3_trpo_ext.envs.envpool import EnvPoolVecEnv
    from sb3_trpo_ext.envs.jax_envs import BraxVecEnv, PlaygroundVecEnv
    from sb3_trpo_ext.envs.tensor import TensorStep, TensorVecEnv
    from sb3_trpo_ext.envs.tensor_gymnasium import GymnasiumTensorVecEnv
    from sb3_trpo_ext.envs.tensor_tasks import TensorCartPole, TensorPointMass
    from sb3_trpo_ext.envs.vector import VectorEnvAdapter

__all__ = [
    "BraxVecEnv",
    "EnvPoolVecEnv",
    "GymnasiumTensorVecEnv",
    "PlaygroundVecEnv",
    "TensorCartPole",
    "TensorPointMass",
    "TensorStep",
    "TensorVecEnv",
    "VectorEnvAdapter",
]

#: The names that each module has.
_MODULES = {
    "envpool": ("EnvPoolVecEnv",),
    "jax_envs": ("BraxVecEnv", "PlaygroundVecEnv"),
    "tensor": ("TensorStep", "TensorVecEnv"),
    "tensor_gymnasium": ("GymnasiumTensorVecEnv",),
    "tensor_tasks": ("TensorCartPole", "TensorPointMass"),
    "vector": ("VectorEnvAdapter",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
