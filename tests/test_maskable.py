"""MaskableTRPO: the update of a masked policy, and all that happens around it."""

import copy
import functools
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import DICT, IMAGE, VECTOR, finite_difference, relative_error
from sb3_contrib import MaskablePPO
from sb3_contrib.common.envs import InvalidActionEnvDiscrete, InvalidActionEnvMultiBinary, InvalidActionEnvMultiDiscrete
from sb3_contrib.common.maskable.buffers import MaskableRolloutBuffer
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from sb3_contrib.common.maskable.distributions import MaskableCategoricalDistribution
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper
from torch import nn

from sb3_trpo_ext import TRPO, MaskableTRPO, TrainingRecorder
from sb3_trpo_ext.optim import HessianFisher, KLConstraint
from sb3_trpo_ext.optim.vectors import assign_, flatten
from sb3_trpo_ext.update.batch import Batch
from sb3_trpo_ext.update.masks import MaskedCalls, choices
from sb3_trpo_ext.update.structure import split_policy
from sb3_trpo_ext.update.surrogate import Surrogate

ACTIONS: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Discrete(4),
    "multi_discrete": spaces.MultiDiscrete([2, 3]),
    "multi_binary": spaces.MultiBinary(2),
}
each_space = pytest.mark.parametrize("space", ACTIONS.values(), ids=list(ACTIONS))
#: Hand-written derivatives for the first, automatic differentiation for the second.
each_activation = pytest.mark.parametrize("activation", [nn.Tanh, nn.Softplus], ids=["by_hand", "autograd"])
N_SAMPLES = 7


class Game(gym.Env):
    """Random observations; the masks depend on them, and an action is worth its number."""

    def __init__(self, action_space: spaces.Space[Any], observation_space: spaces.Space[Any] = VECTOR, n_steps: int = 9):
        # Spaces have random generators of their own
        self.action_space, self.observation_space = copy.deepcopy((action_space, observation_space))
        self.n_steps = n_steps
        self.taken: list[tuple[np.ndarray, Any]] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        self.n = 0
        return self._observation(), {}

    def _observation(self) -> Any:
        self.masks = random_masks(self.action_space, 1, self.np_random)[0]
        return self.observation_space.sample()

    def action_masks(self) -> np.ndarray:
        return self.masks

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.taken.append((self.masks, action))
        self.n += 1
        return self._observation(), float(np.sum(action)), False, self.n == self.n_steps, {}


class AllValid(Game):
    """A game without invalid actions."""

    def action_masks(self) -> np.ndarray:
        return np.ones_like(self.masks)


