"""The point mass: its dynamics against formulas, its picture, and the checkers of Gymnasium and SB3."""

import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from interpreters import Interpreter
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import sb3_trpo_ext  # noqa: F401
from sb3_trpo_ext.envs import point_mass
from sb3_trpo_ext.envs.point_mass import PointMass1D

ENV_ID = "sb3_trpo_ext/PointMass1D-v0"


def step_from(position: float, velocity: float, force: float) -> tuple[np.ndarray, float, bool, dict[str, Any]]:
    """One step from a given state: the state after it, the reward, whether the episode is over, and the info."""
    env = PointMass1D()
    env.reset(seed=0)
    env.state = np.array([position, velocity])
    observation, reward, terminated, truncated, info = env.step(np.array([force], dtype=np.float32))
    np.testing.assert_array_equal(observation, env.state.astype(np.float32))
    return env.state, reward, terminated or truncated, info


def test_importing_the_package_registers_it_without_importing_it(sb3_interpreter: Interpreter, tmp_path: Path) -> None:
    code = (
        "import sys, sb3_trpo_ext, gymnasium as gym; assert 'sb3_trpo_ext.envs.point_mass' not in sys.modules; "
        f"env = gym.make('{ENV_ID}'); print(env.spec.max_episode_steps, type(env.unwrapped).__name__)"
    )
    result = sb3_interpreter.run(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["150", "PointMass1D"]


def test_passes_the_checkers_of_gymnasium_and_sb3() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(ENV_ID, render_mode="rgb_array").unwrapped)
        sb3_check_env(gym.make(ENV_ID, render_mode="rgb_array"))


def test_step_follows_the_formulas() -> None:
    state, reward, is_over, info = step_from(0.7, -0.4, 0.5)
    velocity = 0.99 * -0.4 + 0.5 * 0.05
    position = 0.7 + velocity * 0.05
    np.testing.assert_allclose(state, [position, velocity], rtol=1e-12)
    assert reward == pytest.approx(-(position**2) - 0.1 * velocity**2 - 0.001 * 0.25, rel=1e-12)
    assert not is_over
    assert info == {"is_reached": False}


def test_force_is_cut_off() -> None:
    state, reward, _, _ = step_from(0.7, -0.4, 30.0)
    expected_state, expected_reward, _, _ = step_from(0.7, -0.4, 1.0)
    np.testing.assert_array_equal(state, expected_state)
    assert reward == expected_reward


@pytest.mark.parametrize(
    ("position", "velocity", "is_reached"), [(0.01, 0.01, True), (0.06, 0.0, False), (0.0, 0.06, False), (-0.03, 0.04, True)]
)
def test_bonus_is_for_position_and_velocity_together(position: float, velocity: float, is_reached: bool) -> None:
    _, reward, _, info = step_from(position, velocity, 0.0)
    assert info == {"is_reached": is_reached}
    assert (reward > 4.9) if is_reached else (-0.1 < reward < 0)


def test_starts_are_spread_over_their_bounds_and_reproducible() -> None:
    env = PointMass1D()
    starts = np.stack([env.reset(seed=seed)[0] for seed in range(500)])
    assert (np.abs(starts) <= [1, 0.5]).all()
    assert (starts.max(axis=0) > [0.95, 0.45]).all()
    assert (starts.min(axis=0) < [-0.95, -0.45]).all()
    np.testing.assert_array_equal(env.reset(seed=7)[0], starts[7])


def test_no_episode_leaves_the_observation_space() -> None:
    env = gym.make(ENV_ID)
    env.reset(seed=0)
    unwrapped = env.unwrapped
    assert isinstance(unwrapped, PointMass1D)
    unwrapped.state = np.array([point_mass.MAX_START_POSITION, point_mass.MAX_START_VELOCITY])
    truncated, n_steps = False, 0
    while not truncated:
        observation, _, terminated, truncated, _ = env.step(np.ones(1, dtype=np.float32))
        n_steps += 1
        assert not terminated
    assert n_steps == 150
    assert env.observation_space.contains(observation)
    assert observation[0] == pytest.approx(21.2, abs=0.05)


def test_switching_controller_reaches_the_threshold() -> None:
    """Full force towards the goal until it is time to brake, and a spring close to it."""
    env = gym.make(ENV_ID)
    assert env.spec is not None and env.spec.reward_threshold is not None
    returns = []
    for seed in range(30):
        (position, velocity), _ = env.reset(seed=seed)
        total, truncated = 0.0, False
        while not truncated:
            if abs(position) < 0.08 and abs(velocity) < 0.12:
                force = -12 * position - 8 * velocity
            else:
                force = -20 * (position + velocity * abs(velocity) / 2)
            (position, velocity), reward, _, truncated, _ = env.step(np.array([force], dtype=np.float32).clip(-1, 1))
            total += float(reward)
        returns.append(total)
    assert np.mean(returns) > env.spec.reward_threshold


def columns_of(picture: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """The columns of a picture that have a color, from -1 (left) to 1 (right)."""
    (columns,) = np.nonzero((picture == color).all(axis=2).any(axis=0))
    return columns / (picture.shape[1] - 1) * 2 - 1


def test_picture_shows_goal_mass_and_velocity() -> None:
    env = PointMass1D(render_mode="rgb_array")
    env.reset(seed=0)
    env.state = np.array([0.75, -0.3])
    picture = env.render()
    assert picture is not None
    assert picture.dtype == np.uint8
    assert columns_of(picture, point_mass._BLUE).mean() == pytest.approx(0.5, abs=0.01)
    assert columns_of(picture, point_mass._GREEN).mean() == pytest.approx(0.0, abs=0.01)
    bar = columns_of(picture, point_mass._ORANGE)
    assert (bar.min(), bar.max()) == pytest.approx((0.3, 0.5), abs=0.01)
    env.state = np.array([-10.0, 0.0])
    picture = env.render()
    assert picture is not None
    assert columns_of(picture, point_mass._BLUE).min() == -1
    assert len(columns_of(picture, point_mass._ORANGE)) == 0


def test_other_render_modes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`render_mode` must be one of .*rgb_array.*got 'human'"):
        PointMass1D(render_mode="human")
