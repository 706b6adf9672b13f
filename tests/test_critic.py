"""The critic's fit by hand against the fit by autograd."""

from typing import Any

import pytest
import torch as th
from gymnasium import spaces
from helpers import IMAGE, make_policy, relative_error, sample_observations
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_trpo_ext import critic
from sb3_trpo_ext.optim.vectors import flatten
from sb3_trpo_ext.policies import CnnPolicy, MlpPolicy, critic_structure, split_policy

BY_HAND: dict[str, dict[str, Any]] = {
    "tanh": {"net_arch": [5, 4]},
    "relu": {"activation_fn": nn.ReLU},
    "no_hidden_layer": {"net_arch": []},
    "discrete_observations": {"observation_space": spaces.Discrete(4)},
}


def fitted(policy: ActorCriticPolicy) -> tuple[th.Tensor, critic.CriticResult]:
    """The critic's parameters after two epochs on random targets, and what the fit reports."""
    parts = split_policy(policy)
    policy.optimizer = th.optim.Adam(parts.critic_params, lr=0.01)
    th.manual_seed(1)
    observations = sample_observations(policy.observation_space, 20)
    result = critic.fit_critic(policy, parts.critic_params, parts.critic_modules, observations, th.randn(20), 2, 8)
    return flatten(parts.critic_params), result


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", BY_HAND)
def test_fit_by_hand_is_the_fit_by_autograd(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(**BY_HAND[name])
    start = {key: value.clone() for key, value in policy.state_dict().items()}
    assert critic_structure(policy, split_policy(policy).critic_params) is not None
    by_hand, result = fitted(policy)
    policy.load_state_dict(start)
    monkeypatch.setattr(critic, "critic_structure", lambda *_: None)
    by_autograd, expected = fitted(policy)
    assert relative_error(by_hand, by_autograd) < 1e-12
    assert result.loss == pytest.approx(expected.loss, rel=1e-12)
    assert result.status == expected.status == "fitted"


class OwnValues(MlpPolicy):
    """A policy whose values are not the output of the last layer."""

    def predict_values(self, obs: Any) -> th.Tensor:
        """Twice the usual."""
        return 2 * super().predict_values(obs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"policy_class": OwnValues},
        {"activation_fn": nn.ELU},
        {"observation_space": IMAGE, "policy_class": CnnPolicy},
    ],
    ids=["own_values", "elu", "cnn"],
)
def test_unusual_critics_are_left_to_autograd(kwargs: dict[str, Any]) -> None:
    policy = make_policy(**kwargs)
    assert critic_structure(policy, split_policy(policy).critic_params) is None


def test_critic_with_a_hook_is_left_to_autograd() -> None:
    policy = make_policy()
    policy.value_net.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert critic_structure(policy, split_policy(policy).critic_params) is None
