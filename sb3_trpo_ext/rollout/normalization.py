"""Rollouts with scaled rewards, and the first rollout of a training, which there are no statistics for."""

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sb3_trpo_ext.update.batch import rollout_batch, take
from sb3_trpo_ext.update.normalization import CLIP, NormalizedExtractor

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


def normalized_extractors(policy: th.nn.Module) -> list[NormalizedExtractor]:
    """What normalizes the observations of a policy: nothing, one features extractor or several."""
    return [module for module in policy.modules() if isinstance(module, NormalizedExtractor)]


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
