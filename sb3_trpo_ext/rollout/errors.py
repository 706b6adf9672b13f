"""What an environment did wrong when a rollout fails."""

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

#: What is safe when a rollout fails: said in every message.
_INTACT = "The policy is as it was after the last update and can be saved."


def parts_of(value: Any) -> dict[str, Any]:
    """The parts of a Dict observation or Dict space by key; anything else under an empty key."""
    if isinstance(value, spaces.Dict):
        return value.spaces
    return value if isinstance(value, dict) else {"": value}


def check_shape(model: OnPolicyAlgorithm, observations: Any, n_envs: int, cause: Exception | None = None) -> None:
    """Raise a ``ValueError`` if observations do not have the shape of their space."""
    problem, parts = "", parts_of(observations)
    for key, space in parts_of(model.observation_space).items():
        if key not in parts:
            problem = f"an observation without {key!r}"
        elif parts[key].shape != (n_envs, *(space.shape or ())):
            where = f" in {key!r}" if key else ""
            problem = f"observations of shape {parts[key].shape}{where} for {n_envs} environments of shape {space.shape}"
        if problem:
            raise ValueError(f"The environment returned {problem} after {model.num_timesteps} timesteps. {_INTACT}") from cause


def explain_observation(model: OnPolicyAlgorithm, env: VecEnv, error: Exception) -> None:
    """Raise a ``ValueError`` if a NaN, an infinity or a wrong shape of the last observation explains this error."""
    if model._last_obs is None:
        return
    check_shape(model, model._last_obs, env.num_envs, error)
    for key, observation in parts_of(model._last_obs).items():
        # Policies raise a ValueError for a NaN
        if isinstance(error, ValueError) and not np.isfinite(observation).all():
            raise ValueError(
                f"The environment returned a NaN or an infinity in its {key or 'observation'} after {model.num_timesteps} "
                f"timesteps. {_INTACT[:-1]}; `VecCheckNan` from stable_baselines3.common.vec_env finds the step at which it "
                "happens."
            ) from error


def explain_dead_worker(model: OnPolicyAlgorithm, env: VecEnv, error: Exception) -> None:
    """Raise a ``RuntimeError`` if a worker of ``SubprocVecEnv`` has died."""
    inner: Any = env
    while hasattr(inner, "venv"):
        inner = inner.venv
    processes = getattr(inner, "processes", [])
    for process in processes:
        # It may be about to end; all but the dead ones go on waiting for a command
        process.join(timeout=0.2)
    dead = {index: process.exitcode for index, process in enumerate(processes) if process.exitcode is not None}
    if dead:
        codes = ", ".join(f"{index} with exit code {code}" for index, code in dead.items())
        raise RuntimeError(
            f"Of the {len(processes)} worker processes of {type(inner).__name__} some have ended after {model.num_timesteps} "
            f"timesteps: {codes}. If the environment raised an error, that is on stderr; a negative code is the signal that "
            f"killed the process. {_INTACT}"
        ) from error
