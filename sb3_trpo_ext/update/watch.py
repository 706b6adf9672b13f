"""A policy as it is now: users and callbacks freeze, unfreeze and replace parts of it, or all of it."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_trpo_ext._checks import ArgumentError
from sb3_trpo_ext._observations import mapped
from sb3_trpo_ext.parallel.reductions import is_parallel
from sb3_trpo_ext.update.calls import PolicyCalls
from sb3_trpo_ext.update.optimizers import follow_
from sb3_trpo_ext.update.structure import PolicyParts, split_policy

#: Of a rollout, that a policy is asked for its parts with.
MAX_OBSERVATIONS = 4096


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
        #: Parameters that neither actions nor values have depended on so far.
        self._unreached: list[nn.Parameter] = []
        self._warned: set[str] = set()

    def parts(
        self,
        policy: ActorCriticPolicy,
        optimizers: Iterable[th.optim.Optimizer] = (),
        observations: Any = None,
    ) -> PolicyParts:
        """
        Actor and critic as they are now. After a change, updates optimizers and warns of what will not be trained.

        :param policy: as it is now
        :param optimizers: of all of its parameters
        :param observations: arrays that it acts on, if there are any: which parameters are in use may depend on them
        """
        now = contents(policy)
        if self._parts is None or list(map(id, now)) != list(map(id, self._contents)):
            parts, self._contents = self._set(policy, self._split(policy, observations)), now
            before, self._named = self._named, dict(policy.named_parameters())
            for optimizer in optimizers:
                follow_(optimizer, before, self._named)
            for message in _untrained(policy, parts):
                if message not in self._warned:
                    self._warned.add(message)
                    warnings.warn(message, stacklevel=5)
            return parts
        return self._parts

    def parts_after(self, policy: ActorCriticPolicy, observations: PyTorchObs) -> PolicyParts:
        """
        What :meth:`parts` returned last, with what a rollout has reached for the first time.

        :param policy: as it was then
        :param observations: of the rollout
        """
        assert self._parts is not None
        # Several processes that train together must all have the same parts
        if self._unreached and not is_parallel():
            return self._set(policy, _joined(policy, self._parts, self._split(policy, observations)))
        return self._parts

    def try_parts(self, policy: ActorCriticPolicy) -> None:
        """As :meth:`parts`, on an observation of zeros. A policy that does not take it has to wait for a rollout."""
        try:
            self.parts(policy)
        except ArgumentError:
            raise
        except Exception:
            self._parts = None

    def _split(self, policy: ActorCriticPolicy, observations: Any) -> PolicyParts:
        """The parts on some of these observations; on one of zeros if there are none, or if several processes must agree."""
        some = None
        if observations is not None and not is_parallel():
            some = mapped(lambda part: th.as_tensor(part[:MAX_OBSERVATIONS], device=policy.device), observations)
        return split_policy(policy, self._calls_class(policy), some)

    def _set(self, policy: ActorCriticPolicy, parts: PolicyParts) -> PolicyParts:
        """Keep parts that have been found; raises a ``ValueError`` if their parameters have several dtypes."""
        reached = [*parts.actor_params, *parts.critic_params]
        dtypes = sorted({str(param.dtype) for param in reached})
        if len(dtypes) > 1:
            raise ArgumentError(
                f"`policy`: the parameters of {type(policy).__name__} that are trained must be of one dtype, got "
                f"{', '.join(dtypes)}: convert or freeze some of them."
            )
        self._parts, known = parts, set(map(id, reached))
        self._unreached = [param for param in policy.parameters() if param.requires_grad and id(param) not in known]
        return parts


def _joined(policy: ActorCriticPolicy, before: PolicyParts, now: PolicyParts) -> PolicyParts:
    """What is the actor's or the critic's by either of two splits; what is both is the actor's."""
    lists: list[Any] = []
    for names in (("actor_params", "critic_params"), ("actor_modules", "critic_modules")):
        actor, critic = ({id(each) for parts in (before, now) for each in getattr(parts, name)} for name in names)
        every: list[Any] = list(policy.parameters() if names[0] == "actor_params" else policy.modules())
        lists += [[each for each in every if id(each) in chosen] for chosen in (actor, critic - actor)]
    return PolicyParts(*lists)


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
