"""Rollouts on the device against those on the NumPy side of the same environment."""

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch as th
from agents import log_of
from gymnasium import spaces
from helpers import BOX_ACTIONS, DICT, VECTOR, BetaPolicy
from rl_zoo3.callbacks import RawStatisticsCallback
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecNormalize
from tensor_envs import NumpySide, RandomTensorEnv, with_nan
from torch import nn

from sb3_trpo_ext import TRPO, TrainingRecorder
from sb3_trpo_ext._observations import parts_of
from sb3_trpo_ext.envs import TensorCartPole
from sb3_trpo_ext.rollout.tensors import TensorRolloutBuffer, advantages_of

N_STEPS = 16
CASES: dict[str, tuple[str, spaces.Space, spaces.Space, dict[str, Any]]] = {
    "gaussian": ("MlpPolicy", VECTOR, BOX_ACTIONS, {}),
    "categorical": ("MlpPolicy", VECTOR, spaces.Discrete(3), {}),
    "multi_categorical": ("MlpPolicy", VECTOR, spaces.MultiDiscrete([3, 2]), {}),
    "bernoulli": ("MlpPolicy", VECTOR, spaces.MultiBinary(3), {}),
    "squashed": ("SquashedMlpPolicy", VECTOR, spaces.Box(-1.0, 3.0, (2,)), {}),
    "dict": ("MultiInputPolicy", DICT, BOX_ACTIONS, {}),
    "numbers of states": ("MlpPolicy", spaces.Discrete(5), spaces.Discrete(3), {}),
    "several numbers of states": ("MlpPolicy", spaces.MultiDiscrete([3, 4]), BOX_ACTIONS, {}),
    "gSDE": ("MlpPolicy", VECTOR, BOX_ACTIONS, {"use_sde": True, "sde_sample_freq": 4}),
    "a distribution of the user's own": (BetaPolicy, VECTOR, BOX_ACTIONS, {}),  # type: ignore[dict-item]
    "as SB3": ("MlpPolicy", VECTOR, BOX_ACTIONS, {"norm_obs": False, "norm_reward": False, "vf_lambda": None}),
    "penalty": ("MlpPolicy", VECTOR, BOX_ACTIONS, {"trust_region": "penalty", "target_kl": 0.01}),
}


def model_of(case: str, on_device: bool, **kwargs: Any) -> TRPO:
    policy, observations, actions, settings = CASES[case]
    env: Any = RandomTensorEnv(observations, actions)
    kwargs = {"n_steps": N_STEPS, "batch_size": 32, "seed": 0, "device": "cpu", **copy.deepcopy(settings), **kwargs}
    return TRPO(policy, env if on_device else NumpySide(env), **kwargs)


def contents(buffer: RolloutBuffer) -> dict[str, Any]:
    """What is in a buffer, as arrays."""
    names = ("observations", "actions", "rewards", "values", "log_probs", "advantages", "returns", "episode_starts")
    arrays: dict[str, Any] = {}
    for name in names:
        arrays |= {f"{name} {key}": np.array(part) for key, part in parts_of(getattr(buffer, name)).items()}
    return arrays


@pytest.mark.parametrize("case", CASES)
def test_a_training_is_that_of_the_numpy_side(case: str) -> None:
    trained: list[Any] = [model_of(case, is_on_device).learn(4 * N_STEPS * 4) for is_on_device in (True, False)]
    on_device, on_host = trained
    assert isinstance(on_device.rollout_buffer, TensorRolloutBuffer)
    assert not isinstance(on_host.rollout_buffer, TensorRolloutBuffer)
    expected = contents(on_host.rollout_buffer)
    for name, array in contents(on_device.rollout_buffer).items():
        assert array.shape == expected[name].shape, name
        assert array.dtype == expected[name].dtype, name
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=2e-5, err_msg=name)
    assert on_host.rollout_buffer.episode_starts.sum() > 4
    for name, tensor in on_host.policy.state_dict().items():
        th.testing.assert_close(on_device.policy.state_dict()[name], tensor, rtol=1e-4, atol=2e-5)
    th.testing.assert_close(on_device.reward_scale.state_dict(), on_host.reward_scale.state_dict())
    assert [info["l"] for info in on_device.ep_info_buffer] == [info["l"] for info in on_host.ep_info_buffer]
    np.testing.assert_allclose(
        [info["r"] for info in on_device.ep_info_buffer], [info["r"] for info in on_host.ep_info_buffer], atol=1e-3
    )
    for name, value in log_of(on_host).items():
        if name.startswith(("train/", "rollout/")) and isinstance(value, float):
            assert log_of(on_device)[name] == pytest.approx(value, rel=2e-3, abs=1e-4), name


