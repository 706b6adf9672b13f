"""What goes wrong: numbers that are none, operators that are not positive, interruptions, and arguments that make no sense."""

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from agents import (
    RandomEnv,
    UpdateLog,
    assert_identical,
    collect,
    copies,
    is_finite,
    log_of,
    make_model,
    train,
)
from gymnasium import spaces
from helpers import BOX_ACTIONS, DICT, VECTOR, Dense
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.optim import LinearOperator
from sb3_trpo_ext.update.surrogate import Surrogate

# NumPy and SB3 compute with the same bad numbers, for the log
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

FORMS = pytest.mark.parametrize("trust_region", ["constraint", "penalty"])
NAN, INF = float("nan"), float("inf")


def assert_sound(model: TRPO, folder: Path) -> None:
    """No NaN has got into anything that stays, and the model can be saved, loaded and trained."""
    assert is_finite(model.policy.state_dict().values())
    for state in model.policy.optimizer.state.values():
        assert is_finite(state.values())
    model.save(folder / "model")
    loaded = TRPO.load(folder / "model", device="cpu")
    assert_identical(loaded.get_parameters(), model.get_parameters())
    loaded.set_env(RandomEnv(model.observation_space, model.action_space))
    log = UpdateLog()
    loaded.learn(2 * loaded.n_steps, callback=log)
    assert log.values("train/status_name") == ["accepted"] * 2
    assert all(kl > 0 for kl in log.values("train/kl_divergence_loss"))
    assert log.values("train/value_status_name") == ["fitted"] * 2


# --- Bad numbers in the rollout ----------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("normalize_advantage", [True, False])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_bad_advantage_rejects_the_policy_update(
    bad: float, normalize_advantage: bool, trust_region: str, tmp_path: Path
) -> None:
    model = collect(make_model(normalize_advantage=normalize_advantage, trust_region=trust_region))
    model.rollout_buffer.advantages[3] = bad
    before = copies(model._parts.actor_params)
    with pytest.warns(UserWarning, match="The policy update was rejected: non_finite_objective") as caught:
        log = train(model)
    assert len(caught) == 1
    assert log["train/status_name"] == "non_finite_objective"
    assert (log["train/kl_divergence_loss"], log["train/step_size"], log["train/n_accepted"]) == (0, 0, 0)
    # The returns are in order
    assert log["train/value_status_name"] == "fitted"
    assert_identical(copies(model._parts.actor_params), before)
    assert_sound(model, tmp_path)


@FORMS
@pytest.mark.parametrize("bad", [NAN, INF])
def test_bad_observation_in_the_rollout_changes_nothing(bad: float, trust_region: str, tmp_path: Path) -> None:
    model = make_model(trust_region=trust_region).learn(32)
    collect(model)
    model.rollout_buffer.observations[3] = bad
    before = copy.deepcopy(model.get_parameters())
    with pytest.warns(UserWarning) as caught:
        log = train(model)
    assert log["train/status_name"].startswith("non_finite")
    assert log["train/value_status_name"] == "non_finite_fit"
    assert len(caught) == 2
    after = model.get_parameters()
    if trust_region == "penalty":
        del before["kl_penalty"]["beta"], after["kl_penalty"]["beta"]
    assert_identical(after, before)
    assert_sound(model, tmp_path)


@pytest.mark.filterwarnings("ignore:The policy update was rejected")
def test_bad_observation_spoils_no_running_statistics_of_the_critic() -> None:
    class Normalized(th.nn.Sequential):
        features_dim = 3

        def __init__(self, _: spaces.Space) -> None:
            super().__init__(th.nn.Flatten(), th.nn.BatchNorm1d(3))

    policy_kwargs = {"features_extractor_class": Normalized, "share_features_extractor": False, "net_arch": [8]}
    model = make_model(policy_kwargs=policy_kwargs).learn(32)
    collect(model)
    model.rollout_buffer.observations[3] = INF
    before = copy.deepcopy(model.policy.state_dict())
    with pytest.warns(UserWarning, match="The value function was not fitted"):
        train(model)
    assert_identical(model.policy.state_dict(), before)


