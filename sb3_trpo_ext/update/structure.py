"""What an update has to know of a policy's structure."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
    SquashedDiagGaussianDistribution,
)
from stable_baselines3.common.policies import (
    ActorCriticPolicy,
)
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import is_parametrized

from sb3_trpo_ext.optim.mlp import ELEMENTWISE_ACTIVATIONS
from sb3_trpo_ext.optim.regression import REGRESSION_ACTIVATIONS
from sb3_trpo_ext.update.distributions import BernoulliFamily, CategoricalFamily, GaussianFamily, family_of


class PolicyParts(NamedTuple):
    """Which of a policy's parameters and modules are the actor's and which the critic's; no parameter that is frozen."""

    #: What the action distribution depends on, in the policy's order; shared parameters are among them.
    actor_params: list[nn.Parameter]
    #: What the values depend on and the action distribution does not, in the policy's order.
    critic_params: list[nn.Parameter]
    #: Modules that the action distribution goes through.
    actor_modules: list[nn.Module]
    #: Modules that only the values go through: they alone may be in training mode while the critic is fitted.
    critic_modules: list[nn.Module]


def _example_observation(policy: ActorCriticPolicy) -> PyTorchObs:
    """A batch of one observation that is all zeros."""
    space = policy.observation_space
    if isinstance(space, spaces.Dict):
        zeros: Any = {key: np.zeros(sub.shape, dtype=sub.dtype) for key, sub in space.spaces.items()}
    else:
        zeros = np.zeros(space.shape, dtype=space.dtype)
    return policy.obs_to_tensor(zeros)[0]


@contextmanager
def _recorded_modules(policy: nn.Module) -> Iterator[set[nn.Module]]:
    """Collect the modules that are called inside the block."""
    called: set[nn.Module] = set()
    hooks = [module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in policy.modules()]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def split_policy(policy: ActorCriticPolicy) -> PolicyParts:
    """
    Tell the actor's parameters from the critic's by what reaches the outputs, never by their names.

    Parameters that require no gradient are left out, so either list may be empty.

    :param policy: any policy with ``get_distribution`` and ``predict_values``
    :return: its parts
    :raises ValueError: if its tensors are on several devices
    """
    devices = {str(tensor.device) for tensors in (policy.parameters(), policy.buffers()) for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(
            f"All parameters and buffers of {type(policy).__name__} must be on one device, got {sorted(devices)}: leave it to "
            "the `device` argument to move them."
        )
    was_training = policy.training
    # In training mode a BatchNorm layer would learn from, and fail on, this one observation
    policy.set_training_mode(False)
    params = [param for param in policy.parameters() if param.requires_grad]
    observation = _example_observation(policy)
    with th.enable_grad():
        with _recorded_modules(policy) as actor_modules:
            distribution = policy.get_distribution(observation)
            # Whatever the statistics of the family are, the log-probability of an action depends on all of them
            log_prob = distribution.log_prob(distribution.mode())
        with _recorded_modules(policy) as critic_modules:
            values = policy.predict_values(observation)
        family = family_of(distribution)
        statistics = family.statistics(distribution)
        outputs = [*statistics, log_prob] if isinstance(statistics, tuple) else [log_prob]
        for_actor = _reaches(sum((output.sum() for output in outputs), start=th.zeros(())), params)
        for_critic = _reaches(values.sum(), params)
    policy.set_training_mode(was_training)
    drop_graph_(distribution)
    return PolicyParts(
        actor_params=[param for param, is_actor in zip(params, for_actor, strict=True) if is_actor],
        critic_params=[
            param
            for param, is_actor, is_critic in zip(params, for_actor, for_critic, strict=True)
            if is_critic and not is_actor
        ],
        actor_modules=[module for module in policy.modules() if module in actor_modules],
        critic_modules=[module for module in policy.modules() if module in critic_modules - actor_modules],
    )


def unfrozen_parts(policy: ActorCriticPolicy) -> PolicyParts:
    """The parts that a policy would have if nothing were frozen."""
    frozen = [param for param in policy.parameters() if not param.requires_grad]
    for param in frozen:
        param.requires_grad_(True)
    try:
        return split_policy(policy)
    finally:
        for param in frozen:
            param.requires_grad_(False)


def drop_graph_(distribution: Any) -> None:
    """
    Let a distribution keep its numbers, and forget where they are from.

    SB3 puts the last distribution into the policy. With its graph that could not be copied (``copy.deepcopy(policy)``), and
    would hold the activations of a whole batch.

    :param distribution: SB3's, or one of PyTorch's in it
    """
    for name, value in list(vars(distribution).items()):
        if th.is_tensor(value) and value.grad_fn is not None:
            setattr(distribution, name, value.detach())
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, th.distributions.Distribution):
                drop_graph_(part)


