"""Rollouts with scaled rewards, and the first rollout of a training, which there are no statistics for."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_trpo_ext._checks import ArgumentError, is_known
from sb3_trpo_ext.rollout.device import set_rewards_
from sb3_trpo_ext.rollout.lean import truncated
from sb3_trpo_ext.rollout.returns import by_step, ending
from sb3_trpo_ext.update.batch import rollout_batch
from sb3_trpo_ext.update.calls import PolicyCalls
from sb3_trpo_ext.update.normalization import CLIP, NormalizedExtractor, RewardScale, normalized_extractors

_PRETRAINED = (
    "The policy was changed before its first rollout, as by pretraining. Its observations will not be normalized, since that "
    "would make it another policy: pass norm_obs=False to say that this is meant. To normalize them, call "
    "`model.observe` with those of the demonstrations before the pretraining."
)
_NOT_SCALED = (
    "The rewards are not scaled, because the rollout was not collected by the class's own `collect_rollouts`: pass "
    "norm_reward=False to say that this is meant, or wrap the environment in VecNormalize."
)
#: Samples that are evaluated at a time.
_CHUNK = 4096


class RecordedRewards:
    """
    Keeps the rewards of a rollout as they came, and divides them by a number after callbacks have seen them.

    :param scale: the number; ``None`` if it is not known yet: then rewards are left as they are
    """

    def __init__(self, scale: float | None):
        self.scale = scale
        #: One array per step, as are the ends of episodes.
        self.rewards: list[np.ndarray] = []
        self.dones: list[np.ndarray] = []
        #: As callbacks left them, while there is no scale.
        self._left: list[np.ndarray] = []
        #: Truncated episodes while there is no scale: step, environment and last observation.
        self.truncated: list[tuple[int, int, Any]] = []

    def seen(self, rewards: Any, dones: Any, infos: Sequence[dict[str, Any]]) -> np.ndarray:
        """Keep a step of the environments; returns its rewards, to be shown to callbacks, which may write to them."""
        n_envs = len(infos)
        # Some environments return lists, tensors, integers, or a number
        array, ends = np.array(rewards).reshape(n_envs), np.array(dones).reshape(n_envs)
        if self.scale is None:
            self.truncated += [(len(self.rewards), *each) for each in truncated(ends, infos)]
        self.rewards.append(array)
        self.dones.append(ends)
        return array.astype(np.result_type(array.dtype, np.float32))

    def scaled(self, rewards: np.ndarray) -> np.ndarray:
        """The rewards of a step, as callbacks have left them, for the buffer."""
        if self.scale is None:
            self._left.append(rewards.copy())
        return _scaled(rewards, self.scale)

    def record(self, buffer: Any) -> tuple[Any, Any]:
        """The rewards of the rollout as they came, and whether episodes ended: shape ``(n_steps, n_envs)``."""
        return np.array(self.rewards), np.array(self.dones)

    def recompute_rewards_(self, model: Any, buffer: Any, scale: float | None) -> None:
        """Scale the rewards of a full buffer (``None``: not at all), and add what truncated episodes are still worth."""
        raw = np.array(self._left)
        # What a callback has written into the buffer counts, except where the value of a last observation is in the number too
        changed = buffer.rewards != raw.astype(buffer.rewards.dtype)
        changed[[step for step, _, _ in self.truncated], [index for _, index, _ in self.truncated]] = False
        raw[changed] = buffer.rewards[changed]
        buffer.rewards[:] = _scaled(raw, scale)
        for step, index, observation in self.truncated:
            buffer.rewards[step, index] += model.gamma * model._terminal_value(buffer, step, index, observation)


def _scaled(rewards: np.ndarray, scale: float | None) -> np.ndarray:
    """Rewards as they are if the scale is ``None``; else scaled and clipped, but for infinities, which an update must find."""
    return rewards if scale is None else np.where(np.isinf(rewards), rewards, np.clip(rewards / scale, -CLIP, CLIP))


class RewardsOnDevice:
    """
    The same for a rollout on the device, whose buffer has the rewards as they came.

    :param scale: what they are divided by; ``None`` if it is not known yet
    """

    def __init__(self, scale: float | None):
        self.scale = scale

    def record(self, buffer: Any) -> tuple[Any, Any]:
        """What :meth:`RecordedRewards.record` returns."""
        return buffer.raw_rewards, buffer.dones

    def recompute_rewards_(self, model: Any, buffer: Any, scale: float | None) -> None:
        """Do what :meth:`RecordedRewards.recompute_rewards_` does."""
        set_rewards_(model, buffer, scale)


class Normalization:
    """
    Follows the rollouts and updates of a model with the statistics of its observations and rewards.

    Statistics of rewards change after a rollout, those of observations after its update: the policy must not change in
    between. Only the first rollout, for which there were none, is normalized by its own.

    :param policy: before any training
    :param rewards: what scales the rewards; ``None`` to leave them alone
    """

    def __init__(self, policy: ActorCriticPolicy, rewards: RewardScale | None):
        self.rewards = rewards
        self.has_observations = bool(normalized_extractors(policy))
        is_fresh = any(extractor.is_fresh for extractor in normalized_extractors(policy))
        #: The networks before any training, as long as there are no statistics; ``None`` after the first update.
        self._untrained: list[th.Tensor] | None = _networks(policy) if is_fresh else None
        self._rollout: RecordedRewards | RewardsOnDevice | None = None
        #: Extractors that have the last rollout already.
        self._observed: list[NormalizedExtractor] = []

    def check(self, model: Any) -> None:
        """
        Check, before a rollout or an update, that what is normalized is what the model says.

        :param model: with the arguments of TRPO
        :raises ValueError: if ``norm_obs`` or ``norm_reward`` has been changed
        """
        for name, is_on in (("norm_obs", self.has_observations), ("norm_reward", self.rewards is not None)):
            value = getattr(model, name)
            if bool(value) != is_on:
                raise ArgumentError(f"`{name}` has become {value!r}, which is decided when a model is made: make another one.")

    def begin_rollout(self, policy: ActorCriticPolicy, is_on_device: bool) -> RecordedRewards | None:
        """
        Prepare for a rollout.

        :param policy: that acts in it
        :param is_on_device: whether the rollout is
        :return: what its rewards go through; ``None`` if they are left alone until the rollout is over
        """
        self._rollout = None
        if self.rewards is None and not any(extractor.is_fresh for extractor in normalized_extractors(policy)):
            return None
        scale = None if self.rewards is None or self.rewards.is_fresh else self.rewards.scale
        if is_on_device:
            self._rollout = RewardsOnDevice(scale)
            return None
        self._rollout = RecordedRewards(scale)
        return self._rollout

    @property
    def scale(self) -> float | None:
        """What the rewards of the present rollout are divided by; ``None`` if they are left alone."""
        return None if self._rollout is None else self._rollout.scale

    def protect_(self, policy: ActorCriticPolicy) -> None:
        """
        Never normalize the observations of a policy that was trained before there were statistics.

        Normalizing them would make it another policy.

        :param policy: whose statistics are frozen in that case
        """
        fresh = [extractor for extractor in normalized_extractors(policy) if extractor.is_fresh]
        if not fresh or self._untrained is None or _are_equal(self._untrained, _networks(policy)):
            return
        for extractor in fresh:
            extractor.freeze()
        warnings.warn(_PRETRAINED, stacklevel=4)

    def after_rollout(self, model: Any, buffer: RolloutBuffer, has_acted: bool) -> bool:
        """
        Add a rollout to the statistics of rewards, and the first one to those of observations.

        :param model: after the rollout
        :param buffer: full
        :param has_acted: whether all actions are those of the policy as it is now
        :return: whether the policy has changed, and the contents of the buffer with it
        """
        self.protect_(model.policy)
        if self.rewards is not None and self._rollout is not None:
            self.rewards.gamma = model.gamma
            self.rewards.update(*self._rollout.record(buffer))
        rollout, self._rollout = self._rollout, None
        if rollout is None or rollout.scale is not None or not isinstance(buffer, RolloutBuffer) or buffer.generator_ready:
            return False
        extractors = normalized_extractors(model.policy) if has_acted and is_known(type(buffer)) else []
        self._observe_first(model, buffer, extractors)
        with th.no_grad():
            # The rewards in the first scale, and advantages and returns of these
            rollout.recompute_rewards_(model, buffer, None if self.rewards is None else self.rewards.scale)
            buffer.compute_returns_and_advantage(*ending(model))
        return bool(self._observed)

    def _observe_first(self, model: Any, buffer: RolloutBuffer, extractors: list[NormalizedExtractor]) -> None:
        """Add a rollout to the statistics of extractors that have none yet, and renew what the policy said in it."""
        self._observed = [extractor for extractor in extractors if extractor.is_fresh]
        for extractor in self._observed:
            extractor.update(buffer.observations)
        if self._observed:
            model._renew_states(buffer)
            evaluate_again_(model, buffer)

    def before_update(self, model: Any, is_known_loop: bool) -> None:
        """
        Do what is left to do for a rollout that a loop of the user's has collected.

        :param model: with that rollout in its buffer
        :param is_known_loop: whether the class itself has collected it, and there is nothing left
        """
        if is_known_loop:
            return
        buffer = model.rollout_buffer
        self.protect_(model.policy)
        if is_known(type(buffer)) and not buffer.generator_ready:
            self._observe_first(model, buffer, normalized_extractors(model.policy))
        if self.rewards is not None and self.rewards.is_fresh:
            warnings.warn(_NOT_SCALED, stacklevel=3)

    def after_update(self, model: OnPolicyAlgorithm) -> None:
        """
        Add a rollout to the statistics of observations.

        :param model: after the update
        """
        self._untrained = None
        for extractor in normalized_extractors(model.policy):
            if extractor not in self._observed:
                extractor.update(model.rollout_buffer.observations)
        self._observed = []


def _networks(policy: ActorCriticPolicy) -> list[th.Tensor]:
    """Copies of what the observations go through."""
    return [param.detach().clone() for name, param in policy.named_parameters() if name.rpartition(".")[2] != "log_std"]


def _are_equal(first: list[th.Tensor], second: list[th.Tensor]) -> bool:
    # In order and not by name, which wrappers such as `torch.compile` change
    return len(first) == len(second) and all(map(th.equal, first, second))


@th.no_grad()
def evaluate_again_(model: Any, buffer: RolloutBuffer) -> None:
    """
    Give a rollout the values and log-probabilities of the policy with its first statistics.

    So the ratio is 1 when the update begins. The policy is untrained: its actions hardly depend on the observations.

    :param model: after the rollout
    :param buffer: full
    """
    is_discrete = isinstance(model.action_space, spaces.Discrete)
    calls: PolicyCalls = model.calls_class.on(model.policy, buffer)
    batch = rollout_batch(buffer, is_discrete, normalize_advantage=False)
    outputs = [
        (calls.values(batch, part), calls.distribution(batch, part).log_prob(batch.actions[part]))
        for part, _ in calls.cut(batch, _CHUNK)
    ]
    arrays: tuple[Any, Any] = buffer.values, buffer.log_probs
    for array, column in zip(arrays, zip(*outputs, strict=True), strict=True):
        numbers = by_step(th.cat(column), array.shape)
        array[:] = numbers if isinstance(array, th.Tensor) else numbers.cpu().numpy()
