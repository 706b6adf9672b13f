"""How a policy acts during a rollout: with a module call per step, or for a plain MLP with the bare products."""

import copy
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    CategoricalDistribution,
    DiagGaussianDistribution,
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
from sb3_trpo_ext.update.structure import (
    PLAIN_DISTRIBUTIONS,
    MlpStructure,
    actor_structure,
    has_own_forward,
    has_stock_methods,
)

#: SB3's distributions, whose log-probability depends on the action and the networks alone. That of gSDE too: the noise matrix
#: decides about the action, but given the state the action is a plain Gaussian.
_DISTRIBUTIONS = (*PLAIN_DISTRIBUTIONS, StateDependentNoiseDistribution)
#: What `forward` consists of, and what is called in its place.
_METHODS = (
    "forward",
    "__call__",
    "get_distribution",
    "predict_values",
    "evaluate_actions",
    "extract_features",
    "_get_action_dist_from_latent",
)
#: Modules that are known to be functions of each observation by itself.
_PURE_MODULES: tuple[type[nn.Module], ...] = (
    *(FlattenExtractor, NatureCNN, CombinedExtractor, MlpExtractor),
    *(nn.Sequential, nn.ModuleDict, nn.Flatten, nn.Linear, nn.Conv2d, *ELEMENTWISE_ACTIVATIONS),
)
_NAN = "The actor's network puts out a NaN: its parameters or the observations are not finite."
#: Multiplications per step up to which a network runs on one thread, for about 0.2 ms at most.
_MAX_SIZE_FOR_ONE_THREAD = 2**22
#: With PyTorch's other backend the number of threads cannot be changed once they run.
_CAN_SET_THREADS = "ATen parallel backend: OpenMP" in th.__config__.parallel_info()


