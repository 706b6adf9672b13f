"""A rollout as sequences, and the calls of a policy with an LSTM on them."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
from sb3_contrib.common.recurrent.buffers import RecurrentDictRolloutBuffer, RecurrentRolloutBuffer
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from sb3_trpo_ext._observations import parts_of
from sb3_trpo_ext.optim.devices import sent_to
from sb3_trpo_ext.parallel.reductions import Shares, all_max
from sb3_trpo_ext.update.batch import Batch, in_order, take
from sb3_trpo_ext.update.calls import PolicyCalls
from sb3_trpo_ext.update.settings import no_cudnn

#: Hidden state and cell of an LSTM, each of shape ``(n_layers, n_sequences, hidden_size)``.
States = tuple[th.Tensor, th.Tensor]


class Sequences:
    """
    A rollout cut into the sequences that a recurrent network sees: one per episode and environment.

    :param starts: index of the first sample of each sequence, whose samples are contiguous; shape ``(n_sequences,)``
    :param n_samples: number of samples of the rollout
    :param actor_states: states of the actor's LSTM before each sequence
    :param critic_states: the same for the critic
    """

    def __init__(self, starts: th.Tensor, n_samples: int, actor_states: States, critic_states: States):
        self.starts = starts
        self.lengths = th.diff(starts, append=th.tensor([n_samples]))
        self.actor_states, self.critic_states = actor_states, critic_states
        #: Index of the sequence of each sample, shape ``(n_samples,)``.
        self.numbers = th.repeat_interleave(th.arange(len(starts)), self.lengths)

    @classmethod
    def of(cls, buffer: RecurrentRolloutBuffer | RecurrentDictRolloutBuffer) -> "Sequences":
        """
        Cut the rollout of a full buffer.

        :param buffer: full
        :return: its sequences, with their states from the buffer, or zeros where an episode begins
        """
        n_samples = buffer.buffer_size * buffer.n_envs
        # Flat in the order of the batch: environment by environment
        is_start = in_order(buffer, buffer.episode_starts).flatten() > 0
        first = th.zeros(n_samples, dtype=th.bool)
        first[:: buffer.buffer_size] = True
        starts = (is_start.cpu() | first).nonzero().flatten()
        goes_on = ~is_start[sent_to(is_start.device, starts)]

        def states(*names: str) -> States:
            hidden, cell = (_states_at(buffer, getattr(buffer, name), starts) * goes_on[:, None] for name in names)
            return hidden, cell

        actor, critic = states("hidden_states_pi", "cell_states_pi"), states("hidden_states_vf", "cell_states_vf")
        return cls(starts, n_samples, actor, critic)

    def indices(self, which: th.Tensor) -> th.Tensor:
        """The samples of some sequences, one sequence after the other."""
        bounds = zip(self.starts[which].tolist(), self.lengths[which].tolist(), strict=True)
        return th.cat([th.arange(start, start + length) for start, length in bounds])

    def packing(self, part: th.Tensor | slice) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        The layout of PyTorch's ``PackedSequence``: step by step, the longest sequence first.

        :param part: indices or slice of samples, whose sequences are whole or cut off at the end
        :return: the numbers of the sequences, the order of the samples, and how many sequences there are at each step
        """
        which, lengths = th.unique_consecutive(
            self.numbers[part if isinstance(part, slice) else part.cpu()], return_counts=True
        )
        begins = lengths.cumsum(0) - lengths
        lengths, by_length = lengths.sort(descending=True, stable=True)
        steps = th.arange(int(lengths[0]))[:, None]
        is_there = steps < lengths
        return which[by_length], (begins[by_length] + steps)[is_there], is_there.sum(1)


def _states_at(buffer: Any, states: np.ndarray, samples: th.Tensor) -> th.Tensor:
    """States of shape ``(n_layers, n_samples, hidden_size)`` before some samples of the batch."""
    if buffer.generator_ready:
        # `get` has made one row per sample of them
        rows = states[samples.numpy()]
    else:
        environments, steps = np.divmod(samples.numpy(), buffer.buffer_size)
        rows = states[steps, :, environments]
    return sent_to(buffer.device, th.as_tensor(rows.swapaxes(0, 1).copy()))


