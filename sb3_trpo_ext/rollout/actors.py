"""How a policy acts during a rollout: with a module call per step, or for a plain MLP with the bare products."""

import math
from collections.abc import Callable

import numpy as np
import torch as th
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    SquashedDiagGaussianDistribution,
    StateDependentNoiseDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, MlpExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from sb3_trpo_ext.optim.mlp import ELEMENTWISE_ACTIVATIONS
from sb3_trpo_ext.update.mixed import MixedDistribution
from sb3_trpo_ext.update.normalization import NormalizedExtractor, OneHotScale, RunningNormalization
from sb3_trpo_ext.update.settings import threads_for
from sb3_trpo_ext.update.structure import (
    PLAIN_DISTRIBUTIONS,
    MlpStructure,
    actor_structure,
    has_own_forward,
    has_stock_methods,
)

#: What `forward` consists of, and what is called in its place.
_METHODS = (
    *("forward", "__call__", "get_distribution", "predict_values", "evaluate_actions", "extract_features"),
    "_get_action_dist_from_latent",
)
#: Modules known to be functions of each observation alone.
_PURE_MODULES: tuple[type[nn.Module], ...] = (
    *(FlattenExtractor, NatureCNN, CombinedExtractor, MlpExtractor, NormalizedExtractor, RunningNormalization, OneHotScale),
    *(nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Flatten, nn.Linear, nn.Conv1d, nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d),
    *(nn.LayerNorm, nn.GroupNorm, nn.Sigmoid, nn.Softplus, nn.SELU, nn.Mish, *ELEMENTWISE_ACTIVATIONS),
)
_NAN = "The actor's network returns a NaN: its parameters or the observations are not finite."


def is_deferrable_policy(policy: ActorCriticPolicy) -> bool:
    """
    Whether a policy is known to give the same values and log-probabilities at the end of a rollout as in the middle.

    An SB3 policy does, unless a method, a module or the distribution is the user's own, or something hooks into its modules: a
    module may draw random numbers, keep a state or mix the observations of a batch.
    """
    are_extractors_replaced = policy.share_features_extractor and not (
        policy.features_extractor is policy.pi_features_extractor is policy.vf_features_extractor
    )
    return (
        has_stock_methods(policy, *_METHODS)
        # Their log-probability depends on the action and the networks alone. That of gSDE too: the noise matrix decides about
        # the action, but given the state the action is a plain Gaussian
        and type(policy.action_dist) in (*PLAIN_DISTRIBUTIONS, StateDependentNoiseDistribution)
        and not are_extractors_replaced
        and not _has_any_global_hook()
        and not any(
            module._forward_hooks or module._forward_pre_hooks or has_own_forward(module) for module in policy.modules()
        )
        and type(policy.mlp_extractor) is MlpExtractor
        and all(type(module) in _PURE_MODULES for child in policy.children() for module in child.modules())
    )


class Actor:
    """The actor of any policy, by the policy's own methods, as long as its parameters stay what they are."""

    def __init__(self, policy: ActorCriticPolicy):
        self._policy = policy
        self._action_shape = policy.action_space.shape or ()
        #: As they were sampled, one tensor per step: the buffer may hold them in another type.
        self._actions: list[th.Tensor] = []
        #: Of the last step, and whether the policy's `action_dist` is at them.
        self._observations: PyTorchObs | None = None
        self._is_shown = False

    def act(self, observations: PyTorchObs) -> np.ndarray:
        """
        Sample actions, from the same random numbers as ``policy.forward``.

        :param observations: one per environment
        :return: shape ``(n_envs, *action_space.shape)``
        """
        # A copy: environments and callbacks may write into it
        return np.array(self._on_host(self._choose(observations)).reshape(-1, *self._action_shape))

    def act_on_device(self, observations: PyTorchObs) -> th.Tensor:
        """
        Sample the same actions as :meth:`act`, and leave them on the device.

        :param observations: one per environment
        :return: shape ``(n_envs, *action_space.shape)``
        """
        return self._choose(observations).reshape(-1, *self._action_shape)

    def _choose(self, observations: PyTorchObs) -> th.Tensor:
        """Sample actions, and keep them."""
        actions = self._sample(observations)
        self._actions.append(actions)
        return actions

    def _on_host(self, actions: th.Tensor) -> np.ndarray:
        """Read what :meth:`_sample` returned."""
        return actions.cpu().numpy()

    @th.no_grad()
    def _sample(self, observations: PyTorchObs) -> th.Tensor:
        """Sample actions without a graph, one per environment."""
        self._observations, self._is_shown = observations, True
        return self._policy.get_distribution(observations).get_actions()

    @th.no_grad()
    def show_distribution(self) -> None:
        """Leave the policy's ``action_dist`` at the last step, as ``policy.forward`` does, for a callback that looks at it."""
        if self._observations is not None and not self._is_shown:
            self._policy.get_distribution(self._observations)
            self._is_shown = True

    def evaluate(self, observations: PyTorchObs, begin: int, end: int) -> tuple[th.Tensor, th.Tensor]:
        """Values and log-probabilities of the actions of this actor in the steps from ``begin`` to ``end``."""
        self._is_shown = False
        # Together: they may share a features extractor
        values, log_probs, _ = self._policy.evaluate_actions(observations, th.cat(self._actions[begin:end]))
        return values, log_probs


