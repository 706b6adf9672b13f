"""A point mass on a line: small enough that the whole policy fits into one picture, and an update can be watched."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

DT = 0.05
#: What is left of the velocity after a step without a force.
DRAG = 0.99
#: The goal is a box around the origin: position and velocity must both be smaller than this.
GOAL = 0.05
GOAL_BONUS = 5.0
#: Episodes start within these bounds, uniformly: far enough out that the way to the goal takes up to a third of an episode.
MAX_START_POSITION = 1.0
MAX_START_VELOCITY = 0.5
#: No velocity grows beyond this: there, drag cancels the largest force.
MAX_VELOCITY = DT / (1 - DRAG)
#: Farther than this no episode of 150 steps gets: full force from the outermost start ends at 21.2.
MAX_POSITION = 25.0

#: The picture: size in pixels, and how far to both sides of the goal it shows.
_HEIGHT, _WIDTH = 120, 480
_VIEW = 1.5
_WHITE, _GREY, _GREEN, _BLUE, _ORANGE = (255, 255, 255), (170, 170, 170), (205, 235, 205), (31, 119, 180), (255, 127, 14)


class PointMass1D(gym.Env[np.ndarray, np.ndarray]):
    """
    Push a mass along a line to the origin, and hold it there.

    The state is position and velocity ``(x, v)``, the action a force ``a`` in [-1, 1]; a larger one is cut off. In a step of
    ``dt = 0.05`` the velocity becomes ``v' = 0.99 v + a dt`` and the position ``x' = x + v' dt``. The reward is
    ``-(x'^2 + 0.1 v'^2 + 0.001 a^2)``, and 5 more where ``|x'|`` and ``|v'|`` are both below 0.05.

    Episodes start with x uniform in [-1, 1] and v uniform in [-0.5, 0.5], never terminate, and are truncated after 150 steps
    when the environment is made by its id, ``sb3_trpo_ext/PointMass1D-v0``.

    :param render_mode: ``"rgb_array"``, or ``None`` for no pictures
    :raises ValueError: for another render mode
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": round(1 / DT)}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None):
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"`render_mode` must be one of {self.metadata['render_modes']} or None, got {render_mode!r}.")
        self.render_mode = render_mode
        bound = np.array([MAX_POSITION, MAX_VELOCITY], dtype=np.float32)
        self.observation_space = spaces.Box(-bound, bound)
        self.action_space = spaces.Box(-1.0, 1.0, (1,))
        #: Position and velocity.
        self.state = np.zeros(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode."""
        super().reset(seed=seed)
        bound = np.array([MAX_START_POSITION, MAX_START_VELOCITY])
        self.state = self.np_random.uniform(-bound, bound)
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """
        Apply a force for one step.

        :param action: the force, shape ``(1,)``
        :return: observation, reward, terminated (never), truncated (never: that is for the time limit), and an info that says
            whether the goal ``is_reached``
        """
        force = float(np.clip(np.asarray(action).item(), -1.0, 1.0))
        position, velocity = self.state
        velocity = DRAG * velocity + force * DT
        position = position + velocity * DT
        self.state = np.array([position, velocity])
        is_reached = bool(abs(position) < GOAL and abs(velocity) < GOAL)
        cost = position**2 + 0.1 * velocity**2 + 0.001 * force**2
        return self._observation(), float(GOAL_BONUS * is_reached - cost), False, False, {"is_reached": is_reached}

    def _observation(self) -> np.ndarray:
        """
        The state as the policy sees it.

        :return: position and velocity, shape ``(2,)``
        """
        return self.state.astype(np.float32)

    def render(self) -> np.ndarray | None:
        """
        Draw the line, the goal, the mass, and its velocity as a bar; a mass out of sight waits at the edge.

        :return: picture of shape ``(height, width, 3)``; ``None`` without a render mode
        """
        if self.render_mode is None:
            gym.logger.warn('There is no picture without a render mode: make the environment with render_mode="rgb_array".')
            return None
        picture = np.full((_HEIGHT, _WIDTH, 3), _WHITE, dtype=np.uint8)
        x = np.linspace(-_VIEW, _VIEW, _WIDTH)
        y = np.arange(_HEIGHT) - _HEIGHT / 2
        picture[:, np.abs(x) < GOAL] = _GREEN
        picture[np.abs(y) < 1] = _GREY
        position, velocity = np.clip(self.state[0], -_VIEW, _VIEW), self.state[1]
        is_bar = (x - position) * np.sign(velocity) > 0
        is_bar &= np.abs(x - position) < np.abs(velocity)
        picture[np.ix_(np.abs(y - 30) < 4, is_bar)] = _ORANGE
        radius = 12 * 2 * _VIEW / _WIDTH
        is_mass = ((x - position) / radius) ** 2 + (y[:, None] / 12) ** 2 < 1
        picture[is_mass] = _BLUE
        return picture
