"""Objective, KL and gradient of a rollout, by hand and by finite differences."""

import math
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import (
    BOX_ACTIONS,
    DICT,
    TUPLE_ACTIONS,
    BetaPolicy,
    finite_difference,
    make_batch,
    make_policy,
    relative_error,
    thinned,
)
from stable_baselines3.common.distributions import DiagGaussianDistribution, Distribution
from torch.distributions import Normal, kl_divergence

from sb3_trpo_ext.optim.vectors import assign_, flatten
from sb3_trpo_ext.policies import MlpPolicy, MultiInputPolicy, SquashedMlpPolicy, mixed_policy
from sb3_trpo_ext.update import distributions
from sb3_trpo_ext.update.batch import numbers_per_sample, take
from sb3_trpo_ext.update.distributions import GaussianFamily
from sb3_trpo_ext.update.mixed import MixedActions
from sb3_trpo_ext.update.structure import split_policy
from sb3_trpo_ext.update.surrogate import Limits, Surrogate

pytestmark = pytest.mark.usefixtures("float64")

N_SAMPLES = 6
POLICIES: dict[str, dict[str, Any]] = {
    "gaussian": {},
    "squashed": {"policy_class": SquashedMlpPolicy},
    "gsde": {"use_sde": True},
    "gsde_squashed": {"use_sde": True, "squash_output": True},
    "categorical": {"action_space": spaces.Discrete(3)},
    "multi_categorical": {"action_space": spaces.MultiDiscrete([2, 3])},
    "bernoulli": {"action_space": spaces.MultiBinary(2)},
    "dict": {"observation_space": DICT, "policy_class": MultiInputPolicy},
    "mixed": {"action_space": MixedActions(TUPLE_ACTIONS), "policy_class": mixed_policy(MlpPolicy)},
    "users": {"action_space": spaces.Box(0.0, 1.0, (2,)), "policy_class": BetaPolicy},
}
each_policy = pytest.mark.parametrize("name", POLICIES)


def make_surrogate(name: str, **kwargs: Any) -> Surrogate:
    policy = make_policy(**POLICIES[name])
    return Surrogate(policy, split_policy(policy).actor_params, make_batch(policy, N_SAMPLES), **kwargs)


def move(surrogate: Surrogate, distance: float) -> None:
    """Take the actor away from the old parameters, in a random direction."""
    params = surrogate.params
    old = flatten(params)
    assign_(params, old + distance * th.randn_like(old))


@each_policy
def test_at_the_old_parameters_the_ratio_is_one_and_the_kl_zero(name: str) -> None:
    surrogate = make_surrogate(name)
    objective, kl = surrogate.evaluate()
    assert objective.item() == pytest.approx(surrogate.batch.advantages.mean().item(), rel=1e-12)
    # The user's KL is PyTorch's, which cancels terms of order one
    assert abs(kl.item()) < 1e-14


@each_policy
def test_objective_and_kl_are_the_formulas(name: str) -> None:
    surrogate = make_surrogate(name)
    policy, batch = surrogate.policy, surrogate.batch
    with th.no_grad():
        old = surrogate.family.statistics(policy.get_distribution(batch.observations))
        move(surrogate, 0.3)
        distribution = policy.get_distribution(batch.observations)
        probability, old_probability = distribution.log_prob(batch.actions).exp(), batch.old_log_prob.exp()
        objective, kl = surrogate.evaluate()
        expected_kl = surrogate.family.kl(old, surrogate.family.statistics(distribution)).mean()
    expected = sum(
        p / q * advantage
        for p, q, advantage in zip(probability.tolist(), old_probability.tolist(), batch.advantages.tolist(), strict=True)
    )
    assert objective.item() == pytest.approx(expected / N_SAMPLES, rel=1e-10)
    assert expected_kl > 1e-3
    assert kl.item() == pytest.approx(expected_kl.item(), rel=1e-12)


