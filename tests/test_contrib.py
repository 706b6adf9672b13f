"""Against sb3-contrib's TRPO: the same step in its settings, its saved models, its signature."""

import copy
import inspect
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import stable_baselines3
import torch as th
from agents import assert_identical, collect, copies, log_of, make_model, random_vec_env, train
from gymnasium import spaces
from helpers import BOX_ACTIONS, DICT, VECTOR, relative_error
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.logger import Logger

from sb3_trpo_ext import TRPO, MaskableTRPO, RecurrentTRPO

#: What makes our step sb3-contrib's: plain conjugate gradient, scaled by the damped curvature, and no filling of the region.
CONTRIB_STEP = {"fill": False, "damped_scale": True, "precondition": False}


def make_contrib(
    action_space: spaces.Space, observation_space: spaces.Space = VECTOR, n_envs: int = 1, **kwargs: Any
) -> sb3_contrib.TRPO:
    """A small model of sb3-contrib's, with 64 samples in its rollout."""
    policy = "MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy"
    defaults: dict[str, Any] = {"n_steps": 64 // n_envs, "batch_size": 32, "n_critic_updates": 2}
    defaults |= {"policy_kwargs": {"net_arch": [8]}, "seed": 0, "device": "cpu"}
    return sb3_contrib.TRPO(policy, random_vec_env(n_envs, observation_space, action_space), **{**defaults, **kwargs})


def with_same_rollout(contrib: sb3_contrib.TRPO, **kwargs: Any) -> TRPO:
    """Our model with the weights and the rollout of sb3-contrib's, and the settings that both have."""
    names = ("learning_rate", "n_steps", "batch_size", "n_critic_updates", "cg_max_steps", "policy_kwargs", "use_sde")
    settings = {name: getattr(contrib, name) for name in names}
    model = make_model(contrib.env, **{**settings, "cg_tolerance": 0.0, "clipped_likelihood": False, **kwargs})
    model.policy.load_state_dict(contrib.policy.state_dict())
    model.rollout_buffer = copy.deepcopy(contrib.rollout_buffer)
    return model


def train_contrib(model: sb3_contrib.TRPO, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """An update of sb3-contrib's, with a conjugate gradient that starts at zero instead of at a random vector."""
    model.set_logger(Logger(None, []))
    with monkeypatch.context() as patch, warnings.catch_warnings():
        patch.setattr(th, "randn_like", th.zeros_like)
        # Without updates of the critic, it logs the mean of no losses
        warnings.simplefilter("ignore", RuntimeWarning)
        model.train()
    return log_of(model)


def update_vector(before: list[th.Tensor], model: Any) -> th.Tensor:
    """How an update has moved the parameters, as one vector in double precision."""
    after = model.policy.parameters()
    return th.cat([(new.detach().double() - old.double()).flatten() for old, new in zip(before, after, strict=True)])


UPDATES: dict[str, tuple[spaces.Space, dict[str, Any], int]] = {
    # With the number of action dimensions that sb3-contrib averages the KL over
    "box": (spaces.Box(-1.0, 1.0, (3,)), {}, 3),
    "box of two axes": (spaces.Box(-1.0, 1.0, (2, 2)), {}, 4),
    "gSDE": (BOX_ACTIONS, {"use_sde": True}, 2),
    "discrete": (spaces.Discrete(3), {}, 1),
    "multi-discrete": (spaces.MultiDiscrete([3, 2]), {}, 1),
    "multi-binary": (spaces.MultiBinary(3), {}, 3),
    "several environments": (BOX_ACTIONS, {"n_envs": 4}, 2),
}


@pytest.mark.parametrize(("action_space", "kwargs", "factor"), UPDATES.values(), ids=list(UPDATES))
def test_converted_settings_reproduce_contribs_policy_update(
    action_space: spaces.Space, kwargs: dict[str, Any], factor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"target_kl": 0.02, "cg_damping": 0.05, "n_critic_updates": 0}
    # In float32, two routes to a solution drift apart with every step of conjugate gradient: a few, and damping as it is used
    contrib = collect(make_contrib(action_space, cg_max_steps=5, **settings, **kwargs))

    def our_update(factor: int) -> tuple[th.Tensor, dict[str, Any]]:
        converted = {"target_kl": 0.02 * factor, "cg_damping": 0.05 * factor}
        model = with_same_rollout(contrib, trust_region_kwargs=CONTRIB_STEP, **converted)
        before = copies(model.policy.parameters())
        log = train(model)
        return update_vector(before, model), log

    ours, our_log = our_update(factor)
    unconverted, _ = our_update(1)
    before = copies(contrib.policy.parameters())
    log = train_contrib(contrib, monkeypatch)
    theirs = update_vector(before, contrib)

    assert log["train/is_line_search_success"] == our_log["train/is_line_search_success"] == 1
    assert relative_error(ours, theirs) < 1e-5
    assert our_log["train/policy_objective"] == pytest.approx(log["train/policy_objective"], rel=1e-5)
    # Theirs is KL(new || old), which differs from KL(old || new) in the third order of the step: by up to 15% here
    assert our_log["train/kl_divergence_loss"] == pytest.approx(factor * log["train/kl_divergence_loss"], rel=0.25)
    assert factor == 1 or relative_error(unconverted, theirs) > 0.1


@pytest.mark.parametrize("action_space", [BOX_ACTIONS, spaces.Discrete(3)], ids=["box", "discrete"])
def test_critic_is_fitted_as_contribs_is(action_space: spaces.Space, monkeypatch: pytest.MonkeyPatch) -> None:
    # One minibatch that holds the whole rollout: then the order in which samples are drawn plays no part
    contrib = collect(make_contrib(action_space, batch_size=64, n_critic_updates=5, learning_rate=0.01))
    ours = with_same_rollout(contrib)
    before = copies(ours._parts.critic_params)
    our_log, log = train(ours), train_contrib(contrib, monkeypatch)
    assert our_log["train/value_loss"] == pytest.approx(log["train/value_loss"], rel=1e-4)
    names: dict[th.Tensor, str] = {param: name for name, param in ours.policy.named_parameters()}
    theirs = dict(contrib.policy.named_parameters())
    for param, old in zip(ours._parts.critic_params, before, strict=True):
        # Adam's steps have length 0.01 whatever the gradient; where that is near zero, rounding decides on more digits
        assert relative_error(param.detach() - old, theirs[names[param]].detach() - old) < 1e-3


SAVED: dict[str, tuple[spaces.Space, spaces.Space, int]] = {
    "box": (VECTOR, spaces.Box(-1.0, 1.0, (3,)), 3),
    "discrete": (VECTOR, spaces.Discrete(3), 1),
    "multi-binary": (VECTOR, spaces.MultiBinary(3), 3),
    # Here the features extractor is shared, and belongs to the actor
    "dict observations": (DICT, spaces.MultiDiscrete([3, 2]), 1),
}


@pytest.fixture(params=SAVED.values(), ids=list(SAVED))
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[sb3_contrib.TRPO, Path, int]:
    """A trained model of sb3-contrib's, the file where it is saved, and its number of action dimensions."""
    observation_space, action_space, factor = request.param
    contrib = make_contrib(action_space, observation_space, target_kl=0.02, cg_damping=0.05).learn(128)
    contrib.save(tmp_path / "contrib")
    return contrib, tmp_path / "contrib", factor


def load(path: Any, **kwargs: Any) -> TRPO:
    """Load without hearing of the conversion, where that is not the point."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This model was saved by sb3-contrib's TRPO")
        return TRPO.load(path, device="cpu", **kwargs)


def test_loading_converts_settings_and_says_so(saved: tuple[sb3_contrib.TRPO, Path, int]) -> None:
    _, path, factor = saved
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = TRPO.load(path, device="cpu")
    assert model.target_kl == pytest.approx(0.02 * factor, rel=1e-12)
    assert model.cg_damping == pytest.approx(0.05 * factor, rel=1e-12)
    messages = [str(warning.message) for warning in caught if "sb3-contrib" in str(warning.message)]
    # Nothing is converted where the factor is one, and nobody needs to hear of it
    assert len(messages) == (factor != 1)
    for message in messages:
        assert "target_kl from 0.02 to 0.06" in message and "cg_damping from 0.05 to 0.15" in message
        # It points to the caller
        assert [warning.filename for warning in caught if str(warning.message) == message] == [__file__]


@pytest.mark.parametrize("how", ["argument", "custom object"])
def test_given_setting_is_not_converted(how: str, tmp_path: Path) -> None:
    make_contrib(BOX_ACTIONS, target_kl=0.02, cg_damping=0.05).save(tmp_path / "contrib")
    kwargs: dict[str, Any] = {"target_kl": 0.5} if how == "argument" else {"custom_objects": {"target_kl": 0.5}}
    with pytest.warns(UserWarning, match=r"converted: cg_damping from 0\.05 to 0\.1\.$"):
        model = TRPO.load(tmp_path / "contrib", device="cpu", **kwargs)
    assert (model.target_kl, model.cg_damping) == (0.5, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TRPO.load(tmp_path / "contrib", device="cpu", target_kl=0.5, cg_damping=0.2)


def test_loaded_model_predicts_the_same(saved: tuple[sb3_contrib.TRPO, Path, int]) -> None:
    contrib, path, _ = saved
    model = load(path)
    space = contrib.observation_space
    assert isinstance(space, (spaces.Box, spaces.Dict))
    for _ in range(20):
        observation = space.sample()
        np.testing.assert_array_equal(
            model.predict(observation, deterministic=True)[0], contrib.predict(observation, deterministic=True)[0]
        )
    assert_identical(model.policy.state_dict(), contrib.policy.state_dict())


def test_optimizer_state_is_carried_over_for_exactly_the_critic(saved: tuple[sb3_contrib.TRPO, Path, int]) -> None:
    contrib, path, _ = saved
    model = load(path)
    theirs = dict(contrib.policy.named_parameters())
    names: dict[th.Tensor, str] = {param: name for name, param in model.policy.named_parameters()}
    expected = {name for name in names.values() if name.startswith(("value_net", "mlp_extractor.value_net"))}
    moments = model.policy.optimizer.state
    assert {names[param] for param in moments} == {names[param] for param in model._parts.critic_params} == expected
    for param, moment in moments.items():
        assert moment["exp_avg_sq"].max() > 0
        assert_identical(dict(moment), dict(contrib.policy.optimizer.state[theirs[names[param]]]))


def test_training_of_a_loaded_model_continues(saved: tuple[sb3_contrib.TRPO, Path, int]) -> None:
    contrib, path, _ = saved
    assert contrib.env is not None
    model = load(path, env=contrib.env)
    model.learn(64, reset_num_timesteps=False)
    assert model.num_timesteps == contrib.num_timesteps + 64
    assert model._n_updates == contrib._n_updates + 1
    assert log_of(model)["train/status_name"] == "accepted"
    assert log_of(model)["train/value_status_name"] == "fitted"


def test_form_of_the_trust_region_can_be_changed_when_loading(saved: tuple[sb3_contrib.TRPO, Path, int]) -> None:
    contrib, path, _ = saved
    assert contrib.env is not None
    model = load(path, env=contrib.env, trust_region="penalty")
    model.learn(64, reset_num_timesteps=False)
    assert log_of(model)["train/status_name"] == "accepted"
    assert log_of(model)["train/beta"] == 1


def open_file(path: Path) -> Any:
    return open(path, "rb")


def open_in_memory(path: Path) -> Any:
    return io.BytesIO(path.read_bytes())


@pytest.mark.parametrize("open_path", [open_file, open_in_memory])
def test_loading_from_a_file_object(open_path: Callable[[Path], Any], tmp_path: Path) -> None:
    contrib = make_contrib(BOX_ACTIONS)
    contrib.save(tmp_path / "contrib")
    with open_path(tmp_path / "contrib.zip") as file:
        model = load(file)
    assert model.target_kl == 0.02
    assert_identical(model.policy.state_dict(), contrib.policy.state_dict())


def test_models_of_our_own_are_not_converted(tmp_path: Path) -> None:
    make_model(target_kl=0.03, cg_damping=0.3).save(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = TRPO.load(tmp_path / "model", device="cpu")
    assert (model.target_kl, model.cg_damping) == (0.03, 0.3)


def test_file_that_is_no_model_is_reported_as_sb3_does(tmp_path: Path) -> None:
    (tmp_path / "model.zip").write_text("not an archive")
    with pytest.raises(ValueError, match="wasn't a zip-file"):
        TRPO.load(tmp_path / "model.zip")


@pytest.mark.parametrize(
    ("other", "ours", "policy"),
    [
        (stable_baselines3.PPO, TRPO, "MlpPolicy"),
        (stable_baselines3.PPO, TRPO, "CnnPolicy"),
        (sb3_contrib.MaskablePPO, MaskableTRPO, "MlpPolicy"),
        (sb3_contrib.RecurrentPPO, RecurrentTRPO, "MlpLstmPolicy"),
    ],
)
def test_model_of_another_algorithm_gives_its_policy(other: Any, ours: type[TRPO], policy: str, tmp_path: Path) -> None:
    has_images = policy == "CnnPolicy"
    env: gym.Env = FakeImageEnv(screen_height=40, screen_width=40) if has_images else InvalidActionEnvDiscrete(dim=4)
    saved = other(policy, env, n_steps=32, batch_size=32, device="cpu")
    saved.save(tmp_path / "model")
    advice = r"^`path`: the model in .*model is of another algorithm.*share_features_extractor.*set_parameters"
    with pytest.raises(ValueError, match=advice):
        ours.load(tmp_path / "model")
    kwargs: dict[str, Any] = {"n_steps": 32, "batch_size": 32, "norm_obs": False, "norm_reward": False, "device": "cpu"}
    if has_images:
        with pytest.raises(RuntimeError, match="share a features extractor"):
            ours(policy, env, **kwargs).set_parameters(tmp_path / "model")  # type: ignore[arg-type]
        kwargs["policy_kwargs"] = {"share_features_extractor": True}
    model = ours(policy, env, **kwargs)
    model.set_parameters(tmp_path / "model")  # type: ignore[arg-type]
    assert_identical(model.policy.state_dict(), saved.policy.state_dict())
    model.learn(64)


@pytest.mark.parametrize("from_file", [False, True], ids=["parameters", "file"])
def test_parameters_of_contribs_model_can_be_set(saved: tuple[sb3_contrib.TRPO, Path, int], from_file: bool) -> None:
    contrib, path, _ = saved
    assert contrib.env is not None
    policy = "MultiInputPolicy" if isinstance(contrib.observation_space, spaces.Dict) else "MlpPolicy"
    # Their MultiInputPolicy shares the features extractor, ours does only if asked
    policy_kwargs = {"net_arch": [8]} if policy == "MlpPolicy" else {"net_arch": [8], "share_features_extractor": True}
    model = make_model(contrib.env, policy, policy_kwargs=policy_kwargs, seed=7)
    parameters: dict[str, Any] = contrib.get_parameters()
    model.set_parameters(str(path) if from_file else parameters)
    assert_identical(model.policy.state_dict(), contrib.policy.state_dict())
    assert len(model.policy.optimizer.state) == len(model._parts.critic_params)
    # What was passed is left as it was
    assert len(parameters["policy.optimizer"]["param_groups"][0]["params"]) == len(list(contrib.policy.parameters()))


def test_signature_begins_with_contribs() -> None:
    ours = list(inspect.signature(TRPO.__init__).parameters.values())
    theirs = list(inspect.signature(sb3_contrib.TRPO.__init__).parameters.values())
    # Where ours are chosen for a task that nobody tuned
    own_defaults = {"learning_rate", "n_steps", "batch_size", "gae_lambda", "cg_damping", "target_kl", "sub_sampling_factor"}
    for our_parameter, their_parameter in zip(ours, theirs, strict=False):
        default = our_parameter.default if our_parameter.name in own_defaults else their_parameter.default
        assert our_parameter.replace(annotation=None) == their_parameter.replace(annotation=None, default=default)
    assert len(ours) > len(theirs)
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in ours[len(theirs) :])


@pytest.mark.parametrize("method", ["learn", "save", "load", "set_parameters", "predict"])
def test_methods_have_contribs_parameters(method: str) -> None:
    ours = inspect.signature(getattr(TRPO, method)).parameters.values()
    theirs = inspect.signature(getattr(sb3_contrib.TRPO, method)).parameters.values()
    assert [p.replace(annotation=None) for p in ours] == [p.replace(annotation=None) for p in theirs]