def random_masks(space: spaces.Space[Any], n_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Masks with at least one choice for each part of an action."""
    parts = []
    for n in choices(space):
        part = rng.random((n_samples, n)) < 0.5
        part[np.arange(n_samples), rng.integers(n, size=n_samples)] = True
        parts.append(part)
    return np.concatenate(parts, axis=1)


def games(kind: type[Game], *args: Any, n_envs: int = 3) -> VecEnv:
    return make_vec_env(functools.partial(kind, *args), n_envs, seed=1)


def is_valid(space: spaces.Space[Any], masks: np.ndarray, action: Any) -> bool:
    starts = np.cumsum([0, *choices(space)[:-1]])
    return bool(masks[starts + np.atleast_1d(action)].all())


def make_surrogate(space: spaces.Space[Any], activation: type[nn.Module] = nn.Tanh, **kwargs: Any) -> Surrogate:
    """A masked policy on random observations."""
    policy: Any = MaskableActorCriticPolicy(VECTOR, space, lambda _: 1e-3, net_arch=[5], activation_fn=activation)
    for param in policy.parameters():
        nn.init.normal_(param, std=0.7)
    masks = th.as_tensor(random_masks(space, N_SAMPLES, np.random.default_rng(1)))
    # Whatever has been drawn from it before
    VECTOR.seed(0)
    observations = th.as_tensor(np.stack([VECTOR.sample() for _ in range(N_SAMPLES)]))
    with th.no_grad():
        distribution = policy.get_distribution(observations, masks)
        actions = distribution.get_actions()
        log_prob = distribution.log_prob(actions)
    batch = Batch(observations, actions, log_prob, *th.randn(3, N_SAMPLES))
    calls = MaskedCalls(policy, masks)
    return Surrogate(policy, split_policy(policy, calls).actor_params, batch, calls=calls, **kwargs)


def masks_of(surrogate: Surrogate) -> th.Tensor:
    calls = surrogate._calls
    assert isinstance(calls, MaskedCalls)
    assert calls.masks is not None
    return calls.masks


def numbers(model: TRPO) -> list[bytes]:
    return [param.detach().numpy().tobytes() for param in model.policy.parameters()]


@pytest.mark.usefixtures("float64")
@each_space
@each_activation
def test_fisher_matrix_is_the_hessian_of_the_kl(space: spaces.Space[Any], activation: type[nn.Module]) -> None:
    surrogate = make_surrogate(space, activation)
    assert (surrogate._structure is None) == (activation is nn.Softplus)
    fisher, n_params = surrogate.fisher(), sum(param.numel() for param in surrogate.params)
    units = th.eye(n_params)
    dense = th.stack([fisher @ unit for unit in units])
    with th.enable_grad():
        hessian = HessianFisher(surrogate.evaluate()[1], surrogate.params)
    assert relative_error(dense, th.stack([hessian @ unit for unit in units])) < 1e-8


@pytest.mark.usefixtures("float64")
@each_space
@each_activation
def test_gradient_is_the_slope_of_the_objective(space: spaces.Space[Any], activation: type[nn.Module]) -> None:
    surrogate = make_surrogate(space, activation, ent_coef=0.1)
    objective, gradient = surrogate.objective_and_gradient()
    with th.no_grad():
        assert objective.item() == pytest.approx(surrogate.evaluate()[0].item(), rel=1e-12)
    expected = finite_difference(lambda: float(surrogate.evaluate()[0]), surrogate.params)
    assert relative_error(gradient, expected) < 1e-7


@pytest.mark.usefixtures("float64")
@each_space
def test_objective_kl_and_entropy_are_those_of_sb3_contribs_distribution(space: spaces.Space[Any]) -> None:
    surrogate = make_surrogate(space, ent_coef=0.3)
    policy: Any = surrogate.policy
    batch, masks = surrogate.batch, masks_of(surrogate)
    old = [part.probs for part in parts_of(policy.get_distribution(batch.observations, masks))]
    assign_(surrogate.params, flatten(surrogate.params) + 0.3 * th.randn(sum(p.numel() for p in surrogate.params)))
    with th.no_grad():
        distribution = policy.get_distribution(batch.observations, masks)
        objective, kl = surrogate.evaluate()
    ratio = (distribution.log_prob(batch.actions) - batch.old_log_prob).exp()
    expected = (ratio * batch.advantages).mean() + 0.3 * distribution.entropy().mean()
    assert objective.item() == pytest.approx(expected.item(), rel=1e-9)
    pairs = zip(old, [part.probs for part in parts_of(distribution)], strict=True)
    # Where a choice is invalid both probabilities are zero
    kls = [(before * (before / after).log()).nan_to_num(0).sum(1) for before, after in pairs]
    assert kl.item() == pytest.approx(sum(kls).mean().item(), rel=1e-9)


def parts_of(distribution: Any) -> list[Any]:
    return getattr(distribution, "distributions", None) or [distribution.distribution]


@pytest.mark.usefixtures("float64")
@each_space
def test_accepted_step_fills_the_region_of_the_masked_kl(space: spaces.Space[Any]) -> None:
    surrogate = make_surrogate(space)
    result = KLConstraint(cg_damping=1e-3, max_trials=20).update(surrogate, 0.01)
    assert result.is_accepted
    assert 0.0095 <= result.kl <= 0.01
    with th.no_grad():
        assert float(surrogate.evaluate()[1]) == pytest.approx(result.kl, rel=1e-9)


@pytest.mark.usefixtures("float64")
@each_space
@each_activation
def test_states_with_a_single_valid_action_count_nothing(space: spaces.Space[Any], activation: type[nn.Module]) -> None:
    surrogate = make_surrogate(space, activation)
    starts = np.cumsum([0, *choices(space)[:-1]])
    masks = th.zeros_like(masks_of(surrogate))
    masks[:, starts] = True
    actions = th.zeros_like(surrogate.batch.actions)
    batch = surrogate.batch._replace(actions=actions, old_log_prob=th.zeros(N_SAMPLES))
    alone = Surrogate(surrogate.policy, surrogate.params, batch, calls=MaskedCalls(surrogate.policy, masks))
    _, gradient = alone.objective_and_gradient()
    assert gradient.abs().max() == 0
    assert (alone.fisher() @ th.randn(len(gradient))).abs().max() == 0
    before = flatten(alone.params)
    assert not KLConstraint().update(alone, 0.01).is_accepted
    assert th.equal(flatten(alone.params), before)


@pytest.mark.parametrize(
    ("policy", "space", "observations"),
    [
        ("MlpPolicy", ACTIONS["discrete"], VECTOR),
        ("MlpPolicy", ACTIONS["multi_discrete"], VECTOR),
        ("MultiInputPolicy", ACTIONS["discrete"], DICT),
        ("CnnPolicy", ACTIONS["multi_discrete"], IMAGE),
    ],
    ids=["mlp", "multi_discrete", "dict", "image"],
)
def test_masks_of_ones_change_no_bit(policy: str, space: spaces.Space[Any], observations: spaces.Space[Any]) -> None:
    n_steps, n_updates = (8, 3) if observations is IMAGE else (16, 10)
    kwargs: dict[str, Any] = {"n_steps": n_steps, "batch_size": 24, "seed": 2, "cg_max_steps": 5}
    if observations is IMAGE:
        kwargs["policy_kwargs"] = {"features_extractor_kwargs": {"features_dim": 8}}
    models: list[TRPO] = []
    for algorithm in (TRPO, MaskableTRPO):
        # One after the other: they draw from the same generators
        models.append(algorithm(policy, games(AllValid, space, observations), **kwargs).learn(3 * n_steps * n_updates))
        assert models[-1]._n_accepted == n_updates
    plain, masked = models
    assert numbers(plain) == numbers(masked)
    assert plain.logger.name_to_value.keys() == masked.logger.name_to_value.keys()


@each_space
def test_no_invalid_action_is_taken(space: spaces.Space[Any]) -> None:
    env = DummyVecEnv([functools.partial(Game, space)])
    model = MaskableTRPO("MlpPolicy", env, n_steps=128, seed=0)
    model.learn(256)
    assert model._n_accepted == 2
    taken = env.envs[0].taken  # type: ignore[attr-defined]
    assert len(taken) == 256
    assert all(is_valid(space, masks, action) for masks, action in taken)
    # Without asking for masks some of the same actions would have been
    model.learn(128, use_masking=False)
    assert not all(is_valid(space, masks, action) for masks, action in taken[256:])
    observations = np.stack([VECTOR.sample() for _ in range(50)])
    masks = random_masks(space, 50, np.random.default_rng(0))
    actions, _ = model.predict(observations, action_masks=masks)
    assert all(is_valid(space, *pair) for pair in zip(masks, actions, strict=True))


class _Keep(BaseCallback):
    """Keeps what MaskablePPO shows its callbacks."""

    def _on_rollout_start(self) -> None:
        self.masks: list[np.ndarray] = []

    def _on_step(self) -> bool:
        assert self.locals["use_masking"]
        self.masks.append(self.locals["action_masks"])
        return True


class _Odd(MaskableActorCriticPolicy):
    """A policy with a method of its own, which nothing is known about."""

    def get_distribution(self, *args: Any, **kwargs: Any) -> Any:
        return super().get_distribution(*args, **kwargs)


def probabilities(distribution: Any) -> np.ndarray:
    """Those of all choices, of shape ``(n_envs, n_choices)``."""
    parts = getattr(distribution, "distributions", None) or [distribution.distribution]
    return np.concatenate([part.probs.numpy() for part in parts], axis=-1)


class _LookAtDistribution(BaseCallback):
    """Compares the policy's distribution with that of the observations and the masks of the step."""

    def _on_step(self) -> bool:
        policy: Any = self.model.policy
        seen = probabilities(policy.action_dist)
        assert (seen[~self.locals["action_masks"]] == 0).all()
        with th.no_grad():
            expected = policy.get_distribution(self.locals["obs_tensor"], self.locals["action_masks"])
        np.testing.assert_allclose(seen, probabilities(expected), atol=1e-6)
        return True


@pytest.mark.parametrize("policy", ["MlpPolicy", _Odd, "MultiInputPolicy"], ids=["mlp", "users", "dict"])
@each_space
def test_callbacks_see_the_masked_distribution(policy: Any, space: spaces.Space[Any]) -> None:
    observations = DICT if policy == "MultiInputPolicy" else VECTOR
    model = MaskableTRPO(policy, games(Game, space, observations), n_steps=32, batch_size=96, seed=0)
    callback = _LookAtDistribution()
    model.learn(2 * 96, callback)
    assert callback.n_calls == 64


@pytest.mark.parametrize("policy", ["MlpPolicy", _Odd, "MultiInputPolicy"], ids=["mlp", "users", "dict"])
@pytest.mark.parametrize("space", [ACTIONS["discrete"], ACTIONS["multi_binary"]], ids=["discrete", "multi_binary"])
def test_buffer_has_what_sb3_contribs_loop_would_put_there(policy: Any, space: spaces.Space[Any]) -> None:
    observations = DICT if policy == "MultiInputPolicy" else VECTOR
    model = MaskableTRPO(policy, games(Game, space, observations), n_steps=32, batch_size=96, seed=0, norm_reward=False)
    keep = _Keep()
    model._setup_learn(1000, keep)
    keep.init_callback(model)
    assert model.collect_rollouts(model.env, keep, model.rollout_buffer, model.n_steps)
    buffer: Any = model.rollout_buffer
    assert np.array_equal(buffer.action_masks, np.stack(keep.masks))
    data = next(buffer.get())
    with th.no_grad():
        actions = data.actions.long().flatten() if isinstance(space, spaces.Discrete) else data.actions
        values, log_prob, _ = model.policy.evaluate_actions(data.observations, actions, data.action_masks)
    assert th.allclose(values.flatten(), data.old_values, atol=1e-5)
    assert th.allclose(log_prob, data.old_log_prob, atol=1e-5)
    # Truncated episodes are bootstrapped: rewards are not integers there
    assert (data.returns != data.returns.round()).any()


class _Extractor(FlattenExtractor):
    """A user's, with which sb3-contrib's loop collects the rollouts."""


def test_policies_extractors_and_buffers_of_users_learn_with_the_right_masks() -> None:
    class Buffer(MaskableRolloutBuffer):
        pass

    kwargs: dict[str, Any] = {"n_steps": 32, "batch_size": 96}
    for policy, own in (
        (_Odd, {"rollout_buffer_class": Buffer}),
        ("MlpPolicy", {"policy_kwargs": {"features_extractor_class": _Extractor}}),
    ):
        model = MaskableTRPO(policy, games(Game, ACTIONS["discrete"]), **kwargs, **own)
        model.learn(2 * 96)
        assert model._n_accepted == 2
        masks = MaskedCalls.on(model.policy, model.rollout_buffer).masks
        assert masks is not None
        assert masks[th.arange(96), model._full_batch().actions].all()
        assert not masks.all()


def test_buffer_that_shuffles_in_its_own_way_is_refused() -> None:
    class Buffer(MaskableRolloutBuffer):
        def get(self, batch_size: int | None = None) -> Any:
            return super().get(batch_size)

    model = MaskableTRPO("MlpPolicy", games(Game, ACTIONS["discrete"]), n_steps=32, batch_size=96, rollout_buffer_class=Buffer)
    with pytest.raises(ValueError, match=r"`rollout_buffer_class`: .*Buffer.get may shuffle samples away from their masks"):
        model.learn(96)


class _Truthy(Game):
    """Masks of numbers that are neither 0 nor 1."""

    def action_masks(self) -> np.ndarray:
        return 0.3 * super().action_masks()


@pytest.mark.parametrize("extractor", [FlattenExtractor, _Extractor], ids=["stock", "users"])
def test_masks_are_truth_values(extractor: type[FlattenExtractor]) -> None:
    kwargs: dict[str, Any] = {"policy_kwargs": {"features_extractor_class": extractor}}
    model = MaskableTRPO("MlpPolicy", games(_Truthy, ACTIONS["discrete"]), n_steps=32, batch_size=96, **kwargs).learn(96)
    assert model._n_accepted == 1
    masks = MaskedCalls.on(model.policy, model.rollout_buffer).masks
    assert masks is not None
    assert masks[th.arange(96), model._full_batch().actions].all()


def test_saved_model_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    # Episodes of 8 steps: none is cut off by the saving
    model = MaskableTRPO("MlpPolicy", games(Game, ACTIONS["discrete"], VECTOR, 8), n_steps=32, batch_size=96, seed=0)
    model.learn(3 * 96)
    model.save(tmp_path / "model")
    loaded = MaskableTRPO.load(tmp_path / "model")
    observations, masks = (
        np.stack([VECTOR.sample() for _ in range(20)]),
        random_masks(ACTIONS["discrete"], 20, np.random.default_rng(0)),
    )
    actions = []
    for each in (model, loaded):
        each.set_random_seed(5)
        actions.append(each.predict(observations, action_masks=masks)[0])
    assert np.array_equal(*actions)
    for each in (model, loaded):
        each.set_env(games(Game, ACTIONS["discrete"], VECTOR, 8))
        each.set_random_seed(5)
        each.learn(2 * 96, reset_num_timesteps=False)
    assert numbers(model) == numbers(loaded)


def test_recorder_evaluations_and_processes_work(tmp_path: Path) -> None:
    make = functools.partial(Game, ACTIONS["multi_discrete"])
    env = make_vec_env(make, 2, vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "fork"})
    evaluation = MaskableEvalCallback(make_vec_env(make, 1), eval_freq=32, log_path=str(tmp_path), verbose=0)
    model = MaskableTRPO("MlpPolicy", env, n_steps=32, seed=0)
    model.learn(128, callback=[TrainingRecorder(tmp_path), evaluation])
    env.close()
    assert (tmp_path / "progress.csv").exists()
    assert len(np.load(tmp_path / "evaluations.npz")["results"]) == 2


