"""The environment MyEnv-v0: a force moves a mass along a line to a target."""

import time
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class MyEnv(gym.Env[np.ndarray, np.ndarray]):
    """
    Each episode has another target.

    The observation is position, velocity and target, the action a force from -1 to 1, and the reward minus the distance.
    """

    metadata: dict[str, Any] = {"render_modes": ["human"], "render_fps": 20}

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.observation_space = spaces.Box(-2.0, 2.0, (3,))
        # TRPO likes actions that go from -1 to 1: scale them in `step`
        self.action_space = spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode."""
        super().reset(seed=seed)
        # Random numbers come from here, so that a seed determines the episode
        self.position, self.target = self.np_random.uniform(-1.0, 1.0, 2)
        self.velocity = 0.0
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Apply a force for one step."""
        # Put your own dynamics here, and your own reward below
        force = float(np.clip(action[0], -1.0, 1.0))
        self.velocity += 0.1 * (force - 0.5 * self.velocity)
        self.position = np.clip(self.position + 0.1 * self.velocity, -2.0, 2.0)
        reward = -abs(self.position - self.target)
        # True where the episode is over for good, such as after a fall. The time limit is set below
        terminated = False
        return self._observation(), float(reward), terminated, False, {}

    def render(self) -> None:
        """Draw the mass as O and the target as X, in the terminal."""
        line = [" "] * 61
        for place, mark in ((self.target, "X"), (self.position, "O")):
            line[round(30 + 15 * place)] = mark
        print(f"\r|{''.join(line)}|", end="", flush=True)
        time.sleep(1 / self.metadata["render_fps"])

    def _observation(self) -> np.ndarray:
        return np.array([self.position, self.velocity, self.target], dtype=np.float32)


gym.register("MyEnv-v0", "my_env:MyEnv", max_episode_steps=100)
