"""Rollouts with scaled rewards, and the first rollout of a training, which there are no statistics for."""

import warnings

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sb3_trpo_ext.parallel.reductions import all_true
from sb3_trpo_ext.rollout.snapshot import Snapshot
from sb3_trpo_ext.update.batch import rollout_batch, take
from sb3_trpo_ext.update.normalization import CLIP, NormalizedExtractor, RewardScale, normalized_extractors

_PRETRAINED = (
    "The policy was changed before its first rollout, as by pretraining. Its observations will not be normalized, since that "
    "would make it another policy: pass norm_obs=False to say that this is meant. To normalize them, call "
    "`policy.features_extractor.update` with those of the demonstrations before the pretraining."
)
#: Samples that are evaluated at a time.
_CHUNK = 4096


class ScaledRewards(VecEnvWrapper):
    """
    Divides rewards by a number, and keeps them as they came.

    :param venv: the environment of one rollout
    :param scale: the number; ``None`` if it is not known yet: then rewards are left as they are
    """

    def __init__(self, venv: VecEnv, scale: float | None):
        super().__init__(venv)
        self.scale = scale
        #: One array per step, as are the ends of episodes.
        self.rewards: list[np.ndarray] = []
        self.dones: list[np.ndarray] = []

    def reset(self) -> VecEnvObs:
        """Reset the environments."""
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        """Wait for the step, and scale its rewards."""
        observations, rewards, dones, infos = self.venv.step_wait()
        self.rewards.append(np.array(rewards))
        self.dones.append(np.array(dones))
        scaled = rewards if self.scale is None else np.clip(rewards / self.scale, -CLIP, CLIP)
        return observations, scaled, dones, infos


class Normalization:
    """
    Follows the rollouts and updates of a model with the statistics of its observations and rewards.

    Statistics of rewards change after a rollout, those of observations after its update: the policy must not change in
    between. Only the first rollout, for which there were none, is given those that it has led to.

    :param policy: before any training
    :param rewards: what scales the rewards; ``None`` to leave them alone
    """

    def __init__(self, policy: ActorCriticPolicy, rewards: RewardScale | None):
        self.rewards = rewards
        self._untrained = Snapshot(policy)
        self._env: ScaledRewards | None = None
        #: What has the observations of the last rollout already.
        self._observed: list[NormalizedExtractor] = []

    def environment(self, env: VecEnv) -> VecEnv:
        """
        The environment of the next rollout.

        :param env: as the model has it
        :return: the same, or around it what scales the rewards
        """
        if self.rewards is None:
            return env
        self._env = ScaledRewards(env, None if self.rewards.is_fresh else self.rewards.scale)
        return self._env

    def after_rollout(self, model: OnPolicyAlgorithm, buffer: RolloutBuffer) -> bool:
        """
        Add a rollout to the statistics of rewards, and the first one to those of observations.

        A policy that has been trained elsewhere before stays the function that it is: its observations are not normalized.

        :param model: after the rollout
        :param buffer: full
        :return: whether the contents of the buffer are now those of the policy with its first statistics
        """
        fresh = [extractor for extractor in normalized_extractors(model.policy) if extractor.is_fresh]
        if fresh and not all_true(self._untrained.is_of(model.policy)):
            for extractor in fresh:
                extractor.freeze()
            fresh = []
            warnings.warn(_PRETRAINED, stacklevel=5)
        has_raw_rewards = self._env is not None and self._env.scale is None
        if self.rewards is not None and self._env is not None:
            self.rewards.update(np.array(self._env.rewards), np.array(self._env.dones))
        is_stock = type(buffer) in (RolloutBuffer, DictRolloutBuffer) and not buffer.generator_ready
        if not is_stock or not (fresh or has_raw_rewards):
            return False
        for extractor in fresh:
            extractor.update(buffer.observations)
        self._observed = fresh
        renormalize_(model, buffer, self.rewards.scale if self.rewards is not None and has_raw_rewards else None)
        return True

    def after_update(self, model: OnPolicyAlgorithm) -> None:
        """
        Add a rollout to the statistics of observations.

        :param model: after the update
        """
        for extractor in normalized_extractors(model.policy):
            if extractor not in self._observed:
                extractor.update(model.rollout_buffer.observations)
        self._observed = []


@th.no_grad()
def renormalize_(model: OnPolicyAlgorithm, buffer: RolloutBuffer, scale: float | None) -> None:
    """
    Give a rollout that was collected before there were statistics the ones that it has led to.

    Values and log-probabilities become those of the policy with its statistics as they are now, so that the ratio is 1 when
    the update begins. The policy is untrained then: its actions hardly depend on the observations.

    :param model: after the rollout
    :param buffer: SB3's own, full
    :param scale: what rewards are divided by, if they have not been yet
    """
    is_discrete = isinstance(model.action_space, spaces.Discrete)
    batch = rollout_batch(buffer, is_discrete, normalize_advantage=False)
    parts = [slice(start, start + _CHUNK) for start in range(0, batch.n_samples, _CHUNK)]
    outputs = [model.policy.evaluate_actions(take(batch.observations, part), batch.actions[part])[:2] for part in parts]
    for array, column in zip((buffer.values, buffer.log_probs), zip(*outputs, strict=True), strict=True):
        # SB3 flattens a buffer environment by environment
        array[:] = th.cat(column).reshape(array.shape[::-1]).T.cpu().numpy()
    if scale is not None:
        np.clip(buffer.rewards / scale, -CLIP, CLIP, out=buffer.rewards)
    last_values = model.policy.predict_values(obs_as_tensor(model._last_obs, model.device))  # type: ignore[arg-type]
    buffer.compute_returns_and_advantage(last_values, dones=np.asarray(model._last_episode_starts))
