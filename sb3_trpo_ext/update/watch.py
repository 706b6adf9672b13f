"""A policy as it is now: users and callbacks freeze, unfreeze and replace parts of it, or all of it."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_trpo_ext.update.calls import PolicyCalls
from sb3_trpo_ext.update.optimizers import follow_
from sb3_trpo_ext.update.structure import PolicyParts, split_policy


class PolicyWatch:
    """
    Tells a policy's actor from its critic, and does so again whenever the policy has changed.

    :param calls_class: how the policy is asked for its distribution and values
    """

    def __init__(self, calls_class: type[PolicyCalls] = PolicyCalls) -> None:
        self._calls_class = calls_class
        self._contents: list[Any] = []
        self._named: dict[str, nn.Parameter] = {}
        self._parts: PolicyParts | None = None
        self._warned: set[str] = set()

    def parts(self, policy: ActorCriticPolicy, optimizers: Iterable[th.optim.Optimizer] = ()) -> PolicyParts:
        """Actor and critic as they are now. After a change, updates optimizers and warns of what will not be trained."""
        now = contents(policy)
        if self._parts is None or list(map(id, now)) != list(map(id, self._contents)):
            self._parts, self._contents = split_policy(policy, self._calls_class(policy)), now
            before, self._named = self._named, dict(policy.named_parameters())
            for optimizer in optimizers:
                follow_(optimizer, before, self._named)
            for message in _untrained(policy, self._parts):
                if message not in self._warned:
                    self._warned.add(message)
                    warnings.warn(message, stacklevel=5)
        return self._parts


def contents(policy: nn.Module) -> list[Any]:
    """What a policy consists of now: if this list changes, its parts may have."""
    found: list[Any] = []
    for module in policy.modules():
        found.append(module)
        for param in module._parameters.values():
            found += [param, param is not None and param.requires_grad]
    return found


def _untrained(policy: ActorCriticPolicy, parts: PolicyParts) -> list[str]:
    """What in the policy will not be trained, though one might think so."""
    name = type(policy).__name__
    messages = [
        f"The {what} of {name} depends on no parameter of its own that requires a gradient: it will not be trained."
        for what, params in (("action distribution", parts.actor_params), ("value function", parts.critic_params))
        if not params
    ]
    statistics = [
        f"{type(module).__name__} {path}"
        for path, module in policy.named_modules()
        # The names that BatchNorm and InstanceNorm have for theirs, and many normalizing layers after them; and the vectors of
        # a spectral norm's power iteration
        if module in parts.actor_modules
        and any(key.startswith("running_") or key.endswith("_u") for key, _ in module.named_buffers(recurse=False))
    ]
    if statistics:
        messages.append(
            f"The actor of {name} has running statistics that never learn: {', '.join(statistics)}. An actor always runs in "
            "evaluation mode: use LayerNorm or GroupNorm, or normalize the observations with VecNormalize."
        )
    return messages
