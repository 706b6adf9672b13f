"""Gymnasium's vector environments of tensors."""

from typing import Any

import gymnasium as gym
import torch as th

from sb3_trpo_ext._checks import ArgumentError
from sb3_trpo_ext._observations import mapped
from sb3_trpo_ext.envs.tensor import TensorObs, TensorStep, TensorVecEnv


class GymnasiumTensorVecEnv(TensorVecEnv):
    """
    Any ``gymnasium.vector.VectorEnv`` whose observations and rewards are tensors, as those of ManiSkill and Isaac Lab are.

    Environments that are done must begin a new episode in the same step (Gymnasium's ``AutoresetMode.SAME_STEP``). The last
    observation of an episode is taken from ``info["final_obs"]``, where Gymnasium has it, or ``info["final_observation"]``,
    where ManiSkill has it. Isaac Lab does not give it: the observation before the step is used.

    :param env: the environments, with ``num_envs``, ``single_observation_space`` and ``single_action_space``
    :param device: where its tensors are; ``None`` if ``env.device`` says it
    :raises ValueError: if it resets environments in another step
    """

    def __init__(self, env: Any, device: th.device | str | None = None):
        mode = (getattr(env, "metadata", None) or {}).get("autoreset_mode")
        if mode is not None and getattr(mode, "value", mode) != gym.vector.AutoresetMode.SAME_STEP.value:
            raise ArgumentError(
                f"`env` has the autoreset mode {mode}: make it with `autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP`."
            )
        device = getattr(env, "device", None) if device is None else device
        if device is None:
            raise ArgumentError("`device` must say where the tensors of `env` are, since `env.device` does not.")
        self.env = env
        self._last: TensorObs | None = None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space, device)

    def reset_tensors(self, seed: int | None = None) -> TensorObs:
        """Start a new episode in all environments."""
        observations, _ = self.env.reset(seed=seed)
        self._last = observations
        return observations

    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        """Make a step in all environments."""
        # A copy, since some environments write over it
        last = mapped(th.clone, self._last)
        observations, rewards, terminated, truncated, info = self.env.step(actions)
        self._last = observations
        final = next((info[name] for name in ("final_obs", "final_observation") if info.get(name) is not None), last)
        return TensorStep(observations, rewards, terminated, truncated, final)

    def close(self) -> None:
        """Close the environments."""
        self.env.close()
