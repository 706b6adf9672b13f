"""The algorithm as a whole: its step, its bookkeeping, and everything of SB3 that it has to go along with."""

import copy
import itertools
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3.common.save_util as sb3_save_util
import torch as th
from agents import (
    Bandit,
    RandomEnv,
    UpdateLog,
    assert_identical,
    collect,
    copies,
    is_finite,
    log_of,
    make_model,
    random_vec_env,
    train,
)
from gymnasium import spaces
from helpers import BOX_ACTIONS, DICT, IMAGE, VECTOR
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from sb3_trpo_ext import TRPO, trpo
from sb3_trpo_ext.optim import KLConstraint, Problem, UpdateResult
from sb3_trpo_ext.update import critic
from sb3_trpo_ext.update.critic import CriticFit, CriticResult

OBSERVATION_SPACES: dict[str, tuple[str, spaces.Space]] = {
    "vector": ("MlpPolicy", VECTOR),
    "image": ("CnnPolicy", IMAGE),
    "dict": ("MultiInputPolicy", DICT),
    "discrete": ("MlpPolicy", spaces.Discrete(4)),
}
ACTION_SPACES: dict[str, spaces.Space] = {
    "box": BOX_ACTIONS,
    "discrete": spaces.Discrete(3),
    "multi-discrete": spaces.MultiDiscrete([3, 2]),
    "multi-binary": spaces.MultiBinary(3),
}
SPACES = [
    pytest.param(policy, observation_space, action_space, {}, id=f"{observation_name}-{action_name}")
    for (observation_name, (policy, observation_space)), (action_name, action_space) in itertools.product(
        OBSERVATION_SPACES.items(), ACTION_SPACES.items()
    )
]
KINDS_OF_GAUSSIANS = [
    pytest.param(policy, observation_space, BOX_ACTIONS, kwargs, id=f"{observation_name}-{kind}")
    for observation_name, (policy, observation_space) in OBSERVATION_SPACES.items()
    for kind, policy, kwargs in (
        ("squashed", "Squashed" + policy, {}),
        ("gSDE", policy, {"use_sde": True, "sde_sample_freq": 4}),
        ("squashed gSDE", policy, {"use_sde": True, "policy_kwargs": {"squash_output": True, "net_arch": [8]}}),
    )
]
PENALTIES = [
    pytest.param("MlpPolicy", VECTOR, action_space, {"trust_region": "penalty"}, id=f"penalty-{name}")
    for name, action_space in ACTION_SPACES.items()
]
MORE = [
    pytest.param("MlpPolicy", spaces.MultiDiscrete([3, 2]), BOX_ACTIONS, {}, id="multi-discrete observations"),
    pytest.param("MlpPolicy", spaces.MultiBinary(3), BOX_ACTIONS, {}, id="multi-binary observations"),
    pytest.param("MlpPolicy", VECTOR, spaces.Box(-1.0, 1.0, (2, 2)), {}, id="actions of two axes"),
    pytest.param("SquashedMultiInputPolicy", DICT, BOX_ACTIONS, {"trust_region": "penalty"}, id="penalty-squashed-dict"),
]


@pytest.mark.parametrize(
    ("policy", "observation_space", "action_space", "kwargs"), SPACES + KINDS_OF_GAUSSIANS + PENALTIES + MORE
)
def test_every_space_and_distribution(
    policy: str, observation_space: spaces.Space, action_space: spaces.Space, kwargs: dict[str, Any], tmp_path: Path
) -> None:
    """Both parts are trained, within the trust region; actions are valid; a saved model acts as before."""
    model = make_model(random_vec_env(2, observation_space, action_space), policy, ent_coef=0.01, **kwargs)
    actor, critic = copies(model._parts.actor_params), copies(model._parts.critic_params)
    log = UpdateLog()
    # RandomEnv refuses an action outside its space
    model.learn(128, callback=log)
    assert log.values("train/status_name") == ["accepted", "accepted"]
    assert log.values("train/value_status_name") == ["fitted", "fitted"]
    if model.kl_penalty is None:
        assert all(0 < kl <= 0.05 for kl in log.values("train/kl_divergence_loss"))
    # Not each actor parameter is moved: what follows a ReLU unit that none of these observations switches on is not
    assert any(not th.equal(old, new) for old, new in zip(actor, model._parts.actor_params, strict=True))
    assert any(not th.equal(old, new) for old, new in zip(critic, model._parts.critic_params, strict=True))
    assert is_finite(model.policy.parameters())

    model.save(tmp_path / "model")
    loaded = TRPO.load(tmp_path / "model", device="cpu")
    for _ in range(5):
        observation = model.observation_space.sample()
        action, _ = model.predict(observation, deterministic=True)
        assert action_space.contains(action if action.shape else int(action))
        np.testing.assert_array_equal(action, loaded.predict(observation, deterministic=True)[0])


