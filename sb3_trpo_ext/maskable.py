"""TRPO where some actions are invalid in some states: the policies, buffers and wrappers are sb3-contrib's."""

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer, MaskableRolloutBuffer
from sb3_contrib.common.maskable.distributions import (
    MaskableBernoulliDistribution,
    MaskableCategoricalDistribution,
    MaskableMultiCategoricalDistribution,
)
from sb3_contrib.common.maskable.policies import (
    MaskableActorCriticCnnPolicy,
    MaskableActorCriticPolicy,
    MaskableMultiInputActorCriticPolicy,
)
from sb3_contrib.common.maskable.utils import is_masking_supported
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import CategoricalDistribution, Distribution, MultiCategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import MaybeCallback, PyTorchObs
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sb3_trpo_ext import arguments
from sb3_trpo_ext._checks import ArgumentError
from sb3_trpo_ext.policies import OwnExtractorsMixin
from sb3_trpo_ext.rollout.actors import Actor, MlpActor
from sb3_trpo_ext.rollout.collect import LeanRollout, collect_rollouts
from sb3_trpo_ext.trpo import TRPO
from sb3_trpo_ext.update.batch import Batch, in_order, take
from sb3_trpo_ext.update.calls import PolicyCalls
from sb3_trpo_ext.update.distributions import CategoricalFamily, family_of, register_family
from sb3_trpo_ext.update.structure import PLAIN_DISTRIBUTIONS, STOCK_POLICIES, actor_structure, has_stock_methods

SelfMaskableTRPO = TypeVar("SelfMaskableTRPO", bound="MaskableTRPO")

#: What a part of an action may be.
_SPACES = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
_BUFFERS = (MaskableRolloutBuffer, MaskableDictRolloutBuffer)

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
        assert isinstance(buffer, _BUFFERS)
        return cls(policy, in_order(buffer, buffer.action_masks) != 0)

    def distribution(self, batch: Batch, part: th.Tensor | slice) -> Distribution:
        """The masked distribution at some samples."""
        return self.distribution_of([self.logits(take(batch.observations, part))], batch, part)

    def distribution_of(self, statistics: Sequence[th.Tensor], batch: Batch, part: th.Tensor | slice) -> Distribution:
        """The masked distribution, given logits."""
        logits = apply_masks(statistics[0], None if self.masks is None else self.masks[part])
        return plain_distribution(self.policy.action_space).proba_distribution(logits)

    def logits(self, observations: PyTorchObs) -> th.Tensor:
        """
        The logits of all choices, before any mask.

        :param observations: of the samples
        :return: shape ``(n_samples, n_choices)``
        """
        policy: Any = self.policy
        if has_stock_methods(policy, "get_distribution", "_get_action_dist_from_latent"):
            features = BasePolicy.extract_features(policy, observations, policy.pi_features_extractor)
            return policy.action_net(policy.mlp_extractor.forward_actor(features))
        distribution: Any = policy.get_distribution(observations)
        return family_of(distribution).statistics(distribution)[0]


class _MaskedActor(Actor):
    """The actor of any policy with masks."""

    #: Masks of the next step; ``None`` if all choices are valid.
    masks: th.Tensor | None = None

    def __init__(self, policy: MaskableActorCriticPolicy):
        super().__init__(policy)  # type: ignore[arg-type]
        self._calls = MaskedCalls(policy)  # type: ignore[arg-type]
        self._all_masks: list[th.Tensor | None] = []

    @th.no_grad()
    def _sample(self, observations: PyTorchObs) -> th.Tensor:
        self._all_masks.append(self.masks)
        return self._distribution(observations, self.masks).get_actions()

    def evaluate(self, observations: PyTorchObs, begin: int, end: int) -> tuple[th.Tensor, th.Tensor]:
        """Values and log-probabilities of the actions of this actor in the steps from ``begin`` to ``end``."""
        masks = None if self.masks is None else th.cat(self._all_masks[begin:end])  # type: ignore[arg-type]
        log_prob = self._distribution(observations, masks).log_prob(th.cat(self._actions[begin:end]))
        return self._policy.predict_values(observations), log_prob

    def _distribution(self, observations: PyTorchObs, masks: th.Tensor | None) -> Distribution:
        logits = apply_masks(self._calls.logits(observations), masks)
        return plain_distribution(self._policy.action_space).proba_distribution(logits)


class _MaskedMlpActor(MlpActor):
    """The actor of a plain MLP policy with masks; the outputs that it keeps are masked already."""

    #: Masks of the next step; ``None`` if all choices are valid.
    masks: th.Tensor | None = None

    def _output(self, hidden: th.Tensor) -> th.Tensor:
        return apply_masks(super()._output(hidden), self.masks)


class _MaskedRollout(LeanRollout):
    """A rollout that asks the environments for their masks before each step."""

    model: "MaskableTRPO"
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


class _CheckedMasks(VecEnvWrapper):
    """Environments whose masks are checked before sb3-contrib's loop gets them."""

    def __init__(self, venv: VecEnv, model: "MaskableTRPO"):
        super().__init__(venv)
        self._model = model

    def reset(self) -> VecEnvObs:
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        return self.venv.step_wait()

    def env_method(self, method_name: str, *args: Any, **kwargs: Any) -> list[Any]:
        if method_name == "action_masks":
            return list(self._model.action_masks(self.venv))  # type: ignore[arg-type]
        return self.venv.env_method(method_name, *args, **kwargs)


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
        sizes = choices(self.action_space)
        masks = np.stack([self._checked(index, mask, sum(sizes)) for index, mask in enumerate(env.env_method("action_masks"))])
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

    def _collect(self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, *args: Any) -> bool:
        arguments.check_buffer(type(rollout_buffer), _BUFFERS, "with masks", "shuffle samples away from their masks")
        if self._use_masking and not is_masking_supported(env):
            raise ValueError(
                "The environment has no method `action_masks`: wrap it in sb3-contrib's ActionMasker, or pass "
                "use_masking=False to `learn`."
            )

        def loop(_: Any, env: VecEnv, *args: Any) -> bool:
            # As a function: it needs nothing of its class
            collect: Any = MaskablePPO.collect_rollouts
            return collect(self, _CheckedMasks(env, self), *args, use_masking=self._use_masking)

        return collect_rollouts(self, env, callback, rollout_buffer, *args, rollout_class=_MaskedRollout, loop=loop)

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
