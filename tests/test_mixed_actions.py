"""TRPO on Tuple and Dict actions."""

import copy
import pickle
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from agents import RandomEnv, UpdateLog, assert_identical, collect, copies, make_model, random_vec_env, train
from gymnasium import spaces
from helpers import BOX_ACTIONS, DICT, DICT_ACTIONS, IMAGE, TUPLE_ACTIONS, VECTOR, BetaPolicy
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_trpo_ext import TRPO, MaskableTRPO, RecurrentTRPO
from sb3_trpo_ext.envs import TensorStep, TensorVecEnv
from sb3_trpo_ext.policies import MixedMlpPolicy
from sb3_trpo_ext.update.mixed import MixedActions

each_space = pytest.mark.parametrize("space", [TUPLE_ACTIONS, DICT_ACTIONS], ids=["tuple", "dict"])


class InTuple(gym.Wrapper[Any, Any, Any, Any]):
    """An environment whose actions are the only part of a Tuple."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.action_space = spaces.Tuple([env.action_space])

    def step(self, action: Any) -> Any:
        return self.env.step(action[0])


class Grasp(gym.Env[Any, Any]):
    """Pays for moving to the target, and only with the grip that it asks for."""

    observation_space = spaces.Box(-1.0, 1.0, (3,))

    def __init__(self) -> None:
        self.action_space = copy.deepcopy(DICT_ACTIONS)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.n_steps = 0
        return self.observe(), {}

    def observe(self) -> np.ndarray:
        self.target = self.np_random.uniform(-0.8, 0.8, 2)
        self.grip = self.np_random.integers(2)
        return np.array([*self.target, 2 * self.grip - 1], np.float32)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        distance = np.linalg.norm(action["move"] - self.target)
        reward = float((action["grip"] == self.grip) * max(1 - distance, 0))
        self.n_steps += 1
        return self.observe(), reward, False, self.n_steps == 20, {}


def vec_env(space: spaces.Space, n_envs: int = 2) -> DummyVecEnv:
    return random_vec_env(n_envs, VECTOR, space)


@pytest.mark.parametrize(
    "space",
    [BOX_ACTIONS, spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)],
    ids=["box", "discrete", "multi-discrete", "multi-binary"],
)
@pytest.mark.parametrize("settings", [{}, {"target_kl": "auto", "cg_damping": "auto", "norm_obs": True, "policy_kwargs": {}}])
def test_one_part_alone_trains_like_its_space(space: spaces.Space, settings: dict[str, Any]) -> None:
    """To the last bit, from the start over the clipped likelihood to the budget of KL."""
    plain = make_model(DummyVecEnv([lambda: RandomEnv(VECTOR, space)]), **settings).learn(128)
    mixed = make_model(DummyVecEnv([lambda: InTuple(RandomEnv(VECTOR, space))]), **settings).learn(128)
    assert_identical(mixed.policy.state_dict(), plain.policy.state_dict())
    assert mixed._n_accepted == plain._n_accepted >= 3
    assert mixed._cg_damping() == plain._cg_damping()
    assert mixed._target_kl(128) == plain._target_kl(128)


@each_space
@pytest.mark.parametrize("settings", [{}, {"clipped_likelihood": False}, {"ent_coef": 0.01}], ids=str)
def test_updates_fill_their_region(space: spaces.Space, settings: dict[str, Any]) -> None:
    log = UpdateLog()
    make_model(vec_env(space), n_steps=128, **settings).learn(1024, callback=log)
    assert log.values("train/status_name") == ["accepted"] * 4
    assert all(0.8 * 0.05 < kl <= 0.05 for kl in log.values("train/kl_divergence_loss"))


@each_space
def test_settings_count_the_dimensions_of_all_parts(space: spaces.Space) -> None:
    model = make_model(vec_env(space), target_kl="auto", cg_damping="auto")
    n_dims = 8 if isinstance(space, spaces.Tuple) else 3
    assert model._cg_damping() == pytest.approx(0.2 * n_dims)
    box = make_model(random_vec_env(2, VECTOR, spaces.Box(-1, 1, (n_dims,))), target_kl="auto")
    assert model._target_kl(64) == box._target_kl(64)


def test_noise_starts_within_the_bounds_and_discrete_parts_as_in_sb3() -> None:
    params = make_model(vec_env(TUPLE_ACTIONS), policy_kwargs={}).policy.state_dict()
    # Two numbers from -1 to 1 and one from 0 to 5
    share = (2 / 3) ** 0.5
    np.testing.assert_allclose(params["log_std"].exp(), [share, share, 2.5 * share], rtol=1e-6)
    # Three logits, two means, two logits, a mean, five logits
    np.testing.assert_allclose(params["action_net.bias"], [*[0] * 7, 2.5, *[0] * 5])


@each_space
def test_ratio_is_one_at_the_start(space: spaces.Space) -> None:
    for clipped_likelihood in (True, False):
        model = make_model(vec_env(space), normalize_advantage=False, clipped_likelihood=clipped_likelihood)
        batch = collect(model)._full_batch()
        with th.no_grad():
            log_prob = model.policy.get_distribution(batch.observations).log_prob(batch.actions)
        assert th.allclose(log_prob, batch.old_log_prob, atol=1e-5)
        assert train(model)["train/policy_objective_before"] == pytest.approx(batch.advantages.mean().item(), abs=1e-6)


def test_values_can_wait_until_the_rollout_is_over_or_not() -> None:
    """The same rollout as with SB3's loop."""

    class Eager(TRPO):
        collect_rollouts = OnPolicyAlgorithm.collect_rollouts

    settings: dict[str, Any] = {"n_steps": 32, "batch_size": 16, "norm_obs": False, "norm_reward": False}
    models = [collect(kind("MlpPolicy", vec_env(TUPLE_ACTIONS), **settings, seed=0)) for kind in (TRPO, Eager)]
    ours, theirs = (model.rollout_buffer for model in models)
    assert (ours.actions == theirs.actions).all()
    np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=1e-5)


