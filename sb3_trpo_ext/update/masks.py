"""Policies whose invalid actions are masked, and their calls."""

from collections.abc import Sequence
from typing import Any, cast

import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer, MaskableRolloutBuffer
from sb3_contrib.common.maskable.distributions import (
    MaskableBernoulliDistribution,
    MaskableCategoricalDistribution,
    MaskableMultiCategoricalDistribution,
)
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import CategoricalDistribution, Distribution, MultiCategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_trpo_ext._observations import parts_of
from sb3_trpo_ext.update.batch import Batch, in_order, take
from sb3_trpo_ext.update.calls import PolicyCalls
from sb3_trpo_ext.update.distributions import CategoricalFamily, register_family
from sb3_trpo_ext.update.structure import PLAIN_DISTRIBUTIONS, STOCK_POLICIES, has_stock_methods

#: Buffers that hold masks.
MASKABLE_BUFFERS = (MaskableRolloutBuffer, MaskableDictRolloutBuffer)

STOCK_POLICIES.append(MaskableActorCriticPolicy)
PLAIN_DISTRIBUTIONS += [
    MaskableCategoricalDistribution,
    MaskableMultiCategoricalDistribution,
    MaskableBernoulliDistribution,
]
register_family(MaskableCategoricalDistribution, lambda dist: CategoricalFamily([dist.action_dim]))
for _kind in (MaskableMultiCategoricalDistribution, MaskableBernoulliDistribution):
    register_family(_kind, lambda dist: CategoricalFamily(dist.action_dims))


def choices(space: spaces.Space[Any]) -> list[int]:
    """
    How many choices each part of an action has.

    :param space: Discrete, MultiDiscrete or MultiBinary
    :return: one number per part; a mask has an entry for each choice of each
    """
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    return [int(n) for n in space.nvec] if isinstance(space, spaces.MultiDiscrete) else [2] * get_action_dim(space)


def plain_distribution(space: spaces.Space[Any]) -> Distribution:
    """SB3's distribution over the choices of a space, which takes logits of minus infinity."""
    sizes = choices(space)
    return CategoricalDistribution(*sizes) if isinstance(space, spaces.Discrete) else MultiCategoricalDistribution(sizes)


def apply_masks(logits: th.Tensor, masks: th.Tensor | None) -> th.Tensor:
    """
    Make invalid choices impossible.

    Their logits become minus infinity, not sb3-contrib's large negative number: they have no probability, no gradient and no
    curvature, and a mask of all ones changes no bit.

    :param logits: shape ``(n_samples, n_choices)``
    :param masks: of bools, the same shape; ``None`` if all choices are valid
    :return: the masked logits, the same shape
    """
    return logits if masks is None else th.where(masks, logits, -th.inf)


class MaskedCalls(PolicyCalls):
    """
    The calls of a policy with action masks.

    :param policy: the policy
    :param masks: of the samples of a rollout, bools of shape ``(n_samples, n_choices)``; ``None`` if all choices are valid
    """

    def __init__(self, policy: ActorCriticPolicy, masks: th.Tensor | None = None):
        super().__init__(policy)
        self.masks = masks

    @classmethod
    def on(cls, policy: ActorCriticPolicy, buffer: RolloutBuffer) -> "MaskedCalls":
        """The calls with the masks of a buffer."""
        assert isinstance(buffer, MASKABLE_BUFFERS)
        return cls(policy, in_order(buffer, buffer.action_masks) != 0)

    @property
    def _is_stock(self) -> bool:
        """Whether the policy's distribution is known: that of the logits, the other choices masked."""
        names = ("get_distribution", "_get_action_dist_from_latent", "extract_features")
        return has_stock_methods(self.policy, *names) and type(self.policy.action_dist) in PLAIN_DISTRIBUTIONS

    def distribution_at(self, observations: PyTorchObs) -> Distribution:
        """The distribution without invalid choices."""
        policy: Any = self.policy
        shape = (len(next(iter(parts_of(observations).values()))), sum(choices(policy.action_space)))
        distribution: Distribution = policy.get_distribution(
            observations, action_masks=None if self._is_stock else th.ones(shape, dtype=th.bool, device=policy.device)
        )
        return distribution

    def distribution(self, batch: Batch, part: th.Tensor | slice) -> Distribution:
        """The masked distribution at some samples; that of a user's own policy as the policy says."""
        observations, policy = take(batch.observations, part), cast(Any, self.policy)
        if self._is_stock:
            return self.distribution_of([self.logits(observations)], batch, part)
        masks = None if self.masks is None else self.masks[part]
        distribution: Distribution = policy.get_distribution(observations, action_masks=masks)
        return distribution

    def distribution_of(self, statistics: Sequence[th.Tensor], batch: Batch, part: th.Tensor | slice) -> Distribution:
        """The masked distribution, given logits."""
        logits = apply_masks(statistics[0], None if self.masks is None else self.masks[part])
        return plain_distribution(self.policy.action_space).proba_distribution(logits)

    def logits(self, observations: PyTorchObs) -> th.Tensor:
        """
        The logits of all choices, before any mask, of a policy of sb3-contrib.

        :param observations: of the samples
        :return: shape ``(n_samples, n_choices)``
        """
        policy: Any = self.policy
        features = BasePolicy.extract_features(policy, observations, policy.pi_features_extractor)
        logits: th.Tensor = policy.action_net(policy.mlp_extractor.forward_actor(features))
        return logits
