"""RecurrentTRPO: the update through time, and all that happens around it."""

import functools
import math
import threading
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import BOX_ACTIONS, DICT, IMAGE, VECTOR, finite_difference, relative_error
from sb3_contrib.common.recurrent.buffers import RecurrentRolloutBuffer
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_trpo_ext import TRPO, RecurrentTRPO, TrainingRecorder
from sb3_trpo_ext.optim import HessianFisher, KLConstraint
from sb3_trpo_ext.parallel.reductions import Shares
from sb3_trpo_ext.update import surrogate as surrogate_module
from sb3_trpo_ext.update.batch import Batch
from sb3_trpo_ext.update.sequences import RecurrentCalls, Sequences
from sb3_trpo_ext.update.settings import no_cudnn
from sb3_trpo_ext.update.structure import split_policy
from sb3_trpo_ext.update.surrogate import Limits, Surrogate

#: Episodes end after these numbers of steps, by termination and by truncation in turn.
LENGTHS = (3, 1, 5, 2)
SMALL = {"lstm_hidden_size": 4, "net_arch": []}


class Noise(gym.Env):
    """Random observations and rewards, in episodes of several lengths."""

    def __init__(self, observation_space: spaces.Space[Any] = VECTOR, action_space: spaces.Space[Any] = BOX_ACTIONS):
        self.observation_space, self.action_space = observation_space, action_space
        self.n_episodes = -1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.n, self.n_episodes = 0, self.n_episodes + 1
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.n += 1
        is_over = self.n == LENGTHS[self.n_episodes % len(LENGTHS)]
        is_truncated = self.n_episodes % 2 == 0
        reward = float(self.np_random.normal())
        return self.observation_space.sample(), reward, is_over and not is_truncated, is_over and is_truncated, {}


class Recall(gym.Env):
    """The first observation is what the action is to be in the last of four steps; those between tell nothing."""

    observation_space, action_space = spaces.Box(-1, 1, (2,)), spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.n, self.cue = 0, int(self.np_random.integers(2))
        return np.array([2 * self.cue - 1, 1], np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.n += 1
        return np.zeros(2, np.float32), float(self.n == 4 and action == self.cue), self.n == 4, False, {}


def noises(*args: Any, n_envs: int = 3) -> VecEnv:
    return make_vec_env(functools.partial(Noise, *args), n_envs, seed=1)


def make_model(policy: Any = "MlpLstmPolicy", env: VecEnv | None = None, **kwargs: Any) -> RecurrentTRPO:
    settings: dict[str, Any] = {"n_steps": 16, "batch_size": 48, "seed": 0, "policy_kwargs": SMALL}
    return RecurrentTRPO(policy, env or noises(), **{**settings, **kwargs})


def collected(model: RecurrentTRPO, n_rollouts: int = 2) -> RecurrentTRPO:
    """A model after some rollouts without an update: the last one begins in the middle of episodes."""
    _, callback = model._setup_learn(1000, None)
    assert model.env is not None
    for _ in range(n_rollouts):
        assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model


def make_surrogate(policy_kwargs: dict[str, Any] | None = None, action_space: Any = BOX_ACTIONS, **kwargs: Any) -> Surrogate:
    """A recurrent policy on sequences of several lengths, two of which begin in the middle of an episode."""
    policy: Any = RecurrentActorCriticPolicy(VECTOR, action_space, lambda _: 1e-3, **(policy_kwargs or SMALL))
    for param in policy.parameters():
        nn.init.normal_(param, std=0.7)
    n_samples, starts = 11, th.tensor([0, 4, 5, 8])
    shape = (policy.lstm_actor.num_layers, len(starts), policy.lstm_actor.hidden_size)
    begins = th.tensor([1.0, 0.0, 1.0, 0.0])[:, None]
    states = [th.randn(shape) * begins for _ in range(4)]
    calls = RecurrentCalls(policy, Sequences(starts, n_samples, (states[0], states[1]), (states[2], states[3])))
    # Whatever has been drawn from it before
    VECTOR.seed(0)
    observations = th.as_tensor(np.stack([VECTOR.sample() for _ in range(n_samples)]))
    batch = Batch(observations, *th.zeros(2, n_samples), *th.randn(3, n_samples))
    with th.no_grad():
        distribution = calls.distribution(batch, slice(None))
        actions = distribution.get_actions()
    batch = batch._replace(actions=actions, old_log_prob=distribution.log_prob(actions).detach())
    return Surrogate(policy, split_policy(policy, calls).actor_params, batch, calls=calls, **kwargs)


def numbers(model: TRPO) -> list[bytes]:
    return [param.detach().numpy().tobytes() for param in model.policy.parameters()]


# === The mathematics ===

KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    "gaussian": (SMALL, BOX_ACTIONS),
    "categorical": (SMALL, spaces.Discrete(3)),
    "two_layers": ({**SMALL, "n_lstm_layers": 2, "net_arch": [3]}, BOX_ACTIONS),
    "shared": ({**SMALL, "shared_lstm": True, "enable_critic_lstm": False}, spaces.MultiBinary(2)),
}
each_kind = pytest.mark.parametrize(("policy_kwargs", "action_space"), KINDS.values(), ids=list(KINDS))


