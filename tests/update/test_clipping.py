"""The likelihood of clipped actions: by hand, by integration, and in an update."""

from typing import Any

import numpy as np
import pytest
import torch as th
from agents import collect, copies, make_model, random_vec_env, train
from gymnasium import spaces
from helpers import BOX_ACTIONS, VECTOR, BetaPolicy, finite_difference, make_batch, make_policy, relative_error
from stable_baselines3.common.distributions import DiagGaussianDistribution
from torch.distributions import Normal

from sb3_trpo_ext.optim.vectors import assign_, flatten
from sb3_trpo_ext.policies import SquashedMlpPolicy
from sb3_trpo_ext.update.batch import Batch
from sb3_trpo_ext.update.clipping import ActionBounds, action_bounds, clipped_log_prob
from sb3_trpo_ext.update.structure import split_policy
from sb3_trpo_ext.update.surrogate import Limits, Surrogate

BOUNDS = ActionBounds(th.tensor([-0.8, -0.5]), th.tensor([0.6, 0.9]))
HALF = ActionBounds(th.tensor([-0.5, -th.inf]), th.tensor([th.inf, 0.25]))


def gaussian(mean: th.Tensor, log_std: th.Tensor) -> DiagGaussianDistribution:
    return DiagGaussianDistribution(mean.shape[1]).proba_distribution(mean, log_std)


@pytest.mark.usefixtures("float64")
def test_component_beyond_a_bound_counts_with_the_probability_of_all_that_is_beyond() -> None:
    mean, log_std = th.tensor([[0.1, -0.3]]), th.tensor([-0.7, 0.2])
    bounds = ActionBounds(th.tensor([-0.5, -1.0]), th.tensor([0.5, 1.0]))
    normals = [Normal(mean[0, i], log_std[i].exp()) for i in range(2)]
    below = [normal.cdf(bounds.low[i]).log() for i, normal in enumerate(normals)]
    above = [(1 - normal.cdf(bounds.high[i])).log() for i, normal in enumerate(normals)]
    cases = {
        (0.2, 0.9): normals[0].log_prob(th.tensor(0.2)) + normals[1].log_prob(th.tensor(0.9)),
        (-0.6, 0.9): below[0] + normals[1].log_prob(th.tensor(0.9)),
        (0.5, -7.0): above[0] + below[1],
        (-0.5, 1.0): below[0] + above[1],
        (3.0, 3.0): above[0] + above[1],
    }
    for actions, expected in cases.items():
        actual = clipped_log_prob(gaussian(mean, log_std), th.tensor([actions]), bounds)
        assert actual.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.usefixtures("float64")
def test_side_without_bound_is_the_gaussian() -> None:
    distribution = gaussian(th.zeros(1, 2), th.zeros(2))
    inside = th.tensor([[4.0, -4.0]])
    assert th.allclose(clipped_log_prob(distribution, inside, HALF), distribution.log_prob(inside), rtol=1e-14)
    beyond = clipped_log_prob(distribution, -inside, HALF)
    expected = Normal(0.0, 1.0).cdf(th.tensor(-0.5)).log() + Normal(0.0, 1.0).cdf(th.tensor(-0.25)).log()
    assert beyond.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("mean", [0.0, 0.3, -0.9])