# --- The step ---------------------------------------------------------------------------------------------------------


def joint_kl(old: th.distributions.Distribution, new: th.distributions.Distribution) -> float:
    """Mean KL(old || new) by PyTorch's formulas, summed over action dimensions."""
    return float(th.distributions.kl_divergence(old, new).sum(dim=1).mean())


def normal_of(model: TRPO) -> th.distributions.Normal:
    """The Gaussian of a policy on all observations of its rollout."""
    observations = th.as_tensor(model.rollout_buffer.observations.reshape(-1, *VECTOR.shape))
    with th.no_grad():
        inner = model.policy.get_distribution(observations).distribution
    assert isinstance(inner, th.distributions.Normal)
    return th.distributions.Normal(inner.loc.double(), inner.scale.double())


@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize("sub_sampling_factor", [1, 4])
def test_logged_kl_is_that_of_the_whole_rollout(sub_sampling_factor: int, is_flat: bool) -> None:
    """Also where a callback has flattened the buffer, which its `get` does."""
    model = collect(make_model(random_vec_env(2), sub_sampling_factor=sub_sampling_factor))
    if is_flat:
        next(model.rollout_buffer.get())
    old = normal_of(model)
    log = train(model)
    assert log["train/status_name"] == "accepted"
    assert log["train/kl_divergence_loss"] == pytest.approx(joint_kl(old, normal_of(model)), rel=1e-4)


def test_sub_sampling_thins_the_fisher_matrix_alone() -> None:
    full = collect(make_model())
    logs = []
    for factor in (1, 4):
        model = make_model(sub_sampling_factor=factor)
        model.rollout_buffer = copy.deepcopy(full.rollout_buffer)
        logs.append(train(model))
    for key in ("train/policy_objective_before", "train/grad_norm"):
        assert logs[0][key] == logs[1][key]
    assert logs[0]["train/curvature"] != logs[1]["train/curvature"]
    # The KL is measured on all samples, and filled by the line search, however rough the direction
    for log in logs:
        assert 0.95 * 0.05 <= log["train/kl_divergence_loss"] <= 0.05


def test_kl_stays_within_the_trust_region_and_fills_it() -> None:
    log = UpdateLog()
    env = make_vec_env("Pendulum-v1", n_envs=4, seed=0)
    make_model(env, n_steps=128, batch_size=128, gamma=0.9, policy_kwargs={}).learn(20 * 512, callback=log)
    kls = np.array(log.values("train/kl_divergence_loss"))
    accepted = np.array(log.values("train/is_line_search_success"))
    assert len(kls) == 20
    assert (kls <= 0.05).all()
    # The exceptions are updates whose objective peaks inside the trust region. Seeds 0 to 4: 20 of 20 updates are full
    assert (kls >= 0.9 * 0.05).sum() >= 16
    np.testing.assert_array_equal(kls > 0, accepted)


@pytest.mark.parametrize(
    ("policy", "observation_space", "action_space", "kwargs"),
    [*SPACES[: len(ACTION_SPACES)], *KINDS_OF_GAUSSIANS[:3], *PENALTIES],
)
def test_ratio_is_one_at_the_start_for_every_distribution(
    policy: str, observation_space: spaces.Space, action_space: spaces.Space, kwargs: dict[str, Any]
) -> None:
    # Without normalization, so that the objective at ratio 1 is not just zero
    model = make_model(random_vec_env(2, observation_space, action_space), policy, normalize_advantage=False, **kwargs)
    for _ in range(2):
        log = train(collect(model))
        assert log["train/status_name"] == "accepted"
        assert log["train/policy_objective_before"] == pytest.approx(model.rollout_buffer.advantages.mean(), rel=1e-4)