@pytest.mark.parametrize("case", ["categorical", "numbers of states"])
def test_without_rounding_a_training_is_that_of_the_numpy_side_to_the_last_bit(case: str) -> None:
    """Discrete actions: nothing that is computed one by one on one side and together on the other, but values of limits."""
    trained = []
    for is_on_device in (True, False):
        model = model_of(case, is_on_device)
        assert model.env is not None
        env: Any = model.env.unwrapped
        env.spoil = lambda step: step._replace(truncated=th.zeros_like(step.truncated))
        trained.append(model.learn(4 * N_STEPS * 4).policy.state_dict())
    assert all(th.equal(tensor, trained[1][name]) for name, tensor in trained[0].items())


def test_a_rollout_is_that_of_sb3s_own_loop() -> None:
    class WithSB3sLoop(TRPO):
        collect_rollouts = OnPolicyAlgorithm.collect_rollouts

    for case in ("gaussian", "categorical", "squashed", "dict"):
        policy, observations, actions, _ = CASES[case]
        plain: dict[str, Any] = {
            "norm_obs": False,
            "norm_reward": False,
            "vf_lambda": None,
            "n_steps": N_STEPS,
            "seed": 0,
            "batch_size": 64,
        }
        ours = TRPO(policy, RandomTensorEnv(observations, actions), device="cpu", **plain).learn(N_STEPS * 4)
        env = NumpySide(RandomTensorEnv(observations, actions))
        theirs = WithSB3sLoop(policy, env, device="cpu", **plain).learn(N_STEPS * 4)
        expected = contents(theirs.rollout_buffer)
        for name, array in contents(ours.rollout_buffer).items():
            np.testing.assert_allclose(array, expected[name].reshape(array.shape), rtol=1e-5, atol=1e-5, err_msg=name)


def test_advantages_are_those_of_sb3_in_double_precision() -> None:
    generator = np.random.default_rng(0)
    buffer = RolloutBuffer(20, VECTOR, BOX_ACTIONS, gae_lambda=0.9, gamma=0.97, n_envs=5, device="cpu")
    for name in ("rewards", "values", "advantages"):
        setattr(buffer, name, generator.normal(size=(20, 5)))
    buffer.episode_starts = (generator.uniform(size=(20, 5)) < 0.2).astype(np.float64)
    last_values, dones = generator.normal(size=5), generator.uniform(size=5) < 0.5
    buffer.compute_returns_and_advantage(th.as_tensor(last_values), dones.astype(np.float64))
    columns = buffer.rewards, buffer.values, buffer.episode_starts, last_values, dones
    ours = advantages_of(*(th.as_tensor(column) for column in columns), gamma=0.97, gae_lambda=0.9)
    np.testing.assert_allclose(ours, buffer.advantages, rtol=0, atol=1e-12)


def test_a_batch_is_a_view_of_the_buffer() -> None:
    model = model_of("gaussian", True, normalize_advantage=False).learn(N_STEPS * 4)
    buffer: Any = model.rollout_buffer
    batch: Any = model._full_batch()
    for tensor, stored in ((batch.observations, buffer.observations), (batch.actions, buffer.actions)):
        assert tensor.data_ptr() == stored.data_ptr()
    for tensor, stored in zip(batch[2:], (buffer.log_probs, buffer.advantages, buffer.returns, buffer.values), strict=True):
        assert tensor.data_ptr() == stored.data_ptr()
    before = buffer.observations.data_ptr()
    model.learn(N_STEPS * 4, reset_num_timesteps=False)
    assert buffer.observations.data_ptr() == before