@pytest.mark.usefixtures("float64")
@each_kind
def test_fisher_matrix_is_the_hessian_of_the_kl(policy_kwargs: dict[str, Any], action_space: spaces.Space[Any]) -> None:
    surrogate = make_surrogate(policy_kwargs, action_space)
    fisher, n_params = surrogate.fisher(), sum(param.numel() for param in surrogate.params)
    units = th.eye(n_params)[:: max(n_params // 40, 1)]
    dense = th.stack([fisher @ unit for unit in units])
    with th.enable_grad():
        hessian = HessianFisher(surrogate.evaluate()[1], surrogate.params)
    assert relative_error(dense, th.stack([hessian @ unit for unit in units])) < 1e-8


@pytest.mark.usefixtures("float64")
@each_kind
def test_gradient_is_the_slope_of_the_objective(policy_kwargs: dict[str, Any], action_space: spaces.Space[Any]) -> None:
    surrogate = make_surrogate(policy_kwargs, action_space, ent_coef=0.1)
    objective, gradient = surrogate.objective_and_gradient()
    with th.no_grad():
        assert objective.item() == pytest.approx(surrogate.evaluate()[0].item(), rel=1e-12)
    expected = finite_difference(lambda: float(surrogate.evaluate()[0]), surrogate.params)
    assert relative_error(gradient, expected) < 1e-7


@pytest.mark.usefixtures("float64")
@each_kind
def test_kl_of_a_step_is_what_sb3_contribs_policy_says_step_by_step(
    policy_kwargs: dict[str, Any], action_space: spaces.Space[Any]
) -> None:
    surrogate = make_surrogate(policy_kwargs, action_space)
    old = statistics_by_step(surrogate)
    result = KLConstraint(cg_damping=1e-3, max_trials=20).update(surrogate, 0.01)
    assert result.is_accepted
    assert 0.0095 <= result.kl <= 0.01
    kls = [surrogate.family.kl(*pair) for pair in zip(old, statistics_by_step(surrogate), strict=True)]
    assert th.cat(kls).mean().item() == pytest.approx(result.kl, rel=1e-9)


@th.no_grad()
def statistics_by_step(surrogate: Surrogate) -> list[Any]:
    """The action distributions one observation at a time, in the order of the samples."""
    policy: Any = surrogate.policy
    calls = surrogate._calls
    assert isinstance(calls, RecurrentCalls)
    sequences, statistics = calls.sequences, []
    for number, (start, length) in enumerate(zip(sequences.starts, sequences.lengths, strict=True)):
        states = tuple(state[:, [number]] for state in sequences.actor_states)
        for sample in range(int(start), int(start + length)):
            observation = surrogate.batch.observations[[sample]]  # type: ignore[index]
            distribution, states = policy.get_distribution(observation, states, th.zeros(1))
            statistics.append(surrogate.family.statistics(distribution))
    return statistics


@pytest.mark.usefixtures("float64")
def test_parts_of_a_batch_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_surrogate()
    vector = th.randn(sum(param.numel() for param in whole.params))
    monkeypatch.setattr(surrogate_module, "_CPU_LIMITS", Limits(4, 4 * whole._calls.numbers_per_sample(whole.batch)))
    parts = Surrogate(whole.policy, whole.params, whole.batch, calls=whole._calls)
    assert len(parts._chunks) == 3
    for first, second in zip(whole.objective_and_gradient(), parts.objective_and_gradient(), strict=True):
        assert relative_error(second, first) < 1e-12
    assert relative_error(parts.fisher() @ vector, whole.fisher() @ vector) < 1e-12


@pytest.mark.usefixtures("float64")
def test_stride_of_the_fisher_matrix_is_in_sequences() -> None:
    surrogate = make_surrogate(fisher_stride=2)
    calls = surrogate._calls
    assert isinstance(calls, RecurrentCalls)
    (part, share), *others = calls.cut(surrogate.batch, 100, stride=2)
    assert (part.tolist(), share, others) == ([0, 1, 2, 3, 5, 6, 7], 1.0, [])  # type: ignore[union-attr]
    vector = th.randn(sum(param.numel() for param in surrogate.params))
    actor, critic = (
        [state[:, [0, 2]] for state in states] for states in (calls.sequences.actor_states, calls.sequences.critic_states)
    )
    sequences = Sequences(th.tensor([0, 4]), 7, (actor[0], actor[1]), (critic[0], critic[1]))
    columns: Any = surrogate.batch
    batch = Batch(*(column[part] for column in columns))
    alone = Surrogate(surrogate.policy, surrogate.params, batch, calls=RecurrentCalls(surrogate.policy, sequences))
    assert relative_error(surrogate.fisher() @ vector, alone.fisher() @ vector) < 1e-12


def test_long_sequences_are_not_left_out_for_short_ones() -> None:
    """Of sequences of 1, 4, 1 and 4 samples, the first and the third would be a fifth of the samples and not half."""
    states = (th.zeros(1, 4, 2), th.zeros(1, 4, 2))
    sequences = Sequences(th.tensor([0, 1, 5, 6]), 10, states, states)
    calls, batch = RecurrentCalls(make_surrogate().policy, sequences), Batch(*(th.zeros(10) for _ in Batch._fields))

    def samples(stride: int) -> list[int]:
        parts = calls.cut(batch, 10, stride)
        assert sum(share for _, share in parts) == pytest.approx(1)
        return [int(index) for part, _ in parts for index in th.arange(10)[part]]

    assert samples(1) == list(range(10))
    assert samples(2) == [0, 1, 2, 3, 4, 5]
    assert samples(3) == [0, 6, 7, 8, 9]
    assert samples(10) == [0]


class _Cell(BaseFeaturesExtractor):
    """What an LSTM does in the first step of an episode, as layers of a feed-forward network."""

    def __init__(self, observation_space: spaces.Space[Any], lstm: Any):
        super().__init__(observation_space, lstm.hidden_size)
        self.weight, self.bias = nn.Parameter(lstm.weight_ih_l0.clone()), nn.Parameter(lstm.bias_ih_l0.clone())
        self.second_bias = nn.Parameter(lstm.bias_hh_l0.clone())

    def forward(self, observations: th.Tensor) -> th.Tensor:
        gates = nn.functional.linear(observations, self.weight, self.bias) + self.second_bias
        entry, _, cell, exit_ = gates.chunk(4, dim=1)
        return exit_.sigmoid() * (entry.sigmoid() * cell.tanh()).tanh()


@pytest.mark.usefixtures("float64")
def test_sequences_of_one_step_are_what_a_feed_forward_policy_sees() -> None:
    surrogate = make_surrogate()
    recurrent: Any = surrogate.policy
    n_samples = surrogate.n_samples
    zeros = th.zeros(1, n_samples, 4)
    calls = RecurrentCalls(recurrent, Sequences(th.arange(n_samples), n_samples, (zeros, zeros), (zeros, zeros)))
    make_cell: Any = functools.partial(_Cell, lstm=recurrent.lstm_actor)
    plain = ActorCriticPolicy(VECTOR, BOX_ACTIONS, lambda _: 1e-3, net_arch=[], features_extractor_class=make_cell)
    for name in ("action_net.weight", "action_net.bias", "log_std"):
        plain.get_parameter(name).data.copy_(recurrent.get_parameter(name))
    with th.no_grad():
        log_prob = plain.get_distribution(surrogate.batch.observations).log_prob(surrogate.batch.actions)
    batch = surrogate.batch._replace(old_log_prob=log_prob)
    for policy, way in ((recurrent, calls), (plain, None)):
        problem = Surrogate(policy, split_policy(policy, way).actor_params, batch, calls=way)
        assert KLConstraint(cg_max_steps=100, cg_tolerance=1e-12).update(problem, 0.01).is_accepted
    cell: Any = plain.features_extractor
    pairs = [
        (recurrent.lstm_actor.weight_ih_l0, cell.weight),
        (recurrent.lstm_actor.bias_ih_l0, cell.bias),
        (recurrent.lstm_actor.bias_hh_l0, cell.second_bias),
        (recurrent.action_net.weight, plain.action_net.weight),
        (recurrent.log_std, plain.log_std),
    ]
    for first, second in pairs:
        assert (first - second).abs().max() < 1e-6


# === Sequences ===


def test_minibatches_have_every_sample_once_and_whole_sequences() -> None:
    for starts in ([0], [0, 1, 2, 3, 4, 5], [0, 90], [0, 10, 20, 30, 95], [0, 5, 6, 7, 8, 60, 61]):
        zeros = (th.zeros(1, len(starts), 2),) * 2
        sequences = Sequences(th.tensor(starts), 100, zeros, zeros)
        calls = RecurrentCalls(None, sequences)  # type: ignore[arg-type]
        batch = Batch(*th.zeros(6, 100))
        for batch_size in (1, 10, 30, 100):
            sizes, weights = calls.plan(batch, batch_size, Shares())
            assert (sum(sizes), set(weights)) == (100, {1.0})
            assert len(sizes) == min(math.ceil(100 / batch_size), len(starts))
            for _ in range(10):
                minibatches = calls.minibatches(batch, sizes)
                assert len(minibatches) == len(sizes)
                assert sorted(th.cat(minibatches).tolist()) == list(range(100))
                # Each begins with a sequence, and goes on with whole ones
                for part in minibatches:
                    which, lengths = th.unique_consecutive(sequences.numbers[part], return_counts=True)
                    assert th.equal(lengths, sequences.lengths[which])


POLICIES: dict[str, tuple[str, Any, Any, dict[str, Any]]] = {
    "mlp": ("MlpLstmPolicy", VECTOR, BOX_ACTIONS, {}),
    "two_layers": ("MlpLstmPolicy", VECTOR, spaces.Discrete(3), {"n_lstm_layers": 2}),
    "shared": ("MlpLstmPolicy", VECTOR, BOX_ACTIONS, {"shared_lstm": True, "enable_critic_lstm": False}),
    "no_critic": ("MlpLstmPolicy", VECTOR, BOX_ACTIONS, {"enable_critic_lstm": False}),
    "dict": ("MultiInputLstmPolicy", DICT, spaces.MultiDiscrete([2, 3]), {}),
    "image": ("CnnLstmPolicy", IMAGE, spaces.MultiBinary(2), {"features_extractor_kwargs": {"features_dim": 5}}),
}
each_policy = pytest.mark.parametrize(("policy", "observations", "actions", "kwargs"), POLICIES.values(), ids=list(POLICIES))


@each_policy
@pytest.mark.parametrize("has_been_read", [False, True], ids=["full", "read"])
def test_values_and_likelihoods_are_those_of_sb3_contribs_loop(
    policy: str, observations: Any, actions: Any, kwargs: dict[str, Any], has_been_read: bool
) -> None:
    env = noises(observations, actions)
    model = collected(make_model(policy, env, norm_obs=False, policy_kwargs={**SMALL, **kwargs}))
    buffer = model.rollout_buffer
    # The rollout begins in the middle of an episode
    assert not buffer.episode_starts[0].all()
    if has_been_read:
        next(buffer.get())
    batch, calls = model._full_batch(), RecurrentCalls.on(model.policy, buffer)
    with th.no_grad():
        log_prob = calls.distribution(batch, slice(None)).log_prob(batch.actions)
        values = calls.values(batch, slice(None))
    assert th.allclose(log_prob, batch.old_log_prob, atol=1e-5)
    assert th.allclose(values, batch.old_values, atol=1e-5)


@each_policy
def test_each_policy_learns(policy: str, observations: Any, actions: Any, kwargs: dict[str, Any]) -> None:
    model = make_model(policy, noises(observations, actions), policy_kwargs={**SMALL, **kwargs})
    before = numbers(model)
    model.learn(3 * 48)
    assert (model._n_accepted, model._n_updates) == (3, 3)
    moved = {
        name for (name, _), one, two in zip(model.policy.named_parameters(), before, numbers(model), strict=True) if one != two
    }
    assert {"lstm_actor.weight_hh_l0", "value_net.weight"} <= moved
    assert ("lstm_critic.weight_hh_l0" in moved) == ("enable_critic_lstm" not in kwargs)
    action, states = model.predict(env_observation(model), deterministic=True)
    assert states is not None
    assert actions.contains(action[0] if not isinstance(actions, spaces.Discrete) else int(action[0]))


def env_observation(model: TRPO) -> Any:
    assert model.env is not None
    return model.env.reset()


def test_gsde_and_schedules_work_through_time() -> None:
    model = make_model(use_sde=True, sub_sampling_factor=2, ent_coef=0.01, vf_loss="huber", max_grad_norm=0.5).learn(96)
    assert model._n_accepted == 2


def test_penalty_goes_through_whole_sequences() -> None:
    model = make_model(trust_region="penalty", trust_region_kwargs={"batch_size": 16, "n_epochs": 3}).learn(96)
    assert model._n_accepted == 2
    assert model.logger.name_to_value["train/kl_divergence_loss"] > 0


class _Peek(BaseCallback):
    """Reads the rollout, which flattens what is in the buffer."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        next(iter(self.model.rollout_buffer.get(16)))  # type: ignore[attr-defined]


def test_returns_are_right_after_a_callback_has_read_the_rollout() -> None:
    models = []
    for callback in (None, _Peek()):
        VECTOR.seed(0)
        models.append(make_model(norm_obs=False, norm_reward=False).learn(48, callback=callback))
    plain, read = (model.rollout_buffer for model in models)
    assert read.generator_ready
    assert np.array_equal(plain.swap_and_flatten(plain.returns), read.returns)


def test_first_statistics_reach_what_the_network_remembers() -> None:
    """The states of the first rollout are those of normalized observations, as its values are."""
    space = spaces.Box(40.0, 60.0, (3,))
    for policy_kwargs in (SMALL, {**SMALL, "shared_lstm": True, "enable_critic_lstm": False}):
        model = collected(make_model(env=noises(space), policy_kwargs=policy_kwargs), n_rollouts=1)
        buffer: Any = model.rollout_buffer
        policy: Any = model.policy
        states: Any = RNNStates(*(tuple(th.zeros(1, 3, 4) for _ in range(2)) for _ in range(2)))
        with th.no_grad():
            for step in range(model.n_steps):
                assert np.allclose(buffer.hidden_states_vf[step], states.vf[0], atol=1e-6)
                starts = th.as_tensor(buffer.episode_starts[step])
                _, values, _, states = policy(th.as_tensor(buffer.observations[step]), states, starts)
                assert np.allclose(buffer.values[step], values[:, 0], atol=1e-5)
        for one, two in zip((*states.pi, *states.vf), (*model._last_lstm_states.pi, *model._last_lstm_states.vf), strict=True):
            assert th.allclose(one, two, atol=1e-6)


def test_truncated_episodes_are_worth_what_comes_after_them() -> None:
    """In the first rollout too, whose rewards are scaled when it is over."""
    model = collected(make_model(norm_obs=False), n_rollouts=1)
    again = collected(make_model(norm_obs=False, norm_reward=False), n_rollouts=1)
    scale = model.reward_scale.scale
    raw = again.rollout_buffer.rewards.copy()
    with th.no_grad():
        for step, index in zip(*np.nonzero(model.rollout_buffer.episode_starts[1:]), strict=True):
            difference = model.rollout_buffer.rewards[step, index] - raw[step, index] / scale
            # gamma V (1 - 1 / scale), which is zero where the episode was terminated
            assert abs(difference) < 1.0
    truncated = abs(model.rollout_buffer.rewards - raw / scale) > 1e-5
    assert 3 <= truncated.sum() <= 12


# === Around the update ===


def test_remembers_what_a_feed_forward_policy_cannot() -> None:
    env = make_vec_env(Recall, 8, seed=0)
    kwargs: dict[str, Any] = {"n_steps": 32, "batch_size": 64, "gamma": 1.0, "gae_lambda": 1.0, "seed": 0, "target_kl": 0.05}
    model = RecurrentTRPO("MlpLstmPolicy", env, policy_kwargs={"lstm_hidden_size": 16}, **kwargs).learn(8000)
    assert evaluate_policy(model, make_vec_env(Recall, 1, seed=7), n_eval_episodes=40)[0] == 1
    plain = TRPO("MlpPolicy", env, **kwargs).learn(8000)
    assert np.mean(evaluate_policy(plain, make_vec_env(Recall, 1, seed=7), n_eval_episodes=40)[0]) < 0.8


def test_saved_model_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    model = make_model(norm_reward=False).learn(96)
    model.save(tmp_path / "model")
    loaded = RecurrentTRPO.load(tmp_path / "model")
    observations, actions = VECTOR.sample(), []
    for each in (model, loaded):
        each.set_random_seed(5)
        states: Any = None
        for _ in range(3):
            action, states = each.predict(observations, state=states)
            actions.append(action)
    assert np.array_equal(actions[:3], actions[3:])
    for each in (model, loaded):
        each.set_env(noises())
        each.set_random_seed(5)
        VECTOR.seed(3)
        each.learn(96, reset_num_timesteps=False)
    assert numbers(model) == numbers(loaded)


def test_recorder_and_callbacks_work(tmp_path: Path) -> None:
    model = make_model().learn(96, callback=TrainingRecorder(tmp_path))
    assert len((tmp_path / "progress.csv").read_text().splitlines()) == 3
    assert model.logger.name_to_value["train/status"] == 0


def test_nan_leaves_every_bit() -> None:
    model = collected(make_model().learn(48), n_rollouts=1)
    before = numbers(model)
    model.rollout_buffer.advantages[0] = np.nan
    model.rollout_buffer.returns[0] = np.nan
    with pytest.warns(UserWarning, match="rejected|not fitted"):
        model.train()
    assert numbers(model) == before


# === Policies of users, and threads ===


class _GRU(nn.Module):
    """A gated recurrent unit with the interface of an LSTM: the cell stays what it is."""

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.gru = nn.GRU(input_size, hidden_size)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, 1

    def forward(self, inputs: th.Tensor, states: Any) -> tuple[th.Tensor, Any]:
        outputs, hidden = self.gru(inputs, states[0].contiguous())
        return outputs, (hidden, states[1])


class _Damped(nn.LSTM):
    def forward(self, *args: Any) -> Any:
        outputs, states = super().forward(*args)
        return th.tanh(outputs), states


@pytest.mark.parametrize("kind", [_GRU, _Damped])
def test_a_users_own_recurrent_network_is_asked_step_by_step(kind: type[nn.Module]) -> None:
    class Own(RecurrentActorCriticPolicy):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.lstm_actor: Any = kind(self.features_dim, 4)
            self.lstm_critic: Any = kind(self.features_dim, 4)
            self.optimizer = th.optim.Adam(self.parameters(), lr=1e-3)

    deviations = []

    class Spy(RecurrentTRPO):
        def _update_policy(self, surrogate: Any, *args: Any) -> Any:
            deviations.append(float(surrogate.deviation))
            return super()._update_policy(surrogate, *args)

    settings: dict[str, Any] = {"n_steps": 16, "batch_size": 48, "seed": 0, "policy_kwargs": SMALL}
    model = Spy(Own, noises(), **settings)
    before = numbers(model)
    model.learn(4 * 48)
    assert model._n_accepted == 4
    assert max(deviations) < 1e-5
    assert all(one != two for one, two in zip(before, numbers(model), strict=True))


def test_a_hook_on_the_lstm_gets_tensors_and_changes_nothing() -> None:
    VECTOR.seed(0)
    plain, seen = make_model(norm_obs=False), []
    plain.learn(96)
    VECTOR.seed(0)
    model = make_model(norm_obs=False)
    model.policy.lstm_actor.register_forward_hook(lambda *args: seen.append(args[2][0].detach().shape))
    model.learn(96)
    assert all(len(shape) == 3 for shape in seen)
    for one, two in zip(model.policy.parameters(), plain.policy.parameters(), strict=True):
        assert th.allclose(one, two, atol=1e-4)


def test_two_trainings_in_threads_leave_cudnn_as_it_was() -> None:
    with no_cudnn:
        assert not th.backends.cudnn.enabled
        threads = [threading.Thread(target=lambda: make_model().learn(48)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not th.backends.cudnn.enabled
    assert th.backends.cudnn.enabled


# === Bad input ===


class _Odd(RecurrentActorCriticPolicy):
    def get_distribution(self, *args: Any) -> Any:
        return super().get_distribution(*args)


class _Doubled(RecurrentActorCriticPolicy):
    def extract_features(self, *args: Any) -> Any:
        return super().extract_features(*args)


class _Shuffling(RecurrentRolloutBuffer):
    def get(self, batch_size: int | None = None) -> Any:
        return super().get(batch_size)


class _Buffer(RecurrentRolloutBuffer):
    pass


def test_buffers_of_users_learn() -> None:
    assert make_model(rollout_buffer_class=_Buffer).learn(96)._n_accepted == 2


def test_trpo_says_whose_policy_it_is() -> None:
    with pytest.raises(ValueError, match=r"`policy` must be no policy of sb3-contrib, got .*: use RecurrentTRPO"):
        TRPO(RecurrentActorCriticPolicy, "CartPole-v1")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"policy": "MlpPolicy"}, "`policy`: RecurrentTRPO has no policy 'MlpPolicy'; did you mean MlpLstmPolicy"),
        ({"policy": _Doubled}, "`policy`: _Doubled has a method 'extract_features' of its own"),
        ({"rollout_buffer_class": _Shuffling}, "`rollout_buffer_class`: _Shuffling.get may take the steps"),
        ({"policy_kwargs": {"lstm_kwargs": {"batch_first": True}}}, "`batch_first` change the shapes of an LSTM"),
        ({"policy": ActorCriticPolicy}, "`policy` must be a subclass of sb3-contrib's RecurrentActorCriticPolicy"),
        ({"policy": _Odd}, "`policy`: _Odd has a method 'get_distribution' of its own"),
        ({"n_steps": 1}, "`n_steps` must be at least 2 for a recurrent policy, got 1"),
        ({"rollout_buffer_class": RolloutBuffer}, "`rollout_buffer_class` must be one of sb3-contrib's for recurrent"),
    ],
    ids=["name", "extractor", "shuffled", "lstm", "policy", "method", "n_steps", "buffer"],
)
def test_bad_arguments_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**kwargs)