class MlpActor(Actor):
    """
    The actor of a plain MLP policy: products, activations and random numbers, without modules and distributions around them.

    Its outputs are kept, so that log-probabilities need no second pass.

    :param policy: in evaluation mode
    :param structure: of its actor
    :param distribution: whose statistics the outputs are; ``None`` for the policy's
    """

    def __init__(self, policy: ActorCriticPolicy, structure: MlpStructure, distribution: Distribution | None = None):
        super().__init__(policy)
        self._distribution = policy.action_dist if distribution is None else distribution
        # Without a graph, so that there is no need for `no_grad` in each step
        self._layers = [(layer.weight.detach(), layer.bias.detach()) for layer in structure.layers]
        self._activations = [activation.forward for activation in structure.activations]
        self._features = policy.pi_features_extractor
        self._log_std = structure.log_std
        self._draw = _sampler(self._distribution, structure.log_std)
        self._outputs: list[th.Tensor] = []
        self._size = sum(weight.numel() for weight, _ in self._layers)

    def _sample(self, observations: PyTorchObs) -> th.Tensor:
        """Sample actions; raises a ``ValueError`` if the network returns a NaN."""
        space, normalize_images = self._policy.observation_space, self._policy.normalize_images
        hidden = self._features(preprocess_obs(observations, space, normalize_images=normalize_images))
        with threads_for(len(hidden) * self._size, hidden.device):
            output = self._output(hidden)
        # In place of the checks of `torch.distributions`. A finite sum has no NaN in it
        if output.device.type == "cpu" and not math.isfinite(output.sum()) and bool(output.isnan().any()):
            raise ValueError(_NAN)
        self._outputs.append(output)
        return self._draw(output)

    def _on_host(self, actions: th.Tensor) -> np.ndarray:
        """Read what has been sampled; in the same transfer from an accelerator, check for the NaN of :meth:`_sample`."""
        if actions.device.type == "cpu":
            return actions.numpy()
        has_nan = self._outputs[-1].isnan().any()
        numbers = th.cat([actions.flatten(), has_nan[None].to(actions.dtype)]).cpu().numpy()
        if numbers[-1]:
            raise ValueError(_NAN)
        return numbers[:-1]

    def _output(self, hidden: th.Tensor) -> th.Tensor:
        """The output of the network for features of shape ``(n_envs, n_inputs)``."""
        output = F.linear(hidden, *self._layers[0])
        for activation, (weight, bias) in zip(self._activations, self._layers[1:], strict=True):
            output = F.linear(activation(output), weight, bias)
        return output

    @th.no_grad()
    def show_distribution(self) -> None:
        """Leave the policy's ``action_dist`` at the last step; as it is if there was none."""
        if self._outputs:
            self._policy.action_dist.proba_distribution(*self._statistics(self._outputs[-1]))

    def evaluate(self, observations: PyTorchObs, begin: int, end: int) -> tuple[th.Tensor, th.Tensor]:
        """Values, and log-probabilities from the outputs that have been kept."""
        distribution = self._distribution.proba_distribution(*self._statistics(th.cat(self._outputs[begin:end])))
        return self._policy.predict_values(observations), distribution.log_prob(th.cat(self._actions[begin:end]))

    def _statistics(self, outputs: th.Tensor) -> tuple[th.Tensor, ...]:
        """What a distribution is made of."""
        return (outputs,) if self._log_std is None else (outputs, self._log_std)


def make_actor(policy: ActorCriticPolicy) -> Actor:
    """The fastest actor for a policy in evaluation mode for which :func:`is_deferrable_policy` holds."""
    structure = actor_structure(policy)
    return Actor(policy) if structure is None else MlpActor(policy, structure)


def _sampler(distribution: Distribution, log_std: th.Tensor | None) -> Callable[[th.Tensor], th.Tensor]:
    """
    How actions are drawn from the outputs of an MLP: the same numbers from the same generator as SB3's distributions.

    Operation by operation what `torch.distributions` does, to the last bit: one action that differs would make two runs with
    the same seed diverge.
    """
    if isinstance(distribution, MixedDistribution):
        sizes, log_stds = distribution.n_outputs, [None] * len(distribution.parts)
        if log_std is not None:
            log_stds = log_std.split(distribution.n_stds)
        draws = [_sampler(*pair) for pair in zip(distribution.parts, log_stds, strict=True)]
        return lambda outputs: th.cat([draw(own) for draw, own in zip(draws, outputs.split(sizes, dim=1), strict=True)], dim=1)
    if isinstance(distribution, DiagGaussianDistribution):
        assert log_std is not None
        std = log_std.detach().exp()
        if isinstance(distribution, SquashedDiagGaussianDistribution):
            return lambda mean: th.randn_like(mean).mul_(std).add_(mean).tanh_()
        return lambda mean: th.randn_like(mean).mul_(std).add_(mean)
    if isinstance(distribution, CategoricalDistribution):
        return lambda logits: _drawn(logits).flatten()
    if isinstance(distribution, MultiCategoricalDistribution):
        sizes = [int(size) for size in distribution.action_dims]
        return lambda logits: th.cat([_drawn(part) for part in logits.split(sizes, dim=1)], dim=1)
    assert isinstance(distribution, BernoulliDistribution), type(distribution)
    # A GPU cannot recover from a NaN here; whether there is one is checked later
    return lambda logits: logits.sigmoid().nan_to_num(0.0).bernoulli()


def _drawn(logits: th.Tensor) -> th.Tensor:
    """Draw from categorical distributions with logits of shape ``(n_envs, n_choices)``; returns shape ``(n_envs, 1)``."""
    # The shift changes nothing but the rounding
    probs = (logits - logits.logsumexp(dim=-1, keepdim=True)).softmax(dim=-1)
    # What `multinomial` does for one draw, without its checks, which take three times as long
    return probs.div_(th.empty_like(probs).exponential_()).argmax(dim=-1, keepdim=True)