def test_the_buffer_gives_minibatches_as_sb3s_does() -> None:
    for case in ("gaussian", "dict"):
        buffer: Any = model_of(case, True).learn(N_STEPS * 4).rollout_buffer
        parts = list(buffer.get(24))
        assert [len(part.advantages) for part in parts] == [24, 24, 16]
        np.testing.assert_allclose(
            sorted(th.cat([part.returns for part in parts]).tolist()), sorted(buffer.returns.flatten().tolist())
        )
        everything = next(iter(buffer.get()))
        row = int((everything.old_log_prob == buffer.log_probs[3, 2]).nonzero()[0])
        np.testing.assert_array_equal(everything.actions[row], buffer.actions[3, 2])
        with pytest.raises(NotImplementedError, match="takes tensors"):
            buffer.add()


class Looker(BaseCallback):
    """Keeps what a callback sees."""

    def __init__(self, change_at: int | None = None, stop_at: int | None = None):
        super().__init__()
        self.change_at, self.stop_at = change_at, stop_at
        self.seen: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        names = ("actions", "clipped_actions", "new_obs", "rewards", "dones", "values", "log_probs")
        self.seen.append({name: np.array(self.locals[name].tolist()) for name in names})
        self.seen[-1]["episodes"] = [info["episode"]["l"] for info in self.locals["infos"] if "episode" in info]
        self.seen[-1]["stored"] = np.array(self.locals["rollout_buffer"].values.tolist())
        if len(self.seen) == self.change_at:
            with th.no_grad():
                self.model.policy.get_parameter("action_net.bias").add_(0.5)
        return len(self.seen) != self.stop_at


@pytest.mark.parametrize("change_at", [None, 5])
def test_callbacks_see_tensors_under_sb3s_names(change_at: int | None) -> None:
    lookers = []
    for is_on_device in (True, False):
        model = model_of("gaussian", is_on_device, norm_reward=False, norm_obs=False)
        lookers.append(Looker(change_at))
        model.learn(2 * N_STEPS * 4, lookers[-1])
    assert sum(len(step["episodes"]) for step in lookers[0].seen) > 5
    for ours, theirs in zip(*(looker.seen for looker in lookers), strict=True):
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


class Reusing(RandomTensorEnv):
    """Writes the observations of each step over those of the one before."""

    def reset_tensors(self, seed: int | None = None) -> Any:
        self.observations: Any = super().reset_tensors(seed)
        return self.observations

    def step_tensors(self, actions: th.Tensor) -> Any:
        step = super().step_tensors(actions)
        return step._replace(observations=self.observations.copy_(step.observations))


@pytest.mark.parametrize("use_sde", [False, True])
def test_callbacks_see_the_step_where_the_environment_uses_its_tensors_again(use_sde: bool) -> None:
    lookers = []
    for kind in (Reusing, RandomTensorEnv):
        env = kind(VECTOR, BOX_ACTIONS)
        model = TRPO("MlpPolicy", env, n_steps=N_STEPS, batch_size=32, use_sde=use_sde, seed=0, device="cpu")
        lookers.append(Looker())
        model.learn(2 * N_STEPS * 4, lookers[-1])
    for ours, theirs in zip(*(looker.seen for looker in lookers), strict=True):
        for name in ("values", "log_probs"):
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_callbacks_may_know_each_other(tmp_path: Any) -> None:
    first, second = Looker(), Looker()
    first.other, second.other = second, first  # type: ignore[attr-defined]
    model = TRPO("MlpPolicy", TensorCartPole(8), n_steps=8, batch_size=64, device="cpu", seed=0, tensorboard_log=str(tmp_path))
    model.learn(64, [first, RawStatisticsCallback()])
    assert len(first.seen) == 8
    assert not second.seen


def test_a_callback_can_end_the_training_in_the_middle_of_a_rollout() -> None:
    model = model_of("gaussian", True)
    model.learn(2 * N_STEPS * 4, Looker(stop_at=5))
    assert model.num_timesteps == 20
    assert isinstance(model._last_obs, np.ndarray)
    model.learn(2 * N_STEPS * 4)
    assert model.num_timesteps == 2 * N_STEPS * 4


