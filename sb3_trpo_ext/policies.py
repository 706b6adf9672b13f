"""Policies for TRPO."""

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, BasePolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import Schedule

from sb3_trpo_ext._checks import ArgumentError
from sb3_trpo_ext.update.mixed import MixedActions, MixedDistribution

MlpPolicy = ActorCriticPolicy


class OwnExtractorsMixin:
    """
    Actor and critic have a features extractor each by default.

    Shared layers belong to the actor, and only the policy update changes them: with a shared extractor, the critic cannot
    train its features.
    """

    def __init__(self, *args: Any, share_features_extractor: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs, share_features_extractor=share_features_extractor)  # type: ignore[call-arg]


class CnnPolicy(OwnExtractorsMixin, ActorCriticCnnPolicy):
    """
    SB3's ``CnnPolicy`` whose actor and critic have a features extractor each by default.

    :param args: as for :class:`~stable_baselines3.common.policies.ActorCriticCnnPolicy`
    :param share_features_extractor: whether the critic uses the actor's features, which it then cannot train
    :param kwargs: as for :class:`~stable_baselines3.common.policies.ActorCriticCnnPolicy`
    """


class MultiInputPolicy(OwnExtractorsMixin, MultiInputActorCriticPolicy):
    """
    SB3's ``MultiInputPolicy`` whose actor and critic have a features extractor each by default.

    :param args: as for :class:`~stable_baselines3.common.policies.MultiInputActorCriticPolicy`
    :param share_features_extractor: whether the critic uses the actor's features, which it then cannot train
    :param kwargs: as for :class:`~stable_baselines3.common.policies.MultiInputActorCriticPolicy`
    """


class _SquashedMixin(ActorCriticPolicy):
    """An actor whose Gaussian goes through a tanh, so that its actions never leave the bounds of the action space."""

    def _build(self, lr_schedule: Schedule) -> None:
        """
        Put the squashed Gaussian in place of SB3's before the networks are made.

        :param lr_schedule: of the optimizer
        :raises ValueError: for gSDE, which has a squashing of its own, and for an action space without bounds
        """
        if self.use_sde:
            use = "policy_kwargs=dict(squash_output=True) and the policy of the same name without 'Squashed'"
            raise ValueError(f"{type(self).__name__} is for `use_sde=False`; for gSDE with a tanh use {use}.")
        if not isinstance(self.action_space, spaces.Box) or not self.action_space.is_bounded():
            needed = "a Box action space with finite bounds to squash into"
            raise ValueError(f"{type(self).__name__} needs {needed}, got {self.action_space}.")
        self.action_dist = SquashedDiagGaussianDistribution(get_action_dim(self.action_space))
        # What makes SB3 rescale actions from [-1, 1] to the bounds in `predict` and in the rollout
        self._squash_output = True
        super()._build(lr_schedule)


class SquashedMlpPolicy(_SquashedMixin, MlpPolicy):
    """``MlpPolicy`` with a tanh-squashed Gaussian for Box actions with finite bounds."""


class SquashedCnnPolicy(_SquashedMixin, CnnPolicy):
    """``CnnPolicy`` with a tanh-squashed Gaussian for Box actions with finite bounds."""


class SquashedMultiInputPolicy(_SquashedMixin, MultiInputPolicy):
    """``MultiInputPolicy`` with a tanh-squashed Gaussian for Box actions with finite bounds."""


class _MixedMixin(ActorCriticPolicy):
    """An actor of Tuple or Dict actions: the networks and the rollout buffer have them as one vector."""

    action_space: MixedActions

    def _build(self, lr_schedule: Schedule) -> None:
        """
        Put the distribution of all parts in place of SB3's before the networks are made.

        :param lr_schedule: of the optimizer
        :raises ValueError: for gSDE, and for a policy with a distribution of its own
        """
        if self.use_sde:
            raise ArgumentError("`use_sde` must be False for Tuple and Dict actions, got True: gSDE is for Box actions.")
        self.action_dist = MixedDistribution(self.action_space)
        # What makes SB3 call `unscale_action` in `predict` and in the rollout
        self._squash_output = True
        super()._build(lr_schedule)
        if type(self.action_dist) is not MixedDistribution:
            kind = type(self).__mro__[2].__name__
            raise ArgumentError(
                f"`policy` must leave the distribution of Tuple and Dict actions to TRPO, and {kind} makes a "
                f"{type(self.action_dist).__name__}: use 'MlpPolicy', 'CnnPolicy', 'MultiInputPolicy' or a subclass of these."
            )

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """
        Turn action vectors into the tuples or dicts that the environment takes.

        :param scaled_action: one vector per action, shape ``(n_actions, n_numbers)``
        :return: an array of tuples or dicts, shape ``(n_actions,)``
        """
        return self.action_space.structures(scaled_action)

    def predict(self, *args: Any, **kwargs: Any) -> tuple[Any, tuple[np.ndarray, ...] | None]:
        """As in SB3; the action for one observation is a tuple or a dict, and those for a batch are an array of these."""
        actions, state = super().predict(*args, **kwargs)
        return (actions if actions.ndim > 0 else actions.item()), state


class MixedMlpPolicy(_MixedMixin, MlpPolicy):
    """What ``MlpPolicy`` becomes for Tuple and Dict actions."""


class MixedCnnPolicy(_MixedMixin, CnnPolicy):
    """What ``CnnPolicy`` becomes for Tuple and Dict actions."""


class MixedMultiInputPolicy(_MixedMixin, MultiInputPolicy):
    """What ``MultiInputPolicy`` becomes for Tuple and Dict actions."""


#: By the classes that they are made of. They have names here so that a policy can be pickled, and loaded by itself.
_MIXED: dict[type[BasePolicy], type[ActorCriticPolicy]] = {
    MlpPolicy: MixedMlpPolicy,
    CnnPolicy: MixedCnnPolicy,
    MultiInputPolicy: MixedMultiInputPolicy,
}


def mixed_policy(policy: type[BasePolicy]) -> type[ActorCriticPolicy]:
    """The class of a policy for Tuple and Dict actions."""
    if issubclass(policy, _MixedMixin):
        return policy
    if policy not in _MIXED:
        _MIXED[policy] = type(f"Mixed{policy.__name__}", (_MixedMixin, policy), {})
    return _MIXED[policy]


#: The names that :class:`~sb3_trpo_ext.trpo.TRPO` takes for its policies.
POLICY_ALIASES: dict[str, type[BasePolicy]] = {
    "MlpPolicy": MlpPolicy,
    "CnnPolicy": CnnPolicy,
    "MultiInputPolicy": MultiInputPolicy,
    "SquashedMlpPolicy": SquashedMlpPolicy,
    "SquashedCnnPolicy": SquashedCnnPolicy,
    "SquashedMultiInputPolicy": SquashedMultiInputPolicy,
}
