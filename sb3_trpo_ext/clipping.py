"""The likelihood of actions as the environment sees them: clipped to the bounds of the action space."""

from typing import NamedTuple

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import DiagGaussianDistribution, Distribution, StateDependentNoiseDistribution
from stable_baselines3.common.policies import ActorCriticPolicy


class ActionBounds(NamedTuple):
    """What SB3 clips the actions of a Gaussian policy to; each of shape ``(n_actions,)``, infinite where there is no bound."""

    low: th.Tensor
    high: th.Tensor


def action_bounds(policy: ActorCriticPolicy) -> ActionBounds | None:
    """
    Find out to what the actions of a policy are clipped before the environment gets them.

    :param policy: the policy
    :return: the bounds; ``None`` if there are none, or if the policy's distribution is not one of SB3's own Gaussians: what
        another does beyond its bounds is not known here
    """
    space, kind = policy.action_space, type(policy.action_dist)
    if (
        not isinstance(space, spaces.Box)
        or kind not in (DiagGaussianDistribution, StateDependentNoiseDistribution)
        or policy.squash_output
        or not (space.bounded_below | space.bounded_above).any()
    ):
        return None
    weights = next(policy.parameters())
    low, high = (th.as_tensor(bound.flatten()).to(weights) for bound in (space.low, space.high))
    return ActionBounds(low, high)


def clipped_log_prob(distribution: Distribution, actions: th.Tensor, bounds: ActionBounds) -> th.Tensor:
    """
    Log-likelihood of actions that are clipped to bounds, given what they were before.

    The environment cannot tell how far beyond a bound an action was, so each component there counts with the probability of
    all that is beyond: ``log P(a <= low)`` or ``log P(a >= high)`` instead of the density. Rewards depend on clipped actions
    only, hence the expected gradient is the same, and its variance is never greater (Fujita and Maeda 2018, "Clipped Action
    Policy Gradient", https://arxiv.org/abs/1802.07564).

    :param distribution: one of SB3's Gaussians, without squashing
    :param actions: before they are clipped, shape ``(n_batch, n_actions)``
    :param bounds: of the action space
    :return: summed over action dimensions, shape ``(n_batch,)``
    """
    normal = distribution.distribution
    assert isinstance(normal, th.distributions.Normal)
    is_low, is_high = actions <= bounds.low, actions >= bounds.high
    is_beyond = is_low | is_high
    # One bound serves both sides, the tail beyond the upper one being the mirror image. Where there is nothing beyond, any
    # finite number will do: the other branch of a `where` must not turn into a NaN in the gradient
    bound = th.where(is_low, bounds.low, th.where(is_high, bounds.high, actions))
    distance = (bound - normal.loc) / normal.scale
    tail = th.special.log_ndtr(th.where(is_high, -distance, distance))
    return th.where(is_beyond, tail, normal.log_prob(actions)).sum(dim=1)
