"""Environments whose episodes begin together are taken apart."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize
from tensor_envs import RandomTensorEnv

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.envs import EnvPoolVecEnv, TensorPointMass, VectorEnvAdapter


class Clock(gym.Env):
    """The observation is the step of the episode, which has 500 of them unless ``end`` is less."""

    def __init__(self, end: int = 500, is_dict: bool = False):
        self.end, self.is_dict = end, is_dict
        part = spaces.Box(0, 1000, (1,))
        self.observation_space: Any = spaces.Dict({"step": part}) if is_dict else part
        self.action_space = spaces.Box(-1, 1, (1,))

    def _observation(self) -> Any:
        step = np.array([self.n_steps], np.float32)
        return {"step": step} if self.is_dict else step

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.n_steps = 0
        return self._observation(), {"began": True}

    def step(self, action: np.ndarray) -> Any:
        self.n_steps += 1
        return self._observation(), 1.0, False, self.n_steps >= self.end, {}


class Phases(BaseCallback):
    """Notes at which step of its episode each environment begins each rollout, and what is in the buffer after it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[int]] = []

    def _on_rollout_start(self) -> None:
        observations = self.model._last_obs
        self.seen.append(np.array(observations["step"] if isinstance(observations, dict) else observations)[:, 0].tolist())

    def _on_step(self) -> bool:
        return True


def phases(env: VecEnv, n_rollouts: int = 12, **kwargs: Any) -> list[list[int]]:
    """What :class:`Phases` notes in a training with rollouts of 100 steps."""
    policy = "MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpPolicy"
    kwargs = {"n_steps": 100, "stagger_episodes": True, "n_critic_updates": 1, "device": "cpu", "seed": 0, **kwargs}
    callback = Phases()
    TRPO(policy, env, batch_size=100, **kwargs).learn(n_rollouts * 100 * env.num_envs, callback)
    return callback.seen


@pytest.mark.parametrize("is_dict", [False, True])
@pytest.mark.parametrize("kind", [DummyVecEnv, SubprocVecEnv])
def test_environments_in_step_are_taken_apart(kind: Any, is_dict: bool) -> None:
    seen = phases(make_vec_env(Clock, 4, env_kwargs={"is_dict": is_dict}, vec_env_cls=kind))
    # One after each rollout: 2,000 steps would have room for twenty
    assert seen[:5] == [[0, 0, 0, 0], [0, 100, 100, 100], [100, 0, 200, 200], [200, 100, 0, 300], [300, 200, 100, 400]]
    assert len(set(seen[-1])) == 4


