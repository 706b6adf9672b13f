"""Which parameters are whose, which actors are plain MLPs, and the policies with a tanh."""

import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from agents import RandomEnv, log_of, make_model
from gymnasium import spaces
from helpers import BOX_ACTIONS, DICT, IMAGE, VECTOR, BetaPolicy, make_policy, sample_observations
from stable_baselines3.common.distributions import Distribution, SquashedDiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn
from torch.nn.utils import parametrizations

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.policies import (
    CnnPolicy,
    MlpPolicy,
    MultiInputPolicy,
    SquashedCnnPolicy,
    SquashedMlpPolicy,
    SquashedMultiInputPolicy,
)
from sb3_trpo_ext.update.distributions import family_of
from sb3_trpo_ext.update.structure import mlp_structure, split_policy

#: Actions whose bounds are neither symmetric nor the same for each dimension.
SKEWED = spaces.Box(np.array([-3.0, 0.1], np.float32), np.array([1.0, 0.2], np.float32))
SMALL_CNN = {"features_extractor_kwargs": {"features_dim": 8}}


class SharedTrunk(MlpPolicy):
    """Actor and critic share a layer that has "value" in its name, and each has one of its own with a misleading name."""

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        self.value_trunk = nn.Linear(3, 3)
        self.value_of_the_actor = nn.Parameter(th.ones(2))
        self.policy_of_the_critic = nn.Parameter(th.ones(1))
        self.unused = nn.Parameter(th.ones(1))

    def get_distribution(self, obs: PyTorchObs) -> Distribution:
        features = self.extract_features(obs, self.pi_features_extractor)
        latent = self.mlp_extractor.forward_actor(self.value_trunk(features))
        mean = self.action_net(latent) * self.value_of_the_actor
        return self.action_dist.proba_distribution(mean, self.log_std)

    def predict_values(self, obs: PyTorchObs) -> th.Tensor:
        features = self.extract_features(obs, self.vf_features_extractor)
        return self.value_net(self.mlp_extractor.forward_critic(self.value_trunk(features))) * self.policy_of_the_critic


def names(policy: nn.Module, params: list[nn.Parameter]) -> set[str]:
    """Under which names a policy lists these parameters."""
    wanted = {id(param) for param in params}
    return {name for name, param in policy.named_parameters() if id(param) in wanted}


