"""Small tasks that PyTorch steps by the thousand, on any device."""

import math

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_trpo_ext.envs import point_mass
from sb3_trpo_ext.envs.tensor import TensorStep, TensorVecEnv


class _StateTask(TensorVecEnv):
    """
    A task whose observation is its state, with a time limit.

    :param n_envs: the number of environments
    :param device: where they are
    """

    max_episode_steps: int

    def __init__(
        self, n_envs: int, observation_space: spaces.Box, action_space: spaces.Box | spaces.Discrete, device: th.device | str
    ):
        super().__init__(n_envs, observation_space, action_space, device)
        #: Shape ``(n_envs, n_numbers)``.
        self.state = th.zeros(n_envs, *observation_space.shape, device=self.device)
        self._n_steps = th.zeros(n_envs, dtype=th.int64, device=self.device)
        self._generator = th.Generator(self.device)

    def reset_tensors(self, seed: int | None = None) -> th.Tensor:
        """Start a new episode in all environments."""
        if seed is not None:
            self._generator.manual_seed(seed)
        self.state = self._starts()
        self._n_steps = th.zeros_like(self._n_steps)
        return self.state

    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        """Make a step in all environments."""
        state, rewards, terminated = self._dynamics(self.state, actions)
        n_steps = self._n_steps + 1
        truncated = n_steps >= self.max_episode_steps
        dones = terminated | truncated
        # Drawn for all: how many episodes have ended is not known without waiting for the device
        self.state = th.where(dones[:, None], self._starts(), state)
        self._n_steps = n_steps.masked_fill(dones, 0)
        return TensorStep(self.state, rewards, terminated, truncated, state)

    def restart_tensors(self, where: th.Tensor) -> th.Tensor:
        """Start a new episode in some environments."""
        self.state = th.where(where[:, None], self._starts(), self.state)
        self._n_steps = self._n_steps.masked_fill(where, 0)
        return self.state

    def _uniform(self, n_numbers: int) -> th.Tensor:
        """Random numbers from 0 to 1, shape ``(n_envs, n_numbers)``."""
        return th.rand(self.num_envs, n_numbers, generator=self._generator, device=self.device)

    def _starts(self) -> th.Tensor:
        """First states of episodes, shape ``(n_envs, n_numbers)``."""
        raise NotImplementedError

    def _dynamics(self, state: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """The next state, the reward and whether the episode terminates."""
        raise NotImplementedError


class TensorCartPole(_StateTask):
    """
    Gymnasium's ``CartPole-v1``, in single precision.

    :param n_envs: the number of environments
    :param device: where they are
    """

    max_episode_steps = 500
    MAX_POSITION = 2.4
    MAX_ANGLE = 12 * 2 * math.pi / 360
    GRAVITY, POLE_MASS, TOTAL_MASS, HALF_LENGTH, FORCE, DT = 9.8, 0.1, 1.1, 0.5, 10.0, 0.02

    def __init__(self, n_envs: int, device: th.device | str = "cpu"):
        bound = np.array([2 * self.MAX_POSITION, np.inf, 2 * self.MAX_ANGLE, np.inf], dtype=np.float32)
        super().__init__(n_envs, spaces.Box(-bound, bound), spaces.Discrete(2), device)

    def _starts(self) -> th.Tensor:
        return 0.1 * self._uniform(4) - 0.05

    def _dynamics(self, state: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        x, velocity, angle, angular_velocity = state.unbind(1)
        force = self.FORCE * (2 * actions.to(state.dtype) - 1)
        cosine, sine = angle.cos(), angle.sin()
        mass_length = self.POLE_MASS * self.HALF_LENGTH
        push = (force + mass_length * angular_velocity.square() * sine) / self.TOTAL_MASS
        angular_acceleration = (self.GRAVITY * sine - cosine * push) / (
            self.HALF_LENGTH * (4 / 3 - self.POLE_MASS * cosine.square() / self.TOTAL_MASS)
        )
        acceleration = push - mass_length * angular_acceleration * cosine / self.TOTAL_MASS
        state = state + self.DT * th.stack((velocity, acceleration, angular_velocity, angular_acceleration), dim=1)
        terminated = (state[:, 0].abs() > self.MAX_POSITION) | (state[:, 2].abs() > self.MAX_ANGLE)
        return state, th.ones_like(x), terminated


class TensorPointMass(_StateTask):
    """
    ``sb3_trpo_ext/PointMass1D-v0``, in single precision: see :class:`~sb3_trpo_ext.envs.point_mass.PointMass1D`.

    :param n_envs: the number of environments
    :param device: where they are
    """

    max_episode_steps = 150

    def __init__(self, n_envs: int, device: th.device | str = "cpu"):
        bound = np.array([point_mass.MAX_POSITION, point_mass.MAX_VELOCITY], dtype=np.float32)
        super().__init__(n_envs, spaces.Box(-bound, bound), spaces.Box(-1.0, 1.0, (1,)), device)
        self._start_bound = th.tensor([point_mass.MAX_START_POSITION, point_mass.MAX_START_VELOCITY], device=self.device)

    def _starts(self) -> th.Tensor:
        return (2 * self._uniform(2) - 1) * self._start_bound

    def _dynamics(self, state: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        force = actions.flatten().to(state.dtype).clamp(-1, 1)
        position, velocity = state.unbind(1)
        velocity = point_mass.DRAG * velocity + force * point_mass.DT
        position = position + velocity * point_mass.DT
        is_reached = (position.abs() < point_mass.GOAL) & (velocity.abs() < point_mass.GOAL)
        cost = position.square() + 0.1 * velocity.square() + 0.001 * force.square()
        return th.stack((position, velocity), dim=1), point_mass.GOAL_BONUS * is_reached - cost, th.zeros_like(is_reached)
