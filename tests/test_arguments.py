"""Bad input is named before anything moves, and NumPy's numbers are numbers."""

import functools
import inspect
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from agents import RandomEnv, assert_identical, collect, make_model, random_vec_env
from gymnasium import spaces
from helpers import BOX_ACTIONS, VECTOR
from stable_baselines3.common.env_util import make_vec_env

from sb3_trpo_ext import TRPO
from sb3_trpo_ext._checks import ArgumentError
from sb3_trpo_ext._names import check_attributes

# --- Spaces --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action_space", "message"),
    [
        (spaces.Box(-2, 2, (1,), np.int64), "int64.* is not supported: it needs a float dtype such as np.float32"),
        (spaces.Box(0, 255, (2,), np.uint8), "float dtype"),
        (spaces.Box(-1.0, 1.0, (0,)), "has no number in it"),
        (spaces.Discrete(3, start=1), "action space .*`start` that is not 0.*TransformAction"),
        (spaces.MultiDiscrete([3, 2], start=[0, 1]), "action space .*`start` that is not 0"),
        (spaces.MultiBinary([3]), r"use MultiBinary\(3\)"),
        (spaces.MultiBinary([2, 3]), r"use MultiBinary\(6\)"),
        (spaces.MultiDiscrete(np.array([[2, 3], [4, 5]])), r"use MultiDiscrete\(\[2, 3, 4, 5\]\)"),
    ],
)
@pytest.mark.parametrize("clipped_likelihood", [True, False])
def test_action_spaces_that_would_not_be_learned(action_space: spaces.Space, message: str, clipped_likelihood: bool) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(RandomEnv(VECTOR, action_space), clipped_likelihood=clipped_likelihood)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float_actions_of_any_precision_train(dtype: Any) -> None:
    make_model(RandomEnv(VECTOR, spaces.Box(-1, 1, (2,), dtype))).learn(32)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Discrete(3, start=2), "observation space Discrete.*`start` that is not 0.*TransformObservation"),
        (spaces.MultiDiscrete([3, 2], start=[1, 0]), "`start` that is not 0"),
        (spaces.Dict({"a": VECTOR, "b": spaces.Discrete(2, start=-1)}), "observation space Discrete.*`start`"),
        (spaces.Box(-1, 1, (0,)), "observation space .* has no number in it"),
    ],
)
def test_observation_spaces_that_sb3_would_misread(space: spaces.Space, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(RandomEnv(space), "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy")


# --- Environments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ["make_gymnasium", "make_gym"])
def test_envpools_own_environments_are_named(make: str) -> None:
    envpool = pytest.importorskip("envpool")
    env = getattr(envpool, make)("CartPole-v1", num_envs=2)
    with pytest.raises(ValueError, match=r"EnvPool's own .*EnvPoolVecEnv"):
        TRPO("MlpPolicy", env)


@pytest.mark.parametrize(("env", "hint"), [(RandomEnv, r"call it: RandomEnv\(\)"), (7, "pass an environment, or its id")])
def test_what_is_no_environment_is_named(env: Any, hint: str) -> None:
    with pytest.raises(ValueError, match=f"`env` must be .*{hint}"):
        TRPO("MlpPolicy", env)


# --- Numbers -------------------------------------------------------------------------------------------------------------

INTEGERS: dict[str, Any] = {
    "n_steps": 32,
    "batch_size": 16,
    "cg_max_steps": 5,
    "line_search_max_iter": 5,
    "sub_sampling_factor": 2,
    "n_critic_updates": 2,
    "seed": 3,
    "stats_window_size": 10,
    "sde_sample_freq": 4,
}


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
@pytest.mark.parametrize("trust_region", ["constraint", "penalty"])
def test_integers_of_numpy_are_integers(kind: Any, trust_region: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"trust_region": trust_region, "clipped_likelihood": np.True_}
    plain = dict(options)
    if trust_region == "penalty":
        options["trust_region_kwargs"] = {"n_epochs": kind(2), "batch_size": kind(8)}
        plain["trust_region_kwargs"] = {"n_epochs": 2, "batch_size": 8}
    model = make_model(**options, **{name: kind(value) for name, value in INTEGERS.items()}).learn(64)
    assert_identical(model.get_parameters(), make_model(**plain, **INTEGERS).learn(64).get_parameters())
    model.save(tmp_path / "model")
    TRPO.load(tmp_path / "model", env=model.env, device="cpu", batch_size=kind(8)).learn(32)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("batch_size", 2.5),
        ("n_critic_updates", -1),
        ("vf_loss", "l1"),
        ("clip_range_vf", lambda _: "wide"),
        ("clip_range_vf", lambda _: -1.0),
        ("lr_schedule", lambda _: -1.0),
        ("lr_schedule", lambda _: float("nan")),
        ("trust_region", "penalty"),
        ("ent_coef", lambda _: float("nan")),
        ("cg_damping", lambda _: -1.0),
        ("target_kl", lambda _: -1.0),
        ("max_grad_norm", -1),
        ("clip_advantage", 0),
        ("vf_lambda", 1.5),
    ],
)
def test_no_argument_fails_after_something_has_moved(name: str, value: Any) -> None:
    """An attribute that somebody has changed, or a schedule that goes wrong late."""
    model = collect(make_model())
    setattr(model, name, value)
    before = model.get_parameters()
    with pytest.raises(ValueError, match={"lr_schedule": "learning_rate"}.get(name, name)):
        model.train()
    assert_identical(model.get_parameters(), before)
    assert model._n_updates == 0


