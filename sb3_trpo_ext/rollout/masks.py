"""Rollouts with action masks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sb3_trpo_ext.rollout.actors import Actor, MlpActor
from sb3_trpo_ext.rollout.lean import LeanRollout
from sb3_trpo_ext.update.masks import MaskedCalls, apply_masks, plain_distribution
from sb3_trpo_ext.update.structure import actor_structure


class _MaskedActor(Actor):
    """The actor of any policy with masks."""

    #: Masks of the next step; ``None`` if all choices are valid.
    masks: th.Tensor | None = None

    def __init__(self, policy: MaskableActorCriticPolicy):
        super().__init__(policy)  # type: ignore[arg-type]
        self._calls = MaskedCalls(policy)  # type: ignore[arg-type]
        self._all_masks: list[th.Tensor | None] = []
        #: Of the last step.
        self._masked_logits: th.Tensor | None = None

    @th.no_grad()
    def _sample(self, observations: PyTorchObs) -> th.Tensor:
        self._all_masks.append(self.masks)
        self._masked_logits = apply_masks(self._calls.logits(observations), self.masks)
        return self._distribution(self._masked_logits).get_actions()

    @th.no_grad()
    def show_distribution(self) -> None:
        """Leave the policy's ``action_dist`` at the last step; as it is if there was none."""
        if self._masked_logits is not None:
            self._policy.action_dist.proba_distribution(self._masked_logits)

    def evaluate(self, observations: PyTorchObs, begin: int, end: int) -> tuple[th.Tensor, th.Tensor]:
        """Values and log-probabilities of the actions of this actor in the steps from ``begin`` to ``end``."""
        masks = None if self.masks is None else th.cat(self._all_masks[begin:end])  # type: ignore[arg-type]
        logits = apply_masks(self._calls.logits(observations), masks)
        log_prob = self._distribution(logits).log_prob(th.cat(self._actions[begin:end]))
        return self._policy.predict_values(observations), log_prob

    def _distribution(self, masked_logits: th.Tensor) -> Distribution:
        return plain_distribution(self._policy.action_space).proba_distribution(masked_logits)


class _MaskedMlpActor(MlpActor):
    """The actor of a plain MLP policy with masks; the outputs that it keeps are masked already."""

    #: Masks of the next step; ``None`` if all choices are valid.
    masks: th.Tensor | None = None

    def _output(self, hidden: th.Tensor) -> th.Tensor:
        return apply_masks(super()._output(hidden), self.masks)


class MaskedRollout(LeanRollout):
    """A rollout that asks the environments for their masks before each step."""

    #: With a method `action_masks`.
    model: Any
    _actor: _MaskedActor | _MaskedMlpActor

    def _make_actor(self) -> Actor:
        structure = actor_structure(self.policy)
        if structure is None:
            return _MaskedActor(self.policy)  # type: ignore[arg-type]
        return _MaskedMlpActor(self.policy, structure, plain_distribution(self.policy.action_space))

    def _act(self, observations: PyTorchObs) -> np.ndarray:
        masks = self._masks = self.model.action_masks(self.env)
        self._scope.update(action_masks=masks, use_masking=masks is not None)
        self._actor.masks = None if masks is None else th.as_tensor(masks, device=self.model.device)
        return super()._act(observations)

    def _store(self, *transition: Any) -> None:
        self.buffer.add(*transition, action_masks=self._masks)  # type: ignore[call-arg]


class CheckedMasks(VecEnvWrapper):
    """
    Environments whose masks are checked before sb3-contrib's loop gets them.

    :param venv: the environments
    :param checked_masks: asks environments for their masks, and checks them
    """

    def __init__(self, venv: VecEnv, checked_masks: Callable[[VecEnv], np.ndarray | None]):
        super().__init__(venv)
        self._checked_masks = checked_masks

    def reset(self) -> VecEnvObs:
        """Start a new episode in all environments."""
        return self.venv.reset()

    def step(self, actions: np.ndarray) -> VecEnvStepReturn:
        """Make a step: by the method that SB3's loop calls."""
        return self.venv.step(actions)

    def step_wait(self) -> VecEnvStepReturn:
        """Wait for the step."""
        return self.venv.step_wait()

    def env_method(self, method_name: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Call a method of the environments; masks are checked."""
        if method_name == "action_masks":
            return list(self._checked_masks(self.venv))  # type: ignore[arg-type]
        return self.venv.env_method(method_name, *args, **kwargs)