@contextmanager
def one_thread() -> Iterator[None]:
    """
    Let PyTorch compute with one thread for a while, at the cost of a microsecond.

    The results are the same to the last bit. Small products are hardly faster on two threads, but OpenMP's threads go on
    waiting at full speed after them, on the cores that the processes of ``SubprocVecEnv`` need.

    The number of threads belongs to the whole process: in any but the main thread it stays as it is, since two trainings that
    overlap would each put back what the other one has set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = th.get_num_threads()
    th.set_num_threads(1)
    try:
        yield
    finally:
        th.set_num_threads(before)


def is_deferrable_policy(policy: ActorCriticPolicy, observations: PyTorchObs) -> bool:
    """
    Whether a policy gives the same values and log-probabilities at the end of a rollout as in the middle, in any batch.

    An SB3 policy does, unless a method or the distribution is a user's own, or something hooks into its modules. Modules of a
    user's own are tried: they must change nothing, draw no random numbers, and treat each observation by itself.

    :param policy: any policy
    :param observations: a batch to try with
    :return: false if there is any doubt
    """
    if not has_stock_methods(policy, *_METHODS):
        return False
    if type(policy.action_dist) not in _DISTRIBUTIONS:
        return False
    if _has_any_global_hook() or any(
        module._forward_hooks or module._forward_pre_hooks or has_own_forward(module) for module in policy.modules()
    ):
        return False
    if policy.share_features_extractor:
        is_one = policy.features_extractor is policy.pi_features_extractor is policy.vf_features_extractor
        if not is_one:
            return False
    networks = _networks(policy)
    is_known = all(type(module) in _PURE_MODULES for network in networks for module in network.modules())
    return (is_known and type(policy.mlp_extractor) is MlpExtractor) or _is_pure(policy, networks, observations)


def _networks(policy: ActorCriticPolicy) -> list[Any]:
    """
    All that observations go through.

    :param policy: any policy
    :return: two features extractors, the extractor of latents, and the two last layers
    """
    extractors = [policy.pi_features_extractor, policy.vf_features_extractor]
    return [*extractors, policy.mlp_extractor, policy.action_net, policy.value_net]


@th.no_grad()
def _is_pure(policy: ActorCriticPolicy, networks: list[Any], observations: PyTorchObs) -> bool:
    """
    Try whether networks are functions of each observation by itself.

    :param policy: says how observations are preprocessed
    :param networks: as :func:`_networks` returns them
    :param observations: a batch
    :return: whether they seem to be
    """
    try:
        # Copies: what is tried may change itself, and that must not be felt
        copies: list[Any] = list(copy.deepcopy(nn.ModuleList(networks)).eval())
    except Exception:
        # What cannot be copied cannot be tried
        return False
    pi_extractor, vf_extractor, latents, action_net, value_net = copies

    def outputs(batch: PyTorchObs, at_once: bool) -> th.Tensor:
        inputs = preprocess_obs(batch, policy.observation_space, normalize_images=policy.normalize_images)
        if at_once and policy.share_features_extractor:
            latent_pi, latent_vf = latents(pi_extractor(inputs))
        else:
            latent_pi, latent_vf = latents.forward_actor(pi_extractor(inputs)), latents.forward_critic(vf_extractor(inputs))
        return th.cat([action_net(latent_pi), value_net(latent_vf)], dim=1)

    with th.random.fork_rng([policy.device] if policy.device.type == "cuda" else []):
        generator = th.get_rng_state()
        as_usual = outputs(observations, True)
        deferred = outputs(_with_zeros(observations), False)[: len(as_usual)]
        is_silent = th.equal(th.get_rng_state(), generator)
    return is_silent and th.allclose(as_usual, deferred, rtol=1e-4, atol=1e-5)


def _with_zeros(observations: PyTorchObs) -> PyTorchObs:
    """
    Make a batch twice as large.

    :param observations: a batch
    :return: the batch, followed by as many observations that are all zeros
    """
    if isinstance(observations, dict):
        return {key: _with_zeros(value) for key, value in observations.items()}  # type: ignore[misc]
    return th.cat([observations, th.zeros_like(observations)])


class Actor(ABC):
    """
    The actor of a policy, as long as its parameters stay what they are.

    :param policy: in evaluation mode
    """

    def __init__(self, policy: ActorCriticPolicy):
        self._policy = policy
        self._action_shape = policy.action_space.shape or ()
        #: As they were sampled, one tensor per step: the buffer may hold them in another type.
        self._actions: list[th.Tensor] = []

    def act(self, observations: PyTorchObs) -> np.ndarray:
        """
        Sample actions, from the same random numbers as ``policy.forward``.

        :param observations: one per environment
        :return: shape ``(n_envs, *action_space.shape)``
        """
        actions = self._sample(observations)
        self._actions.append(actions)
        # A copy: environments and callbacks may write into it
        return np.array(self._on_host(actions).reshape(-1, *self._action_shape))

    def _on_host(self, actions: th.Tensor) -> np.ndarray:
        """
        Read what has been sampled.

        :param actions: as :meth:`_sample` returned them
        :return: the same numbers
        """
        return actions.cpu().numpy()

    @abstractmethod
    def _sample(self, observations: PyTorchObs) -> th.Tensor:
        """
        Sample actions.

        :param observations: one per environment
        :return: actions as the distribution puts them out, without a graph
        """

    @abstractmethod
    def evaluate(self, observations: PyTorchObs, begin: int, end: int) -> tuple[th.Tensor, th.Tensor]:
        """
        Compute what the steps from ``begin`` to ``end`` of this actor have not been asked for yet.

        :param observations: of these steps, one after the other
        :param begin: first step
        :param end: step after the last one
        :return: values and log-probabilities of the actions
        """


class PolicyActor(Actor):
    """The actor of any policy, by the policy's own methods."""

    @th.no_grad()
    def _sample(self, observations: PyTorchObs) -> th.Tensor:
        """
        Sample actions.

        :param observations: one per environment
        :return: actions as the distribution puts them out
        """
        return self._policy.get_distribution(observations).get_actions()

    def evaluate(self, observations: PyTorchObs, begin: int, end: int) -> tuple[th.Tensor, th.Tensor]:
        """
        Compute values and log-probabilities together: they may share a features extractor.

        :param observations: of these steps, one after the other
        :param begin: first step
        :param end: step after the last one
        :return: values and log-probabilities of the actions
        """
        values, log_probs, _ = self._policy.evaluate_actions(observations, th.cat(self._actions[begin:end]))
        return values, log_probs


