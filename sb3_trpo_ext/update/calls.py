"""How an update asks a policy for its distributions and values."""

from collections.abc import Sequence

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_trpo_ext.optim.devices import sent_to
from sb3_trpo_ext.parallel.reductions import Shares
from sb3_trpo_ext.update.batch import Batch, numbers_per_sample, take


class PolicyCalls:
    """
    The calls of a policy that needs nothing but observations.

    A subclass is for policies that need more: action masks, or the states of a recurrent network.

    :param policy: the policy
    """

    def __init__(self, policy: ActorCriticPolicy):
        self.policy = policy

    @classmethod
    def on(cls, policy: ActorCriticPolicy, buffer: RolloutBuffer) -> "PolicyCalls":
        """
        The calls for the samples of a rollout.

        :param policy: the policy
        :param buffer: with what the policy needs beside observations
        """
        return cls(policy)

    def distribution_at(self, observations: PyTorchObs) -> Distribution:
        """The action distribution at observations that are no part of a rollout."""
        return self.policy.get_distribution(observations)

    def values_at(self, observations: PyTorchObs) -> th.Tensor:
        """The values of observations that are no part of a rollout, shape ``(n_samples, 1)``."""
        return self.policy.predict_values(observations)

    def distribution(self, batch: Batch, part: th.Tensor | slice) -> Distribution:
        """
        The action distribution at some samples of a batch.

        :param batch: the rollout
        :param part: indices or slice of the samples
        :return: of the policy as it is now
        """
        return self.policy.get_distribution(take(batch.observations, part))

    def distribution_of(self, statistics: Sequence[th.Tensor], batch: Batch, part: th.Tensor | slice) -> Distribution:
        """
        The action distribution, given what the network of an MLP actor returned.

        :param statistics: output of the network, and log std if there is one, a row for each sample
        :param batch: the rollout
        :param part: of which samples the output is
        """
        return self.policy.action_dist.proba_distribution(*statistics)

    def values(self, batch: Batch, part: th.Tensor | slice) -> th.Tensor:
        """
        The values at some samples.

        :param batch: the rollout
        :param part: indices or slice of the samples
        :return: shape ``(n_samples,)``
        """
        return self.policy.predict_values(take(batch.observations, part)).flatten()

    def numbers_per_sample(self, batch: Batch) -> int:
        """How many numbers a sample takes in a pass through the policy, roughly; at least 1."""
        return numbers_per_sample(batch.observations)

    def cut(self, batch: Batch, size: int, stride: int = 1) -> list[tuple[th.Tensor | slice, float]]:
        """
        Cut a batch into parts that can go through the policy one after the other.

        :param batch: the rollout
        :param size: samples in a part, at most
        :param stride: leave out all but every k-th sample
        :return: indices or slice of each part, with its share of the samples
        """
        samples = range(0, batch.n_samples, stride)
        parts = [slice(start, start + size * stride, stride) for start in samples[::size]]
        return [(part, len(range(batch.n_samples)[part]) / len(samples)) for part in parts]

    def plan(self, batch: Batch, batch_size: int, shares: Shares) -> tuple[list[int], list[float]]:
        """
        The sizes of the minibatches, of which all processes have the same number.

        :param batch: the rollout
        :param batch_size: samples in a minibatch per process
        :param shares: what each process counts
        :return: sizes, which add up to the number of samples, and what this process counts in each
        """
        sizes = shares.minibatch_sizes(batch.n_samples, batch_size)
        return sizes, shares.minibatch_weights(batch.n_samples, batch_size)

    def minibatches(self, batch: Batch, sizes: Sequence[int]) -> list[th.Tensor]:
        """
        Shuffle the samples, and cut them into minibatches.

        :param batch: the rollout
        :param sizes: of the minibatches, from :meth:`plan`
        :return: the indices of each
        """
        order = sent_to(batch.returns.device, th.randperm(batch.n_samples))
        return list(order.split(list(sizes)))
