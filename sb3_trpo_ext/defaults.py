"""The values of arguments that the user leaves to TRPO, for any environment and any length of training."""

import inspect
import math
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_trpo_ext._checks import ArgumentError, is_known
from sb3_trpo_ext._observations import vec_normalizes
from sb3_trpo_ext.update.mixed import MixedDistribution
from sb3_trpo_ext.update.normalization import NormalizedExtractor, normalized_parts, one_hot_sizes

#: Samples of one rollout.
N_SAMPLES = 2048
#: Samples of a minibatch of the critic.
MIN_BATCH_SIZE = 64
#: Minibatches in a pass over a rollout, at most: thousands of environments fill long ones, and the fit would take minutes.
MAX_MINIBATCHES = 128
#: Samples that the Fisher matrix is computed on in a long rollout, at least: unlike the gradient, it needs no more.
N_FISHER_SAMPLES = 16_384
#: Steps of a rollout, at least, for any number of environments: advantage estimates look about this far ahead.
MIN_STEPS = 16
#: Total noise of an untrained Gaussian policy, at most: the sum over action dimensions of the variance, in units of the square
#: of half the distance between the bounds.
NOISY_DIMS = 2.0
#: Half of the distance between bounds, at most: bounds farther apart count as none.
MAX_RANGE = 1000.0
#: Steps per budget of KL; a shorter training gets a whole one.
BUDGET_STEPS = 250_000
#: The budget per action dimension, in nats.
KL_BUDGET = 1.0
#: Damping of the Fisher matrix per action dimension.
CG_DAMPING = 0.2
#: KL of one update per action dimension, at most: a training of a few updates does not spend its budget.
MAX_KL = 0.1
#: Updates end a little within their region, and some are rejected: an update may add what they left unused to its radius,
#: up to this share of it.
MAX_CARRY = 0.1