def test_gradient_is_the_same_on_average_and_varies_less(mean: float) -> None:
    # Integrated on a grid: a reward that depends on the clipped action, times either score
    grid = th.linspace(-8.0, 8.0, 400_001)[:, None]
    loc, log_std = th.full_like(grid, mean).requires_grad_(), th.full_like(grid, -0.5).requires_grad_()
    distribution = gaussian(loc, log_std)
    weights = distribution.log_prob(grid).exp().detach() * (grid[1] - grid[0])
    bounds = ActionBounds(th.tensor([-0.4]), th.tensor([0.4]))
    reward = th.sin(3 * grid.clamp(-0.4, 0.4)[:, 0]) + grid.clamp(-0.4, 0.4)[:, 0].square()
    moments = []
    for log_prob in (distribution.log_prob(grid), clipped_log_prob(distribution, grid, bounds)):
        scores = th.autograd.grad(log_prob.sum(), (loc, log_std), retain_graph=True)
        terms = [score[:, 0] * reward for score in scores]
        means = [(weights * term).sum() for term in terms]
        variances = [(weights * term.square()).sum() - mean.square() for term, mean in zip(terms, means, strict=True)]
        moments.append((th.stack(means), th.stack(variances)))
    (plain_mean, plain_variance), (clipped_mean, clipped_variance) = moments
    # The grid's steps at the bounds leave an error of 1e-5
    assert th.allclose(plain_mean, clipped_mean, atol=1e-4)
    assert (clipped_variance < 0.8 * plain_variance).all()


@pytest.mark.parametrize("mean", [0.0, 30.0, -30.0])
def test_gradient_is_finite_however_unlikely_the_action(mean: float) -> None:
    loc = th.full((3, 1), mean, requires_grad=True)
    log_std = th.full((3, 1), -1.0, requires_grad=True)
    log_prob = clipped_log_prob(
        gaussian(loc, log_std), th.tensor([[-5.0], [0.0], [5.0]]), ActionBounds(-th.ones(1), th.ones(1))
    )
    assert th.isfinite(log_prob).all()
    assert all(th.isfinite(gradient).all() for gradient in th.autograd.grad(log_prob.sum(), (loc, log_std)))


@pytest.mark.usefixtures("float64")
def test_gradient_by_hand_is_that_of_automatic_differentiation() -> None:
    mean = th.linspace(-20.0, 20.0, 201)[:, None].expand(-1, 2).clone().requires_grad_()
    log_std = th.linspace(-2.0, 1.0, 201)[:, None].expand(-1, 2).clone().requires_grad_()
    actions = 3 * th.randn(201, 2)
    values = actions.clamp(*BOUNDS)
    side = (values == BOUNDS.low).double() - (values == BOUNDS.high).double()
    assert 50 < (side == 0).sum() < 350
    tail = th.special.log_ndtr(side * (values - mean) / log_std.exp())
    plain = th.where(side == 0, Normal(mean, log_std.exp()).log_prob(values), tail).sum(dim=1)
    by_hand = clipped_log_prob(gaussian(mean, log_std), actions, BOUNDS)
    assert th.allclose(by_hand, plain, rtol=1e-12)
    weights = th.randn(201)
    expected = th.autograd.grad((weights * plain).sum(), (mean, log_std))
    actual = th.autograd.grad((weights * by_hand).sum(), (mean, log_std))
    assert all(relative_error(*pair) < 1e-10 for pair in zip(actual, expected, strict=True))


def test_bounds_are_those_of_sb3s_own_gaussians_on_bounded_boxes() -> None:
    half_bounded = spaces.Box(np.array([[-0.5], [-np.inf]], np.float32), np.array([[np.inf], [0.25]], np.float32))
    for use_sde in (False, True):
        bounds = action_bounds(make_policy(action_space=half_bounded, use_sde=use_sde))
        assert bounds is not None
        assert th.equal(bounds.low, HALF.low) and th.equal(bounds.high, HALF.high)
    others: list[dict[str, Any]] = [
        {"action_space": spaces.Box(-np.inf, np.inf, (2,))},
        {"action_space": spaces.Discrete(3)},
        {"policy_class": SquashedMlpPolicy},
        {"use_sde": True, "squash_output": True},
        {"action_space": spaces.Box(0.0, 1.0, (2,)), "policy_class": BetaPolicy},
    ]
    assert all(action_bounds(make_policy(**kwargs)) is None for kwargs in others)


def clipped_surrogate(**kwargs: Any) -> Surrogate:
    """A surrogate of a rollout with about a third of its action components beyond the bounds."""
    policy = make_policy(**kwargs)
    batch = make_batch(policy, 12)
    assert 0.2 < ((batch.actions < BOUNDS.low) | (batch.actions > BOUNDS.high)).double().mean() < 0.8
    return Surrogate(policy, split_policy(policy).actor_params, batch, bounds=BOUNDS)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kwargs", [{}, {"use_sde": True}], ids=["gaussian", "gsde"])