@FORMS
@pytest.mark.filterwarnings("ignore:The policy update was rejected", "ignore:The value function was not fitted")
def test_huge_observations_do_no_harm(trust_region: str, tmp_path: Path) -> None:
    # Finite in float32, but their squares are not
    model = collect(make_model(trust_region=trust_region))
    model.rollout_buffer.observations *= 1e30
    log = train(model)
    assert log["train/status_name"] == "accepted" or log["train/kl_divergence_loss"] == 0
    assert_sound(model, tmp_path)


@FORMS
@pytest.mark.parametrize(
    # Normalization takes the scale out of the policy update, but not out of the fit of the critic
    ("normalize_advantage", "status"),
    [(True, "accepted"), (False, "non_finite_gradient")],
)
@pytest.mark.filterwarnings("ignore:The policy update was rejected")
def test_huge_rewards_do_no_harm(normalize_advantage: bool, status: str, trust_region: str, tmp_path: Path) -> None:
    class Rich(RandomEnv):
        def reward(self, action: Any) -> float:
            return 1e30 * super().reward(action)

    model = make_model(Rich(), normalize_advantage=normalize_advantage, trust_region=trust_region)
    actor, critic = copies(model._parts.actor_params), copies(model._parts.critic_params)
    log = UpdateLog()
    with pytest.warns(UserWarning, match="The value function was not fitted"):
        model.learn(64, callback=log)
    assert log.values("train/status_name") == [status] * 2
    assert log.values("train/value_status_name") == ["non_finite_fit"] * 2
    assert_identical(copies(model._parts.critic_params), critic)
    if status != "accepted":
        assert_identical(copies(model._parts.actor_params), actor)
    assert_sound(model, tmp_path)


# The mean of 32 numbers is exact for 0 and 0.5, and off by a rounding error for the others
@pytest.mark.parametrize("advantage", [0.0, 0.5, 0.3, -1e-20, 1e20])
def test_equal_advantages_leave_the_policy_alone(advantage: float) -> None:
    model = collect(make_model())
    model.rollout_buffer.advantages[:] = advantage
    before = copies(model._parts.actor_params)
    with warnings.catch_warnings():
        # There is nothing to hear of
        warnings.simplefilter("error")
        log = train(model)
    assert log["train/status_name"] == "zero_gradient"
    assert log["train/value_status_name"] == "fitted"
    assert_identical(copies(model._parts.actor_params), before)


# --- Bad numbers from the environment ----------------------------------------------------------------------------------


class Faulty(RandomEnv):
    """
    Spoils an observation or a reward in one step.

    :param at_step: in which step
    :param observation: what the observation is multiplied by then
    :param reward: the reward then
    """

    def __init__(self, at_step: int, observation: float = 1.0, reward: float = 0.0, space: spaces.Space = VECTOR) -> None:
        super().__init__(space)
        self.at_step, self.factor, self.spoilt_reward = at_step, observation, reward

    def observe(self) -> Any:
        observation = super().observe()
        if self.n_steps == self.at_step:
            spoilt = observation["position"] if isinstance(observation, dict) else observation
            spoilt *= np.float32(self.factor)
        return observation

    def reward(self, action: Any) -> float:
        return self.spoilt_reward if self.n_steps == self.at_step else super().reward(action)


@pytest.mark.parametrize("space", [VECTOR, DICT], ids=["vector", "dict"])
# In the middle of the second rollout, and at its end, where the observation is first seen by the third
@pytest.mark.parametrize("at_step", [40, 64])
@pytest.mark.filterwarnings("ignore:The policy update was rejected", "ignore:The value function was not fitted")
def test_nan_observation_stops_the_training_with_the_policy_intact(at_step: int, space: spaces.Space, tmp_path: Path) -> None:
    policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy"
    # One after the other: both draw from the global generator, which the making of a model seeds
    reference = make_model(RandomEnv(space), policy).learn(32)
    model = make_model(Faulty(at_step, observation=NAN, space=space), policy)
    name = "position" if isinstance(space, spaces.Dict) else "observation"
    with pytest.raises(ValueError, match=f"NaN or an infinity in its {name} after {at_step} timesteps"):
        model.learn(200)
    # As it was after the first update: a second one was not made, or rejected
    assert_identical(copies(model._parts.actor_params), copies(reference._parts.actor_params))
    assert_sound(model, tmp_path)


