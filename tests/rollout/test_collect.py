"""The lean rollout against SB3's own loop, where it must not be used, and what happens when an environment fails."""

import copy
import gc
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from agents import RandomEnv, assert_identical, log_of, make_model, random_vec_env
from gymnasium import spaces
from helpers import BOX_ACTIONS, DICT, IMAGE, VECTOR, BetaPolicy
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    ConvertCallback,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize
from torch import nn

from sb3_trpo_ext import TRPO, TrainingRecorder
from sb3_trpo_ext.policies import MlpPolicy
from sb3_trpo_ext.rollout import actors, lazy
from sb3_trpo_ext.rollout.collect import is_deferrable
from sb3_trpo_ext.rollout.snapshot import Snapshot
from sb3_trpo_ext.update import settings

EXACT = ("observations", "actions", "episode_starts")
CLOSE = ("rewards", "values", "log_probs", "advantages", "returns")


class Recorder(BaseCallback):
    """Keeps what callbacks see; can stop, change the policy or shape the reward in a given step."""

    def __init__(self, stop_at: int | None = None, perturb_at: int | None = None, bonus: float = 0.0) -> None:
        super().__init__()
        self.stop_at, self.perturb_at, self.bonus = stop_at, perturb_at, bonus
        self.calls: list[str] = []
        self.steps: list[dict[str, Any]] = []
        self.final: dict[str, Any] = {}

    def _on_rollout_start(self) -> None:
        self.calls.append("start")

    def _on_step(self) -> bool:
        self.calls.append("step")
        self.steps.append(copy.deepcopy({key: self.locals[key] for key in STEP_LOCALS}))
        self.locals["rewards"] += np.float32(self.bonus)
        assert th.is_grad_enabled()
        if len(self.steps) == self.perturb_at:
            with th.no_grad():
                for param in self.model.policy.parameters():
                    param.add_(0.1 * th.arange(param.numel()).cos().reshape(param.shape))
        return len(self.steps) != self.stop_at

    def _on_rollout_end(self) -> None:
        self.calls.append("end")
        self.final = dict(self.locals)


#: What SB3's loop has in its local variables in a step, but values and log-probabilities.
STEP_LOCALS = (
    "n_steps",
    "obs_tensor",
    "actions",
    "clipped_actions",
    "new_obs",
    "rewards",
    "dones",
    "infos",
    "n_rollout_steps",
)


def as_arrays(value: Any) -> Any:
    """Arrays for tensors, which NumPy cannot compare."""
    if isinstance(value, dict):
        return {key: as_arrays(part) for key, part in value.items()}
    return value.numpy() if isinstance(value, th.Tensor) else value


def collect(model: TRPO, own_loop: bool, callback: BaseCallback | None = None, n_rollouts: int = 1) -> bool:
    """Fill the buffer by SB3's loop or by ours, from the same random numbers and the same states of the environments."""
    model.set_random_seed(1)
    _, callback = model._setup_learn(1000, callback)
    assert model.env is not None
    goes_on = True
    for _ in range(n_rollouts):
        loop = OnPolicyAlgorithm.collect_rollouts if own_loop else TRPO.collect_rollouts
        goes_on = loop(model, model.env, callback, model.rollout_buffer, model.n_steps)
    return goes_on


def assert_same_contents(actual: RolloutBuffer, expected: RolloutBuffer) -> None:
    """The same rollout in two buffers; what is computed in batches is the same to 1e-5."""
    for name in EXACT:
        left, right = getattr(actual, name), getattr(expected, name)
        if not isinstance(left, dict):
            left, right = {"": left}, {"": right}
        assert left.keys() == right.keys()
        for key in left:
            assert left[key].dtype == right[key].dtype
            np.testing.assert_array_equal(left[key], right[key], err_msg=name)
    for name in CLOSE:
        left, right = getattr(actual, name), getattr(expected, name)
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert np.abs(right).max() > 0
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5, err_msg=name)
    assert (actual.pos, actual.full) == (expected.pos, expected.full)


def spread_out(model: TRPO) -> TRPO:
    """Move the parameters away from where SB3 starts, where all actions are equally likely."""
    with th.no_grad():
        for param in model.policy.parameters():
            param.add_(0.5 * th.randn(param.shape, generator=th.Generator().manual_seed(0)) / max(1, param[0].numel()) ** 0.5)
    return model


class PureExtractor(BaseFeaturesExtractor):
    """A user's own features extractor, well-behaved."""

    def __init__(self, space: spaces.Space) -> None:
        super().__init__(space, 5)
        self.network = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Dropout(0.5), nn.BatchNorm1d(5))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.network(observations)


class Case:
    """A model to compare on; the policy class that is expected to act is part of it."""

    def __init__(
        self, actor: type[actors.Actor], obs: Any = VECTOR, acts: Any = BOX_ACTIONS, policy: Any = "MlpPolicy", **kwargs: Any
    ):
        self.actor, self.obs, self.acts, self.policy, self.kwargs = actor, obs, acts, policy, kwargs

    def make(self, n_envs: int = 3, **kwargs: Any) -> TRPO:
        return spread_out(make_model(random_vec_env(n_envs, self.obs, self.acts), self.policy, **self.kwargs, **kwargs))


