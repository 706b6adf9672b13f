"""The critic's fit by hand against the fit by autograd."""

from typing import Any

import pytest
import torch as th
from gymnasium import spaces
from helpers import IMAGE, make_policy, relative_error, sample_observations
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_trpo_ext.optim.vectors import flatten
from sb3_trpo_ext.policies import CnnPolicy, MlpPolicy
from sb3_trpo_ext.update import critic
from sb3_trpo_ext.update.batch import Batch
from sb3_trpo_ext.update.structure import critic_structure, split_policy

BY_HAND: dict[str, dict[str, Any]] = {
    "tanh": {"net_arch": [5, 4]},
    "relu": {"activation_fn": nn.ReLU},
    "no_hidden_layer": {"net_arch": []},
    "discrete_observations": {"observation_space": spaces.Discrete(4)},
}


def fitted(policy: ActorCriticPolicy, **options: Any) -> tuple[th.Tensor, critic.CriticResult]:
    """The critic's parameters after two epochs on random targets, and what the fit reports."""
    parts = split_policy(policy)
    policy.optimizer = th.optim.Adam(parts.critic_params, lr=0.01)
    th.manual_seed(1)
    observations = sample_observations(policy.observation_space, 20)
    batch = Batch(observations, *(th.randn(20) for _ in range(5)))
    result = critic.fit_critic(policy, parts.critic_params, parts.critic_modules, batch, critic.CriticFit(2, 8, **options))
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
    assert result.status is expected.status is critic.CriticStatus.FITTED


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("kwargs", "expected"), [({}, 1), ({"net_arch": [1024, 1024]}, 2), ({"activation_fn": nn.ELU}, 2)])
def test_small_fits_run_on_one_thread(kwargs: dict[str, Any], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    monkeypatch.setattr(critic, "average_", lambda *_: seen.add(th.get_num_threads()))
    fitted(make_policy(**kwargs))
    assert th.get_num_threads() == 2
    assert seen == {expected}


OPTIONS: dict[str, dict[str, Any]] = {
    "huber": {"loss": "huber"},
    "clipped": {"clip_range": 0.3},
    "clipped_huber": {"loss": "huber", "clip_range": 0.3},
    "bounded_gradient": {"max_grad_norm": 0.1},
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("by_hand", [True, False])
def test_options_of_the_fit_are_the_formulas(name: str, by_hand: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain SGD on one minibatch, so that the step is the gradient."""
    if not by_hand:
        monkeypatch.setattr(critic, "critic_structure", lambda *_: None)
    policy = make_policy()
    parts = split_policy(policy)
    policy.optimizer = th.optim.SGD(parts.critic_params, lr=1.0)
    observations, old_values = sample_observations(policy.observation_space, 20), th.randn(20)
    # Far away, so that many errors are above one and many values beyond the range
    returns = 3 * th.randn(20)
    batch = Batch(observations, th.zeros(20), th.zeros(20), th.zeros(20), returns, old_values)
    values = policy.predict_values(observations).flatten()
    options = OPTIONS[name]
    if "clip_range" in options:
        is_within = (values - old_values).abs() < 0.3
        assert 0 < is_within.sum() < 20
        values = th.where(is_within, values, old_values + 0.3 * (values - old_values).sign())
    error = (values - returns).abs()
    assert 0 < (error < 1).sum() < 20
    huber = th.where(error < 1, error.square() / 2, error - 0.5)
    loss = (huber if "loss" in options else error.square()).mean()
    gradient = flatten(th.autograd.grad(loss, parts.critic_params))
    if "max_grad_norm" in options:
        assert gradient.norm() > 0.1
        gradient *= 0.1 / gradient.norm()
    before = flatten(parts.critic_params)
    fit = critic.CriticFit(1, 20, **options)
    result = critic.fit_critic(policy, parts.critic_params, parts.critic_modules, batch, fit)
    assert result.loss == pytest.approx(loss.item(), rel=1e-10)
    # The norm is bounded with a millionth added to it
    assert relative_error(before - flatten(parts.critic_params), gradient) < (1e-4 if "max_grad_norm" in options else 1e-10)


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