def test_improvement_is_what_the_objective_gained() -> None:
    log = train(collect(make_model()))
    gain = log["train/policy_objective"] - log["train/policy_objective_before"]
    assert log["train/improvement"] == pytest.approx(gain)
    assert gain > 0
    # To first order; the step is short enough for that to be the larger part
    assert log["train/predicted_improvement"] == pytest.approx(gain, rel=0.5)


def test_normalized_advantages_have_mean_zero_and_std_one() -> None:
    model = collect(make_model(random_vec_env(2)))
    advantages = model._full_batch().advantages
    assert advantages.mean().item() == pytest.approx(0, abs=1e-6)
    assert advantages.std().item() == pytest.approx(1, rel=1e-5)


def test_clipped_advantages_are_normalized_again() -> None:
    model = collect(make_model(random_vec_env(2), clip_advantage=0.5))
    raw = model.rollout_buffer.advantages.swapaxes(0, 1).flatten().astype(np.float64)
    clipped = np.clip((raw - raw.mean()) / raw.std(ddof=1), -0.5, 0.5)
    assert np.ptp(clipped) == 1
    expected = (clipped - clipped.mean()) / clipped.std(ddof=1)
    np.testing.assert_allclose(model._full_batch().advantages, expected, atol=1e-5)


def test_far_limit_of_the_advantages_changes_nothing() -> None:
    plain = collect(make_model())._full_batch().advantages
    far = collect(make_model(clip_advantage=100))._full_batch().advantages
    th.testing.assert_close(far, plain, rtol=0, atol=1e-5)


def test_batch_is_in_the_order_of_time() -> None:
    model = collect(make_model(random_vec_env(2)))
    observations, actions = model.rollout_buffer.observations, model.rollout_buffer.actions
    batch = model._full_batch()
    # One environment after the other
    np.testing.assert_array_equal(batch.observations, np.concatenate([observations[:, 0], observations[:, 1]]))
    np.testing.assert_array_equal(batch.actions, np.concatenate([actions[:, 0], actions[:, 1]]))


def test_line_search_starts_where_the_last_ones_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    starts, ends = [], []

    class Recorded(KLConstraint):
        def update(self, problem: Problem, target_kl: float) -> UpdateResult:
            starts.append(self.first_trial)
            result = super().update(problem, target_kl)
            ends.append(result.step_share)
            return result

    monkeypatch.setattr(trpo, "KLConstraint", Recorded)
    make_model().learn(96)
    assert all(end > 0 for end in ends)
    expected = [1.0, ends[0] ** 0.5, (ends[0] ** 0.5 * ends[1]) ** 0.5]
    np.testing.assert_allclose(starts, expected, rtol=1e-12)
    assert starts[1] != 1
    # Backtracking that does not fill the region has its own start
    starts.clear()
    make_model(trust_region_kwargs={"fill": False}).learn(64)
    assert starts == [1.0, 1.0]


def test_options_of_the_value_function_reach_its_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = []

    def fit_critic(*args: Any) -> CriticResult:
        fits.append(args[4])
        return critic.fit_critic(*args)

    monkeypatch.setattr(trpo, "fit_critic", fit_critic)
    make_model().learn(32)
    make_model(vf_loss="huber", clip_range_vf=lambda progress: 0.1 + progress, max_grad_norm=0.5).learn(64)
    make_model(max_grad_norm=0.0).learn(32)
    assert fits == [
        CriticFit(2, 16, "mse", None, None),
        CriticFit(2, 16, "huber", 0.6, 0.5),
        CriticFit(2, 16, "huber", 0.1, 0.5),
        CriticFit(2, 16, "mse", None, None),
    ]


# --- Schedules ---------------------------------------------------------------------------------------------------------


def test_schedules_of_trust_region_and_damping_take_effect() -> None:
    log = UpdateLog()
    model = make_model(target_kl=lambda progress: 0.08 * progress, cg_damping=lambda progress: 0.1 + progress)
    model.learn(128, callback=log)
    np.testing.assert_allclose(log.values("train/target_kl"), [0.06, 0.04, 0.02, 0.0])
    np.testing.assert_allclose([update["train/cg_damping"] for update in log.updates[:3]], [0.85, 0.6, 0.35])
    for kl, target_kl in zip(log.values("train/kl_divergence_loss")[:3], [0.06, 0.04, 0.02], strict=True):
        assert 0.9 * target_kl <= kl <= target_kl