def n_steps(n_envs: int, batch_size: int, n_processes: int = 1) -> int:
    """
    Steps of a rollout per environment: about 2048 samples in all.

    No minibatch is smaller than the others, unless that takes more than twice as many samples.

    :param n_envs: number of environments, of each process
    :param batch_size: of the minibatches, in each process
    :param n_processes: that share a rollout
    :return: the number of steps
    """
    least = max(-(-N_SAMPLES // (n_envs * n_processes)), MIN_STEPS)
    multiple = batch_size // math.gcd(batch_size, n_envs)
    even = -(-least // multiple) * multiple
    return even if even <= 2 * least else least


def batch_size(n_samples: int) -> int:
    """
    Samples of a minibatch of the critic: 64, and more in a rollout that would have more than 128 of these.

    :param n_samples: of the rollout, of one process
    :return: the number of samples, such that all minibatches are of one size if that is possible with at least 64 of them
    """
    if n_samples <= MIN_BATCH_SIZE * MAX_MINIBATCHES:
        return MIN_BATCH_SIZE
    counts = range(MAX_MINIBATCHES, MAX_MINIBATCHES // 2 - 1, -1)
    return n_samples // next((count for count in counts if n_samples % count == 0), MAX_MINIBATCHES)


def sub_sampling_factor(n_samples: int) -> int:
    """
    Which samples the Fisher matrix is computed on: every k-th.

    :param n_samples: of the rollout, of all processes
    :return: k, an odd number: the samples of an environment are side by side and most often a power of two in number, so that
        an even k would leave out the same steps in all of them
    """
    factor = max(n_samples // N_FISHER_SAMPLES, 1)
    return factor - (factor + 1) % 2


def target_kl(
    action_space: spaces.Space[Any],
    n_samples: int,
    total_timesteps: int,
    progress_remaining: float,
    start: int = 0,
) -> float:
    """
    Radius of the trust region for which the KL of a training adds up to a budget.

    That is :data:`KL_BUDGET` per action dimension for each :data:`BUDGET_STEPS`, and once for a shorter training. So a long
    one that a callback ends early learns as fast as others. A training that begins where another one has ended has no such
    minimum: many short ones in a row spend as much as a long one.

    The radius falls linearly to zero. An update gets the value in the middle of its rollout: the sum over all updates is then
    the budget, however few there are.

    :param action_space: of the environment
    :param n_samples: of the rollout, of all processes
    :param total_timesteps: where the training ends; 0 if that is not known
    :param progress_remaining: after the rollout, from 1 at the first of all timesteps to 0
    :param start: timesteps before this training
    :return: the radius
    """
    total_timesteps = total_timesteps or BUDGET_STEPS
    # A rollout is always whole
    length = max(total_timesteps - start, n_samples)
    slope = 2 * KL_BUDGET * n_samples / (BUDGET_STEPS if start else min(length, BUDGET_STEPS))
    progress_remaining *= total_timesteps / length
    return get_action_dim(action_space) * min(slope * (progress_remaining + n_samples / length / 2), MAX_KL)


def normalizes_observations(norm_obs: bool | str, policy: type, policy_kwargs: dict[str, Any], env: VecEnv | None) -> bool:
    """
    Whether a policy normalizes its observations.

    With ``"auto"`` it does not if something else may: a ``VecNormalize``, or a user's own policy or features extractor.

    :param norm_obs: what the user asked for
    :param policy: class of the policy
    :param policy_kwargs: its arguments
    :param env: the training environment
    :return: the decision
    :raises ValueError: if it was asked for and cannot be done
    """
    if norm_obs != "auto":
        if norm_obs and not is_known(policy):
            raise ArgumentError(
                f"`norm_obs=True` needs a policy of Stable-Baselines3, and {policy.__name__} may have features extractors of "
                "its own: use VecNormalize."
            )
        if norm_obs and env is not None and not _can_normalize(env.observation_space):
            raise ArgumentError(f"`norm_obs=True` has no vector to normalize in {env.observation_space}: leave it out.")
        return bool(norm_obs)
    if env is None or not _can_normalize(env.observation_space):
        return False
    if not is_known(policy) or not is_known(policy_kwargs.get("features_extractor_class", FlattenExtractor)):
        return False
    return not any(wrapper.norm_obs for wrapper in vec_normalizes(env))


def _can_normalize(space: spaces.Space[Any]) -> bool:
    """Whether there is anything in an observation to normalize."""
    return bool(normalized_parts(space) or one_hot_sizes(space))


def normalizes_rewards(norm_reward: bool | str, env: VecEnv | None) -> bool:
    """
    Whether rewards are scaled.

    :param norm_reward: what the user asked for
    :param env: the training environment
    :return: the decision
    """
    if norm_reward != "auto":
        return bool(norm_reward)
    return not any(wrapper.norm_reward for wrapper in vec_normalizes(env))


def policy_kwargs(given: dict[str, Any], policy: type, norm_obs: bool, own_extractors: bool) -> dict[str, Any]:
    """
    Arguments of a policy whose features extractors TRPO has a say in.

    :param given: arguments as the user gave them
    :param policy: class of the policy
    :param norm_obs: whether :class:`~sb3_trpo_ext.update.normalization.NormalizedExtractor` is around the extractor
    :param own_extractors: whether actor and critic of a policy of SB3 have an extractor each, if the user does not say: only
        the policy's update changes shared layers, so the critic cannot train a shared extractor
    :return: a copy with what was left out
    """
    kwargs = dict(given)
    is_shared = given.get("shared_lstm", False) or _extractor_class(policy, given) is FlattenExtractor
    if own_extractors and is_known(policy) and not is_shared:
        kwargs.setdefault("share_features_extractor", False)
    if norm_obs:
        names = ("features_extractor_class", "features_extractor_kwargs")
        within = {name: given[name] for name in names if name in given}
        kwargs |= {names[0]: NormalizedExtractor, names[1]: within}
    return kwargs


def _extractor_class(policy: type, given: dict[str, Any]) -> Any:
    """The class of the features extractor: that of the arguments, or the policy's default."""
    name = "features_extractor_class"
    signatures = (inspect.signature(kind.__init__).parameters for kind in policy.__mro__)  # type: ignore[misc]
    return given.get(name) or next(parameters[name].default for parameters in signatures if name in parameters)


@th.no_grad()
def spread_over_bounds_(policy: ActorCriticPolicy, with_std: bool) -> None:
    """
    Let an untrained Gaussian policy act over the range of its action space.

    The mean starts near the middle of the bounds, and the standard deviation at half of their distance, or less where there
    are more than :data:`NOISY_DIMS` dimensions. Other distributions (also in a mixed one) keep SB3's start, and so do
    dimensions without meaningful bounds.

    :param policy: whose ``action_net`` and ``log_std`` change
    :param with_std: whether the standard deviation is to change
    """
    space, distribution = policy.action_space, policy.action_dist
    if type(distribution) not in (DiagGaussianDistribution, MixedDistribution) or not isinstance(space, spaces.Box):
        return
    assert isinstance(policy.action_net, nn.Linear), "as SB3's distribution makes it"
    low, high = (th.as_tensor(bound.flatten(), dtype=th.float64) for bound in (space.low, space.high))
    means: Any = slice(None)
    if isinstance(distribution, MixedDistribution):
        is_continuous = distribution.where_gaussian(distribution.n_actions)
        if not is_continuous.any():
            return
        means, low, high = distribution.where_gaussian(distribution.n_outputs), low[is_continuous], high[is_continuous]
    half = (high - low) / 2
    is_range = (half > 0) & (half <= MAX_RANGE)
    policy.action_net.weight[means] *= th.where(is_range, half, 1).float().to(policy.device)[:, None]
    policy.action_net.bias[means] = th.where(is_range, (low + high) / 2, 0).float().to(policy.device)
    if with_std:
        share = math.sqrt(min(NOISY_DIMS / len(half), 1.0))
        policy.log_std.copy_(th.where(is_range, share * half, 1).log().float())