def test_other_errors_of_the_environment_are_passed_on() -> None:
    class Broken(RandomEnv):
        def reward(self, action: Any) -> float:
            raise ValueError("the simulator has diverged")

    with pytest.raises(ValueError, match="the simulator has diverged"):
        make_model(Broken()).learn(32)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.filterwarnings("ignore:The policy update was rejected")
def test_bad_reward_costs_one_update(bad: float, tmp_path: Path) -> None:
    log = UpdateLog()
    model = make_model(Faulty(40, reward=bad))
    with pytest.warns(UserWarning, match="The value function was not fitted: non_finite_returns"):
        model.learn(128, callback=log)
    assert log.values("train/status_name") == ["accepted", "non_finite_objective", "accepted", "accepted"]
    assert log.values("train/value_status_name") == ["fitted", "non_finite_returns", "fitted", "fitted"]
    assert_sound(model, tmp_path)


@pytest.mark.filterwarnings("ignore:The value function was not fitted")
def test_bad_reward_in_a_normalized_environment_does_no_harm(tmp_path: Path) -> None:
    # The running statistics of VecNormalize are spoilt for good, and with them all rewards that follow
    log = UpdateLog()
    model = make_model(VecNormalize(DummyVecEnv([lambda: Faulty(40, reward=NAN)])))
    with pytest.warns(UserWarning, match="The policy update was rejected: non_finite_objective"):
        model.learn(128, callback=log)
    assert log.values("train/status_name") == ["accepted"] + ["non_finite_objective"] * 3
    assert_sound(model, tmp_path)


# --- Bad operators -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("diagonal", "damping", "status"),
    [
        (-1.0, 0.1, "cg_non_positive_curvature"),
        (0.0, 0.0, "cg_non_positive_curvature"),
        (NAN, 0.1, "cg_non_finite"),
        (INF, 0.1, "cg_non_finite"),
        # The damping hides from conjugate gradient that the KL feels nothing
        (0.0, 1.0, "no_curvature"),
        # Or that it has no minimum
        (-1e-3, 1.0, "no_curvature"),
    ],
)
def test_matrix_that_is_not_positive_rejects_the_update(
    diagonal: float, damping: float, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fisher(surrogate: Surrogate) -> LinearOperator:
        return Dense(diagonal * th.eye(sum(param.numel() for param in surrogate.params)))

    model = collect(make_model(cg_damping=damping))
    before = copies(model._parts.actor_params)
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match=f"The policy update was rejected: {status}"):
        patch.setattr(Surrogate, "fisher", fisher)
        log = train(model)
    assert log["train/status_name"] == status
    assert_identical(copies(model._parts.actor_params), before)
    model.cg_damping = 0.1
    assert_sound(model, tmp_path)


def test_trials_that_give_no_number_are_shrunk_until_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    # A matrix that is much too small makes the first steps so long that the policy overflows
    def fisher(surrogate: Surrogate) -> LinearOperator:
        return Dense(1e-15 * th.eye(sum(param.numel() for param in surrogate.params)))

    model = collect(make_model(cg_damping=0.0))
    before = copies(model._parts.actor_params)
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="The policy update was rejected: non_finite"):
        patch.setattr(Surrogate, "fisher", fisher)
        log = train(model)
    assert log["train/line_search_trials"] == model.line_search_max_iter
    assert_identical(copies(model._parts.actor_params), before)