def test_schedule_that_decays_to_zero_ends_in_updates_of_the_critic_alone(recwarn: pytest.WarningsRecorder) -> None:
    # The last rollout ends after step 100, where a linear schedule would be negative
    log = UpdateLog()
    model = make_model(target_kl=lambda progress: 0.05 * progress, learning_rate=lambda progress: 0.01 * progress)
    model.learn(100, callback=log)
    assert log.values("train/status_name") == ["accepted"] * 3 + ["zero_target_kl"]
    assert log.values("train/kl_divergence_loss")[-1] == 0
    assert log.values("train/value_status_name")[-1] == "fitted"
    assert model.policy.optimizer.param_groups[0]["lr"] == 0
    assert not recwarn.list


def test_zero_target_kl_leaves_the_policy_alone() -> None:
    model = collect(make_model(target_kl=lambda progress: 0.05 if progress == 1 else 0.0))
    model._current_progress_remaining = 0.5
    before = copies(model._parts.actor_params)
    assert train(model)["train/status_name"] == "zero_target_kl"
    assert_identical(copies(model._parts.actor_params), before)


def test_schedule_of_the_entropy_coefficient_takes_effect() -> None:
    log = UpdateLog()
    # All observations are the same, so that the entropy after one update is the entropy at the start of the next
    env = Bandit(spaces.Discrete(4))
    make_model(env, ent_coef=lambda progress: 0.4 * progress).learn(128, callback=log)
    bonuses = log.values("train/policy_objective_before")
    entropies = [np.log(4), *log.values("train/entropy")]
    # The mean of the normalized advantages is zero, so that only the bonus is left; the policy starts nearly uniform
    np.testing.assert_allclose(bonuses[0], 0.3 * entropies[0], rtol=1e-3)
    np.testing.assert_allclose(bonuses[1:], [0.2 * entropies[1], 0.1 * entropies[2], 0.0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["target_kl", "cg_damping", "ent_coef"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, "0.1"])
def test_schedule_that_returns_no_number_stops_before_anything_moves(name: str, bad: Any) -> None:
    kwargs: dict[str, Any] = {name: lambda progress: 0.01 if progress == 1 else bad}
    model = make_model(**kwargs)
    before = copies(model.policy.parameters())
    with pytest.raises(ValueError, match=f"`{name}` .* its schedule returned {bad!r} at progress_remaining=0.5"):
        model.learn(64)
    assert_identical(copies(model.policy.parameters()), before)


# --- The entropy bonus --------------------------------------------------------------------------------------------------


#: Entropy of a Gaussian with a std of 0.1 in both dimensions.
NARROW = 2 * (np.log(0.1) + 0.5 * np.log(2 * np.pi * np.e))
#: For each bandit: arguments, ent_coef, and the entropy of the policy that is best with that bonus.
BANDITS: dict[str, tuple[spaces.Space, dict[str, Any], float, float]] = {
    # Rewards 0 to 3 and a weight of 1: the best policy is softmax([0, 1, 2, 3])
    "discrete": (spaces.Discrete(4), {}, 1.0, 0.9475),
    "penalty": (
        spaces.Discrete(4),
        {"trust_region": "penalty", "trust_region_kwargs": {"learning_rate": 0.01, "batch_size": 256}},
        1.0,
        0.9475,
    ),
    # Reward -|a|^2 and a weight of 0.02: a std of 0.1, where -std^2 + 0.02 log(std) is largest
    "box": (BOX_ACTIONS, {}, 0.02, NARROW),
    # So near the middle, the tanh makes no difference
    "squashed": (BOX_ACTIONS, {"policy": "SquashedMlpPolicy"}, 0.02, NARROW),
}


@pytest.mark.parametrize(("action_space", "kwargs", "ent_coef", "expected"), BANDITS.values(), ids=list(BANDITS))
def test_entropy_settles_where_the_bonus_balances_the_reward(
    action_space: spaces.Space, kwargs: dict[str, Any], ent_coef: float, expected: float
) -> None:
    settings: dict[str, Any] = {"n_steps": 16, "batch_size": 256, "learning_rate": 0.01, **kwargs}
    settings["policy_kwargs"] = {"net_arch": [8], "log_std_init": -1.5} if action_space is BOX_ACTIONS else {"net_arch": [8]}
    entropies = []
    for weight in (ent_coef, 0.0):
        env = DummyVecEnv([lambda: Bandit(action_space)] * 16)
        # Advantages as they are: normalized ones would have no scale that a bonus could balance. The trust region shrinks, so
        # that the policy settles
        model = make_model(
            env, normalize_advantage=False, target_kl=lambda progress: 0.08 * progress, ent_coef=weight, **settings
        )
        entropies.append(log_of(model.learn(30 * 256))["train/entropy"])
    # Seeds 0 to 3: within 0.10 of what is expected with the bonus, and below it by 0.91 or more without
    assert entropies[0] == pytest.approx(expected, abs=0.25)
    assert entropies[1] < expected - 0.7


# --- What moves when -----------------------------------------------------------------------------------------------------


class SharedEmbedding(BaseFeaturesExtractor):
    """Features for actor and critic, in a layer whose name has "value" in it."""

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space, 6)
        self.value_embedding = nn.Linear(3, 6)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return th.tanh(self.value_embedding(observations))