class MlpActor(Actor):
    """
    The actor of a plain MLP policy: products, activations and random numbers, without modules and distributions around them.

    Its outputs are kept, so that log-probabilities need no second pass.

    :param policy: in evaluation mode
    :param structure: of its actor
    """

    def __init__(self, policy: ActorCriticPolicy, structure: MlpStructure):
        super().__init__(policy)
        # Without a graph, so that there is no need for `no_grad` in each step
        self._layers = [
            (layer.weight.detach(), None if layer.bias is None else layer.bias.detach()) for layer in structure.layers
        ]
        self._activations = [activation.forward for activation in structure.activations]
        self._log_std = structure.log_std
        self._draw = _sampler(policy, structure)
        space = policy.observation_space
        self._is_vector = isinstance(space, spaces.Box) and len(space.shape) == 1
        self._outputs: list[th.Tensor] = []
        size = sum(weight.numel() for weight, _ in self._layers)
        is_on_cpu = _CAN_SET_THREADS and policy.device.type == "cpu"
        self._max_envs_for_one_thread = _MAX_SIZE_FOR_ONE_THREAD // size if is_on_cpu else 0

    def _sample(self, observations: PyTorchObs) -> th.Tensor:
        """
        Sample actions.

        :param observations: one per environment
        :return: actions as the distribution puts them out
        :raises ValueError: if there is a NaN in what the network puts out
        """
        if self._is_vector:
            hidden = observations.float()  # type: ignore[union-attr]
        else:
            space, normalize_images = self._policy.observation_space, self._policy.normalize_images
            hidden = preprocess_obs(observations, space, normalize_images=normalize_images).flatten(1)  # type: ignore[union-attr]
        if len(hidden) <= self._max_envs_for_one_thread:
            with one_thread():
                output = self._output(hidden)
        else:
            output = self._output(hidden)
        # What the checks of `torch.distributions` are there for. A sum that is finite has no NaN in it
        if output.device.type == "cpu" and not math.isfinite(output.sum()) and bool(output.isnan().any()):
            raise ValueError(_NAN)
        self._outputs.append(output)
        return self._draw(output)

    def _on_host(self, actions: th.Tensor) -> np.ndarray:
        """
        Read what has been sampled, and check on an accelerator, in the one look at it, what :meth:`_sample` does on the CPU.

        :param actions: as :meth:`_sample` returned them
        :return: the same numbers
        :raises ValueError: if there is a NaN in what the network puts out
        """
        if actions.device.type == "cpu":
            return actions.numpy()
        has_nan = self._outputs[-1].isnan().any()
        numbers = th.cat([actions.flatten(), has_nan[None].to(actions.dtype)]).cpu().numpy()
        if numbers[-1]:
            raise ValueError(_NAN)
        return numbers[:-1]

    def _output(self, hidden: th.Tensor) -> th.Tensor:
        """
        Run the network.

        :param hidden: features, shape ``(n_envs, n_inputs)``
        :return: what its last layer puts out
        """
        weight, bias = self._layers[0]
        output = F.linear(hidden, weight, bias)
        for activation, (weight, bias) in zip(self._activations, self._layers[1:], strict=True):
            output = F.linear(activation(output), weight, bias)
        return output

    def evaluate(self, observations: PyTorchObs, begin: int, end: int) -> tuple[th.Tensor, th.Tensor]:
        """
        Compute values, and log-probabilities from the outputs that have been kept.

        :param observations: of these steps, one after the other
        :param begin: first step
        :param end: step after the last one
        :return: values and log-probabilities of the actions
        """
        outputs = th.cat(self._outputs[begin:end])
        statistics = (outputs,) if self._log_std is None else (outputs, self._log_std)
        distribution = self._policy.action_dist.proba_distribution(*statistics)
        return self._policy.predict_values(observations), distribution.log_prob(th.cat(self._actions[begin:end]))


def make_actor(policy: ActorCriticPolicy) -> Actor:
    """
    Choose the cheapest actor that is right.

    :param policy: in evaluation mode, for which :func:`is_deferrable_policy` holds
    :return: the actor
    """
    structure = actor_structure(policy)
    return PolicyActor(policy) if structure is None else MlpActor(policy, structure)


def _sampler(policy: ActorCriticPolicy, structure: MlpStructure) -> Callable[[th.Tensor], th.Tensor]:
    """
    How actions are drawn from the outputs of an MLP: the same numbers from the same generator as SB3's distributions.

    Operation by operation what `torch.distributions` does, to the last bit: an action that is not the same would let two runs
    of one seed part.

    :param policy: with one of the distributions that :func:`~sb3_trpo_ext.update.structure.mlp_structure` knows
    :param structure: of its actor
    :return: from outputs to actions
    """
    distribution = policy.action_dist
    if isinstance(distribution, DiagGaussianDistribution):
        assert structure.log_std is not None
        std = structure.log_std.detach().exp()
        if isinstance(distribution, SquashedDiagGaussianDistribution):
            return lambda mean: th.randn_like(mean).mul_(std).add_(mean).tanh_()
        return lambda mean: th.randn_like(mean).mul_(std).add_(mean)
    if isinstance(distribution, CategoricalDistribution):
        return lambda logits: _drawn(logits).flatten()
    if isinstance(distribution, MultiCategoricalDistribution):
        sizes = [int(size) for size in distribution.action_dims]
        return lambda logits: th.cat([_drawn(part) for part in logits.split(sizes, dim=1)], dim=1)
    # A GPU has no way back from a NaN here, and is asked later whether there is one
    return lambda logits: logits.sigmoid().nan_to_num(0.0).bernoulli()


def _drawn(logits: th.Tensor) -> th.Tensor:
    """
    Draw from categorical distributions.

    :param logits: shape ``(n_envs, n_choices)``
    :return: the choices, shape ``(n_envs, 1)``
    """
    # The shift changes nothing but the rounding
    probs = (logits - logits.logsumexp(dim=-1, keepdim=True)).softmax(dim=-1)
    # What `multinomial` does for one draw, without its checks, which take three times as long
    return probs.div_(th.empty_like(probs).exponential_()).argmax(dim=-1, keepdim=True)