def test_nan_leaves_every_bit() -> None:
    env = games(Game, ACTIONS["discrete"])
    model = MaskableTRPO("MlpPolicy", env, n_steps=32, batch_size=96, seed=0)
    model.learn(96)
    before = numbers(model)
    model._setup_learn(96, None)
    model.collect_rollouts(env, _started(model), model.rollout_buffer, model.n_steps)
    model.rollout_buffer.advantages[0] = np.nan
    model.rollout_buffer.returns[0] = np.nan
    with pytest.warns(UserWarning, match="rejected|not fitted"):
        model.train()
    assert numbers(model) == before


def _started(model: TRPO) -> BaseCallback:
    callback = _Keep()
    callback.init_callback(model)
    return callback


def test_learns_more_with_masks_than_without() -> None:
    returns = []
    for use_masking in (True, False):
        env = InvalidActionEnvDiscrete(dim=40, n_invalid_actions=30)
        model = MaskableTRPO("MlpPolicy", env, n_steps=256, gamma=0.1, seed=0).learn(2048, use_masking=use_masking)
        returns.append(float(np.mean(evaluate_policy(model, env, warn=False, use_masking=use_masking)[0])))
    assert returns[0] > returns[1] + 15


@pytest.mark.parametrize(
    "env",
    [
        InvalidActionEnvMultiDiscrete(dims=[3, 4], n_invalid_actions=2),
        InvalidActionEnvMultiBinary(dims=4, n_invalid_actions=2),
        ActionMasker(gym.make("CartPole-v1"), lambda _: np.array([True, False])),
    ],
    ids=["multi_discrete", "multi_binary", "wrapper"],
)
def test_environments_and_wrappers_of_sb3_contrib(env: gym.Env) -> None:
    model = MaskableTRPO("MlpPolicy", env, n_steps=64, seed=0).learn(128)
    assert np.isfinite(flatten(list(model.policy.parameters())).detach()).all()
    evaluate_policy(model, env, n_eval_episodes=2, warn=False)