def test_kl_is_summed_over_action_dimensions_and_averaged_over_states() -> None:
    """sb3-contrib averages over both."""
    surrogate = make_surrogate("gaussian")
    observations = surrogate.batch.observations
    with th.no_grad():
        old = surrogate.policy.get_distribution(observations).distribution
        move(surrogate, 0.3)
        new = surrogate.policy.get_distribution(observations).distribution
        _, kl = surrogate.evaluate()
    assert isinstance(old, Normal)
    assert isinstance(new, Normal)
    both = kl_divergence(old, new)
    assert both.shape == (N_SAMPLES, 2)
    assert kl.item() == pytest.approx(2 * both.mean().item(), rel=1e-10)


@pytest.mark.parametrize("distance", [0.0, 0.2])
@pytest.mark.parametrize("ent_coef", [0.0, 0.1])
@each_policy
def test_gradient_is_that_of_finite_differences(name: str, ent_coef: float, distance: float) -> None:
    """Of the objective, with or without entropy, and of the KL; away from the old parameters too, where it is not zero."""
    surrogate = make_surrogate(name, ent_coef=ent_coef)
    move(surrogate, distance)
    params = surrogate.params
    if name.startswith("gsde"):
        # SB3 blocks the gradient from the std to the features that it depends on, so that for the layers below these there
        # is no function that the gradient would be of
        params = [surrogate.policy.log_std, *surrogate.policy.action_net.parameters()]
    for index, is_stationary in ((0, False), (1, distance == 0)):
        gradient = flatten(th.autograd.grad(surrogate.evaluate()[index], params))
        expected = finite_difference(lambda: surrogate.evaluate()[index].item(), params)  # noqa: B023, called at once
        # Central differences of numbers of order one: an error of about 1e-16 / 1e-5 + (1e-5)^2
        assert (gradient - expected).abs().max() < 1e-8
        assert (gradient.norm() < 1e-3) == is_stationary


@each_policy
@pytest.mark.parametrize("ent_coef", [0.0, 0.3])
def test_gradient_of_the_first_pass_is_that_of_autograd(name: str, ent_coef: float) -> None:
    surrogate = make_surrogate(name, ent_coef=ent_coef)
    expected_objective, _ = surrogate.evaluate()
    expected = flatten(th.autograd.grad(expected_objective, surrogate.params))
    objective, gradient = surrogate.objective_and_gradient()
    assert objective.item() == expected_objective.item()
    assert not objective.requires_grad and not gradient.requires_grad
    assert relative_error(gradient, expected) < 1e-12
    assert th.equal(surrogate.objective_and_gradient()[1], gradient)


class MeanAndStd(GaussianFamily):
    """The same Gaussian by other numbers: the std and not its logarithm."""

    def statistics(self, distribution: Distribution) -> tuple[th.Tensor, ...]:
        """Mean and std."""
        assert isinstance(distribution.distribution, Normal)
        return distribution.distribution.loc, distribution.distribution.scale

    def kl(self, old: tuple[th.Tensor, ...], new: tuple[th.Tensor, ...]) -> th.Tensor:
        """By way of the log std."""
        return super().kl((old[0], old[1].log()), (new[0], new[1].log()))

    def fisher(self, statistics: tuple[th.Tensor, ...], tangents: tuple[th.Tensor, ...]) -> tuple[th.Tensor, ...]:
        """``diag(1, 2) / std^2``."""
        precision = statistics[1] ** -2
        return tangents[0] * precision, 2 * tangents[1] * precision


def test_fisher_of_a_users_family_for_a_stock_distribution_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make_surrogate("gaussian").fisher()
    # A copy of the registry, so that the other tests keep theirs
    monkeypatch.setattr(distributions, "_FAMILIES", dict(distributions._FAMILIES))
    distributions.register_family(DiagGaussianDistribution, lambda _: MeanAndStd())
    th.manual_seed(0)
    surrogate = make_surrogate("gaussian")
    vector = th.randn(sum(param.numel() for param in surrogate.params))
    assert isinstance(surrogate.family, MeanAndStd)
    assert relative_error(surrogate.fisher() @ vector, expected @ vector) < 1e-10


