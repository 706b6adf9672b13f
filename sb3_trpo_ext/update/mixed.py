"""Actions of several kinds at once: a Tuple or a Dict of spaces, as independent parts of one distribution."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
    make_proba_distribution,
)
from stable_baselines3.common.preprocessing import get_action_dim
from torch import nn

from sb3_trpo_ext.optim.operators import Statistics
from sb3_trpo_ext.update.distributions import BernoulliFamily, CategoricalFamily, Family, GaussianFamily, register_family


class MixedActions(spaces.Box):
    """
    A Tuple or a Dict of actions as one vector, which is what Stable-Baselines3 can keep in a buffer.

    The parts are side by side, those of a Dict in the order of ``space.spaces``. Box and MultiBinary are flattened, and so is
    MultiDiscrete, whose numbers count from 0 here, as that of Discrete does. Equal to ``space``, so that SB3 takes an
    environment with those actions for one that fits the model.

    :param space: of the environment; its parts are Box, Discrete, MultiDiscrete or MultiBinary
    """

    def __init__(self, space: "spaces.Tuple[Any] | spaces.Dict"):
        self.space = space
        #: The parts, each with one dimension; a Discrete is a MultiDiscrete of one number.
        self.parts = [_flat(part) for part in parts_of_actions(space)]
        bounds = [_bounds(part) for part in self.parts]
        low, high = (np.concatenate(column).astype(np.float32) for column in zip(*bounds, strict=True))
        super().__init__(low, high, dtype=np.float32)

    def structures(self, rows: np.ndarray) -> np.ndarray:
        """
        Actions for the environment.

        :param rows: shape ``(n_actions, n_numbers)``; numbers beyond the bounds of a Box are clipped
        :return: an array of objects, each a tuple or dict like those that ``space.sample()`` returns; shape ``(n_actions,)``
        """
        ends = np.cumsum([get_action_dim(part) for part in self.parts])[:-1]
        columns = np.split(rows, ends, axis=1)
        wholes = [_restored(*pair) for pair in zip(parts_of_actions(self.space), columns, strict=True)]
        actions: Iterable[Any] = zip(*wholes, strict=True)
        if isinstance(self.space, spaces.Dict):
            names = list(self.space.spaces)
            actions = (dict(zip(names, action, strict=True)) for action in actions)
        return np.fromiter(actions, dtype=object, count=len(rows))

    def __eq__(self, other: object) -> bool:
        return bool(self.space == (other.space if isinstance(other, MixedActions) else other))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.space})"


def parts_of_actions(space: "spaces.Tuple[Any] | spaces.Dict") -> list[spaces.Space[Any]]:
    """The spaces that a Tuple or a Dict is made of."""
    return list(space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces)


def _flat(space: Any) -> spaces.Box | spaces.MultiDiscrete | spaces.MultiBinary:
    """A space with the same numbers in one dimension, which are counted from 0."""
    if isinstance(space, spaces.Box):
        # Bounds of double precision are rounded here, and exact again in `structures`
        low, high = (bound.ravel().astype(np.float32) for bound in (space.low, space.high))
        return spaces.Box(low, high, dtype=np.float32)
    if isinstance(space, spaces.MultiBinary):
        return spaces.MultiBinary(math.prod(space.shape))
    return spaces.MultiDiscrete(np.ravel(space.n if isinstance(space, spaces.Discrete) else space.nvec))


def _bounds(part: spaces.Box | spaces.MultiDiscrete | spaces.MultiBinary) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest numbers of a part."""
    if isinstance(part, spaces.Box):
        return part.low, part.high
    high = part.nvec - 1 if isinstance(part, spaces.MultiDiscrete) else np.ones(part.shape)
    return np.zeros_like(high), high


def _restored(space: Any, numbers: np.ndarray) -> np.ndarray:
    """Numbers in the shape and type of a part of the environment's actions, one row for each action."""
    numbers = numbers.reshape(-1, *space.shape)
    if isinstance(space, spaces.Box):
        restored = np.clip(numbers.astype(space.dtype), space.low, space.high)
    else:
        restored = (numbers.astype(np.int64) + getattr(space, "start", 0)).astype(space.dtype)
    return np.asarray(restored)