def test_fit_of_the_critic_leaves_shared_layers_alone() -> None:
    policy_kwargs = {"net_arch": [8], "features_extractor_class": SharedEmbedding, "share_features_extractor": True}
    rollout = collect(make_model(policy_kwargs=policy_kwargs)).rollout_buffer
    embeddings = []
    for n_critic_updates in (0, 5):
        model = make_model(policy_kwargs=policy_kwargs, n_critic_updates=n_critic_updates)
        model.rollout_buffer = copy.deepcopy(rollout)
        policy: Any = model.policy
        assert policy.vf_features_extractor is policy.pi_features_extractor
        embedding = policy.features_extractor.value_embedding.weight
        before = embedding.detach().clone()
        assert train(model)["train/status_name"] == "accepted"
        assert not th.equal(embedding, before)
        embeddings.append(embedding.detach())
    assert_identical(embeddings[1], embeddings[0])


class NoisyFeatures(FlattenExtractor):
    """Features that come out differently in training mode.

    :param layer: ``dropout`` or ``batch norm``
    """

    def __init__(self, observation_space: spaces.Space, layer: str) -> None:
        super().__init__(observation_space)
        self.layer = nn.Dropout(0.5) if layer == "dropout" else nn.BatchNorm1d(3)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layer(super().forward(observations))


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("layer", ["dropout", "batch norm"])
@pytest.mark.parametrize("kwargs", [{}, {"trust_region": "penalty"}], ids=["constraint", "penalty"])
def test_ratio_is_one_at_the_start_whatever_training_mode_does(layer: str, shared: bool, kwargs: dict[str, Any]) -> None:
    policy_kwargs = {
        "net_arch": [8],
        "features_extractor_class": NoisyFeatures,
        "features_extractor_kwargs": {"layer": layer},
        "share_features_extractor": shared,
    }
    # Without normalization, so that the objective at ratio 1 is not just zero
    model = make_model(policy_kwargs=policy_kwargs, normalize_advantage=False, **kwargs)
    policy: Any = model.policy
    actor_layer, critic_layer = policy.pi_features_extractor.layer, policy.vf_features_extractor.layer
    for _ in range(3):
        collect(model)
        # As a callback or the user may have left it
        policy.set_training_mode(True)
        actor_buffers, critic_buffers = copies(actor_layer.buffers()), copies(critic_layer.buffers())
        log = train(model)
        assert log["train/status_name"] == "accepted"
        assert log["train/policy_objective_before"] == pytest.approx(model.rollout_buffer.advantages.mean(), rel=1e-5)
        assert_identical(copies(actor_layer.buffers()), actor_buffers)
        assert not any(module.training for module in policy.modules())
        if layer == "batch norm" and not shared:
            assert not th.equal(critic_layer.running_mean, critic_buffers[0])


# --- Bookkeeping ---------------------------------------------------------------------------------------------------------

TRAIN_KEYS = {
    "entropy", "explained_variance", "grad_norm", "improvement", "is_line_search_success", "kl_divergence_loss",
    "learning_rate", "n_accepted", "n_updates", "policy_objective", "policy_objective_before", "predicted_improvement",
    "status", "status_name", "step_size", "target_kl", "value_loss", "value_status", "value_status_name",
}  # fmt: skip
CONSTRAINT_KEYS = {"cg_damping", "cg_residual", "cg_steps", "curvature", "line_search_trials"}


