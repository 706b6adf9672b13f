"""What an update has to know of a policy's structure."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch as th
from gymnasium.vector.utils import create_empty_array
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    SquashedDiagGaussianDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.utils import obs_as_tensor
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import is_parametrized

from sb3_trpo_ext.optim.mlp import ELEMENTWISE_ACTIVATIONS
from sb3_trpo_ext.optim.regression import REGRESSION_ACTIVATIONS
from sb3_trpo_ext.update.calls import PolicyCalls
from sb3_trpo_ext.update.distributions import BernoulliFamily, CategoricalFamily, GaussianFamily, family_of
from sb3_trpo_ext.update.mixed import MixedDistribution, MixedFamily
from sb3_trpo_ext.update.normalization import NormalizedExtractor


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


@contextmanager
def _recorded_modules(policy: nn.Module) -> Iterator[set[nn.Module]]:
    """Collect the modules that are called inside the block."""
    called: set[nn.Module] = set()
    with ExitStack() as hooks:
        if "torch._dynamo" in sys.modules:
            # Compiled modules, if there are any, run as they were written: they cannot be traced with these hooks
            hooks.enter_context(th.compiler.set_stance("force_eager"))
        for module in policy.modules():
            # Those of TorchScript take no hooks
            if not isinstance(module, th.jit.ScriptModule):
                hooks.enter_context(module.register_forward_pre_hook(lambda module, _: called.add(module)))
        yield called


def split_policy(
    policy: ActorCriticPolicy, calls: PolicyCalls | None = None, observations: PyTorchObs | None = None
) -> PolicyParts:
    """
    Tell the actor's parameters from the critic's by what reaches the outputs, never by their names.

    Parameters that require no gradient are left out, so either list may be empty.

    :param policy: any policy
    :param calls: how it is asked; ``None`` for one that needs nothing but observations
    :param observations: for which it is asked; ``None`` for a single one of zeros
    :return: its parts
    """
    calls = PolicyCalls(policy) if calls is None else calls
    was_training = policy.training
    # In training mode a BatchNorm layer would learn from, and fail on, one observation
    policy.set_training_mode(False)
    if observations is None:
        zeros: Any = create_empty_array(policy.observation_space, 1)
        observations = obs_as_tensor(zeros, policy.device)
    try:
        with th.enable_grad():
            with _recorded_modules(policy) as actor_modules:
                distribution = calls.distribution_at(observations)
                # Whatever the statistics of the family are, the log-probability of an action depends on all of them
                for_actor = _reached_from(distribution.log_prob(distribution.mode()))
            with _recorded_modules(policy) as critic_modules:
                for_critic = _reached_from(calls.values_at(observations)) - for_actor
    finally:
        policy.set_training_mode(was_training)
    drop_graph_(distribution)
    params = [param for param in policy.parameters() if param.requires_grad]
    return PolicyParts(
        actor_params=[param for param in params if id(param) in for_actor],
        critic_params=[param for param in params if id(param) in for_critic],
        actor_modules=[module for module in policy.modules() if module in actor_modules],
        critic_modules=[module for module in policy.modules() if module in critic_modules - actor_modules],
    )


def unfrozen_parts(policy: ActorCriticPolicy, calls: PolicyCalls | None = None) -> PolicyParts:
    """The parts that a policy would have if nothing were frozen."""
    frozen = [param for param in policy.parameters() if not param.requires_grad]
    policy.requires_grad_(True)
    try:
        return split_policy(policy, calls)
    finally:
        for param in frozen:
            param.requires_grad_(False)


def drop_graph_(distribution: Any) -> None:
    """
    Detach the tensors of a distribution.

    SB3 keeps the last distribution in the policy. With its graph the policy could not be copied (``copy.deepcopy(policy)``),
    and would hold the activations of a whole batch.

    :param distribution: SB3's, or one of PyTorch's in it
    """
    for name, value in list(vars(distribution).items()):
        if th.is_tensor(value) and value.grad_fn is not None:
            setattr(distribution, name, value.detach())
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, th.distributions.Distribution):
                drop_graph_(part)


def _reached_from(output: th.Tensor) -> set[int]:
    """
    Identities of the leaves that a tensor depends on, read off its graph.

    A gradient would tell as well, but hooks on the parameters would see it.
    """
    found: set[int] = set()
    seen: set[Any] = {None}
    nodes: list[Any] = [output.sum().grad_fn]
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            found.add(id(getattr(node, "variable", None)))
            nodes += [following for following, _ in node.next_functions]
    return found


class MlpStructure(NamedTuple):
    """An actor or a critic that is nothing but a multilayer perceptron on flat features."""

    layers: list[nn.Linear]
    activations: list[nn.Module]
    log_std: nn.Parameter | None = None

    def is_all_of(self, params: Sequence[th.Tensor]) -> bool:
        """Whether these are its parameters, in any order; a parameter that two layers share would be there twice."""
        own = [param for layer in self.layers for param in layer.parameters()]
        own += [] if self.log_std is None else [self.log_std]
        return sorted(map(id, own)) == sorted(map(id, params))


#: Distributions of which the last layer's output and the log std are the statistics. Not gSDE, whose std needs the features.
PLAIN_DISTRIBUTIONS: list[type[Distribution]] = [
    DiagGaussianDistribution,
    SquashedDiagGaussianDistribution,
    CategoricalDistribution,
    MultiCategoricalDistribution,
    BernoulliDistribution,
    MixedDistribution,
]
#: Classes of policies whose methods are known. A module for further policies adds to this list and to `PLAIN_DISTRIBUTIONS`.
STOCK_POLICIES: list[type[BasePolicy]] = [ActorCriticPolicy]
#: Families whose statistics these are. Exact types: a user's family, a subclass too, may describe the same distribution by
#: other numbers, and the products of `MlpJacobian` would be of the wrong ones.
_PLAIN_FAMILIES = (GaussianFamily, CategoricalFamily, BernoulliFamily, MixedFamily)


def actor_structure(policy: ActorCriticPolicy) -> MlpStructure | None:
    """
    Recognize an actor that is a plain multilayer perceptron, trainable or not; ``None`` for any other.

    Anything unusual (an overridden method, a hook, a parametrization, another activation) means no.
    """
    if (
        not has_stock_methods(policy, "get_distribution", "_get_action_dist_from_latent")
        or type(policy.action_dist) not in PLAIN_DISTRIBUTIONS
        or type(family_of(policy.action_dist)) not in _PLAIN_FAMILIES
    ):
        return None
    structure = _plain_network(policy, policy.pi_features_extractor, "policy_net", policy.action_net, ELEMENTWISE_ACTIVATIONS)
    return None if structure is None else structure._replace(log_std=getattr(policy, "log_std", None))


def mlp_structure(policy: ActorCriticPolicy, actor_params: Sequence[th.Tensor]) -> MlpStructure | None:
    """
    Recognize an actor whose Jacobian :class:`~sb3_trpo_ext.optim.mlp.MlpJacobian` knows; ``None`` for any other.

    Anything unusual (see :func:`actor_structure`, and frozen or further parameters) means no: then the derivatives are left to
    autograd, which is slower and always right.
    """
    structure = actor_structure(policy)
    return structure if structure is not None and structure.is_all_of(actor_params) else None


def critic_structure(policy: ActorCriticPolicy, critic_params: Sequence[th.Tensor]) -> MlpStructure | None:
    """Recognize a critic that :class:`~sb3_trpo_ext.optim.regression.MlpRegression` can train; ``None`` for any other."""
    if not has_stock_methods(policy, "predict_values") or any(has_gradient_hooks(param) for param in critic_params):
        return None
    structure = _plain_network(policy, policy.vf_features_extractor, "value_net", policy.value_net, REGRESSION_ACTIVATIONS)
    return structure if structure is not None and structure.is_all_of(critic_params) else None


def has_stock_methods(policy: ActorCriticPolicy, *names: str) -> bool:
    """Whether a policy does what one of :data:`STOCK_POLICIES` does when these methods are called."""
    stock = next((base for base in type(policy).__mro__ if base in STOCK_POLICIES), ActorCriticPolicy)
    return all(name not in vars(policy) and getattr(type(policy), name, None) is getattr(stock, name) for name in names)


def _plain_network(
    policy: ActorCriticPolicy, features: nn.Module, name: str, head: nn.Module, activation_types: tuple[type[nn.Module], ...]
) -> MlpStructure | None:
    """
    Take a network apart into linear layers, which have a bias, with an activation between each two of them.

    :param policy: whose extractor of latents has, as its attribute ``name``, all of the network but the last layer
    :param features: the extractor of the features
    :param head: the last layer
    """
    latents = policy.mlp_extractor
    extractor = features.extractor if type(features) is NormalizedExtractor else features
    if (
        type(extractor) is not FlattenExtractor
        or type(latents) is not MlpExtractor
        or _has_hooks(*features.modules(), latents)
    ):
        return None
    body = getattr(latents, name)
    layers: list[nn.Linear] = []
    activations: list[nn.Module] = []
    if not _is_plain(body, (nn.Sequential,)):
        return None
    module: Any
    for module in [*body.children(), head]:
        if _is_plain(module, (nn.Linear,)) and module.bias is not None and len(activations) == len(layers):
            layers.append(module)
        elif _is_plain(module, activation_types) and len(activations) == len(layers) - 1:
            activations.append(module)
        else:
            return None
    return MlpStructure(layers, activations)


def _has_hooks(*modules: nn.Module) -> bool:
    """Whether there is more to a pass through a module, forwards or backwards, than its class's ``forward``."""
    attached = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return bool(_has_any_global_hook()) or any(
        has_own_forward(module) or any(getattr(module, name) for name in attached) for module in modules
    )


def has_own_forward(module: nn.Module) -> bool:
    """Whether a user has replaced a module's ``forward``, or a method such as ``forward_actor``."""
    return any(name.startswith("forward") for name in vars(module))


def has_gradient_hooks(param: th.Tensor) -> bool:
    """Whether there are hooks that see or change a parameter's gradient."""
    return bool(param._backward_hooks or param._post_accumulate_grad_hooks)


def _is_plain(module: nn.Module, types: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module is exactly of one of these types and nothing has been attached to it."""
    return type(module) in types and not is_parametrized(module) and not _has_hooks(module)