def test_sb3s_callbacks_work(tmp_path: Any) -> None:
    model = TRPO("MlpPolicy", TensorCartPole(8), n_steps=32, device="cpu", seed=0)
    evaluation = EvalCallback(TensorCartPole(8), n_eval_episodes=8, eval_freq=32, log_path=str(tmp_path), verbose=0)
    model.learn(8 * 32 * 3, [evaluation, TrainingRecorder(tmp_path / "updates.csv"), StopTrainingOnMaxEpisodes(10_000)])
    assert (tmp_path / "evaluations.npz").exists()
    assert (tmp_path / "updates.csv").exists()


def test_a_policy_that_may_answer_otherwise_later_is_asked_in_each_step() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: th.Tensor) -> th.Tensor:
            self.calls += 1
            return x + 0.01 * self.calls

    trained = []
    for is_on_device in (True, False):
        model = model_of("gaussian", is_on_device, norm_obs=False, norm_reward=False)
        model.policy.mlp_extractor.policy_net.append(Noisy())
        model.learn(N_STEPS * 4)
        trained.append(contents(model.rollout_buffer))
    for name in ("actions ", "values ", "log_probs ", "advantages "):
        np.testing.assert_allclose(trained[0][name], trained[1][name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("name", "where"), [("observations", "observations"), ("rewards", "rewards"), ("final_observations", None)]
)
def test_a_nan_is_noticed_before_anything_is_learned_from_it(name: str, where: str | None) -> None:
    model = model_of("gaussian", True)
    model.learn(N_STEPS * 4)
    env: Any = model.env
    env.spoil = lambda step: step._replace(**{name: with_nan(getattr(step, name))})
    before = copy.deepcopy(model.policy.state_dict())
    if where is None:
        # Only values of episodes that were cut off: the update is refused
        with pytest.warns(UserWarning, match="rejected"):
            model.learn(N_STEPS * 4, reset_num_timesteps=False)
    else:
        with pytest.raises(ValueError, match=f"a NaN or an infinity in its .*{where}.* can be saved"):
            model.learn(N_STEPS * 4, reset_num_timesteps=False)
        assert all(th.equal(tensor, before[key]) for key, tensor in model.policy.state_dict().items())
    model.save(io.BytesIO())


def test_saving_and_going_on() -> None:
    model = model_of("gaussian", True).learn(2 * N_STEPS * 4)
    file = io.BytesIO()
    model.save(file)
    loaded = TRPO.load(file, env=RandomTensorEnv(VECTOR, BOX_ACTIONS), device="cpu")
    assert isinstance(loaded.rollout_buffer, TensorRolloutBuffer)
    loaded.learn(N_STEPS * 4, reset_num_timesteps=False)
    # Without an environment, and in one of arrays
    loaded = TRPO.load(file, device="cpu")
    assert not isinstance(loaded.rollout_buffer, TensorRolloutBuffer)
    observation = np.ones(3, dtype=np.float32)
    np.testing.assert_array_equal(
        loaded.predict(observation, deterministic=True)[0], model.predict(observation, deterministic=True)[0]
    )
    loaded.set_env(NumpySide(RandomTensorEnv(VECTOR, BOX_ACTIONS)))
    loaded.learn(N_STEPS * 4)
    loaded.set_env(RandomTensorEnv(VECTOR, BOX_ACTIONS))
    assert isinstance(loaded.rollout_buffer, TensorRolloutBuffer)
    loaded.learn(N_STEPS * 4)


def test_a_wrapped_environment_is_one_of_arrays() -> None:
    model = TRPO("MlpPolicy", VecNormalize(RandomTensorEnv(VECTOR, BOX_ACTIONS)), n_steps=N_STEPS, device="cpu")
    assert not isinstance(model.rollout_buffer, TensorRolloutBuffer)
    model.learn(N_STEPS * 4)


def test_tensors_elsewhere_than_the_policy_are_refused() -> None:
    with pytest.raises(ValueError, match="`env` has its tensors on meta, and the policy is on cpu"):
        TRPO("MlpPolicy", RandomTensorEnv(VECTOR, BOX_ACTIONS, device="meta"), n_steps=N_STEPS, device="cpu")