@pytest.mark.parametrize(
    ("kwargs", "keys"),
    [({}, CONSTRAINT_KEYS | {"std"}), ({"trust_region": "penalty"}, {"beta", "std"})],
    ids=["constraint", "penalty"],
)
def test_everything_is_logged(kwargs: dict[str, Any], keys: set[str]) -> None:
    log = train(collect(make_model(**kwargs)))
    assert {key for key in log if not key.startswith("time/")} == {f"train/{key}" for key in TRAIN_KEYS | keys}
    assert {key for key in log if key.startswith("time/")} == {"time/policy_update", "time/critic_update"}
    numbers = {key: value for key, value in log.items() if not isinstance(value, str)}
    assert all(np.isfinite(value) for value in numbers.values()), numbers


def test_std_is_logged_for_gaussians_alone() -> None:
    log = train(collect(make_model(policy_kwargs={"net_arch": [8], "log_std_init": -1.0}, target_kl=1e-6)))
    assert log["train/std"] == pytest.approx(np.exp(-1), rel=0.01)
    assert "train/std" not in train(collect(make_model(RandomEnv(VECTOR, spaces.Discrete(2)))))


def test_updates_are_counted() -> None:
    model = make_model(target_kl=lambda progress: 0.05 if progress > 0.5 else 0.0)
    model.learn(128)
    assert (model._n_updates, model._n_accepted) == (4, 1)
    log = log_of(model)
    assert (log["train/n_updates"], log["train/n_accepted"]) == (4, 1)


def parameters_after(seed: int, **kwargs: Any) -> dict[str, Any]:
    return make_model(seed=seed, **kwargs).learn(96).get_parameters()


@pytest.mark.parametrize("kwargs", [{}, {"trust_region": "penalty"}, {"use_sde": True}], ids=["constraint", "penalty", "gSDE"])
def test_seed_decides_everything(kwargs: dict[str, Any]) -> None:
    first, again, other = (parameters_after(seed, **kwargs) for seed in (1, 1, 2))
    assert_identical(again, first)
    assert not th.equal(other["policy"]["action_net.weight"], first["policy"]["action_net.weight"])


# --- Saving and loading ----------------------------------------------------------------------------------------------------

SAVED = {
    "constraint": {"target_kl": lambda progress: 0.05 * (1 + progress)},
    "penalty": {"trust_region": "penalty", "trust_region_kwargs": {"beta": 3.0}},
    # Where the number of updates seeds the noise that the entropy is estimated with
    "squashed": {"policy": "SquashedMlpPolicy", "ent_coef": 0.1},
    "gSDE": {"use_sde": True},
}


@pytest.mark.parametrize("kwargs", SAVED.values(), ids=list(SAVED))
@pytest.mark.parametrize("in_memory", [False, True], ids=["path", "file object"])
def test_training_goes_on_as_if_it_had_not_been_saved(kwargs: dict[str, Any], in_memory: bool, tmp_path: Path) -> None:
    model = make_model(learning_rate=0.01, **kwargs).learn(96)
    collect(model, total_timesteps=64)
    # Half of the way, for the schedules
    model._current_progress_remaining = 0.5
    if in_memory:
        with open(tmp_path / "model.zip", "wb") as file:
            model.save(file)
        with open(tmp_path / "model.zip", "rb") as file:
            loaded = TRPO.load(file, device="cpu")
    else:
        model.save(tmp_path / "model")
        loaded = TRPO.load(tmp_path / "model", device="cpu")
    loaded.rollout_buffer = copy.deepcopy(model.rollout_buffer)

    logs = []
    for trained in (model, loaded):
        # The minibatches of the critic are drawn from the global generator, which a model does not hold
        set_random_seed(5)
        log = train(trained)
        logs.append({key: value for key, value in log.items() if not key.startswith("time/")})
    assert logs[0]["train/n_updates"] == 4
    np.testing.assert_equal(logs[1], logs[0])
    assert_identical(loaded.get_parameters(), model.get_parameters())
    assert (loaded._n_updates, loaded._n_accepted) == (model._n_updates, model._n_accepted)