MLP, POLICY = actors.MlpActor, actors.Actor
WIDE = spaces.Box(np.array([-3.0, 0.0], np.float32), np.array([-1.0, 0.1], np.float32))
CASES = {
    "box": Case(MLP),
    "narrow bounds": Case(MLP, acts=WIDE),
    "float64 actions": Case(MLP, acts=spaces.Box(-1.0, 1.0, (2,), np.float64)),
    "matrix actions": Case(MLP, acts=spaces.Box(-1.0, 1.0, (2, 2))),
    "many actions": Case(MLP, acts=spaces.Box(-1.0, 1.0, (17,))),
    "discrete": Case(MLP, acts=spaces.Discrete(3)),
    "multi-discrete": Case(MLP, acts=spaces.MultiDiscrete([2, 3, 4])),
    "multi-binary": Case(MLP, acts=spaces.MultiBinary(3)),
    "squashed": Case(MLP, policy="SquashedMlpPolicy", acts=WIDE),
    "relu, no hidden layer for the critic": Case(
        MLP, policy_kwargs={"net_arch": {"pi": [8, 8], "vf": []}, "activation_fn": nn.ReLU}
    ),
    "gSDE": Case(POLICY, use_sde=True),
    "gSDE, resampled": Case(POLICY, use_sde=True, sde_sample_freq=3),
    "gSDE, squashed": Case(POLICY, use_sde=True, sde_sample_freq=4, policy_kwargs={"squash_output": True}, acts=WIDE),
    "float64 observations": Case(MLP, spaces.Box(-2.0, 2.0, (3,), np.float64)),
    "matrix observations": Case(MLP, spaces.Box(-2.0, 2.0, (3, 2))),
    "discrete observations": Case(MLP, spaces.Discrete(4)),
    "multi-discrete observations": Case(MLP, spaces.MultiDiscrete([3, 2])),
    "multi-binary observations": Case(MLP, spaces.MultiBinary(3)),
    "dict": Case(POLICY, DICT, policy="MultiInputPolicy"),
    "dict, discrete actions": Case(POLICY, DICT, spaces.Discrete(3), "MultiInputPolicy"),
    "image": Case(POLICY, IMAGE, spaces.Discrete(3), "CnnPolicy"),
    "image, shared extractor": Case(POLICY, IMAGE, policy="CnnPolicy", policy_kwargs={"share_features_extractor": True}),
    "image in an MLP": Case(MLP, IMAGE),
}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed at the end of a rollout is computed in several batches, the last one smaller."""
    monkeypatch.setattr("sb3_trpo_ext.rollout.lean.CHUNK_NUMBERS", 3 * 3 * 7)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", CASES)
def test_buffer_holds_what_sb3s_loop_puts_there(name: str) -> None:
    case = CASES[name]
    ours, theirs = case.make(), case.make()
    assert_identical(ours.get_parameters(), theirs.get_parameters())
    seen = []
    make_actor = actors.make_actor

    def make(*args: Any) -> actors.Actor:
        seen.append(make_actor(*args))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sb3_trpo_ext.rollout.lean.make_actor", make)
        assert collect(ours, own_loop=False, n_rollouts=2)
    assert [type(actor) for actor in seen] == [case.actor] * 2
    assert collect(theirs, own_loop=True, n_rollouts=2)
    assert_same_contents(ours.rollout_buffer, theirs.rollout_buffer)
    # Truncated episodes were among them: `RandomEnv` truncates every other one
    assert ours.rollout_buffer.episode_starts.sum() >= 3 * 2
    # And the next random number is the same
    assert_identical(th.get_rng_state(), _rng_state_after(case))


def _rng_state_after(case: Case) -> th.Tensor:
    """The state of the global generator after two rollouts of SB3's."""
    collect(case.make(), own_loop=True, n_rollouts=2)
    return th.get_rng_state()


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("name", ["box", "discrete", "multi-discrete", "multi-binary", "gSDE", "dict"])
def test_number_of_environments_does_not_matter(name: str, n_envs: int) -> None:
    ours, theirs = CASES[name].make(n_envs), CASES[name].make(n_envs)
    collect(ours, own_loop=False)
    collect(theirs, own_loop=True)
    assert_same_contents(ours.rollout_buffer, theirs.rollout_buffer)


@pytest.mark.parametrize("name", ["box", "float64 observations", "dict"])
def test_normalized_environment(name: str) -> None:
    case, buffers = CASES[name], []
    for own_loop in (False, True):
        keys = ["position"] if name == "dict" else None
        env = VecNormalize(random_vec_env(3, case.obs, case.acts), norm_obs_keys=keys)
        model = make_model(env, case.policy)
        collect(spread_out(model), own_loop)
        buffers.append(model.rollout_buffer)
    assert_same_contents(*buffers)


def test_truncation_adds_the_value_of_the_last_observation() -> None:
    class Short(RandomEnv):
        """Every episode is truncated after its first step, without a reward."""

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            return np.full(3, 0.5, np.float32), 0.0, False, True, {}

    model = spread_out(make_model(Short(), gamma=0.5))
    collect(model, own_loop=False)
    value = model.policy.predict_values(th.full((1, 3), 0.5)).item()
    assert abs(value) > 0.01
    np.testing.assert_allclose(model.rollout_buffer.rewards, 0.5 * value, rtol=1e-5)


