"""What the arguments that are left to TRPO come to, and the normalization that it brings."""

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from agents import RandomEnv, UpdateLog, assert_identical, collect, make_model, random_vec_env, train
from gymnasium import spaces
from helpers import VECTOR
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.torch_layers import NatureCNN
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_trpo_ext import TRPO, defaults
from sb3_trpo_ext.optim import UpdateResult
from sb3_trpo_ext.update.normalization import FROZEN, NormalizedExtractor, RunningNormalization, normalized_extractors
from sb3_trpo_ext.update.settings import no_argument_checks
from sb3_trpo_ext.update.structure import actor_structure, critic_structure

SMALL: dict[str, Any] = {"policy_kwargs": {"net_arch": [8]}, "seed": 0, "device": "cpu", "n_critic_updates": 2}
DICT = spaces.Dict({"choice": spaces.Discrete(3), "vector": VECTOR})
IMAGE = spaces.Box(0, 255, (36, 36, 1), np.uint8)


def statistics_of(model: TRPO) -> RunningNormalization:
    """What a policy knows of observations that are vectors."""
    extractor = model.policy.features_extractor
    assert isinstance(extractor, NormalizedExtractor)
    (normalization,) = extractor.normalizations.values()
    assert isinstance(normalization, RunningNormalization)
    return normalization


def parameter(model: Any, name: str) -> th.Tensor:
    """A parameter of a policy."""
    found: th.Tensor = model.policy.get_parameter(name)
    return found


class FarEnv(RandomEnv):
    """Observations and rewards of a scale that a network has trouble with."""

    def observe(self) -> Any:
        return (1000 + 100 * super().observe()).astype(np.float32)

    def reward(self, action: Any) -> float:
        return 1000 * super().reward(action)


# --- The length of a rollout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_envs", [1, 2, 3, 8, 10, 16, 32, 100, 1000])
@pytest.mark.parametrize("batch_size", [64, 100])
def test_a_rollout_has_about_2048_samples_and_whole_minibatches(n_envs: int, batch_size: int) -> None:
    n_steps = defaults.n_steps(n_envs, batch_size)
    assert n_steps >= defaults.MIN_STEPS
    assert n_steps * n_envs % batch_size == 0
    n_samples = max(2048, defaults.MIN_STEPS * n_envs)
    assert n_samples <= n_steps * n_envs < n_samples + n_envs * batch_size


@pytest.mark.parametrize(
    ("n_envs", "batch_size", "n_steps"), [(10, 2048, 205), (333, 2000, 16), (129, 64, 16), (63, 1024, 33)]
)
def test_whole_minibatches_do_not_make_a_rollout_much_longer(n_envs: int, batch_size: int, n_steps: int) -> None:
    assert defaults.n_steps(n_envs, batch_size) == n_steps


@pytest.mark.parametrize(("n_envs", "n_processes"), [(5, 4), (3, 2), (16, 2), (1, 4)])
def test_the_minibatches_of_each_process_are_whole(n_envs: int, n_processes: int) -> None:
    n_steps = defaults.n_steps(n_envs, 64, n_processes)
    assert n_steps * n_envs % 64 == 0
    assert 2048 <= n_steps * n_envs * n_processes <= 2 * 2048


def test_the_length_of_a_rollout_follows_the_number_of_environments(tmp_path: Any) -> None:
    model = TRPO("MlpPolicy", random_vec_env(4), **SMALL)
    assert model.n_steps == 512
    model.save(tmp_path / "model")
    assert TRPO.load(tmp_path / "model", env=random_vec_env(8)).n_steps == 256
    assert TRPO.load(tmp_path / "model", env=random_vec_env(8), n_steps=100).n_steps == 100
    assert make_model(random_vec_env(4), n_steps=32).n_steps == 32


# --- Samples of the Fisher matrix -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_samples", "factor"), [(1, 1), (16_384, 1), (49_151, 1), (49_152, 3), (65_536, 3), (2**17, 7), (2**20, 63)]
)
def test_the_fisher_matrix_needs_no_more_than_so_many_samples(n_samples: int, factor: int) -> None:
    assert defaults.sub_sampling_factor(n_samples) == factor
    assert factor == 1 or defaults.N_FISHER_SAMPLES <= n_samples / factor < 2 * defaults.N_FISHER_SAMPLES


