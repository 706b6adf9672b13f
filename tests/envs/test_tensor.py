"""Environments of tensors: their NumPy side, what they refuse, and tasks against their Gymnasium twins."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import BOX_ACTIONS, DICT, VECTOR
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize
from tensor_envs import RandomTensorEnv

import sb3_trpo_ext  # noqa: F401 (registers the point mass)
from sb3_trpo_ext import TRPO
from sb3_trpo_ext.envs import GymnasiumTensorVecEnv, TensorCartPole, TensorPointMass, TensorVecEnv
from sb3_trpo_ext.envs.tensor import TensorStep


def test_the_numpy_side_has_what_sb3_expects() -> None:
    env, twin = (RandomTensorEnv(DICT, BOX_ACTIONS) for _ in range(2))
    env.seed(3)
    observations: Any = env.reset()
    twin.reset_tensors(3)
    assert {key: (part.dtype, part.shape) for key, part in observations.items()} == {
        "position": (np.float32, (4, 3)),
        "door": (np.int64, (4,)),
    }
    returns, lengths, n_ended = np.zeros(4), np.zeros(4, int), 0
    for _ in range(40):
        actions = np.random.default_rng(0).uniform(-1, 1, (4, 2)).astype(np.float32)
        observations, rewards, dones, infos = env.step(actions)
        step: Any = twin.step_tensors(th.as_tensor(actions))
        assert rewards.dtype == np.float32
        np.testing.assert_array_equal(observations["position"], step.observations["position"])
        np.testing.assert_array_equal(dones, step.terminated | step.truncated)
        returns, lengths = returns + rewards, lengths + 1
        for index in range(4):
            if not dones[index]:
                assert infos[index] == {}
                continue
            n_ended += 1
            info = infos[index]
            assert info["TimeLimit.truncated"] == bool(step.truncated[index] and not step.terminated[index])
            np.testing.assert_array_equal(info["terminal_observation"]["position"], step.final_observations["position"][index])
            assert info["terminal_observation"]["door"] == step.final_observations["door"][index]
            assert info["episode"]["r"] == pytest.approx(returns[index], abs=1e-4)
            assert info["episode"]["l"] == lengths[index]
            returns[index], lengths[index] = 0, 0
    assert n_ended > 10


def test_arrays_that_sb3_gets_are_its_own() -> None:
    env = TensorCartPole(3)
    first: Any = env.reset()
    kept = first.copy()
    env.step(np.ones(3, dtype=int))
    np.testing.assert_array_equal(first, kept)


def test_sb3_trains_evaluates_and_wraps() -> None:
    env = VecMonitor(VecNormalize(TensorCartPole(4)))
    PPO("MlpPolicy", env, n_steps=32, n_epochs=1, device="cpu").learn(256)
    model = PPO("MlpPolicy", TensorPointMass(4), n_steps=32, n_epochs=1, device="cpu")
    mean, _ = evaluate_policy(model, TensorPointMass(4), n_eval_episodes=4)
    assert np.isfinite(mean)


def test_seeds_are_used_once() -> None:
    env = TensorPointMass(4)
    env.seed(5)
    first: Any = env.reset()
    second: Any = env.reset()
    env.seed(5)
    again: Any = env.reset()
    np.testing.assert_array_equal(again, first)
    assert not np.array_equal(first, second)


def test_what_sb3_asks_single_environments_for() -> None:
    env = TensorCartPole(3)
    assert env.env_is_wrapped(Monitor) == [True] * 3
    assert env.env_is_wrapped(gym.wrappers.TimeLimit, indices=[0]) == [False]
    assert env.get_attr("render_mode") == [None] * 3
    assert env.get_attr("max_episode_steps", indices=1) == [500]
    with pytest.raises(AttributeError, match="`gravity`: TensorCartPole has no single environments"):
        env.set_attr("gravity", 1)
    with pytest.raises(AttributeError, match="`jump`"):
        env.env_method("jump")


def step_of(**changes: Any) -> Any:
    return lambda step: step._replace(**{name: change(getattr(step, name)) for name, change in changes.items()})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (step_of(rewards=lambda tensor: tensor.numpy()), "`rewards` of RandomTensorEnv must be a tensor, got ndarray"),
        (step_of(rewards=lambda tensor: tensor[:, None]), r"`rewards` .* have the shape \(4,\), got \(4, 1\)"),
        (step_of(observations=lambda tensor: tensor[:2]), r"`observations` .* have the shape \(4, 3\), got \(2, 3\)"),
        (step_of(terminated=lambda tensor: tensor.to("meta")), "`terminated` .* be on the device cpu, .* got meta"),
        (step_of(final_observations=lambda tensor: {"a": tensor}), "`final_observations` .* must be a tensor, got dict"),
    ],
)
def test_a_wrong_step_is_refused(spoil: Any, message: str) -> None:
    env = RandomTensorEnv(VECTOR, BOX_ACTIONS)
    env.spoil = spoil
    model = TRPO("MlpPolicy", env, n_steps=8, device="cpu")
    before = [param.clone() for param in model.policy.parameters()]
    with pytest.raises(ValueError, match=message):
        model.learn(32)
    assert all(th.equal(param, old) for param, old in zip(model.policy.parameters(), before, strict=True))


def test_a_dict_with_wrong_keys_is_refused() -> None:
    env = RandomTensorEnv(DICT, BOX_ACTIONS)
    env.spoil = step_of(observations=lambda parts: {"position": parts["position"]})
    env.reset()
    with pytest.raises(ValueError, match=r"must be a dict with the keys \['door', 'position'\], got \['position'\]"):
        env.step(np.zeros((4, 2), np.float32))


def test_a_step_needs_a_reset_and_the_right_number_of_actions() -> None:
    env = TensorCartPole(3)
    with pytest.raises(RuntimeError, match="call `reset`"):
        env.step(np.zeros(3, int))
    env.reset()
    with pytest.raises(ValueError, match=r"`actions` must be of shape \(3,\), got \(2,\)"):
        env.step(np.zeros(2, int))


@pytest.mark.parametrize("task", [(TensorCartPole, "CartPole-v1"), (TensorPointMass, "sb3_trpo_ext/PointMass1D-v0")])
def test_a_task_is_that_of_gymnasium(task: tuple[Any, str]) -> None:
    env: Any = task[0](1)
    twin: Any = gym.make(task[1])
    assert env.observation_space == twin.observation_space
    assert env.action_space == twin.action_space
    env.seed(0)
    env.action_space.seed(0)
    n_ended = 0
    observation = env.reset()
    for _ in range(2 if task[0] is TensorPointMass else 8):
        twin.reset()
        # Gymnasium computes in double precision
        twin.unwrapped.state = observation[0].astype(np.float64)
        is_over = False
        while not is_over:
            action = env.action_space.sample()
            observation, rewards, dones, infos = env.step(np.array([action]))
            expected, reward, terminated, truncated, _ = twin.step(action)
            is_over = terminated or truncated
            assert dones[0] == is_over
            last = infos[0]["terminal_observation"] if is_over else observation[0]
            np.testing.assert_allclose(last, expected, atol=2e-4)
            np.testing.assert_allclose(rewards[0], reward, atol=1e-3)
        assert infos[0]["TimeLimit.truncated"] == truncated
        n_ended += 1
    assert n_ended == (2 if task[0] is TensorPointMass else 8)


class TorchVectorEnv(gym.vector.VectorEnv):
    """Stands for Isaac Lab's and ManiSkill's environments: tensors, in memory that the next step writes over."""

    def __init__(self, final_key: str | None = "final_obs", mode: Any = gym.vector.AutoresetMode.SAME_STEP):
        self.metadata = {"autoreset_mode": mode}
        self.num_envs, self.device = 3, th.device("cpu")
        self.single_observation_space, self.single_action_space = VECTOR, BOX_ACTIONS
        self.final_key = final_key
        self.observations = th.zeros(3, 3)
        self.count = 0
        self.is_closed = False

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.count = 0
        self.observations.fill_(0.0)
        return self.observations, {}

    def step(self, actions: th.Tensor) -> Any:
        self.count += 1
        final = th.full((3, 3), float(self.count))
        truncated = th.tensor([False, True, False]) & (self.count % 5 == 0)
        self.observations.copy_(final)
        self.observations[truncated] = 0.0
        info = {} if self.final_key is None else {self.final_key: final}
        return self.observations, actions.sum(1), th.zeros(3, dtype=th.bool), truncated, info

    def close_extras(self, **kwargs: Any) -> None:
        self.is_closed = True


@pytest.mark.parametrize("final_key", ["final_obs", "final_observation", None])
def test_gymnasiums_vector_environments_of_tensors(final_key: str | None) -> None:
    env = GymnasiumTensorVecEnv(TorchVectorEnv(final_key))
    env.reset()
    for count in range(1, 8):
        step: Any = env.step(np.zeros((3, 2), np.float32))
        observations, _, dones, infos = step
        assert dones.tolist() == [False, count == 5, False]
        np.testing.assert_array_equal(observations[0], count)
        if count == 5:
            assert infos[1]["TimeLimit.truncated"]
            # Where the last observation is not told, the one before stands for it
            np.testing.assert_array_equal(infos[1]["terminal_observation"], 4 if final_key is None else 5)
            np.testing.assert_array_equal(observations[1], 0)
    TRPO("MlpPolicy", env, n_steps=16, device="cpu").learn(96)
    env.close()
    assert env.env.is_closed


def test_gymnasiums_vector_environments_that_reset_later_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`env` has the autoreset mode .*NEXT_STEP.*SAME_STEP"):
        GymnasiumTensorVecEnv(TorchVectorEnv(mode=gym.vector.AutoresetMode.NEXT_STEP))


def test_gymnasiums_vector_environments_of_arrays_are_refused() -> None:
    same_step = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    env = gym.make_vec("CartPole-v1", 2, vectorization_mode="sync", vector_kwargs=same_step)
    with pytest.raises(ValueError, match="`device` must say where the tensors"):
        GymnasiumTensorVecEnv(env)
    with pytest.raises(ValueError, match="`observations` of GymnasiumTensorVecEnv must be a tensor, got ndarray"):
        GymnasiumTensorVecEnv(env, device="cpu").reset()


def test_without_time_limits_no_final_observations_are_needed() -> None:
    class Endless(TensorVecEnv):
        def __init__(self) -> None:
            super().__init__(2, VECTOR, spaces.Discrete(2), "cpu")

        def reset_tensors(self, seed: int | None = None) -> th.Tensor:
            return th.zeros(2, 3)

        def step_tensors(self, actions: th.Tensor) -> TensorStep:
            return TensorStep(th.zeros(2, 3), th.ones(2), th.zeros(2, dtype=th.bool), th.zeros(2, dtype=th.bool))

    model = TRPO("MlpPolicy", Endless(), n_steps=16, device="cpu").learn(32)
    assert getattr(model.rollout_buffer, "final_observations", 0) is None