@pytest.mark.parametrize("ent_coef", [0.0, 0.3])
@pytest.mark.parametrize(("stride", "n_at_once"), [(1, 4), (1, 2), (2, 2), (2, 10)])
@each_policy
def test_chunks_change_nothing(
    name: str, stride: int, n_at_once: int, ent_coef: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the passes over the batch nor in the graphs that are kept for the Fisher matrix."""
    whole = make_surrogate(name, ent_coef=ent_coef, fisher_stride=stride)
    n_numbers = n_at_once * numbers_per_sample(whole.batch.observations)
    monkeypatch.setattr("sb3_trpo_ext.update.surrogate._CPU_LIMITS", Limits(4, n_numbers))
    noise = whole._noise
    if noise is not None:
        # Drawn chunk by chunk, other noise would come out
        pieces = iter(noise.split(min(4, n_at_once)))
        monkeypatch.setattr("sb3_trpo_ext.update.surrogate.standard_normal", lambda *_: next(pieces))
    chunked = Surrogate(whole.policy, whole.params, whole.batch, ent_coef=ent_coef, fisher_stride=stride)
    assert len(chunked._chunks) == (1 if name == "users" else -(-N_SAMPLES // min(4, n_at_once)))
    vector = th.randn(flatten(whole.params).shape)
    for fast, expected in zip(chunked.objective_and_gradient(), whole.objective_and_gradient(), strict=True):
        assert relative_error(fast, expected) < 1e-12
    assert relative_error(chunked.fisher() @ vector, whole.fisher() @ vector) < 1e-12
    move(whole, 0.3)
    for fast, expected in zip(chunked.evaluate(), whole.evaluate(), strict=True):
        assert fast.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "users"])
def test_entropy_term_is_the_mean_entropy_times_its_coefficient(name: str) -> None:
    surrogate = make_surrogate(name)
    plain, _ = surrogate.evaluate()
    surrogate.ent_coef = 0.3
    with_entropy, kl = surrogate.evaluate()
    mean_entropy, _ = surrogate.summary()
    assert (with_entropy - plain).item() == pytest.approx(0.3 * mean_entropy, rel=1e-10)
    assert abs(kl.item()) < 1e-14
    if "squashed" not in name:
        distribution = surrogate.policy.get_distribution(surrogate.batch.observations)
        entropy = distribution.entropy()
        assert entropy is not None
        assert mean_entropy == pytest.approx(entropy.reshape(N_SAMPLES, -1).sum(dim=1).mean().item(), rel=1e-10)


@pytest.mark.parametrize("name", ["squashed", "gsde_squashed"])
def test_noise_of_the_squashed_entropy_depends_on_the_seed_alone(name: str) -> None:
    policy = make_policy(**POLICIES[name])
    params, batch = split_policy(policy).actor_params, make_batch(policy, N_SAMPLES)
    state = th.get_rng_state()
    values = []
    for seed in (0, 0, 1):
        surrogate = Surrogate(policy, params, batch, ent_coef=1.0, noise_seed=seed)
        values += [surrogate.evaluate()[0].item(), surrogate.evaluate()[0].item()]
    assert th.equal(th.get_rng_state(), state)
    assert len(set(values[:4])) == 1
    assert values[4] == values[5] != values[0]


@pytest.mark.parametrize("ent_coef", [0.0, 0.1])
@pytest.mark.parametrize("name", [name for name in POLICIES if name != "users"])
def test_minibatch_is_the_surrogate_of_a_part_of_the_rollout(name: str, ent_coef: float) -> None:
    surrogate = make_surrogate(name, ent_coef=ent_coef)
    move(surrogate, 0.3)
    whole = [value.item() for value in surrogate.evaluate()]
    each = np.array([[value.item() for value in surrogate.evaluate(th.tensor([i]))] for i in range(N_SAMPLES)])
    some = th.tensor([4, 1, 1])
    assert each.std(axis=0).min() > 1e-4
    np.testing.assert_allclose(each.mean(axis=0), whole, rtol=1e-10)
    np.testing.assert_allclose(
        [value.item() for value in surrogate.evaluate(some)], each[some.numpy()].mean(axis=0), rtol=1e-10
    )


def test_old_distribution_is_that_of_the_construction() -> None:
    """Old log-probabilities come from the rollout; the KL is measured from the policy as it was given."""
    policy = make_policy()
    params, batch = split_policy(policy).actor_params, make_batch(policy, N_SAMPLES)
    before = flatten(params)
    surrogate = Surrogate(policy, params, batch)
    move(surrogate, 0.3)
    assert surrogate.evaluate()[1] > 1e-3
    moved = Surrogate(policy, params, batch)
    assert abs(moved.evaluate()[1].item()) < 1e-14
    assert moved.evaluate()[0].item() == pytest.approx(surrogate.evaluate()[0].item(), rel=1e-12)
    assign_(params, before)
    assert abs(surrogate.evaluate()[1].item()) < 1e-14


def test_entropy_of_a_distribution_that_has_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def entropy(self: Distribution) -> None:
        return None

    monkeypatch.setattr("helpers.BetaDistribution.entropy", entropy)
    with pytest.raises(ValueError, match=r"`ent_coef` is 0\.1, but BetaDistribution has no entropy"):
        make_surrogate("users", ent_coef=0.1)
    assert all(math.isnan(value) for value in make_surrogate("users").summary())


@pytest.mark.parametrize("name", ["gaussian", "gsde"])
def test_summary_has_the_mean_std(name: str) -> None:
    surrogate = make_surrogate(name)
    distribution = surrogate.policy.get_distribution(surrogate.batch.observations).distribution
    assert isinstance(distribution, Normal)
    assert surrogate.summary()[1] == pytest.approx(distribution.scale.mean().item(), rel=1e-12)


def test_summary_has_no_std_of_discrete_actions() -> None:
    assert math.isnan(make_surrogate("categorical").summary()[1])


def test_problem_is_the_surrogate() -> None:
    surrogate = make_surrogate("gaussian")
    problem = surrogate
    assert problem.params is surrogate.params
    assert problem.n_samples == N_SAMPLES
    assert th.equal(th.stack(problem.evaluate(None)), th.stack(surrogate.evaluate()))
    vector = th.randn(flatten(problem.params).shape)
    assert relative_error(problem.fisher() @ vector, surrogate.fisher() @ vector) < 1e-12


def test_no_graph_is_kept_without_gradients() -> None:
    surrogate = make_surrogate("gaussian", ent_coef=0.1)
    with th.no_grad():
        assert not any(value.requires_grad for value in surrogate.evaluate())
    assert all(value.requires_grad for value in surrogate.evaluate())


def test_take_selects_samples_of_tensors_and_dicts() -> None:
    policy = make_policy(DICT, BOX_ACTIONS, MultiInputPolicy)
    batch = make_batch(policy, N_SAMPLES)
    assert isinstance(batch.observations, dict)
    part = take(batch.observations, th.tensor([3, 0]))
    assert isinstance(part, dict)
    assert th.equal(part["position"], batch.observations["position"][[3, 0]])
    assert th.equal(part["door"], batch.observations["door"][[3, 0]])
    thin = take(batch.observations["position"], slice(None, None, 2))
    assert isinstance(thin, th.Tensor)
    assert thin.data_ptr() == batch.observations["position"].data_ptr(), "a slice is a view"
    assert thinned(batch, 2).n_samples == N_SAMPLES // 2