@pytest.mark.parametrize("kwargs", SAVED.values(), ids=list(SAVED))
def test_parameters_can_be_carried_from_one_model_to_another(kwargs: dict[str, Any]) -> None:
    source, target = make_model(seed=0, **kwargs).learn(32), make_model(seed=1, **kwargs)
    parameters: dict[str, Any] = copy.deepcopy(source.get_parameters())
    with pytest.raises(AssertionError):
        assert_identical(target.get_parameters(), parameters)
    target.set_parameters(parameters)
    assert_identical(target.get_parameters(), parameters)
    # The optimizer still knows its parameters
    before = copies(target._parts.critic_params)
    target.learn(32)
    assert all(not th.equal(old, new) for old, new in zip(before, target._parts.critic_params, strict=True))


def test_parameters_must_be_complete_if_an_exact_match_is_asked_for() -> None:
    model = make_model()
    parameters: dict[str, Any] = model.get_parameters()
    del parameters["policy.optimizer"]
    with pytest.raises(ValueError, match=r"policy\.optimizer"):
        model.set_parameters(parameters)
    model.set_parameters(parameters, exact_match=False)


@pytest.mark.parametrize(("before", "after"), [("constraint", "penalty"), ("penalty", "constraint")])
def test_form_of_the_trust_region_can_be_changed_when_loading(before: str, after: str, tmp_path: Path) -> None:
    model = make_model(trust_region=before).learn(64)
    model.save(tmp_path / "model")
    loaded = TRPO.load(tmp_path / "model", env=RandomEnv(), device="cpu", trust_region=after)
    assert_identical(loaded.policy.state_dict(), model.policy.state_dict())
    loaded.learn(32)
    assert log_of(loaded)["train/status_name"] == "accepted"
    assert ("train/beta" in log_of(loaded)) == (after == "penalty")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left on device")])