# --- Interruptions -----------------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_interrupted_policy_update_is_undone(
    error: BaseException, trust_region: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = collect(make_model(trust_region=trust_region))
    before = copy.deepcopy(model.get_parameters())
    evaluate, moved = Surrogate.evaluate, []

    def interrupted(surrogate: Surrogate, indices: th.Tensor | None = None) -> tuple[th.Tensor, th.Tensor]:
        if not th.equal(surrogate.params[0], before["policy"]["mlp_extractor.policy_net.0.weight"]):
            moved.append(True)
            raise error
        return evaluate(surrogate, indices)

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(Surrogate, "evaluate", interrupted)
        train(model)
    assert moved, "the interruption came before anything had moved"
    assert_identical(model.get_parameters(), before)
    assert (model._n_updates, model._n_accepted) == (0, 0)
    # PyTorch checks the arguments of its distributions again
    assert th.distributions.Distribution._validate_args
    assert_sound(model, tmp_path)


def test_interrupted_fit_of_the_critic_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model().learn(32)
    collect(model)
    before, moments = copies(model._parts.critic_params), copy.deepcopy(model.policy.optimizer.state_dict())
    step, calls = model.policy.optimizer.step, []

    def interrupted() -> None:
        calls.append(True)
        if len(calls) == 3:
            raise KeyboardInterrupt
        step()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model.policy.optimizer, "step", interrupted)
        train(model)
    assert_identical(copies(model._parts.critic_params), before)
    assert_identical(model.policy.optimizer.state_dict(), moments)
    assert not any(module.training for module in model.policy.modules())


# --- Arguments ---------------------------------------------------------------------------------------------------------

#: Name of an argument, and values that are not acceptable.
BAD_VALUES: dict[str, list[Any]] = {
    "n_steps": [0, -1, 2.5, 128.0, "128", True],
    "batch_size": [0, -64, 64.0, "64", NAN],
    "cg_max_steps": [0, 1.5],
    "line_search_max_iter": [0, INF],
    "sub_sampling_factor": [0, 1.5, False],
    "n_critic_updates": [-1, 2.0],
    "gamma": [1.01, -0.1, NAN, "0.99", True],
    "gae_lambda": [-0.1, 2, INF],
    "vf_lambda": [-0.1, 2, NAN, "auto", True],
    "cg_tolerance": [1, -1e-3, NAN],
    "line_search_shrinking_factor": [0, 1, -0.5, NAN],
    "target_kl": [0, -0.01, NAN, INF, "0.01", True, None, lambda _: NAN, lambda _: 0.0, lambda _: -1.0],
    "cg_damping": [-0.1, NAN, "0.1", lambda _: -1.0, lambda _: "0.1"],
    "ent_coef": [NAN, INF, "auto", None, lambda _: NAN],
    "trust_region": ["ball", "", None, True, ["penalty"]],
    "vf_loss": ["l1", "", None, ["mse"]],
    "clipped_likelihood": [None, 1, "yes"],
    "clip_advantage": [0, -0.5, NAN, INF, "0.5", True],
    "clip_range_vf": [0, -0.2, NAN, "0.2", lambda _: NAN, lambda _: 0.0],
    "max_grad_norm": [-0.5, NAN, INF, "0.5", True],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_VALUES.items() for value in values])
def test_bad_argument_is_named_together_with_its_value(name: str, value: Any) -> None:
    shown = re.escape(repr(value(1.0) if callable(value) else value))
    with pytest.raises(ValueError, match=f"`{name}` must be .*(got|returned) {shown}"):
        make_model(**{name: value})