POLICIES: dict[str, dict[str, Any]] = {
    "mlp": {},
    "mlp_separate_nets": {"net_arch": {"pi": [4], "vf": [5, 3]}},
    "mlp_no_hidden_layer": {"net_arch": []},
    "squashed": {"policy_class": SquashedMlpPolicy},
    "categorical": {"action_space": spaces.Discrete(3)},
    "gsde": {"use_sde": True},
    "gsde_squashed": {"use_sde": True, "squash_output": True},
    "cnn": {"observation_space": IMAGE, "policy_class": CnnPolicy, **SMALL_CNN},
    "cnn_shared": {"observation_space": IMAGE, "policy_class": CnnPolicy, "share_features_extractor": True, **SMALL_CNN},
    "dict": {"observation_space": DICT, "policy_class": MultiInputPolicy},
    "dict_with_image": {
        "observation_space": spaces.Dict({"image": IMAGE, "vector": VECTOR}),
        "policy_class": MultiInputPolicy,
        "features_extractor_kwargs": {"cnn_output_dim": 8},
    },
    "users_distribution": {"policy_class": BetaPolicy, "action_space": spaces.Box(0.0, 1.0, (2,))},
    "shared_trunk": {"policy_class": SharedTrunk},
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", POLICIES)
def test_split_is_what_moves_the_outputs(name: str) -> None:
    """The definition: a parameter is the actor's if the log-probabilities change with it, whatever it is called."""
    policy = make_policy(**POLICIES[name])
    parts = split_policy(policy)
    observations = sample_observations(policy.observation_space, 4)
    with th.no_grad():
        if policy.use_sde:
            policy.reset_noise(4)
        actions = policy.get_distribution(observations).get_actions()

    def outputs() -> tuple[th.Tensor, th.Tensor]:
        with th.no_grad():
            return policy.get_distribution(observations).log_prob(actions), policy.predict_values(observations)

    log_prob, values = outputs()
    expected_actor, expected_critic = [], []
    for param in policy.parameters():
        before = param.detach().clone()
        with th.no_grad():
            # A shift alone could be invisible, such as that of all logits
            param.add_(th.randn_like(param))
        new_log_prob, new_values = outputs()
        if not th.equal(new_log_prob, log_prob):
            expected_actor.append(param)
        elif not th.equal(new_values, values):
            expected_critic.append(param)
        with th.no_grad():
            param.copy_(before)

    assert [id(param) for param in parts.actor_params] == [id(param) for param in expected_actor]
    assert [id(param) for param in parts.critic_params] == [id(param) for param in expected_critic]
    assert expected_actor
    assert expected_critic


def test_names_do_not_matter() -> None:
    policy = make_policy(policy_class=SharedTrunk)
    parts = split_policy(policy)
    assert {"value_trunk.weight", "value_trunk.bias", "value_of_the_actor", "log_std"} <= names(policy, parts.actor_params)
    assert {"policy_of_the_critic", "value_net.weight"} <= names(policy, parts.critic_params)
    assert "unused" not in names(policy, parts.actor_params) | names(policy, parts.critic_params)


def test_shared_extractor_belongs_to_the_actor() -> None:
    policy = make_policy(IMAGE, BOX_ACTIONS, CnnPolicy, share_features_extractor=True, **SMALL_CNN)
    parts = split_policy(policy)
    assert all(name.startswith(("mlp_extractor.value_net", "value_net")) for name in names(policy, parts.critic_params))
    shared = set(policy.features_extractor.modules())
    assert shared.isdisjoint(parts.critic_modules)
    assert {id(param) for param in policy.features_extractor.parameters()} <= {id(param) for param in parts.actor_params}


@pytest.mark.parametrize("policy_class", [CnnPolicy, SquashedCnnPolicy, MultiInputPolicy, SquashedMultiInputPolicy])
def test_features_extractor_is_not_shared_by_default(policy_class: type[ActorCriticPolicy]) -> None:
    is_cnn = "Cnn" in policy_class.__name__
    policy = make_policy(
        IMAGE if is_cnn else spaces.Dict({"image": IMAGE}),
        BOX_ACTIONS,
        policy_class,
        features_extractor_kwargs={"features_dim": 8} if is_cnn else {"cnn_output_dim": 8},
    )
    parts = split_policy(policy)
    assert policy.pi_features_extractor is not policy.vf_features_extractor
    actor, critic = names(policy, parts.actor_params), names(policy, parts.critic_params)
    # SB3 registers the actor's a second time, as `features_extractor`
    assert any(name.startswith(("features_extractor", "pi_features_extractor")) for name in actor)
    assert any(name.startswith("vf_features_extractor") for name in critic)
    # A ModuleDict is never called, only what it holds
    called = {module for module in policy.vf_features_extractor.modules() if not isinstance(module, nn.ModuleDict)}
    assert called <= set(parts.critic_modules)
    assert set(policy.pi_features_extractor.modules()).isdisjoint(parts.critic_modules)


def test_critic_modules_are_those_that_only_the_values_go_through() -> None:
    policy = make_policy()
    modules = set(split_policy(policy).critic_modules)
    assert {policy.value_net, *policy.mlp_extractor.value_net} <= modules
    # The extractor as a whole is never called, only its two halves
    assert modules.isdisjoint({policy, policy.mlp_extractor, policy.action_net, *policy.mlp_extractor.policy_net})


def test_frozen_parameters_are_nobodys() -> None:
    policy = make_policy(net_arch={"pi": [4, 3], "vf": [4, 3]})
    frozen = [policy.mlp_extractor.policy_net[0].weight, policy.mlp_extractor.value_net[0].weight]
    for param in frozen:
        param.requires_grad_(False)
    parts = split_policy(policy)
    assert {id(param) for param in frozen}.isdisjoint({id(param) for param in parts.actor_params + parts.critic_params})
    assert len(parts.actor_params) == 6  # three layers with two parameters each, without one, and the log std
    assert len(parts.critic_params) == 5


@pytest.mark.parametrize("part", ["action", "value"])
def test_a_part_that_is_frozen_entirely_is_empty(part: str) -> None:
    policy = make_policy()
    for name, param in policy.named_parameters():
        is_critic = "value" in name
        param.requires_grad_(is_critic if part == "action" else not is_critic)
    parts = split_policy(policy)
    frozen, trained = parts.actor_params, parts.critic_params
    if part == "value":
        frozen, trained = trained, frozen
    assert not frozen
    assert trained
    policy.requires_grad_(False)
    assert split_policy(policy)[:2] == ([], [])


@pytest.mark.parametrize("mode", [True, False])
def test_split_leaves_the_policy_as_it_was(mode: bool) -> None:
    policy = make_policy(activation_fn=lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Tanh()))
    policy.set_training_mode(mode)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    parts = split_policy(policy)
    assert all(th.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert all(module.training == mode for module in policy.modules())
    assert not any(module._forward_pre_hooks for module in policy.modules())
    assert all(param.grad is None for param in policy.parameters())
    # The weights of the normalization are parameters like others
    assert any(isinstance(module, nn.BatchNorm1d) for module in parts.critic_modules)


STOCK: dict[str, dict[str, Any]] = {
    "gaussian": {},
    "squashed": {"policy_class": SquashedMlpPolicy},
    "categorical": {"action_space": spaces.Discrete(3)},
    "multi_categorical": {"action_space": spaces.MultiDiscrete([2, 3])},
    "bernoulli": {"action_space": spaces.MultiBinary(2)},
    "no_hidden_layer": {"net_arch": []},
    "three_hidden_layers": {"net_arch": {"pi": [5, 4, 3], "vf": [2]}},
    "relu": {"activation_fn": nn.ReLU},
    "discrete_observations": {"observation_space": spaces.Discrete(4)},
    "two_dimensional_observations": {"observation_space": spaces.Box(-1.0, 1.0, (2, 2))},
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", STOCK)
def test_stock_actor_is_recognised_as_the_mlp_that_it_is(name: str) -> None:
    policy = make_policy(**STOCK[name])
    structure = mlp_structure(policy, split_policy(policy).actor_params)
    assert structure is not None
    assert (structure.log_std is not None) == isinstance(policy.action_space, spaces.Box)
    # The layers and activations, one after the other, are what the policy computes
    observations = sample_observations(policy.observation_space, 5)
    if isinstance(policy.observation_space, spaces.Discrete):
        hidden = nn.functional.one_hot(observations, int(policy.observation_space.n)).double()
    else:
        hidden = observations.double().flatten(start_dim=1)
    for layer, activation in zip(structure.layers, [*structure.activations, nn.Identity()], strict=True):
        hidden = activation(layer(hidden))
    distribution = policy.get_distribution(observations)
    family = family_of(distribution)
    first, *others = family.statistics(distribution)
    # The KL, because PyTorch normalizes logits; it sees a difference of 1e-6
    assert first.shape == hidden.shape
    assert family.kl((first, *others), (hidden, *others)).abs().max() < 1e-12
    assert all(
        th.equal(other, structure.log_std.expand_as(other).exp().log()) for other in others if structure.log_std is not None
    )


class OverriddenDistribution(MlpPolicy):
    def get_distribution(self, obs: PyTorchObs) -> Distribution:
        return super().get_distribution(obs)


class OverriddenLatent(MlpPolicy):
    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Distribution:
        return super()._get_action_dist_from_latent(latent_pi)


class OddLinear(nn.Linear):
    pass


class OddTanh(nn.Tanh):
    pass


def first_layer(policy: ActorCriticPolicy) -> nn.Linear:
    return policy.mlp_extractor.policy_net[0]  # type: ignore[return-value]


def tie(policy: ActorCriticPolicy) -> None:
    policy.mlp_extractor.policy_net[2].weight = first_layer(policy).weight


#: What a user may do to a policy, so that it is no plain MLP any more.
CHANGES: dict[str, Callable[[ActorCriticPolicy], object]] = {
    "forward_hook": lambda policy: first_layer(policy).register_forward_hook(lambda module, args, output: 2 * output),
    "forward_pre_hook": lambda policy: policy.action_net.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "hook_on_the_activation": lambda policy: policy.mlp_extractor.policy_net[1].register_forward_hook(lambda *args: None),
    "hook_on_the_container": lambda policy: policy.mlp_extractor.policy_net.register_forward_hook(lambda *args: None),
    "hook_on_the_features": lambda policy: policy.pi_features_extractor.register_forward_hook(lambda *args: None),
    "spectral_norm": lambda policy: parametrizations.spectral_norm(first_layer(policy)),
    "weight_norm": lambda policy: parametrizations.weight_norm(first_layer(policy)),
    "orthogonal": lambda policy: parametrizations.orthogonal(policy.action_net),
    "old_weight_norm": lambda policy: th.nn.utils.weight_norm(first_layer(policy)),
    "old_spectral_norm": lambda policy: th.nn.utils.spectral_norm(first_layer(policy)),
    "subclass_of_linear": lambda policy: policy.mlp_extractor.policy_net.__setitem__(0, OddLinear(3, 3)),
    "subclass_of_tanh": lambda policy: policy.mlp_extractor.policy_net.__setitem__(1, OddTanh()),
    "dropout": lambda policy: policy.mlp_extractor.policy_net.append(nn.Dropout()),
    "two_activations": lambda policy: policy.mlp_extractor.policy_net.append(nn.Tanh()),
    "two_layers_in_a_row": lambda policy: policy.mlp_extractor.policy_net.append(nn.Linear(3, 3)),
    "activation_first": lambda policy: policy.mlp_extractor.policy_net.insert(0, nn.Tanh()),
    "deep_action_net": lambda policy: setattr(policy, "action_net", nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))),
    "layer_without_bias": lambda policy: setattr(policy, "action_net", nn.Linear(3, 2, bias=False)),
    "tied_weights": tie,
    "same_layer_twice": lambda policy: policy.mlp_extractor.policy_net.__setitem__(2, first_layer(policy)),
    "frozen_weight": lambda policy: first_layer(policy).weight.requires_grad_(False),
    "frozen_log_std": lambda policy: policy.log_std.requires_grad_(False),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_actor_that_was_changed_is_left_to_autograd(name: str) -> None:
    policy = make_policy(net_arch=[3, 3])
    assert mlp_structure(policy, split_policy(policy).actor_params) is not None
    CHANGES[name](policy)
    assert mlp_structure(policy, split_policy(policy).actor_params) is None


OTHERS: dict[str, dict[str, Any]] = {
    "gsde": {"use_sde": True},
    "overridden_get_distribution": {"policy_class": OverriddenDistribution},
    "overridden_latent": {"policy_class": OverriddenLatent},
    "users_distribution": {"policy_class": BetaPolicy, "action_space": spaces.Box(0.0, 1.0, (2,))},
    "softplus": {"activation_fn": nn.Softplus},
    "prelu": {"activation_fn": nn.PReLU},
    "layer_norm": {"activation_fn": lambda: nn.LayerNorm(4)},
    "images": {"observation_space": IMAGE, "policy_class": CnnPolicy, **SMALL_CNN},
    "dict": {"observation_space": DICT, "policy_class": MultiInputPolicy},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_actors_are_left_to_autograd(name: str) -> None:
    policy = make_policy(**OTHERS[name])
    assert mlp_structure(policy, split_policy(policy).actor_params) is None


SQUASHED: dict[str, tuple[type[ActorCriticPolicy], spaces.Space, dict[str, Any]]] = {
    "mlp": (SquashedMlpPolicy, VECTOR, {}),
    "cnn": (SquashedCnnPolicy, IMAGE, SMALL_CNN),
    "multi_input": (SquashedMultiInputPolicy, DICT, {}),
}


@pytest.mark.parametrize("name", SQUASHED)
def test_squashed_policy_stays_within_the_bounds_and_reaches_far(name: str) -> None:
    policy_class, observation_space, kwargs = SQUASHED[name]
    policy = make_policy(observation_space, SKEWED, policy_class, **kwargs)
    assert policy.squash_output
    assert isinstance(policy.action_dist, SquashedDiagGaussianDistribution)
    with th.no_grad():
        policy.log_std.fill_(math.log(3.0))
    tensors = sample_observations(observation_space, 200)
    observations = {key: value.numpy() for key, value in tensors.items()} if isinstance(tensors, dict) else tensors.numpy()
    actions, _ = policy.predict(observations)
    # The last step of the way from [-1, 1] to the bounds rounds
    margin = 1e-6 * (SKEWED.high - SKEWED.low)
    assert (actions >= SKEWED.low - margin).all()
    assert (actions <= SKEWED.high + margin).all()
    # To within 1% of both bounds, which a Gaussian of this std does often
    reach = 0.01 * (SKEWED.high - SKEWED.low)
    assert (actions.min(axis=0) < SKEWED.low + reach).all()
    assert (actions.max(axis=0) > SKEWED.high - reach).all()
    deterministic, _ = policy.predict(observations, deterministic=True)
    with th.no_grad():
        mean = policy.get_distribution(tensors).distribution.loc.numpy()  # type: ignore[union-attr]
    expected = SKEWED.low + (np.tanh(mean) + 1) / 2 * (SKEWED.high - SKEWED.low)
    np.testing.assert_allclose(deterministic, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SQUASHED)
def test_squashed_policy_refuses_gsde(name: str) -> None:
    policy_class, observation_space, kwargs = SQUASHED[name]
    with pytest.raises(ValueError, match=f"{policy_class.__name__} is for `use_sde=False`"):
        make_policy(observation_space, SKEWED, policy_class, use_sde=True, **kwargs)


@pytest.mark.parametrize(
    "action_space",
    [
        spaces.Discrete(3),
        spaces.Box(-np.inf, np.inf, (2,)),
        spaces.Box(np.array([-1.0, -np.inf], np.float32), np.array([1.0, 1.0], np.float32)),
    ],
    ids=["discrete", "unbounded", "half_bounded"],
)
def test_squashed_policy_refuses_actions_without_bounds(action_space: spaces.Space) -> None:
    with pytest.raises(ValueError, match="SquashedMlpPolicy needs a Box action space with finite bounds"):
        make_policy(VECTOR, action_space, SquashedMlpPolicy)


@pytest.mark.parametrize("name", SQUASHED)
def test_squashed_policy_survives_saving(name: str, tmp_path: Path) -> None:
    policy_class, observation_space, kwargs = SQUASHED[name]
    policy = make_policy(observation_space, SKEWED, policy_class, **kwargs)
    policy.save(str(tmp_path / "policy.pth"))
    loaded = policy_class.load(str(tmp_path / "policy.pth"), device="cpu")
    assert loaded.squash_output
    assert isinstance(loaded.action_dist, SquashedDiagGaussianDistribution)
    observations = sample_observations(observation_space, 5)
    mine, theirs = (p.get_distribution(observations).distribution for p in (policy, loaded))
    assert isinstance(mine, th.distributions.Normal)
    assert isinstance(theirs, th.distributions.Normal)
    assert th.equal(mine.loc, theirs.loc)
    assert th.equal(mine.scale, theirs.scale)


@pytest.mark.parametrize("policy_class", [MlpPolicy, CnnPolicy, MultiInputPolicy, *(kind for kind, _, _ in SQUASHED.values())])
def test_policy_has_its_name_as_alias(policy_class: type[ActorCriticPolicy]) -> None:
    alias = "MlpPolicy" if policy_class is MlpPolicy else policy_class.__name__
    assert TRPO.policy_aliases[alias] is policy_class


# --- The features extractors of actor and critic -------------------------------------------------------------------------


class Features(BaseFeaturesExtractor):
    def __init__(self, observation_space: spaces.Box):
        super().__init__(observation_space, features_dim=4)
        self.layer = nn.Linear(observation_space.shape[0], 4)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layer(observations)


class SubclassedMlp(MlpPolicy):
    pass


OWN: dict[str, Any] = {"net_arch": [], "features_extractor_class": Features}


@pytest.mark.parametrize(
    ("policy", "space", "kwargs", "is_shared"),
    [
        ("MlpPolicy", VECTOR, {}, True),
        ("MlpPolicy", VECTOR, OWN, False),
        ("MlpPolicy", VECTOR, {**OWN, "share_features_extractor": True}, True),
        (ActorCriticCnnPolicy, IMAGE, SMALL_CNN, False),
        (SubclassedMlp, VECTOR, OWN, True),
    ],
)
@pytest.mark.parametrize("norm_obs", ["auto", True])
def test_the_critic_has_features_that_it_can_train(
    policy: Any, space: spaces.Space[Any], kwargs: dict[str, Any], is_shared: bool, norm_obs: Any, tmp_path: Path
) -> None:
    """With any policy of SB3 whose extractor has something to train; a user's own class is as the user made it."""
    settings = {"n_steps": 8, "batch_size": 8, "device": "cpu", "norm_obs": norm_obs if policy == "MlpPolicy" else "auto"}
    model = TRPO(policy, RandomEnv(space), policy_kwargs=dict(kwargs), **settings)  # type: ignore[arg-type]
    assert model.policy.share_features_extractor == is_shared
    assert model.policy_kwargs == kwargs
    model.learn(16)
    model.save(tmp_path / "model")
    loaded = TRPO.load(tmp_path / "model", env=RandomEnv(space), device="cpu", policy_kwargs=dict(kwargs))
    assert loaded.policy.share_features_extractor == is_shared
    loaded.learn(8)


def test_models_of_earlier_versions_share_what_they_shared(tmp_path: Path) -> None:
    model = TRPO("MlpPolicy", RandomEnv(), policy_kwargs={**OWN, "share_features_extractor": True}, n_steps=8, device="cpu")
    model.policy_kwargs = OWN
    model.save(tmp_path / "model", exclude=["_own_extractors"])
    loaded = TRPO.load(tmp_path / "model", env=RandomEnv(), device="cpu")
    assert loaded.policy.share_features_extractor
    loaded.learn(8)


# --- Policies that do more than SB3's -----------------------------------------------------------------------------------


class TwoRates(MlpPolicy):
    """One with an optimizer of its own."""

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        heads = {id(param) for part in (self.action_net, self.value_net) for param in part.parameters()}
        groups = [
            {"params": [param for param in self.parameters() if (id(param) in heads) == are_heads], "weight_decay": decay}
            for are_heads, decay in ((False, 0.01), (True, 0.0))
        ]
        self.optimizer = th.optim.AdamW(groups, lr=1e-4)


def test_an_optimizer_that_a_policy_has_made_stays() -> None:
    model = make_model(policy=TwoRates).learn(64)
    assert type(model.policy.optimizer) is th.optim.AdamW
    assert [group["weight_decay"] for group in model.policy.optimizer.param_groups] == [0.01, 0.0]
    assert log_of(model)["train/value_status_name"] == "fitted"
    assert make_model().policy.optimizer.param_groups[0]["fused"]


class Tripled(MlpPolicy):
    """One that acts and learns by different methods of SB3: only `forward` goes through this one."""

    def extract_features(self, obs: PyTorchObs, features_extractor: Any = None) -> Any:
        return 3 * super().extract_features(obs, features_extractor)


def test_a_policy_that_is_not_trained_as_it_acts_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="Tripled acts by `forward` and is trained by `get_distribution`"):
        make_model(policy=Tripled, target_kl=0.1).learn(160)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_model().learn(160)


def features(forward: Any, make: Any = lambda self: None) -> dict[str, Any]:
    """``policy_kwargs`` with an extractor that does this with the observations; ``make`` gives it further parts."""

    class Own(BaseFeaturesExtractor):
        def __init__(self, observation_space: Any):
            super().__init__(observation_space, features_dim=4)
            self.layers = nn.ModuleList(nn.Linear(3, 4) for _ in range(2))
            make(self)

        def forward(self, observations: Any) -> th.Tensor:
            return forward(self, observations)

    return {"net_arch": [], "features_extractor_class": Own}


def by_sign(self: Any, observations: th.Tensor) -> th.Tensor:
    """One layer for positive observations and one for all others, as with a head for each task."""
    outputs = observations.new_zeros(len(observations), 4)
    for layer, chosen in zip(self.layers, (observations[:, 0] > 0, observations[:, 0] <= 0), strict=True):
        if chosen.any():
            outputs[chosen] = layer(observations[chosen])
    return outputs


def never_zero(self: Any, observations: th.Tensor) -> th.Tensor:
    """Fails for observations of zeros, as attention does if a mask leaves nothing."""
    assert (observations != 0).any(dim=1).all()
    return self.layers[0](observations) + self.layers[1](observations)


def squeezed(self: Any, observations: th.Tensor) -> th.Tensor:
    """Loses the first dimension of a batch of one."""
    return (self.layers[0](observations) + self.layers[1](observations)).unsqueeze(1).squeeze()


@pytest.mark.parametrize("forward", [by_sign, never_zero, squeezed])
@pytest.mark.parametrize("shared", [False, True])
def test_parameters_are_trained_that_only_some_observations_use(forward: Any, shared: bool) -> None:
    kwargs = {**features(forward), "share_features_extractor": shared}
    # A terminal observation alone would be a batch of one, for SB3 as well
    env = DummyVecEnv([lambda: Endless() for _ in range(3)])
    model = make_model(env, policy_kwargs=kwargs, n_steps=16)
    before = {name: param.detach().clone() for name, param in model.policy.named_parameters()}
    model.learn(3 * 48)
    assert model._n_accepted == 3
    assert all(not th.equal(before[name], param) for name, param in model.policy.named_parameters())


class Endless(RandomEnv):
    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, *_, info = super().step(action)
        return observation, reward, False, False, info


@pytest.fixture
def checked_distributions() -> Iterator[None]:
    """`torch.compile` switches the checks of distributions off, for the whole process."""
    yield
    th.distributions.Distribution.set_default_validate_args(True)


@pytest.mark.usefixtures("checked_distributions")
def test_compiled_and_scripted_modules_and_sparse_buffers_are_taken() -> None:
    def make(self: Any) -> None:
        self.scripted = th.jit.script(nn.Linear(3, 4))
        self.compiled = th.compile(self.layers[1], backend="eager")
        self.register_buffer("graph", th.eye(3).to_sparse())

    def forward(self: Any, observations: th.Tensor) -> th.Tensor:
        both = self.layers[0](observations) + self.compiled(observations)
        return both + self.scripted(th.sparse.mm(self.graph, observations.T).T)

    model = make_model(policy_kwargs=features(forward, make))
    before = model.policy.features_extractor.scripted.weight.detach().clone()  # type: ignore[union-attr, operator]
    model.learn(64)
    assert model._n_accepted > 0
    assert not th.equal(model.policy.features_extractor.scripted.weight, before)  # type: ignore[union-attr, arg-type]


def test_parameters_of_several_dtypes_are_refused() -> None:
    def make(self: Any) -> None:
        self.layers[1].double()

    def forward(self: Any, observations: th.Tensor) -> th.Tensor:
        return self.layers[0](observations) + self.layers[1](observations.double()).float()

    with pytest.raises(ValueError, match=r"that are trained must be of one dtype, got torch.float32, torch.float64"):
        make_model(policy_kwargs=features(forward, make))


class OwnCritic(MlpPolicy):
    """Its values come from `forward` only."""

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        self.mine = nn.Linear(3, 1)
        nn.init.constant_(self.mine.bias, 1)

    def forward(self, obs: th.Tensor, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        actions, _, log_prob = super().forward(obs, deterministic)
        return actions, self.mine(obs), log_prob


def test_a_critic_that_is_not_trained_as_it_acts_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="`forward` and `predict_values` of OwnCritic differ"):
        make_model(policy=OwnCritic).learn(32)
