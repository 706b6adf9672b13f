"""Normalization that belongs to the agent: of observations within the policy, and of rewards by the scale of their returns."""

import math
import warnings
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor
from torch import nn

from sb3_trpo_ext._observations import parts_of
from sb3_trpo_ext.parallel.moments import Moments, all_joined, joined, moments_of
from sb3_trpo_ext.parallel.reductions import all_true

#: Normalized observations and rewards are clipped to plus or minus this, as in SB3's ``VecNormalize``.
CLIP = 10.0
#: The limit before there are statistics: only infinities are clipped, to a number that overflows in no layer.
FAR = 1e30
#: Added to variances, as in ``VecNormalize``.
EPSILON = 1e-8
#: ``n_samples`` of statistics that were frozen before the first sample; those frozen after n samples have -1 - n.
FROZEN = -1
_NOT_FINITE = (
    "Some observations are infinite or NaN. The statistics that normalize observations skip the rollouts with these: use "
    "finite numbers, such as the range of a sensor."
)


class RunningNormalization(nn.Module):
    """
    ``(x - mean) / std`` by statistics that are buffers of a policy: saved and loaded with it, and moved to its device.

    They change in :meth:`update` alone. Before the first one, nothing is normalized, nor clipped unless it is infinite, and
    after :meth:`freeze` nothing changes.

    :param shape: of one ``x``
    """

    mean: th.Tensor
    var: th.Tensor
    n_samples: th.Tensor
    #: What comes out is within plus or minus this: a tensor, since a number would make the host wait for an accelerator.
    limit: th.Tensor

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.register_buffer("mean", th.zeros(shape))
        self.register_buffer("var", th.ones(shape))
        self.register_buffer("n_samples", th.zeros((), dtype=th.int64))
        self.register_buffer("limit", th.tensor(FAR), persistent=False)

    def _set_limit(self) -> None:
        """Clip if there are statistics."""
        self.limit.fill_(CLIP if int(self.n_samples) not in (0, FROZEN) else FAR)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._set_limit()

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        Normalize and clip.

        :param x: shape ``(n_batch, *shape)``
        :return: the same shape
        """
        return ((x - self.mean) / (self.var + EPSILON).sqrt()).clamp(-self.limit, self.limit)

    def update(self, samples: th.Tensor) -> None:
        """
        Add samples to the statistics, if all of them are finite; under ``torchrun``, those of all processes.

        :param samples: shape ``(n_samples, *shape)``, on any device
        """
        n = self.n_samples.cpu().double()
        if n < 0:
            return
        mean, var = th.stack([self.mean, self.var]).cpu().double()
        total = _with_samples(Moments(n, mean, var * n), samples)
        if total is None:
            warnings.warn(_NOT_FINITE, stacklevel=2)
            return
        # Single precision first: some devices have no double
        self.mean.copy_(total.mean.float())
        self.var.copy_(total.variance.float())
        self.n_samples.copy_(total.n)
        self._set_limit()

    def freeze(self) -> None:
        """Keep the statistics as they are for good."""
        self.n_samples.copy_(th.where(self.n_samples < 0, self.n_samples, FROZEN - self.n_samples))
        self._set_limit()


class OneHotScale(nn.Module):
    """
    One-hot vectors times the square root of their length: entries have a mean square of 1 then, as normalized numbers have.

    Without it, a network hardly sees an observation out of hundreds.

    :param sizes: of the vectors, which are side by side
    """

    scale: th.Tensor

    def __init__(self, sizes: list[int]):
        super().__init__()
        self.register_buffer("scale", th.cat([th.full((size,), math.sqrt(size)) for size in sizes]))

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        Scale.

        :param x: of shape ``(n_batch, ..., sum(sizes))``
        :return: the same shape
        """
        return x * self.scale


class NormalizedExtractor(BaseFeaturesExtractor):
    """
    Normalizes observations, and passes them on to another features extractor.

    Every Box of fewer than three dimensions is normalized, also within a Dict, and so are the one-hot vectors of Discrete and
    MultiDiscrete; images are not.

    :param observation_space: of the environment
    :param features_extractor_class: what gets the normalized observations; SB3's default if ``None``
    :param features_extractor_kwargs: arguments of that class
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
    ):
        is_dict = isinstance(observation_space, spaces.Dict)
        extractor_class = features_extractor_class or (CombinedExtractor if is_dict else FlattenExtractor)
        extractor = extractor_class(observation_space, **(features_extractor_kwargs or {}))
        # NumPy's number for MultiDiscrete, which an LSTM does not take
        super().__init__(observation_space, int(extractor.features_dim))
        self.extractor = extractor
        modules: dict[str, nn.Module] = {}
        modules |= {key: RunningNormalization(shape) for key, shape in normalized_parts(observation_space).items()}
        modules |= {key: OneHotScale(sizes) for key, sizes in one_hot_sizes(observation_space).items()}
        self.normalizations = nn.ModuleDict({key or "observation": module for key, module in modules.items()})

    def forward(self, observations: Any) -> th.Tensor:
        """
        Features of normalized observations.

        :param observations: preprocessed, a batch or a dict of batches
        :return: shape ``(n_batch, features_dim)``
        """
        if not isinstance(observations, dict):
            features: th.Tensor = self.extractor(self.normalizations["observation"](observations))
            return features
        normalized = {key: normalization(observations[key]) for key, normalization in self.normalizations.items()}
        features = self.extractor({**observations, **normalized})
        return features

    def __getattr__(self, name: str) -> Any:
        """What this module does not have is that of the extractor within, such as the ``extractors`` of SB3's for a Dict."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name != "extractor" and hasattr(self, "extractor"):
                return getattr(self.extractor, name)
            raise

    @property
    def is_fresh(self) -> bool:
        """Whether there are statistics, and no observations in them yet."""
        return bool(self._running) and not any(normalization.n_samples for normalization in self._running.values())

    @property
    def _running(self) -> dict[str, RunningNormalization]:
        """What has statistics."""
        return {key: module for key, module in self.normalizations.items() if isinstance(module, RunningNormalization)}

    def freeze(self) -> None:
        """Keep the statistics as they are for good: without any, observations are not normalized."""
        for normalization in self._running.values():
            normalization.freeze()

    def update(self, observations: Any) -> None:
        """
        Add observations to the statistics.

        :param observations: as the environment returns them: shape ``(..., *shape)``, or a dict of those
        """
        for key, normalization in self._running.items():
            part = observations[key] if isinstance(observations, dict) else observations
            normalization.update(th.as_tensor(part.reshape(-1, *normalization.mean.shape)))