def _reaches(output: th.Tensor, params: list[nn.Parameter]) -> list[bool]:
    """
    Which parameters a scalar depends on.

    Read off its graph. Its gradient would tell as well, but hooks on the parameters would take it for one that is meant.

    :param output: scalar
    :param params: the parameters
    :return: one flag per parameter
    """
    found: set[int] = set()
    seen: set[Any] = set()
    nodes: list[Any] = [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        nodes += [following for following, _ in node.next_functions]
    return [id(param) in found for param in params]


class MlpStructure(NamedTuple):
    """An actor that is nothing but a multilayer perceptron on flat features."""

    layers: list[nn.Linear]
    activations: list[nn.Module]
    log_std: nn.Parameter | None


#: Distributions of which the last layer's output and the log std are the statistics. Not gSDE, whose std needs the features.
PLAIN_DISTRIBUTIONS = (
    DiagGaussianDistribution,
    SquashedDiagGaussianDistribution,
    CategoricalDistribution,
    MultiCategoricalDistribution,
    BernoulliDistribution,
)
#: Families whose statistics these are. Exact types: a user's family, a subclass too, may describe the same distribution by
#: other numbers, and the products of `MlpJacobian` would be of the wrong ones.
_PLAIN_FAMILIES = (GaussianFamily, CategoricalFamily, BernoulliFamily)


def actor_structure(policy: ActorCriticPolicy) -> MlpStructure | None:
    """
    Recognize an actor that is a plain multilayer perceptron, trainable or not.

    Anything unusual (an overridden method, a hook, a parametrization, another activation) means no.

    :param policy: the policy
    :return: the structure, or ``None``
    """
    methods = ("get_distribution", "_get_action_dist_from_latent")
    if (
        not has_stock_methods(policy, *methods)
        or type(policy.action_dist) not in PLAIN_DISTRIBUTIONS
        or type(family_of(policy.action_dist)) not in _PLAIN_FAMILIES
        or type(policy.pi_features_extractor) is not FlattenExtractor
        or type(policy.mlp_extractor) is not MlpExtractor
        or _has_hooks(policy.pi_features_extractor, policy.mlp_extractor)
    ):
        return None
    found = _plain_layers(policy.mlp_extractor.policy_net, policy.action_net, ELEMENTWISE_ACTIVATIONS)
    return None if found is None else MlpStructure(*found, getattr(policy, "log_std", None))


def mlp_structure(policy: ActorCriticPolicy, actor_params: Sequence[th.Tensor]) -> MlpStructure | None:
    """
    Recognize an actor whose Jacobian :class:`~sb3_trpo_ext.optim.mlp.MlpJacobian` knows.

    Anything unusual (see :func:`actor_structure`, and frozen or further parameters) means no: then the derivatives are left to
    autograd, which is slower and always right.

    :param policy: the policy
    :param actor_params: its actor's parameters
    :return: the structure, or ``None``
    """
    structure = actor_structure(policy)
    if structure is None:
        return None
    expected = [param for layer in structure.layers for param in layer.parameters()]
    expected += [] if structure.log_std is None else [structure.log_std]
    return structure if _is_same(expected, actor_params) else None


def critic_structure(policy: ActorCriticPolicy, critic_params: Sequence[th.Tensor]) -> MlpStructure | None:
    """Recognize a critic whose gradient :class:`~sb3_trpo_ext.optim.regression.MlpRegression` knows."""
    if (
        not has_stock_methods(policy, "predict_values")
        or type(policy.vf_features_extractor) is not FlattenExtractor
        or type(policy.mlp_extractor) is not MlpExtractor
        or _has_hooks(policy.vf_features_extractor, policy.mlp_extractor)
        or any(has_gradient_hooks(param) for param in critic_params)
    ):
        return None
    found = _plain_layers(policy.mlp_extractor.value_net, policy.value_net, REGRESSION_ACTIVATIONS)
    if found is None:
        return None
    layers, activations = found
    has_biases = all(layer.bias is not None for layer in layers)
    expected = [param for layer in layers for param in layer.parameters()]
    is_known = has_biases and layers[-1].out_features == 1 and _is_same(expected, critic_params)
    return MlpStructure(layers, activations, None) if is_known else None


def has_stock_methods(policy: ActorCriticPolicy, *names: str) -> bool:
    """Whether a policy does what SB3's does when these methods are called."""
    return all(
        name not in vars(policy) and getattr(type(policy), name, None) is getattr(ActorCriticPolicy, name) for name in names
    )


def _plain_layers(
    body: nn.Module, head: nn.Module, activation_types: tuple[type[nn.Module], ...]
) -> tuple[list[nn.Linear], list[nn.Module]] | None:
    """Take a network apart into linear layers with an activation between each two of them."""
    if not _is_plain(body, (nn.Sequential,)):
        return None
    layers: list[nn.Linear] = []
    activations: list[nn.Module] = []
    for module in [*body.children(), head]:
        if _is_plain(module, (nn.Linear,)) and len(activations) == len(layers):
            assert isinstance(module, nn.Linear)
            layers.append(module)
        elif _is_plain(module, activation_types) and len(activations) == len(layers) - 1:
            activations.append(module)
        else:
            return None
    return layers, activations


def _is_same(expected: Sequence[th.Tensor], params: Sequence[th.Tensor]) -> bool:
    """Whether two lists hold the same parameters, in any order."""
    return sorted(map(id, expected)) == sorted(map(id, params))


def _has_hooks(*modules: nn.Module) -> bool:
    """Whether there is more to a pass through a module, forwards or backwards, than its class's ``forward``."""
    attached = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return bool(_has_any_global_hook()) or any(
        has_own_forward(module) or any(getattr(module, name) for name in attached) for module in modules
    )


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody has put another function into the place of a module's ``forward``, or of one like ``forward_actor``."""
    return any(name.startswith("forward") for name in vars(module))


def has_gradient_hooks(param: th.Tensor) -> bool:
    """Whether somebody is to hear of a parameter's gradient, or to change it."""
    return bool(param._backward_hooks or param._post_accumulate_grad_hooks)


def _is_plain(module: nn.Module, types: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module is exactly of one of these types and nothing has been attached to it."""
    return type(module) in types and not is_parametrized(module) and not _has_hooks(module)