def test_interrupted_save_keeps_the_old_file(error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    model.save(tmp_path / "model")
    before = (tmp_path / "model.zip").read_bytes()
    model.learn(32)
    saved: list[Any] = []

    def save(parameters: Any, file: Any) -> None:
        if saved:
            raise error
        saved.append(file)
        th.save(parameters, file)

    with monkeypatch.context() as patch:
        patch.setattr(sb3_save_util, "th", type("Torch", (), {"save": staticmethod(save)}))
        with pytest.raises(type(error) if isinstance(error, Exception) else error):
            model.save(tmp_path / "model")
    assert saved, "the interruption came before anything was written"
    assert [path.name for path in tmp_path.iterdir()] == ["model.zip"]
    assert (tmp_path / "model.zip").read_bytes() == before
    model.save(tmp_path / "model")
    assert_identical(TRPO.load(tmp_path / "model", device="cpu").policy.state_dict(), model.policy.state_dict())


@pytest.mark.parametrize(("given", "expected"), [("model", "model.zip"), ("model.zip", "model.zip"), ("v0.1", "v0.1")])
@pytest.mark.parametrize("as_path", [False, True], ids=["str", "Path"])
def test_file_is_named_as_sb3_names_it(given: str, expected: str, as_path: bool, tmp_path: Path) -> None:
    path = tmp_path / "folder" / given
    with pytest.warns(UserWarning, match="does not exist. Will create it"):
        make_model().save(path if as_path else str(path))
    assert [file.name for file in (tmp_path / "folder").iterdir()] == [expected]
    TRPO.load(path if as_path else str(path), device="cpu")


# --- The rest of SB3 ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:rich is experimental")
def test_callbacks_and_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = EvalCallback(
        Monitor(RandomEnv()), n_eval_episodes=2, eval_freq=32, best_model_save_path=str(tmp_path), verbose=0
    )
    checkpoints = CheckpointCallback(32, str(tmp_path), name_prefix="step")
    make_model().learn(96, callback=[evaluation, checkpoints], progress_bar=True)
    assert "96/96" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {
        "best_model.zip", "step_32_steps.zip", "step_64_steps.zip", "step_96_steps.zip",
    }  # fmt: skip
    assert TRPO.load(tmp_path / "step_64_steps", device="cpu")._n_updates == 1
    # Monitored episodes have been played, by a policy that can be loaded
    assert np.isfinite(evaluation.best_mean_reward)
    TRPO.load(tmp_path / "best_model", device="cpu")


def test_callback_can_end_the_training() -> None:
    model = make_model()
    model.learn(1000, callback=StopTrainingOnMaxEpisodes(4))
    assert model.num_timesteps == 40
    # The second rollout was not completed
    assert model._n_updates == 1


def test_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    make_model(tensorboard_log=str(tmp_path)).learn(96)
    events = accumulator.EventAccumulator(str(tmp_path / "TRPO_1"))
    events.Reload()
    tags = events.Tags()
    expected = {f"train/{key}" for key in TRAIN_KEYS | CONSTRAINT_KEYS | {"std"}}
    assert expected - set(tags["scalars"]) == {"train/n_updates", "train/status_name", "train/value_status_name"}
    assert not tags["tensors"], "text"
    assert [event.step for event in events.Scalars("train/kl_divergence_loss")] == [64, 96]


def test_normalized_environment(tmp_path: Path) -> None:
    env = VecNormalize(random_vec_env(2))
    model = make_model(env).learn(128)
    assert log_of(model)["train/status_name"] == "accepted"
    # The rollout holds normalized observations
    assert model.rollout_buffer.observations.std() == pytest.approx(1, abs=0.2)
    model.save(tmp_path / "model")
    env.save(str(tmp_path / "statistics"))
    fresh = VecNormalize.load(str(tmp_path / "statistics"), random_vec_env(2))
    loaded = TRPO.load(tmp_path / "model", env=fresh, device="cpu").learn(64)
    assert log_of(loaded)["train/status_name"] == "accepted"
    assert loaded.get_vec_normalize_env() is fresh


def test_training_goes_on_with_another_environment() -> None:
    model = make_model(random_vec_env(1)).learn(32)
    model.set_env(random_vec_env(1))
    model.learn(32, reset_num_timesteps=False)
    assert (model.num_timesteps, model._n_updates) == (64, 2)


class Double(gym.Wrapper[Any, Any, Any, Any]):
    """Claims that its observations, which are float32, are float64."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.observation_space = spaces.Box(-2.0, 2.0, (3,), np.float64)

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(**kwargs)
        return observation.astype(np.float64), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, *rest = self.env.step(action)
        return observation.astype(np.float64), *rest


def test_observations_in_double_precision_make_no_difference() -> None:
    models = [make_model(DummyVecEnv([make_env])).learn(96) for make_env in (RandomEnv, lambda: Double(RandomEnv()))]
    assert models[1].rollout_buffer.observations.dtype == np.float64
    batch = models[1]._full_batch()
    assert isinstance(batch.observations, th.Tensor) and batch.observations.dtype == th.float32
    assert_identical(models[1].policy.state_dict(), models[0].policy.state_dict())


@pytest.mark.parametrize("trust_region", ["constraint", "penalty"])
def test_no_gradients_are_left_behind(trust_region: str) -> None:
    model = make_model(trust_region=trust_region).learn(32)
    assert all(param.grad is None for param in model.policy.parameters())


def test_one_sample_is_enough_without_normalization() -> None:
    model = make_model(n_steps=1, normalize_advantage=False).learn(3)
    assert model._n_updates == 3
    assert is_finite(model.policy.parameters())


@pytest.mark.parametrize("observation_space", [VECTOR, DICT], ids=["vector", "dict"])
def test_an_update_leaves_the_rollout_as_it_was(observation_space: spaces.Space) -> None:
    """It works on the buffer's own memory."""
    model = make_model(RandomEnv(observation_space), "MultiInputPolicy" if observation_space is DICT else "MlpPolicy")
    collect(model)
    batch = model._full_batch()
    before = copy.deepcopy(model.rollout_buffer)
    assert batch.actions.data_ptr() == model.rollout_buffer.actions.ctypes.data
    model.train()
    for name in ("actions", "values", "log_probs", "advantages", "returns"):
        assert np.array_equal(getattr(model.rollout_buffer, name), getattr(before, name)), name
    observations, expected = model.rollout_buffer.observations, before.observations
    if isinstance(expected, dict):
        assert all(np.array_equal(observations[key], expected[key]) for key in expected)
    else:
        assert np.array_equal(observations, expected)


@pytest.mark.parametrize("n_steps", [8, 31])
def test_a_rollout_buffer_that_is_not_full_is_refused(n_steps: int) -> None:
    model = make_model()
    model.n_steps = n_steps
    before = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
    with pytest.raises(ValueError, match=rf"has {n_steps} of 32 steps.*model._setup_model\(\)"):
        model.learn(64)
    assert all(th.equal(tensor, before[name]) for name, tensor in model.policy.state_dict().items())
    model._setup_model()
    model.batch_size = n_steps
    model.learn(64)
    assert model._n_updates == -(-64 // n_steps)