def test_a_long_rollout_has_its_fisher_matrix_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    full = collect(make_model())
    n_samples = full.rollout_buffer.buffer_size * full.rollout_buffer.n_envs
    curvatures = []
    for factor, n_fisher_samples in ((1, n_samples // 3), (3, n_samples), (None, n_samples // 3), (None, n_samples)):
        monkeypatch.setattr(defaults, "N_FISHER_SAMPLES", n_fisher_samples)
        model = make_model(sub_sampling_factor=factor)
        model.rollout_buffer = copy.deepcopy(full.rollout_buffer)
        curvatures.append(train(model)["train/curvature"])
    every, third, left_long, left_short = curvatures
    assert (left_long, left_short) == (third, every)
    assert third != every


# --- The KL of a training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "n_dims"),
    [(spaces.Box(-1, 1, (3,)), 3), (spaces.Discrete(4), 1), (spaces.MultiDiscrete([3, 3]), 2), (spaces.MultiBinary(5), 5)],
)
@pytest.mark.parametrize(
    ("n_samples", "total", "budget"), [(2048, 200_000, 1), (2000, 100_000, 1), (64, 6400, 1), (2048, 1_000_000, 4)]
)
def test_the_kl_of_all_updates_is_the_budget(
    space: spaces.Space, n_dims: int, n_samples: int, total: int, budget: float
) -> None:
    n_updates = -(-total // n_samples)
    progress = [max(1 - n * n_samples / total, 0) for n in range(1, n_updates + 1)]
    values = [defaults.target_kl(space, n_samples, total, left) for left in progress]
    assert sum(values) == pytest.approx(n_dims * budget, rel=2e-2)
    assert values == sorted(values, reverse=True)
    assert values[-1] > 0


def test_many_trainings_of_less_than_a_rollout_spend_as_much_as_one_long_one() -> None:
    space = spaces.Discrete(2)
    short = [defaults.target_kl(space, 512, start + length, 0.0, start) for start in (512, 5120) for length in (1, 100, 512)]
    assert short == [pytest.approx(defaults.KL_BUDGET * 512 / defaults.BUDGET_STEPS)] * 6


def test_a_training_of_a_single_update_does_not_spend_the_budget() -> None:
    assert defaults.target_kl(spaces.Discrete(2), 2048, 100, 0.0) == defaults.MAX_KL


def test_the_kl_that_is_spent_is_the_budget() -> None:
    model = TRPO("MlpPolicy", RandomEnv(), **SMALL, n_steps=32, batch_size=32)
    log = UpdateLog()
    model.learn(960, log)
    assert len(log.updates) == 30
    assert sum(log.values("train/kl_divergence_loss")) == pytest.approx(2 * defaults.KL_BUDGET, rel=0.02)


def test_an_endless_training_starts_as_fast_as_one_of_a_million_steps() -> None:
    space = spaces.Box(-1, 1, (3,))
    assert defaults.target_kl(space, 2048, 10**9, 1.0) == pytest.approx(defaults.target_kl(space, 2048, 10**6, 1.0), rel=2e-3)
    assert defaults.target_kl(space, 2048, 10**9, 0.5) == pytest.approx(defaults.target_kl(space, 2048, 10**6, 0.5), rel=3e-3)


def test_an_update_outside_of_learn_has_a_usual_region() -> None:
    model = TRPO("MlpPolicy", RandomEnv(), **SMALL, n_steps=64)
    collect(model, 6400)
    assert 0 < model._target_kl(64) < defaults.MAX_KL * 2


def test_the_budget_is_that_of_each_call_of_learn() -> None:
    model = TRPO("MlpPolicy", RandomEnv(), **SMALL, n_steps=32, batch_size=32)
    logs = [UpdateLog(), UpdateLog(), UpdateLog()]
    model.learn(640, logs[0])
    model.learn(640, logs[1])
    model.learn(640, logs[2], reset_num_timesteps=False)
    first, second, third = (log.values("train/target_kl") for log in logs)
    # Up to what each update takes over from those before
    assert first == pytest.approx(second, rel=0.1)
    # As much per step as a long training, and all of it for this call
    assert third == pytest.approx([value * 640 / defaults.BUDGET_STEPS for value in first], rel=0.1)


def test_many_calls_of_learn_move_the_policy_like_one_long_call() -> None:
    model = TRPO("MlpPolicy", RandomEnv(), **SMALL, n_steps=32, batch_size=32)
    log = UpdateLog()
    for _ in range(20):
        model.learn(32, log, reset_num_timesteps=False)
    values = log.values("train/target_kl")[1:]
    assert values == pytest.approx([2 * defaults.KL_BUDGET * 32 / defaults.BUDGET_STEPS] * 19)


def test_a_training_that_a_callback_has_ended_goes_on_with_what_is_left() -> None:
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.num_timesteps < 320

    whole, rest = UpdateLog(), UpdateLog()
    models = [TRPO("MlpPolicy", RandomEnv(), **SMALL, n_steps=32, batch_size=32) for _ in range(2)]
    models[0].learn(640, whole)
    models[1].learn(640, Stop())
    models[1].learn(320, rest, reset_num_timesteps=False)
    assert rest.values("train/target_kl") == pytest.approx(whole.values("train/target_kl")[10:], rel=0.1)


# --- The start of a policy -------------------------------------------------------------------------------------------------


def test_a_gaussian_starts_spread_over_the_bounds() -> None:
    space = spaces.Box(np.array([-2, 0, -3e38, 1], np.float32), np.array([2, 10, 3e38, 1], np.float32))
    policy: Any = TRPO("MlpPolicy", RandomEnv(VECTOR, space), **SMALL).policy
    # Of four dimensions, each has half of the variance of one or two
    np.testing.assert_allclose(policy.log_std.exp().detach(), [2 * 0.5**0.5, 5 * 0.5**0.5, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(policy.action_net.bias.detach(), [0, 5, 0, 0], atol=1e-6)


@pytest.mark.parametrize(("n_dims", "variance"), [(1, 1), (2, 1), (3, 2 / 3), (17, 2 / 17)])
def test_the_noise_of_all_dimensions_together_is_limited(n_dims: int, variance: float) -> None:
    policy: Any = TRPO("MlpPolicy", RandomEnv(VECTOR, spaces.Box(-1, 1, (n_dims,))), **SMALL).policy
    np.testing.assert_allclose(policy.log_std.exp().square().detach(), [variance] * n_dims, rtol=1e-6)


def test_a_start_that_is_asked_for_is_kept() -> None:
    env = RandomEnv(VECTOR, spaces.Box(-2, 2, (1,)))
    kwargs = {**SMALL, "policy_kwargs": {"net_arch": [8], "log_std_init": -1.0}}
    assert TRPO("MlpPolicy", env, **kwargs).policy.log_std.tolist() == [-1.0]
    assert TRPO("MlpPolicy", env, **SMALL, use_sde=True).policy.log_std.unique().tolist() == [0.0]


# --- Normalization ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "env", "expected"),
    [
        ("MlpPolicy", DummyVecEnv([RandomEnv]), (True, True)),
        ("MultiInputPolicy", DummyVecEnv([lambda: RandomEnv(DICT)]), (True, True)),
        ("CnnPolicy", DummyVecEnv([lambda: RandomEnv(IMAGE)]), (False, True)),
        ("MlpPolicy", DummyVecEnv([lambda: RandomEnv(spaces.Discrete(3))]), (True, True)),
        ("MlpPolicy", DummyVecEnv([lambda: RandomEnv(spaces.MultiDiscrete([3, 2]))]), (True, True)),
        ("MlpPolicy", DummyVecEnv([lambda: RandomEnv(spaces.MultiBinary(3))]), (False, True)),
        ("MlpPolicy", VecNormalize(DummyVecEnv([RandomEnv])), (False, False)),
        ("MlpPolicy", VecNormalize(DummyVecEnv([RandomEnv]), norm_obs=False), (True, False)),
        ("MlpPolicy", VecNormalize(DummyVecEnv([RandomEnv]), norm_reward=False), (False, True)),
        (
            "MlpPolicy",
            VecNormalize(VecNormalize(DummyVecEnv([RandomEnv]), norm_reward=False), norm_obs=False),
            (False, False),
        ),
    ],
)
def test_what_is_normalized_by_itself(policy: str, env: Any, expected: tuple[bool, bool]) -> None:
    model = TRPO(policy, env, **SMALL, n_steps=32)
    assert (model.norm_obs, model.norm_reward) == expected
    assert isinstance(model.policy.features_extractor, NormalizedExtractor) == expected[0]
    model.learn(64)


def test_a_features_extractor_of_ones_own_gets_what_it_asks_for() -> None:
    from stable_baselines3.common.torch_layers import FlattenExtractor

    class Own(FlattenExtractor):
        pass

    kwargs = {**SMALL, "policy_kwargs": {"features_extractor_class": Own}}
    assert not TRPO("MlpPolicy", RandomEnv(), **kwargs).norm_obs
    model = TRPO("MlpPolicy", RandomEnv(), **kwargs, norm_obs=True)
    assert isinstance(model.policy.features_extractor, NormalizedExtractor)
    # SB3's own, by its name
    kwargs["policy_kwargs"] = {"features_extractor_class": FlattenExtractor}
    assert TRPO("MlpPolicy", RandomEnv(), **kwargs).norm_obs


def test_the_agent_learns_from_what_vecnormalize_would_give_it() -> None:
    env = random_vec_env(2)
    model = TRPO("MlpPolicy", env, **SMALL, n_steps=32)
    model.learn(256)
    observations = model.rollout_buffer.observations
    normalization = statistics_of(model)
    assert int(normalization.n_samples) == 256
    wrapped = VecNormalize(random_vec_env(2))
    statistics = RunningMeanStd(shape=VECTOR.shape)
    statistics.mean, statistics.var = normalization.mean.double().numpy(), normalization.var.double().numpy()
    wrapped.obs_rms = statistics  # type: ignore[assignment]
    flat = observations.reshape(-1, *VECTOR.shape)
    features: Any = model.policy.extract_features(th.as_tensor(flat))
    expected: Any = wrapped.normalize_obs(flat)
    np.testing.assert_allclose(features, expected, atol=1e-5)


@pytest.mark.parametrize(("policy", "space"), [("MlpPolicy", VECTOR), ("MultiInputPolicy", DICT)])
@pytest.mark.parametrize("use_sde", [False, True])
def test_the_ratio_is_one_when_each_update_begins(policy: str, space: spaces.Space, use_sde: bool) -> None:
    class Checked(TRPO):
        n_checked = 0

        def train(self) -> None:
            batch = self._full_batch()
            with th.no_grad():
                values, log_probs, _ = self.policy.evaluate_actions(batch.observations, batch.actions)
            np.testing.assert_allclose(log_probs, batch.old_log_prob, atol=1e-4)
            np.testing.assert_allclose(values.flatten(), batch.old_values, atol=1e-4)
            self.n_checked += 1
            super().train()

    env = FarEnv if policy == "MlpPolicy" else lambda: RandomEnv(space)
    model = Checked(policy, DummyVecEnv([env] * 2), **SMALL, n_steps=32, use_sde=use_sde)
    model.learn(64 * 4)
    assert model.n_checked == 4


def test_the_first_update_on_a_rollout_of_the_users_own_loop_is_of_the_normalized_policy() -> None:
    """If the statistics came after it, the policy would be another one outside of the trust region."""

    class OwnLoop(TRPO):
        collect_rollouts = OnPolicyAlgorithm.collect_rollouts

        def _update_policy(self, *args: Any) -> UpdateResult:
            [extractor] = set(normalized_extractors(self.policy))
            normalization: Any = extractor.normalizations["observation"]
            self.n_samples = int(normalization.n_samples)
            batch = self._full_batch()
            with th.no_grad():
                values, log_probs, _ = self.policy.evaluate_actions(batch.observations, batch.actions)
            np.testing.assert_allclose(log_probs, batch.old_log_prob, atol=1e-4)
            np.testing.assert_allclose(values.flatten(), batch.old_values, atol=1e-4)
            return super()._update_policy(*args)

    model = OwnLoop("MlpPolicy", DummyVecEnv([FarEnv] * 2), **SMALL, n_steps=32)
    for update in range(3):
        with pytest.warns(UserWarning, match="rewards are not scaled"):
            model.learn(64, reset_num_timesteps=False)
        assert model.n_samples == 64 * max(update, 1)


def test_a_model_that_does_not_scale_rewards_does_not_warn_of_them(recwarn: pytest.WarningsRecorder) -> None:
    model = TRPO("MlpPolicy", random_vec_env(2), **SMALL, n_steps=32, batch_size=16, norm_reward=False)
    _, callback = model._setup_learn(1000)
    assert model.env is not None
    OnPolicyAlgorithm.collect_rollouts(model, model.env, callback, model.rollout_buffer, model.n_steps)
    model.train()
    assert not recwarn.list


def test_what_the_extractor_within_has_can_be_read() -> None:
    space = spaces.Dict({"image": spaces.Box(0, 255, (36, 36, 3), np.uint8), "vector": VECTOR})
    model = TRPO("MultiInputPolicy", RandomEnv(space), **SMALL, n_steps=32, batch_size=16)
    extractor: Any = model.policy.features_extractor
    assert isinstance(extractor, NormalizedExtractor)
    assert isinstance(extractor.extractors["image"], NatureCNN)
    for copied in (copy.deepcopy(extractor), pickle.loads(pickle.dumps(extractor))):
        assert list(copied.extractors) == ["image", "vector"]
    with pytest.raises(AttributeError, match="extractor_of_nobody"):
        _ = extractor.extractor_of_nobody


def test_rewards_are_those_of_the_environment_over_a_scale_that_a_rollout_keeps() -> None:
    raw: list[np.ndarray] = []

    class Recorded(DummyVecEnv):
        def step_wait(self) -> Any:
            observations, rewards, dones, infos = super().step_wait()
            raw.append(rewards.copy())
            return observations, rewards, dones, infos

    class Checked(TRPO):
        def train(self) -> None:
            ratio = np.array(raw) / self.rollout_buffer.rewards
            # Episodes that were cut off have a value added, and far rewards are clipped
            scales.append(float(np.median(ratio)))
            raw.clear()
            super().train()

    scales: list[float] = []
    model = Checked("MlpPolicy", Recorded([FarEnv] * 2), **SMALL, n_steps=64)
    model.learn(128 * 3)
    assert all(100 < scale < 100_000 for scale in scales)
    assert scales[0] == pytest.approx(scales[1], rel=1e-5), "the first rollout is given the scale that it has led to"
    assert scales[2] != pytest.approx(scales[1], rel=1e-5)
    assert np.abs(model.rollout_buffer.values).max() < 100


def test_an_agent_predicts_the_same_after_saving(tmp_path: Any) -> None:
    model = TRPO("MlpPolicy", DummyVecEnv([FarEnv]), **SMALL, n_steps=64).learn(256)
    model.save(tmp_path / "model")
    loaded = TRPO.load(tmp_path / "model", device="cpu")
    observations = np.array([FarEnv().observe() for _ in range(50)])
    for each in (model, loaded):
        # Statistics belong to training alone
        each.predict(observations)
    assert_identical(
        th.as_tensor(model.predict(observations, deterministic=True)[0]),
        th.as_tensor(loaded.predict(observations, deterministic=True)[0]),
    )
    assert loaded.reward_scale.scale == model.reward_scale.scale
    assert loaded.norm_obs is True
    # A policy alone, as SB3 saves it
    model.policy.save(str(tmp_path / "policy"))
    policy = type(model.policy).load(str(tmp_path / "policy"), device="cpu")
    np.testing.assert_array_equal(
        policy.predict(observations, deterministic=True)[0], model.predict(observations, deterministic=True)[0]
    )


def test_going_on_after_loading_keeps_the_statistics(tmp_path: Any) -> None:
    model = TRPO("MlpPolicy", DummyVecEnv([FarEnv]), **SMALL, n_steps=64).learn(256)
    model.save(tmp_path / "model")
    loaded = TRPO.load(tmp_path / "model", env=DummyVecEnv([FarEnv]), device="cpu")
    loaded.learn(64, reset_num_timesteps=False)
    assert int(statistics_of(loaded).n_samples) == 320
    before: Any = copy.deepcopy(loaded.get_parameters())
    model.set_parameters(before)
    assert model.reward_scale.scale == loaded.reward_scale.scale
    assert_identical(model.policy.state_dict(), before["policy"])


def test_models_of_earlier_versions_stay_without_normalization(tmp_path: Any) -> None:
    model = make_model(DummyVecEnv([FarEnv]), norm_obs=False, norm_reward=False)
    # What a file of an earlier version does not have
    model.save(tmp_path / "model", exclude=["norm_obs", "norm_reward", "_auto_n_steps"])
    loaded = TRPO.load(tmp_path / "model", env=DummyVecEnv([FarEnv]), device="cpu")
    assert (loaded.norm_obs, loaded.norm_reward) == (False, False)
    loaded.learn(32)
    assert loaded.reward_scale.scale == 1.0


def test_normalized_mlps_are_still_computed_by_hand() -> None:
    model = TRPO("MlpPolicy", RandomEnv(), **SMALL)
    assert actor_structure(model.policy) is not None
    assert critic_structure(model.policy, model._parts.critic_params) is not None


def test_rewards_can_be_scaled_from_some_time_on(tmp_path: Path) -> None:
    """The scale begins with the first rollout after that."""
    model = make_model()
    model.save(tmp_path / "model")
    loaded = TRPO.load(tmp_path / "model", env=RandomEnv(), device="cpu", norm_reward=True)
    counts = [float(loaded.reward_scale.n), float(loaded.learn(32).reward_scale.n)]
    assert counts == [0, 32]
    parameters: dict[str, Any] = model.get_parameters()
    other = make_model(norm_reward=True, seed=1)
    other.set_parameters(parameters)
    assert_identical(other.policy.state_dict(), model.policy.state_dict())


@pytest.mark.parametrize("reward", [math.inf, -math.inf, math.nan])
def test_rewards_that_are_not_finite_stop_an_update(reward: float) -> None:
    """Clipped, an infinity would look like any large reward."""

    class Odd(RandomEnv):
        def reward(self, action: Any) -> float:
            return reward if self.np_random.random() < 0.1 else super().reward(action)

    model = make_model(DummyVecEnv([Odd]), norm_reward=True)
    before = copy.deepcopy(model.policy.state_dict())
    with pytest.warns(UserWarning, match="rewards"):
        model.learn(96)
    assert_identical(model.policy.state_dict(), before)
    assert model._n_updates == 3
    assert model._n_accepted == 0


@pytest.mark.parametrize("name", ["n_steps", "batch_size"])
def test_a_length_that_is_given_when_loading_stays(name: str, tmp_path: Path) -> None:
    """Also if it is what the class had come to by itself."""
    model = TRPO("MlpPolicy", RandomEnv(), **SMALL)
    model.save(tmp_path / "model")
    by_name: dict[str, dict[str, Any]] = {
        "n_steps": {"n_steps": model.n_steps, "batch_size": 100},
        "batch_size": {"n_steps": 8192, "batch_size": 64},
    }
    given = by_name[name]
    loaded = TRPO.load(tmp_path / "model", env=random_vec_env(2), device="cpu", **given)
    assert {key: getattr(loaded, key) for key in given} == given


@pytest.mark.parametrize("name", ["norm_obs", "norm_reward"])
def test_a_bad_switch_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be True or False"):
        make_model(**{name: "yes"})


@pytest.mark.parametrize("name", ["target_kl", "cg_damping"])
def test_a_word_that_is_not_auto_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be a finite number"):
        make_model(**{name: "automatic"})


def test_a_pretrained_policy_stays_what_it_is() -> None:
    model = TRPO("MlpPolicy", DummyVecEnv([FarEnv]), **SMALL, n_steps=64)
    observations = np.array([FarEnv().observe() for _ in range(20)])
    _, log_prob, _ = model.policy.evaluate_actions(th.as_tensor(observations), th.zeros(20, 2))
    (-log_prob.mean()).backward()
    model.policy.optimizer.step()
    before = model.predict(observations, deterministic=True)[0]
    with pytest.warns(UserWarning, match="changed before its first rollout"):
        collect(model)
    np.testing.assert_array_equal(model.predict(observations, deterministic=True)[0], before)
    train(model)
    collect(model)
    assert int(statistics_of(model).n_samples) == FROZEN
    assert (statistics_of(model).mean == 0).all()


def test_a_callback_may_change_the_first_rollout() -> None:
    """Its rewards are scaled, and what a callback makes of the full buffer is what the update learns from."""

    class Shaping(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 3:
                self.locals["rewards"][:] = 1e5
            return True

        def _on_rollout_end(self) -> None:
            buffer = self.locals["rollout_buffer"]
            rewards.append(buffer.rewards[[1, 2], 0].copy())
            buffer.advantages[:] = np.arange(buffer.advantages.size).reshape(buffer.advantages.shape)

    class Checked(TRPO):
        def train(self) -> None:
            advantages.append(self.rollout_buffer.advantages.copy())
            super().train()

    rewards: list[np.ndarray] = []
    advantages: list[np.ndarray] = []
    model = Checked("MlpPolicy", DummyVecEnv([FarEnv]), **SMALL, n_steps=64)
    model.learn(128, Shaping())
    assert rewards[0][1] == pytest.approx(min(1e5 / model.reward_scale.scale, 10), rel=0.5)
    assert abs(rewards[0][0]) < rewards[0][1]
    for each in advantages:
        np.testing.assert_array_equal(each.flatten(), np.arange(64))


class FarPolicy(ActorCriticPolicy):
    """One that SB3's loop collects for, because its own method might do anything."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("policy", [ActorCriticPolicy, FarPolicy])
@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_callbacks_see_the_rewards_of_the_environment(policy: type[ActorCriticPolicy], dtype: type) -> None:
    """What they make of them is scaled, in the first rollout as in all others."""

    class Large(DummyVecEnv):
        """Rewards of 1000 and 3000 in turn."""

        n_steps = 0

        def step_wait(self) -> Any:
            observations, rewards, dones, infos = super().step_wait()
            self.n_steps += 1
            return observations, np.full_like(rewards, 1000 + 2000 * (self.n_steps % 2)).astype(dtype), dones, infos

    class Bonus(BaseCallback):
        def _on_step(self) -> bool:
            assert self.locals["rewards"] in (1000, 3000)
            self.locals["rewards"] += 500
            kept.append(self.locals["rewards"])
            return True

        def _on_rollout_end(self) -> None:
            scaled.append(self.locals["rollout_buffer"].rewards.copy())

    kept: list[np.ndarray] = []
    scaled: list[np.ndarray] = []
    # Without discounting, the end of an episode changes no reward
    settings: dict[str, Any] = {**SMALL, "n_steps": 64, "gamma": 0.0, "norm_reward": True, "stagger_episodes": False}
    TRPO(policy, Large([RandomEnv]), **settings).learn(3 * 64, Bonus())
    assert len(scaled) == 3
    for rewards in scaled:
        assert 2 < rewards.max() < 6
        np.testing.assert_allclose(np.unique(rewards / rewards.max()), [3 / 7, 1], rtol=1e-5)
    assert {float(rewards) for (rewards,) in kept} == {1500, 3500}


@pytest.mark.parametrize("policy", [ActorCriticPolicy, FarPolicy])
@pytest.mark.parametrize("kind", [list, th.as_tensor, lambda rewards: rewards[:, None], lambda rewards: float(rewards[0])])
def test_rewards_may_come_in_several_forms(policy: type[ActorCriticPolicy], kind: Any) -> None:
    class Odd(DummyVecEnv):
        """Without `step_wait`, as a simulator of many environments may be."""

        def step(self, actions: np.ndarray) -> Any:
            self.step_async(actions)
            observations, rewards, dones, infos = super().step_wait()
            return observations, kind(rewards), dones, [{**info, "terminal_observation": None} for info in infos]

        def step_wait(self) -> Any:
            raise NotImplementedError

        def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
            assert attr_name == "render_mode"
            assert self.may_ask, "asked for in training"
            return super().get_attr(attr_name, indices)

        may_ask = True

    env = Odd([RandomEnv])
    model = TRPO(policy, env, **SMALL, n_steps=64, norm_reward=True, stagger_episodes=False)
    Odd.may_ask = False
    model.learn(128)
    assert model._n_accepted == 2
    assert 0.1 < model.rollout_buffer.rewards.std() < 3


@pytest.mark.parametrize("policy", [ActorCriticPolicy, FarPolicy])
def test_a_callback_may_change_the_reward_of_a_truncated_step(policy: type[ActorCriticPolicy]) -> None:
    class Penalty(BaseCallback):
        def _on_step(self) -> bool:
            self.locals["rewards"][self.locals["dones"]] = -50.0
            return True

        def _on_rollout_end(self) -> None:
            # Episodes have ten steps
            ends.append(self.locals["rollout_buffer"].rewards[(np.arange(64) + 64 * len(ends)) % 10 == 9])

    ends: list[np.ndarray] = []
    settings: dict[str, Any] = {**SMALL, "n_steps": 64, "gamma": 0.0, "norm_reward": True, "stagger_episodes": False}
    TRPO(policy, DummyVecEnv([RandomEnv]), **settings).learn(128, Penalty())
    assert [len(each) for each in ends] == [6, 6]
    assert all((each < -1).all() for each in ends)


def test_statistics_of_demonstrations_are_kept_and_followed() -> None:
    model = TRPO("MlpPolicy", DummyVecEnv([FarEnv]), **SMALL, n_steps=64)
    policy: Any = model.policy
    model.observe(np.array([FarEnv().observe() for _ in range(20)]))
    with th.no_grad():
        policy.action_net.bias.add_(0.1)
    collect(model)
    assert int(statistics_of(model).n_samples) == 20
    train(model)
    assert int(statistics_of(model).n_samples) == 84


def test_pretraining_survives_saving_and_loading(tmp_path: Path) -> None:
    model = TRPO("MlpPolicy", DummyVecEnv([FarEnv]), **SMALL, n_steps=64)
    with th.no_grad():
        parameter(model, "action_net.weight").add_(0.1)
    with pytest.warns(UserWarning, match="changed before its first rollout"):
        model.save(tmp_path / "model")
    loaded = TRPO.load(tmp_path / "model", env=DummyVecEnv([FarEnv]), device="cpu")
    loaded.learn(64)
    assert int(statistics_of(loaded).n_samples) == FROZEN


def test_a_wrapped_network_is_normalized() -> None:
    """As by `torch.compile`, which changes the names of parameters."""
    model = TRPO("MlpPolicy", DummyVecEnv([FarEnv]), **SMALL, n_steps=64)
    model.policy.mlp_extractor.policy_net = th.nn.Sequential(model.policy.mlp_extractor.policy_net)
    collect(model)
    assert int(statistics_of(model).n_samples) == 64


def test_an_untrained_model_that_is_loaded_is_normalized(tmp_path: Path) -> None:
    model = TRPO("MlpPolicy", DummyVecEnv([FarEnv]), **SMALL, n_steps=64)
    with th.no_grad():
        parameter(model, "log_std").fill_(-1)  # not what observations go through
    model.save(tmp_path / "model")
    loaded = TRPO.load(tmp_path / "model", env=DummyVecEnv([FarEnv]), device="cpu").learn(64)
    assert int(statistics_of(loaded).n_samples) == 64
    copy.deepcopy(loaded.policy)


def test_a_bad_observation_in_the_first_rollout_does_not_end_the_normalization() -> None:
    class OnceInfinite(RandomEnv):
        n_observed = 0

        def observe(self) -> Any:
            self.n_observed += 1
            observation = super().observe()
            return observation * np.float32(np.inf) if self.n_observed == 20 else observation

    model = TRPO("MlpPolicy", DummyVecEnv([OnceInfinite]), **SMALL, n_steps=64)
    model.learn(64 * 3)
    assert int(statistics_of(model).n_samples) == 128


def test_truncated_episodes_of_the_first_rollout_have_values_in_the_unit_of_the_rewards() -> None:
    class Tiny(RandomEnv):
        def reward(self, action: Any) -> float:
            return 0.001 * super().reward(action)

    class Checked(TRPO):
        def train(self) -> None:
            # A value is at most a few units; divided by the scale it would be hundreds
            largest.append(float(np.abs(self.rollout_buffer.rewards).max()))
            super().train()

    largest: list[float] = []
    Checked("MlpPolicy", DummyVecEnv([Tiny]), **SMALL, n_steps=64).learn(128)
    assert max(largest) < 5


def test_a_policy_that_changes_in_the_first_rollout_keeps_its_log_probabilities() -> None:
    class Change(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 32:
                with th.no_grad():
                    parameter(self.model, "log_std").fill_(-3)
            return True

    log_probs = []
    for norm_reward in (True, False):
        model = TRPO("MlpPolicy", DummyVecEnv([RandomEnv]), **SMALL, n_steps=64, norm_obs=False, norm_reward=norm_reward)
        _, callback = model._setup_learn(1000, Change())
        assert model.env is not None
        model.collect_rollouts(model.env, callback, model.rollout_buffer, 64)
        log_probs.append(model.rollout_buffer.log_probs.copy())
    np.testing.assert_array_equal(*log_probs)


@pytest.mark.parametrize("name", ["norm_obs", "norm_reward"])
def test_a_switch_that_is_changed_later_is_named(name: str) -> None:
    model = TRPO("MlpPolicy", RandomEnv(), **SMALL, n_steps=64)
    setattr(model, name, False)
    with pytest.raises(ValueError, match=f"`{name}` has become False, which is decided when a model is made"):
        model.learn(64)


def test_what_cannot_be_normalized_is_named() -> None:
    class Own(ActorCriticPolicy):
        pass

    with pytest.raises(ValueError, match="`norm_obs=True` needs a policy of Stable-Baselines3, and Own"):
        make_model(policy=Own, norm_obs=True)
    with pytest.raises(ValueError, match="`norm_obs=True` has no vector to normalize"):
        make_model(RandomEnv(spaces.MultiBinary(4)), norm_obs=True)
    with pytest.raises(RuntimeError, match=r"does not normalize its observations, and this one does: .*norm_obs=False"):
        make_model(norm_obs=True).set_parameters(make_model().get_parameters())  # type: ignore[arg-type]


class _Acting(th.nn.Module):
    """What users export: observation in, deterministic action out."""

    def __init__(self, policy: ActorCriticPolicy):
        super().__init__()
        self.policy = policy

    def forward(self, observation: Any) -> th.Tensor:
        """Act, as SB3's page on exporting models has it."""
        return self.policy(observation, deterministic=True)[0]


def test_the_normalization_is_exported_with_the_policy() -> None:
    model = TRPO("MlpPolicy", "Pendulum-v1", n_steps=128, **SMALL).learn(256)
    observations = th.as_tensor(model.rollout_buffer.observations[:, 0])
    with no_argument_checks:
        exported = th.export.export(
            _Acting(model.policy), (observations[:2],), dynamic_shapes={"observation": {0: th.export.Dim("n_batch")}}
        )
        actions = exported.module()(observations)
    expected, _ = model.predict(observations.numpy(), deterministic=True)
    np.testing.assert_array_equal(actions.detach().clamp(-2, 2).numpy(), expected)
    # Otherwise there would be nothing to export
    assert not np.allclose(statistics_of(model).mean, 0)