@pytest.mark.parametrize(("n_steps", "batch_size", "size"), [(64, 63, 1), (6, 8, 6), (64, 32, 0), (64, 1, 0)])
def test_a_smaller_last_minibatch_is_warned_of(n_steps: int, batch_size: int, size: int) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_model(n_steps=n_steps, batch_size=batch_size)
    found = [str(each.message) for each in caught if each.filename.endswith("agents.py")]
    assert [f"there will be a truncated mini-batch of size {size}" in message for message in found] == [True] * (size > 0)


def test_an_optimizer_that_needs_a_function_is_refused() -> None:
    with pytest.raises(ValueError, match="LBFGS"):
        make_model(policy_kwargs={"optimizer_class": th.optim.LBFGS})
    # SB3 calls whatever it is given
    make_model(policy_kwargs={"optimizer_class": functools.partial(th.optim.Adam, eps=1e-6)}).learn(32)


def test_a_number_that_is_no_float_is_named() -> None:
    with pytest.raises(ValueError, match="`gamma` must be"):
        make_model(gamma=10**400)


class _Mine(TRPO):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)


@pytest.mark.parametrize("algorithm", [TRPO, _Mine])
def test_arguments_of_ppo_are_answered(algorithm: type[TRPO]) -> None:
    for name, words in (("n_epochs", "n_critic_updates"), ("clip_range", "target_kl"), ("n_step", "did you mean n_steps")):
        with pytest.raises(TypeError, match=f"^{algorithm.__name__}.. got an unexpected keyword argument '{name}': .*{words}"):
            algorithm("MlpPolicy", "CartPole-v1", **{name: 10})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`target_kl` must be a finite number or 'auto', got None"):
        make_model(target_kl=None)
    # Editors and RL-Zoo read them
    assert {"gamma", "target_kl", "clip_advantage"} <= set(inspect.signature(TRPO).parameters)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "0", True])
def test_bad_seed_is_named(seed: Any) -> None:
    with pytest.raises(ValueError, match="`seed` must be an integer from 0"):
        make_model(seed=seed)


def test_argument_errors_are_of_the_class_that_sb3_raises_too() -> None:
    """SB3's own algorithms check some arguments with `assert`."""
    for kwargs in ({"n_steps": 1}, {"clip_range_vf": -1.0}, {"env": RandomEnv(VECTOR, spaces.MultiBinary([2, 2]))}):
        with pytest.raises(AssertionError):
            make_model(**kwargs)
        with pytest.raises(ValueError):
            make_model(**kwargs)
    assert issubclass(ArgumentError, ValueError)