@each_space
def test_rejected_update_leaves_every_bit(space: spaces.Space) -> None:
    model = collect(make_model(vec_env(space)))
    model.rollout_buffer.advantages[3] = np.nan
    before = copies(model._parts.actor_params)
    with pytest.warns(UserWarning, match="The policy update was rejected: non_finite_objective"):
        train(model)
    assert_identical(copies(model._parts.actor_params), before)


def test_a_policy_by_itself_can_be_pickled_and_loaded(tmp_path: Path) -> None:
    policy = make_model(vec_env(TUPLE_ACTIONS)).policy
    policy.save(str(tmp_path / "policy"))
    observation = policy.observation_space.sample()
    expected = policy.predict(observation, deterministic=True)[0]
    for other in (pickle.loads(pickle.dumps(policy)), MixedMlpPolicy.load(str(tmp_path / "policy"))):
        np.testing.assert_equal(other.predict(observation, deterministic=True)[0], expected)


@each_space
@pytest.mark.parametrize("settings", [{}, {"trust_region": "penalty"}], ids=["constraint", "penalty"])
def test_save_load_continue(space: spaces.Space, settings: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(vec_env(space), **settings).learn(128)
    model.save(tmp_path / "model")
    env = vec_env(space, 3)
    loaded = TRPO.load(tmp_path / "model", env=env)
    for agent in (loaded, TRPO.load(tmp_path / "model")):
        assert_identical(agent.get_parameters(), model.get_parameters())
        observations = np.stack([VECTOR.sample() for _ in range(5)])
        ours, theirs = (each.predict(observations, deterministic=True)[0] for each in (model, agent))
        assert str(ours.tolist()) == str(theirs.tolist())
    assert loaded.env is env
    loaded.learn(128, reset_num_timesteps=False)
    assert loaded._n_updates > model._n_updates
    loaded.set_env(vec_env(space, 3))
    with pytest.raises(ValueError, match="Action spaces do not match"):
        loaded.set_env(vec_env(spaces.Tuple([BOX_ACTIONS]), 3))
    with pytest.raises(ValueError, match="Action spaces do not match"):
        TRPO.load(tmp_path / "model", env=vec_env(spaces.Tuple([BOX_ACTIONS])))
    # The policy by itself
    model.policy.save(str(tmp_path / "policy"))
    alone = type(model.policy).load(str(tmp_path / "policy"), device="cpu")
    assert str(alone.predict(observations, deterministic=True)[0].tolist()) == str(ours.tolist())


@each_space
@pytest.mark.parametrize(
    ("policy", "observations"), [("MlpPolicy", VECTOR), ("CnnPolicy", IMAGE), ("MultiInputPolicy", DICT)], ids=str
)
def test_each_policy_acts_in_the_users_own_environment(policy: str, observations: spaces.Space, space: spaces.Space) -> None:
    env = RandomEnv(observations, space)
    model = make_model(env, policy, policy_kwargs={"net_arch": [8]}).learn(32)
    observation, _ = env.reset(seed=0)
    for deterministic in (True, False):
        # The environment checks that it is an action
        env.step(model.predict(observation, deterministic=deterministic)[0])
    for own in (model.get_env(), RandomEnv(observations, space), random_vec_env(2, observations, space)):
        evaluate_policy(model, own, n_eval_episodes=2, warn=False)  # type: ignore[arg-type]


@each_space
def test_wrappers_and_eval_callback(space: spaces.Space, tmp_path: Path) -> None:
    env, eval_env = (VecNormalize(VecFrameStack(VecMonitor(vec_env(space)), 2)) for _ in range(2))
    eval_env.training = False
    model = make_model(env, norm_obs="auto", norm_reward="auto")
    callback = EvalCallback(eval_env, eval_freq=32, n_eval_episodes=2, log_path=str(tmp_path), verbose=0)
    model.learn(128, callback=callback)
    assert model.env is env
    assert len(callback.evaluations_results) >= 2
    ours, theirs = (each.obs_rms.mean for each in (env, eval_env))  # type: ignore[attr-defined]
    assert (ours == theirs).all()


def test_processes() -> None:
    env = SubprocVecEnv([lambda: RandomEnv(VECTOR, TUPLE_ACTIONS)] * 2, start_method="fork")
    expected = make_model(vec_env(TUPLE_ACTIONS)).learn(64)
    actual = make_model(env).learn(64)
    env.close()
    assert_identical(actual.policy.state_dict(), expected.policy.state_dict())


@each_space
@pytest.mark.parametrize("vectorization_mode", ["sync", "async"])
def test_vector_environment_of_gymnasium(space: spaces.Space, vectorization_mode: str) -> None:
    kind = {"sync": gym.vector.SyncVectorEnv, "async": gym.vector.AsyncVectorEnv}[vectorization_mode]
    env = kind([lambda: RandomEnv(VECTOR, space)] * 2)
    expected = make_model(vec_env(space)).learn(64)
    actual = make_model(env).learn(64)
    env.close()
    assert_identical(actual.policy.state_dict(), expected.policy.state_dict())


def test_learns_a_task_that_needs_both_parts() -> None:
    model = TRPO("MlpPolicy", make_vec_env(Grasp, n_envs=8, seed=0), seed=0, device="cpu").learn(12_000)
    mean, _ = evaluate_policy(model, make_vec_env(Grasp, n_envs=4, seed=1000), n_eval_episodes=40)
    assert isinstance(mean, float)
    # 20 is the most. The best move with a grip by chance gets 10, and so does about the best grip with the move (0, 0)
    assert mean > 12


class Tensors(TensorVecEnv):
    def __init__(self) -> None:
        super().__init__(2, VECTOR, DICT_ACTIONS, "cpu")

    def reset_tensors(self, seed: int | None = None) -> th.Tensor:
        return th.zeros(2, 3)

    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        raise NotImplementedError


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nested": (
        {"space": spaces.Tuple([BOX_ACTIONS, DICT_ACTIONS])},
        r"The action space Tuple.* is not supported: it has Dict.* in it; put the parts of that beside the others",
    ),
    "text": ({"space": spaces.Tuple([spaces.Text(3)])}, r"in Text.*, TRPO supports Box, Discrete, MultiDiscrete, MultiBinary"),
    "integers": ({"space": spaces.Tuple([spaces.Box(0, 9, (2,), np.int64)])}, r"in Box.*, it needs a float dtype"),
    "no number": ({"space": spaces.Tuple([spaces.Box(0, 1, (0,))])}, r"in Box.*, it has no number in it"),
    "no part": ({"space": spaces.Tuple([])}, r"is not supported: it has no part"),
    "gSDE": ({"use_sde": True}, r"\(gSDE\) can only be used with continuous actions"),
    "squashed": ({"policy": "SquashedMlpPolicy"}, r"`policy` must leave the distribution .*, and SquashedMlpPolicy makes a"),
    "own distribution": ({"policy": BetaPolicy}, r"`policy` must leave the distribution .*, and BetaPolicy makes a BetaDist"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_explained(case: str) -> None:
    settings, message = BAD[case]
    env = RandomEnv(VECTOR, settings.pop("space", DICT_ACTIONS))
    with pytest.raises(ValueError, match=message):
        make_model(env, **settings)


def test_gsde_is_refused_when_loading_too(tmp_path: Path) -> None:
    make_model(vec_env(DICT_ACTIONS)).save(tmp_path / "model")
    with pytest.raises(ValueError, match="`use_sde` must be False for Tuple and Dict actions, got True"):
        TRPO.load(tmp_path / "model", use_sde=True)


@pytest.mark.parametrize(
    ("kind", "policy", "message"),
    [
        (RecurrentTRPO, "MlpLstmPolicy", "RecurrentTRPO has no policy for it; use TRPO"),
        (MaskableTRPO, "MlpPolicy", "The algorithm only supports .*: use TRPO"),
    ],
)
def test_other_algorithms_refuse_them(kind: Any, policy: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(policy, RandomEnv(VECTOR, DICT_ACTIONS), device="cpu")


def test_environment_of_tensors_is_refused() -> None:
    with pytest.raises(ValueError, match="an environment of tensors takes one tensor; make it a Box"):
        TRPO("MlpPolicy", Tensors(), device="cpu")


def test_action_space_of_a_model_is_the_vector() -> None:
    model = make_model(vec_env(DICT_ACTIONS))
    assert isinstance(model.action_space, MixedActions)
    assert model.action_space.shape == (3,)
    assert model.action_space == model.env.action_space  # type: ignore[union-attr]
