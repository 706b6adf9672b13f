"""What the update has to know of a distribution: its statistics, KL(old || new), entropy, and Fisher matrix.

One :class:`Family` per kind of distribution. The KL is always the joint one, KL(old || new) **summed over action dimensions**,
one number per state. (SB3's ``kl_divergence`` returns one number per action dimension for continuous and binary actions, and
sb3-contrib averages over them too: its ``target_kl`` and ``cg_damping`` times the number of action dimensions are ours.)

A distribution without a family of its own is served by :class:`TorchFamily`, through ``torch.distributions``; a user can
register a better one with :func:`register_family`.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch as th
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    SquashedDiagGaussianDistribution,
    StateDependentNoiseDistribution,
)
from torch.nn import functional as F

from sb3_trpo_ext.optim.devices import sent_to
from sb3_trpo_ext.optim.operators import Statistics

#: What a family reads off a distribution: `Statistics`, or any object if `is_batched` is false.
StatisticsT = TypeVar("StatisticsT")


class Family(ABC, Generic[StatisticsT]):
    """
    A kind of distribution, described by its statistics: as a rule a tuple of tensors whose first axis is the batch.

    They are the numbers that the KL is a smooth function of. They need not be minimal (logits are defined up to a constant per
    state), but ``fisher`` must be the Hessian of ``kl(old, new)`` in those of ``new``, at ``new = old``.
    """

    #: Whether the statistics are a tuple of tensors with the batch as first axis, which can be cut into minibatches.
    is_batched = True
    #: Whether there is :meth:`fisher`; if not, the Fisher matrix is the Hessian of the KL by double backpropagation.
    has_fisher = True
    #: Whether the entropy has no closed form and is estimated with reparameterized noise.
    needs_noise = False

    @abstractmethod
    def statistics(self, distribution: Distribution) -> StatisticsT:
        """Read the statistics off a distribution."""

    @abstractmethod
    def kl(self, old: StatisticsT, new: StatisticsT) -> th.Tensor:
        """
        KL(old || new) per state, summed over action dimensions.

        :param old: statistics
        :param new: statistics
        :return: shape ``(n_batch,)``
        """

    @abstractmethod
    def entropy(self, statistics: StatisticsT, noise: th.Tensor | None = None) -> th.Tensor | None:
        """
        Entropy per state in nats, summed over action dimensions.

        That of the action as the policy returns it, which is in [-1, 1] if it is squashed.

        :param statistics: of the distribution
        :param noise: standard normal numbers of shape ``(n_batch, n_actions)``, for a family with ``needs_noise``
        :return: shape ``(n_batch,)``; ``None`` if it is not known
        """

    def fisher(self, statistics: StatisticsT, tangents: Statistics) -> Statistics:
        """
        Multiply with the Fisher matrix in output space, state by state.

        :param statistics: where the matrix is taken
        :param tangents: one per statistic, of its shape
        :return: one cotangent per statistic, of its shape
        """
        raise NotImplementedError(f"{type(self).__name__} has no Fisher matrix in output space")

    def sample_score(self, statistics: StatisticsT, generator: th.Generator) -> th.Tensor | None:
        """
        Gradient of the log-probability of a sampled action in the first statistic: its covariance is that block of `fisher`.

        :param statistics: of the distribution to sample from
        :param generator: on the CPU; no global random number is used
        :return: shape of the first statistic, without a graph; ``None`` for a family that does not know
        """
        return None

    def std(self, statistics: StatisticsT) -> th.Tensor | None:
        """
        Standard deviation of the exploration noise, for logging.

        :param statistics: of the distribution
        :return: shape ``(n_batch, n_actions)``, or ``None`` for a distribution that has none
        """
        return None


class GaussianFamily(Family[Statistics]):
    """
    Diagonal Gaussian with statistics ``(mean, log_std)``, each of shape ``(n_batch, n_actions)``.

    Serves gSDE as well, whose action is Gaussian given the state. ``squashed`` means that the action is the tanh of it. That
    is a bijection, so KL and Fisher matrix are those of the Gaussian; the entropy is not.

    :param squashed: whether a tanh follows
    """

    def __init__(self, squashed: bool = False):
        self.needs_noise = squashed

    def statistics(self, distribution: Distribution) -> Statistics:
        """Mean and log std of the Gaussian (before the tanh, if there is one)."""
        normal = distribution.distribution
        assert isinstance(normal, th.distributions.Normal)
        return normal.loc, normal.scale.log()

    def kl(self, old: Statistics, new: Statistics) -> th.Tensor:
        """
        ``sum_i 1/2 [exp(2 d_i) - 1 - 2 d_i + ((mean_old - mean_new) / std_new)^2]`` with ``d = log_std_old - log_std_new``.

        Written with ``expm1``: at the KLs of a trust region the textbook form loses the digits that matter.

        :param old: ``(mean, log_std)``
        :param new: ``(mean, log_std)``
        :return: shape ``(n_batch,)``
        """
        (old_mean, old_log_std), (new_mean, new_log_std) = old, new
        twice = 2 * (old_log_std - new_log_std)
        shift = (old_mean - new_mean) * th.exp(-new_log_std)
        return 0.5 * (th.expm1(twice) - twice + shift.square()).sum(dim=1)

    def entropy(self, statistics: Statistics, noise: th.Tensor | None = None) -> th.Tensor:
        """``sum_i log_std_i + 1/2 log(2 pi e)``; squashed, plus the mean of ``log(1 - tanh(u)^2)``, with one u per state."""
        mean, log_std = statistics
        entropy = log_std + 0.5 * math.log(2 * math.pi * math.e)
        if self.needs_noise:
            assert noise is not None, "a squashed Gaussian needs noise for its entropy"
            u = mean + log_std.exp() * noise
            # log(1 - tanh(u)^2), without the cancellation of the direct form at large |u|
            entropy = entropy + 2 * (math.log(2.0) - u - F.softplus(-2 * u))
        return entropy.sum(dim=1)

    def fisher(self, statistics: Statistics, tangents: Statistics) -> Statistics:
        """``diag(1 / std^2, 2)``."""
        _, log_std = statistics
        return tangents[0] * th.exp(-2 * log_std), 2 * tangents[1]

    @th.no_grad()
    def sample_score(self, statistics: Statistics, generator: th.Generator) -> th.Tensor:
        """``noise / std``, the score of the action ``mean + std noise``."""
        return standard_normal(statistics[0], generator) * th.exp(-statistics[1])

    def std(self, statistics: Statistics) -> th.Tensor:
        """Standard deviation before the tanh, if there is one."""
        return statistics[1].exp()


class CategoricalFamily(Family[Statistics]):
    """One or several independent categorical distributions, with the logits side by side: ``(logits,)``."""

    def __init__(self, action_dims: Sequence[int]):
        self.action_dims = [int(dim) for dim in action_dims]

    def _log_probs(self, statistics: Statistics) -> list[th.Tensor]:
        """Normalized log-probabilities, one tensor per categorical."""
        return [th.log_softmax(logits, dim=1) for logits in statistics[0].split(self.action_dims, dim=1)]

    def statistics(self, distribution: Distribution) -> Statistics:
        """The logits of all categoricals side by side."""
        # A list of several has this name in sb3-contrib
        inner: Any = getattr(distribution, "distributions", None) or distribution.distribution
        categoricals = inner if isinstance(inner, list) else [inner]
        return (th.cat([categorical.logits for categorical in categoricals], dim=1),)

    def kl(self, old: Statistics, new: Statistics) -> th.Tensor:
        """
        ``sum p_new - p_old - p_old d`` with ``d = log p_new - log p_old``, where a masked action counts nothing.

        That is ``sum p_old (log p_old - log p_new)``, whose terms of both signs nearly cancel at the KLs of a trust region;
        here no term is negative.

        :param old: ``(logits,)``
        :param new: ``(logits,)``
        :return: shape ``(n_batch,)``
        """
        pairs = zip(self._log_probs(old), self._log_probs(new), strict=True)
        return sum((_kl_terms(*pair).sum(dim=1) for pair in pairs), start=old[0].new_zeros(len(old[0])))

    def entropy(self, statistics: Statistics, noise: th.Tensor | None = None) -> th.Tensor:
        """``-sum p log p``."""
        total = statistics[0].new_zeros(statistics[0].shape[0])
        for log_prob in self._log_probs(statistics):
            prob = log_prob.exp()
            total = total - (prob * th.where(prob > 0, log_prob, th.zeros_like(prob))).sum(dim=1)
        return total

    def fisher(self, statistics: Statistics, tangents: Statistics) -> Statistics:
        """``diag(p) - p p^T`` for each categorical."""
        parts = []
        for log_prob, tangent in zip(self._log_probs(statistics), tangents[0].split(self.action_dims, dim=1), strict=True):
            weighted = log_prob.exp() * tangent
            parts.append(weighted - log_prob.exp() * weighted.sum(dim=1, keepdim=True))
        return (th.cat(parts, dim=1),)

    @th.no_grad()
    def sample_score(self, statistics: Statistics, generator: th.Generator) -> th.Tensor:
        """``one_hot(action) - p`` for each categorical, with an action sampled from p."""
        parts = []
        for log_prob in self._log_probs(statistics):
            # The first of exponential clocks with these rates to ring is a sample (the Gumbel-max trick)
            clock = th.empty(log_prob.shape, dtype=log_prob.dtype).exponential_(generator=generator)
            action = (log_prob - sent_to(log_prob.device, clock).log()).argmax(dim=1)
            parts.append(F.one_hot(action, log_prob.shape[1]) - log_prob.exp())
        return th.cat(parts, dim=1)


class BernoulliFamily(Family[Statistics]):
    """Independent binary actions, with statistics ``(logits,)`` of shape ``(n_batch, n_actions)``."""

    def statistics(self, distribution: Distribution) -> Statistics:
        """The logits."""
        assert isinstance(distribution.distribution, th.distributions.Bernoulli)
        return (distribution.distribution.logits,)

    def kl(self, old: Statistics, new: Statistics) -> th.Tensor:
        """The categorical form for both outcomes; their log-probabilities are ``-softplus(-z)`` and ``-softplus(z)``."""
        (z_old,), (z_new,) = old, new
        on, off = (_kl_terms(F.logsigmoid(sign * z_old), F.logsigmoid(sign * z_new)) for sign in (1, -1))
        return (on + off).sum(dim=1)

    def entropy(self, statistics: Statistics, noise: th.Tensor | None = None) -> th.Tensor:
        """``sum_i softplus(z) - p z``."""
        (z,) = statistics
        return (F.softplus(z) - th.sigmoid(z) * z).sum(dim=1)

    def fisher(self, statistics: Statistics, tangents: Statistics) -> Statistics:
        """``diag(p (1 - p))``."""
        (z,) = statistics
        return (th.sigmoid(z) * th.sigmoid(-z) * tangents[0],)

    @th.no_grad()
    def sample_score(self, statistics: Statistics, generator: th.Generator) -> th.Tensor:
        """``action - p`` with an action sampled from p."""
        probs = th.sigmoid(statistics[0])
        uniform = th.rand(probs.shape, generator=generator, dtype=probs.dtype)
        return (sent_to(probs.device, uniform) < probs).to(probs.dtype) - probs


def _kl_terms(old_log_prob: th.Tensor, new_log_prob: th.Tensor) -> th.Tensor:
    """
    ``p_new - p_old - p_old d`` with ``d = log p_new - log p_old``, for each outcome; they add up to KL(old || new).

    At small d this is ``p_old (exp(d) - 1 - d)``, without the cancellation.

    :param old_log_prob: of any shape; -inf is probability zero
    :param new_log_prob: the same shape
    :return: the same shape, never negative; infinite where an outcome is impossible that was possible
    """
    old_prob = old_log_prob.exp()
    difference = new_log_prob - old_log_prob
    zero = difference.new_zeros(())
    # NaN where an outcome is masked on both sides: not small
    is_small = difference.abs() < 0.5
    small = th.where(is_small, difference, zero)
    # An old probability of zero leaves p_new, and 0 * inf would be NaN
    large = th.where(old_prob > 0, difference, zero)
    # Rounding makes a term of nearly zero negative now and then
    terms = old_prob * (th.expm1(small) - small).clamp(min=0)
    return th.where(is_small, terms, new_log_prob.exp() - old_prob * (1 + large))


def standard_normal(like: th.Tensor, generator: th.Generator) -> th.Tensor:
    """Standard normal numbers from a generator of their own, the same on every device."""
    return sent_to(like.device, th.randn(like.shape, generator=generator, dtype=like.dtype))


class TorchFamily(Family[Distribution]):
    """
    Any SB3 distribution around a ``torch.distributions`` object, by that object's own KL and entropy.

    The statistics are the SB3 distribution itself. KL and entropy with one number per action dimension are summed.
    """

    is_batched = False
    has_fisher = False

    def statistics(self, distribution: Distribution) -> Distribution:
        """A copy, because SB3 puts the next distribution into the same object."""
        return copy.copy(distribution)

    def kl(self, old: Distribution, new: Distribution) -> th.Tensor:
        """
        ``torch.distributions.kl_divergence(old, new)``.

        :param old: SB3 distribution
        :param new: SB3 distribution
        :return: shape ``(n_batch,)``
        :raises ValueError: if PyTorch has no KL for this pair
        """
        pair: Any = [getattr(each, "distribution", None) for each in (old, new)]
        try:
            kl = th.distributions.kl_divergence(*pair)
        except NotImplementedError as error:
            name = f"{type(old).__name__} ({type(pair[0]).__name__})"
            raise ValueError(f"{name} has no KL divergence: use PyTorch's `register_kl`, or `register_family`.") from error
        return kl.reshape(len(kl), -1).sum(dim=1)

    def entropy(self, statistics: Distribution, noise: th.Tensor | None = None) -> th.Tensor | None:
        """The distribution's own."""
        try:
            entropy = statistics.entropy()
        except NotImplementedError:
            return None
        return None if entropy is None else entropy.reshape(len(entropy), -1).sum(dim=1)


_FAMILIES: dict[type[Distribution], Callable[[Any], Family[Any]]] = {}


def register_family(distribution_class: type[Distribution], make_family: Callable[[Any], Family[Any]]) -> None:
    """Say how TRPO handles a kind of distribution. Not inherited: a subclass may differ in what matters here."""
    _FAMILIES[distribution_class] = make_family


def family_of(distribution: Distribution) -> Family[Any]:
    """The family of a distribution: the one registered for its class, else :class:`TorchFamily`."""
    make_family = _FAMILIES.get(type(distribution))
    return TorchFamily() if make_family is None else make_family(distribution)


register_family(DiagGaussianDistribution, lambda _: GaussianFamily())
register_family(SquashedDiagGaussianDistribution, lambda _: GaussianFamily(squashed=True))
register_family(StateDependentNoiseDistribution, lambda dist: GaussianFamily(squashed=dist.bijector is not None))
register_family(CategoricalDistribution, lambda dist: CategoricalFamily([dist.action_dim]))
register_family(MultiCategoricalDistribution, lambda dist: CategoricalFamily(dist.action_dims))
register_family(BernoulliDistribution, lambda _: BernoulliFamily())
