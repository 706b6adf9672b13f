"""Helpers for observations and spaces that may be dicts, and for wrappers that normalize them."""

from collections.abc import Callable
from typing import Any

from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize


def mapped(function: Callable[[Any], Any], observations: Any) -> Any:
    """Apply a function to observations, to each part of them if they are a dict."""
    if isinstance(observations, dict):
        return {key: function(value) for key, value in observations.items()}
    return function(observations)


def parts_of(value: Any) -> dict[str, Any]:
    """The parts of a Dict observation or Dict space by key; anything else under an empty key."""
    if isinstance(value, spaces.Dict):
        return value.spaces
    return value if isinstance(value, dict) else {"": value}


def vec_normalizes(env: VecEnv | None) -> list[VecNormalize]:
    """Every ``VecNormalize`` that an environment is wrapped in, the outermost first."""
    found = []
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, VecNormalize):
            found.append(env)
        env = env.venv
    return found
