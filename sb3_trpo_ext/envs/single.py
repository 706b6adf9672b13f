"""One environment of Brax or of MuJoCo Playground, as one of Gymnasium's."""

from typing import Any

import gymnasium as gym
import numpy as np
import torch as th

from sb3_trpo_ext._checks import ArgumentError
from sb3_trpo_ext._observations import mapped
from sb3_trpo_ext.envs.jax_envs import LIBRARIES


class SingleEnv(gym.Env[Any, np.ndarray]):
    """
    One environment, to watch an agent in.

    :param library: ``"brax"`` or ``"playground"``
    :param env_name: what the library calls it
    :param render_mode: ``"rgb_array"``, or ``None`` for no pictures
    :param kwargs: arguments of :class:`~sb3_trpo_ext.envs.BraxVecEnv` or :class:`~sb3_trpo_ext.envs.PlaygroundVecEnv`
    :raises ValueError: for another render mode, and as those do
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012 as in Gymnasium

    def __init__(self, library: str, env_name: str, render_mode: str | None = None, **kwargs: Any):
        if render_mode not in (None, "rgb_array"):
            raise ArgumentError(f"`render_mode` must be 'rgb_array' or None, got {render_mode!r}.")
        self.render_mode = render_mode
        self.venv = LIBRARIES[library](env_name, 1, **kwargs)
        self.observation_space, self.action_space = self.venv.observation_space, self.venv.action_space
        self.metadata = {**self.metadata, "render_fps": round(1 / self.venv.dt)}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        super().reset(seed=seed)
        if seed is not None:
            self.venv.seed(seed)
        return mapped(lambda array: array[0], self.venv.reset()), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Make a step; after the last one of an episode call ``reset``."""
        step = self.venv.advance(th.as_tensor(action, device=self.venv.device)[None])
        # What the step led to, and not where the next episode begins
        observation = mapped(lambda tensor: tensor[0].cpu().numpy().copy(), step.final_observations)
        return observation, float(step.rewards[0]), bool(step.terminated[0]), bool(step.truncated[0]), {}

    def render(self) -> np.ndarray | None:
        """A picture by MuJoCo, shape ``(height, width, 3)``; ``None`` without a render mode."""
        return None if self.render_mode is None else self.venv.picture()

    def close(self) -> None:
        """Close the environment."""
        self.venv.close()
