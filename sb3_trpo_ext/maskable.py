"""TRPO where some actions are invalid in some states: the policies, buffers and wrappers are sb3-contrib's."""

from typing import Any, ClassVar, TypeVar

import numpy as np
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer, MaskableRolloutBuffer
from sb3_contrib.common.maskable.policies import (
    MaskableActorCriticCnnPolicy,
    MaskableActorCriticPolicy,
    MaskableMultiInputActorCriticPolicy,
)
from sb3_contrib.common.maskable.utils import is_masking_supported
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext import arguments
from sb3_trpo_ext._checks import ArgumentError
from sb3_trpo_ext.policies import OwnExtractorsMixin
from sb3_trpo_ext.rollout.collect import collect_rollouts
from sb3_trpo_ext.rollout.masks import CheckedMasks, MaskedRollout
from sb3_trpo_ext.trpo import TRPO
from sb3_trpo_ext.update.calls import PolicyCalls
from sb3_trpo_ext.update.masks import MASKABLE_BUFFERS, MaskedCalls, choices

SelfMaskableTRPO = TypeVar("SelfMaskableTRPO", bound="MaskableTRPO")

#: What a part of an action may be.
_SPACES = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


class MaskableCnnPolicy(OwnExtractorsMixin, MaskableActorCriticCnnPolicy):
    """sb3-contrib's policy for images, whose actor and critic have a features extractor each by default."""


class MaskableMultiInputPolicy(OwnExtractorsMixin, MaskableMultiInputActorCriticPolicy):
    """sb3-contrib's policy for Dict observations, whose actor and critic have a features extractor each by default."""


class MaskableTRPO(TRPO):
    """
    TRPO with invalid action masking (Huang and Ontanon 2022, https://arxiv.org/abs/2006.14171).

    Objective, KL and Fisher matrix are those of the masked distribution: an invalid choice has no probability, no gradient and
    no curvature, and a state with a single valid action contributes nothing.

    Environments provide masks through a method ``action_masks()`` or sb3-contrib's ``ActionMasker``. Arguments are those of
    :class:`~sb3_trpo_ext.trpo.TRPO`, and policies those of sb3-contrib's ``MaskablePPO``. Its ``evaluate_policy`` and
    ``MaskableEvalCallback`` work with this class.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MaskableActorCriticPolicy,
        "CnnPolicy": MaskableCnnPolicy,
        "MultiInputPolicy": MaskableMultiInputPolicy,
    }
    policy_base: ClassVar[str | None] = MaskableActorCriticPolicy.__name__
    calls_class: ClassVar[type[PolicyCalls]] = MaskedCalls

    #: Whether the environment is asked for masks.
    _use_masking = True

    def _setup_model(self) -> None:
        """Check what masks are for, and create buffer, policy and optimizer."""
        if self.action_space is not None and not isinstance(self.action_space, _SPACES):
            names = ", ".join(space.__name__ for space in _SPACES)
            # The first words are SB3's
            raise ArgumentError(f"The algorithm only supports {names} as action spaces, got {self.action_space}: use TRPO.")
        if self.rollout_buffer_class is None:
            is_dict = isinstance(self.observation_space, spaces.Dict)
            self.rollout_buffer_class = MaskableDictRolloutBuffer if is_dict else MaskableRolloutBuffer
        super()._setup_model()

    def _setup_policy(self) -> None:
        """Create buffer, policy and optimizer. SB3 passes ``use_sde`` to all policies, but these do not take it."""
        kind: Any = self.policy_class
        self.policy_class = lambda *args, use_sde, **kwargs: kind(*args, **kwargs)  # type: ignore[assignment]
        try:
            super()._setup_policy()
        finally:
            self.policy_class = kind

    def action_masks(self, env: VecEnv) -> np.ndarray | None:
        """
        Ask environments which actions are valid now.

        :param env: the environments
        :return: bools of shape ``(n_envs, n_choices)``, the choices of all parts of an action side by side; ``None`` without
            masking
        :raises ValueError: if a mask has another shape, or if an environment allows no action
        """
        if not self._use_masking:
            return None
        sizes, given = choices(self.action_space), env.env_method("action_masks")
        if len(given) == 1 and np.shape(given[0]) == (env.num_envs, sum(sizes)):
            # A simulator of many environments, whose `env_method` calls its own method
            given = list(given[0])
        masks = np.stack([self._checked(index, mask, sum(sizes)) for index, mask in enumerate(given)])
        starts = np.cumsum([0, *sizes[:-1]])
        is_possible = np.logical_or.reduceat(masks, starts, axis=1).all(axis=1)
        if not is_possible.all():
            index = int(np.argmin(is_possible))
            raise ValueError(
                f"`action_masks` of environment {index} allows no action after {self.num_timesteps} timesteps: an "
                "episode must end, or one choice of each part of the action must be valid."
            )
        return masks

    def _checked(self, index: int, mask: Any, n_choices: int) -> np.ndarray:
        """The mask of one environment, flat."""
        try:
            array = np.asarray(mask, dtype=bool)
        except ValueError:
            # Parts of different lengths
            array = np.zeros(0, dtype=bool)
        if array.size != n_choices:
            raise ValueError(
                f"`action_masks` of environment {index} must return {n_choices} entries, one for each choice of "
                f"{self.action_space} (those of all parts of an action side by side), got {mask!r}."
            )
        return array.flatten()

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
        use_masking: bool | None = None,
    ) -> bool:
        """
        Collect experiences: as :meth:`sb3_trpo_ext.trpo.TRPO.collect_rollouts`.

        :param use_masking: whether to ask the environment for masks; ``None`` for what ``learn`` was told
        """
        if use_masking is not None:
            self._use_masking = use_masking
        return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)

    def _collect(self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, *args: Any) -> bool:
        arguments.check_buffer(type(rollout_buffer), MASKABLE_BUFFERS, "with masks", "shuffle samples away from their masks")
        if self._use_masking and not is_masking_supported(env):
            raise ValueError(
                "The environment has no method `action_masks`: wrap it in sb3-contrib's ActionMasker, or pass "
                "use_masking=False to `learn`."
            )

        def loop(_: Any, env: VecEnv, *args: Any) -> bool:
            # As a function: it needs nothing of its class
            collect: Any = MaskablePPO.collect_rollouts
            return collect(self, CheckedMasks(env, self.action_masks), *args, use_masking=self._use_masking)

        return collect_rollouts(self, env, callback, rollout_buffer, *args, rollout_class=MaskedRollout, loop=loop)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Get actions for observations.

        :param observation: one, or one per environment
        :param state: there is none
        :param episode_start: not needed
        :param deterministic: the most probable actions instead of samples
        :param action_masks: which choices are valid; ``None`` for all
        :return: the actions, and ``state``
        """
        return self.policy.predict(observation, state, episode_start, deterministic, action_masks=action_masks)  # type: ignore[call-arg]

    def learn(  # type: ignore[override]
        self: SelfMaskableTRPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "MaskableTRPO",
        reset_num_timesteps: bool = True,
        use_masking: bool = True,
        progress_bar: bool = False,
    ) -> SelfMaskableTRPO:
        """
        Train the model.

        :param total_timesteps: as for :meth:`sb3_trpo_ext.trpo.TRPO.learn`, and so are the others
        :param use_masking: whether to ask the environment for masks
        :return: the trained model
        """
        self._use_masking = use_masking
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