def test_policy_trains_in_maskable_ppo_too() -> None:
    ours = MaskableTRPO("MlpPolicy", games(Game, ACTIONS["discrete"]), n_steps=32, batch_size=96, norm_obs=False)
    ppo = MaskablePPO("MlpPolicy", games(Game, ACTIONS["discrete"]), n_steps=32, batch_size=96)
    ppo.policy.load_state_dict(ours.policy.state_dict())


# === Bad input ===


class _Broken(Game):
    def action_masks(self) -> np.ndarray:
        masks = super().action_masks()
        return {"shape": masks[:-1], "none": np.zeros_like(masks)}[self.fault]

    fault = "shape"


class _NoneValid(_Broken):
    fault = "none"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            functools.partial(_Broken, ACTIONS["discrete"]),
            r"`action_masks` of environment 0 must return 4 entries, one for each choice of Discrete\(4\)",
        ),
        (functools.partial(_NoneValid, ACTIONS["discrete"]), "environment 0 allows no action after 0 timesteps"),
        (functools.partial(gym.make, "CartPole-v1"), "no method `action_masks`: wrap it in sb3-contrib's ActionMasker"),
    ],
    ids=["shape", "none_valid", "no_masks"],
)
@pytest.mark.parametrize("extractor", [FlattenExtractor, _Extractor], ids=["stock", "users"])
def test_masks_that_make_no_sense_are_refused(make: Any, message: str, extractor: type[FlattenExtractor]) -> None:
    kwargs = {"features_extractor_class": extractor}
    model = MaskableTRPO("MlpPolicy", make_vec_env(make, 2), n_steps=32, policy_kwargs=kwargs)
    before = numbers(model)
    with pytest.raises(ValueError, match=message):
        model.learn(64)
    assert numbers(model) == before


