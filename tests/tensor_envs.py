"""Environments of tensors for tests."""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.vec_env import VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sb3_trpo_ext._observations import mapped
from sb3_trpo_ext.envs.tensor import TensorObs, TensorStep, TensorVecEnv


class RandomTensorEnv(TensorVecEnv):
    """
    Observations are random, rewards depend on the actions, and episodes end now and then, by themselves or by a limit.

    Random numbers are drawn on the CPU: the same on all devices.

    :param observation_space: of one environment
    :param action_space: of one environment
    :param n_envs: the number of environments
    :param device: where they are
    """

    def __init__(
        self, observation_space: spaces.Space, action_space: spaces.Space, n_envs: int = 4, device: th.device | str = "cpu"
    ):
        super().__init__(n_envs, observation_space, action_space, device)
        self._random = np.random.default_rng(0)
        self._age = th.zeros(n_envs, dtype=th.int64, device=self.device)
        #: What is called on a step before it is returned.
        self.spoil: Any = None

    def _observe(self, space: Any) -> Any:
        if isinstance(space, spaces.Dict):
            return {key: self._observe(part) for key, part in space.items()}
        shape = (self.num_envs, *(space.shape or ()))
        if isinstance(space, spaces.Box):
            numbers: Any = self._random.normal(1.0, 2.0, shape).astype(np.float32)
        elif isinstance(space, spaces.Discrete):
            numbers = self._random.integers(0, space.n, shape)
        else:
            numbers = self._random.integers(0, getattr(space, "nvec", 2), shape)
        return th.as_tensor(numbers).to(self.device)

    def reset_tensors(self, seed: int | None = None) -> TensorObs:
        if seed is not None:
            self._random = np.random.default_rng(seed)
        self._age = th.zeros_like(self._age)
        return self._observe(self.observation_space)

    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        final: Any = self._observe(self.observation_space)
        noise = th.as_tensor(self._random.uniform(size=(2, self.num_envs)).astype(np.float32)).to(self.device)
        age = self._age + 1
        terminated, truncated = noise[0] < 0.1, age >= 6
        self._age = age.masked_fill(terminated | truncated, 0)
        rewards = actions.reshape(self.num_envs, get_action_dim(self.action_space)).float().sum(1) * 3 + noise[1]
        observations: Any = self._observe(self.observation_space)

        def chosen(first: th.Tensor, last: th.Tensor) -> th.Tensor:
            dones = (terminated | truncated).reshape(-1, *[1] * (first.dim() - 1))
            return th.where(dones, first, last)

        if isinstance(observations, dict):
            observations = {key: chosen(part, final[key]) for key, part in observations.items()}
        else:
            observations = chosen(observations, final)
        step = TensorStep(observations, rewards, terminated, truncated, final)
        return step if self.spoil is None else self.spoil(step)


class NumpySide(VecEnvWrapper):
    """The NumPy side of an environment of tensors: an ordinary ``VecEnv``."""

    def reset(self) -> VecEnvObs:
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        return self.venv.step_wait()


def with_nan(observations: TensorObs) -> TensorObs:
    """Observations with a NaN in them."""
    return mapped(lambda tensor: tensor * float("nan"), observations)