class MixedDistribution(DiagGaussianDistribution):
    """
    Independent parts: a Gaussian for Box, categoricals for Discrete and MultiDiscrete, Bernoullis for MultiBinary.

    A subclass of SB3's Gaussian because its policies then make a layer and a log std, and pass both to `proba_distribution`.
    The outputs of the layer are means and logits, in the order of the parts; the log std is that of all Gaussian parts.

    :param action_space: the actions as one vector
    """

    #: Those of PyTorch, of all parts.
    distribution: list[th.distributions.Distribution]  # type: ignore[assignment]

    def __init__(self, action_space: MixedActions):
        super().__init__(get_action_dim(action_space))
        self.parts: list[Any] = [make_proba_distribution(part) for part in action_space.parts]
        #: How many actions, outputs of the layer and standard deviations are each part's.
        self.n_actions = [get_action_dim(part) for part in action_space.parts]
        self.n_outputs = [
            sum(part.action_dims) if isinstance(part, MultiCategoricalDistribution) else size
            for part, size in zip(self.parts, self.n_actions, strict=True)
        ]
        self.n_stds = [size * self.is_gaussian(part) for part, size in zip(self.parts, self.n_actions, strict=True)]

    @staticmethod
    def is_gaussian(part: Any) -> bool:
        """Whether a part is a Gaussian."""
        return isinstance(part, DiagGaussianDistribution)

    def where_gaussian(self, sizes: Sequence[int]) -> th.Tensor:
        """
        Tell the numbers of Gaussian parts from others.

        :param sizes: how many numbers are each part's
        :return: booleans
        """
        return th.tensor([self.is_gaussian(part) for part in self.parts]).repeat_interleave(th.tensor(sizes))

    def proba_distribution_net(  # type: ignore[override]
        self, latent_dim: int, log_std_init: float = 0.0
    ) -> tuple[nn.Linear, nn.Parameter | None]:
        """
        Make the output layer and the log std.

        :param latent_dim: inputs of the layer
        :param log_std_init: initial value of the log std
        :return: the layer, and the log std or ``None`` if no part is a Gaussian
        """
        log_std = nn.Parameter(th.ones(sum(self.n_stds)) * log_std_init) if any(self.n_stds) else None
        return nn.Linear(latent_dim, sum(self.n_outputs)), log_std

    def proba_distribution(self, mean_actions: th.Tensor, log_std: th.Tensor | None = None) -> "MixedDistribution":
        """
        Set the parameters.

        :param mean_actions: outputs of the layer
        :param log_std: ``None`` if no part is a Gaussian
        :return: this distribution
        """
        statistics = (mean_actions,) if log_std is None else (mean_actions, log_std)
        self.distribution = []
        for part, own in zip(self.parts, _of_parts(statistics, self.n_outputs, self.n_stds), strict=True):
            inner = part.proba_distribution(*own).distribution
            self.distribution += inner if isinstance(inner, list) else [inner]
        return self

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        """The sum over the parts."""
        return _sum(part.log_prob(own) for part, own in zip(self.parts, actions.split(self.n_actions, dim=1), strict=True))

    def entropy(self) -> th.Tensor:
        """The sum over the parts."""
        return _sum(part.entropy() for part in self.parts)

    def sample(self) -> th.Tensor:
        """The samples of the parts side by side."""
        return th.cat([part.sample() for part in self.parts], dim=1)

    def mode(self) -> th.Tensor:
        """The modes of the parts side by side."""
        return th.cat([part.mode() for part in self.parts], dim=1)


class MixedFamily(Family[Statistics]):
    """
    Independent parts, with statistics ``(outputs,)`` or ``(outputs, log_std)``: those of the parts side by side.

    KL and entropy are sums over the parts, and the Fisher matrix is block diagonal.

    :param distribution: whose parts they are
    """

    def __init__(self, distribution: MixedDistribution):
        self._sizes = distribution.n_outputs, distribution.n_stds
        # Not by `family_of`: a user's own family may describe a part by other numbers
        self._families = [_family(part) for part in distribution.parts]

    def _parts(self, *statistics: Statistics) -> list[tuple[Any, ...]]:
        """The family of each part, with what of some statistics is its own."""
        return list(zip(self._families, *(_of_parts(each, *self._sizes) for each in statistics), strict=True))

    def statistics(self, distribution: Any) -> Statistics:
        """Those of the parts side by side."""
        pairs = zip(self._families, distribution.parts, strict=True)
        return _joined([family.statistics(part) for family, part in pairs])

    def kl(self, old: Statistics, new: Statistics) -> th.Tensor:
        """The sum over the parts."""
        return _sum(family.kl(*pair) for family, *pair in self._parts(old, new))

    def entropy(self, statistics: Statistics, noise: th.Tensor | None = None) -> th.Tensor:
        """The sum over the parts."""
        return _sum(family.entropy(own) for family, own in self._parts(statistics))

    def fisher(self, statistics: Statistics, tangents: Statistics) -> Statistics:
        """Block diagonal."""
        return _joined([family.fisher(*pair) for family, *pair in self._parts(statistics, tangents)])

    def sample_score(self, statistics: Statistics, generator: th.Generator) -> th.Tensor:
        """The scores of the parts side by side."""
        return th.cat([family.sample_score(own, generator) for family, own in self._parts(statistics)], dim=1)

    def std(self, statistics: Statistics) -> th.Tensor | None:
        """That of all Gaussian parts."""
        return statistics[1].exp() if len(statistics) > 1 else None


def _family(part: Any) -> Family[Statistics]:
    """The family of a part."""
    if isinstance(part, MultiCategoricalDistribution):
        return CategoricalFamily(part.action_dims)
    return GaussianFamily() if MixedDistribution.is_gaussian(part) else BernoulliFamily()


def _of_parts(statistics: Statistics, *sizes: Sequence[int]) -> list[Statistics]:
    """Cut statistics into those of the parts; ``sizes`` are the parts' widths, by statistic."""
    columns = [statistic.split(list(widths), dim=-1) for statistic, widths in zip(statistics, sizes, strict=False)]
    return [tuple(own for own in row if own.shape[-1] > 0) for row in zip(*columns, strict=True)]


def _joined(parts: Sequence[Statistics]) -> Statistics:
    """The inverse of :func:`_of_parts`."""
    columns = ([own[index] for own in parts if len(own) > index] for index in range(max(map(len, parts))))
    return tuple(th.cat(column, dim=1) for column in columns)


def _sum(terms: Iterable[th.Tensor]) -> th.Tensor:
    """The sum of tensors of one shape."""
    return th.stack(list(terms)).sum(dim=0)


register_family(MixedDistribution, MixedFamily)