def test_trpo_says_whose_policy_it_is() -> None:
    with pytest.raises(ValueError, match=r"`policy` must be no policy of sb3-contrib, got .*: use MaskableTRPO"):
        TRPO(MaskableActorCriticPolicy, "CartPole-v1")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"policy": ActorCriticPolicy},
            "`policy` must be a subclass of sb3-contrib's MaskableActorCriticPolicy, .*: use TRPO",
        ),
        ({"policy": "MlpLstmPolicy"}, "`policy`: MaskableTRPO has no policy 'MlpLstmPolicy'; did you mean MlpPolicy"),
        ({"env": "Pendulum-v1"}, "supports Discrete, MultiDiscrete, MultiBinary as action spaces, got Box"),
        ({"use_sde": True}, "continuous actions"),
        ({"rollout_buffer_class": RolloutBuffer}, "`rollout_buffer_class` must be one of sb3-contrib's with masks"),
    ],
    ids=["policy", "name", "space", "sde", "buffer"],
)
def test_bad_arguments_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskableTRPO(**{"policy": "MlpPolicy", "env": Game(ACTIONS["discrete"]), "n_steps": 32, **kwargs}).learn(32)


# === Code that was written for MaskablePPO ===


class _Cool(MaskableCategoricalDistribution):
    """A distribution of a user's own."""

    def proba_distribution(self, action_logits: th.Tensor) -> Any:
        return super().proba_distribution(action_logits.clamp(-10, 10) / 0.3)


