"""What an environment did wrong when a rollout fails."""

from typing import Any

import numpy as np
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext._observations import parts_of

#: What is safe when a rollout fails: said in every message.
INTACT = "The policy is as it was after the last update and can be saved."


def explain_observation(model: OnPolicyAlgorithm, env: VecEnv, error: Exception) -> None:
    """Raise a ``ValueError`` if a NaN, an infinity or a wrong shape of the last observation explains this error."""
    observations = parts_of(model._last_obs)
    for key, space in parts_of(model.observation_space).items():
        observation, where, shape = observations[key], key or "observation", space.shape or ()
        problem = hint = ""
        if observation.shape != (env.num_envs, *shape):
            problem = f"shape {observation.shape} in its {where} for {env.num_envs} environments of shape {shape}"
        # Policies raise a ValueError for a NaN
        elif isinstance(error, ValueError) and not np.isfinite(observation).all():
            problem = f"a NaN or an infinity in its {where}"
            hint = " `VecCheckNan` from stable_baselines3.common.vec_env finds the step at which it happens."
        if problem:
            message = f"The environment returned {problem} after {model.num_timesteps} timesteps. {INTACT}{hint}"
            raise ValueError(message) from error


def explain_dead_worker(model: OnPolicyAlgorithm, env: VecEnv, error: Exception) -> None:
    """Raise a ``RuntimeError`` if a worker of ``SubprocVecEnv`` has died."""
    inner: Any = env.unwrapped
    processes = getattr(inner, "processes", [])
    for process in processes:
        # It may be about to end; all but the dead ones go on waiting for a command
        process.join(timeout=0.2)
    dead = {index: process.exitcode for index, process in enumerate(processes) if process.exitcode is not None}
    if dead:
        codes = ", ".join(f"{index} with exit code {code}" for index, code in dead.items())
        raise RuntimeError(
            f"Worker processes of {type(inner).__name__} have ended after {model.num_timesteps} timesteps: {codes}. Errors of "
            f"the environments are on stderr; a negative code is the signal that killed a process. {INTACT}"
        ) from error