def normalized_extractors(policy: nn.Module) -> list[NormalizedExtractor]:
    """What normalizes the observations of a policy: nothing, one features extractor or several."""
    return [module for module in policy.modules() if isinstance(module, NormalizedExtractor)]


def normalized_parts(space: spaces.Space[Any]) -> dict[str, tuple[int, ...]]:
    """
    What :class:`NormalizedExtractor` normalizes by statistics.

    :param space: of the observations
    :return: shapes by the keys of a Dict; by an empty key for any other space
    """
    parts = parts_of(space)
    return {key: part.shape for key, part in parts.items() if isinstance(part, spaces.Box) and len(part.shape) < 3}


def one_hot_sizes(space: spaces.Space[Any]) -> dict[str, list[int]]:
    """
    The one-hot vectors that :class:`NormalizedExtractor` scales.

    :param space: of the observations
    :return: their sizes by the keys of a Dict; by an empty key for any other space
    """
    parts = parts_of(space)
    sizes = {key: [int(part.n)] for key, part in parts.items() if isinstance(part, spaces.Discrete)}
    return sizes | {key: part.nvec.tolist() for key, part in parts.items() if isinstance(part, spaces.MultiDiscrete)}


class RewardScale(nn.Module):
    """
    Divides rewards by the standard deviation of the discounted return so far, as SB3's ``VecNormalize`` does.

    Under ``torchrun``, of the returns of all processes. A module for its state dict, which is saved with a model; what it
    saves is on the CPU.

    :param gamma: discount factor
    """

    n: th.Tensor
    mean: th.Tensor
    m2: th.Tensor

    def __init__(self, gamma: float):
        super().__init__()
        self.gamma = gamma
        for name in Moments._fields:
            self.register_buffer(name, th.zeros((), dtype=th.float64))
        #: Discounted sum of each environment's rewards in the present episode.
        self._returns: th.Tensor | None = None

    @property
    def scale(self) -> float:
        """What rewards are divided by: 1 before the first rollout, and as long as all returns have been equal."""
        return float((self.m2 / self.n + EPSILON).sqrt()) if self.m2 > 0 else 1.0

    @property
    def is_fresh(self) -> bool:
        """Whether there have been no rewards yet."""
        return not self.n

    def start_episodes(self, indices: list[int] | None = None) -> None:
        """
        Forget the episodes that are running: the environments are reset.

        :param indices: which environments, all of them if ``None``
        """
        if indices is None:
            self._returns = None
        elif self._returns is not None:
            self._returns[indices] = 0

    def update(self, rewards: Any, dones: Any) -> None:
        """
        Add the rewards of a rollout, if all of them are finite.

        :param rewards: as the environment gave them, shape ``(n_steps, n_envs)``: an array or a tensor
        :param dones: whether an episode ended with that step, the same shape
        """
        # Some environments return 0 and 1 instead of booleans
        rewards, dones = _in_double(th.as_tensor(rewards)), th.as_tensor(dones).bool()
        if self._returns is None or self._returns.shape != rewards.shape[1:] or self._returns.device != rewards.device:
            self._returns = th.zeros_like(rewards[0])
        history = th.empty_like(rewards)
        for step, (reward, is_end) in enumerate(zip(rewards, dones, strict=True)):
            history[step] = self._returns * self.gamma + reward
            self._returns = history[step].masked_fill(is_end, 0)
        total = _with_samples(Moments(self.n, self.mean, self.m2), history.flatten())
        if total is None:
            self._returns = None
            return
        for name, value in total._asdict().items():
            getattr(self, name).copy_(value)


def _with_samples(before: Moments, samples: th.Tensor) -> Moments | None:
    """Moments with the samples of all processes; ``None`` if some of these are not finite."""
    part = moments_of(_in_double(samples))
    # In one transfer from an accelerator. The squares of numbers that are not finite are not finite either
    mean, m2 = th.stack([part.mean, part.m2]).cpu()
    if not all_true(bool(th.isfinite(m2).all())):
        return None
    return joined(before, all_joined(Moments(m2.new_full((), len(samples)), mean, m2)))


def _in_double(samples: th.Tensor) -> th.Tensor:
    """Samples in double precision: on their own device, unless that is one of Apple's, which have none."""
    return (samples.cpu() if samples.device.type == "mps" else samples).double()
