"""What several tests need: small policies, rollouts without an environment, and matrices behind operators."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from sb3_trpo_ext.optim import LinearOperator, Problem
from sb3_trpo_ext.parallel.reductions import Shares
from sb3_trpo_ext.policies import MlpPolicy
from sb3_trpo_ext.update.batch import Batch, take

VECTOR = spaces.Box(-2.0, 2.0, (3,))
#: The smallest image that NatureCNN takes.
IMAGE = spaces.Box(0, 255, (1, 36, 36), np.uint8)
DICT = spaces.Dict({"position": VECTOR, "door": spaces.Discrete(2)})
BOX_ACTIONS = spaces.Box(-1.0, 1.0, (2,))
#: A part of each kind, with what the parts may have and the spaces alone may not.
TUPLE_ACTIONS = spaces.Tuple(
    [
        spaces.Discrete(3, start=-1),
        spaces.Box(-1.0, 1.0, (2, 1), np.float64),
        spaces.MultiBinary([1, 2]),
        spaces.Box(0.0, 5.0, (1,)),
        spaces.MultiDiscrete(np.array([[2], [3]])),
    ]
)
#: Its parts are sorted by name.
DICT_ACTIONS = spaces.Dict({"move": BOX_ACTIONS, "grip": spaces.Discrete(2)})


class Dense(LinearOperator):
    """A matrix as an operator; counts the products."""

    def __init__(self, matrix: th.Tensor):
        self.matrix = matrix
        self.n_products = 0

    def __matmul__(self, vector: th.Tensor) -> th.Tensor:
        self.n_products += 1
        return self.matrix @ vector


class Preconditioned(Dense):
    """A matrix that offers a preconditioner, and counts the products made before it was asked for."""

    def __init__(self, matrix: th.Tensor, inverse: Callable[[float], th.Tensor | None], cost: float = 0):
        super().__init__(matrix)
        self.inverse, self.cost = inverse, cost
        self.built_after: list[int] = []

    @property
    def preconditioner_cost(self) -> float:
        return self.cost

    def preconditioner(self, damping: float) -> LinearOperator | None:
        self.built_after.append(self.n_products)
        inverse = self.inverse(damping)
        return None if inverse is None else Dense(inverse)


class ScriptedProblem(Problem):
    """A problem made of functions."""

    def __init__(
        self,
        params: Sequence[th.Tensor],
        n_samples: int,
        evaluate: Callable[[th.Tensor | None], tuple[th.Tensor, th.Tensor]],
        fisher: Callable[[], LinearOperator],
        shares: Shares = Shares(),  # noqa: B008 immutable
    ):
        self.params, self.n_samples, self.shares = params, n_samples, shares
        self._evaluate, self._fisher = evaluate, fisher

    def evaluate(self, indices: th.Tensor | None = None) -> tuple[th.Tensor, th.Tensor]:
        return self._evaluate(indices)

    def fisher(self) -> LinearOperator:
        return self._fisher()


def as_matrix(operator: LinearOperator, n_params: int) -> th.Tensor:
    """The matrix of an operator, one basis vector at a time."""
    return th.stack([operator @ basis_vector for basis_vector in th.eye(n_params)], dim=1)


def relative_error(actual: th.Tensor, expected: th.Tensor) -> float:
    """Norm of the difference relative to the norm of what is expected, which must not be zero."""
    assert expected.norm() > 0
    return ((actual - expected).norm() / expected.norm()).item()


def make_policy(
    observation_space: spaces.Space = VECTOR,
    action_space: spaces.Space = BOX_ACTIONS,
    policy_class: type[ActorCriticPolicy] = MlpPolicy,
    **kwargs: Any,
) -> ActorCriticPolicy:
    """
    A small policy in evaluation mode, of the default dtype, with parameters away from where SB3 starts.

    There the last layer is nearly zero, so that many a mistake would go unseen.
    """
    kwargs.setdefault("net_arch", [4])
    dtype = th.get_default_dtype()
    # NatureCNN runs a float32 image through itself when it is made
    th.set_default_dtype(th.float32)
    policy = policy_class(observation_space, action_space, lr_schedule=lambda _: 1e-3, **kwargs).to(dtype)
    th.set_default_dtype(dtype)
    with th.no_grad():
        for param in policy.parameters():
            # Convolutions have their fan-in as scale, or thousands of inputs would drive the layers above to saturation
            fan_in = param[0].numel() if param.dim() > 1 else 4
            param.add_(th.randn_like(param) * min(0.5, fan_in**-0.5))
    policy.set_training_mode(False)
    return policy


def sample_observations(space: spaces.Space, n_samples: int) -> Any:
    """Random observations as tensors, reproducible."""
    space.seed(0)
    if isinstance(space, spaces.Dict):
        return {key: sample_observations(sub, n_samples) for key, sub in space.spaces.items()}
    return th.as_tensor(np.stack([space.sample() for _ in range(n_samples)]))


def make_batch(policy: ActorCriticPolicy, n_samples: int = 6) -> Batch:
    """A rollout of a policy on random observations with random advantages."""
    observations = sample_observations(policy.observation_space, n_samples)
    with th.no_grad():
        if policy.use_sde:
            policy.reset_noise(n_samples)
        distribution = policy.get_distribution(observations)
        actions = distribution.get_actions()
        random = [th.randn(n_samples) for _ in range(3)]
        return Batch(observations, actions, distribution.log_prob(actions), *random)


def thinned(batch: Batch, stride: int) -> Batch:
    """Every k-th sample of a rollout."""
    return cut(batch, slice(None, None, stride))


def cut(batch: Batch, part: slice) -> Batch:
    """Some samples of a rollout."""
    return Batch(take(batch.observations, part), *(tensor[part] for tensor in batch[1:]))


def finite_difference(function: Callable[[], float], params: Sequence[th.Tensor], step: float = 1e-5) -> th.Tensor:
    """The flat gradient by central differences, whose error is of the order of the square of the step."""
    slopes = []
    with th.no_grad():
        for param in params:
            for index in np.ndindex(*param.shape):
                before = param[index].item()
                param[index] = before + step
                above = function()
                param[index] = before - step
                below = function()
                param[index] = before
                slopes.append((above - below) / (2 * step))
    return th.tensor(slopes)


class BetaDistribution(Distribution):
    """A distribution of a user's own, for actions in (0, 1): independent Betas."""

    distribution: th.distributions.Beta

    def __init__(self, action_dim: int):
        super().__init__()
        self.action_dim = action_dim

    def proba_distribution_net(self, latent_dim: int) -> nn.Module:
        return nn.Linear(latent_dim, 2 * self.action_dim)

    def proba_distribution(self, outputs: th.Tensor) -> "BetaDistribution":
        alpha, beta = (1 + nn.functional.softplus(outputs)).chunk(2, dim=1)
        self.distribution = th.distributions.Beta(alpha, beta)
        return self

    def log_prob(self, x: th.Tensor) -> th.Tensor:
        return self.distribution.log_prob(x).sum(dim=1)

    def entropy(self) -> th.Tensor:
        return self.distribution.entropy()

    def sample(self) -> th.Tensor:
        return self.distribution.sample()

    def mode(self) -> th.Tensor:
        return self.distribution.mean

    def actions_from_params(self, outputs: th.Tensor, deterministic: bool = False) -> th.Tensor:
        return self.proba_distribution(outputs).get_actions(deterministic)

    def log_prob_from_params(self, outputs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        actions = self.actions_from_params(outputs)
        return actions, self.log_prob(actions)


class BetaPolicy(MlpPolicy):
    """A policy of a user's own around :class:`BetaDistribution`."""

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        del self.log_std
        self.action_dist = BetaDistribution(get_action_dim(self.action_space))
        self.action_net = self.action_dist.proba_distribution_net(self.mlp_extractor.latent_dim_pi)

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Distribution:
        assert isinstance(self.action_dist, BetaDistribution)
        return self.action_dist.proba_distribution(self.action_net(latent_pi))