def test_surrogate_has_the_ratio_of_the_clipped_actions(kwargs: dict[str, Any]) -> None:
    surrogate = clipped_surrogate(**kwargs)
    policy, batch = surrogate.policy, surrogate.batch
    old = flatten(surrogate.params)

    def log_probs() -> th.Tensor:
        return clipped_log_prob(policy.get_distribution(batch.observations), batch.actions, BOUNDS)

    with th.no_grad():
        before = log_probs()
        # The ratio is 1 at the old parameters, although the rollout has other log-probabilities
        assert (before - batch.old_log_prob).abs().max() > 0.01
        assert surrogate.evaluate()[0].item() == pytest.approx(batch.advantages.mean().item(), rel=1e-12)
        if not policy.use_sde:
            # SB3 keeps the gradient of gSDE's std from the features, which differences do not
            expected_gradient = finite_difference(lambda: surrogate.evaluate()[0].item(), surrogate.params)
            assert relative_error(surrogate.objective_and_gradient()[1], expected_gradient) < 1e-8
        assign_(surrogate.params, old + 0.2 * th.randn_like(old))
        expected = ((log_probs() - before).exp() * batch.advantages).mean()
        assert surrogate.evaluate()[0].item() == pytest.approx(expected.item(), rel=1e-12)
        indices = th.tensor([1, 5, 7])
        expected = ((log_probs() - before).exp() * batch.advantages)[indices].mean()
        assert surrogate.evaluate(indices)[0].item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.usefixtures("float64")
def test_parts_of_the_batch_make_the_same_surrogate(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = clipped_surrogate()
    monkeypatch.setattr("sb3_trpo_ext.update.surrogate._CPU_LIMITS", Limits(5, 2**25))
    chunked = Surrogate(whole.policy, whole.params, whole.batch, bounds=BOUNDS)
    assert len(chunked._chunks) == 3
    for actual, expected in zip(chunked.objective_and_gradient(), whole.objective_and_gradient(), strict=True):
        assert relative_error(actual, expected) < 1e-12
    old = flatten(whole.params)
    with th.no_grad():
        assign_(whole.params, old + 0.2)
        assert chunked.evaluate()[0].item() == pytest.approx(whole.evaluate()[0].item(), rel=1e-12)


def step_of(clipped_likelihood: bool, bound: float) -> th.Tensor:
    """How the actor moves in one update on actions within [-bound, bound]."""
    env = random_vec_env(1, VECTOR, spaces.Box(-bound, bound, (2,)))
    policy_kwargs = {"net_arch": [8], "log_std_init": 0.0}
    model = collect(make_model(env, clipped_likelihood=clipped_likelihood, policy_kwargs=policy_kwargs))
    before = copies(model._parts.actor_params)
    train(model)
    return th.cat([(new.detach() - old).flatten() for new, old in zip(model._parts.actor_params, before, strict=True)])


def test_trpo_uses_it_by_default_and_where_nothing_is_clipped_it_changes_nothing() -> None:
    default = make_model(random_vec_env(1, VECTOR, BOX_ACTIONS))
    assert default.clipped_likelihood is True
    assert relative_error(step_of(True, 100.0), step_of(False, 100.0)) < 1e-5
    assert relative_error(step_of(True, 0.5), step_of(False, 0.5)) > 0.05


def test_rollout_keeps_the_log_probabilities_of_the_gaussian() -> None:
    model = collect(make_model(random_vec_env(1, VECTOR, spaces.Box(-0.1, 0.1, (2,)))))
    batch: Batch = model._full_batch()
    with th.no_grad():
        expected = model.policy.get_distribution(batch.observations).log_prob(batch.actions)
    assert th.allclose(batch.old_log_prob, expected, atol=1e-5)