class _OwnDistribution(MaskableActorCriticPolicy):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.action_dist = _Cool(4)


class _OwnHead(_OwnDistribution):
    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Any:
        return self.action_dist.proba_distribution(action_logits=self.action_net(latent_pi))


class _SeesMasks(MaskableActorCriticPolicy):
    """Logits that depend on the mask."""

    def _bent(self, distribution: Any, action_masks: Any) -> Any:
        share = th.as_tensor(action_masks, dtype=th.float32).mean(dim=-1, keepdim=True)
        distribution.distribution.logits = distribution.distribution.logits * (1 + share)
        distribution.apply_masking(action_masks)
        return distribution

    def get_distribution(self, obs: Any, action_masks: Any = None) -> Any:
        assert action_masks is not None
        return self._bent(super().get_distribution(obs), action_masks)

    def forward(self, obs: Any, deterministic: bool = False, action_masks: Any = None) -> Any:
        distribution = self.get_distribution(obs, action_masks)
        actions = distribution.get_actions(deterministic)
        return actions, self.predict_values(obs), distribution.log_prob(actions)


@pytest.mark.parametrize("policy", [_OwnDistribution, _OwnHead, _SeesMasks])
def test_the_update_has_the_distribution_of_a_users_policy(
    policy: type[MaskableActorCriticPolicy],
) -> None:
    deviations = []

    class Spy(MaskableTRPO):
        def _update_policy(self, surrogate: Any, *args: Any) -> Any:
            deviations.append(float(surrogate.deviation))
            return super()._update_policy(surrogate, *args)

    model = Spy(policy, games(Game, ACTIONS["discrete"]), n_steps=32, batch_size=32, seed=0, device="cpu").learn(4 * 96)
    assert len(deviations) == 4
    assert max(deviations) < 1e-5
    assert model._n_accepted == 4
    for env in model.env.envs:
        assert all(is_valid(ACTIONS["discrete"], masks, action) for masks, action in env.unwrapped.taken)