@pytest.mark.parametrize(
    ("trust_region", "options", "message"),
    [
        ("constraint", {"fil": True}, "has no option 'fil'; there are"),
        ("constraint", {"beta": 1.0}, "has no option 'beta'"),
        ("penalty", {"fill": True}, "has no option 'fill'"),
        ("constraint", {"fill": 1}, r"`trust_region_kwargs\['fill'\]` must be True or False, got 1"),
        ("constraint", {"damped_scale": None}, "must be True or False, got None"),
        ("penalty", {"n_epochs": 0}, r"`trust_region_kwargs\['n_epochs'\]` must be an integer of at least 1, got 0"),
        ("penalty", {"batch_size": 64.0}, "must be an integer of at least 1, got 64.0"),
        ("penalty", {"learning_rate": -1e-3}, "must be positive, got -0.001"),
        ("penalty", {"beta": NAN}, "must be positive, got nan"),
        ("penalty", {"beta": "1"}, "must be positive, got '1'"),
        ("constraint", "fill", "`trust_region_kwargs` must be a dict, got 'fill'"),
    ],
)
def test_bad_option_of_the_trust_region_is_named(trust_region: str, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(trust_region=trust_region, trust_region_kwargs=options)


@pytest.mark.parametrize(
    ("action_space", "message"),
    [
        (
            spaces.Tuple([spaces.Discrete(2), spaces.Text(4)]),
            "Tuple.* is not supported: in Text.*, TRPO supports Box, Discrete",
        ),
        (spaces.Dict({"move": spaces.Dict({"x": BOX_ACTIONS})}), "Dict.* is not supported: it has Dict.* in it"),
        (spaces.Text(4), "Text.* is not supported: TRPO supports"),
        (
            spaces.MultiBinary([2, 3]),
            r"Multi-dimensional MultiBinary\(.*\) action space is not supported: use MultiBinary\(6\)",
        ),
        (
            spaces.MultiDiscrete(np.array([[2, 3], [4, 5]])),
            r"it must have one dimension; use MultiDiscrete",
        ),
    ],
)
def test_unsupported_action_space_is_named(action_space: spaces.Space, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(RandomEnv(VECTOR, action_space))


def test_one_sample_cannot_be_normalized() -> None:
    with pytest.raises(ValueError, match=r"`n_steps \* n_envs` must be greater than 1 .* n_steps=1 and n_envs=1"):
        make_model(n_steps=1)


def test_clipped_advantage_must_be_normalized() -> None:
    with pytest.raises(ValueError, match=r"got clip_advantage=0\.5 with normalize_advantage=False"):
        make_model(clip_advantage=0.5, normalize_advantage=False)


@pytest.mark.parametrize(
    ("policy", "env", "kwargs", "message"),
    [
        ("SquashedMlpPolicy", RandomEnv(VECTOR, spaces.Discrete(2)), {}, "needs a Box action space with finite bounds"),
        ("SquashedMlpPolicy", RandomEnv(), {"use_sde": True}, "is for `use_sde=False`"),
        ("MlpPolicy", RandomEnv(VECTOR, spaces.Discrete(2)), {"use_sde": True}, "gSDE"),
        ("NoPolicy", RandomEnv(), {}, "NoPolicy"),
    ],
)
def test_policy_that_does_not_fit_is_refused(policy: str, env: gym.Env[Any, Any], kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(env, policy, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"target_kl": -1}, "`target_kl` must be positive, got -1"),
        ({"n_steps": 0}, "`n_steps` must be an integer of at least 1, got 0"),
        ({"trust_region": "ball"}, "`trust_region` must be one of"),
        ({"trust_region_kwargs": {"beta": 1.0}}, "has no option 'beta'"),
        ({"cg_damping": lambda _: NAN}, "`cg_damping` must be a finite number"),
    ],
)
def test_bad_argument_is_named_when_loading(kwargs: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_model().save(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        TRPO.load(tmp_path / "model", **kwargs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gamma", 1),
        ("gae_lambda", 0),
        ("vf_lambda", 1),
        ("vf_lambda", None),
        ("n_steps", np.int64(16)),
        ("batch_size", 1000),
        ("cg_damping", 0),
        ("cg_tolerance", 0),
        ("n_critic_updates", 0),
        ("target_kl", np.float32(0.01)),
        ("ent_coef", -0.01),
        ("sub_sampling_factor", 1000),
    ],
)
def test_extreme_but_legal_argument_is_taken(name: str, value: Any) -> None:
    model = make_model(**{name: value}).learn(32)
    assert log_of(model)["train/status_name"] == "accepted"
