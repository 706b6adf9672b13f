"""What the tests of the algorithm need: tiny environments, small models on them, and what a model logs and holds."""

import copy
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from helpers import BOX_ACTIONS, VECTOR
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_trpo_ext import TRPO


class RandomEnv(gym.Env[Any, Any]):
    """
    Draws observations from its space and rewards from a normal distribution, so that every update has something to do.

    Episodes last ten steps; they are truncated and terminated in turn.
    """

    def __init__(self, observation_space: spaces.Space = VECTOR, action_space: spaces.Space = BOX_ACTIONS) -> None:
        # Spaces hold random generators, and environments must not share one
        self.observation_space = copy.deepcopy(observation_space)
        self.action_space = copy.deepcopy(action_space)
        self.n_steps = 0
        self.n_episodes = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.n_episodes += 1
        return self.observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), f"{action!r} is not an action"
        self.n_steps += 1
        is_over, is_odd = self.n_steps % 10 == 0, self.n_episodes % 2 == 1
        return self.observe(), self.reward(action), is_over and is_odd, is_over and not is_odd, {}

    def observe(self) -> Any:
        return self.observation_space.sample()

    def reward(self, action: Any) -> float:
        return float(self.np_random.normal())


class Bandit(gym.Env[Any, Any]):
    """
    One step per episode, always the same observation; the reward of an arm is its number, that of a point its negative square.

    :param action_space: Discrete or Box
    """

    observation_space = spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, action_space: spaces.Space) -> None:
        self.action_space = copy.deepcopy(action_space)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.ones(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = float(action) if isinstance(self.action_space, spaces.Discrete) else -float(np.square(action).sum())
        return np.ones(1, np.float32), reward, True, False, {}


class UpdateLog(BaseCallback):
    """Keeps what each update logged."""

    def __init__(self) -> None:
        super().__init__()
        self.updates: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        # SB3 writes the log between a rollout and its update: here stands what the last update recorded
        if "train/status" in self.logger.name_to_value:
            self.updates.append(log_of(self.model))

    def _on_training_end(self) -> None:
        self._on_rollout_start()

    def values(self, key: str) -> list[Any]:
        return [update[key] for update in self.updates]


def make_model(env: gym.Env[Any, Any] | VecEnv | str | None = None, policy: Any = "MlpPolicy", **kwargs: Any) -> TRPO:
    """A small TRPO that updates every 32 steps."""
    defaults: dict[str, Any] = {"n_steps": 32, "batch_size": 16, "n_critic_updates": 2, "target_kl": 0.05}
    # What these numbers are about is the update
    defaults |= {"cg_damping": 0.1, "gae_lambda": 0.95, "vf_lambda": None, "norm_obs": False, "norm_reward": False}
    defaults |= {"policy_kwargs": {"net_arch": [8], "log_std_init": 0.0}, "seed": 0, "device": "cpu"}
    return TRPO(policy, RandomEnv() if env is None else env, **{**defaults, **kwargs})


def random_vec_env(n_envs: int, *args: Any) -> DummyVecEnv:
    """Several environments with random observations and rewards."""
    return DummyVecEnv([lambda: RandomEnv(*args)] * n_envs)


def collect(model: Any, total_timesteps: int = 1000) -> Any:
    """Fill the rollout buffer as `learn` would, without an update."""
    assert isinstance(model, OnPolicyAlgorithm)
    _, callback = model._setup_learn(total_timesteps)
    assert model.env is not None
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model


def log_of(model: BaseAlgorithm) -> dict[str, Any]:
    """What the last update logged, with the names of statuses as text."""
    logged = model.logger.name_to_value.items()
    return {key: str(value) if key.endswith("status_name") else value for key, value in logged}


def train(model: TRPO) -> dict[str, Any]:
    """Update on what is in the rollout buffer, with a fresh log, which is returned."""
    model.set_logger(Logger(None, []))
    model.train()
    return log_of(model)


def copies(tensors: Any) -> list[th.Tensor]:
    """Copies of tensors that will change."""
    return [tensor.detach().clone() for tensor in tensors]


def assert_identical(actual: Any, expected: Any) -> None:
    """The same structure with the same tensors and numbers, to the last bit."""
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        actual, expected = list(actual.values()), list(expected.values())
    if isinstance(expected, (list, tuple)):
        for left, right in zip(actual, expected, strict=True):
            assert_identical(left, right)
    elif isinstance(expected, th.Tensor):
        # As bytes: a zero is not a negative zero
        assert actual.shape == expected.shape
        assert actual.detach().cpu().numpy().tobytes() == expected.detach().cpu().numpy().tobytes()
    else:
        assert actual == expected


def is_finite(tensors: Any) -> bool:
    """Whether there is no NaN and no infinity in any of the tensors."""
    return all(bool(th.isfinite(tensor).all()) for tensor in tensors)