def test_the_masks_of_all_environments_may_come_as_one_array() -> None:
    """As from a simulator of many environments, whose ``env_method`` calls a method of its own."""

    class Batched(VecEnvWrapper):
        def reset(self) -> Any:
            return self.venv.reset()

        def step_wait(self) -> Any:
            return self.venv.step_wait()

        def env_method(self, method_name: str, *args: Any, **kwargs: Any) -> list[Any]:
            return [np.stack(self.venv.env_method(method_name))]

    models = []
    for wrapper in (Batched, None):
        VECTOR.seed(0)
        env = games(Game, ACTIONS["discrete"])
        models.append(MaskableTRPO("MlpPolicy", env if wrapper is None else wrapper(env), n_steps=32, seed=0).learn(192))
    assert numbers(models[0]) == numbers(models[1])


def test_use_masking_may_be_passed_to_collect_rollouts() -> None:
    class Timed(MaskableTRPO):
        def collect_rollouts(
            self, env: Any, callback: Any, rollout_buffer: Any, n_rollout_steps: int, use_masking: bool = True
        ) -> bool:
            return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps, use_masking)

    model = Timed("MlpPolicy", games(Game, ACTIONS["discrete"]), n_steps=32, batch_size=32, seed=0).learn(96)
    buffer: Any = model.rollout_buffer
    assert buffer.action_masks.min() == 0
    _, callback = model._setup_learn(1000, None)
    assert model.env is not None
    assert MaskableTRPO.collect_rollouts(model, model.env, callback, buffer, model.n_steps, use_masking=False)
    assert buffer.action_masks.min() == 1
