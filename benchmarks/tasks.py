"""The tasks on which default settings are compared: two halves, one to choose settings on and one to judge them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Courier(gym.Env):
    """
    Fetch from one of four corners of a square, then from another one: a Dict observation and two discrete moves per step.

    The reward of a step is 1 for a corner that is reached, less a tenth of the distance to it. Episodes have 100 steps.
    """

    CORNERS = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]], np.float32)

    def __init__(self) -> None:
        self.observation_space = spaces.Dict({"position": spaces.Box(-1, 1, (2,)), "corner": spaces.Discrete(4)})
        self.action_space = spaces.MultiDiscrete([3, 3])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict]:
        super().reset(seed=seed)
        self.position = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        self.corner, self.n_steps = int(self.np_random.integers(4)), 0
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict]:
        self.position = np.clip(self.position + 0.2 * (np.asarray(action) - 1), -1, 1).astype(np.float32)
        self.n_steps += 1
        distance = float(np.linalg.norm(self.position - self.CORNERS[self.corner]))
        is_reached = distance < 0.25
        if is_reached:
            self.corner = (self.corner + int(self.np_random.integers(1, 4))) % 4
        return self._observation(), is_reached - 0.1 * distance, False, self.n_steps == 100, {}

    def _observation(self) -> dict[str, Any]:
        return {"position": self.position, "corner": self.corner}


class Catch(gym.Env):
    """
    Ten balls fall, one after the other, and a paddle is to be below each: images of 36 x 36, three actions.

    The reward is 1 for a ball that is caught, -1 for one that is not, and 0 on the way.
    """

    SIZE, SCALE = 9, 4

    def __init__(self) -> None:
        n_pixels = self.SIZE * self.SCALE
        self.observation_space = spaces.Box(0, 255, (n_pixels, n_pixels, 1), np.uint8)
        self.action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.paddle, self.n_balls = self.SIZE // 2, 0
        self._drop()
        return self._observation(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.paddle = int(np.clip(self.paddle + int(action) - 1, 0, self.SIZE - 1))
        self.row += 1
        reward = 0.0
        if self.row == self.SIZE - 1:
            reward = 1.0 if self.column == self.paddle else -1.0
            self.n_balls += 1
            self._drop()
        return self._observation(), reward, self.n_balls == 10, False, {}

    def _drop(self) -> None:
        self.row, self.column = 0, int(self.np_random.integers(self.SIZE))

    def _observation(self) -> np.ndarray:
        grid = np.zeros((self.SIZE, self.SIZE), np.uint8)
        grid[self.row, self.column], grid[-1, self.paddle] = 255, 128
        return grid.repeat(self.SCALE, 0).repeat(self.SCALE, 1)[..., None]


def _gymnasium(env_id: str) -> gym.Env:
    return gym.make(env_id)


def _dm_control(env_id: str) -> gym.Env:
    import shimmy  # noqa: F401 (registers them)

    return gym.wrappers.FlattenObservation(gym.make(env_id))


def _without_velocities(env_id: str) -> gym.Env:
    """A task of MuJoCo with the velocities left out of its observations, under a name such as ``HopperNoVel-v5``."""
    env = gym.make(env_id.replace("NoVel", ""))
    n_positions = env.get_wrapper_attr("observation_structure")["qpos"]
    space = env.observation_space
    assert isinstance(space, spaces.Box)
    visible = spaces.Box(space.low[:n_positions], space.high[:n_positions], dtype=np.float64)
    return gym.wrappers.TransformObservation(env, lambda observation: observation[:n_positions], visible)


def _rl_zoo(env_id: str) -> gym.Env:
    import rl_zoo3.import_envs  # noqa: F401 (registers them)

    return gym.make(env_id)


class Task(NamedTuple):
    """A task, and the number of environment steps that an agent has."""

    name: str
    n_steps: int
    #: Makes an environment.
    make: Callable[[], gym.Env]


def _task(name: str, n_steps: int, make: Callable[[str], gym.Env] = _gymnasium) -> Task:
    return Task(name, n_steps, lambda: make(name))


CHOOSING = (
    _task("CartPole-v1", 50_000),
    _task("Pendulum-v1", 100_000),
    _task("LunarLander-v3", 200_000),
    _task("HalfCheetah-v5", 250_000),
    _task("Hopper-v5", 250_000),
    _task("Ant-v5", 250_000),
    _task("InvertedPendulum-v5", 50_000),
    _task("Reacher-v5", 100_000),
    # Rewards are sparse, and all episodes have 1,000 steps
    _task("dm_control/ball_in_cup-catch-v0", 100_000, _dm_control),
    _task("dm_control/pendulum-swingup-v0", 100_000, _dm_control),
    _task("dm_control/reacher-easy-v0", 100_000, _dm_control),
    _task("dm_control/point_mass-easy-v0", 100_000, _dm_control),
    _task("dm_control/fish-upright-v0", 100_000, _dm_control),
    _task("dm_control/cartpole-balance-v0", 100_000, _dm_control),
    # Observations are numbers of states
    _task("Taxi-v4", 200_000),
    _task("FrozenLake8x8-v1", 100_000),
)
JUDGING = (
    _task("Acrobot-v1", 50_000),
    _task("MountainCarContinuous-v0", 50_000),
    _task("LunarLanderContinuous-v3", 200_000),
    _task("BipedalWalker-v3", 200_000),
    _task("Walker2d-v5", 200_000),
    _task("Swimmer-v5", 150_000),
    _task("Humanoid-v5", 250_000),
    _task("Pusher-v5", 100_000),
    _task("InvertedDoublePendulum-v5", 100_000),
    _task("HumanoidStandup-v5", 100_000),
    # These need `pip install "shimmy[dm-control]" "mujoco<4"`.
    _task("dm_control/cartpole-swingup-v0", 100_000, _dm_control),
    _task("dm_control/finger-spin-v0", 150_000, _dm_control),
    _task("dm_control/walker-walk-v0", 200_000, _dm_control),
    _task("dm_control/cheetah-run-v0", 200_000, _dm_control),
    Task("Courier", 50_000, Courier),
    Task("Catch", 50_000, Catch),
)
#: An agent has to remember positions for these; neither half has them.
MEMORY = (
    _task("HopperNoVel-v5", 1_000_000, _without_velocities),
    _task("HalfCheetahNoVel-v5", 1_000_000, _without_velocities),
    _task("Walker2dNoVel-v5", 1_000_000, _without_velocities),
    _task("PendulumNoVel-v1", 300_000, _rl_zoo),
)
TASKS = {task.name: task for task in (*CHOOSING, *JUDGING, *MEMORY)}


def task_named(name: str) -> Task:
    """One of our tasks, or an environment of Gymnasium, with no length of its own."""
    return TASKS.get(name) or _task(name, 0)