def test_training_is_that_of_sb3s_loop() -> None:
    class WithOwnLoop(TRPO):
        collect_rollouts = OnPolicyAlgorithm.collect_rollouts

    kwargs: dict[str, Any] = {"n_steps": 32, "batch_size": 16, "n_critic_updates": 2, "seed": 0, "device": "cpu"}
    kwargs |= {"vf_lambda": None, "norm_obs": False, "norm_reward": False}
    models = []
    for cls in (TRPO, WithOwnLoop):
        env = DummyVecEnv([lambda: Monitor(RandomEnv())] * 2)
        models.append(cls("MlpPolicy", env, **kwargs).learn(128))
    for left, right in zip(*(model.policy.parameters() for model in models), strict=True):
        th.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)
    ours, theirs = ([(info["r"], info["l"]) for info in model.ep_info_buffer or []] for model in models)
    assert len(ours) == 2 * (64 // 10)
    assert ours == theirs


# --- The random numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["box", "many actions", "discrete", "multi-discrete", "multi-binary", "squashed"])
@pytest.mark.parametrize("n_envs", [1, 3, 16, 37])
def test_mlp_actor_draws_sb3s_actions(name: str, n_envs: int) -> None:
    model = CASES[name].make(1)
    actor = actors.make_actor(model.policy)
    observations = 2 * th.randn(n_envs, 3)
    for _ in range(50):
        state = th.get_rng_state()
        actual = actor.act(observations)
        after = th.get_rng_state()
        th.set_rng_state(state)
        with th.no_grad():
            expected = model.policy(observations)[0].numpy()
        assert_identical(after, th.get_rng_state())
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("n_envs", "expected"), [(1, 1), (3, 1), (200_000, 2)])
def test_small_networks_run_on_one_thread(n_envs: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CASES["box"].make(1)
    actor = actors.make_actor(model.policy)
    assert isinstance(actor, actors.MlpActor)
    run, seen = actor._output, []

    def output(hidden: th.Tensor) -> th.Tensor:
        seen.append(th.get_num_threads())
        return run(hidden)

    monkeypatch.setattr(actor, "_output", output)
    actor.act(th.zeros(n_envs, 3))
    assert th.get_num_threads() == 2
    with pytest.raises(KeyboardInterrupt), settings.one_thread():
        raise KeyboardInterrupt
    assert th.get_num_threads() == 2
    assert seen == [expected]


# --- What callbacks see ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["box", "discrete", "dict", "gSDE"])
def test_callbacks_see_what_sb3s_loop_shows(name: str) -> None:
    seen = []
    for own_loop in (False, True):
        # The last step truncates an episode
        model, callback = CASES[name].make(n_steps=20), Recorder(bonus=1.0)
        assert collect(model, own_loop, callback)
        seen.append((model, callback))
    (ours, actual), (theirs, expected) = seen
    assert actual.calls == expected.calls == ["start"] + ["step"] * 20 + ["end"]
    for left, right in zip(actual.steps, expected.steps, strict=True):
        for key in STEP_LOCALS:
            np.testing.assert_equal(as_arrays(left[key]), as_arrays(right[key]), err_msg=key)
    assert actual.num_timesteps == expected.num_timesteps == ours.num_timesteps
    # What a callback does to the reward gets into the buffer
    assert_same_contents(ours.rollout_buffer, theirs.rollout_buffer)
    assert ours.rollout_buffer.rewards.mean() > 0.5
    assert actual.final["n_steps"] == expected.final["n_steps"] == 20
    for key in ("values", "log_probs", "rewards"):
        np.testing.assert_allclose(actual.final[key], expected.final[key], rtol=1e-5, atol=1e-5, err_msg=key)
    assert actual.final["self"] is ours
    assert set(expected.final) - set(actual.final) <= {"idx", "done", "terminal_obs", "terminal_value"}


@pytest.mark.parametrize("name", ["box", "discrete", "gSDE", "image, shared extractor"])
def test_callbacks_see_the_distribution_of_the_step(name: str) -> None:
    class Distributions(BaseCallback):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[np.ndarray] = []

        def look(self) -> None:
            policy: Any = self.model.policy
            distribution = policy.action_dist.distribution
            self.seen.append((distribution.probs if hasattr(distribution, "probs") else distribution.mean).numpy().copy())

        def _on_step(self) -> bool:
            # What a callback looks at in between must not stay
            if self.n_calls % 5 == 0:
                assert self.locals["log_probs"].isfinite().all()
            self.look()
            return True

        def _on_rollout_end(self) -> None:
            self.look()

    found = []
    for own_loop in (False, True):
        model, callback = CASES[name].make(), Distributions()
        collect(model, own_loop, callback)
        found.append(callback.seen)
    assert len(found[0]) == len(found[1]) == 33
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("own_loop", [False, True])
def test_callbacks_see_the_environment_of_the_model(own_loop: bool) -> None:
    class Environments(BaseCallback):
        def _on_step(self) -> bool:
            assert self.locals["env"] is self.model.env
            return True

        def _on_rollout_end(self) -> None:
            assert self.locals["env"] is self.model.env

    # A policy of the user's takes SB3's loop
    model = TRPO(BetaPolicy if own_loop else "MlpPolicy", random_vec_env(2), n_steps=16, norm_reward=True, device="cpu")
    assert model.env is not None
    assert model._normalization.begin_rollout(model.policy, is_on_device=False) is not None
    model.learn(64, Environments())


@pytest.mark.parametrize("vf_lambda", [None, 0.9])
def test_what_a_callback_does_to_the_model_after_the_rollout_is_not_in_its_returns(vf_lambda: float | None) -> None:
    class Resetting(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            assert isinstance(self.model, TRPO)
            self.returns = self.model.rollout_buffer.returns.copy()
            self.model._last_obs = self.training_env.reset()  # type: ignore[assignment]
            self.model._last_episode_starts = np.ones(self.training_env.num_envs, dtype=bool)

    model = make_model(random_vec_env(2), vf_lambda=vf_lambda)
    callback = Resetting()
    _, callbacks = model._setup_learn(100, callback)
    assert model.env is not None
    assert model.collect_rollouts(model.env, callbacks, model.rollout_buffer, model.n_steps)
    assert callback.returns[-1].any()
    np.testing.assert_array_equal(model.rollout_buffer.returns, callback.returns)


@pytest.mark.parametrize("vf_lambda", [None, 0.9])
def test_returns_that_a_callback_has_changed_are_the_targets(vf_lambda: float | None) -> None:
    class Adding(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            assert isinstance(self.model, TRPO)
            self.model.rollout_buffer.returns += 5

    models = [make_model(random_vec_env(2), vf_lambda=vf_lambda) for _ in range(2)]
    for model, callback in zip(models, (None, Adding()), strict=True):
        model.learn(model.n_steps * 2, callback)
    np.testing.assert_array_equal(models[1].rollout_buffer.returns, models[0].rollout_buffer.returns + 5)
    assert log_of(models[1])["train/value_loss"] > log_of(models[0])["train/value_loss"] + 10


@pytest.mark.parametrize("name", ["box", "discrete"])
def test_callback_that_writes_into_the_actions(name: str) -> None:
    class Zeroing(BaseCallback):
        def _on_step(self) -> bool:
            self.locals["actions"][:] = 0
            return True

    buffers = []
    for own_loop in (False, True):
        model = CASES[name].make()
        collect(model, own_loop, Zeroing())
        buffers.append(model.rollout_buffer)
    assert not buffers[0].actions.any()
    # Of the actions that were taken
    assert_same_contents(buffers[0], buffers[1])


# --- What callbacks look at during a rollout -----------------------------------------------------------------------------


@th.jit.script
def doubled(x: th.Tensor) -> th.Tensor:
    return 2 * x


class Looking(BaseCallback):
    """Looks at values, log-probabilities and the buffer in some steps, and keeps what it has not looked at."""

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        self.every = every
        self.seen: list[tuple[np.ndarray, np.ndarray]] = []
        self.buffers: list[dict[str, np.ndarray]] = []
        self.kept: list[tuple[th.Tensor, th.Tensor]] = []

    def _on_step(self) -> bool:
        values, log_probs = self.locals["values"], self.locals["log_probs"]
        self.kept.append((values, log_probs))
        if self.n_calls % self.every == 0:
            assert isinstance(values, th.Tensor) and isinstance(log_probs, th.Tensor)
            self.seen.append((values.cpu().numpy(), log_probs.cpu().numpy()))
            buffer = self.locals["rollout_buffer"]
            arrays = {name: getattr(buffer, name).copy() for name in ("values", "log_probs", "rewards")}
            self.buffers.append(arrays)
        return True


@pytest.mark.parametrize("every", [1, 7, 100])
@pytest.mark.parametrize("name", ["box", "discrete", "gSDE", "dict", "image, shared extractor"])
def test_callbacks_see_what_they_see_in_sb3s_loop(name: str, every: int) -> None:
    models, callbacks = [], []
    for own_loop in (False, True):
        model, callback = CASES[name].make(), Looking(every)
        collect(model, own_loop, callback)
        models.append(model)
        callbacks.append(callback)
    (ours, theirs), (found, expected) = models, callbacks
    assert len(found.seen) == len(expected.seen) == 32 // every
    for left, right in zip(found.seen, expected.seen, strict=True):
        for actual, reference in zip(left, right, strict=True):
            assert (actual.shape, actual.dtype) == (reference.shape, reference.dtype)
            np.testing.assert_allclose(actual, reference, rtol=1e-4, atol=1e-5)
    for our_arrays, their_arrays in zip(found.buffers, expected.buffers, strict=True):
        for array, reference in their_arrays.items():
            np.testing.assert_allclose(our_arrays[array], reference, rtol=1e-4, atol=1e-5, err_msg=array)
    # The same rollout as if no callback had read anything
    assert_same_contents(ours.rollout_buffer, theirs.rollout_buffer)
    assert type(ours.rollout_buffer) is type(theirs.rollout_buffer)
    # What was kept is what it was, after an update of the policy too
    ours.train()
    for step, (values, log_probs) in enumerate(found.kept):
        np.testing.assert_allclose(values.numpy(), expected.kept[step][0].numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(log_probs.numpy(), expected.kept[step][1].numpy(), rtol=1e-4, atol=1e-5)


def test_lazy_tensors_are_tensors() -> None:
    class Using(BaseCallback):
        def _on_step(self) -> bool:
            values, log_probs = self.locals["values"], self.locals["log_probs"]
            assert values.shape == (3, 1) and log_probs.shape == (3,)
            assert len(values) == 3 and values.device.type == "cpu" and values.dtype == th.float32
            assert th.cat([values, values]).shape == (6, 1)
            assert th.stack([log_probs, log_probs], dim=0).sum().item() == pytest.approx(2 * float(log_probs.sum()), rel=1e-5)
            assert np.asarray(values).shape == (3, 1)
            assert isinstance((values + 1).mean().item(), float)
            assert (1 - values).sum() == (1 - values.clone()).sum()
            assert th.equal(copy.deepcopy(values), values)
            assert th.equal(pickle.loads(pickle.dumps(log_probs)), log_probs)
            assert "tensor(" in repr(values) and isinstance(values.tolist(), list)
            assert [row.item() for row in values] == values.flatten().tolist()
            # What Python sees nothing of
            exact = values.clone()
            for same in (
                th.tensor(values),
                th.as_tensor(values, dtype=th.float64).float(),
                th.Tensor(values),
                th.zeros(1).new_tensor(values),
                values.as_subclass(th.Tensor),
                doubled(values) / 2,
                th.vmap(lambda row: row)(values),
            ):
                assert th.equal(same, exact)
            return True

    collect(CASES["box"].make(), False, Using())


def test_what_no_callback_reads_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    evaluate = actors.MlpActor.evaluate

    def counting(self: Any, *args: Any) -> Any:
        calls.append(1)
        return evaluate(self, *args)

    monkeypatch.setattr(actors.MlpActor, "evaluate", counting)
    collect(CASES["box"].make(), False, Looking(every=1000))
    assert len(calls) == 1
    calls.clear()
    # Once per step for its values and log-probabilities together, and for what the buffer does not have yet
    collect(CASES["box"].make(), False, Looking(every=16))
    assert len(calls) == 2 * 2 + 1


@pytest.mark.parametrize("kind", [copy.deepcopy, lambda buffer: pickle.loads(pickle.dumps(buffer))], ids=["copy", "pickle"])
def test_a_copy_of_the_buffer_during_a_rollout_is_an_ordinary_one(kind: Any) -> None:
    class Copying(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 20:
                self.copy = kind(self.locals["rollout_buffer"])
            return True

    model, callback = CASES["box"].make(), Copying()
    collect(model, False, callback)
    assert type(callback.copy) is type(model.rollout_buffer) is RolloutBuffer
    assert "_evaluate" not in vars(callback.copy) | vars(model.rollout_buffer)
    np.testing.assert_allclose(callback.copy.values[:19], model.rollout_buffer.values[:19], rtol=1e-5, atol=1e-6)
    assert callback.copy.pos == 19


def test_what_was_kept_of_a_rollout_that_a_callback_ended() -> None:
    class Ending(Looking):
        def _on_step(self) -> bool:
            super()._on_step()
            return self.n_calls < 11

    kept = []
    for own_loop in (False, True):
        model, callback = CASES["box"].make(), Ending(every=1000)
        assert not collect(model, own_loop, callback)
        kept.append(callback.kept)
        np.testing.assert_array_equal(model.rollout_buffer.values[10:], 0)
    for left, right in zip(*kept, strict=True):
        for actual, reference in zip(left, right, strict=True):
            np.testing.assert_allclose(actual.numpy(), reference.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stop_at", [1, 11])
def test_callback_can_stop_the_rollout(stop_at: int) -> None:
    models = []
    for own_loop in (False, True):
        model, callback = CASES["box"].make(), Recorder(stop_at)
        assert not collect(model, own_loop, callback)
        assert callback.calls == ["start"] + ["step"] * stop_at
        models.append(model)
    ours, theirs = models
    assert ours.num_timesteps == theirs.num_timesteps == 3 * stop_at
    assert ours.rollout_buffer.pos == theirs.rollout_buffer.pos == stop_at - 1
    np.testing.assert_array_equal(ours._last_obs, theirs._last_obs)


@pytest.mark.parametrize("name", ["box", "discrete", "gSDE"])
@pytest.mark.parametrize("perturb_at", [1, 13, 32])
def test_policy_that_a_callback_changes(name: str, perturb_at: int) -> None:
    buffers = []
    for own_loop in (False, True):
        model = CASES[name].make()
        collect(model, own_loop, Recorder(perturb_at=perturb_at))
        buffers.append((model.rollout_buffer, model.get_parameters()))
    assert_identical(buffers[0][1], buffers[1][1])
    assert_same_contents(buffers[0][0], buffers[1][0])


def clone_actions(policy: Any) -> None:
    """Behavior cloning with the policy's optimizer, whose fused steps change no tensor's version."""
    observations, actions = th.randn(16, 3), th.zeros(16, 2)
    for _ in range(20):
        policy.optimizer.zero_grad()
        (-policy.evaluate_actions(observations, actions)[1].mean()).backward()
        policy.optimizer.step()


def fit_values(policy: Any) -> None:
    for _ in range(20):
        policy.optimizer.zero_grad()
        (policy.predict_values(th.ones(4, 3)) - 5).square().mean().backward()
        policy.optimizer.step()


#: What a callback may do to a policy in the middle of a rollout.
CHANGES: dict[str, Callable[[Any], Any]] = {
    "behavior cloning": clone_actions,
    "values": fit_values,
    "data of log std": lambda policy: policy.log_std.data.fill_(-1.0),
    "data of one log std": lambda policy: policy.log_std.data[1:].fill_(-1.0),
    "data of some weights": lambda policy: policy.action_net.weight.data[1].fill_(0.2),
    "data of all": lambda policy: [param.data.mul_(0.5) for param in policy.parameters()],
    "data replaced": lambda policy: setattr(policy.value_net.weight, "data", policy.value_net.weight.data + 1),
    "numpy": lambda policy: policy.value_net.weight.detach().numpy().__imul__(3.0),
    "in place": lambda policy: policy.action_net.weight.requires_grad_(False).add_(0.3).requires_grad_(True),
    "state dict": lambda policy: policy.load_state_dict({k: v + 0.1 for k, v in policy.state_dict().items()}),
    "longer": lambda policy: policy.mlp_extractor.value_net.append(nn.Tanh()),
    "freezing": lambda policy: policy.requires_grad_(False),
}


@pytest.mark.parametrize("looks", [0, 1, 5])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Softplus])
@pytest.mark.parametrize("change", CHANGES)
def test_a_policy_that_changes_in_the_middle_of_a_rollout(change: str, activation: type[nn.Module], looks: int) -> None:
    """Whatever is done, steps before it have the numbers of the policy before."""

    class Changing(Looking):
        def _on_step(self) -> bool:
            if self.n_calls in (10, 20):
                CHANGES[change](self.model.policy)
            return super()._on_step() if looks else True

    models = []
    for own_loop in (False, True):
        kwargs = {"policy_kwargs": {"net_arch": [8], "activation_fn": activation}}
        model = spread_out(make_model(random_vec_env(3), learning_rate=0.02, **kwargs))
        collect(model, own_loop, Changing(looks))
        models.append(model)
    assert_same_contents(models[0].rollout_buffer, models[1].rollout_buffer)


def test_a_policy_that_changes_in_every_step_is_watched_once() -> None:
    """As where a callback lowers the standard deviation; each watch would keep a copy of all parameters."""

    class Lowering(BaseCallback):
        def _on_step(self) -> bool:
            with th.no_grad():
                self.model.policy.get_parameter("log_std").sub_(0.01)
            self.n_hooks = len(self.model.policy.optimizer._optimizer_step_post_hooks)
            return True

        def _on_rollout_end(self) -> None:
            self.n_snapshots = sum(isinstance(each, Snapshot) for each in gc.get_objects())

    before = sum(isinstance(each, Snapshot) for each in gc.get_objects())
    buffers = []
    for own_loop in (False, True):
        model, callback = CASES["dict"].make(), Lowering()
        collect(model, own_loop, callback)
        buffers.append(model.rollout_buffer)
        if not own_loop:
            assert callback.n_hooks == 1
            # Of the policy that acted first, and of the policy now
            assert callback.n_snapshots <= before + 2
        assert not model.policy.optimizer._optimizer_step_post_hooks
    assert_same_contents(buffers[0], buffers[1])


def test_buffers_of_modules_that_change_in_the_middle_of_a_rollout() -> None:
    class Shifted(PureExtractor):
        def __init__(self, space: spaces.Space) -> None:
            super().__init__(space)
            self.shift: th.Tensor
            self.register_buffer("shift", th.zeros(3))

        def forward(self, observations: th.Tensor) -> th.Tensor:
            return super().forward(observations + self.shift)

    class Shifting(BaseCallback):
        def _on_step(self) -> bool:
            extractor = self.model.policy.get_submodule("features_extractor")
            assert isinstance(extractor, Shifted)
            if self.n_calls == 10:
                extractor.shift.add_(1)
            if self.n_calls == 20:
                extractor.shift = th.ones(3) * 2
            return True

    buffers = []
    for own_loop in (False, True):
        model = make_model(random_vec_env(3), **with_extractor(Shifted))
        collect(model, own_loop, Shifting())
        buffers.append(model.rollout_buffer)
    assert_same_contents(buffers[0], buffers[1])


def test_what_was_kept_of_a_rollout_that_failed(tmp_path: Path) -> None:
    env = DummyVecEnv([lambda: FailingEnv("error")] * 2)
    model, callback = make_model(env), Looking(every=1000)
    with pytest.raises(KeyError, match="the simulator has diverged"):
        model.learn(200, callback=callback)
    n_kept = len(callback.kept) - model.n_steps
    values = [kept[0] for kept in callback.kept[-n_kept:]]
    stored = model.rollout_buffer.values[:n_kept].copy()
    assert np.abs(stored).min() > 0
    with th.no_grad():
        for param in model.policy.parameters():
            param.add_(1.0)
    np.testing.assert_array_equal(th.cat(values).flatten().numpy(), stored.flatten())


@pytest.mark.parametrize("change", ["behavior cloning", "data of log std"])
def test_the_likelihood_of_clipped_actions_is_left_where_the_policy_is_not_the_one_that_acted(change: str) -> None:
    """The old likelihood would be that of the new policy, and all ratios 1."""

    class Changing(BaseCallback):
        def __init__(self, at: int | None) -> None:
            super().__init__()
            self.at = at

        def _on_step(self) -> bool:
            if self.n_calls == self.at:
                CHANGES[change](self.model.policy)
            return True

        def _on_rollout_end(self) -> None:
            if self.at == -1:
                CHANGES[change](self.model.policy)

    for at in (None, 16, -1):
        logs = []
        for clipped_likelihood in (True, False):
            model = make_model(clipped_likelihood=clipped_likelihood, learning_rate=0.02)
            model.learn(32, callback=Changing(at))
            logs.append(log_of(model))
        before = [log["train/policy_objective_before"] for log in logs]
        if at is None:
            assert max(map(abs, before)) < 1e-5
            assert logs[0]["train/grad_norm"] != logs[1]["train/grad_norm"]
        else:
            assert abs(before[0]) > 1e-3
            assert before[0] == before[1]


class Known(EvalCallback):
    """Of a user, though it is one of SB3's."""


def test_callbacks_of_sb3_rl_zoo_and_this_package_do_not_look() -> None:
    evaluation = EvalCallback(random_vec_env(1), callback_on_new_best=StopTrainingOnMaxEpisodes(3))
    known = CallbackList([CheckpointCallback(10, "."), evaluation, ConvertCallback(None), TrainingRecorder()])
    assert not lazy.may_look(known)
    assert not lazy.may_look(EveryNTimesteps(10, CheckpointCallback(10, ".")))
    assert lazy.may_look(ConvertCallback(lambda *_: True))
    assert lazy.may_look(Known(random_vec_env(1)))
    assert lazy.may_look(CallbackList([EveryNTimesteps(10, Looking())]))
    assert lazy.may_look(EvalCallback(random_vec_env(1), callback_after_eval=Looking()))


# --- Where SB3's loop runs ---------------------------------------------------------------------------------------------


class OwnForward(MlpPolicy):
    """Values are off by one in `forward`, and nowhere else."""

    def forward(self, obs: th.Tensor, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        actions, values, log_prob = super().forward(obs, deterministic)
        return actions, values + 1, log_prob


class OwnValues(MlpPolicy):
    def predict_values(self, obs: Any) -> th.Tensor:
        return super().predict_values(obs) + 1


class NoisyExtractor(PureExtractor):
    """Draws random numbers."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations + 0.1 * th.randn_like(observations))


class DrawingExtractor(PureExtractor):
    """Draws random numbers and does nothing with them."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        th.rand(1)
        return super().forward(observations)


class TiredGaussian(DiagGaussianDistribution):
    """Says that actions are less and less likely."""

    n_calls = 0

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        self.n_calls += 1
        return super().log_prob(actions) - self.n_calls


class OwnDistribution(MlpPolicy):
    def _build(self, lr_schedule: Schedule) -> None:
        self.action_dist = TiredGaussian(2)
        super()._build(lr_schedule)


class CountingExtractor(PureExtractor):
    """Remembers how often it was asked."""

    n_calls = 0

    def forward(self, observations: th.Tensor) -> th.Tensor:
        self.n_calls += 1
        return super().forward(observations + 0.01 * self.n_calls)


class MixingExtractor(PureExtractor):
    """Mixes the environments."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations - observations.mean(dim=0))


class OwnBuffer(RolloutBuffer):
    """Adds rewards that are twice as large."""

    def add(self, obs: Any, action: Any, reward: Any, *args: Any) -> None:
        super().add(obs, action, 2 * reward, *args)


class OwnReset(RolloutBuffer):
    def reset(self) -> None:
        super().reset()


def with_extractor(extractor: type) -> dict[str, Any]:
    return {"policy_kwargs": {"features_extractor_class": extractor, "net_arch": [8]}}


@pytest.mark.parametrize(
    ("policy", "kwargs"),
    [
        (OwnForward, {}),
        (OwnValues, {}),
        (BetaPolicy, {}),
        (OwnDistribution, {}),
        ("MlpPolicy", with_extractor(PureExtractor)),
        ("MlpPolicy", with_extractor(NoisyExtractor)),
        ("MlpPolicy", with_extractor(DrawingExtractor)),
        ("MlpPolicy", with_extractor(CountingExtractor)),
        ("MlpPolicy", with_extractor(MixingExtractor)),
        ("MlpPolicy", {"rollout_buffer_class": OwnBuffer}),
        ("MlpPolicy", {"rollout_buffer_class": OwnReset}),
    ],
    ids=["forward", "predict_values", "beta", "distribution", "own", "noisy", "drawing", "counting", "mixing", "add", "reset"],
)
def test_unusual_things_take_sb3s_loop(policy: Any, kwargs: dict[str, Any]) -> None:
    actions = spaces.Box(0.0, 1.0, (2,)) if policy is BetaPolicy else BOX_ACTIONS
    buffers = []
    for own_loop in (False, True):
        model = make_model(random_vec_env(3, VECTOR, actions), policy, **kwargs)
        collect(model, own_loop)
        assert not is_deferrable(model, model.rollout_buffer)
        buffers.append(model.rollout_buffer)
    for name in (*EXACT, *CLOSE):
        np.testing.assert_array_equal(getattr(buffers[0], name), getattr(buffers[1], name))


def test_hooks_and_patched_methods_take_sb3s_loop() -> None:
    model = CASES["box"].make()
    model._setup_learn(100)
    assert is_deferrable(model, model.rollout_buffer)
    hook = model.policy.value_net.register_forward_hook(lambda *_: None)
    assert not is_deferrable(model, model.rollout_buffer)
    hook.remove()
    assert is_deferrable(model, model.rollout_buffer)
    model.policy.forward = model.policy.forward  # type: ignore[method-assign]
    assert not is_deferrable(model, model.rollout_buffer)


def test_observations_that_the_buffer_would_round_take_sb3s_loop() -> None:
    # VecNormalize puts numbers with a fraction in the place of counts, and the buffer cuts the fraction off
    counts = spaces.Box(0, 9, (3,), np.int64)
    buffers = []
    for own_loop in (False, True):
        model = make_model(VecNormalize(random_vec_env(2, counts), norm_reward=False))
        model.rollout_buffer = RolloutBuffer(32, counts, BOX_ACTIONS, "cpu", 0.95, 0.99, 2)
        collect(spread_out(model), own_loop)
        buffers.append(model.rollout_buffer)
    for name in (*EXACT, *CLOSE):
        np.testing.assert_array_equal(getattr(buffers[0], name), getattr(buffers[1], name))


# --- Failures ----------------------------------------------------------------------------------------------------------


def assert_can_go_on(model: TRPO, folder: Path) -> None:
    """A model can be saved, loaded, and trained on an environment that works."""
    model.save(folder / "model")
    loaded = TRPO.load(folder / "model", device="cpu")
    assert_identical(loaded.get_parameters(), model.get_parameters())
    loaded.set_env(random_vec_env(model.n_envs, model.observation_space, model.action_space))
    loaded.learn(2 * loaded.n_steps)


class FailingEnv(RandomEnv):
    """
    Something goes wrong in the fortieth step.

    :param failure: what
    """

    def __init__(self, failure: str) -> None:
        super().__init__()
        self.failure = failure

    def observe(self) -> Any:
        if self.n_steps == 40:
            if self.failure == "error":
                raise KeyError("the simulator has diverged")
            if self.failure == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.failure == "interrupt":
                signal.raise_signal(signal.SIGINT)
            if self.failure == "shape":
                return np.zeros(4, np.float32)
        return super().observe()


def failing_vec_env(vec_env_cls: Any, failure: str) -> VecEnv:
    return vec_env_cls([lambda: FailingEnv(failure), RandomEnv])


@pytest.mark.parametrize(
    ("vec_env_cls", "failure", "error", "message"),
    [
        (DummyVecEnv, "error", KeyError, "the simulator has diverged"),
        (DummyVecEnv, "shape", ValueError, r"could not broadcast input array from shape \(4,\)"),
        (DummyVecEnv, "interrupt", KeyboardInterrupt, None),
        (SubprocVecEnv, "error", RuntimeError, "Worker processes of SubprocVecEnv .* after 78 timesteps: 0 with exit code 1"),
        (SubprocVecEnv, "kill", RuntimeError, "Worker processes of SubprocVecEnv .* after 78 timesteps: 0 with exit code -9"),
    ],
)
def test_environment_that_fails_leaves_a_sound_model(
    vec_env_cls: Any, failure: str, error: type[BaseException], message: str | None, tmp_path: Path
) -> None:
    reference = make_model(failing_vec_env(DummyVecEnv, "none")).learn(64)
    kwargs = {"start_method": "fork"} if vec_env_cls is SubprocVecEnv else {}
    env = vec_env_cls([lambda: FailingEnv(failure), RandomEnv], **kwargs)
    model = make_model(VecNormalize(env, norm_obs=False, norm_reward=False))
    with pytest.raises(error, match=message):
        model.learn(200)
    # As it was after the first update
    assert model.num_timesteps == 64 + 14
    assert_identical(model.get_parameters()["policy"], reference.get_parameters()["policy"])
    assert_can_go_on(model, tmp_path)
    for process in getattr(env, "processes", []):
        process.terminate()


@pytest.mark.parametrize("space", [VECTOR, DICT], ids=["vector", "dict"])
def test_wrong_shape_from_another_vec_env(space: spaces.Space, tmp_path: Path) -> None:
    class Growing(DummyVecEnv):
        """Does not check what it returns."""

        n_steps = 0

        def step_wait(self) -> Any:
            observations, *rest = super().step_wait()
            self.n_steps += 1
            if self.n_steps == 40:
                if isinstance(observations, dict):
                    observations["position"] = np.zeros((2, 4), np.float32)
                else:
                    observations = np.zeros((2, 4), np.float32)
            return (observations, *rest)

    env = Growing([lambda: RandomEnv(space)] * 2)
    model = make_model(env, "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy")
    place = "position" if isinstance(space, spaces.Dict) else "observation"
    message = rf"returned shape \(2, 4\) in its {place} for 2 environments of shape \(3,\) after 80"
    with pytest.raises(ValueError, match=message):
        model.learn(200)
    assert_can_go_on(model, tmp_path)


@pytest.mark.parametrize("own_loop", [False, True])
def test_wrong_shape_at_the_reset(own_loop: bool) -> None:
    class Wide(DummyVecEnv):
        def reset(self) -> Any:
            return np.zeros((2, 4), np.float32)

    model = make_model(Wide([RandomEnv] * 2), OwnForward if own_loop else "MlpPolicy")
    with pytest.raises(ValueError, match=r"shape \(2, 4\) in its observation for 2 environments.* after 0 timesteps"):
        model.learn(200)


@pytest.mark.parametrize(
    "action_space", [BOX_ACTIONS, spaces.Discrete(3), spaces.MultiBinary(2), spaces.MultiDiscrete([2, 2])]
)
def test_nan_is_found_where_it_is_first_used(action_space: spaces.Space) -> None:
    class Spoiling(RandomEnv):
        def observe(self) -> Any:
            observation = super().observe()
            return observation * np.float32("nan") if self.n_steps == 40 else observation

    model = make_model(Spoiling(VECTOR, action_space))
    with pytest.raises(ValueError, match="a NaN or an infinity in its observation after 40 timesteps"):
        model.learn(200)


def test_nan_in_the_policy_is_not_blamed_on_the_environment() -> None:
    model = make_model()
    with th.no_grad():
        list(model.policy.action_net.parameters())[1][0] = float("nan")
    with pytest.raises(ValueError, match="The actor's network returns a NaN"):
        model.learn(200)


def test_interrupt_in_a_callback_leaves_a_sound_model(tmp_path: Path) -> None:
    class Interrupting(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 40:
                signal.raise_signal(signal.SIGINT)
            return True

    model = make_model()
    with pytest.raises(KeyboardInterrupt):
        model.learn(200, callback=Interrupting())
    assert model.num_timesteps == 40
    assert_can_go_on(model, tmp_path)
    # The model itself can go on too
    model.learn(32, reset_num_timesteps=False)
    assert model.num_timesteps == 72