@pytest.mark.parametrize("end", [1, 50, 100])
def test_episodes_that_begin_with_each_rollout_are_left_alone(end: int) -> None:
    """There is nothing to take apart, and an environment may count its resets."""
    n_resets = 0

    class Counted(Clock):
        def reset(self, **kwargs: Any) -> Any:
            nonlocal n_resets
            n_resets += 1
            return super().reset(**kwargs)

    seen = phases(make_vec_env(lambda: Counted(end), 4), n_rollouts=5)
    assert seen == [[0, 0, 0, 0]] * 5
    assert n_resets == 4 * (1 + 500 // end)


@pytest.mark.parametrize("mode", gym.vector.AutoresetMode)
@pytest.mark.parametrize("kind", [gym.vector.SyncVectorEnv, gym.vector.AsyncVectorEnv])
def test_vector_environments_of_gymnasium_are_taken_apart(kind: Any, mode: Any) -> None:
    env = VectorEnvAdapter(kind([lambda: Clock(150)] * 3, autoreset_mode=mode))
    # The second episodes end by themselves
    assert phases(env, 3) == [[0, 0, 0], [0, 100, 100], [100, 0, 50]]
    assert all(info["began"] for info in env.reset_infos)
    env.close()


@pytest.mark.parametrize("kind", ["monitor", "vector wrapper"])
def test_vector_environments_that_must_not_begin_early_are_left_alone(kind: str) -> None:
    is_monitor = kind == "monitor"
    env: gym.vector.VectorEnv = gym.vector.SyncVectorEnv([lambda: Monitor(Clock(), allow_early_resets=not is_monitor)] * 2)
    if not is_monitor:
        env = gym.wrappers.vector.RecordEpisodeStatistics(env)
    assert phases(VectorEnvAdapter(env), 3) == [[0, 0], [100, 100], [200, 200]]


def test_many_environments_begin_in_groups() -> None:
    seen = phases(make_vec_env(Clock, 30, env_kwargs={"end": 3000}), n_rollouts=21)
    # Twenty groups; the last one goes on
    assert [np.count_nonzero(np.array(steps) == 0) for steps in seen] == [30] + [2] * 10 + [1] * 9 + [0]
    assert sorted(set(seen[-1])) == [*range(100, 2000, 100), 2000]


def test_no_sample_is_lost_and_what_is_cut_off_keeps_its_value() -> None:
    """The advantages of the rollout before are those of an episode that goes on."""
    buffers = []
    for is_staggered in (True, False):
        env = make_vec_env(Clock, 2)
        model = TRPO("MlpPolicy", env, n_steps=100, batch_size=100, seed=0, stagger_episodes=is_staggered, device="cpu")
        model.learn(200)
        buffers.append(model.rollout_buffer)
        assert model.num_timesteps == 200
        assert np.array(model._last_episode_starts).tolist() == [is_staggered, False]
        if is_staggered:
            assert env.reset_infos[0]["began"]
            assert model.reward_scale._returns is not None
            assert model.reward_scale._returns[0] == 0 < model.reward_scale._returns[1]
    np.testing.assert_array_equal(buffers[0].advantages, buffers[1].advantages)
    np.testing.assert_array_equal(buffers[0].returns, buffers[1].returns)


def test_environments_that_are_out_of_step_are_left_alone() -> None:
    env = DummyVecEnv([lambda: Monitor(Clock(30)), lambda: Monitor(Clock(70))])
    assert phases(env, 4) == [[0, 0], [10, 30], [20, 60], [0, 20]]


def test_one_environment_is_left_alone() -> None:
    assert phases(make_vec_env(Clock, 1), 3) == [[0], [100], [200]]


@pytest.mark.parametrize("kind", ["wrapper", "monitor", "one monitor"])
def test_wrappers_that_would_not_know_of_it_are_left_alone(kind: str) -> None:
    if kind == "wrapper":
        env: VecEnv = VecNormalize(make_vec_env(Clock, 2), norm_obs=False)
    elif kind == "monitor":
        env = make_vec_env(Clock, 2, monitor_kwargs={"allow_early_resets": False})
    else:
        env = DummyVecEnv([lambda: Monitor(Clock(), allow_early_resets=False), Clock])
    assert phases(env, 3) == [[0, 0], [100, 100], [200, 200]]


def test_by_default_where_the_class_lays_out_the_rollouts() -> None:
    assert phases(make_vec_env(Clock, 2), 2, stagger_episodes="auto")[1] == [100, 100]
    callback = Phases()
    TRPO("MlpPolicy", make_vec_env(Clock, 4, env_kwargs={"end": 600}), n_critic_updates=1, device="cpu").learn(4096, callback)
    # Four rollouts span two thousand steps
    assert callback.seen[1] == [0, 512, 512, 512]


def test_a_training_that_goes_on_is_not_taken_apart_again() -> None:
    env = make_vec_env(Clock, 2)
    model = TRPO("MlpPolicy", env, n_steps=100, batch_size=100, stagger_episodes=True, device="cpu").learn(600)
    callback = Phases()
    model.learn(400, callback, reset_num_timesteps=False)
    assert callback.seen == [[200, 300], [300, 400]]
    # All environments are reset: again from the beginning
    callback = Phases()
    model.learn(400, callback)
    assert callback.seen == [[0, 0], [0, 100]]


def test_environments_of_envpool_are_taken_apart() -> None:
    pytest.importorskip("envpool")
    env = EnvPoolVecEnv("Pendulum-v1", 2, seed=0)
    model = TRPO("MlpPolicy", env, n_steps=100, batch_size=100, stagger_episodes=True, device="cpu", seed=0).learn(800)
    # 200 steps each; the first one began anew after 100
    assert model.ep_info_buffer is not None
    assert [info["l"] for info in model.ep_info_buffer] == [200, 200, 200]
    assert env._lengths.tolist() == [100, 0]


def test_a_bad_value_is_refused() -> None:
    with pytest.raises(ValueError, match="`stagger_episodes` must be True or False, got 3"):
        TRPO("MlpPolicy", "Pendulum-v1", stagger_episodes=3)  # type: ignore[arg-type]


def test_environments_of_tensors_are_taken_apart() -> None:
    env = TensorPointMass(3)
    model = TRPO("MlpPolicy", env, n_steps=50, batch_size=150, stagger_episodes=True, seed=0).learn(50 * 3 * 2)
    # The second one has just begun
    assert env._n_steps.tolist() == [50, 0, 100]
    assert np.array(model._last_episode_starts).tolist() == [False, True, False]
    np.testing.assert_array_equal(model._last_obs, env.state)
    model.learn(50 * 3 * 2, reset_num_timesteps=False)
    # 150 steps each
    assert env._n_steps.tolist() == [0, 100, 50]
    assert [info["l"] for info in model.ep_info_buffer or ()] == [150, 150]


def test_environments_of_tensors_without_a_way_to_begin_again_are_left_alone() -> None:
    env = RandomTensorEnv(spaces.Box(-1, 1, (2,)), spaces.Box(-1, 1, (1,)), n_envs=2)
    env.spoil = lambda step: step._replace(terminated=th.zeros(2, dtype=th.bool), truncated=th.zeros(2, dtype=th.bool))
    TRPO("MlpPolicy", env, n_steps=50, batch_size=100, stagger_episodes=True, seed=0).learn(300)
    assert env._lengths.tolist() == [150, 150]


def test_environments_that_refuse_a_reset_say_what_to_do() -> None:
    class Refusing(gym.Env):
        observation_space, action_space, n = spaces.Box(-1, 1, (2,)), spaces.Discrete(2), 0

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
            super().reset(seed=seed)
            if 0 < self.n < 300:
                raise RuntimeError("not yet")
            self.n = 0
            return np.zeros(2, np.float32), {}

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
            self.n += 1
            return np.zeros(2, np.float32), 1.0, False, self.n == 300, {}

    env = DummyVecEnv([Refusing] * 4)
    with pytest.raises(RuntimeError, match=r"cannot be reset .*not yet.*stagger_episodes=False"):
        TRPO("MlpPolicy", env, device="cpu").learn(4096)
    TRPO("MlpPolicy", env, device="cpu", stagger_episodes=False)