# --- Attributes that are changed when a model is loaded --------------------------------------------------------------------


def test_unknown_attributes_are_refused_with_a_suggestion(tmp_path: Path) -> None:
    model = make_model()
    model.save(tmp_path / "model")
    with pytest.raises(
        TypeError, match=r"TRPO.load\(\) got an unexpected keyword argument 'target_klx': did you mean target_kl"
    ):
        TRPO.load(tmp_path / "model", target_klx=1)
    with pytest.raises(TypeError, match="'completely_unheard_of': there are batch_size, cg_damping, "):
        TRPO.load(tmp_path / "model", completely_unheard_of=1)
    known: dict[str, Any] = {
        "target_kl": 0.5,
        "seed": 4,
        "verbose": 0,
        "tensorboard_log": None,
        "num_timesteps": 7,
        "n_envs": 1,
    }
    loaded = TRPO.load(tmp_path / "model", device="cpu", **known)
    assert {name: getattr(loaded, name) for name in known} == known


def test_attributes_of_a_subclass_are_known() -> None:
    class Sub(TRPO):
        def __init__(self, *args: Any, flavor: str = "plain", **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    check_attributes(Sub, ["flavor", *list(inspect.signature(TRPO.__init__).parameters)[2:]], [])
    with pytest.raises(TypeError, match="did you mean flavor"):
        check_attributes(Sub, ["flavour"], [])


@pytest.mark.parametrize("state", [{"state": {}}, {}, {"param_groups": []}])
@pytest.mark.parametrize("name", ["policy.optimizer", "kl_penalty"])
def test_state_of_an_optimizer_that_is_none(name: str, state: dict[str, Any]) -> None:
    """SB3's tests expect a `RuntimeError`, which is what PyTorch raises for the policy."""
    model = make_model(trust_region="penalty")
    before: dict[str, Any] = model.get_parameters()
    other: dict[str, Any] = make_model(trust_region="penalty", seed=1).get_parameters()
    other[name] = state if name == "policy.optimizer" else {"beta": 1.0, "optimizer": state}
    with pytest.raises(RuntimeError, match=f"`{name}` has not the state of an optimizer: .* missing"):
        model.set_parameters(other)
    assert_identical(model.get_parameters(), before)


def test_state_of_another_optimizer() -> None:
    model = make_model()
    before: dict[str, Any] = model.get_parameters()
    for kwargs, match in (
        ({"optimizer_class": th.optim.RMSprop, "optimizer_kwargs": {}}, "of another optimizer than Adam: its betas missing"),
        ({"net_arch": []}, r"has 5 tensors, and this model's has \d+"),
    ):
        other: dict[str, Any] = make_model(policy_kwargs={"net_arch": [8], **kwargs}).get_parameters()
        with pytest.raises(RuntimeError, match=match):
            model.set_parameters(other)
        assert_identical(model.get_parameters(), before)
        if "optimizer_class" in kwargs:
            # The advice of the message
            make_model(seed=1).set_parameters({"policy": other["policy"]}, exact_match=False)


# --- Threads -------------------------------------------------------------------------------------------------------------


def test_trainings_in_threads_leave_the_process_as_it_was() -> None:
    """As with `n_jobs` of Optuna."""
    checks, n_threads = th.distributions.Distribution._validate_args, th.get_num_threads()
    flash = th.backends.cuda.flash_sdp_enabled()
    failures: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            make_model(random_vec_env(2), seed=seed, n_steps=8).learn(400)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert th.distributions.Distribution._validate_args == checks
    assert th.get_num_threads() == n_threads
    assert th.backends.cuda.flash_sdp_enabled() == flash

    seen: list[int] = []
    late = threading.Thread(target=lambda: seen.append(th.get_num_threads()))
    late.start()
    late.join()
    assert seen == [n_threads]


def test_make_vec_env_works_as_the_message_says() -> None:
    assert make_model(make_vec_env("CartPole-v1", n_envs=2)).n_envs == 2
    assert BOX_ACTIONS.dtype == np.float32