class RecurrentCalls(PolicyCalls):
    """
    The calls of a policy with an LSTM: the samples that go through it together are whole sequences.

    :param policy: the policy
    :param sequences: of a rollout; ``None`` if there is none yet
    """

    def __init__(self, policy: ActorCriticPolicy, sequences: Sequences | None = None):
        super().__init__(policy)
        self._sequences = sequences

    @classmethod
    def on(cls, policy: ActorCriticPolicy, buffer: RolloutBuffer) -> "RecurrentCalls":
        """The calls for the sequences of a buffer."""
        assert isinstance(buffer, (RecurrentRolloutBuffer, RecurrentDictRolloutBuffer))
        return cls(policy, Sequences.of(buffer))

    @property
    def sequences(self) -> Sequences:
        """The sequences of the rollout."""
        assert self._sequences is not None, "there is no rollout"
        return self._sequences

    def distribution_at(self, observations: PyTorchObs) -> Distribution:
        """The action distribution at the first observations of episodes."""
        policy: Any = self.policy
        distribution: Distribution = policy.get_distribution(observations, *self._zeros(observations))[0]
        return distribution

    def values_at(self, observations: PyTorchObs) -> th.Tensor:
        """The values of the first observations of episodes."""
        policy: Any = self.policy
        values: th.Tensor = policy.predict_values(observations, *self._zeros(observations))
        return values

    def _zeros(self, observations: PyTorchObs) -> tuple[States, th.Tensor]:
        n_samples = len(next(iter(parts_of(observations).values())))
        n_layers, _, hidden_size = self.policy.lstm_hidden_state_shape  # type: ignore[misc]
        state = th.zeros(n_layers, n_samples, hidden_size, device=self.policy.device)
        return (state, state), th.ones(n_samples, device=self.policy.device)

    def distribution(self, batch: Batch, part: th.Tensor | slice) -> Distribution:
        """The action distribution at the samples of some sequences."""
        policy: Any = self.policy
        features = BasePolicy.extract_features(policy, take(batch.observations, part), policy.pi_features_extractor)
        latent = self._run(policy.lstm_actor, features, part, self.sequences.actor_states)
        distribution: Distribution = policy._get_action_dist_from_latent(policy.mlp_extractor.forward_actor(latent))
        return distribution

    def values(self, batch: Batch, part: th.Tensor | slice) -> th.Tensor:
        """The values at the samples of some sequences."""
        policy: Any = self.policy
        features = BasePolicy.extract_features(policy, take(batch.observations, part), policy.vf_features_extractor)
        if policy.lstm_critic is not None:
            latent = self._run(policy.lstm_critic, features, part, self.sequences.critic_states)
        elif policy.shared_lstm:
            latent = self._run(policy.lstm_actor, features, part, self.sequences.actor_states).detach()
        else:
            latent = policy.critic(features)
        values: th.Tensor = policy.value_net(policy.mlp_extractor.forward_critic(latent))
        return values.flatten()

    def _run(self, lstm: nn.LSTM, features: th.Tensor, part: th.Tensor | slice, states: States) -> th.Tensor:
        """The outputs of an LSTM at the samples of some sequences, in the order of the samples."""
        which, order, counts = self.sequences.packing(part)
        which, order = (sent_to(features.device, index) for index in (which, order))
        state = tuple(state[:, which].to(features.dtype).contiguous() for state in states)
        # cuDNN's LSTM has no second derivatives, which Fisher-vector products need
        with no_cudnn:
            if type(lstm) is nn.LSTM and not lstm._forward_hooks and not lstm._forward_pre_hooks:
                packed, _ = lstm(PackedSequence(features[order], counts), state)
                return packed.data[th.argsort(order)]  # type: ignore[no-any-return]
            # A network of the user's, or one that somebody listens to: step by step, as in a rollout
            outputs = []
            for rows in features[order].split(counts.tolist()):
                output, state = lstm(rows[None], tuple(part[:, : len(rows)].contiguous() for part in state))
                outputs.append(output[0])
        return th.cat(outputs)[th.argsort(order)]

    def numbers_per_sample(self, batch: Batch) -> int:
        """Those of the observation, and what the LSTM keeps for the derivatives: about ten numbers per unit."""
        lstm: nn.LSTM = self.policy.lstm_actor  # type: ignore[assignment]
        return super().numbers_per_sample(batch) + 10 * lstm.num_layers * lstm.hidden_size

    def cut(self, batch: Batch, size: int, stride: int = 1) -> list[tuple[th.Tensor | slice, float]]:
        """
        Cut a batch into parts of whole sequences, of about ``size`` samples.

        With a stride k, only of every k-th sequence, or more if these have less than a k-th of the samples.
        """
        numbers = th.arange(len(self.sequences.starts))
        order = th.cat([numbers[first::stride] for first in range(stride)])
        are_too_few = self.sequences.lengths[order].cumsum(0) * stride < batch.n_samples
        which = order[: int(are_too_few.sum()) + 1].sort().values
        groups, n_samples = list[list[int]](), size
        lengths = self.sequences.lengths[which].tolist()
        for number, length in zip(which.tolist(), lengths, strict=True):
            if n_samples + length > size:
                groups.append([])
                n_samples = 0
            groups[-1].append(number)
            n_samples += length
        parts = [self.sequences.indices(th.tensor(group)) for group in groups]
        shares = [len(part) / sum(lengths) for part in parts]
        if stride == 1:
            # The same samples, without a copy of them
            return [(slice(int(part[0]), int(part[-1]) + 1), share) for part, share in zip(parts, shares, strict=True)]
        return [(sent_to(batch.returns.device, part), share) for part, share in zip(parts, shares, strict=True)]

    def plan(self, batch: Batch, batch_size: int, shares: Shares) -> tuple[list[int], list[float]]:
        """As for any policy, but no minibatch has less than one sequence."""
        n_wanted = len(shares.minibatch_sizes(batch.n_samples, batch_size))
        n_sequences = -int(all_max(th.tensor(-len(self.sequences.starts))))
        n_minibatches = min(n_wanted, n_sequences)
        small, n_large = divmod(batch.n_samples, n_minibatches)
        sizes = [small + (number < n_large) for number in range(n_minibatches)]
        return sizes, [shares.own()] * n_minibatches

    def minibatches(self, batch: Batch, sizes: Sequence[int]) -> list[th.Tensor]:
        """Shuffle the sequences, and divide them among minibatches of about the same number of samples."""
        order = th.randperm(len(self.sequences.starts))
        ends = list(itertools.accumulate(sizes))
        groups, n_samples = [list[int]()], 0.0
        for place, (number, length) in enumerate(zip(order.tolist(), self.sequences.lengths[order].tolist(), strict=True)):
            n_missing, n_left = len(sizes) - len(groups), len(order) - place
            is_full = n_samples + length / 2 > ends[len(groups) - 1]
            # None of those to come may stay empty
            if groups[-1] and n_missing > 0 and (is_full or n_left == n_missing):
                groups.append([])
            groups[-1].append(number)
            n_samples += length
        return [sent_to(batch.returns.device, self.sequences.indices(th.tensor(group))) for group in groups]
